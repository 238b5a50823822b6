"""The rules of the hosted models, one function each: what was found, what is wanted, and whether the two agree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from refgemma.files.safetensors import StoredTensor
from refgemma.lora.hosted_files import (
    CONFIG_FILE,
    HOSTED,
    WEIGHTS_FILE,
    Factor,
    brief,
    expected_shape,
    factors_of,
    is_fitting,
    listing,
)

Verdict: TypeAlias = Literal["accepted", "refused", "unknown"]

GUIDE = "guide, Limitations"
UPLOAD = "guide, Uploading LoRA adapters"
TUTORIAL = "tutorial, fine-tune models with AutoTrain"
FORMAT = "format of the file"
SILENT = "undocumented"

# Fields that change nothing in what a finished adapter computes, or that have a rule of their own.
_NO_OPTION = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "loftq_config", "lora_alpha", "lora_dropout",
    "megatron_core", "model_type", "parent_library", "peft_type", "peft_version", "qalora_group_size", "r", "revision",
    "runtime_config", "target_modules", "task_type", "use_qalora",
}  # fmt: skip
_PLAIN = {"bias": ("none",), "init_lora_weights": (True, "gaussian")}  # values of other fields that are no option
_OF_A_NARROW_BASE = ("4bit", "8bit", "int4", "int8", "nf4", "fp8", "bnb", "gptq", "awq", "gguf")
_SHOWN_MODULES = {"q_proj", "v_proj"}  # in the sample of the guide
_MOST_OPTIONS = 20


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One rule, and what was found."""

    rule: str  # what it is about
    found: str  # what the adapter has there
    wanted: str  # what is asked for
    verdict: Verdict  # "unknown" where the documentation does not say
    # where the rule stands: the guide (`refgemma.lora.hosted` says which), its tutorial, the format of the file itself,
    # or nowhere: "undocumented"
    source: str


def _finding(rule: str, found: str, wanted: str, verdict: Verdict | bool, source: str) -> Finding:
    if isinstance(verdict, bool):
        verdict = "accepted" if verdict else "refused"
    return Finding(rule=rule, found=found, wanted=wanted, verdict=verdict, source=source)


def file_names(folder: Path) -> Finding:
    """Both files must be there under exactly these names; others are never uploaded."""
    there = {entry.name for entry in folder.iterdir()}
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if name not in there]
    found = "both" if not missing else f"no {' and no '.join(missing)}; {listing(sorted(there)) or 'nothing'}"
    return _finding("file names", found, f"{CONFIG_FILE} and {WEIGHTS_FILE}", not missing, GUIDE)


def readable(name: str, error: str) -> Finding:
    """A file must be what its name says; `error` is what its reader had to say."""
    return _finding(name, error or "readable", "a file as PEFT writes it", not error, FORMAT)


def size(path: Path, megabytes: int) -> list[Finding]:
    """The weights must stay below a size in MB; the guide does not say whether one is 10^6 bytes or 2^20."""
    if not path.is_file():
        return []
    found = path.stat().st_size
    verdict: Verdict = (
        "accepted" if found < megabytes * 10**6 else "unknown" if found < megabytes * 2**20 else "refused"
    )
    return [_finding("size", f"{found:,} bytes", f"less than {megabytes} MB", verdict, GUIDE)]


def field_is(config: Mapping[str, Any], name: str, wanted: str) -> Finding:
    """A field of the configuration must hold one word."""
    found = brief(config[name]) if name in config else "none given"
    source = FORMAT if name == "peft_type" else UPLOAD
    return _finding(name, found, repr(wanted), config.get(name) == wanted, source)


def rank(config: Mapping[str, Any], factors: list[Factor], largest: int) -> Finding:
    """No rank may be larger: neither the general one, nor one of `rank_pattern`, nor that of any factor."""
    pattern = config.get("rank_pattern") or {}
    said = [config.get("r"), *(pattern.values() if isinstance(pattern, dict) else [pattern])]
    wrong = [value for value in said if not _is_rank(value)]
    ranks = {value for value in said if _is_rank(value)} | set(_ranks(factors))
    found = f"r is {brief(wrong[0])}, no rank" if wrong else str(max(ranks))
    if not wrong and len(ranks) > 1:
        found += f" (and {', '.join(map(str, sorted(ranks)[:-1][:8]))})"
    return _finding("rank", found, f"at most {largest}", not wrong and max(ranks) <= largest, GUIDE)


def _is_rank(value: Any) -> bool:
    return type(value) is int and value >= 1


def _ranks(factors: list[Factor]) -> list[int]:
    return [f.shape[0 if f.kind == "A" else -1] for f in factors if f.kind != "magnitude" and f.shape]


def base_model(config: Mapping[str, Any], models: tuple[str, ...]) -> Finding:
    """Named bases are Google's two instruction-tuned ones; what becomes of an adapter for another is not said."""
    found = config.get("base_model_name_or_path")
    name = found.rstrip("/").rpartition("/")[2] if isinstance(found, str) else ""
    wanted = [f"google/{_base(model)}" for model in models or HOSTED]
    verdict: Verdict = "accepted" if f"google/{name}" in wanted else "unknown"
    return _finding("base model", brief(found) if found else "none given", " or ".join(wanted), verdict, TUTORIAL)


