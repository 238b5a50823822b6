"""A trace holds what the tap sees, whatever its length and wherever it is kept; its file says what it is."""

import json
import tracemalloc

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import refgemma
from refgemma.config import to_json
from refgemma.numerics import from_bfloat16, to_bfloat16
from refgemma.oracle import Trace, read_trace, trace
from refgemma.oracle.operations import names_of
from refgemma.oracle.traces import recording
from tests.checkpoint.files import safetensors_bytes
from tests.models import random_model
from tests.oracle.gemmas import gemma_of, tapped


def trace_of(model, numerics="float32", /, **options):
    return trace(gemma_of(model, numerics), model.tokens, positions=model.positions, **options)


def same(one, other):
    return list(one) == list(other) and all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("numerics", ["float32", "float64", "bf16-deepmind"])
def test_a_trace_is_what_the_tap_sees(seed, numerics):
    model = random_model(seed, num_tokens=9)
    got = trace_of(model, numerics)
    want = tapped(gemma_of(model, numerics), model)
    assert list(got.tensors) == names_of(model.config)
    scale = 2.0**-52 if numerics == "float64" else 2.0**-23 if numerics == "float32" else 2.0**-8
    for name, value in want.items():
        assert got.tensors[name].dtype == value.dtype
        # The trace reads its keys from a cache: BLAS may sum them in another order, and an exponential passes that on.
        # Sums of up to 600 terms, four layers: 64 units is room enough, where a wrong position moves whole numbers.
        assert np.abs(got.tensors[name] - value).max() <= 64 * scale * np.abs(value).max(), name
    assert np.array_equal(got.tokens, model.tokens)
    assert np.array_equal(got.positions, model.positions)
    assert got.config == model.config
    assert got.meta["numerics"] == numerics


@pytest.mark.parametrize("seed", range(3))
def test_chunks_concatenate_by_position(seed, monkeypatch):
    model = random_model(seed, num_tokens=23)
    whole = trace_of(model, "float64").tensors
    monkeypatch.setattr(recording, "CHUNK", 5)
    pieces = trace_of(model, "float64").tensors
    for name in whole:
        # Float64 sums in another order, some hundred terms, four layers at most; a shifted chunk is off by whole parts.
        assert np.abs(pieces[name] - whole[name]).max() <= 1e-12 * np.abs(whole[name]).max(), name


def test_later_keys_and_padding_are_zero():
    model = next(m for m in map(random_model, range(100)) if not m.real.all() and m.real.shape[1] > 3)
    tensors = trace_of(model).tensors
    later = model.positions[:, None] > model.positions[:, :, None]
    for kind in ("scores", "probs"):
        value = tensors[f"layers.0.attn.{kind}"]
        assert not value[np.broadcast_to(later[:, None], value.shape)].any()
        assert not value.swapaxes(1, 2)[~model.real].any()
        assert value.any()
    assert not tensors["logits"][~model.real].any()


@pytest.mark.parametrize("chunk", [512, 4])
@pytest.mark.parametrize("seed", range(6))
def test_the_last_position_of_each_row(seed, chunk, monkeypatch):
    monkeypatch.setattr(recording, "CHUNK", chunk)  # rows end in different chunks
    model = random_model(seed, num_tokens=11)
    whole, last = trace_of(model, "float64"), trace_of(model, "float64", last=True)
    assert last.last
    assert not whole.last
    ends = [int(np.flatnonzero(row).max()) for row in model.real]
    for name, value in whole.tensors.items():
        axis = 1 if name.endswith(("scores", "probs")) else 0  # of one row
        want = np.stack([row.take([end], axis=axis) for row, end in zip(value, ends, strict=True)])
        assert last.tensors[name].shape == want.shape
        # One row of logits is another product than all of them: float64 roundings.
        assert np.abs(last.tensors[name] - want).max() <= 1e-12 * np.abs(value).max(), name


