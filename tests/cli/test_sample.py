"""`refgemma sample`: tokens from logits of any model, and from records, with no model loaded."""

import json
import os

import numpy as np
import pytest

import refgemma
from refgemma.cli import main
from refgemma.sampling import SamplingParams, decide, read_record, record_logits, uniform
from tests.sampling.shown import AWKWARD, awkward_record, plain_record

PROBS = np.array([[8.0, 4.0, 2.0, 1.0], [1.0, 2.0, 4.0, 8.0]]) / 15


@pytest.fixture(autouse=True)
def no_model(monkeypatch):
    """Loading one would be a mistake here."""
    monkeypatch.setattr(refgemma, "load", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.setattr("refgemma.cli.options.load", lambda *_, **__: pytest.fail("loaded"))


@pytest.fixture
def sample(capsys):
    """``sample("x.npy", ...)``: exit code, standard output, standard error."""

    def sample(*arguments):
        code = main(["sample", *map(str, arguments)])
        return code, *capsys.readouterr()

    return sample


@pytest.fixture
def logits(tmp_path):
    """A file of two rows of logits, (2, 4)."""
    np.save(tmp_path / "x.npy", np.log(PROBS))
    return tmp_path / "x.npy"


@pytest.fixture
def recorded(tmp_path):
    """A record on disk, of the same logits."""
    plain_record().save(tmp_path / "run.jsonl")
    return tmp_path / "run.jsonl"


def printed(out):
    return json.loads(out)


def test_tokens_are_those_of_the_draw(sample, logits):
    code, out, err = sample(logits, "--temperature", "1", "--top-p", "0.9", "--seed", "7", "--json")
    assert (code, err) == (0, "")
    # By hand: with p = 0.9, 8, 4 and 2 of 15 stay. u = 0.872 of 14 is 12.2, in the third; u = 0.083 of 14 is 1.16 of
    # (2, 4, 8), in the first of these, token 1.
    assert printed(out)["tokens"] == [2, 1]
    assert [entry["kept"] for entry in printed(out)["decisions"]] == [3, 3]
    assert printed(out)["settings"]["seed"] == 7
    assert printed(out)["texts"] == ["[2]", "[1]"]
    assert printed(sample(logits, "--temperature", "1", "--seed", "8", "--json")[1])["tokens"] != [2, 1]


def test_one_row_is_one_token(sample, tmp_path):
    np.save(tmp_path / "x.npy", np.log(PROBS[0]))
    code, out, err = sample(tmp_path / "x.npy", "--temperature", "0.5", "--top-k", "2", "--seed", "7")
    assert (code, err) == (0, "")
    assert "temperature 0.5, top k 2, seed 7" in out
    assert "Token 0 is token 1" in out  # u = 0.872 is beyond the first token's 80 %
    assert "removed" in out


def test_every_format_says_the_same(sample, logits, tmp_path):
    array = np.log(PROBS)
    np.savez(tmp_path / "x.npz", logits=array, other=array[0])
    (tmp_path / "x.json").write_text(json.dumps(array.tolist()))
    want = sample(logits, "--seed", "7", "--json")
    assert sample(tmp_path / "x.npz", "--seed", "7", "--json") == want
    assert sample(tmp_path / "x.json", "--seed", "7", "--json") == want
    other = printed(sample(tmp_path / "x.npz", "--tensor", "other", "--seed", "7", "--json")[1])
    assert other["tokens"] == printed(want[1])["tokens"][:1]


def test_every_setting_reaches_the_steps(sample, tmp_path):
    rng = np.random.default_rng(5)
    rows = 3 * rng.normal(size=(6, 40))
    np.save(tmp_path / "x.npy", rows)
    settings = {
        "temperature": 1.5,
        "top_k": 30,
        "top_p": 0.95,
        "min_p": 0.01,
        "typical_p": 0.9,
        "repetition_penalty": 1.3,
        "frequency_penalty": 0.5,
        "presence_penalty": -0.25,
        "penalty_window": 4,
        "seed": 3,
    }
    options = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    options += ["--logit-bias", "5:-2.5", "--logit-bias", "7:1", "--banned", "3,4", "--prompt-tokens", "1,2,7"]
    params = SamplingParams(**settings, logit_bias={5: -2.5, 7: 1.0}, banned=[3, 4])
    output = []
    for t, row in enumerate(rows):
        output.append(decide(row, params, [1, 2, 7], output, uniform(3, t)).token)
    found = printed(sample(tmp_path / "x.npy", *options, "--json")[1])
    assert found["tokens"] == output
    steps = [step["name"] for step in found["decisions"][-1]["steps"]]
    assert len(steps) == len(set(steps)) == 10


def test_what_another_engine_chose(sample, logits):
    options = ("--temperature", "1", "--tokens", "3,0", "--uniforms", "0.25,0.5", "--json")
    entries = printed(sample(logits, *options)[1])["decisions"]
    assert [entry["token"] for entry in entries] == [3, 0]
    assert [entry["u"] for entry in entries] == [0.25, 0.5]
    assert [entry["drawn"] for entry in entries] == [0, 3]


def test_texts_come_from_a_tokenizer(sample, logits, small_tokenizer, tmp_path):
    (tmp_path / "t.json").write_text(json.dumps(["\u2581red", "<b>", "\n", "\U0001f98a"]))
    options = ("--temperature", "1", "--seed", "7", "--tokenizer", tmp_path / "t.json")
    assert printed(sample(logits, *options, "--json")[1])["texts"] == ["\n", "<b>"]
    out = sample(logits, *options)[1]
    assert "'\\n'" in out
    assert "'<b>'" in out
    np.save(tmp_path / "wide.npy", np.eye(500)[:2] * 50)
    out = sample(tmp_path / "wide.npy", "--tokenizer", small_tokenizer.path, "--json")[1]
    assert printed(out)["texts"] == ["<pad>", "<eos>"]


def test_explain_and_why_not(sample, logits, tmp_path):
    (tmp_path / "t.json").write_text(json.dumps(["\u2581red", "green", "3", ""]))
    options = (logits, "--temperature", "1", "--top-k", "2", "--seed", "7", "--tokenizer", tmp_path / "t.json")
    record = record_logits(
        np.load(logits),
        SamplingParams(temperature=1.0, top_k=2, seed=7),
        piece=["\u2581red", "green", "3", ""].__getitem__,
    )
    assert record.explain(1) in sample(*options, "--explain", "1")[1]
    asked = printed(sample(*options, "--explain", "1", "--why-not", "0:green", "--json")[1])
    assert asked["explain"] == record.explain(1)
    assert asked["why_not"] == record.why_not(0, 1)
    # By id, and by text with its space.
    assert printed(sample(*options, "--why-not", "0:3", "--json")[1])["why_not"] == record.why_not(0, 3)
    assert printed(sample(*options, "--why-not", "1: red", "--json")[1])["why_not"] == record.why_not(1, 0)
    assert "removed by top_k" in sample(*options, "--why-not", "1:0")[1]


def test_engines_are_compared(sample, tmp_path):
    np.save(tmp_path / "x.npy", np.log([0.6, 0.3, 0.1]))
    options = (tmp_path / "x.npy", "--temperature", "2", "--top-p", "0.6", "--seed", "7")
    out = sample(*options, "--compare", "transformers, llama.cpp")[1]
    assert "part at top_p" in out
    found = printed(sample(*options, "--compare", "transformers,llama.cpp", "--json")[1])["compare"]
    assert found["engines"]["transformers"]["kept"] == 2
    assert found["engines"]["llama.cpp"]["top"] == [{"id": 0, "probability": 1.0}]
    assert found["partings"][0]["step"] == "top_p"


def test_a_replay_gives_the_same_tokens(sample, recorded):
    code, out, err = sample("--replay", recorded, "--json")
    assert (code, err) == (0, "")
    assert printed(out)["replay"] == {
        "tokens": [0, 3],
        "first_difference": None,
        "reason": read_record(recorded).replay().reason,
    }


def test_a_replay_that_differs_by_itself_is_found_wanting(sample, tmp_path):
    awkward_record().save(tmp_path / "other.jsonl")  # chosen by another engine
    code, out, _ = sample("--replay", tmp_path / "other.jsonl")
    assert code == 1
    assert read_record(tmp_path / "other.jsonl").replay().reason in out


def test_a_replay_with_another_setting_shows_where_it_differs(sample, recorded):
    record = read_record(recorded)
    code, out, _ = sample("--replay", recorded, "--temperature", "5", "--top-k", "4")
    # Weights 8, 4, 2, 1 to the power 1 / 5: 1.52, 1.32, 1.15, 1 of 4.98. u = 0.5 is at 2.49, in the second.
    assert code == 0
    want = record.replay(temperature=5.0, top_k=4)
    assert (want.first_difference, want.tokens) == (0, (1,))
    assert want.reason in out
    found = printed(sample("--replay", recorded, "--temperature", "5", "--top-k", "4", "--json")[1])
    assert found["replay"]["first_difference"] == 0
    # The decisions shown are those of the new settings on the old tokens.
    assert (found["decisions"][0]["token"], found["decisions"][0]["drawn"]) == (0, 1)
    assert found["settings"]["temperature"] == 5.0


def test_a_replay_with_another_seed_draws_anew(sample, recorded):
    found = printed(sample("--replay", recorded, "--seed", "11", "--json")[1])
    assert [entry["u"] for entry in found["decisions"]] == [uniform(11, 0), uniform(11, 1)]
    assert printed(sample("--replay", recorded, "--json")[1])["decisions"][0]["u"] == 0.5


def test_a_record_can_be_saved_again_and_looked_at(sample, recorded, logits, tmp_path):
    pytest.importorskip("matplotlib")
    outputs = ("--record", tmp_path / "again.jsonl", "--page", tmp_path / "p.html", "--picture", tmp_path / "p.png")
    assert sample("--replay", recorded, *outputs)[0] == 0
    again = read_record(tmp_path / "again.jsonl")
    assert (again.tokens, again.uniforms) == ((0, 3), (0.5, 0.6))
    assert again.piece(0) == "\u2581red"
    assert "<h1>" in (tmp_path / "p.html").read_text()
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_awkward_texts_pass(sample, tmp_path):
    V = len(AWKWARD)
    np.save(tmp_path / "x.npy", np.zeros((V, V)))
    (tmp_path / "t.json").write_text(json.dumps(AWKWARD))
    tokens = ",".join(map(str, range(V)))
    code, out, err = sample(tmp_path / "x.npy", "--tokens", tokens, "--tokenizer", tmp_path / "t.json")
    assert (code, err) == (0, "")
    assert len(out.splitlines()) == 2 + V + 1
    assert "' <b>bold</b>'" in out
    assert "'\\n\\n\\n'" in out
    assert "\u2028" not in out  # escaped, as is all that moves the cursor


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no logits were given: expected a file of logits, or --replay FILE.jsonl"),
        (["x.npy", "--replay", "run.jsonl"], "LOGITS and --replay were both given"),
        (["--replay", "run.jsonl", "--tokens", "1"], "--tokens and --replay were both given"),
        (["--replay", "absent.jsonl"], "absent.jsonl does not exist"),
        (["absent.npy"], "absent.npy does not exist"),
        (
            ["x.txt"],
            "x.txt does not exist or is not a file: expected a safetensors, .npz, .npy or .json file of logits",
        ),
        (["x.npy", "--top-k", "0"], "top_k is 0"),
        (["x.npy", "--top-p", "1.5"], "top_p is 1.5"),
        (["x.npy", "--temperature", "-1"], "temperature is -1.0"),
        (["x.npy", "--repetition-penalty", "0"], "repetition_penalty is 0"),
        (["x.npy", "--seed", "-1"], "seed is -1"),
        (["x.npy", "--max-tokens", "3"], "unrecognized arguments: --max-tokens"),
        (["x.npy", "--logit-bias", "5"], "argument --logit-bias: expected ID:X, such as 107:-2.5, not '5'"),
        (["x.npy", "--logit-bias", "1:1", "--logit-bias", "1:2"], "expected every token id once"),
        (["x.npy", "--banned", "0-3"], "argument --banned: expected whole numbers"),
        (["x.npy", "--banned", "0,1,2,3"], "expected it to leave at least one"),
        (["x.npy", "--banned", "4"], "token id 4 of banned is outside the vocabulary of 4"),
        (["x.npy", "--tokens", "1"], "1 tokens were given for 2 rows of logits"),
        (["x.npy", "--tokens", "1,9"], "token id 9"),
        (["x.npy", "--uniforms", "0.5,1"], "u is 1.0: expected a number in [0, 1)"),
        (["x.npy", "--uniforms", "0.5,0.5", "--seed", "7"], "--uniforms and --seed were both given"),
        (["x.npy", "--uniforms", "0.5,x"], "argument --uniforms: expected numbers"),
        (["x.npy", "--explain", "2"], "--explain asks for token 2: expected 0 to 1"),
        (["x.npy", "--explain", "-1"], "--explain asks for token -1"),
        (["x.npy", "--why-not", "3"], "--why-not is '3': expected T:TOKEN"),
        (["x.npy", "--why-not", "2:3"], "--why-not asks for token 2"),
        (["x.npy", "--why-not", "0:9"], "token id 9 is outside the vocabulary of 4"),
        (["x.npy", "--why-not", "0:red"], "no token is known by the text 'red': give its id, or --tokenizer FILE"),
        (["x.npy", "--why-not", "0:"], "no token is known by the text ''"),
        (["x.npy", "--compare", "transformers"], "expected two or more of"),
        (["x.npy", "--compare", "transformers,nonsense"], "unknown engine 'nonsense'"),
        (["x.npy", "--tokenizer", "t.json"], "t.json has 5 tokens, the logits have 4 entries"),
        (["x.npy", "--tensor", "a"], "leave out --tensor"),
        (["x.npy", "--picture", "p.gif"], "p.gif ends in '.gif': expected .png, .svg, .pdf"),
        (["x.npy", "--page", "none/p.html"], "cannot write none/p.html"),
        (["x.npy", "--record", "none/p.jsonl"], "cannot write none/p.jsonl: no such folder"),
        (["x.npy", "--record", "."], "cannot write .: is a directory"),
    ],
)
def test_bad_use_is_one_sentence(sample, logits, recorded, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.json").write_text('["a", "b", "c", "d", "e"]')
    before = sorted(tmp_path.iterdir())
    code, out, err = sample(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("refgemma: ")
    assert words in err
    assert err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_record_takes_the_place_of_no_device(sample, logits, tmp_path):
    os.mkfifo(tmp_path / "pipe")  # and not a real device, which the superuser could lose here
    assert "is a device or a pipe" in sample(logits, "--record", tmp_path / "pipe")[2]
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize(
    ("arguments", "one", "other"),
    [
        (["x.npy", "--record", "x.npy"], "--record", "LOGITS"),
        (["x.npy", "--page", "./x.npy"], "--page", "LOGITS"),
        (["x.npy", "--page", "link"], "--page", "LOGITS"),
        (["x.png", "--picture", "x.png"], "--picture", "LOGITS"),
        (["x.npy", "--record", "b.jsonl", "--page", "b.jsonl"], "--record", "--page"),
        (["x.npy", "--record", "b", "--page", "b.logits.safetensors"], "the logits beside --record", "--page"),
        (["x.npy", "--page", "p.png", "--picture", "p.png"], "--page", "--picture"),
        (["x.npy", "--page", "t.json", "--tokenizer", "t.json"], "--page", "--tokenizer"),
        (["run.logits.safetensors", "--record", "run.jsonl"], "the logits beside --record", "LOGITS"),
        (["--replay", "run.jsonl", "--record", "run.jsonl"], "--record", "--replay"),
        (["--replay", "run.jsonl", "--record", "run"], "the logits beside --record", "the logits of --replay"),
        (["--replay", "run.jsonl", "--page", "run.logits.safetensors"], "--page", "the logits of --replay"),
    ],
)
def test_no_file_is_written_over_another(sample, logits, recorded, tmp_path, monkeypatch, arguments, one, other):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.json").write_text('["a", "b", "c", "d"]')
    (tmp_path / "x.png").write_text("old")
    (tmp_path / "link").symlink_to("x.npy")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    code, out, err = sample(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"refgemma: {one} and {other} are the same file, ")
    assert err.endswith(": expected a file of its own for each\n")
    assert err.count("\n") == 1
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_failure_leaves_old_files_as_they_were(sample, logits, tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("p.html", "p.png", "p.jsonl"):
        (tmp_path / name).write_text("old")
    places = ("--page", tmp_path / "p.html", "--picture", tmp_path / "p.png", "--record", tmp_path / "p.jsonl")
    assert sample(logits, *places, "--explain", "9")[0] == 2
    assert {(tmp_path / name).read_text() for name in ("p.html", "p.png", "p.jsonl")} == {"old"}