def unquantised(config: Mapping[str, Any]) -> Finding:
    """The base must not be quantised; what the configuration gives away about that."""
    signs = [name for name in ("use_qalora", "loftq_config") if config.get(name)]
    if str(config.get("init_lora_weights"))[:9].lower() == "loftq":
        signs.append("init_lora_weights")
    base = config.get("base_model_name_or_path")
    signs += [word for word in _OF_A_NARROW_BASE if isinstance(base, str) and word in base.lower()]
    found = f"{', '.join(signs)} in {CONFIG_FILE}" if signs else "no sign of another"
    return _finding("quantisation", found, "a base that is not quantised", not signs, GUIDE)


def options(config: Mapping[str, Any]) -> list[Finding]:
    """What PEFT can do beyond plain LoRA, and the guide does not mention: DoRA, rsLoRA, trained biases and the rest."""
    used = [
        name
        for name, value in config.items()
        if name not in _NO_OPTION and value not in (None, False, [], {}, "", *_PLAIN.get(name, ()))
    ]
    if not used:
        return [_finding("options", "none beyond plain LoRA", "nothing is said of others", True, SILENT)]
    found = [
        _finding(listing([name]), brief(config[name]), "nothing is said", "unknown", SILENT)
        for name in used[:_MOST_OPTIONS]
    ]
    if len(used) > _MOST_OPTIONS:
        found.append(_finding("options", f"{len(used) - _MOST_OPTIONS} more", "nothing is said", "unknown", SILENT))
    return found


def pairs(config: Mapping[str, Any], factors: list[Factor]) -> Finding:
    """Each changed matrix must have both its factors, of one rank, which the configuration names."""
    ranks: dict[str, dict[str, int]] = {}
    problems = []
    for f in factors:
        kinds = ranks.setdefault(f.module, {})
        if f.kind in kinds:
            problems.append(f"{f.name} stands for a factor that is there already")
        elif len(f.shape) != (1 if f.kind == "magnitude" else 2):
            problems.append(f"{f.name} has shape {f.shape}")
        kinds[f.kind] = f.shape[0 if f.kind == "A" else -1] if f.shape else 0
    for module, kinds in ranks.items():
        if not {"A", "B"} <= kinds.keys():
            problems.append(f"{module} lacks factor {'A' if 'A' not in kinds else 'B'}")
        elif kinds["A"] != kinds["B"]:
            problems.append(f"{module} has factors of rank {kinds['A']} and {kinds['B']}")
    pattern = config.get("rank_pattern")
    said = [config.get("r"), *(pattern.values() if isinstance(pattern, dict) else ())]
    strange = {r for r in _ranks(factors) if config and r not in said}
    problems += [f"rank {r}, which {CONFIG_FILE} does not name" for r in sorted(strange)]
    if not factors:
        problems.append("none")
    found = listing(problems, 3) if problems else f"{len(ranks)} pairs"
    return _finding("factors", found, "two factors of one rank for each matrix", not problems, FORMAT)


def shapes(factors: list[Factor], models: tuple[str, ...]) -> Finding:
    """The factors must fit the matrices of one of the two bases."""
    wanted = f"those of {' or '.join(_base(model) for model in HOSTED)}"
    if models or not factors:
        found = f"those of {' or '.join(map(_base, models))}" if models else "none"
        return _finding("shapes", found, wanted, bool(models), TUTORIAL)
    takes: dict[str, list[str]] = {}  # the first factor that does not fit, and what each model would take there
    for model, config in HOSTED.items():
        factor = next(factor for factor in factors if not is_fitting(factor, config))
        shape = expected_shape(factor, config)
        odd = f"{listing([factor.name.removeprefix('base_model.model.model.')])} {brief(factor.shape)}"
        takes.setdefault(odd, []).append(
            f"{_base(model)} {'lacks it' if shape is None else f'takes {_letters(shape)}'}"
        )
    found = "; ".join(f"{odd}: {', '.join(others)}" for odd, others in takes.items())
    return _finding("shapes", found, wanted, False, TUTORIAL)


def _base(model: str) -> str:
    """Name of a hosted model's base: @cf/google/gemma-2b-it-lora runs gemma-2b-it."""
    return model.rpartition("/")[2].removesuffix("-lora")


def _letters(shape: tuple[int | None, ...]) -> str:
    return "(" + ", ".join("R" if n is None else str(n) for n in shape) + ("," if len(shape) == 1 else "") + ")"


def modules(factors: list[Factor]) -> list[Finding]:
    """Which kinds of matrices are changed; the guide shows two, and does not say that there are no others."""
    found = sorted({factor.module.rpartition(".")[2] for factor in factors})
    if not found:
        return []
    verdict: Verdict = "accepted" if set(found) <= _SHOWN_MODULES else "unknown"
    return [_finding("modules", listing(found), "q_proj and v_proj are shown", verdict, UPLOAD)]


def other_tensors(tensors: Mapping[str, StoredTensor]) -> list[Finding]:
    """Tensors that are no low-rank factors, and stored formats that PEFT does not write of its own."""
    named = {factor.name for factor in factors_of(tensors)}
    others = [name for name in tensors if name not in named]
    formats = sorted({tensor.dtype for tensor in tensors.values()} - {"F32", "F16", "BF16"})
    found = []
    if others:
        found.append(_finding("other tensors", listing(others, 3), "nothing is said", "unknown", SILENT))
    if formats:
        found.append(_finding("stored formats", ", ".join(formats), "nothing is said", "unknown", SILENT))
    return found
