"""What the project wants of its speed and memory, each as a number of one round.

The bars were set for the shape of gemma-2b on four cores; those of the small model for the shape of the shipped one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from refgemma.bench import plan
from refgemma.bench.counts import BYTES, bytes_read, cache_bytes, operations, weights_read
from refgemma.bench.figures import Values, median_of
from refgemma.config import Config


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar."""

    what: str  # what is measured, with its unit
    bar: float | None = None  # what it must reach; None where it is only to be told
    aim: float | None = None  # what it might reach one day
    at_least: bool = True  # whether more is better
    number: Callable[[Values], float]  # from the values of a round; KeyError where one of them is missing

    def reached(self, measured: float | None) -> bool | None:
        """Whether a number reaches the bar."""
        if measured is None or self.bar is None:
            return None
        return measured >= self.bar if self.at_least else measured <= self.bar


def bars(config: Config, weights: Sequence[str], *, tiny: bool = False) -> Iterator[Bar]:
    """List the bars."""
    yield Bar(
        what="import refgemma / import its dependencies",
        bar=1.5,
        at_least=False,
        number=lambda v: v["imports.refgemma"] / v["imports.dependencies"],
    )
    if tiny:
        if "float32" in weights:
            yield Bar(
                what="float32 decode, time outside products / inside",
                bar=3,
                at_least=False,
                number=lambda v: v["refgemma.float32.beside.decode"] / v["refgemma.float32.beside.products"] - 1,
            )
        return
    if "float32" in weights:
        yield from _float32(config)
    if "bfloat16" in weights:
        yield from _bfloat16(config)
    for form in weights:
        yield from _either(config, form)


def verdicts(wanted: Sequence[Bar], rounds: Sequence[Values]) -> list[dict[str, Any]]:
    """Hold measurements against bars."""
    found: list[dict[str, Any]] = []
    for bar in wanted:
        measured = median_of(rounds, bar.number)
        found.append(
            {
                "what": bar.what,
                "measured": measured,
                "bar": bar.bar,
                "aim": bar.aim,
                "at_least": bar.at_least,
                "reached": bar.reached(measured),
            }
        )
    return found


def _float32(config: Config) -> Iterator[Bar]:
    read = bytes_read(config, "float32", context=plan.NEAR)
    work = operations(config, tokens=plan.SHORT)
    yield Bar(
        what="float32 decode / gemv stream",
        bar=0.8,
        number=lambda v: read / v["refgemma.float32.beside.decode"] / v["refgemma.float32.stream"],
    )
    yield Bar(
        what="float32 decode / its matrix products alone",
        number=lambda v: v["refgemma.float32.beside.products"] / v["refgemma.float32.beside.decode"],
    )
    yield Bar(what="float32 decode / transformers", bar=2, aim=2.5, number=_faster("float32", "decode_128"))
    yield Bar(
        what="float32 prefill of 128 / gemm rate",
        bar=0.75,
        number=lambda v: work / v["refgemma.float32.beside.prefill"] / v["refgemma.float32.gemm"],
    )
    yield Bar(what="float32 prefill of 128 / transformers", bar=1.3, number=_faster("float32", "prefill_128"))
    yield Bar(what="float32 load / transformers", bar=3, number=_faster("float32", "load"))
    wide = BYTES["float32"] * config.num_parameters
    yield Bar(
        what="float32 load / filling as much new memory",
        number=lambda v: wide / v["refgemma.float32.fresh"] / v["refgemma.float32.load"],
    )


def _bfloat16(config: Config) -> Iterator[Bar]:
    file = BYTES["bfloat16"] * config.num_parameters
    read = BYTES["bfloat16"] * weights_read(config)
    yield Bar(
        what="bfloat16 decode / bare tile loop",
        bar=0.85,
        number=lambda v: read / v["refgemma.bfloat16.beside.decode"] / v["refgemma.bfloat16.stream"],
    )
    yield Bar(what="bfloat16 decode / transformers bfloat16", aim=1, number=_faster("bfloat16", "decode_128"))
    yield Bar(
        what="bfloat16 prefill of 128 / our float32",
        bar=0.75,
        number=lambda v: v["refgemma.float32.prefill_128"] / v["refgemma.bfloat16.prefill_128"],
    )
    yield Bar(
        what="bfloat16 resident memory beyond the file, GB",
        bar=0.8,
        at_least=False,
        number=lambda v: (v["refgemma.bfloat16.memory.rss"] - file) / 1e9,
    )
    yield Bar(
        what="bfloat16 first token beyond 1.5 steps, seconds",
        bar=0.5,
        at_least=False,
        number=lambda v: v["refgemma.bfloat16.first_token"] - 1.5 * v["refgemma.bfloat16.decode_128"],
    )


def _either(config: Config, form: str) -> Iterator[Bar]:
    ours = f"refgemma.{form}"
    # Weights in float32 are arrays of our own, and the file that they came from may leave memory; bfloat16 is the file.
    resident = f"{ours}.memory_long.{'rss' if form == 'bfloat16' else 'rss_anon'}"
    expected = BYTES[form] * config.num_parameters + cache_bytes(config, config.max_positions)
    yield Bar(
        what=f"{form} step of {plan.ROWS} rows / of one",
        bar=4,
        aim=2.5,
        at_least=False,
        number=lambda v: v[f"{ours}.beside.decode_8_rows"] / v[f"{ours}.beside.decode"],
    )
    yield Bar(
        what=f"{form} memory at {config.max_positions} tokens beyond weights and cache, GB",
        bar=1,
        at_least=False,
        number=lambda v: (v[resident] - expected) / 1e9,
    )


def _faster(form: str, measure: str) -> Callable[[Values], float]:
    """How many times as fast as transformers we are."""
    return lambda v: v[f"transformers.{form}.{measure}"] / v[f"refgemma.{form}.{measure}"]
