"""Golden files: full logits for a few prompts that others compute, as JSON lines, which users download themselves.

A line is an object with ``prompt``, ``tokens`` and ``logits``, a list of numbers per token. ``data/golden_files.json``
lists the public ones. They were computed in bfloat16 or by another engine in float32, so probabilities are compared, as
upstream does: the Kullback-Leibler divergence at each position. That misses logits that are too large where one token
is certain anyway, so the logits themselves must be close as well. Columns that only one side has belong to no token;
both sides are normalised over the others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from refgemma.errors import InputError
from refgemma.gemma import Gemma
from refgemma.numerics import Array
from refgemma.oracle.published.figures import Figure, read_json
from refgemma.oracle.published.measures import Measured, rows

MAX_KL = 0.015  # nats, where upstream does not say: its limit between bfloat16 and float32 for gemma-2b
# Of a logit; upstream's atol is 1. bfloat16 is spaced by 0.25 from 32 to 64, and 18 layers come before.
_APART, _RELATIVE = 1.0, 0.02
_REASON = "divergence as upstream, which compares with it in bfloat16; logits within 1 (upstream's as well) and 2 %"


def known_file(path: Path) -> dict[str, Any] | None:
    """The entry of a public golden file, found by its hash."""
    sha1 = _blob_sha1(path)
    entry: dict[str, Any] | None = next((e for e in read_json("golden_files.json")["files"] if e["sha1"] == sha1), None)
    return entry


def golden_figures(path: Path) -> Iterator[Figure]:
    """Lines of a golden file as figures."""
    entry = known_file(path)
    with path.open(encoding="utf-8") as file:
        number = 0
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _figure(path, number, line, entry)
        except UnicodeDecodeError:
            raise InputError(f"{path} is not UTF-8 after line {number}: expected JSON lines of golden logits") from None
    if not number:
        raise InputError(f"{path} is empty: expected JSON lines of golden logits")


def measure_golden(gemma: Gemma, figure: Figure) -> Measured:
    """Compare one line with the model."""
    published: Array = figure.fields["logits"]
    computed = np.concatenate(list(rows(gemma, figure.fields["ids"])))
    width = min(computed.shape[1], published.shape[1])
    one, other = _log_probs(published[:, :width]), _log_probs(computed[:, :width])
    with np.errstate(invalid="ignore"):
        divergence = np.sum(np.exp(one) * (one - other), axis=-1)
    apart = np.abs(published[:, :width] - computed[:, :width])
    same = int(np.count_nonzero(one.argmax(axis=-1) == other.argmax(axis=-1)))
    worst = float(divergence.max())
    words = f"KL {worst:.2g}, logits {apart.max():.2g} apart, {same} of {len(one)} best tokens agree"
    problem = None
    if not worst <= figure.fields["max_kl"]:
        at = int(np.argmax(np.where(np.isnan(divergence), np.inf, divergence)))
        problem = f"KL {worst:.3g} nats at position {at} is above {figure.fields['max_kl']}; {words}"
    elif not np.all(apart <= _APART + _RELATIVE * np.abs(published[:, :width])):
        problem = f"logits are up to {apart.max():.3g} apart, although the probabilities agree; {words}"
    shown = f"{published.shape[0]} x {published.shape[1]} logits"
    tolerance = f"KL <= {figure.fields['max_kl']}, ± {_APART:g} and {_RELATIVE:g} of it"
    return Measured(shown, words, tolerance, problem, divergence.tolist())


def _figure(path: Path, number: int, line: str, entry: dict[str, Any] | None) -> Figure:
    wanted = 'expected {"prompt": text, "tokens": [ids], "logits": [a list of numbers per token]}'
    try:
        held = json.loads(line)
        ids, logits = [int(i) for i in held["tokens"]], np.array(held["logits"], dtype=np.float32)
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise InputError(f"{path}, line {number}: {str(error) or type(error).__name__:.60}: {wanted}") from None
    if logits.ndim != 2 or not logits.size or len(logits) != len(ids):
        raise InputError(f"{path}, line {number}: {len(ids)} tokens, logits of shape {logits.shape}: {wanted}")
    max_kl = entry.get("max_kl") if entry else None
    unsaid = "" if max_kl else "; upstream states no divergence for this file, so the one for gemma-2b is used"
    return Figure(
        id=f"{path.name}/{held.get('prompt', number)!s:.40}",
        family=entry["family"] if entry else "",
        models=(entry["model"],) if entry else (),
        kind="golden",
        url=entry["url"] if entry else str(path),
        note=entry.get("note", "") if entry else "its hash matches no golden file on record",
        trust="high" if entry else "unknown",
        computed_in="bfloat16" if entry and entry["family"] == "gemma1" else "unknown",
        reason=_REASON + unsaid,
        fields={"ids": ids, "logits": logits, "max_kl": max_kl or MAX_KL},
    )


def _log_probs(logits: Array) -> Array:
    wide = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):
        wide -= wide.max(axis=-1, keepdims=True)
        log_probs: Array = wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return log_probs


def _blob_sha1(path: Path) -> str:
    """Hash that git gives a file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist or is not a file: expected JSON lines of golden logits")
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
