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

import numpy as np

from refgemma.checkpoint.contents import READ_FORMATS, Contents, Numbers, Remark, read_contents, read_numbers, tiles_of
from refgemma.checkpoint.load import Progress
from refgemma.checkpoint.names import FAMILIES, IGNORED, SHAPES, TABLE, tensors_of
from refgemma.config import Config, config_from_hf
from refgemma.errors import InputError, listed

_ORDER = ("wrong", "look", "fine")
_LAYER = re.compile(r"^model\.layers\.(\d+)\.(.+)$")
_FIRST = "model.layers.0."
# Far beyond any number of a trained Gemma; bytes read with the wrong stride or in the wrong order soon exceed it.
_HUGE = 1e4
_EMBED, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_SUBTRACT = "subtract 1 from every norm weight: Gemma adds it itself"

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


def about_numbers(contents: Contents, numbers: Mapping[str, Numbers]) -> Iterator[Remark]:
    """Remarks on formats and damage."""
    dtypes: dict[str, list[str]] = {}
    for name, tensor in contents.tensors.items():
        dtypes.setdefault(tensor.dtype, []).append(name)
    unread = [dtype for dtype in dtypes if dtype not in READ_FORMATS]
    for dtype in unread:
        what = f"{len(dtypes[dtype])} tensors are stored as {dtype}, {dtypes[dtype][0]} first"
        yield Remark("wrong", "formats", what, "convert them to bfloat16 or float32; quantised copies cannot be read")
    floats = [dtype for dtype in dtypes if dtype in READ_FORMATS]
    if len(floats) > 1:
        what = " and ".join(f"{len(dtypes[d])} tensors in {d}" for d in floats)
        todo = (
            "harmless here; engines that take one format for all misread it (https://github.com/ROCm/aiter/pull/2705)"
        )
        yield Remark("look", "formats", what, todo)
    elif floats and not unread:
        yield Remark("fine", "formats", f"all {len(contents.tensors)} tensors in {floats[0]}")
    for words, todo, bad in (
        (
            "NaN",
            "download it again; if it was trained so, training diverged",
            [n for n, s in numbers.items() if s.nans],
        ),
        ("infinite numbers", "convert it again: float16 ends at 65504", [n for n, s in numbers.items() if s.infinite]),
        (
            "numbers beyond 10,000",
            "convert it again: its bytes were likely read in another format",
            [n for n, s in numbers.items() if max(-s.lowest, s.highest) > _HUGE],
        ),
        (
            "nothing but zeros",
            "download or convert it again: a matrix of zeros was never trained",
            [n for n, s in numbers.items() if s.all_zero and contents.tensors[n].data.ndim > 1],
        ),
    ):
        if bad:
            yield Remark("wrong", "numbers", f"{listed(bad, 1, str)}: {words}", todo)


def about_norms(numbers: Mapping[str, Numbers]) -> Iterator[Remark]:
    """Remarks on the convention of norm weights: w, or 1 + w as GGUF converters store.

    Training starts at w = 0 and leaves channels on both sides of it, some near -1; with the one folded in, nothing is
    below zero and all centres near 1. https://github.com/ggml-org/llama.cpp/pull/5631 is where this went wrong first.
    """
    norms = {name: n for name, n in numbers.items() if name.endswith("norm.weight") and "_norm." not in name}
    kinds: dict[str, dict[str, Numbers]] = {}
    for name, n in norms.items():
        kinds.setdefault(name.removesuffix(".weight").rpartition(".")[2], {})[name] = n
    if not norms:
        return
    remarks = {kind: _about_some_norms(some) for kind, some in kinds.items()}
    if len({remark.grade for remark in remarks.values()}) == 1:
        yield _about_some_norms(norms)
        return
    for kind, remark in remarks.items():
        which = "the final norm" if kind == "norm" else f"{len(kinds[kind])} norms called {kind}"
        grade, todo = remark.grade, remark.todo.replace("every norm weight", "the weights of these")
        if grade == "wrong" and len(kinds[kind]) == 1:  # training may leave one vector on one side
            grade, todo = "look", "compare with another copy: if this norm holds 1 + w, subtract 1"
        yield Remark(grade, remark.about, f"{which}: {remark.what}", todo)


