"""Numbers of a round by name, and medians over rounds of anything that is computed from them.

Names: ``imports.refgemma`` and ``imports.dependencies`` (seconds), and ``ENGINE.WEIGHTS.MEASURE``, such as
``refgemma.float32.decode_128`` (seconds), ``refgemma.bfloat16.memory.rss`` (bytes), and for what the machine can do
``refgemma.float32.stream`` and ``.fresh`` (bytes a second) and ``.gemm`` (operations a second).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from refgemma.bench.run import Round

Values = dict[str, float]


def values_of(told: Round) -> Values:
    """Numbers of one round."""
    values: Values = {}
    for job, lines, _ in told:
        for line in lines:
            name = ".".join(filter(None, [job.engine, job.weights, line["measure"]]))
            found: Values = {}
            if "seconds" in line:
                found[name] = statistics.median(line["seconds"])
            elif "rate" in line:
                found[name] = line["rate"]
            found |= {f"{name}.{key}": line[key] for key in ("rss", "rss_anon") if line.get(key) is not None}
            for key, value in found.items():
                values[key] = min(value, values.get(key, value))
    return values


def median_of(rounds: Sequence[Values], number: Callable[[Values], float]) -> float | None:
    """Median over the rounds of a number computed within each."""
    found = []
    for values in rounds:
        try:
            found.append(number(values))
        except KeyError:
            continue
    return statistics.median(found) if found else None
