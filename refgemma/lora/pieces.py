"""A matrix in pieces of some rows."""

from __future__ import annotations

from collections.abc import Iterator

TILE = 2**18  # numbers; the half dozen float64 arrays of one piece are 2 MB each, near the processor


def pieces(shape: tuple[int, ...], rows: slice, numbers: int | None = None) -> Iterator[slice]:
    """Rows in pieces."""
    step = max(1, (numbers or TILE) // (shape[1] if len(shape) > 1 else 1))
    return (slice(start, min(start + step, rows.stop)) for start in range(rows.start, rows.stop, step))
