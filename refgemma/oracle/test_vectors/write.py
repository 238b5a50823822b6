"""Test vectors of a model's operations in a folder: JSON and safetensors, with bounds, and a README that says how."""

from __future__ import annotations

import json
import math
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from refgemma.checkpoint.load import Progress
from refgemma.config import Config, to_json
from refgemma.files.atomic import check_folder_place, whole_folder
from refgemma.numerics import Array
from refgemma.oracle.bounds.arithmetic import arithmetic_of
from refgemma.oracle.published.figures import DATA
from refgemma.oracle.test_vectors.operations import (
    ARITHMETICS,
    LISTED,
    QUIET,
    QUIET_ROW,
    WHOLE,
    Listed,
    Vectors,
    operation_vectors,
)
from refgemma.oracle.test_vectors.text import chat_vectors, sampler_vectors, tokenizer_vectors
from refgemma.text.tokenizer import Tokenizer

_IN_JSON = 4096  # numbers of a tensor, up to which JSON holds them as well
_STORED = 2**17  # numbers of a weight, up to which it is stored; the formula gives all


def write_vectors(
    out: str | Path,
    config: Config,
    tokenizer: Tokenizer | None = None,
    *,
    name: str = "",
    progress: Progress | None = None,
) -> list[Path]:
    """Write the vectors of a model."""
    out = Path(out).expanduser()
    check_folder_place(out)
    with whole_folder(out) as folder:
        vectors = operation_vectors(config, progress)
        tensors = _tensors(vectors)
        save_file({key: np.ascontiguousarray(a) for key, a in tensors.items()}, folder / "operations.safetensors")
        _write(folder / "operations.json", _index(vectors, tensors))
        _write(folder / "sampler.json", sampler_vectors())
        _write(folder / "chat.json", chat_vectors(tokenizer))
        if tokenizer is not None:
            _write(folder / "tokenizer.json", tokenizer_vectors(tokenizer))
        (folder / "published.json").write_bytes((DATA / "operations.json").read_bytes())
        readme = (Path(__file__).parent / "vectors.md").read_text(encoding="utf-8")
        (folder / "README.md").write_text(readme.replace("{model}", name or "a model"), encoding="utf-8")
        names = sorted(path.name for path in folder.iterdir())
    return [out / name for name in names]


def _tensors(vectors: Vectors) -> dict[str, Array]:
    """Every tensor under its name in the file."""
    tensors: dict[str, Array] = {"in/tokens": vectors.tokens, "in/positions": vectors.positions}
    tensors |= {f"in/{step}": value for step, value in vectors.inputs.items()}
    tensors |= {f"weight/{w.name}": w.numbers for w in vectors.weights if w.numbers.size <= _STORED}
    for (step, arithmetic), result in vectors.results.items():
        if arithmetic == "float32":
            tensors[f"out/{step}"] = result.exact
        elif not np.array_equal(result.exact, tensors[f"out/{step}"]):  # a constant is rounded there
            tensors[f"out/{step}/{arithmetic}"] = result.exact
        for kind, bound in (("worst", result.bound.worst), ("likely", result.bound.likely)):
            tensors[f"out/{step}/{arithmetic}/{kind}"] = _up(bound)
    return tensors


def _up(bound: Array) -> Array:
    """Bound to three digits, rounded up: more digits would only fill the file."""
    size = np.maximum(bound, 1e-30)
    unit = 10.0 ** (np.floor(np.log10(size)) - 2)
    return (np.ceil(size / unit) * unit).astype(np.float32)


def _index(vectors: Vectors, tensors: dict[str, Array]) -> dict[str, Any]:
    """Index of the file, operation by operation; small tensors in full."""
    config = to_json(vectors.config)
    listed = [(operation.name, operation) for operation in LISTED]
    numbers = {
        name: {"dtype": str(array.dtype), "shape": list(array.shape), "values": _values(array)}
        for name, array in tensors.items()
    }
    return {
        "made_by": f"refgemma {_version()}",
        "config": config | {"num_heads_per_kv_head": config["num_heads"] // config["num_kv_heads"]},
        "constants": {
            "sqrt_D": math.sqrt(config["hidden_size"]),
            "eps": config["rms_norm_eps"],
            "theta": config["rope_theta"],
            "query_scale": config["query_scale"],
        },
        "operations": [_entry(key, operation, vectors, tensors) for key, operation in [*listed, *WHOLE.items()]],
        "weights": [
            {
                "name": w.name,
                "number": w.number,
                "shape": list(w.shape),
                "exponent": w.exponent,
                "first": [float(v) for v in w.numbers.reshape(-1)[:4]],
                "sum_of_squares": float(np.sum(np.square(w.numbers, dtype=np.float64))),
                "stored": f"weight/{w.name}" in tensors,
            }
            | ({"quiet_row": QUIET_ROW, "quiet": QUIET} if w.name == "embed" else {})
            for w in vectors.weights
        ],
        "tensors": numbers,
    }


def _entry(key: str, operation: Listed, vectors: Vectors, tensors: dict[str, Array]) -> dict[str, Any]:
    arithmetics = {}
    for arithmetic in ARITHMETICS:
        own = f"out/{key}/{arithmetic}"
        arithmetics[arithmetic] = {
            "exact": own if own in tensors else f"out/{key}",
            "worst": f"{own}/worst",
            "likely": f"{own}/likely",
            "reason": vectors.results[key, arithmetic].bound.reason,
            "rounded_constants": sorted(arithmetic_of(arithmetic).reference.rounding),
        }
    about: dict[str, Any] = {
        "name": key,
        "does": operation.does,
        "formula": operation.formula,
        "inputs": [f"in/{name}" for name in operation.inputs],
    }
    if operation.weight:
        about["weight"] = operation.weight
    if key in WHOLE:
        about["output"] = operation.name
        weights = ["mlp.gate", "mlp.up", "mlp.down"] if key == "mlp" else []
        about |= {"weights": weights} if weights else {}
    return about | arithmetics


def _values(array: Array) -> list[Any] | None:
    """Numbers row by row, as short as they can be without losing a bit; None for many."""
    if array.size > _IN_JSON:
        return None
    flat = array.reshape(-1)
    if array.dtype.kind == "i":
        return [int(v) for v in flat]
    return [float(str(v)) for v in flat]


def _write(path: Path, value: dict[str, Any]) -> None:
    """JSON with one entry of its lists a line, so that it can be read."""
    lines = []
    for key, held in value.items():
        if isinstance(held, list) and held and isinstance(held[0], dict):
            inner = ",\n".join("  " + json.dumps(item, ensure_ascii=False, allow_nan=False) for item in held)
            lines.append(f" {json.dumps(key)}: [\n{inner}\n ]")
        elif isinstance(held, dict) and key == "tensors":
            inner = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v, allow_nan=False)}" for k, v in held.items())
            lines.append(f" {json.dumps(key)}: {{\n{inner}\n }}")
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(held, ensure_ascii=False, allow_nan=False)}")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _version() -> str:
    try:
        return version("refgemma")
    except PackageNotFoundError:  # run from its source
        return "from source"
