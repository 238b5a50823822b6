"""PEFT's ``adapter_config.json``, and which modules it claims, with what rank and alpha.

Every field is used, known to leave inference unchanged, or refused by name: ignoring an option silently would give the
answers of a different adapter.

Module names are those of transformers' ``GemmaForCausalLM``: ``model.layers.3.self_attn.q_proj``,
``model.embed_tokens``, ``lm_head``. They are matched as in PEFT 0.21 (``check_target_module_exists``,
``get_pattern_key`` and ``_set_trainable`` in its source), with one difference: a name or pattern that matches nothing
is an error here. PEFT ignores it, and the adapter silently does less than its configuration says
(https://github.com/huggingface/peft/issues/3582).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from refgemma.config import json_object
from refgemma.errors import InputError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


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
        values = json_object(path.read_bytes(), path, f"the {CONFIG_FILE} of an adapter")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} does not exist: a LoRA folder holds {CONFIG_FILE} and {WEIGHTS_FILE}, as PEFT writes them"
        ) from None
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


# ---- the modules that it claims


def low_rank_modules(config: AdapterConfig, modules: Iterable[str], problems: list[str]) -> list[str]:
    """Modules that get low-rank factors."""
    modules = list(modules)
    targets = config.target_modules
    if isinstance(targets, str) and targets.lower() == "all-linear":  # in any case, as in PEFT
        wanted = [module for module in modules if module not in (EMBEDDING, HEAD)]
    elif isinstance(targets, str):
        wanted = [module for module in modules if re.fullmatch(targets, module)]
        if not wanted:
            problems.append(f"target_modules {targets!r:.80} matches no module of the model")
    else:
        wanted = [module for module in modules if any(_ends(module, target) for target in targets or ())]
        for target in targets or ():
            if not any(_ends(module, target) for module in modules):
                problems.append(f"target_modules names {target!r:.80}, and the model has no such module")
    # For a module named in full, PEFT does not check the layer, so that lm_head needs none.
    full_names = targets if isinstance(targets, list) else []
    wanted = [module for module in wanted if module in full_names or _in_layers(config, module)]
    for number in _layer_numbers(config):
        if not any(f".{number}." in module for module in modules):
            problems.append(f"layers_to_transform names layer {number}, and the model has no such layer")
    if isinstance(targets, list) and _layer_numbers(config) and not wanted and not problems:
        problems.append(f"layers_pattern {config.layers_pattern!r:.80} leaves none of the target_modules")
    saved = config.modules_to_save or ()
    return [
        module
        for module in wanted
        if not _excluded(config, module)
        and not any(re.match(rf"(^|.*\.){re.escape(name)}($|\..*)", module) for name in saved)
    ]


def saved_modules(config: AdapterConfig, modules: Iterable[str], problems: list[str]) -> list[str]:
    """Modules that were trained whole.

    PEFT compares the ends of names, with no dot before them: "norm" includes every ``input_layernorm``. The name of a
    block ("mlp") means its parts.
    """
    modules = list(modules)
    found = []
    for name in config.modules_to_save or ():
        matching = [m for m in modules if any(part.endswith(name) for part in _with_parents(m))]
        if not matching:
            problems.append(f"modules_to_save names {name!r:.80}, and the model has no such module")
        found += matching
    return [module for module in modules if module in found]


def rank_and_alpha(config: AdapterConfig, module: str) -> tuple[int, float]:
    """Rank and alpha of one module."""
    rank_key = _pattern_key(config.rank_pattern, module)
    alpha_key = _pattern_key(config.alpha_pattern, module)
    rank = config.r if rank_key is None else config.rank_pattern[rank_key]
    return rank, config.lora_alpha if alpha_key is None else config.alpha_pattern[alpha_key]


def unused_patterns(config: AdapterConfig, modules: Iterable[str]) -> list[str]:
    """A problem for each pattern of rank or alpha that matches no module with factors."""
    modules = list(modules)
    return [
        f"{field} has {pattern!r:.80}, which matches none of the modules with factors"
        for field, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern))
        for pattern in patterns
        if not any(_matches(pattern, module) for module in modules)
    ]


def trained_tokens(config: AdapterConfig, modules: Iterable[str], problems: list[str]) -> dict[str, list[int]]:
    """Ids of rows that were trained whole, by module."""
    given = config.trainable_token_indices or {}
    by_name = given if isinstance(given, dict) else {"embed_tokens": given}
    found: dict[str, list[int]] = {}
    for name, ids in by_name.items():
        tables = [module for module in modules if module in (EMBEDDING, HEAD) and _ends(module, name)]
        if not tables:
            problems.append(f"trainable_token_indices names {name!r:.80}: expected embed_tokens or lm_head")
        found |= dict.fromkeys(tables, ids)
    return found


def _ends(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")


def _matches(pattern: str, module: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


def _pattern_key(patterns: Iterable[str], module: str) -> str | None:
    return next((pattern for pattern in patterns if _matches(pattern, module)), None)


def _with_parents(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _excluded(config: AdapterConfig, module: str) -> bool:
    exclude = config.exclude_modules or ()
    if isinstance(exclude, str):
        return re.fullmatch(exclude, module) is not None
    return any(_ends(module, name) for name in exclude)


def _layer_numbers(config: AdapterConfig) -> list[int]:
    layers = config.layers_to_transform
    return [] if layers is None else [layers] if isinstance(layers, int) else layers


def _in_layers(config: AdapterConfig, module: str) -> bool:
    numbers = _layer_numbers(config)
    if not numbers:
        return True
    patterns = config.layers_pattern or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module)
        if found:
            return int(found[1]) in numbers
    return False
