"""Decisions to look at: the same table in the terminal, in a picture, and on a page."""

import json
import re
import sys

import pytest
from rich.console import Console

from refgemma.sampling import show
from refgemma.sampling.show import table as shown_table
from tests.sampling.shown import AWKWARD, SPELLED, awkward_record, plain_record


def test_probabilities_through_the_steps():
    table = shown_table.view(plain_record(), 0)
    assert [column.title for column in table.columns] == ["model", "temperature 0.5", "top k 2"]
    # Dividing a logit by 0.5 squares the weight: 64, 16, 4, 1 of 85; then the first two of 80 are left.
    want = {
        "' red'": (8 / 15, 64 / 85, 64 / 80),
        "' green'": (4 / 15, 16 / 85, 16 / 80),
        "'blue'": (2 / 15, 4 / 85, None),
        "'\\n'": (1 / 15, 1 / 85, None),
    }
    assert [row.label for row in table.rows] == list(want)
    for row in table.rows:
        for prob, expected in zip(row.probs, want[row.label], strict=True):
            # Each is an exponential of a difference of logarithms below 5: some ten roundings of numbers below 5.
            assert prob == (expected if expected is None else pytest.approx(expected, rel=1e-14))
    assert table.columns[2].removed == 2
    assert table.columns[2].mass == pytest.approx(5 / 85, rel=1e-14)


def test_a_greedy_choice_is_a_column_of_its_own():
    table = shown_table.view(plain_record(temperature=0.0, top_k=None), 1)
    assert [column.title for column in table.columns] == ["model", "greedy most likely"]
    assert [row.probs[1] for row in table.rows] == [1.0, None, None, None]
    assert [row.token for row in table.rows] == [3, 2, 1, 0]


def test_the_token_and_what_would_be_drawn_are_marked():
    record = awkward_record()
    marked = 0
    for t, entry in enumerate(record):
        marks = {row.token: row.mark for row in shown_table.view(record, t).rows if row.mark}
        assert marks == {entry.drawn: shown_table.DRAWN} | {entry.token: shown_table.TOKEN}
        marked += len(marks) == 2
    assert marked  # the other engine chose another token at least once


def test_the_head_keeps_the_token_and_both_sides_of_each_cut():
    table = shown_table.view(plain_record(top_k=3), 0)
    assert [row.token for row in table.head(1).rows] == [0, 2, 3]  # 2 is the last kept, 3 the first removed
    assert [row.token for row in table.head(4).rows] == [0, 1, 2, 3]
    last = plain_record(temperature=1.0, top_k=None)  # u = 0.6 falls to token 3, the most likely, which comes first
    assert [row.token for row in shown_table.view(last, 1).head(1).rows] == [3]


@pytest.mark.parametrize(
    ("prob", "number"), [(1.0, 0), (0.9, 0), (0.89, 1), (0.5, 1), (0.2, 2), (0.05, 3), (0.01, 4), (0.009, 5)]
)
def test_classes_of_surprise(prob, number):
    assert sum(prob < border for border in shown_table.BORDERS) == number
    assert shown_table.surprise(None) == 5


