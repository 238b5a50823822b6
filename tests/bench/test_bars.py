"""Medians over rounds, and bars held against numbers of which the answer is known."""

import pytest

from refgemma.bench.bars import Bar, bars, verdicts
from refgemma.bench.figures import median_of, values_of
from refgemma.bench.run import Job, Told
from refgemma.config import SIZES


def test_values_are_medians_and_of_several_ways_the_best():
    told = [
        Told(Job("imports"), [{"measure": "refgemma", "seconds": [0.5]}]),
        Told(
            Job("refgemma", "float32"),
            [
                {"measure": "about", "threads": 4},
                {"measure": "load", "seconds": [3.0, 1.0, 2.5]},
                {"measure": "stream", "rate": 5e9},
            ],
        ),
        Told(
            Job("transformers", "bfloat16"),
            [
                {"measure": "decode_128", "variant": "sdpa", "seconds": [4.0, 6.0]},
                {"measure": "memory", "variant": "sdpa", "rss": 70, "rss_anon": None},
                {"measure": "decode_128", "variant": "eager", "seconds": [7.0]},
                {"measure": "memory", "variant": "eager", "rss": 90, "rss_anon": None},
            ],
        ),
    ]
    assert values_of(told) == {
        "imports.refgemma": 0.5,
        "refgemma.float32.load": 2.5,
        "refgemma.float32.stream": 5e9,
        "transformers.bfloat16.decode_128": 5.0,
        "transformers.bfloat16.memory.rss": 70,
    }


def test_a_ratio_is_taken_within_a_round():
    # A machine that slows down by ten between rounds: the ratio is 2 in each, yet 20 or 0.2 across them.
    rounds = [{"ours": 1.0, "theirs": 2.0}, {"ours": 10.0, "theirs": 20.0}, {"ours": 5.0}]
    assert median_of(rounds, lambda v: v["theirs"] / v["ours"]) == 2.0
    assert median_of(rounds, lambda v: v["absent"]) is None


@pytest.mark.parametrize(
    ("bar", "measured", "reached"),
    [
        (Bar(what="more", bar=2, number=dict.get), 2.0, True),
        (Bar(what="more", bar=2, number=dict.get), 1.9, False),
        (Bar(what="less", bar=2, at_least=False, number=dict.get), 2.1, False),
        (Bar(what="less", bar=2, at_least=False, number=dict.get), 2.0, True),
        (Bar(what="to be told", number=dict.get), 2.0, None),
        (Bar(what="missing", bar=2, number=dict.get), None, None),
    ],
)
def test_bars_are_reached_from_the_right_side(bar, measured, reached):
    assert bar.reached(measured) is reached


def test_every_bar_of_gemma_2b_by_hand():
    read = 4 * 2_506_096_640 + 2 * 4 * 18 * 256 * 128  # 18 layers of 110,100,480 and the table; keys and values
    work = 2 * 128 * 18 * 110_100_480 + 2 * 256_000 * 2048 + 4 * 18 * 8 * 256 * (128 * 129 // 2)
    values = {
        "imports.refgemma": 0.3,
        "imports.dependencies": 0.2,
        "refgemma.float32.stream": 5 * read,  # bytes a second: a step of 0.25 s reads at 80 % of it
        "refgemma.float32.gemm": work,  # operations a second: a prompt read in 1.25 s, at 80 % of it
        "refgemma.float32.fresh": 4 * 2_506_172_416 / 0.5,  # all weights in half a second
        "refgemma.float32.beside.decode": 0.25,
        "refgemma.float32.beside.decode_8_rows": 0.5,
        "refgemma.float32.beside.products": 0.225,
        "refgemma.float32.beside.prefill": 1.25,
        "refgemma.bfloat16.stream": 2 * 2_506_096_640 / 0.18,  # all matrices in 0.18 s
        "refgemma.bfloat16.beside.decode": 0.2,
        "refgemma.bfloat16.beside.decode_8_rows": 1.0,
        "refgemma.float32.load": 2.0,
        "transformers.float32.load": 8.0,
        "refgemma.float32.decode_128": 0.25,
        "transformers.float32.decode_128": 0.6,
        "refgemma.float32.prefill_128": 1.25,
        "transformers.float32.prefill_128": 1.5,
        "refgemma.float32.memory_long.rss": 16e9,
        "refgemma.float32.memory_long.rss_anon": 11.3e9,
        "refgemma.bfloat16.decode_128": 0.2,
        "transformers.bfloat16.decode_128": 0.1,
        "refgemma.bfloat16.prefill_128": 2.5,
        "refgemma.bfloat16.first_token": 0.7,
        "refgemma.bfloat16.memory.rss": 5_512_344_832,
        "refgemma.bfloat16.memory_long.rss": 6e9,
    }
    wanted = list(bars(SIZES["gemma-2b"], ("float32", "bfloat16")))
    found = {verdict["what"]: (verdict["measured"], verdict["reached"]) for verdict in verdicts(wanted, [values])}
    cache = 2 * 4 * 18 * 256 * 8192
    # Each takes a few roundings in float64.
    assert found == {
        "import refgemma / import its dependencies": (pytest.approx(1.5), True),
        "float32 decode / gemv stream": (pytest.approx(0.8), True),
        "float32 decode / its matrix products alone": (pytest.approx(0.9), None),
        "float32 decode / transformers": (pytest.approx(2.4), True),
        "float32 prefill of 128 / gemm rate": (pytest.approx(0.8), True),
        "float32 prefill of 128 / transformers": (pytest.approx(1.2), False),
        "float32 load / transformers": (pytest.approx(4), True),
        "float32 load / filling as much new memory": (pytest.approx(0.25), None),
        "bfloat16 decode / bare tile loop": (pytest.approx(0.9), True),
        "bfloat16 decode / transformers bfloat16": (pytest.approx(0.5), None),
        "bfloat16 prefill of 128 / our float32": (pytest.approx(0.5), False),
        "bfloat16 resident memory beyond the file, GB": (pytest.approx(0.5), True),
        "bfloat16 first token beyond 1.5 steps, seconds": (pytest.approx(0.4), True),
        "float32 step of 8 rows / of one": (pytest.approx(2), True),
        "float32 memory at 8192 tokens beyond weights and cache, GB": (
            pytest.approx((11.3e9 - 4 * 2_506_172_416 - cache) / 1e9),
            True,
        ),
        "bfloat16 step of 8 rows / of one": (pytest.approx(5), False),
        "bfloat16 memory at 8192 tokens beyond weights and cache, GB": (
            pytest.approx((6e9 - 2 * 2_506_172_416 - cache) / 1e9),
            True,
        ),
    }


def test_bars_of_the_small_model():
    tiny = list(bars(SIZES["gemma-2b"], ("float32",), tiny=True))
    values = {"refgemma.float32.beside.decode": 0.4, "refgemma.float32.beside.products": 0.1}
    assert [verdict["measured"] for verdict in verdicts(tiny, [values])] == [None, pytest.approx(3)]
