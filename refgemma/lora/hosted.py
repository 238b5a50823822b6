"""Would the hosted Gemma models accept an adapter? Each documented rule of Workers AI, checked by one function.

The files may come from anyone. Only their JSON and the header of the safetensors file are read, and any fault is a
finding, not an exception. Where the documentation is silent the verdict is "unknown".

References
----------
https://developers.cloudflare.com/workers-ai/fine-tunes/loras/ as it stood in 2024, where it names the two Gemma models
(rule "page"), and the same guide later, under features/, where its list of models names others (rule "later").
"""

from __future__ import annotations

import functools
import json
import re
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from refgemma.checkpoint.names import tensors_of
from refgemma.config import SIZES, Config
from refgemma.errors import InputError, listed
from refgemma.files.safetensors import StoredTensor, read_safetensors
from refgemma.lora.adapter_config import CONFIG_FILE, WEIGHTS_FILE

Verdict: TypeAlias = Literal["accepted", "refused", "unknown"]

# hosted model -> the shape of its base; the bases are google/gemma-2b-it and google/gemma-7b-it
HOSTED = {"@cf/google/gemma-2b-it-lora": SIZES["gemma-2b"], "@cf/google/gemma-7b-it-lora": SIZES["gemma-7b"]}

_LONGEST_CONFIG = 1_000_000  # bytes; PEFT writes about 1,200
_LONGEST_HEADER = 4_000_000  # bytes; every matrix of the larger model with its DoRA magnitude takes 100,000

_SHORT = reprlib.Repr()  # also safe on nesting so deep that repr() would run out of stack
_SHORT.maxstring = _SHORT.maxother = 60
_SHORT.maxlong = 30

# version of the guide -> largest rank, and the size in MB that a file must stay below
LIMITS = {"page": (8, 100), "later": (32, 300)}

GUIDE = "guide, Limitations"
UPLOAD = "guide, Uploading LoRA adapters"
TUTORIAL = "tutorial, fine-tune models with AutoTrain"
FORMAT = "format of the file"
SILENT = "undocumented"

# Fields that do not change what a finished adapter computes, or that have a rule of their own.
_NO_OPTION = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "loftq_config", "lora_alpha", "lora_dropout",
    "megatron_core", "model_type", "parent_library", "peft_type", "peft_version", "qalora_group_size", "r", "revision",
    "runtime_config", "target_modules", "task_type", "use_qalora",
}  # fmt: skip
_PLAIN = {"bias": ("none",), "init_lora_weights": (True, "gaussian")}  # values of other fields that plain LoRA has
_OF_A_NARROW_BASE = ("4bit", "8bit", "int4", "int8", "nf4", "fp8", "bnb", "gptq", "awq", "gguf")
_FACTOR = re.compile(
    r"base_model\.model\.(?P<module>\w+(?:\.\w+)*?)\.lora_(?:embedding_)?(?P<kind>A|B|magnitude_vector)"
    r"(?!\.bias\Z)(?:\.\w+?)?(?:\.weight)?"  # PEFT leaves the adapter's name out, other programs may not
)
_SHOWN_MODULES = {"q_proj", "v_proj"}  # in the sample of the guide
_MOST_OPTIONS = 20


