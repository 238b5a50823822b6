"""Write a checkpoint in Hugging Face layout as a stream: no tensor is ever in memory whole.

Everything about a safetensors file but the numbers is known before the first of them is computed, so the header is
written at once, and rows after it as they come. The library's own writer wants all tensors of a file in memory.

References
----------
https://github.com/huggingface/safetensors, README, "Format"; the index and the names of shards are those of
https://huggingface.co/docs/transformers/big_models.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from refgemma.checkpoint.folder import INDEX, SINGLE
from refgemma.checkpoint.load import Progress
from refgemma.numerics import Array

# Our word for a format: that of the file, and bytes a number.
_STORED = {"bfloat16": ("BF16", 2), "float16": ("F16", 2), "float32": ("F32", 4), "float64": ("F64", 8)}


@dataclass(frozen=True, kw_only=True, eq=False)
class Outgoing:
    """A tensor to be written."""

    name: str  # what the file is to call it
    form: str  # format: "bfloat16", "float16", "float32" or "float64"
    shape: tuple[int, ...]  # sizes of its axes
    # ``blocks()`` gives its numbers as they are stored, some rows at a time; bfloat16 as bits
    blocks: Callable[[], Iterator[Array]]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * _STORED[self.form][1]


def dealt_out(tensors: Iterable[Outgoing], shard_bytes: int) -> dict[str, list[Outgoing]]:
    """Say which tensor goes into which file."""
    files: list[list[Outgoing]] = [[]]
    room = shard_bytes
    for tensor in tensors:
        if files[-1] and tensor.nbytes > room:
            files.append([])
            room = shard_bytes
        files[-1].append(tensor)
        room -= tensor.nbytes
    if len(files) == 1:
        return {SINGLE: files[0]}
    return {f"model-{i:05}-of-{len(files):05}.safetensors": held for i, held in enumerate(files, start=1)}


def write_files(folder: Path, files: dict[str, list[Outgoing]], progress: Progress | None = None) -> None:
    """Write the weights of a model, and the index if there are several files."""
    done, total = 0, total_bytes(files)
    for name, held in files.items():
        # The widest numbers first, so that each tensor begins where a processor reads such numbers at once.
        held = sorted(held, key=lambda tensor: -_STORED[tensor.form][1])
        with (folder / name).open("wb") as file:
            file.write(header(held))
            for tensor in held:
                for block in tensor.blocks():
                    # The file is little-endian, whatever the machine.
                    file.write(np.ascontiguousarray(block, block.dtype.newbyteorder("<")).data)
                    done += block.nbytes
                    if progress:
                        progress(done, total)
            file.flush()
            os.fsync(file.fileno())  # a disk may say only now that it is full
    if list(files) != [SINGLE]:
        weight_map = {tensor.name: name for name, held in files.items() for tensor in held}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def total_bytes(files: dict[str, list[Outgoing]]) -> int:
    """Size of all tensors."""
    return sum(tensor.nbytes for held in files.values() for tensor in held)


def header(tensors: Iterable[Outgoing]) -> bytes:
    """Beginning of a safetensors file, up to its first number."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file that lacks it
    position = 0
    for tensor in tensors:
        place = [position, position + tensor.nbytes]
        entries[tensor.name] = {
            "dtype": _STORED[tensor.form][0],
            "shape": list(tensor.shape),
            "data_offsets": place,
        }
        position = place[1]
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
