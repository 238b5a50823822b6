"""How far a whole run has drifted, reference and engine each by itself, against a budget that is measured.

Rounding errors of early layers pass through all later ones; no useful bound can be derived for that. But it can be
measured: the reference runs in float64 several times, each time with noise of rounding size added to every named tensor
(the standard deviation that the bound of each operation gives). How far those runs scatter is how far an honest engine
may end up. What chance explains is a number of these standard deviations; beyond that a number is suspicious, beyond
`DRIFTED` times that, wrong. Numbers stored more narrowly than they were computed are allowed that rounding on top.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

import numpy as np

from refgemma.cache import KVCache
from refgemma.config import Config
from refgemma.errors import InputError
from refgemma.model import Tap, forward, identity
from refgemma.numerics import Array, Numerics
from refgemma.oracle.bounds.arithmetic import Arithmetic, arithmetic_of, confidence, params_in, storage_slack
from refgemma.oracle.bounds.flow import Flow, chunks
from refgemma.oracle.bounds.slack import Known
from refgemma.oracle.judging.grades import Finding, grade_of, worse
from refgemma.oracle.judging.patterns import pattern
from refgemma.oracle.operations import axes_of, names_of
from refgemma.oracle.thresholds import DRIFTED, SEEDS
from refgemma.oracle.traces.trace import Trace, of_chunk
from refgemma.params import Params

STREAM = ("embed", "layers.*.attn.residual", "layers.*[0-9].out", "final_norm", "logits")


def judge_free(
    params: Params,
    config: Config,
    logits: Array,
    tokens: Array,
    positions: Array,
    arithmetic: str | Numerics | Arithmetic,
    *,
    tap: Tap = identity,
    seeds: Sequence[int] = SEEDS,
) -> Finding:
    """Judge final logits alone, (B, T, V) or, of the last position, (B, V)."""
    B, T = tokens.shape
    V = config.vocab_size
    last = logits.shape in ((B, V), (B, 1, V)) and logits.ndim + T > 3
    if logits.shape != (B, T, V) and not last:
        raise InputError(
            f"the candidate's logits have shape {logits.shape}: expected ({B}, {T}, {V}) or, for the last position "
            f"alone, ({B}, {V})"
        )
    meta = {"last": "true"} if last else {}
    trace = Trace({"logits": logits.reshape(B, -1, V)}, {}, tokens, positions, config, meta)
    return drift(params, config, trace, arithmetic, names=("logits",), tap=tap, seeds=seeds)[0]


def drift(
    params: Params,
    config: Config,
    trace: Trace,
    arithmetic: str | Numerics | Arithmetic,
    *,
    names: Sequence[str] = STREAM,
    tap: Tap = identity,
    seeds: Sequence[int] = SEEDS,
) -> list[Finding]:
    """Judge how far the candidate's tensors have drifted from the truth, each with all errors before it."""
    a = arithmetic_of(arithmetic)
    wanted = [
        name
        for name in names_of(config, params)
        if name in trace.tensors and any(fnmatchcase(name, p) for p in names) and axes_of(name)[1] == "T"
    ]
    found: dict[str, Finding] = {}
    for start, name, truth, scatter in _measured(
        params_in(params, a), config, trace.tokens, trace.positions, a, wanted, tap, seeds
    ):
        positions = trace.positions[:, start : start + truth.shape[1]]
        value, given = of_chunk(trace, name, slice(start, start + truth.shape[1]))
        compared = given & (positions >= 0)
        if compared.any():
            stored = storage_slack(value, trace.dtypes.get(name, ""), a.storage)
            finding = _judge(name, value, truth, scatter, stored, compared, positions, start, len(seeds))
            found[name] = worse(found.get(name), finding)
    return [found[name] for name in wanted if name in found]


def _judge(
    name: str,
    value: Array,
    truth: Array,
    scatter: Array,  # BT, one standard deviation
    stored: Array | float,
    compared: Array,
    positions: Array,
    start: int,
    runs: int,
) -> Finding:
    """Finding for one tensor of one chunk."""
    rest = (1,) * (truth.ndim - 2)
    times = confidence(truth.size)
    chance = np.broadcast_to(times * scatter.reshape(*scatter.shape, *rest), truth.shape)
    stored = np.nan_to_num(np.abs(stored), nan=0.0, posinf=0.0)
    likely, limit = chance + stored, DRIFTED * chance + stored
    where = np.broadcast_to(compared.reshape(*compared.shape, *rest), truth.shape)
    error = np.where(where, np.abs(value - truth), 0)
    error = np.where(np.isfinite(error), error, np.inf)
    ratios = np.where(where, error / np.maximum(limit, 1e-300), -1)
    at = np.unravel_index(int(ratios.argmax()), ratios.shape)
    ratio = float(ratios[at])
    by_chance = float(np.max(np.where(where, error / np.maximum(likely, 1e-300), 0)))
    grade = grade_of(ratio, by_chance)
    common = ""
    if grade != "inside rounding":
        common = pattern(value, truth, axes=axes_of(name), positions=positions, where=where, slack=likely)
    index = [int(i) for i in at]
    index[1] += start
    return Finding(
        name=name,
        grade=grade,
        ratio=ratio,
        error=float(error[at]),
        bound=float(limit[at]),
        where=tuple(index),
        value_candidate=float(value[at]),
        value_reference=float(truth[at]),
        pattern=common,
        reason=f"{runs} float64 runs with noise of rounding size at every tensor scatter by {scatter[at[:2]]:.2g} "
        f"at this position; {times:.1f} of these are chance, {DRIFTED * times:.0f} the limit"
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

    for start, stop in chunks(config, B, T, logits=logits):
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
        if "logits" in names:  # the last and by far the widest: what its own rounding adds need not be measured
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
    """Tap that keeps copies of some tensors, after another tap."""

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