def test_names_choose_tensors_in_the_order_of_the_computation(tmp_path):
    model = random_model(1, num_layers=2)
    got = trace_of(model, names=["logits", "layers.1.attn.p*", "embed"])
    assert list(got.tensors) == ["embed", "layers.1.attn.probs", "logits"]
    assert list(trace_of(model, names="layers.?.out", to=tmp_path / "a.safetensors").tensors) == [
        "layers.0.out",
        "layers.1.out",
    ]
    everything = trace_of(model).tensors
    assert np.array_equal(got.tensors["logits"], everything["logits"])
    with pytest.raises(ValueError, match=r"'layers\.7\.outt' matches no tensor: the nearest name is 'layers\.\d\.out'"):
        trace_of(model, names="layers.7.outt")


@pytest.mark.parametrize("options", [{}, {"last": True}, {"names": "layers.0.*"}])
@pytest.mark.parametrize("numerics", ["float32", "float64"])
def test_a_file_holds_the_same(options, numerics, tmp_path):
    model = random_model(5, num_tokens=9)
    path = tmp_path / "ours.safetensors"
    kept = trace_of(model, numerics, **options)
    streamed = trace_of(model, numerics, to=path, model="a name", **options)
    assert same(kept.tensors, streamed.tensors)
    assert [file.name for file in tmp_path.iterdir()] == ["ours.safetensors"]  # and nothing beside it
    stored = load_file(path)  # as the library reads it, in an order of its own
    assert same({name: stored.pop(name) for name in kept.tensors}, kept.tensors)
    assert same(dict(sorted(stored.items())), {"positions": kept.positions, "tokens": kept.tokens})
    with safe_open(path, "np") as file:
        meta = file.metadata()
    assert meta["format"] == "refgemma-trace"
    assert meta["version"] == "1"
    assert meta["model"] == "a name"
    assert meta["numerics"] == numerics
    assert meta["refgemma"] == refgemma.__version__
    assert meta["numpy"] == np.__version__
    assert json.loads(meta["config"]) == to_json(model.config)
    kept.save(tmp_path / "saved.safetensors")
    again = read_trace(tmp_path / "saved.safetensors")
    assert same(again.tensors, kept.tensors)
    assert again.config == model.config
    assert again.last == kept.last
    assert again.dtypes == kept.dtypes


def test_narrow_numbers_are_saved_as_they_were_stored(tmp_path):
    model = random_model(0, num_tokens=4)
    tensors = dict(trace_of(model, names=["embed", "logits"]).tensors)
    tensors["embed"] = from_bfloat16(to_bfloat16(tensors["embed"]))
    tensors["logits"] = tensors["logits"].astype(np.float16)
    dtypes = {"embed": "bfloat16", "logits": "float16"}
    path = tmp_path / "theirs.safetensors"
    Trace(tensors, dtypes, model.tokens, model.positions, model.config, notes=("said",)).save(path)
    again = read_trace(path)
    assert again.dtypes == dtypes
    assert again.notes == ("said",)
    assert same(again.tensors, tensors)
    assert path.stat().st_size < 8000 + sum(2 * value.size for value in tensors.values()) + 16 * model.tokens.size


def test_memory_does_not_hold_a_streamed_trace(tmp_path):
    model = random_model(0, num_layers=18, intermediate_size=2048, vocab_size=64, hidden_size=24, num_tokens=128)
    gemma, tokens = gemma_of(model), model.tokens[:1]

    def peak(**options):
        tracemalloc.start()
        try:
            result = trace(gemma, tokens, **options)
            return tracemalloc.get_traced_memory()[1], result
        finally:
            tracemalloc.stop()

    path = tmp_path / "ours.safetensors"
    streamed, _ = peak(to=path)
    kept, _ = peak()
    nbytes = path.stat().st_size
    assert nbytes > 18 * 4 * 128 * 2048 * 4
    assert kept > nbytes  # NumPy's arrays are counted: the measure sees a trace that is held
    # One layer of 18 at a time, and what an MLP computes with: measured 0.12 of the file.
    assert streamed < nbytes / 5


