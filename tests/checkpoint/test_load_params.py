import itertools
import mmap
import re
import struct
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from refgemma.checkpoint import load
from refgemma.checkpoint.load import load_params
from refgemma.checkpoint.names import tensors_of
from refgemma.config import SIZES
from refgemma.numerics import Bfloat16Matrix, from_bfloat16, to_bfloat16
from tests.checkpoint.files import base_of, one_sentence, safetensors_bytes, stored_as, write_model, write_shards
from tests.models import hf_tensors, random_model, reshaped

MODEL = random_model(2, num_layers=2)  # 1 < K < N, all widths different
UNTIED = replace(
    MODEL,
    config=replace(MODEL.config, tie_word_embeddings=False),
    params=MODEL.params | {"head": -MODEL.params["embed"]},
)

EMBED, NORM = "model.embed_tokens.weight", "model.layers.1.post_attention_layernorm.weight"


def leaves(params, path=""):
    """(path, array) of every parameter."""
    items = params.items() if isinstance(params, dict) else enumerate(params)
    for name, value in items:
        if isinstance(value, (dict, list)):
            yield from leaves(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def rounded(dtype):
    """The numbers that a file in this dtype holds for `MODEL`, in float32, by our paths."""
    stored = stored_as(dict(leaves(MODEL.params)), dtype)
    return {path: from_bfloat16(a) if dtype == "BF16" else a.astype(np.float32) for path, a in stored.items()}


def swap_norms(tensors):
    """The two norms of each layer under each other's name."""
    swap = {"input_layernorm": "post_attention_layernorm", "post_attention_layernorm": "input_layernorm"}
    return {re.sub("|".join(swap), lambda found: swap[found[0]], name): array for name, array in tensors.items()}


@pytest.mark.parametrize("layout", [write_model, write_shards])
@pytest.mark.parametrize("weights", ["float32", "float64"])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_numbers_arrive_exactly_where_they_belong(tmp_path, layout, dtype, weights):
    folder = layout(tmp_path, MODEL, dtype)
    loaded = dict(leaves(load_params(folder, MODEL.config, weights=weights, norm_dtype=np.float64)))
    expected = rounded(dtype)
    assert loaded.keys() == expected.keys()
    for path, array in loaded.items():  # widening is exact, so equal it is
        np.testing.assert_array_equal(array, expected[path])
        assert array.dtype == ("float64" if path.endswith("norm") else weights)
        assert not array.flags.writeable
    swapped = layout(
        tmp_path / "swapped", MODEL, dtype, change=swap_norms
    )  # the values above can tell equal shapes apart
    loaded = dict(leaves(load_params(swapped, MODEL.config)))
    assert not np.array_equal(loaded["layers.1.mlp.norm"], expected["layers.1.mlp.norm"])
    np.testing.assert_array_equal(loaded["layers.1.mlp.norm"], expected["layers.1.attn.norm"])


def test_bfloat16_matrices_stay_in_the_file(tmp_path):
    params = load_params(write_model(tmp_path, MODEL, "BF16"), MODEL.config, weights="bfloat16")
    expected = rounded("BF16")
    for path, array in leaves(params):
        if path.endswith("norm"):
            np.testing.assert_array_equal(array, expected[path], strict=True)
        else:
            assert isinstance(array, Bfloat16Matrix)
            assert isinstance(base_of(array.bits), mmap.mmap)
            assert not array.bits.flags.writeable
            np.testing.assert_array_equal(from_bfloat16(array.bits), expected[path], strict=True)


def test_float32_matrices_stay_in_the_file(tmp_path):
    params = load_params(write_model(tmp_path, MODEL), MODEL.config)
    for path, array in leaves(params):
        assert isinstance(base_of(array), mmap.mmap) == (not path.endswith("norm"))


def test_opening_five_gigabytes_takes_no_memory(tmp_path):
    config = SIZES["gemma-2b"]
    header, end = {}, 0
    for tensor in tensors_of(config):
        begin, end = end, end + 2 * int(np.prod(tensor.shape))
        header[tensor.name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": [begin, end]}
    content = safetensors_bytes({}, header=header)
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(content)
        file.truncate(len(content) + end)  # a hole: takes no room on disk and reads as zeros
    tracemalloc.start()
    params = load_params(tmp_path, config, weights="bfloat16")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(array.nbytes for path, array in leaves(params) if path != "head") > 5e9
    # Kept are 37 norms of 2048 float32 numbers, 0.3 MB; checking them takes copies. The smallest matrix has 1.05 MB.
    assert peak < 1e6


def test_every_bfloat16_number_is_widened_exactly_across_tiles(tmp_path):
    # 17 columns do not divide a tile; every bit pattern comes many times, in more than one tile.
    V, D = 180_000, 17
    config = reshaped(MODEL.config, vocab_size=V, hidden_size=D, num_layers=1)
    bits = (np.arange(V * D) % 65536).astype(np.uint16).reshape(V, D)
    tensors = {t.name: np.zeros(t.shape, np.uint16) for t in tensors_of(config)} | {EMBED: bits}
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    # Bfloat16 is the upper half of a float32: write the bytes down, the lower half zero.
    halves = np.zeros((V, D, 2), "<u2")
    halves[..., 1] = bits
    expected = halves.view("<f4")[..., 0]
    for weights in ("float32", "float64"):
        embed = load_params(tmp_path, config, weights=weights)["embed"]
        np.testing.assert_array_equal(embed, expected)
    assert not np.array_equal(bits.view(np.float16).astype(np.float32), expected, equal_nan=True)  # the usual mistake


def test_unaligned_numbers_are_read_all_the_same(tmp_path):
    folder = write_model(tmp_path, MODEL, padding=1)
    content = (folder / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    for pad in range(4):
        header = content[8 : 8 + length] + b" " * pad
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])
        for path, array in leaves(load_params(folder, MODEL.config)):
            assert array.flags.aligned
            assert not array.flags.writeable
            np.testing.assert_array_equal(array, rounded("F32")[path])


def test_all_that_does_not_fit_is_told_at_once(tmp_path):
    def change(tensors):
        tensors["model.layers.0.mlp.upproj.weight"] = tensors.pop("model.layers.0.mlp.up_proj.weight")
        tensors["model.layers.1.self_attn.o_proj.weight"] = tensors["model.layers.1.self_attn.o_proj.weight"].T
        tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int64)
        tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((2, 2), np.float32)
        return tensors

    D, NH = MODEL.config.hidden_size, MODEL.config.layers[0].num_heads * MODEL.config.layers[0].head_dim
    with pytest.raises(ValueError, match="does not fit its configuration: 5 problems") as error:
        load_params(write_model(tmp_path, MODEL, change=change), MODEL.config)
    text = str(error.value)
    assert "missing model.layers.0.mlp.up_proj.weight" in text
    assert "(there is 'model.layers.0.mlp.upproj.weight')" in text
    assert "unexpected 'model.layers.0.mlp.upproj.weight'" in text
    assert "(nearest known name is 'model.layers.0.mlp.up_proj.weight')" in text
    assert "unexpected 'model.layers.2.mlp.up_proj.weight', shape (2, 2)" in text
    assert f"o_proj.weight has shape ({NH}, {D}), expected ({D}, {NH}), which is D (N H)" in text
    assert "model.norm.weight is stored as I64, expected BF16, F16 or F32" in text


