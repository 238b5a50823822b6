"""Model folders for the tests, written by hand so that they can hold bfloat16 and be wrong in any way."""

import json
import struct

import numpy as np

from refgemma.numerics import to_bfloat16
from tests.models import hf_config, hf_tensors

_NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "int64": "I64", "uint8": "U8", "bool": "BOOL"}


def safetensors_bytes(tensors, *, header=None, padding=8):
    """A safetensors file of {name: array}; uint16 is bfloat16 bits. `header`, a dict or text, replaces the true one."""
    entries, data = {}, b""
    for name, array in tensors.items():
        dtype = "BF16" if array.dtype == np.uint16 else _NAMES[str(array.dtype)]
        place = [len(data), len(data) + array.nbytes]
        entries[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": place}
        data += array.tobytes()
    header = entries if header is None else header
    text = (header if isinstance(header, str) else json.dumps(header)).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % padding)
    return struct.pack("<Q", len(text)) + text + data


def stored_as(tensors, dtype):
    """The same tensors as they are written: "BF16", "F16" or "F32"."""
    narrow = {"BF16": to_bfloat16, "F16": lambda a: a.astype(np.float16), "F32": lambda a: a}[dtype]
    return {name: narrow(array) for name, array in tensors.items()}


def write_model(folder, model, dtype="F32", *, change=dict, **layout):
    """A folder with config.json and model.safetensors; `change` edits the stored tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config(model.config)))
    tensors = change(stored_as(hf_tensors(model.params), dtype))
    (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors, **layout))
    return folder


def write_shards(folder, model, dtype="F32", *, change=dict, shards=3):
    """The same model, its tensors dealt out to shards like cards, and an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config(model.config)))
    tensors = change(stored_as(hf_tensors(model.params), dtype))
    weight_map = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(tensors)}
    for shard in set(weight_map.values()):
        here = {name: array for name, array in tensors.items() if weight_map[name] == shard}
        (folder / shard).write_bytes(safetensors_bytes(here))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def base_of(array):
    """What an array is a view of, in the end."""
    while isinstance(array, np.ndarray) and array.base is not None:
        array = array.base
    return array.obj if isinstance(array, memoryview) else array


def one_sentence(error):
    """The text of an error, seen to be one clear sentence: one line, and of a length to read."""
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 500
    return text
