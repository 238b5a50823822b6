"""The file of a trace: safetensors, written while the model runs.

Shapes follow from the model and the tokens, so every tensor has its place before the first number is known. The
metadata holds "format", "version", "config" (JSON), and what else is known of the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from refgemma.errors import InputError
from refgemma.files.atomic import whole_file
from refgemma.files.safetensors import SafetensorsWriter, read_metadata
from refgemma.numerics import Array, to_bfloat16

FORMAT = "refgemma-trace"
VERSION = "1"


@contextmanager
def trace_file(
    path: str | Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, str],
    tokens: Array,
    positions: Array,
    meta: Mapping[str, str],
) -> Iterator[Callable[[str, int, Array], None]]:
    """Give ``write(name, start, block)``, which puts numbers into a tensor from its number `start` on."""
    inputs = {"tokens": tokens, "positions": positions}  # (B, T)
    tensors = {name: ("int64", array.shape) for name, array in inputs.items()}
    tensors |= {name: (dtypes[name], shape) for name, shape in shapes.items()}
    with whole_file(path) as file:
        writer = SafetensorsWriter(file, tensors, meta)

        def write(name: str, start: int, block: Array) -> None:
            dtype = tensors[name][0]
            narrow = to_bfloat16(np.asarray(block)) if dtype == "bfloat16" else block.astype(dtype, copy=False)
            writer.write(name, start, narrow)

        for name, array in inputs.items():
            write(name, 0, array)
        yield write


def is_trace(path: str | Path) -> bool:
    """Whether a file says that refgemma wrote it as a trace."""
    try:
        return read_metadata(path).get("format") == FORMAT
    except (OSError, InputError):
        return False