class Factor(NamedTuple):
    """One tensor of a low-rank change."""

    name: str
    module: str
    kind: str  # "A", "B" or "magnitude"
    shape: tuple[int, ...]  # (R, in), (out, R) or (out,); an embedding counts as a matrix from V to D


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one rule found."""

    rule: str  # its subject
    found: str  # in the adapter
    wanted: str  # by the rule
    verdict: Verdict  # "unknown" where the documentation does not say
    source: str  # of the rule: the guide, its tutorial, the format of the file itself, or "undocumented"


@dataclass(frozen=True, kw_only=True)
class HostedReport:
    """Whether the hosted models would accept an adapter, rule by rule."""

    folder: Path  # the adapter
    rule: str  # which version of the guide was applied
    findings: tuple[Finding, ...]  # in the order of checking
    models: tuple[str, ...]  # the hosted model whose shapes it fits; empty if neither

    @property
    def verdict(self) -> Verdict:
        """The worst of the findings: "refused", else "unknown", else "accepted"."""
        verdicts = {finding.verdict for finding in self.findings}
        return "refused" if "refused" in verdicts else "unknown" if "unknown" in verdicts else "accepted"

    @property
    def accepted(self) -> bool:
        """Whether it keeps every rule and uses nothing that the documentation is silent about."""
        return self.verdict == "accepted"


def check_hosted(folder: str | Path, rule: str = "page") -> HostedReport:
    """Check an adapter against the documented rules of the hosted models.

    Parameters
    ----------
    folder : str or Path
        Holds ``adapter_config.json`` and ``adapter_model.safetensors``.
    rule : {"page", "later"}, default "page"
        Rank at most 8 and less than 100 MB, or rank at most 32 and less than 300 MB.

    Returns
    -------
    HostedReport
        One finding per rule. A missing or damaged file is a finding as well, and rules about its content are then left
        out.

    Raises
    ------
    FileNotFoundError
        If there is no such folder.
    ValueError
        If `rule` is unknown.

    Notes
    -----
    Undocumented, and so not part of the verdict: whether the service checks these rules on upload or on use, and what
    it does with an adapter that breaks one. The limit on adapters per account cannot be checked from a folder.
    """
    if rule not in LIMITS:
        raise InputError(f"rule is {rule!r:.60}: expected {' or '.join(map(repr, LIMITS))}")
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: expected one that holds {CONFIG_FILE} and {WEIGHTS_FILE}")
    largest_rank, megabytes = LIMITS[rule]
    config, config_error = _read_json_object(folder / CONFIG_FILE)
    tensors, tensors_error = _read_adapter_header(folder / WEIGHTS_FILE)
    factors = _factors_of(tensors or {})
    models = tuple(
        model for model, base in HOSTED.items() if factors and all(_is_fitting(factor, base) for factor in factors)
    )

    findings = [_file_names(folder), _readable(CONFIG_FILE, config_error), _readable(WEIGHTS_FILE, tensors_error)]
    findings += _size(folder / WEIGHTS_FILE, megabytes)
    if config is not None:
        findings += [
            _field_is(config, "peft_type", "LORA"),
            _field_is(config, "task_type", "CAUSAL_LM"),
            _field_is(config, "model_type", "gemma"),
            _rank(config, factors, largest_rank),
            _base_model(config, models),
            _unquantised(config),
            *_options(config),
        ]
    if tensors is not None:
        findings += [
            _pairs(config or {}, factors),
            _shapes(factors, models),
            *_modules(factors),
            *_other_tensors(tensors),
        ]
    return HostedReport(folder=folder, rule=rule, findings=tuple(findings), models=models)


def _finding(rule: str, found: str, wanted: str, verdict: Verdict | bool, source: str) -> Finding:
    if isinstance(verdict, bool):
        verdict = "accepted" if verdict else "refused"
    return Finding(rule=rule, found=found, wanted=wanted, verdict=verdict, source=source)


def _file_names(folder: Path) -> Finding:
    """Both files must have exactly these names; others are never uploaded."""
    there = {entry.name for entry in folder.iterdir()}
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if name not in there]
    found = "both" if not missing else f"no {' and no '.join(missing)}; {_listing(sorted(there)) or 'nothing'}"
    return _finding("file names", found, f"{CONFIG_FILE} and {WEIGHTS_FILE}", not missing, GUIDE)


def _readable(name: str, error: str) -> Finding:
    """A file must be what its name says; `error` is its reader's message."""
    return _finding(name, error or "readable", "a file as PEFT writes it", not error, FORMAT)


def _size(path: Path, megabytes: int) -> list[Finding]:
    """The weights must be smaller than a size in MB; the guide does not say whether one is 10^6 or 2^20 bytes."""
    if not path.is_file():
        return []
    found = path.stat().st_size
    verdict: Verdict = (
        "accepted" if found < megabytes * 10**6 else "unknown" if found < megabytes * 2**20 else "refused"
    )
    return [_finding("size", f"{found:,} bytes", f"less than {megabytes} MB", verdict, GUIDE)]


