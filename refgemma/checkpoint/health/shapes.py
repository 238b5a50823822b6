"""What shapes and names alone tell of a model: its family and size, and whether config.json says the same."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from refgemma.checkpoint.health.folder import Patient, Remark
from refgemma.checkpoint.names import IGNORED, TABLE, tensors_of
from refgemma.config import Config, config_from_hf
from refgemma.oracle.published.figures import FAMILIES, read_json

_LAYER = re.compile(r"^model\.layers\.(\d+)\.(.+)$")
_FIRST = "model.layers.0."

# Which tensors give a size: field of config.json, tensor, axis.
_SIZES = (
    ("vocab_size", "model.embed_tokens.weight", 0),
    ("hidden_size", "model.embed_tokens.weight", 1),
    ("intermediate_size", _FIRST + "mlp.gate_proj.weight", 0),
)


def family_of(patient: Patient) -> str | None:
    """Family that the names of the tensors belong to."""
    names = patient.tensors
    if any("per_layer" in name or name.endswith((".layer_scalar", ".altup.router_norm.weight")) for name in names):
        return None
    if any(name.endswith("_proj.bias") for name in names) or _FIRST + "input_layernorm.weight" not in names:
        return None
    if _FIRST + "self_attn.q_norm.weight" in names:
        return "gemma3" if _FIRST + "pre_feedforward_layernorm.weight" in names else None
    return "gemma2" if _FIRST + "pre_feedforward_layernorm.weight" in names else "gemma1"


def sizes_of(patient: Patient) -> dict[str, int]:
    """Sizes that the shapes show, under their names in config.json."""
    sizes = {}
    for field, name, axis in _SIZES:
        shape = patient.shape(name)
        if shape is not None and len(shape) == 2:
            sizes[field] = shape[axis]
    layers = [int(match[1]) for match in map(_LAYER.match, patient.tensors) if match]
    if layers:
        sizes["num_hidden_layers"] = max(layers) + 1
    for field, letter in (("query_width", "q"), ("kv_width", "k")):
        shape = patient.shape(f"{_FIRST}self_attn.{letter}_proj.weight")
        if shape is not None and len(shape) == 2:
            sizes[field] = shape[0]
    return sizes


def published_size(sizes: Mapping[str, int]) -> str | None:
    """Published model of these sizes; the rows of its table may be padded."""
    fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "query_width", "kv_width")
    ours = [sizes.get(field) for field in fields]
    for name, s in read_json("models.json")["shapes"].items():
        if ours == [s["D"], s["F"], s["L"], s["N"] * s["H"], s["K"] * s["H"]]:
            return str(name)
    return None


def about_shapes(patient: Patient) -> Iterator[Remark]:
    """Remarks on family, size and configuration."""
    if not patient.tensors:
        return
    family, sizes = family_of(patient), sizes_of(patient)
    yield _about_family(patient, family, sizes)
    if family == "gemma1":
        yield from _about_names(patient, sizes)
    yield from _about_config(patient, family, sizes)


def _about_family(patient: Patient, family: str | None, sizes: dict[str, int]) -> Remark:
    published = published_size(sizes)
    if family is None:
        what = "the names of the tensors are those of no Gemma 1, 2 or 3"
        return Remark("wrong", "family", what, "give a Gemma checkpoint in Hugging Face layout")
    count = sum(math.prod(tensor.shape) for name, tensor in patient.tensors.items() if name != "lm_head.weight")
    size = f"the size of {published}" if published else "of no published size"
    what = f"{FAMILIES[family]} by the norms of its layers, {size}, {count:,} numbers"
    if family == "gemma1":
        alike = "" if published else " (Llama and others use the same names)"
        return Remark("fine", "family", what + alike)
    return Remark("wrong", "family", what, "refgemma computes Gemma 1 only: use a Gemma 1 checkpoint")


def _about_names(patient: Patient, sizes: dict[str, int]) -> Iterator[Remark]:
    """Tensors that are missing or not known."""
    layers = range(sizes.get("num_hidden_layers", 0))
    wanted = [row.theirs.format(i=i) for row in TABLE for i in (layers if "{i}" in row.theirs else range(1))]
    ignored = {name.format(i=i) for name in IGNORED for i in layers}
    missing = [name for name in wanted if name not in patient.tensors and name != "lm_head.weight"]
    unknown = [name for name in patient.tensors if name not in wanted and name not in ignored]
    if missing:
        todo = "fetch the checkpoint again, or convert it again"
        yield Remark("wrong", "names", f"{_some(missing)} missing", todo)
    if unknown:
        yield Remark("wrong", "names", f"{_some(unknown)} not known in Gemma 1", "rename them, or leave them out")


def _about_config(patient: Patient, family: str | None, sizes: dict[str, int]) -> Iterator[Remark]:
    """Each number of config.json against the shapes, then what the loader has against it."""
    fields = patient.fields
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
        except (ValueError, TypeError) as error:
            what, _, todo = str(error).partition(": ")
            yield Remark("wrong", "config", what, todo)
        else:
            yield _about_misfits(patient, config)
    for name, usual in (("rms_norm_eps", 1e-6), ("rope_theta", 10_000.0)):
        value = fields.get(name, usual)
        if value != usual:
            what = f"{name} is {value!r}; every published Gemma 1 has {usual:g}"
            yield Remark("look", "config", what, "make sure that the model was trained with it")


def _about_misfits(patient: Patient, config: Config) -> Remark:
    """Tensors of another shape than the configuration gives them, although the sizes of layer 0 agree with it."""
    tensors = tensors_of(replace(config, tie_word_embeddings=False))
    misfits = [tensor for tensor in tensors if patient.shape(tensor.theirs) not in (tensor.shape, None)]
    if not misfits:
        return Remark("fine", "config", "config.json and the shapes agree")
    first, more = misfits[0], f", and {len(misfits) - 1} more are wrong" if len(misfits) > 1 else ""
    what = f"{first.theirs} has shape {patient.shape(first.theirs)}, expected {first.shape}{more}"
    return Remark("wrong", "shapes", what, f"convert it again: a matrix is stored (out, in), here {first.axes}")


def _heads(rows: int, count: Any, width: Any) -> str:
    """Which of the two numbers is likely the wrong one; head_dim is 256 in every published Gemma 1."""
    if _whole(count) and rows % count == 0:
        return f"set head_dim to {rows // count} in config.json: it is no quotient of other sizes"
    if _whole(width) and rows % width == 0:
        return f"with head_dim {width} there are {rows // width} heads"
    return "set the number of heads, and head_dim, which is 256 in every published Gemma 1"


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _some(names: list[str]) -> str:
    return f"{names[0]} is" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more are"
