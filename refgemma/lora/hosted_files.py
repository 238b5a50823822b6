"""The two files of an uploaded adapter, read without trusting them, and the shapes they hold.

`refgemma.lora.adapter` reads an adapter to use it and stops at the first broken file. Here every fault is a value, so
that it can be reported beside all others.
"""

from __future__ import annotations

import functools
import json
import re
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from refgemma.checkpoint.names import tensors_of
from refgemma.config import SIZES, Config
from refgemma.errors import listed
from refgemma.files.safetensors import StoredTensor, read_safetensors

# hosted model -> the shape of its base; the bases are google/gemma-2b-it and google/gemma-7b-it
HOSTED = {"@cf/google/gemma-2b-it-lora": SIZES["gemma-2b"], "@cf/google/gemma-7b-it-lora": SIZES["gemma-7b"]}

_LONGEST_CONFIG = 1_000_000  # bytes; PEFT writes about 1,200
_LONGEST_HEADER = 4_000_000  # bytes; every matrix of the larger model with its DoRA magnitude takes 100,000

_brief = reprlib.Repr()  # also safe on nesting so deep that repr() would run out of stack
_brief.maxstring = _brief.maxother = 60
_brief.maxlong = 30


class Factor(NamedTuple):
    """One tensor of a low-rank change."""

    name: str
    module: str
    kind: str  # "A", "B" or "magnitude"
    shape: tuple[int, ...]  # (R, in), (out, R) or (out,); an embedding counts as a matrix from V to D


_FACTOR = re.compile(
    r"base_model\.model\.(?P<module>\w+(?:\.\w+)*?)\.lora_(?:embedding_)?(?P<kind>A|B|magnitude_vector)"
    r"(?!\.bias\Z)(?:\.\w+?)?(?:\.weight)?"  # PEFT leaves the adapter's name out, other programs may not
)


def brief(value: Any) -> str:
    """A value of an untrusted file, short and on one line."""
    return _brief.repr(value)


def listing(values: Iterable[str], most: int = 8) -> str:
    """The first few names, and the number of the others."""
    return listed(list(values), most, lambda name: name[:80] if name.isprintable() else brief(name))


def read_json_object(path: Path) -> tuple[dict[str, Any] | None, str]:
    """The JSON object in a file, or None and the reason."""
    try:
        if error := _not_a_file(path, _LONGEST_CONFIG):
            return None, error
        value = json.loads(path.read_bytes().decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return None, f"it is not valid JSON ({str(error)[:100]!r})"
    if not isinstance(value, dict):
        return None, f"it holds a JSON {type(value).__name__}, not an object"
    return value, ""


def read_adapter_header(path: Path) -> tuple[dict[str, StoredTensor] | None, str]:
    """The tensors of a safetensors file, by its header alone, or None and the reason."""
    try:
        if error := _not_a_file(path):
            return None, error
        return read_safetensors(path, longest_header=_LONGEST_HEADER), ""
    except (OSError, ValueError) as error:
        return None, str(error).replace(f"{path} ", "it ").replace(str(path), path.name)[:300]


def _not_a_file(path: Path, longest: int | None = None) -> str:
    """Why a path should not be opened, if it should not: reading a pipe, say, would never end."""
    if not path.is_file():
        return "it is not a file" if path.exists() else "there is no such file"
    if longest is not None and path.stat().st_size > longest:
        return f"it has {path.stat().st_size:,} bytes: expected {longest:,} at most"
    return ""


def factors_of(tensors: Mapping[str, StoredTensor]) -> list[Factor]:
    """The tensors that belong to low-rank changes."""
    found = [(_FACTOR.fullmatch(name), tensor) for name, tensor in tensors.items()]
    return [
        Factor(tensor.name, match["module"], match["kind"].removesuffix("_vector"), tensor.shape)
        for match, tensor in found
        if match
    ]


def expected_shape(factor: Factor, config: Config) -> tuple[int | None, ...] | None:
    """Shape that a factor must have, with None for the rank; None if the model has no such matrix."""
    if (sizes := _widths(config).get(factor.module)) is None:
        return None
    shape_of: dict[str, tuple[int | None, ...]] = {"A": (None, sizes[0]), "B": (sizes[1], None), "magnitude": sizes[1:]}
    return shape_of[factor.kind]


def is_fitting(factor: Factor, config: Config) -> bool:
    """Whether the shape of a factor fits a model."""
    wanted = expected_shape(factor, config)
    return (
        wanted is not None
        and len(wanted) == len(factor.shape)
        and all(want in (None, found) for want, found in zip(wanted, factor.shape, strict=True))
    )


def fits(factors: list[Factor], model: str) -> bool:
    """Whether all factors fit a hosted model."""
    return bool(factors) and all(is_fitting(factor, HOSTED[model]) for factor in factors)


@functools.cache
def _widths(config: Config) -> dict[str, tuple[int, ...]]:
    """Input and output width of each matrix, by its name in transformers."""
    tensors = tensors_of(replace(config, tie_word_embeddings=False))
    shapes = {tensor.name.removesuffix(".weight"): tensor.shape for tensor in tensors if len(tensor.shape) == 2}
    return {module: shape if module == "model.embed_tokens" else shape[::-1] for module, shape in shapes.items()}
