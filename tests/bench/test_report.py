"""A record for programs, tables for people, a picture: all of one run of `refgemma bench`."""

import pytest

from refgemma.bench import report
from refgemma.bench.report import median_of, picture, points, summary, values_of
from refgemma.bench.run import Job, Outcome
from refgemma.config import SIZES
from tests.bench.conftest import CONFIG


def test_the_record(found):
    assert (found["size"], found["parameters"], found["rounds"]) == ("tiny", CONFIG.num_parameters, 1)
    assert found["failures"] == []
    assert {"python", "numpy", "refgemma"} <= found["machine"]["versions"].keys()
    assert all(rate > 0 for rate in found["limits"].values())
    for form in ("float32", "bfloat16"):
        own = found["engines"]["refgemma"][form]
        assert all(value is None or value > 0 for value in own.values())
        assert own["decode_128"] == found["values"][0][f"refgemma.{form}.decode_128"]
        assert set(found["ratios"][form].values()) == {None}
    assert [len(shares) for shares in found["shares"].values()] == [4, 3]
    assert all(share > 0 for shares in found["shares"].values() for share in shares.values())


def test_values_are_medians_and_of_several_variants_the_best():
    outcomes = [
        Outcome(
            Job("refgemma", "float32"),
            [
                {"measure": "about", "threads": 4},
                {"measure": "load", "seconds": [3.0, 1.0, 2.5]},
                {"measure": "stream", "rate": 5e9},
            ],
        ),
        Outcome(
            Job("transformers", "bfloat16"),
            [
                {"measure": "decode_128", "variant": "sdpa", "seconds": [4.0, 6.0]},
                {"measure": "memory", "variant": "sdpa", "rss": 70, "rss_anon": None},
                {"measure": "decode_128", "variant": "eager", "seconds": [7.0]},
                {"measure": "memory", "variant": "eager", "rss": 90, "rss_anon": None},
            ],
        ),
    ]
    assert values_of(outcomes) == {
        "refgemma.float32.load": 2.5,
        "refgemma.float32.stream": 5e9,
        "transformers.bfloat16.decode_128": 5.0,
        "transformers.bfloat16.memory.rss": 70,
    }


def test_a_ratio_is_taken_within_a_round():
    # A machine that slows down by ten between rounds: the ratio is 2 in each, yet 20 or 0.2 across them.
    rounds = [{"a": 1.0, "b": 2.0}, {"a": 10.0, "b": 20.0}, {"a": 5.0}]
    assert median_of(rounds, lambda v: v["b"] / v["a"]) == 2.0
    assert median_of(rounds, lambda v: v["absent"]) is None


def test_every_share_of_gemma_2b_by_hand():
    read = 4 * 2_506_096_640 + 2 * 4 * 18 * 256 * 128  # 18 layers of 110,100,480 and the table; keys and values
    work = 2 * 128 * 18 * 110_100_480 + 2 * 256_000 * 2048 + 4 * 18 * 8 * 256 * (128 * 129 // 2)
    lines = {
        "float32": [
            {"measure": "stream", "rate": 5 * read},  # bytes a second: a step of 0.25 s reads at 80 % of it
            {"measure": "gemm", "rate": work},  # operations a second: a prompt read in 1.25 s, at 80 % of it
            {"measure": "fresh", "rate": 4 * 2_506_172_416 / 0.5},  # all weights in half a second
            {"measure": "beside.decode", "seconds": [0.25]},
            {"measure": "beside.products", "seconds": [0.225]},
            {"measure": "beside.prefill", "seconds": [1.25]},
            {"measure": "load", "seconds": [2.0]},
        ],
        "bfloat16": [
            {"measure": "stream", "rate": 2 * 2_506_096_640 / 0.18},  # all matrices in 0.18 s
            {"measure": "gemm", "rate": work},
            {"measure": "beside.decode", "seconds": [0.2]},
            {"measure": "beside.products", "seconds": [0.19]},
            {"measure": "beside.prefill", "seconds": [2.0]},
        ],
    }
    outcomes = [Outcome(Job("refgemma", form), each) for form, each in lines.items()]
    record = summary("gemma-2b", SIZES["gemma-2b"], ("float32", "bfloat16"), {}, [outcomes])
    # Each takes a few roundings in float64.
    assert record["shares"] == {
        "float32": {
            "decode / reading memory": pytest.approx(0.8),
            "decode / its matrix products alone": pytest.approx(0.9),
            "prefill of 128 / gemm": pytest.approx(0.8),
            "load / filling new memory": pytest.approx(0.25),
        },
        "bfloat16": {
            "decode / reading memory": pytest.approx(0.9),
            "decode / its matrix products alone": pytest.approx(0.95),
            "prefill of 128 / gemm": pytest.approx(0.5),
        },
    }


def test_tables(found):
    failures = [{"round": 1, "engine": "transformers", "weights": "bfloat16", "failure": "stopped"}]
    tables = report.tables(found | {"failures": failures})
    assert [len(row) for table in tables for row in table.rows] == [
        len(table.columns) for table in tables for _ in table.rows
    ]
    measures = next(table for table in tables if table.columns[0] == "medians")
    assert measures.columns == ("medians", "refgemma float32", "refgemma bfloat16")
    assert tables[-1].rows == [("transformers bfloat16", "round 1: stopped")]


def test_tables_beside_transformers(found):
    own = found["engines"]["refgemma"]["float32"]
    other = {form: {name: 2 * value for name, value in own.items()} for form in ("float32", "bfloat16")}
    ratios = {form: dict.fromkeys(own, 2.0) for form in other}
    both = found | {"engines": found["engines"] | {"transformers": other}, "ratios": ratios}
    measures = next(table for table in report.tables(both) if table.columns[0] == "medians")
    assert len(measures.columns) == 7
    row = next(row for row in measures.rows if row[0] == "decode at 128, 8 rows, tokens/s")
    assert float(row[1].replace(",", "")) == pytest.approx(8 / own["decode_8_rows"], rel=0.01)  # three digits
    assert row[3] == "2.00"


def test_points_of_the_roofline(found):
    placed = {(p.engine, p.weights, p.measure): p for p in points(found, CONFIG)}
    assert len(placed) == 2 * 5
    one, many = (placed["refgemma", "bfloat16", name] for name in ("decode_128", "decode_8_rows"))
    assert one.intensity < many.intensity < placed["refgemma", "bfloat16", "prefill_2048"].intensity
    seconds = found["engines"]["refgemma"]["bfloat16"]["decode_128"]
    # Products of one token by hand: two layers, the head, and attention to 128 keys and itself.
    layers = 2 * (2 * 48 * 40 + 2 * 24 * 40 + 3 * 40 * 72)
    assert one.rate * seconds == pytest.approx(2 * (layers + 96 * 40) + 4 * 2 * 4 * 12 * 129)


def test_the_picture(found):
    pytest.importorskip("matplotlib")
    assert picture(found, CONFIG, format="png").startswith(b"\x89PNG")
    svg = picture(found, CONFIG, format="svg").decode()
    assert svg.count("prefill 2048") == 2  # a comment of matplotlib's for each text


def test_nothing_to_draw(found):
    limits = dict.fromkeys(found["limits"])
    with pytest.raises(ValueError, match="there is nothing to draw"):
        picture(found | {"limits": limits}, CONFIG)
    with pytest.raises(ValueError, match="'gif': expected png, svg, pdf"):
        picture(found, CONFIG, format="gif")
