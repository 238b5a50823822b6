"""PEFT's ``adapter_config.json``.

Every field is used, known to leave inference unchanged, or refused by name: ignoring an option silently would give the
answers of a different adapter.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from refgemma.errors import InputError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The fields of ``adapter_config.json`` that decide what an adapter computes, under PEFT's names."""

    r: int = 8  # rank of the factors
    lora_alpha: float = 8  # the product of the factors is scaled by lora_alpha / r
    target_modules: list[str] | str | None = None  # ends of module names, a pattern for whole names, or "all-linear"
    exclude_modules: list[str] | str | None = None  # of these, modules without factors: ends or a pattern
    use_rslora: bool = False  # scale by lora_alpha / sqrt(r) (Kalajdzievski, 2023)
    rank_pattern: dict[str, int] = field(default_factory=dict)  # other ranks, by a pattern for the end of a module name
    alpha_pattern: dict[str, float] = field(default_factory=dict)  # other values of lora_alpha, likewise
    layers_to_transform: list[int] | int | None = None  # only these layers
    layers_pattern: list[str] | str | None = None  # the part of a module name before the layer number
    use_dora: bool = False  # changed weights have a trained magnitude (Liu et al., 2024)
    lora_bias: bool = False  # the second factor has a bias
    modules_to_save: list[str] | None = None  # modules trained whole: ends of module names
    trainable_token_indices: list[int] | dict[str, list[int]] | None = (
        None  # trained rows of the embedding, or by table
    )
    ensure_weight_tying: bool = False  # a tied head changes with the embedding
    fan_in_fan_out: bool = False  # for weights stored (in, out); Gemma has none, and PEFT then ignores it
    bias: str = "none"  # which biases of the base were trained; Gemma has none
    base_model_name_or_path: str | None = None  # model that the adapter was trained on; shown, not checked

    def scale(self, rank: int, alpha: float) -> float:
        """Factor of the low-rank product of one module."""
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


# Fields of training or description, which do not change what the finished adapter computes. Those of CorDA, EVA, LoftQ
# and LoRA-GA matter only with `init_lora_weights` of that name.
_INERT = {
    "auto_mapping", "corda_config", "eva_config", "inference_mode", "init_lora_weights", "loftq_config",
    "lora_dropout", "lora_ga_config", "megatron_core", "model_type", "parent_library", "peft_type", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip

# Initialisations that leave the base as it is, and those that subtract the first factors' product from it (LoftQ:
# quantise it), so that the adapter fits a base that no file holds. The latter may have a suffix: "pissa_niter_4".
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica")
_OTHER_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")

_SHAPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "int": (lambda v: _is_rank(v), "a whole number from 1 to 999,999"),
    "number": (lambda v: _is_number(v), "a finite number"),
    "bool": (lambda v: isinstance(v, bool), "true or false"),
    "text": (lambda v: v is None or isinstance(v, str), "a string"),
    "names": (lambda v: v is None or isinstance(v, str) or _are(v, str), "a string or a list of strings"),
    "list": (lambda v: v is None or _are(v, str), "a list of strings"),
    "layers": (lambda v: v is None or _is_index(v) or _are(v, int), "a layer number or a list of them"),
    "ranks": (lambda v: isinstance(v, dict) and all(map(_is_rank, v.values())), "an object of names and ranks"),
    "alphas": (lambda v: isinstance(v, dict) and all(map(_is_number, v.values())), "an object of names and numbers"),
    "tokens": (
        lambda v: v is None or _are(v, int) or (isinstance(v, dict) and all(_are(x, int) for x in v.values())),
        "a list of token ids, or an object of names and such lists",
    ),
}  # fmt: skip
_SHAPE_OF = {
    "r": "int", "lora_alpha": "number", "target_modules": "names", "exclude_modules": "names", "use_rslora": "bool",
    "rank_pattern": "ranks", "alpha_pattern": "alphas", "layers_to_transform": "layers", "layers_pattern": "names",
    "use_dora": "bool", "lora_bias": "bool", "modules_to_save": "list", "trainable_token_indices": "tokens",
    "ensure_weight_tying": "bool", "fan_in_fan_out": "bool", "bias": "text", "base_model_name_or_path": "text",
}  # fmt: skip