@pytest.mark.parametrize("dtype", [np.float64, np.uint8, np.int64])
def test_another_dtype_is_one_sentence(tmp_path, dtype):
    folder = write_model(tmp_path, MODEL, change=lambda t: t | {EMBED: t[EMBED].astype(dtype)})
    with pytest.raises(
        ValueError, match=r"embed_tokens\.weight is stored as (F64|U8|I64), expected BF16, F16 or F32"
    ) as error:
        load_params(folder, MODEL.config)
    one_sentence(error)


@pytest.mark.parametrize("dtype", ["F16", "F32"])
def test_nothing_is_rounded_to_bfloat16_silently(tmp_path, dtype):
    with pytest.raises(ValueError, match=f"as {dtype}, which weights='bfloat16' would round") as error:
        load_params(write_model(tmp_path, MODEL, dtype), MODEL.config, weights="bfloat16")
    one_sentence(error)


@pytest.mark.parametrize("wrong", [{"weights": "float16"}, {"weights": None}, {"norm_dtype": np.float16}])
def test_an_unknown_format_is_one_sentence(tmp_path, wrong):
    with pytest.raises(ValueError, match=r"expected '?(bfloat16|float32)") as error:
        load_params(write_model(tmp_path, MODEL), MODEL.config, **wrong)
    one_sentence(error)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_norm_weight_that_is_not_finite_is_refused(tmp_path, dtype, bad):
    broken = MODEL.params["layers"][1]["mlp"]["norm"].copy()
    broken[5] = bad
    folder = write_model(tmp_path, MODEL, dtype, change=lambda t: t | stored_as({NORM: broken}, dtype))
    with pytest.raises(ValueError, match=f"{NORM} holds {bad} at channel 5") as error:
        load_params(folder, MODEL.config)
    one_sentence(error)


