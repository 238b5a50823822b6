"""Check that an uploaded adapter can be used: the hosted rules, then reading it, fitting it and running it.

Either file may come first. Alone it is checked by the rules that concern it; together the two must make an adapter that
fits, and with which the model still computes finite numbers. The order matters for safety: the hosted rules trust
nothing, and only files that pass them are read further.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from refgemma.errors import InputError
from refgemma.gemma import Gemma
from refgemma.lora import Adapter, check_hosted, read
from refgemma.lora.adapter_config import CONFIG_FILE, WEIGHTS_FILE, rank_and_alpha, read_adapter_config
from refgemma.lora.fit import fit
from refgemma.model import forward
from refgemma.numerics import to_host
from refgemma.workers_ai.errors import AiError
from refgemma.workers_ai.schema import short

FILES = (CONFIG_FILE, WEIGHTS_FILE)

# Fields that PEFT reads as regular expressions. Nested repetitions can keep Python busy for years and many alternatives
# for minutes, so uploaded ones may hold names only, with dots (escaped or not) and anchors. Gemma 7B has 196 matrices.
_EXPRESSIONS = ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern")
_PLAIN = re.compile(r"\^?[\w-]+(\\?\.[\w-]+)*\$?", re.ASCII)
_LARGEST = float(np.finfo(np.float32).max)
_LONGEST_NAME, _MOST_NAMES = 500, 200
_PROBE = "What is the capital of Nepal?"


def check(folder: Path, gemma: Gemma | None, model: str) -> None:
    """Refuse an adapter that cannot be used.

    The hosted rules demand the shapes of Google's models. Another model may answer under a hosted name here; an adapter
    that fits it is accepted as well.
    """
    present = [name for name in FILES if (folder / name).exists()]
    findings = [finding for finding in check_hosted(folder).findings if finding.verdict == "refused"]
    if len(present) < 2:
        findings = [finding for finding in findings if finding.rule not in ("file names", "shapes", *FILES)] + [
            finding for finding in findings if finding.rule in present
        ]
    fatal = [finding for finding in findings if finding.rule != "shapes"]
    if not fatal:
        _check_expressions(folder)
        adapter = _read(folder, complete=len(present) == 2)
        fitting = adapter is not None and gemma is not None and fits(adapter, gemma)
        fatal = [] if fitting or adapter is None else findings
        if adapter is not None and not fatal:
            _check_scale(adapter)
            if gemma is not None and fitting:
                _try(adapter, gemma)
    if fatal:
        problems = "; ".join(f"{f.rule}: {f.found}, expected {f.wanted}" for f in fatal)
        raise AiError(5006, f"{model} would not take this adapter: {problems}")


def _check_expressions(folder: Path) -> None:
    if not (folder / CONFIG_FILE).exists():
        return
    config: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_bytes())
    for field in _EXPRESSIONS:
        value = config.get(field)
        texts = [value] if isinstance(value, str) else list(value) if isinstance(value, list | dict) else []
        if len(texts) > _MOST_NAMES:
            raise AiError(5006, f"{field} holds {len(texts):,} names: expected at most {_MOST_NAMES}")
        for text in texts:
            if isinstance(text, str) and (len(text) > _LONGEST_NAME or not _PLAIN.fullmatch(text)):
                raise AiError(5006, f"{field} holds {short(text)!r}: expected names of modules, no other expressions")


def _read(folder: Path, *, complete: bool) -> Adapter | None:
    """Read the files as they will be read for use."""
    try:
        if complete:
            return read(folder)
        if (folder / CONFIG_FILE).exists():
            read_adapter_config(folder)
    except (OSError, InputError) as error:
        raise AiError(5006, f"this adapter cannot be used: {_without(folder, error)}") from None
    return None


def fits(adapter: Adapter, gemma: Gemma) -> bool:
    """Return whether an adapter fits a model."""
    try:
        fit(adapter, gemma.config)
    except InputError:
        return False
    return True


def _check_scale(adapter: Adapter) -> None:
    """Refuse a delta that may exceed float32: ``|scale| * R * max |A| * max |B|`` bounds its entries."""
    for module, parts in adapter.modules.items():
        largest = [float(np.abs(parts[name]).max(initial=0)) for name in ("lora_A", "lora_B") if name in parts]
        rank, alpha = rank_and_alpha(adapter.config, module)
        scale = abs(adapter.config.scale(rank, alpha))
        bound = math.prod((scale, rank, *largest))
        if not max(bound, scale, *largest) <= _LARGEST:
            reach = f"the change of {module} may reach {bound:.0e}"
            raise AiError(5006, f"this adapter makes numbers that overflow: {reach}")


def _try(adapter: Adapter, gemma: Gemma) -> None:
    """Refuse an adapter with which even a short question gives infinite or undefined logits."""
    try:
        with np.errstate(all="ignore"):
            changed = gemma.with_lora(adapter)
            tokens = np.array([changed.encode_prompt(_PROBE)])
            logits = forward(changed.params, changed.config, tokens, logits="last", numerics=changed.numerics)
    except InputError as error:
        raise AiError(5006, f"this adapter cannot be used: {short(str(error))}") from None
    if not np.isfinite(to_host(logits)).all():
        raise AiError(5006, "this adapter makes numbers that overflow: no token can be chosen with it")


def _without(folder: Path, error: Exception) -> str:
    """Return an error's message without the path of the temporary folder."""
    return short(str(error).replace(f"{folder}/", "").replace(str(folder), "it"))
