"""The two files of an adapter that somebody uploads, read without trusting them, and the shapes they hold.

Nothing here follows the rest of `refgemma.lora`, which reads an adapter to use it: what is refused there in the first
sentence has to be reported here beside everything else.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from refgemma.config import SIZES, Config
from refgemma.errors import listed
from refgemma.files.safetensors import StoredTensor, read_safetensors

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

# hosted model -> the shape of its base; the bases are google/gemma-2b-it and google/gemma-7b-it
HOSTED = {"@cf/google/gemma-2b-it-lora": SIZES["gemma-2b"], "@cf/google/gemma-7b-it-lora": SIZES["gemma-7b"]}

_LONGEST_CONFIG = 1_000_000  # bytes; PEFT writes about 1,200
_LONGEST_HEADER = 4_000_000  # bytes; every matrix of the larger model with its DoRA magnitude takes 100,000

_brief = reprlib.Repr()  # also safe on nesting so deep that repr() would run out of stack
_brief.maxstring = _brief.maxother = 60
_brief.maxlong = 30


class Factor(NamedTuple):
    """One tensor of a low-rank change.

    `kind` is "A", "B" or "magnitude"; `shape` is (R, in), (out, R) or (out,), an embedding counted as a matrix from V
    to D.
    """

    name: str
    module: str
    kind: str
    shape: tuple[int, ...]


_FACTOR = re.compile(
    r"base_model\.model\.(?P<module>\w+(?:\.\w+)*?)\.lora_(?:embedding_)?(?P<kind>A|B|magnitude_vector)"
    r"(?!\.bias\Z)(?:\.\w+?)?(?:\.weight)?"  # PEFT leaves the adapter's name out, other programs may not
)


def brief(value: Any) -> str:
    """A value of a stranger's file, short and on one line."""
    return _brief.repr(value)


def listing(values: Iterable[str], most: int = 8) -> str:
    """Some names, and how many more there are."""
    return listed(list(values), most, lambda name: name[:80] if name.isprintable() else brief(name))


def read_json_object(path: Path) -> tuple[dict[str, Any] | None, str]:
    """Read a file that should hold a JSON object."""
    try:
        if error := _not_a_file(path, _LONGEST_CONFIG):
            return None, error
        value = json.loads(path.read_bytes().decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # of the disk, of json and its decoding, of nesting
        return None, f"it is no valid JSON ({str(error)[:100]!r})"
    if not isinstance(value, dict):
        return None, f"it holds a JSON {type(value).__name__}, not an object"
    return value, ""


def read_adapter_header(path: Path) -> tuple[dict[str, StoredTensor] | None, str]:
    """Read which tensors a safetensors file holds, and no number of them."""
    try:
        if error := _not_a_file(path):
            return None, error
        return read_safetensors(path, longest_header=_LONGEST_HEADER), ""
    except (OSError, ValueError) as error:
        return None, str(error).replace(f"{path} ", "it ").replace(str(path), path.name)[:300]


def _not_a_file(path: Path, longest: int | None = None) -> str:
    """Why a path should not even be opened; a pipe, say, would be waited for without end."""
    if not path.is_file():
        return "it is no file" if path.exists() else "there is no such file"
    if longest is not None and path.stat().st_size > longest:
        return f"it has {path.stat().st_size:,} bytes, where an adapter's has {longest:,} at most"
    return ""


def factors_of(tensors: Mapping[str, StoredTensor]) -> list[Factor]:
    """The tensors that are part of a low-rank change."""
    found = [(_FACTOR.fullmatch(name), tensor) for name, tensor in tensors.items()]
    return [
        Factor(tensor.name, match["module"], match["kind"].removesuffix("_vector"), tensor.shape)
        for match, tensor in found
        if match
    ]


def expected_shape(factor: Factor, config: Config) -> tuple[int | None, ...] | None:
    """Shape that a factor must have, None for its rank."""
    if (sizes := _widths(factor.module, config)) is None:
        return None
    shape_of: dict[str, tuple[int | None, ...]] = {"A": (None, sizes[0]), "B": (sizes[1], None), "magnitude": sizes[1:]}
    return shape_of[factor.kind]


def is_fitting(factor: Factor, config: Config) -> bool:
    """Whether a factor can change a matrix of a model."""
    wanted = expected_shape(factor, config)
    return (
        wanted is not None
        and len(wanted) == len(factor.shape)
        and all(want in (None, found) for want, found in zip(wanted, factor.shape, strict=True))
    )


def fits(factors: list[Factor], model: str) -> bool:
    """Whether an adapter can change a hosted model."""
    return bool(factors) and all(is_fitting(factor, HOSTED[model]) for factor in factors)


def _widths(module: str, config: Config) -> tuple[int, int] | None:
    """Input and output width of a matrix, under the name that transformers gives it; None where there is none."""
    D, F, V = config.hidden_size, config.intermediate_size, config.vocab_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    outer = {"lm_head": (D, V), "model.embed_tokens": (V, D)}
    inner = {
        "self_attn.q_proj": (D, queries),
        "self_attn.k_proj": (D, keys),
        "self_attn.v_proj": (D, keys),
        "self_attn.o_proj": (queries, D),
        "mlp.gate_proj": (D, F),
        "mlp.up_proj": (D, F),
        "mlp.down_proj": (F, D),
    }
    layer = re.fullmatch(r"model\.layers\.(0|[1-9][0-9]{0,3})\.(.+)", module)
    if layer is None:
        return outer.get(module)
    return inner.get(layer[2]) if int(layer[1]) < config.num_layers else None
