"""The doctor: finds what is wrong with a model folder without loading it, so it works where `load` refuses.

Names and shapes tell family and size, statistics tell the convention of the norms, the numbers themselves show damage;
every remark says what to do.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from refgemma.checkpoint.health.folder import Contents, Remark, read_contents
from refgemma.checkpoint.health.numbers import about_head, about_norms, about_numbers, about_vocabulary, read_numbers
from refgemma.checkpoint.load import Progress
from refgemma.checkpoint.names import FAMILIES, IGNORED, SHAPES, TABLE, tensors_of
from refgemma.config import Config, config_from_hf
from refgemma.errors import InputError

_ORDER = ("wrong", "look", "fine")
_LAYER = re.compile(r"^model\.layers\.(\d+)\.(.+)$")
_FIRST = "model.layers.0."

# Field of config.json, and the tensor and axis that show it.
_SIZES = (
    ("vocab_size", "model.embed_tokens.weight", 0),
    ("hidden_size", "model.embed_tokens.weight", 1),
    ("intermediate_size", _FIRST + "mlp.gate_proj.weight", 0),
)


def examine(folder: str | Path, *, progress: Progress | None = None) -> list[Remark]:
    """Examine a model folder; the gravest remarks come first."""
    contents = read_contents(folder)
    numbers = read_numbers(contents, progress)
    remarks = [*contents.remarks, *about_shapes(contents), *about_numbers(contents, numbers)]
    if family_of(contents) is not None:
        remarks += [*about_norms(numbers), *about_head(contents), *about_vocabulary(contents, numbers)]
    return sorted(remarks, key=lambda remark: _ORDER.index(remark.grade))


def family_of(contents: Contents) -> str | None:
    """Family by the names of the tensors, or None."""
    names = contents.tensors
    if any("per_layer" in name or name.endswith((".layer_scalar", ".altup.router_norm.weight")) for name in names):
        return None
    if any(name.endswith("_proj.bias") for name in names) or _FIRST + "input_layernorm.weight" not in names:
        return None
    if _FIRST + "self_attn.q_norm.weight" in names:
        return "gemma3" if _FIRST + "pre_feedforward_layernorm.weight" in names else None
    return "gemma2" if _FIRST + "pre_feedforward_layernorm.weight" in names else "gemma1"


def sizes_of(contents: Contents) -> dict[str, int]:
    """Sizes by the shapes, under their names in config.json."""
    sizes = {}
    for field, name, axis in _SIZES:
        shape = contents.shape(name)
        if shape is not None and len(shape) == 2:
            sizes[field] = shape[axis]
    layers = [int(match[1]) for match in map(_LAYER.match, contents.tensors) if match]
    if layers:
        sizes["num_hidden_layers"] = max(layers) + 1
    for field, letter in (("query_width", "q"), ("kv_width", "k")):
        shape = contents.shape(f"{_FIRST}self_attn.{letter}_proj.weight")
        if shape is not None and len(shape) == 2:
            sizes[field] = shape[0]
    return sizes


def published_size(sizes: Mapping[str, int]) -> str | None:
    """The published model of these sizes; its table may have been padded with rows."""
    fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "query_width", "kv_width")
    found = [sizes.get(field) for field in fields]
    for name, s in SHAPES.items():
        if found == [s["D"], s["F"], s["L"], s["N"] * s["H"], s["K"] * s["H"]]:
            return str(name)
    return None


def about_shapes(contents: Contents) -> Iterator[Remark]:
    if not contents.tensors:
        return
    family, sizes = family_of(contents), sizes_of(contents)
    yield _about_family(contents, family, sizes)
    if family == "gemma1":
        yield from _about_names(contents, sizes)
    yield from _about_config(contents, family, sizes)


def _about_family(contents: Contents, family: str | None, sizes: dict[str, int]) -> Remark:
    published = published_size(sizes)
    if family is None:
        what = "the names of the tensors match no Gemma 1, 2 or 3"
        return Remark("wrong", "family", what, "give a Gemma checkpoint in Hugging Face layout")
    count = sum(math.prod(tensor.shape) for name, tensor in contents.tensors.items() if name != "lm_head.weight")
    size = f"the size of {published}" if published else "of no published size"
    what = f"{FAMILIES[family]} by the norms of its layers, {size}, {count:,} numbers"
    if family == "gemma1":
        alike = "" if published else " (Llama and others use the same names)"
        return Remark("fine", "family", what + alike)
    return Remark("wrong", "family", what, "refgemma computes Gemma 1 only: use a Gemma 1 checkpoint")


def _about_names(contents: Contents, sizes: dict[str, int]) -> Iterator[Remark]:
    """Missing and unknown tensors."""
    layers = range(sizes.get("num_hidden_layers", 0))
    wanted = [row.name.format(i=i) for row in TABLE for i in (layers if "{i}" in row.name else range(1))]
    ignored = {name.format(i=i) for name in IGNORED for i in layers}
    missing = [name for name in wanted if name not in contents.tensors and name != "lm_head.weight"]
    unknown = [name for name in contents.tensors if name not in wanted and name not in ignored]
    if missing:
        todo = "download or convert the checkpoint again"
        yield Remark("wrong", "names", f"{_some(missing)} missing", todo)
    if unknown:
        yield Remark("wrong", "names", f"{_some(unknown)} not known in Gemma 1", "rename them, or leave them out")


def _about_config(contents: Contents, family: str | None, sizes: dict[str, int]) -> Iterator[Remark]:
    """Compare each number of config.json with the shapes; if all agree, let the loader check it."""
    fields = contents.fields
    if not fields:
        return
    wrong = False
    for field in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"):
        if field in sizes and fields.get(field) != sizes[field]:
            wrong = True
            given = repr(fields[field]) if field in fields else "missing"
            what = f"{field} is {given}, the tensors have {sizes[field]}"
            yield Remark("wrong", "config", what, f"set {field} to {sizes[field]} in config.json")
    for name, projection in (("num_attention_heads", "query_width"), ("num_key_value_heads", "kv_width")):
        count: Any = fields.get(name)
        width: Any = fields.get("head_dim")
        rows = sizes.get(projection)
        if rows is not None and not (_whole(count) and _whole(width) and count * width == rows):
            wrong = True
            what = f"{name} {count!r} x head_dim {width!r} is not {rows}, the rows of its projection"
            yield Remark("wrong", "config", what, _heads(rows, count, width))
    if family == "gemma1" and not wrong:
        try:
            config = config_from_hf(fields)
        except InputError as error:
            what, _, todo = str(error).partition(": ")
            yield Remark("wrong", "config", what, todo)
        else:
            yield _about_misfits(contents, config)
    for name, usual in (("rms_norm_eps", 1e-6), ("rope_theta", 10_000.0)):
        value = fields.get(name, usual)
        if value != usual:
            what = f"{name} is {value!r}; every published Gemma 1 has {usual:g}"
            yield Remark("look", "config", what, "make sure that the model was trained with it")


def _about_misfits(contents: Contents, config: Config) -> Remark:
    """Tensors of unexpected shape in later layers; layer 0 agrees with the configuration."""
    tensors = tensors_of(replace(config, tie_word_embeddings=False))
    misfits = [tensor for tensor in tensors if contents.shape(tensor.name) not in (tensor.shape, None)]
    if not misfits:
        return Remark("fine", "config", "config.json and the shapes agree")
    first, more = misfits[0], f", and {len(misfits) - 1} more are wrong" if len(misfits) > 1 else ""
    what = f"{first.name} has shape {contents.shape(first.name)}, expected {first.shape}{more}"
    return Remark("wrong", "shapes", what, f"convert it again: a matrix is stored (out, in), here {first.axes}")


def _heads(rows: int, count: Any, width: Any) -> str:
    """The likely correction; head_dim is 256 in every published Gemma 1."""
    if _whole(count) and rows % count == 0:
        return f"set head_dim to {rows // count} in config.json: it does not follow from the other sizes"
    if _whole(width) and rows % width == 0:
        return f"head_dim {width} makes it {rows // width} heads"
    return "set the number of heads, and head_dim, which is 256 in every published Gemma 1"


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _some(names: list[str]) -> str:
    return f"{names[0]} is" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more are"