def test_a_signalling_nan_raises_the_sentence_and_no_warning(tmp_path):
    broken = np.zeros(MODEL.config.hidden_size, np.uint16)
    broken[0] = 0x7F81
    folder = write_model(tmp_path, MODEL, "BF16", change=lambda t: t | {NORM: broken})
    with pytest.raises(ValueError, match="holds nan at channel 0"):
        load_params(folder, MODEL.config, norm_dtype=np.float64)


# ---- The head.


def test_a_tied_head_is_the_embedding(tmp_path):
    for dtype, weights in [("F32", "float32"), ("BF16", "bfloat16"), ("BF16", "float32")]:
        params = load_params(write_model(tmp_path, MODEL, dtype), MODEL.config, weights=weights)
        assert params["head"] is params["embed"]


@pytest.mark.parametrize("weights", ["bfloat16", "float32"])
def test_an_explicit_head_is_used_when_untied(tmp_path, weights):
    params = load_params(write_model(tmp_path, UNTIED, "BF16"), UNTIED.config, weights=weights)
    embed, head = (
        w.bits if weights == "bfloat16" else w.view(np.uint32) >> 16 for w in (params["embed"], params["head"])
    )
    np.testing.assert_array_equal(head, embed ^ 0x8000)  # all signs turned


def test_an_untied_head_is_not_made_up(tmp_path):
    # Engines have filled a head that the file lacks with random numbers, or with the embedding.
    folder = write_model(tmp_path, UNTIED, change=lambda t: {k: v for k, v in t.items() if k != "lm_head.weight"})
    with pytest.raises(ValueError, match=r"missing lm_head\.weight") as error:
        load_params(folder, UNTIED.config)
    one_sentence(error)


def test_a_head_that_repeats_the_embedding_may_stand_beside_a_tied_one(tmp_path):
    with_nan = MODEL.params["embed"].copy()
    with_nan[0, 0] = np.nan  # equal as bits, although no NaN equals itself
    for embed in (MODEL.params["embed"], with_nan):
        folder = write_model(tmp_path, MODEL, change=lambda t, e=embed: t | {EMBED: e, "lm_head.weight": e})
        params = load_params(folder, MODEL.config)
        assert params["head"] is params["embed"]


def test_a_head_of_the_same_bits_in_another_format_is_another_head(tmp_path):
    head = stored_as({"head": MODEL.params["embed"]}, "BF16")["head"].view(np.float16)
    folder = write_model(tmp_path, MODEL, "BF16", change=lambda t: t | {"lm_head.weight": head})
    with pytest.raises(ValueError, match=r"lm_head\.weight that differs from"):
        load_params(folder, MODEL.config)


@pytest.mark.parametrize("change", ["last number", "dtype", "shape"])
def test_a_head_that_contradicts_a_tied_one_is_refused(tmp_path, change):
    head = MODEL.params["embed"].copy()
    if change == "last number":
        head[-1, -1] = -head[-1, -1]
    head = {"last number": head, "dtype": to_bfloat16(head), "shape": head[:-1]}[change]
    folder = write_model(tmp_path, MODEL, change=lambda t: t | {"lm_head.weight": head})
    with pytest.raises(ValueError, match=r"lm_head\.weight (that differs from|has shape)") as error:
        load_params(folder, MODEL.config)
    one_sentence(error)


