"""Would an uploaded adapter run? The hosted rules, then everything that reading it to use it demands.

Either file may come first. Alone it is held against the rules that concern it; together they must make an adapter that
fits. The order matters for safety: only what the hosted rules have looked at, which trust nothing, is read further.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from refgemma.gemma import Gemma
from refgemma.lora import check_hosted, fit, read
from refgemma.lora.adapter_config import CONFIG_FILE, WEIGHTS_FILE, read_adapter_config
from refgemma.workers_ai.errors import AiError
from refgemma.workers_ai.schema import short

FILES = (CONFIG_FILE, WEIGHTS_FILE)

# Fields that PEFT takes for regular expressions. One with nested repetitions can keep Python busy for years, so those
# of a stranger may hold names only, with dots (escaped or not) and anchors.
_EXPRESSIONS = ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern")
_PLAIN = re.compile(r"[\w.^$\\|-]{0,500}", re.ASCII)


def check(folder: Path, gemma: Gemma | None, model: str) -> None:
    """Refuse what could not be run.

    Parameters
    ----------
    folder : Path
        Holds one of the two files, or both.
    gemma : Gemma or None
        What answers for the hosted model here.
    model : str
        The hosted model.

    Raises
    ------
    AiError
        5006, with every rule that is broken.

    Notes
    -----
    The hosted rules want the shapes of Google's models. Here another model may answer under a hosted name; an adapter
    that fits that one is taken, too.
    """
    there = [name for name in FILES if (folder / name).exists()]
    findings = [finding for finding in check_hosted(folder).findings if finding.verdict == "refused"]
    if len(there) < 2:
        findings = [finding for finding in findings if finding.rule not in ("file names", "shapes", *FILES)] + [
            finding for finding in findings if finding.rule in there
        ]
    fatal = [finding for finding in findings if finding.rule != "shapes"]
    if not fatal:
        _check_expressions(folder)
        wrong_shapes = _read(folder, gemma if len(there) == 2 else None, complete=len(there) == 2)
        fatal = [finding for finding in findings if wrong_shapes]
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
        for text in texts:
            if isinstance(text, str) and not _PLAIN.fullmatch(text):
                raise AiError(5006, f"{field} holds {short(text)!r}: expected names of modules, no other expressions")


def _read(folder: Path, gemma: Gemma | None, *, complete: bool) -> bool:
    """Read what is there as it will be read to be used; tell whether it does not fit the model."""
    try:
        if not complete:
            if (folder / CONFIG_FILE).exists():
                read_adapter_config(folder)
            return False
        adapter = read(folder)
    except (OSError, ValueError) as error:
        raise AiError(5006, f"this adapter cannot be used: {_without(folder, error)}") from None
    try:
        fit(adapter, gemma.config) if gemma else None
    except ValueError:
        return True
    return False


def _without(folder: Path, error: Exception) -> str:
    """What an error says, without where the file lay."""
    return short(str(error).replace(f"{folder}/", "").replace(str(folder), "it"))