def _about_some_norms(norms: Mapping[str, Numbers]) -> Remark:
    """Remark on norms that were written in one way."""
    lowest, highest = min(n.lowest for n in norms.values()), max(n.highest for n in norms.values())
    mean = float(np.mean([n.mean for n in norms.values()]))
    negative = [name for name, n in norms.items() if n.negative]
    ones = [name for name, n in norms.items() if n.lowest > 0 and n.mean > 0.5]
    seen = f"norm weights from {lowest:.3g} to {highest:.3g}, mean {mean:.3g}"
    if lowest == highest == 0:
        return Remark("look", "norms", "all norm weights are zero, as before training", "nothing, if that is meant")
    if lowest == highest == 1:
        return Remark("wrong", "norms", "all norm weights are one: 1 + w of an untrained model", _SUBTRACT)
    if not negative and mean > 0.5:
        what = f"{seen}, none below zero: they look like 1 + w, as GGUF files store them"
        return Remark("wrong", "norms", what, _SUBTRACT)
    if not negative:
        todo = "compare its logits with those of another copy: 1 + w and w cannot be distinguished here"
        return Remark("look", "norms", f"{seen}, none below zero", todo)
    if ones and 2 * len(ones) >= len(norms) and mean > 0.5:
        todo = "compare with another copy: some norms may hold 1 + w"
        return Remark("look", "norms", f"{seen}; {len(ones)} of {len(norms)} norms are positive throughout", todo)
    return Remark("fine", "norms", f"{seen}: w, to which the model adds 1")


def about_head(contents: Contents) -> Iterator[Remark]:
    """Remark on the output head: tied to the embedding or not, and whether config.json agrees."""
    if _EMBED not in contents.tensors:
        return
    tied = contents.fields.get("tie_word_embeddings", True)
    if _HEAD not in contents.tensors:
        if tied:
            yield Remark("fine", "head", "tied: the embedding is the head")
        else:
            what = "tie_word_embeddings is false, and there is no lm_head.weight"
            yield Remark("wrong", "head", what, "set it to true: every published Gemma 1 is tied")
        return
    embed, head = contents.tensors[_EMBED], contents.tensors[_HEAD]
    same = embed.dtype == head.dtype and embed.shape == head.shape
    same = same and all(a.tobytes() == b.tobytes() for a, b in zip(tiles_of(embed), tiles_of(head), strict=True))
    if tied and not same:
        what = "lm_head.weight differs from the embedding, yet tie_word_embeddings is true"
        todo = "set it to false to use the stored head, or remove the head to use the embedding"
        yield Remark("wrong", "head", what, todo)
    elif same:
        yield Remark(
            "look", "head", "lm_head.weight is the embedding, stored twice", "nothing; removing it saves space"
        )
    else:
        todo = "nothing, if it was trained so; every published Gemma 1 is tied"
        yield Remark("look", "head", "untied: a head of its own", todo)


def about_vocabulary(contents: Contents, numbers: Mapping[str, Numbers]) -> Iterator[Remark]:
    """Remark on rows of the embedding table without a piece of the tokenizer."""
    if _EMBED not in contents.tensors or contents.tensors[_EMBED].data.ndim != 2 or contents.num_pieces is None:
        return  # `about_shapes` reports another shape
    rows, pieces = contents.tensors[_EMBED].shape[0], contents.num_pieces
    if rows < pieces:
        what = f"the table has {rows:,} rows, the tokenizer {pieces:,} pieces"
        todo = "these files do not belong together: fetch the tokenizer of this model"
        yield Remark("wrong", "vocabulary", what, todo)
    elif rows == pieces:
        yield Remark("fine", "vocabulary", f"{rows:,} rows and pieces")
    else:
        zero = min(numbers[_EMBED].zero_rows, rows - pieces) if _EMBED in numbers else 0
        what = f"{rows - pieces:,} rows beyond the {pieces:,} pieces, {zero:,} of them zero"
        todo = f"never sample ids from {pieces:,} on: ban them, or cut table and vocab_size to {pieces:,}"
        yield Remark("look", "vocabulary", what, todo)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _some(names: list[str]) -> str:
    return f"{names[0]} is" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more are"