# ---- Known bugs of other loaders, each named after what went wrong.


def test_float32_norms_between_bfloat16_matrices_are_not_read_with_bfloat16_stride(tmp_path):
    # https://github.com/ROCm/aiter/pull/2705
    float32_norms = {name: array for name, array in hf_tensors(MODEL.params).items() if array.ndim == 1}
    folder = write_model(tmp_path, MODEL, "BF16", change=lambda t: t | float32_norms)
    for weights in ("bfloat16", "float32"):
        params = load_params(folder, MODEL.config, weights=weights)
        for name in ("attn", "mlp"):
            np.testing.assert_array_equal(params["layers"][1][name]["norm"], MODEL.params["layers"][1][name]["norm"])
    D = MODEL.config.hidden_size
    misread = from_bfloat16(MODEL.params["final_norm"].view(np.uint16)[:D])
    assert not np.array_equal(misread, params["final_norm"])


def test_norms_with_the_one_folded_in_are_warned_of(tmp_path):
    # https://github.com/ggml-org/llama.cpp/pull/5631
    def fold(tensors):
        return {name: np.abs(1 + array) if array.ndim == 1 else array for name, array in tensors.items()}

    with pytest.warns(UserWarning, match="all norm weights are positive") as caught:
        load_params(write_model(tmp_path, MODEL, change=fold), MODEL.config)
    assert "\n" not in str(caught[0].message)
    # True files are not, large as some of their weights may be: warnings are errors here.
    load_params(write_model(tmp_path, MODEL), MODEL.config)
    load_params(write_model(tmp_path, MODEL, change=lambda t: t | {NORM: 99 * t[NORM] ** 2 - 0.9}), MODEL.config)


def test_rotary_frequencies_left_in_old_files_are_ignored(tmp_path):
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32) for i in range(2)}
    params = load_params(write_model(tmp_path, MODEL, change=lambda t: t | buffers), MODEL.config)
    assert {path for path, _ in leaves(params)} == {path for path, _ in leaves(MODEL.params)}


# ---- Progress.


def test_progress_counts_the_bytes_that_are_widened(tmp_path):
    config = replace(MODEL.config, vocab_size=70_000)
    embed = np.zeros((70_000, config.hidden_size), np.uint16)
    folder = write_model(tmp_path, MODEL, "BF16", change=lambda t: t | {EMBED: embed})
    calls = []
    load_params(folder, config, progress=lambda done, total: calls.append((done, total)))
    matrices = sum(2 * int(np.prod(t.shape)) for t in tensors_of(config) if len(t.shape) == 2)
    assert calls[-1] == (matrices, matrices)
    assert all(before < after for (before, _), (after, _) in itertools.pairwise(calls))
    assert len(calls) > len(tensors_of(config))  # the table comes in several tiles


@pytest.mark.parametrize("large", [0, 2**30])
def test_threads_are_for_large_files(tmp_path, monkeypatch, large):
    """They set BLAS to one thread, for good."""
    called = []
    monkeypatch.setattr(load, "_LARGE", large)
    monkeypatch.setattr(load, "in_parallel", lambda work, count: called.extend(map(work, range(count))))
    params = load_params(write_model(tmp_path, MODEL, "BF16"), MODEL.config)
    assert bool(called) == (large == 0)
    for path, array in leaves(params):
        np.testing.assert_array_equal(array, rounded("BF16")[path])


@pytest.mark.parametrize("form", ["BF16", "F16"])
def test_what_was_widened_is_released(tmp_path, monkeypatch, form):
    """Else the file would count as memory beside its copy."""
    released = []
    monkeypatch.setattr(load, "release_memory", released.append)
    load_params(write_model(tmp_path, MODEL, form), MODEL.config)
    assert sum(array.size for array in released) == sum(
        t.size for path, t in leaves(MODEL.params) if t.ndim == 2 and path != "head"
    )
    assert all(isinstance(base_of(array), mmap.mmap) for array in released)


def test_mapped_matrices_make_no_progress_because_there_is_nothing_to_wait_for(tmp_path):
    load_params(write_model(tmp_path, MODEL), MODEL.config, progress=lambda done, total: pytest.fail("called"))
