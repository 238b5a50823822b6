"""How far a whole run has drifted, free-running, against a budget that is measured and not derived.

Rounding errors of early layers go through all later ones; no bound worth having follows that. But it can be tried: the
reference runs in float64 several times, each time with noise of rounding size added to every named tensor (the size
is the standard deviation that `refgemma.oracle.bounds.rounding` gives each operation). How far those runs scatter is how far an
honest engine may end up. A number more than so many standard deviations off is suspicious; three times that, wrong.
What was stored more narrowly than it was computed is allowed that rounding on top.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

import numpy as np

from refgemma.cache import KVCache
from refgemma.config import Config
from refgemma.errors import InputError
from refgemma.model import Params, Tap, forward, identity
from refgemma.numerics import Array, Numerics
from refgemma.oracle.bounds.arithmetic import Arithmetic, arithmetic_of, confidence, params_in
from refgemma.oracle.bounds.flow import Flow, chunks
from refgemma.oracle.bounds.slack import Known
from refgemma.oracle.diagnosis.candidate import of_chunk
from refgemma.oracle.judging.grades import Finding, grade_of, worse
from refgemma.oracle.judging.patterns import pattern
from refgemma.oracle.judging.storage import lost
from refgemma.oracle.operations import axes_of, names_of
from refgemma.oracle.traces.trace import Trace

# Fixed, so that a verdict can be repeated. Eight runs: the scatter of one position, if it is along one direction only,
# is then estimated too small by a factor of 3 once in a thousand (chi squared of 8 below 8 / 9); `WRONG` makes up for
# that. Two runs would be so far off once in ten.
SEEDS = tuple(range(8))
WRONG = 3.0

STREAM = ("embed", "layers.*.attn.residual", "layers.*[0-9].out", "final_norm", "logits")


def judge_free(
    params: Params,
    config: Config,
    theirs_logits: Array,
    tokens: Array,
    positions: Array,
    arithmetic: str | Numerics | Arithmetic,
    *,
    tap: Tap = identity,
    seeds: Sequence[int] = SEEDS,
) -> Finding:
    """Judge final logits alone. theirs_logits (B, T, V), tokens, positions (B, T)."""
    B, T = tokens.shape
    last = theirs_logits.shape in ((B, config.vocab_size), (B, 1, config.vocab_size)) and theirs_logits.ndim + T > 3
    if theirs_logits.shape != (B, T, config.vocab_size) and not last:
        want = f"({B}, {T}, {config.vocab_size}) or, for the last position alone, ({B}, {config.vocab_size})"
        raise InputError(f"their logits have shape {theirs_logits.shape}: expected {want}")
    logits = theirs_logits.reshape(B, -1, config.vocab_size)
    meta = {"last": "true"} if last else {}
    theirs = Trace({"logits": logits}, {}, tokens, positions, config, meta)
    return drift(params, config, theirs, arithmetic, names=("logits",), tap=tap, seeds=seeds)[0]


def drift(
    params: Params,
    config: Config,
    theirs: Trace,
    arithmetic: str | Numerics | Arithmetic,
    *,
    names: Sequence[str] = STREAM,
    tap: Tap = identity,
    seeds: Sequence[int] = SEEDS,
) -> list[Finding]:
    """Judge how far their tensors have drifted from the truth, each with all errors before it."""
    a = arithmetic_of(arithmetic)
    wanted = [
        name
        for name in names_of(config)
        if name in theirs.tensors and any(fnmatchcase(name, p) for p in names) and axes_of(name)[1] == "T"
    ]
    found: dict[str, Finding] = {}
    for start, name, truth, scatter in _measured(
        params_in(params, a), config, theirs.tokens, theirs.positions, a, wanted, tap, seeds
    ):
        places = theirs.positions[:, start : start + truth.shape[1]]
        value, given = of_chunk(theirs, name, slice(start, start + truth.shape[1]))
        compared = given & (places >= 0)
        if compared.any():
            stored = lost(value, theirs.dtypes.get(name, ""), a.storage)
            finding = _judge(name, value, truth, scatter, stored, compared, places, start, len(seeds))
            found[name] = worse(found.get(name), finding)
    return [found[name] for name in wanted if name in found]


def _judge(
    name: str,
    theirs: Array,
    truth: Array,
    scatter: Array,
    stored: Array | float,
    compared: Array,
    positions: Array,
    start: int,
    runs: int,
) -> Finding:
    """Finding for one tensor of one chunk; `scatter` is one standard deviation a position."""
    rest = (1,) * (truth.ndim - 2)
    times = confidence(truth.size)
    chance = np.broadcast_to(times * scatter.reshape(*scatter.shape, *rest), truth.shape)
    stored = np.nan_to_num(np.abs(stored), nan=0.0, posinf=0.0)
    likely, limit = chance + stored, WRONG * chance + stored
    where = np.broadcast_to(compared.reshape(*compared.shape, *rest), truth.shape)
    error = np.where(where, np.abs(theirs - truth), 0)
    error = np.where(np.isfinite(error), error, np.inf)
    ratios = np.where(where, error / np.maximum(limit, 1e-300), -1)
    at = np.unravel_index(int(ratios.argmax()), ratios.shape)
    ratio = float(ratios[at])
    by_chance = float(np.max(np.where(where, error / np.maximum(likely, 1e-300), 0)))
    grade = grade_of(ratio, by_chance)
    common = ""
    if grade != "inside rounding":
        common = pattern(theirs, truth, axes=axes_of(name), positions=positions, where=where, slack=likely)
    index = [int(i) for i in at]
    index[1] += start
    return Finding(
        name=name,
        grade=grade,
        ratio=ratio,
        error=float(error[at]),
        bound=float(limit[at]),
        where=tuple(index),
        value_theirs=float(theirs[at]),
        value_ours=float(truth[at]),
        pattern=common,
        reason=f"{runs} float64 runs with noise of rounding size at every tensor scatter by {scatter[at[:2]]:.2g} "
        f"at this position; {times:.1f} of these are chance, {WRONG * times:.0f} the limit"
        + ("; and stored more narrowly than that" if np.any(stored) else ""),
        likely=by_chance,
    )


def _measured(
    params: Params,
    config: Config,
    tokens: Array,
    positions: Array,
    a: Arithmetic,
    names: Sequence[str],
    tap: Tap,
    seeds: Sequence[int],
) -> Iterator[tuple[int, str, Array, Array]]:
    """Truth of each wanted tensor, and standard deviation (B, T) of perturbed runs, chunk by chunk."""
    B, T = tokens.shape
    logits = bool({"final_norm", "logits"} & set(names))
    caches = [KVCache(config, batch=B, capacity=T, dtype=np.float64) for _ in range(1 + len(seeds))]
    flows = [Flow(params, config, a) for _ in seeds]

    for start, stop in chunks(T, B * max(config.vocab_size if logits else 1, config.intermediate_size)):
        part = slice(start, stop)

        def run(tap: Tap, cache: KVCache, part: slice = part) -> None:
            forward(
                params,
                config,
                tokens[:, part],
                positions=positions[:, part],
                cache=cache,
                logits="all" if logits else "last",
                numerics=a.reference,
                tap=tap,
            )

        truth: dict[str, Array] = {}
        run(_keeping(truth, {*names, "final_norm"}, tap), caches[0])
        spread = {name: np.zeros(truth[name].shape[:2]) for name in names}  # BT
        if "logits" in names:  # the last and by far the widest: what its own rounding adds need not be tried
            last = Flow(params, config, a)
            last.goes_on_with("final_norm", Known(truth["final_norm"]))
            spread["logits"] += last.bound_of("logits", truth["logits"]).variance.mean(axis=-1)
        for seed, cache, flow in zip(seeds, caches[1:], flows, strict=True):
            flow.next_chunk(tokens[:, part], positions[:, part])
            seen: dict[str, Array] = {}
            run(_keeping(seen, set(names), _perturbing(flow, [seed, start], tap, logits)), cache)
            for name, value in seen.items():
                off = np.square(value - truth[name])
                spread[name] += off.mean(axis=tuple(range(2, off.ndim))) / len(seeds)
        for name in names:
            yield start, name, truth[name], np.sqrt(spread[name])


def _keeping(kept: dict[str, Array], names: set[str], tap: Tap) -> Tap:
    """Tap that notes some tensors as another tap left them."""

    def keep(name: str, value: Array) -> Array:
        value = tap(name, value)
        if name in names:
            kept[name] = value.copy()
        return value

    return keep


def _perturbing(flow: Flow, seed: list[int], tap: Tap, every: bool) -> Tap:
    """Tap that adds noise of rounding size to every tensor but the logits, after another tap."""

    def perturb(name: str, value: Array) -> Array:
        value = tap(name, value)
        if name == "logits" or (name == "final_norm" and not every):
            return value  # nothing comes after it
        size = np.sqrt(flow.bound_of(name, value).variance)
        rng = np.random.default_rng([*seed, zlib.crc32(name.encode())])
        value = value + rng.standard_normal(value.shape) * size
        flow.goes_on_with(name, Known(value))
        return value

    return perturb
