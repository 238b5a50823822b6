"""The files of an adapter: names with and without the adapter's own, formats, and everything that is not an adapter."""

import json
import tracemalloc

import numpy as np
import pytest

from refgemma import lora
from refgemma.lora import tiles
from refgemma.numerics import from_bfloat16, to_bfloat16
from tests.lora.folders import SETTINGS, factors, model, write
from tests.lora.peft_folders import PREFIX, write_adapter


@pytest.mark.parametrize("adapter_name", [None, "default", "pirate_2"])
def test_names_with_and_without_the_adapters_own(adapter_name, tmp_path):
    m = model()
    tensors = factors(m)
    write_adapter(tmp_path, SETTINGS, tensors, "float64", adapter_name=adapter_name)
    adapter = lora.read(tmp_path)
    assert len(adapter.modules) == 2 * m.config.num_layers
    for name, values in tensors.items():
        module, part = name.removeprefix(PREFIX).removesuffix(".weight").rsplit(".", 1)
        assert np.array_equal(adapter.modules[module][part], values)


@pytest.mark.parametrize(
    ("dtype", "rounded"),
    [
        ("float64", lambda x: x),
        ("float32", lambda x: x.astype(np.float32)),
        ("float16", lambda x: x.astype(np.float16).astype(np.float32)),
        ("bfloat16", lambda x: from_bfloat16(to_bfloat16(x.astype(np.float32)))),
    ],
)
def test_every_format_is_read_exactly(dtype, rounded, tmp_path):
    m = model()
    adapter = lora.read(write(tmp_path, m, dtype=dtype))
    for name, values in factors(m).items():
        module, part = name.removeprefix(PREFIX).removesuffix(".weight").rsplit(".", 1)
        found = adapter.modules[module][part]
        assert found.dtype == (np.float64 if dtype == "float64" else np.float32)
        assert np.array_equal(found, rounded(values))


def test_it_tells_what_it_is(tmp_path):
    adapter = lora.read(write(tmp_path / "pirate", model()))
    assert adapter.name == "pirate"
    assert repr(adapter).startswith("Adapter pirate: rank 3, 4 modules, ")


def bad_name(t):
    t["base_model.model.model.layers.0.self_attn.q_proj.lora_C.weight"] = np.zeros((3, 4))


def two_adapters(t):
    name = f"{PREFIX}model.layers.0.self_attn.q_proj."
    t[name + "lora_A.one.weight"] = t.pop(name + "lora_A.weight")
    t[name + "lora_B.two.weight"] = t.pop(name + "lora_B.weight")


def twice(t):
    name = f"{PREFIX}model.layers.0.self_attn.q_proj."
    t[name + "lora_A.one.weight"] = t[name + "lora_A.weight"]


def not_finite(t):
    t[f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"][1, 2] = np.nan


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.base_layer.weight", "model.norm.weight"])
def test_whole_matrices_are_looked_at_too(name, number, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(tiles, "TILE", 50)
    m = model()
    shape = m.params["embed"].shape if "norm" not in name else m.params["final_norm"].shape
    whole = np.ones(shape)
    folder = write(tmp_path / "sound", m, factors(m) | {PREFIX + name: whole}, dtype)
    lora.read(folder)
    whole.flat[-3] = number
    folder = write(tmp_path / "damaged", m, factors(m) | {PREFIX + name: whole}, dtype)
    with pytest.raises(ValueError, match=rf"'{PREFIX}{name}' holds numbers that are not finite"):
        lora.read(folder)


def test_a_table_is_looked_at_some_rows_at_a_time(tmp_path):
    m = model()
    table = np.ones((60_000, 100), np.float32)  # 24 MB
    folder = write(tmp_path, m, factors(m) | {f"{PREFIX}lm_head.weight": table}, "float32")
    del table
    tracemalloc.start()
    try:
        lora.read(folder)
        assert tracemalloc.get_traced_memory()[1] < 2e6  # tiles of 262,144 numbers, a byte each
    finally:
        tracemalloc.stop()


def test_its_size_is_that_of_its_tensors(tmp_path):
    tensors = factors(model())
    adapter = lora.read(write(tmp_path, model(), tensors, "bfloat16"))
    assert adapter.nbytes == 2 * sum(w.size for w in tensors.values())


def whole_numbers(t):
    name = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"
    t[name] = t[name].astype(np.int32)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (bad_name, "lora_C.weight' is not a tensor of a LoRA adapter"),
        (two_adapters, "it holds several adapters, one, two: expected one"),
        (twice, "is a second lora_A of model.layers.0.self_attn.q_proj"),
        (not_finite, "holds numbers that are not finite"),
        (dict.clear, "it holds no tensors"),
    ],
)
def test_a_file_that_is_no_adapter(spoil, sentence, tmp_path):
    m = model()
    tensors = factors(m)
    spoil(tensors)
    write(tmp_path, m, tensors)
    with pytest.raises(ValueError, match=str(tmp_path)) as refusal:
        lora.read(tmp_path)
    assert sentence in str(refusal.value)


def test_all_problems_come_in_one_error(tmp_path):
    m = model()
    tensors = factors(m)
    bad_name(tensors)
    not_finite(tensors)
    with pytest.raises(ValueError, match="2 problems:\n") as refusal:
        lora.read(write(tmp_path, m, tensors))
    assert "lora_C" in str(refusal.value)
    assert "not finite" in str(refusal.value)


def test_missing_and_pickled_files(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(SETTINGS))
    with pytest.raises(FileNotFoundError, match=r"adapter_model.safetensors does not exist"):
        lora.read(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(FileNotFoundError, match=r"adapter_model.bin is never opened, because it can run code"):
        lora.read(tmp_path)
    with pytest.raises(ValueError, match="is a file: give the folder that holds it"):
        lora.read(tmp_path / "adapter_model.bin")
