"""Checks of the numbers in a checkpoint: formats, damage, the convention of its norms, tied head, unused rows.

Each tensor is read once, some rows at a time, so that a checkpoint may be larger than memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from refgemma.checkpoint.health.folder import Contents, Remark
from refgemma.errors import listed
from refgemma.files.safetensors import StoredTensor
from refgemma.numerics import Array, from_bfloat16

_TILE = 2**22  # numbers
_FLOATS = ("BF16", "F16", "F32")
# Far beyond any number of a trained Gemma; bytes read with the wrong stride or in the wrong order soon exceed it.
_HUGE = 1e4
_EMBED, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_SUBTRACT = "subtract 1 from every norm weight: Gemma adds it itself"


@dataclass(frozen=True)
class Numbers:
    """Statistics of one tensor."""

    nans: int
    infinite: int
    lowest: float  # this, highest and mean: of the finite numbers
    highest: float
    mean: float
    negative: int  # how many are below zero
    zero_rows: int  # rows of zeros at the end

    @property
    def all_zero(self) -> bool:
        """Whether every number is zero."""
        return self.lowest == self.highest == 0.0 and not self.nans and not self.infinite


def read_numbers(contents: Contents, progress: Callable[[int, int], None] | None = None) -> dict[str, Numbers]:
    """Statistics of every tensor of floats."""
    found, done = {}, 0
    total = sum(tensor.nbytes for tensor in contents.tensors.values())
    for name, tensor in contents.tensors.items():
        if tensor.dtype in _FLOATS and tensor.data.size:
            found[name] = numbers_of(tensor)
        done += tensor.nbytes
        if progress is not None:
            progress(done, total)
    return found


def about_numbers(contents: Contents, numbers: Mapping[str, Numbers]) -> Iterator[Remark]:
    """Remarks on formats and damage."""
    dtypes: dict[str, list[str]] = {}
    for name, tensor in contents.tensors.items():
        dtypes.setdefault(tensor.dtype, []).append(name)
    unread = [dtype for dtype in dtypes if dtype not in _FLOATS]
    for dtype in unread:
        what = f"{len(dtypes[dtype])} tensors are stored as {dtype}, {dtypes[dtype][0]} first"
        yield Remark("wrong", "formats", what, "convert them to bfloat16 or float32; quantised copies cannot be read")
    floats = [dtype for dtype in dtypes if dtype in _FLOATS]
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
        todo = "compare its logits with those of another copy: 1 + w and w cannot be told apart here"
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


def numbers_of(tensor: StoredTensor) -> Numbers:
    nans = infinite = negative = count = 0
    lowest, highest, total = np.inf, -np.inf, 0.0
    for tile in tiles_of(tensor):
        with np.errstate(invalid="ignore"):  # a signalling NaN
            wide = from_bfloat16(tile) if tensor.dtype == "BF16" else tile.astype(np.float32)
        finite = np.isfinite(wide)
        if not finite.all():
            bad = int(np.count_nonzero(np.isnan(wide)))
            nans, infinite = nans + bad, infinite + int(np.count_nonzero(~finite)) - bad
            wide = wide[finite]
        if wide.size:
            lowest, highest = min(lowest, float(wide.min())), max(highest, float(wide.max()))
            total += float(wide.sum(dtype=np.float64))
            negative += int(np.count_nonzero(wide < 0))
            count += wide.size
    if not count:
        lowest = highest = np.nan
    mean = total / count if count else np.nan
    return Numbers(nans, infinite, lowest, highest, mean, negative, _zero_rows_at_the_end(tensor.data))


def tiles_of(tensor: StoredTensor) -> Iterator[Array]:
    """Rows of a tensor, as stored, some at a time."""
    flat = tensor.data.reshape(-1) if tensor.data.ndim < 2 else tensor.data
    step = max(1, _TILE // max(1, flat.size // max(1, len(flat))))
    for start in range(0, len(flat), step):
        yield flat[start : start + step]


def _zero_rows_at_the_end(data: Array) -> int:
    if data.ndim < 2:
        return 0
    rows = 0
    for row in data[::-1]:
        if row.any():
            break
        rows += 1
    return rows
