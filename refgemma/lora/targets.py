"""Which modules an adapter claims, and with what rank and alpha: PEFT's own matching rules.

Module names are those of transformers' ``GemmaForCausalLM``: ``model.layers.3.self_attn.q_proj``,
``model.embed_tokens``, ``lm_head``. The rules are those of PEFT 0.21 (``check_target_module_exists``,
``get_pattern_key`` and ``_set_trainable`` in its source), with one difference: a name or pattern that matches nothing
is an error here. PEFT ignores it, and the adapter silently does less than its configuration says
(https://github.com/huggingface/peft/issues/3582).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from refgemma.lora.adapter_config import AdapterConfig

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


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