def _field_is(config: Mapping[str, Any], name: str, wanted: str) -> Finding:
    """A field of the configuration must have one value."""
    found = _brief(config[name]) if name in config else "none given"
    source = FORMAT if name == "peft_type" else UPLOAD
    return _finding(name, found, repr(wanted), config.get(name) == wanted, source)


def _rank(config: Mapping[str, Any], factors: list[Factor], largest: int) -> Finding:
    """No rank may be larger: not `r`, not one in `rank_pattern`, not that of any factor."""
    pattern = config.get("rank_pattern") or {}
    said = [config.get("r"), *(pattern.values() if isinstance(pattern, dict) else [pattern])]
    wrong = [value for value in said if not _is_rank(value)]
    ranks = {value for value in said if _is_rank(value)} | set(_ranks(factors))
    found = f"{_brief(wrong[0])}, not a rank" if wrong else str(max(ranks))
    if not wrong and len(ranks) > 1:
        found += f" (and {', '.join(map(str, sorted(ranks)[:-1][:8]))})"
    return _finding("rank", found, f"at most {largest}", not wrong and max(ranks) <= largest, GUIDE)


def _is_rank(value: Any) -> bool:
    return type(value) is int and value >= 1


def _ranks(factors: list[Factor]) -> list[int]:
    return [f.shape[0 if f.kind == "A" else -1] for f in factors if f.kind != "magnitude" and f.shape]


def _base_model(config: Mapping[str, Any], models: tuple[str, ...]) -> Finding:
    """The bases named are Google's two instruction-tuned models; nothing is said of adapters for another."""
    found = config.get("base_model_name_or_path")
    name = found.rstrip("/").rpartition("/")[2] if isinstance(found, str) else ""
    wanted = [f"google/{_base(model)}" for model in models or HOSTED]
    verdict: Verdict = "accepted" if f"google/{name}" in wanted else "unknown"
    return _finding("base model", _brief(found) if found else "none given", " or ".join(wanted), verdict, TUTORIAL)


def _unquantised(config: Mapping[str, Any]) -> Finding:
    """The base must not be quantised, as far as the configuration shows."""
    signs = [name for name in ("use_qalora", "loftq_config") if config.get(name)]
    if str(config.get("init_lora_weights"))[:9].lower() == "loftq":
        signs.append("init_lora_weights")
    base = config.get("base_model_name_or_path")
    signs += [word for word in _OF_A_NARROW_BASE if isinstance(base, str) and word in base.lower()]
    found = f"{', '.join(signs)} in {CONFIG_FILE}" if signs else "no sign of a quantised base"
    return _finding("quantisation", found, "a base that is not quantised", not signs, GUIDE)


def _options(config: Mapping[str, Any]) -> list[Finding]:
    """The guide mentions nothing beyond plain LoRA: not DoRA, rsLoRA, trained biases or other options of PEFT."""
    used = [
        name
        for name, value in config.items()
        if name not in _NO_OPTION and value not in (None, False, [], {}, "", *_PLAIN.get(name, ()))
    ]
    if not used:
        return [_finding("options", "none beyond plain LoRA", "nothing is said of others", True, SILENT)]
    found = [
        _finding(_listing([name]), _brief(config[name]), "nothing is said", "unknown", SILENT)
        for name in used[:_MOST_OPTIONS]
    ]
    if len(used) > _MOST_OPTIONS:
        found.append(_finding("options", f"{len(used) - _MOST_OPTIONS} more", "nothing is said", "unknown", SILENT))
    return found


def _pairs(config: Mapping[str, Any], factors: list[Factor]) -> Finding:
    """Each changed matrix must have two factors of the same rank, one that the configuration names."""
    ranks: dict[str, dict[str, int]] = {}
    problems = []
    for f in factors:
        kinds = ranks.setdefault(f.module, {})
        if f.kind in kinds:
            problems.append(f"{f.name} is a second factor {f.kind} of its matrix")
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
    found = _listing(problems, 3) if problems else f"{len(ranks)} pairs"
    return _finding("factors", found, "two factors of one rank for each matrix", not problems, FORMAT)


