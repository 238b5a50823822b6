"""Records on disk: nothing is lost, nothing is half written, and what does not fit is refused in one sentence."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from refgemma.numerics import to_bfloat16
from refgemma.sampling import SamplingParams, read_record, record_logits

PARAMS = SamplingParams(
    temperature=0.7, top_k=9, min_p=0.01, logit_bias={3: 0.1}, banned=[4], repetition_penalty=1.1, penalty_window=5,
    seed=2**64 - 1, stop=["\u2028", "END"],
)  # fmt: skip
# What line readers, JSON and web pages trip over.
ODD = {0: "<bos>", 5: '"quoted"\\', 6: "line\nend\r", 7: "\u2028\u0085\x1e", 8: "▁🔑", 9: "</script>"}


def a_record(T=4, V=30, dtype=np.float32):
    rng = np.random.default_rng(8)
    logits = (rng.normal(size=(T, V)) * 3).astype(dtype)
    logits[0, 11] = -np.inf
    return record_logits(logits, PARAMS, prompt_tokens=[0, 5, 6], piece=lambda token: ODD.get(token, f"▁{token}"))


@pytest.fixture
def saved(tmp_path):
    a_record().save(tmp_path / "run.jsonl")
    return tmp_path / "run.jsonl"


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_what_is_written_is_read(tmp_path, dtype):
    record = a_record(dtype=dtype)
    record.save(tmp_path / "run.jsonl")
    again = read_record(tmp_path / "run.jsonl")
    for name in ("params", "prompt_tokens", "tokens", "uniforms"):
        assert getattr(again, name) == getattr(record, name)
    assert again.logits.dtype == dtype
    assert np.array_equal(again.logits, record.logits)
    assert [entry.to_json() for entry in again] == [entry.to_json() for entry in record]
    assert [again.explain(t) for t in range(4)] == [record.explain(t) for t in range(4)]
    assert all(again.piece(token) == text for token, text in ODD.items() if token in record.prompt_tokens)
    again.save(tmp_path / "again.jsonl")
    lines = [(tmp_path / name).read_text().split("\n")[1:] for name in ("run.jsonl", "again.jsonl")]
    assert lines[0] == lines[1]
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{name}.{end}" for name in ("run", "again") for end in ("jsonl", "logits.safetensors")
    }


def test_lines_are_plain_json_with_a_version_and_all_that_is_known(saved):
    header, *lines = [json.loads(line, parse_constant=pytest.fail) for line in saved.read_bytes().split(b"\n")[:-1]]
    assert header["version"] == 1
    assert header["format"] == "refgemma sampling record"
    assert len(lines) == header["tokens"] == 4
    record = read_record(saved)
    assert lines == [json.loads(json.dumps(entry.to_json())) for entry in record]
    mentioned = {candidate["id"] for line in lines for candidate in line["candidates"]}
    assert mentioned <= {int(i) for i in header["pieces"]}
    assert header["pieces"]["5"] == ODD[5]


def test_the_logits_are_an_ordinary_safetensors_file(saved):
    tensors = load_file(saved.with_name("run.logits.safetensors"))
    assert list(tensors) == ["logits"]
    assert np.array_equal(tensors["logits"], a_record().logits)


def test_integers_are_kept_as_float64(tmp_path):
    record_logits([[3, 1, 2]], SamplingParams(temperature=0)).save(tmp_path / "run.jsonl")
    assert read_record(tmp_path / "run.jsonl").logits.tolist() == [[3.0, 1.0, 2.0]]


def test_rows_of_a_larger_array(tmp_path):
    wide = np.random.default_rng(1).normal(size=(3, 20)).astype(np.float32)
    record_logits(wide[:, ::2], SamplingParams(seed=1)).save(tmp_path / "run.jsonl")
    assert np.array_equal(read_record(tmp_path / "run.jsonl").logits, wide[:, ::2])


# ---- by hand


def write_by_hand(path, logits, tokens, uniforms, **header):
    """What another engine would write: the least that is read."""
    save_file({"logits": logits}, path.with_name("foreign.safetensors"))
    first = {
        "format": "refgemma sampling record",
        "version": 1,
        "params": {"temperature": 1.0, "top_k": 3},
        "prompt_tokens": [],
        "tokens": len(tokens),
        "vocab_size": logits.shape[1],
        "logits": {"file": "foreign.safetensors"},
    }
    lines = [{"t": t, "token": token, "u": u} for t, (token, u) in enumerate(zip(tokens, uniforms, strict=True))]
    path.write_text("".join(json.dumps(line) + "\n" for line in (first | header, *lines)))


def test_a_record_made_by_hand_is_read_and_replays(tmp_path):
    logits = np.random.default_rng(3).normal(size=(5, 8)).astype(np.float32)
    uniforms = [0, 0.25, 0.5, 0.75, 0.999]
    tokens = list(record_logits(logits, SamplingParams(temperature=1.0, top_k=3), uniforms=uniforms).tokens)
    write_by_hand(tmp_path / "foreign.jsonl", logits, tokens, uniforms)
    record = read_record(tmp_path / "foreign.jsonl")
    assert record.replay().first_difference is None
    assert record.replay().tokens == tuple(tokens)
    assert record.text(3) == "token 3"
    tokens[2] = int(logits[2].argmin())
    write_by_hand(tmp_path / "foreign.jsonl", logits, tokens, uniforms)
    replay = read_record(tmp_path / "foreign.jsonl").replay()
    assert replay.first_difference == 2
    assert f"token {tokens[2]} was removed by top_k" in replay.reason


def test_logits_in_bfloat16_are_read(tmp_path):
    """As torch writes them; NumPy has no name for it, so the bits go in by hand."""
    logits = np.float32([[1.5, -2.0, 3.0]])
    write_by_hand(tmp_path / "foreign.jsonl", logits, [2], [0.5])
    data = to_bfloat16(logits).tobytes()
    header = json.dumps({"logits": {"dtype": "BF16", "shape": [1, 3], "data_offsets": [0, len(data)]}}).encode()
    (tmp_path / "foreign.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    assert read_record(tmp_path / "foreign.jsonl").logits.tolist() == logits.tolist()


# ---- what is refused


def header_with(**changes):
    def damage(path):
        header, *rest = path.read_text().split("\n")
        path.write_text("\n".join([json.dumps(json.loads(header) | changes), *rest]))

    return damage


def line_with(**changes):
    def damage(path):
        lines = path.read_text().split("\n")
        lines[2] = json.dumps(json.loads(lines[2]) | changes)
        path.write_text("\n".join(lines))

    return damage


def bytes_with(change):
    return lambda path: path.write_bytes(change(path.read_bytes()))


def sidecar_with(change):
    def damage(path):
        sidecar = path.with_name("run.logits.safetensors")
        sidecar.write_bytes(change(sidecar.read_bytes()))

    return damage


DAMAGES = {
    "empty": (bytes_with(lambda b: b""), "it is empty"),
    "cut in a line": (bytes_with(lambda b: b[:-20]), "its last line is cut off"),
    "cut at a line": (bytes_with(lambda b: b[: b[:-1].rindex(b"\n") + 1]), "3 decisions are there, its first"),
    "a line too many": (bytes_with(lambda b: b + b[b[:-1].rindex(b"\n") + 1 :]), "5 decisions are there"),
    "no JSON": (bytes_with(lambda b: b"hello\n"), "line 1 is not JSON"),
    "no text": (bytes_with(lambda b: b"\xff\xfe\n"), "line 1 is not JSON"),
    "NaN": (bytes_with(lambda b: b.replace(b'"u": ', b'"u": NaN, "v": ')), "NaN is not a number of JSON"),
    "another format": (header_with(format="x"), "its first line is not of a refgemma sampling record"),
    "a list": (bytes_with(lambda b: b"[]\n"), "its first line is not of a refgemma sampling record"),
    "another version": (header_with(version=2), "it is of version 2: this reader knows version 1"),
    "a version that only equals": (header_with(version=True), "it is of version True: this reader knows version 1"),
    "a version in float": (header_with(version=1.0), "it is of version 1.0: this reader knows version 1"),
    "no temperature": (header_with(params={}), "params has no temperature: expected the one that the tokens were"),
    "no params": (header_with(params=None), "params is None: expected settings by name"),
    "an unknown setting": (header_with(params={"top_q": 1}), "params has unknown settings: top_q"),
    "a bad setting": (header_with(params={"top_k": 0}), "top_k is 0: expected a whole number of at least 1"),
    "no count": (header_with(tokens="4"), "tokens is '4' and vocab_size 30: expected two whole numbers above 0"),
    "a bad prompt": (header_with(prompt_tokens=[1, 30]), "prompt_tokens has 30: expected a token id from 0 to 29"),
    "no prompt": (header_with(prompt_tokens=None), "prompt_tokens is None: expected a list of token ids"),
    "bad pieces": (header_with(pieces={"5": 5}), "pieces is {'5': 5}: expected texts by token id"),
    "lines out of order": (line_with(t=2), "line 3 is not that of token 1"),
    "a bad token": (line_with(token=30), "token has 30: expected a token id from 0 to 29"),
    "a bad u": (line_with(u=1.0), "u of token 1 is 1.0: expected a number in [0, 1)"),
    "a u in words": (line_with(u="0.5"), "u of token 1 is '0.5': expected a number in [0, 1)"),
    "another place": (header_with(logits={"file": "../run.logits.safetensors"}), "the name of a file beside it"),
    "no place": (header_with(logits={}), "logits is {}: expected the name of a file beside it"),
    "another vocabulary": (header_with(vocab_size=29), "holds F32 of shape (4, 30): expected floats of shape (4, 29)"),
    "one other bit": (sidecar_with(lambda b: b[:-1] + bytes([b[-1] ^ 1])), "is not the file that was written with it"),
    "logits cut off": (sidecar_with(lambda b: b[:-8]), "run.logits.safetensors is cut off"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGES)
def test_damage_is_one_clear_sentence(saved, case):
    damage, reason = DAMAGES[case]
    read_record(saved)
    damage(saved)
    with pytest.raises(ValueError, match="not a sound record: ") as caught:
        read_record(saved)
    message = str(caught.value)
    assert reason in message
    assert message.startswith(str(saved))
    assert "\n" not in message


def test_a_sidecar_of_another_record_is_refused(saved):
    """As after a crash between the two renames, or when one of the two files is copied."""
    other = saved.with_name("other.jsonl")
    record_logits(np.zeros((4, 30), np.float32), PARAMS).save(other)
    other.with_name("other.logits.safetensors").replace(saved.with_name("run.logits.safetensors"))
    with pytest.raises(ValueError, match="is not the file that was written with it: their sha256 differ"):
        read_record(saved)


def test_missing_files_are_one_clear_sentence(saved):
    saved.with_name("run.logits.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"run\.logits\.safetensors is missing: it belongs to .*run\.jsonl and"):
        read_record(saved)
    with pytest.raises(FileNotFoundError, match="does not exist or is not a file: expected a sampling record"):
        read_record(saved.with_name("absent.jsonl"))


def test_a_sidecar_without_logits_is_refused(saved):
    save_file({"scores": np.zeros((4, 30), np.float32)}, saved.with_name("run.logits.safetensors"))
    with pytest.raises(ValueError, match="holds no tensor called logits"):
        read_record(saved)


def test_nothing_is_half_written(saved, monkeypatch):
    before = {path.name: path.read_bytes() for path in saved.parent.iterdir()}

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    for place in ("refgemma.sampling.record_file.json.dumps", "refgemma.sampling.record.observe"):
        other = record_logits(np.zeros((3, 30), np.float32), PARAMS)  # a new one: it keeps what it has worked out
        with monkeypatch.context() as patch:
            patch.setattr(place, fail)
            with pytest.raises(KeyboardInterrupt):
                other.save(saved)
        assert {path.name: path.read_bytes() for path in saved.parent.iterdir()} == before
    other.save(saved)
    assert len(read_record(saved)) == 3


def test_a_place_that_cannot_be_written_to(tmp_path):
    with pytest.raises(OSError, match=r"^cannot write .*absent.*: no such folder$"):
        a_record().save(tmp_path / "absent" / "run.jsonl")


@pytest.mark.parametrize("what", ["device", "pipe", "folder", "pipe for the logits"])
def test_what_is_no_file_is_not_replaced(tmp_path, what):
    path = Path("/dev/null") if what == "device" else tmp_path / "run.jsonl"
    taken = tmp_path / "run.logits.safetensors" if what == "pipe for the logits" else path
    if what == "folder":
        path.mkdir()
    elif what != "device":
        os.mkfifo(taken)
    kind = "a directory" if what == "folder" else "a device or a pipe: expected the name of a file"
    with pytest.raises(OSError, match=f"^cannot write {taken}: is {kind}$"):
        a_record().save(path)
    assert not taken.is_file()
    if what != "device":
        assert [found.name for found in tmp_path.iterdir()] == [taken.name]


def test_numbers_keep_all_their_digits(tmp_path):
    """u is written as the shortest text that gives the same float64 again."""
    u = math.nextafter(1.0, 0.0)
    record_logits(np.zeros(3), SamplingParams(), uniforms=[u]).save(tmp_path / "run.jsonl")
    assert read_record(tmp_path / "run.jsonl").uniforms == (u,)