def test_nothing_is_left_of_a_run_that_fails(tmp_path):
    model = random_model(0)
    before = tmp_path / "ours.safetensors"
    before.write_bytes(b"what was there")
    with pytest.raises(ValueError, match="token id -5 is outside"):
        trace(gemma_of(model), [-5], to=before)
    assert [file.name for file in tmp_path.iterdir()] == ["ours.safetensors"]
    assert before.read_bytes() == b"what was there"
    with pytest.raises(OSError, match=r"cannot write .*absent"):
        trace(gemma_of(model), [1], to=tmp_path / "absent" / "ours.safetensors")


@pytest.mark.parametrize(
    ("tokens", "options", "words"),
    [
        ([], {}, r"tokens have shape \(0,\)"),
        ([[1, 2], [3]], {}, "rows of different lengths"),
        ([1.5], {}, "tokens have dtype float64"),
        ([1, 2], {"positions": [0]}, r"positions are int64 of shape \(1,\): expected whole numbers, \(2,\)"),
        ([1] * 9000, {}, "9000 tokens were given, the model reads at most 8192"),
    ],
)
def test_bad_use_is_a_sentence(tokens, options, words):
    with pytest.raises(ValueError, match=words):
        trace(gemma_of(random_model(0)), tokens, **options)


def test_progress_counts_layers(monkeypatch):
    monkeypatch.setattr(recording, "CHUNK", 4)
    model = random_model(3, num_tokens=10, num_layers=3)
    seen = []
    trace_of(model, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 9) for i in range(1, 10)]  # three chunks


def rewritten(path, change):
    """The file again with its tensors and metadata changed."""
    with safe_open(path, "np") as file:
        meta = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
    change(tensors, meta)
    header, end = {"__metadata__": meta}, 0
    for name, array in tensors.items():
        begin, end = end, end + array.nbytes
        dtype = {"f": "F", "i": "I"}[array.dtype.kind] + str(8 * array.itemsize)
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [begin, end]}
    path.write_bytes(safetensors_bytes(tensors, header=header))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, m: m.update(version="2"), "has version '2' of its format: this refgemma reads '1'"),
        (lambda t, m: m.pop("config"), "without a valid config in its metadata"),
        (lambda t, m: m.update(config="{}"), "without a valid config"),
        (lambda t, m: m.update(config="["), "without a valid config"),
        (lambda t, m: t.pop("tokens"), r"lacks tokens and positions of one shape \(B, T\)"),
        (lambda t, m: t.update(embd=t.pop("embed")), "holds 'embd', float32 of shape .*: the nearest name is embed"),
        (lambda t, m: t.update(embed=t["embed"][:, :1]), "holds 'embed', .*: expected numbers of shape"),
        (lambda t, m: t.update(embed=t["embed"].astype(np.int64)), "holds 'embed', int64 of shape"),
    ],
)
def test_a_file_that_is_not_what_it_says(tmp_path, change, words):
    path = tmp_path / "ours.safetensors"
    trace_of(random_model(2, num_tokens=5), to=path)
    rewritten(path, change)
    with pytest.raises(ValueError, match=words) as raised:
        read_trace(path)
    assert "\n" not in str(raised.value)


def test_a_trace_of_another_model(tmp_path):
    path = tmp_path / "ours.safetensors"
    trace_of(random_model(2), to=path)
    with pytest.raises(ValueError, match=r"is a trace of another model than the one given: vocab_size is \d+ there"):
        read_trace(path, config=random_model(3).config)
    with pytest.raises(FileNotFoundError, match=r"absent\.safetensors does not exist"):
        read_trace(tmp_path / "absent.safetensors")
    np.savez(tmp_path / "theirs.npz", logits=np.zeros(3))
    with pytest.raises(ValueError, match="is not a trace written by refgemma: give the config of the model"):
        read_trace(tmp_path / "theirs.npz")


def test_what_it_prints():
    model = random_model(3, num_tokens=4, num_layers=1)
    B = len(model.tokens)
    assert repr(trace_of(model)) == f"Trace: 21 tensors of {B} x 4 tokens, float32"
    assert repr(trace_of(model, last=True)).endswith("float32, last position")