def printed(table, width=200):
    console = Console(width=width, force_terminal=False, markup=False, emoji=False, highlight=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_candidates_in_the_terminal():
    lines = printed(show.candidates(plain_record(), 0)).splitlines()
    full, half, quarter, eighth = "\u2588", "\u258c", "\u258e", "\u258f"
    # Eight characters are 100 %: 53.3 % are four and a quarter.
    assert [" ".join(line.split()) for line in lines[-4:]] == [
        f"\u25b8 0 ' red' 2.0794 {4 * full}{quarter} 53.3 % {6 * full} 75.3 % {6 * full}\u258d 80 %",
        f"1 ' green' 1.3863 {2 * full}{eighth} 26.7 % {full}{half} 18.8 % {full}\u258b 20 %",
        f"2 'blue' 0.6931 {full}{eighth} 13.3 % \u258d 4.71 % removed",
        f"3 '\\n' 0.0000 {half} 6.67 % {eighth} 1.18 % removed",
    ]
    assert "\u22122, 5.88 %" in lines[1]


def test_the_overview_has_a_line_a_token():
    lines = printed(show.overview(plain_record())).splitlines()
    assert lines[1].split()[:6] == ["0", "0", "'", "red'", "53.3", "%"]
    assert lines[2].split()[:4] == ["1", "3", "'\\n'", "53.3"]
    assert len(printed(show.overview(awkward_record())).splitlines()) == 1 + len(AWKWARD) + 1


def data_of(page):
    """The data of a page, found as a browser finds it: the script ends at the first ``</script``."""
    return json.loads(page.partition('<script type="application/json" id="record">')[2].partition("</script")[0])


def test_a_page_holds_any_text_and_nothing_of_it_is_markup():
    record = awkward_record()
    page = show.page(record, title="<i>&\"' \u00e9")
    assert page.isascii()
    assert page.count("<script") == page.count("</script") == 2
    assert "<!--" not in page
    assert "<h1>&lt;i&gt;&amp;&quot;&#x27; &#233;</h1>" in page
    data = data_of(page)
    assert "".join(token["text"] for token in data["tokens"]) == SPELLED
    assert data["tokens"][0]["rows"][0]["label"]
    # The usual shortcut, json.dumps alone, would end the script in the middle of the first token.
    careless = page.replace("\\u003c", "<")
    assert careless.count("</script") > 2


def test_a_page_loads_nothing():
    page = show.page(plain_record())
    assert "default-src 'none'" in page
    assert re.findall(r"(?:https?:|//[a-z]|@import|url\(|\bsrc=|<link|<img)", data_free(page)) == []


def data_free(page):
    return re.sub(r'(<script type="application/json" id="record">).*?(</script>)', r"\1\2", page, flags=re.DOTALL)


def test_numbers_on_a_page_are_those_of_the_record():
    record = plain_record()
    token = data_of(show.page(record))["tokens"][0]
    assert token["prob"] == pytest.approx(8 / 15, rel=1e-5)  # six digits
    assert token["final"] == pytest.approx(0.8, rel=1e-5)
    assert token["interval"] == pytest.approx([0.0, 0.8], rel=1e-14)
    assert token["why"] == record.explain(0)
    assert token["rows"][2]["probs"] == [pytest.approx(2 / 15, rel=1e-5), pytest.approx(4 / 85, rel=1e-5), None]


def contrast(one, other):
    """Ratio of luminances by the formula of WCAG 2.1, section 1.4.3."""

    def luminance(colour):
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted([luminance(one), luminance(other)])
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_are_readable_and_grow_in_one_direction(scheme):
    colours = dict(re.findall(r"--(\w+): (#\w{6});", show.page(plain_record()).split(":root {")[1 + scheme]))
    classes = [colours[f"s{i}"] for i in range(6)]
    on_text = [contrast(colours["ink"], colour) for colour in classes]
    assert min(on_text) >= 4.5  # level AA
    assert on_text == sorted(on_text, reverse=True)  # so that lightness alone tells the classes apart
    pairs = ("faint paper", "faint card", "bad card", "accent card", "ink chosen", "ink bar", "faint chosen")
    for pair in pairs:
        one, other = pair.split()
        assert contrast(colours[one], colours[other]) >= 4.5, pair


@pytest.mark.parametrize(("form", "sign"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_pictures(form, sign):
    pytest.importorskip("matplotlib")
    assert show.picture(awkward_record(), 3, format=form).startswith(sign)


def test_a_picture_says_what_it_shows():
    pytest.importorskip("matplotlib")
    from matplotlib import rcParams

    before = rcParams["svg.fonttype"]
    rcParams["svg.fonttype"] = "none"  # text as text
    try:
        svg = show.picture(plain_record(), format="svg").decode()
        bars = show.picture(awkward_record(), 13, format="svg").decode()
    finally:
        rcParams["svg.fonttype"] = before
    shown = re.findall(r">([^<>]+)</text>", svg)
    assert {"temperature 0.5, top k 2, seed 7", "53.3 %", "80 %", "removed", "'blue'"} <= set(shown)
    assert any(re.fullmatch(r"token [01]: '.*'", text) for text in shown)  # both are equally surprising
    assert "&lt;b&gt;bold&lt;/b&gt;" in bars  # dollars and markup are not formulas


def test_no_picture_without_matplotlib(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'not installed: pip install "refgemma\[plot\]"'):
        show.picture(plain_record())


def test_matplotlib_is_not_imported_for_a_page():
    import subprocess

    code = "import sys, refgemma.sampling.show, refgemma.cli; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_picture_in_a_format_that_there_is_not():
    with pytest.raises(ValueError, match=r"unknown picture format 'gif': expected png, svg, pdf"):
        show.picture(plain_record(), format="gif")
