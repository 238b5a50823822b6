"""The two files of a PEFT adapter: found, and read strictly, without a model.

PEFT names tensors after the module they change, ``base_model.model.`` before it and the part after it:
``base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight``. Some programs also write the adapter's name into it
(``lora_A.default.weight``). `refgemma.lora.fit` says what the tensors mean for a model.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refgemma.checkpoint.folder import default_places
from refgemma.errors import InputError, all_problems
from refgemma.files.safetensors import StoredTensor, read_safetensors
from refgemma.lora.adapter_config import CONFIG_FILE, WEIGHTS_FILE, AdapterConfig, read_adapter_config
from refgemma.lora.tiles import is_finite, tiles

# What PEFT writes after the name of a module, but for the adapter's own name -> the name of the part here.
_PARTS = {
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora_B.bias": "lora_B.bias",
    "lora_embedding_A": "lora_embedding_A",
    "lora_embedding_B": "lora_embedding_B",
    "lora_magnitude_vector": "lora_magnitude_vector",
    "lora_magnitude_vector.weight": "lora_magnitude_vector",
    "token_adapter.trainable_tokens_delta": "trainable_tokens",  # "delta" in name only: the rows themselves
    "base_layer.weight": "base_layer",  # the untrained table, which PEFT adds when embeddings have factors
    "weight": "weight",
}
_NAMED = re.compile(
    r"(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|trainable_tokens_delta)\.([^.]+)"
)
_NOT_NAMES = ("weight", "bias")


def find_adapter(name: str | Path) -> Path:
    """Look up an adapter by name.

    Parameters
    ----------
    name : str or Path
        A folder that holds ``adapter_config.json``, or the name of a shipped adapter, such as "pirate".

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    FileNotFoundError
        If there is no such adapter; lists those that there are.
    """
    places = [place / "lora" for place in default_places()]
    candidates = [Path(name).expanduser(), *(place / name for place in places)]
    for folder in candidates if str(name) else []:
        if (folder / CONFIG_FILE).is_file():
            return folder
    found = sorted({config.parent.name for place in places for config in place.glob(f"*/{CONFIG_FILE}")})
    known = f" or one of {', '.join(found)}" if found else ""
    raise FileNotFoundError(f"no adapter {str(name)!r}: expected a folder that holds {CONFIG_FILE}{known}")


def split_scale(text: str | Path) -> tuple[str, float]:
    """Name and scale of ``NAME:SCALE``; the scale is 1 where none is given."""
    name, colon, number = str(text).rpartition(":")
    try:
        return (name, float(number)) if colon and name else (str(text), 1.0)
    except ValueError:
        return str(text), 1.0  # the colon is part of the name


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA adapter as its folder holds it.

    Attributes
    ----------
    folder : Path
        Where it was read.
    config : AdapterConfig
        Its ``adapter_config.json``.
    modules : dict of str to dict of str to ndarray
        Its tensors, by module (``model.layers.0.self_attn.q_proj``) and part (``lora_A``, ``lora_B``, ``lora_B.bias``,
        ``lora_embedding_A``, ``lora_embedding_B``, ``lora_magnitude_vector``, ``trainable_tokens``, ``base_layer``,
        ``weight``). float64 where stored so, else float32, which holds float16 and bfloat16 exactly; whole matrices
        (``base_layer``, ``weight``) as stored, in the mapped file.
    nbytes : int
        Size of its tensors as they are stored.
    """

    folder: Path
    config: AdapterConfig
    modules: dict[str, dict[str, Any]]
    nbytes: int

    @property
    def name(self) -> str:
        """Last part of the folder's name."""
        return self.folder.resolve().name

    def __repr__(self) -> str:
        return f"Adapter {self.name}: rank {self.config.r}, {len(self.modules)} modules, {self.nbytes:,} bytes"


def read(folder: str | Path) -> Adapter:
    """Read an adapter that PEFT wrote.

    Parameters
    ----------
    folder : str or Path
        Holds ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns
    -------
    Adapter
        Configuration and tensors. Whether they fit a model is checked when they are attached to one.

    Raises
    ------
    FileNotFoundError
        If a file is missing.
    ValueError
        If a file is broken, uses an option that is not supported, or holds tensors that PEFT does not write.
    """
    folder = Path(folder).expanduser()
    if folder.is_file():
        raise InputError(f"{folder} is a file: give the folder that holds it")
    config = read_adapter_config(folder)
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        pickled = folder / "adapter_model.bin"
        hint = "; adapter_model.bin is never opened, because it can run code" if pickled.is_file() else ""
        raise FileNotFoundError(f"{path} does not exist: expected the factors there, beside the configuration{hint}")
    stored = read_safetensors(path)
    return Adapter(folder, config, _by_module(stored, path), sum(tensor.nbytes for tensor in stored.values()))


def _by_module(stored: dict[str, StoredTensor], path: Path) -> dict[str, dict[str, Any]]:
    """All tensors by module and part; one error lists every tensor that has no place."""
    problems: list[str] = []
    modules: dict[str, dict[str, Any]] = {}
    names: set[str] = set()
    for key, tensor in stored.items():
        plain, given = _without_adapter_name(key)
        names |= given
        module, part = _split(plain)
        if not module:
            problems.append(f"{key!r} is not a tensor of a LoRA adapter: expected a name like MODULE.lora_A.weight")
        elif part in modules.setdefault(module, {}):
            problems.append(f"{key!r} is a second {part} of {module}")
        elif tensor.dtype not in ("F64", "F32", "F16", "BF16"):
            problems.append(f"{key!r} is stored as {tensor.dtype}: expected F64, F32, F16 or BF16")
        else:
            if not _all_finite(tensor):
                problems.append(f"{key!r} holds numbers that are not finite: training diverged, or the file is damaged")
            if part in ("base_layer", "weight") and len(tensor.shape) == 2:
                modules[module][part] = tensor.matrix()
            else:
                modules[module][part] = tensor.numbers().astype(np.float64 if tensor.dtype == "F64" else np.float32)
    if len(names) > 1:
        problems.insert(0, f"it holds several adapters, {', '.join(sorted(names))}: expected one")
    if not stored:
        problems.append("it holds no tensors")
    if problems:
        raise InputError(f"{path}: " + all_problems(problems))
    return modules


def _without_adapter_name(key: str) -> tuple[str, set[str]]:
    """Key without the names that PEFT uses in memory and drops on disk, and those names."""
    names = set()

    def drop(found: re.Match[str]) -> str:
        if found[2] in _NOT_NAMES:
            return found[0]
        names.add(found[2])
        return found[1]

    key = _NAMED.sub(drop, key.removeprefix("base_model.model."))
    saved = re.search(r"\.modules_to_save\.([^.]+)\.", key)
    if saved:
        names.add(saved[1])
        key = key.replace(saved[0], ".")
    return key, names


def _split(key: str) -> tuple[str, str]:
    """Module and part; two empty strings where the ending is unknown."""
    for end, part in _PARTS.items():
        module = key.removesuffix(f".{end}")
        if module != key and not module.rpartition(".")[2].startswith("lora_"):
            return module, part
    return "", ""


def _all_finite(tensor: StoredTensor) -> bool:
    if not tensor.shape:
        return bool(np.isfinite(tensor.numbers()))
    form = "bfloat16" if tensor.dtype == "BF16" else str(tensor.data.dtype)
    return all(is_finite(tensor.data[rows], form).all() for rows in tiles(tensor.shape))  # a table may be large
