"""PEFT's ``adapter_config.json``: what an adapter says about itself.

Every field of the file is either used, known to leave inference unchanged, or refused by name: an option that is
skipped in silence gives the answers of another adapter.
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
    """The fields of ``adapter_config.json`` that decide what an adapter computes, under PEFT's names.

    Attributes
    ----------
    r : int
        Rank of the factors.
    lora_alpha : float
        The change is scaled by ``lora_alpha / r``, or by ``lora_alpha / sqrt(r)`` with `use_rslora`.
    target_modules : list of str, str or None
        Modules that get factors: endings of module names, a regular expression for whole names, or "all-linear".
    exclude_modules : list of str, str or None
        Modules that get none, given in the same two ways.
    use_rslora : bool
        Whether the scale falls with the root of the rank (Kalajdzievski, 2023).
    rank_pattern : dict of str to int
        Other ranks, by a regular expression for the end of a module name.
    alpha_pattern : dict of str to float
        Other values of `lora_alpha`, likewise.
    layers_to_transform : list of int, int or None
        Only in these layers.
    layers_pattern : list of str, str or None
        What stands before the layer number in a module name.
    use_dora : bool
        Whether changed weights get a trained magnitude (Liu et al., 2024).
    lora_bias : bool
        Whether the second factor has a bias.
    modules_to_save : list of str or None
        Modules trained whole: endings of module names.
    trainable_token_indices : list of int, dict of str to list of int, or None
        Rows of the embedding (or of the modules named) that were trained whole.
    ensure_weight_tying : bool
        Whether a tied head changes with the embedding.
    fan_in_fan_out : bool
        Meant for weights stored (in, out), of which Gemma has none; PEFT then ignores it, and so do we.
    bias : str
        Which biases of the base were trained; Gemma has none.
    base_model_name_or_path : str or None
        What the adapter was trained on; told to the user, not checked.
    """

    r: int = 8
    lora_alpha: float = 8
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    use_dora: bool = False
    lora_bias: bool = False
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    ensure_weight_tying: bool = False
    fan_in_fan_out: bool = False
    bias: str = "none"
    base_model_name_or_path: str | None = None

    def scale(self, rank: int, alpha: float) -> float:
        """Factor of the low-rank product.

        Parameters
        ----------
        rank : int
            Of the module.
        alpha : float
            Of the module.

        Returns
        -------
        float
            ``alpha / rank``, or ``alpha / sqrt(rank)`` for rsLoRA.
        """
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


# Fields that training used, or that only describe: they change nothing in what the finished adapter computes. Those of
# CorDA, EVA, LoftQ and LoRA-GA count only with `init_lora_weights` of that name.
_INERT = {
    "auto_mapping", "corda_config", "eva_config", "inference_mode", "init_lora_weights", "loftq_config",
    "lora_dropout", "lora_ga_config", "megatron_core", "model_type", "parent_library", "peft_type", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip

# Ways to begin training that leave the base as it is, and those that take the product of the first factors out of it
# (LoftQ: that quantise it), so that their adapters fit a base which no file holds. The second are followed by details,
# as in "pissa_niter_4".
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica")
_OTHER_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")

_SHAPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "int": (lambda v: _is_rank(v), "a whole number from 1 to 999,999"),
    "number": (lambda v: _is_number(v), "a finite number"),
    "bool": (lambda v: isinstance(v, bool), "true or false"),
    "text": (lambda v: v is None or isinstance(v, str), "a text"),
    "names": (lambda v: v is None or isinstance(v, str) or _are(v, str), "a text or a list of texts"),
    "list": (lambda v: v is None or _are(v, str), "a list of texts"),
    "layers": (lambda v: v is None or _is_index(v) or _are(v, int), "a layer number or a list of them"),
    "ranks": (lambda v: isinstance(v, dict) and all(map(_is_rank, v.values())), "names and ranks"),
    "alphas": (lambda v: isinstance(v, dict) and all(map(_is_number, v.values())), "names and numbers"),
    "tokens": (
        lambda v: v is None or _are(v, int) or (isinstance(v, dict) and all(_are(x, int) for x in v.values())),
        "a list of token ids, or names and such lists",
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
                f"{name} is {value!r:.80}: this option is not supported, and without it the adapter may be another"
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
    """Refuse an adapter that is not for the base as it is published."""
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
            f"init_lora_weights is {start!r:.80}, which is not known here, and may have changed the base model: "
            f"expected true, false, {', '.join(_PLAIN_STARTS)}"
        )


def _check_together(config: AdapterConfig) -> None:
    if config.lora_bias and config.use_dora:
        raise InputError("lora_bias and use_dora are both true: PEFT has no such adapter")
    if config.bias not in ("none", "all", "lora_only"):
        raise InputError(f"bias is {config.bias!r}: expected 'none', 'all' or 'lora_only'")
    if isinstance(config.target_modules, str) and config.layers_to_transform not in (None, []):
        raise InputError("layers_to_transform goes with a list of target_modules, not with an expression")
    patterns = [p for p in (config.target_modules, config.exclude_modules) if isinstance(p, str)]
    layers = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern or []
    for pattern in [*patterns, *config.rank_pattern, *config.alpha_pattern, *layers]:
        try:
            re.compile(pattern)
        except re.error as error:
            raise InputError(f"{pattern!r:.80} is no regular expression ({error})") from None


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