def _shapes(factors: list[Factor], models: tuple[str, ...]) -> Finding:
    """The factors must fit the matrices of one of the two bases."""
    wanted = f"those of {' or '.join(_base(model) for model in HOSTED)}"
    if models or not factors:
        found = f"those of {' or '.join(map(_base, models))}" if models else "none"
        return _finding("shapes", found, wanted, bool(models), TUTORIAL)
    takes: dict[str, list[str]] = {}  # the first factor that does not fit -> what each model expects there
    for model, config in HOSTED.items():
        factor = next(factor for factor in factors if not _is_fitting(factor, config))
        shape = _expected_shape(factor, config)
        odd = f"{_listing([factor.name.removeprefix('base_model.model.model.')])} {_brief(factor.shape)}"
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


def _modules(factors: list[Factor]) -> list[Finding]:
    """The guide shows two kinds of changed matrices, and does not say whether others are accepted."""
    found = sorted({factor.module.rpartition(".")[2] for factor in factors})
    if not found:
        return []
    verdict: Verdict = "accepted" if set(found) <= _SHOWN_MODULES else "unknown"
    return [_finding("modules", _listing(found), "q_proj and v_proj are shown", verdict, UPLOAD)]


def _other_tensors(tensors: Mapping[str, StoredTensor]) -> list[Finding]:
    """Tensors that are not low-rank factors, and formats that PEFT does not write by default."""
    named = {factor.name for factor in _factors_of(tensors)}
    others = [name for name in tensors if name not in named]
    formats = sorted({tensor.dtype for tensor in tensors.values()} - {"F32", "F16", "BF16"})
    found = []
    if others:
        found.append(_finding("other tensors", _listing(others, 3), "nothing is said", "unknown", SILENT))
    if formats:
        found.append(_finding("stored formats", ", ".join(formats), "nothing is said", "unknown", SILENT))
    return found


# ---- the files, read without trusting them, and the shapes they hold


def _brief(value: Any) -> str:
    """A value of an untrusted file, short and on one line."""
    return _SHORT.repr(value)


def _listing(values: Iterable[str], most: int = 8) -> str:
    """The first few names, and the number of the others."""
    return listed(list(values), most, lambda name: name[:80] if name.isprintable() else _brief(name))


def _read_json_object(path: Path) -> tuple[dict[str, Any] | None, str]:
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


def _read_adapter_header(path: Path) -> tuple[dict[str, StoredTensor] | None, str]:
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


def _factors_of(tensors: Mapping[str, StoredTensor]) -> list[Factor]:
    """The tensors that belong to low-rank changes."""
    found = [(_FACTOR.fullmatch(name), tensor) for name, tensor in tensors.items()]
    return [
        Factor(tensor.name, match["module"], match["kind"].removesuffix("_vector"), tensor.shape)
        for match, tensor in found
        if match
    ]


def _expected_shape(factor: Factor, config: Config) -> tuple[int | None, ...] | None:
    """Shape that a factor must have, with None for the rank; None if the model has no such matrix."""
    if (sizes := _widths(config).get(factor.module)) is None:
        return None
    shape_of: dict[str, tuple[int | None, ...]] = {"A": (None, sizes[0]), "B": (sizes[1], None), "magnitude": sizes[1:]}
    return shape_of[factor.kind]


def _is_fitting(factor: Factor, config: Config) -> bool:
    """Whether the shape of a factor fits a model."""
    wanted = _expected_shape(factor, config)
    return (
        wanted is not None
        and len(wanted) == len(factor.shape)
        and all(want in (None, found) for want, found in zip(wanted, factor.shape, strict=True))
    )


@functools.cache
def _widths(config: Config) -> dict[str, tuple[int, ...]]:
    """Input and output width of each matrix, by its name in transformers."""
    tensors = tensors_of(replace(config, tie_word_embeddings=False))
    shapes = {tensor.name.removesuffix(".weight"): tensor.shape for tensor in tensors if len(tensor.shape) == 2}
    return {module: shape if module == "model.embed_tokens" else shape[::-1] for module, shape in shapes.items()}