def read_adapter_config(folder: str | Path) -> AdapterConfig:
    """Read the ``adapter_config.json`` of a folder."""
    path = Path(folder) / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} does not exist: a LoRA folder holds {CONFIG_FILE} and {WEIGHTS_FILE}, as PEFT writes them"
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}): expected the {CONFIG_FILE} of an adapter") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} holds a JSON {type(values).__name__}: expected an object")
    try:
        return adapter_config(values)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None


def adapter_config(values: Mapping[str, Any]) -> AdapterConfig:
    """Check the fields of an adapter configuration."""
    if (kind := values.get("peft_type")) != "LORA":
        raise InputError(f"peft_type is {kind!r}: expected 'LORA'")
    if (task := values.get("task_type")) not in (None, "CAUSAL_LM"):
        raise InputError(f"task_type is {task!r}: expected 'CAUSAL_LM', an adapter that continues text")
    _check_start(values.get("init_lora_weights", True))
    known = {f.name for f in fields(AdapterConfig)}
    for name, value in values.items():
        if name not in known and name not in _INERT and value not in (None, False, [], {}, ""):
            raise InputError(
                f"{name} is {value!r:.80}: this option is not supported, and without it the adapter may differ"
            )

    checked = {}
    for name in sorted(known & values.keys()):
        value = values[name]
        if value is None and name in ("rank_pattern", "alpha_pattern"):
            value = {}
        if value is None and name in ("ensure_weight_tying", "lora_bias", "use_dora", "use_rslora"):
            value = False
        is_right, expected = _SHAPES[_SHAPE_OF[name]]
        if not is_right(value):
            raise InputError(f"{name} is {value!r:.80}: expected {expected}")
        checked[name] = value
    config = AdapterConfig(**checked)
    _check_together(config)
    return config


def _check_start(start: Any) -> None:
    """Refuse an adapter for a base other than the published one."""
    if start is None or isinstance(start, bool):
        return
    name = start.lower() if isinstance(start, str) else ""
    if name.startswith(_OTHER_STARTS):
        raise InputError(
            f"init_lora_weights is {start!r:.80}, which changes the base model before training, so that these factors "
            "do not fit the published one: let PEFT convert the adapter (save_pretrained with "
            "path_initial_model_for_weight_conversion)"
        )
    if name not in _PLAIN_STARTS:
        raise InputError(
            f"init_lora_weights is {start!r:.80}, which is unknown and may have changed the base model: "
            f"expected true, false, {', '.join(_PLAIN_STARTS)}"
        )


def _check_together(config: AdapterConfig) -> None:
    if config.lora_bias and config.use_dora:
        raise InputError("lora_bias and use_dora are both true: PEFT has no such adapter")
    if config.bias not in ("none", "all", "lora_only"):
        raise InputError(f"bias is {config.bias!r}: expected 'none', 'all' or 'lora_only'")
    if isinstance(config.target_modules, str) and config.layers_to_transform not in (None, []):
        raise InputError("layers_to_transform needs target_modules to be a list, not a pattern")
    patterns = [p for p in (config.target_modules, config.exclude_modules) if isinstance(p, str)]
    layers = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern or []
    for pattern in [*patterns, *config.rank_pattern, *config.alpha_pattern, *layers]:
        try:
            re.compile(pattern)
        except re.error as error:
            raise InputError(f"{pattern!r:.80} is not a regular expression ({error})") from None


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_rank(value: Any) -> bool:
    return _is_int(value) and 0 < value < 10**6


def _is_index(value: Any) -> bool:
    return _is_int(value) and value >= 0


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False


def _are(values: Any, kind: type) -> bool:
    wanted = _is_index if kind is int else lambda value: isinstance(value, kind)
    return isinstance(values, list) and all(map(wanted, values))
