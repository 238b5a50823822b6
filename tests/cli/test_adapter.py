"""`refgemma inspect --lora`: what an adapter changes, whether it fits, and what the hosted models would say to it."""

import json

import pytest

from refgemma.cli import main
from tests.lora.folders import factors, write
from tests.models import random_model


@pytest.fixture
def adapter(tmp_path, gemma):
    m = random_model(2, vocab_size=gemma.config.vocab_size, num_layers=3, max_positions=96)
    return write(tmp_path / "style", m, factors(m), "float32")


@pytest.fixture
def inspect(folder, capsys):
    """``inspect(...)``: exit code, standard output, standard error; the model is given."""

    def inspect(*arguments):
        code = main(["inspect", "--model", str(folder), *map(str, arguments)])
        return code, *capsys.readouterr()

    return inspect


@pytest.mark.parametrize(("scale", "shown"), [("", "2"), (":0.5", "1"), (":-3", "-6")])
def test_what_it_changes_and_by_how_much(inspect, adapter, scale, shown):
    code, printed, err = inspect("--lora", f"{adapter}{scale}")
    assert (code, err) == (0, "")
    lines = [line.split() for line in printed[printed.index("what it changes") :].splitlines()]
    assert lines[2] == ["layers.{i}.attn.q", "low", "rank", "3", "3", shown]
    assert lines[3] == ["layers.{i}.mlp.down", "low", "rank", "3", "3", shown]
    about = json.loads(inspect("--lora", f"{adapter}{scale}", "--json")[1])["lora"][0]
    assert [change["scale"] for change in about["changes"]] == [shown, shown]


def test_the_hosted_models_by_both_rules(inspect, adapter):
    printed = inspect("--lora", adapter)[1]
    table, *verdicts = printed[printed.index("would the hosted models take it?") :].rsplit("\nby the ", 2)
    assert table.splitlines()[0] == "would the hosted models take it? by the rule of their pages"
    wanted = "refused; its shapes are those of neither of the models"
    assert verdicts[0] == f"rule of their pages (rank at most 8, less than 100 MB): {wanted}"
    assert verdicts[1].strip() == f"later rule (rank at most 32, less than 300 MB): {wanted}"
    reports = json.loads(inspect("--lora", adapter, "--json")[1])["lora"][0]["hosted"]
    assert [report["rule"] for report in reports] == ["page", "later"]


def test_a_verdict_names_the_model(capsys, tmp_path):
    from tests.lora.test_hosted import factors as of_2b
    from tests.lora.test_hosted import write as write_2b

    folder = write_2b(tmp_path, of_2b(rank=16), r=16)
    main(["inspect", "--model", "gemma-2b", "--lora", str(folder)])
    printed = capsys.readouterr().out.splitlines()
    assert printed[-2].endswith(": refused; its shapes are those of @cf/google/gemma-2b-it-lora")
    assert printed[-1].endswith(": accepted; its shapes are those of @cf/google/gemma-2b-it-lora")


@pytest.mark.parametrize(
    ("name", "says", "code"),
    [
        ("nobody", "no adapter 'nobody'", 2),
        ("pirate:nan", "scale is nan: expected a finite number", 2),
        ("pirate", "does not fit the model", 1),
    ],
)
def test_what_is_wrong_is_said(inspect, name, says, code):
    found, _, err = inspect("--lora", name)
    assert found == code
    assert says in err
