"""A record for programs, tables for people, a picture: all of one run of `refgemma bench`."""

import pytest

from refgemma.bench import report
from refgemma.bench.picture import picture, points
from tests.bench.conftest import CONFIG


def test_the_record(found):
    assert (found["size"], found["parameters"], found["rounds"]) == ("tiny", CONFIG.num_parameters, 1)
    assert found["failures"] == []
    assert {"python", "numpy", "refgemma"} <= found["machine"]["versions"].keys()
    assert all(rate > 0 for rate in found["limits"].values())
    for form in ("float32", "bfloat16"):
        ours = found["engines"]["refgemma"][form]
        assert all(value is None or value > 0 for value in ours.values())
        assert ours["decode_128"] == found["values"][0][f"refgemma.{form}.decode_128"]
        assert set(found["ratios"][form].values()) == {None}
    assert [bar["measured"] is not None for bar in found["bars"]] == [True, True]


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
    ours = found["engines"]["refgemma"]["float32"]
    theirs = {form: {name: 2 * value for name, value in ours.items()} for form in ("float32", "bfloat16")}
    ratios = {form: dict.fromkeys(ours, 2.0) for form in theirs}
    both = found | {"engines": found["engines"] | {"transformers": theirs}, "ratios": ratios}
    measures = next(table for table in report.tables(both) if table.columns[0] == "medians")
    assert len(measures.columns) == 7
    row = next(row for row in measures.rows if row[0] == "decode at 128, 8 rows, tokens/s")
    assert float(row[1].replace(",", "")) == pytest.approx(8 / ours["decode_8_rows"], rel=0.01)  # three digits
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
