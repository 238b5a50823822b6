"""`refgemma verify`: which model a folder holds, figures that hold and one altered that does not, golden files."""

import hashlib
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

import refgemma
from refgemma.checkpoint.folder import find_model, read_folder
from refgemma.cli import main
from refgemma.config import SIZES, read_config
from refgemma.oracle.published.figures import DATA, figures_of, models, read_json
from refgemma.oracle.published.golden import golden_figures, known_file, measure_golden
from refgemma.oracle.published.verify import checksums, on_record, recognise, verify
from tests.bfloat16 import nearest
from tests.checkpoint.files import write_model
from tests.models import random_model
from tests.truth import truth_logits

REMAKE = "remake the figures, with torch and transformers installed: python -m tests.peers.make_tiny_it_figures"
TINY = DATA / "tiny_it_figures.json"


@pytest.fixture(scope="module")
def tiny_it():
    return refgemma.load("tiny-it")


@pytest.fixture
def command(capsys):
    """``command("tiny-it", "--json")``: exit code, standard output, standard error."""

    def command(*arguments):
        code = main(["verify", *map(str, arguments)])
        return code, *capsys.readouterr()

    return command


def test_figures_recorded_from_transformers_hold(command):
    stored = read_folder(find_model("tiny-it"))
    assert models()["tiny-it"]["checksums"] == checksums(stored), f"tiny-it changed: {REMAKE}"
    code, out, err = command("--json")  # the shipped model is the default
    shown = json.loads(out)
    assert (code, err) == (0, "")
    assert shown["model"] == "tiny-it"
    assert shown["how"] == "by the checksums of 3 tensors"
    assert (shown["holds"], shown["differs"], shown["not_computed"]) == (len(figures_of("tiny-it")), 0, 0)
    assert {figure["kind"] for figure in shown["figures"]} == {figure.kind for figure in figures_of("tiny-it")}
    for figure in shown["figures"]:
        assert figure["source"].startswith("https://github.com/huggingface/transformers/")
        assert figure["reason"]
        assert figure["tolerance"]


def altered(entry):
    """The figure, changed by five times its tolerance, in one number or one token."""
    if entry["kind"] == "greedy_text":
        *start, last = entry["continuations"][0]
        return {"continuations": [[*start, last + 1]]}
    if entry["kind"] == "reply_contains":
        return {"expected": entry["expected"] + "0"}
    expected = np.atleast_1d(np.array(entry["expected"]))
    expected[len(expected) // 2] += 5 * entry["atol"]
    return {"expected": expected.tolist() if isinstance(entry["expected"], list) else float(expected[0])}


@pytest.mark.parametrize("index", range(len(json.loads(TINY.read_text(encoding="utf-8"))["figures"])))
def test_one_figure_altered_and_it_fails(command, tmp_path, index):
    held = json.loads(TINY.read_text(encoding="utf-8"))
    entry = held["figures"][index]
    held["figures"] = [entry | altered(entry)]
    (tmp_path / "figures.json").write_text(json.dumps(held))
    code, out, _ = command("tiny-it", "--figures", tmp_path / "figures.json")
    assert code == 1
    assert "0 of 1 figures hold, 1 differ\n" in out
    assert " differs" in out
    assert "what is wrong" in out


def test_what_is_printed(command):
    code, out, _ = command("tiny-it")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].endswith("tiny-it: taken for tiny-it, by the checksums of 3 tensors")
    assert lines[2].startswith("on record for tiny-it: logits (1), mean logits (2)")
    row = next(line.split() for line in lines if line.startswith("tiny-it/small/cross-entropy"))
    published = next(f.fields["expected"] for f in figures_of("tiny-it") if f.id == "tiny-it/small/cross-entropy")
    assert row[1] == f"{published:.6g}"
    assert row[3:] == ["±", "0.001", "holds"]
    assert any(line.startswith("logit_mean  ") and "0.0005: " in line for line in lines)  # the reason
    assert any("https://github.com/huggingface/transformers/" in line for line in lines)  # the source
    assert lines[-1].startswith(f"{len(figures_of('tiny-it'))} of ")


def test_the_list(command):
    code, out, _ = command("--list")
    assert code == 0
    lines = [line.strip() for line in out.splitlines()]
    assert [on_record(name) in lines for name in models()] == [True] * len(models())
    assert any(line.startswith("gemma-7b: greedy texts (9). No logits") for line in lines)
    assert "Gemma 2: kept for later, refgemma computes Gemma 1" in lines
    assert json.loads(command("--list", "--json")[1])["Gemma 3"][0].startswith("gemma-3-4b-it: ")


def test_a_model_that_cannot_give_the_figures(command):
    """Ids beyond its vocabulary: said figure by figure, no crash."""
    code, out, err = command("tiny-it", "--as", "gemma-2b", "--json")
    shown = json.loads(out)
    assert (code, err) == (1, "")
    assert shown["holds"] == 0
    assert shown["differs"] > 0
    wrong = {figure["problem"] for figure in shown["figures"] if figure["verdict"] == "not computed"}
    assert "token id 6081 is outside the vocabulary of 1000 (ids from 0)" in wrong


@pytest.mark.parametrize("name", [name for name, about in models().items() if about["family"] == "gemma1"])
def test_every_figure_of_gemma_1_on_a_tiny_model_that_is_another(name, tiny_it):
    outcomes = list(verify(tiny_it, figures_of(name)))
    assert len(outcomes) == len(figures_of(name))
    if name != "tiny-it":
        # A reply may hold "50", and an upper bound may hold, by chance; what is sharp does not.
        assert all(o.verdict != "holds" for o in outcomes if o.figure.kind not in ("reply_contains", "cross_entropy"))


def test_damaged_weights_hold_no_figure(tiny_it):
    nan = replace(tiny_it, params={**tiny_it.params, "final_norm": np.full_like(tiny_it.params["final_norm"], np.nan)})
    outcomes = list(verify(nan, [f for f in figures_of("tiny-it") if f.fields.get("at") is None]))
    assert {outcome.verdict for outcome in outcomes} <= {"differs", "not computed"}


# ---- which model it is


def with_name(folder, name):
    folder = folder / name
    folder.mkdir(parents=True)
    return folder


def test_recognised_by_checksums_whatever_the_name(command, tmp_path):
    shutil.copytree(find_model("tiny-it"), tmp_path / "mine")
    assert json.loads(command(tmp_path / "mine", "--json")[1])["model"] == "tiny-it"


def test_other_tensors_under_that_name_are_not(command, tmp_path, small_tokenizer):
    model = random_model(2, vocab_size=small_tokenizer.vocab_size)
    folder = write_model(tmp_path / "tiny-it", model)
    shutil.copy(small_tokenizer.path, folder / "tokenizer.model")
    code, out, err = command(folder)
    assert (code, out) == (2, "")
    assert (
        "its tensors differ from those that the figures of tiny-it were recorded with; say which it is with --as" in err
    )
    assert command(folder, "--as", "tiny-it")[0] == 1


@pytest.mark.parametrize("name", ["gemma-2b-it", "models--google--gemma-2b-it/snapshots/0123"])
def test_published_shapes_are_told_by_configuration_and_name(tmp_path, name):
    found = recognise(with_name(tmp_path, name), SIZES["gemma-2b"], {})
    assert found.model == "gemma-2b-it"
    assert found.candidates == ("gemma-2b", "gemma-2b-it", "gemma-1.1-2b-it")
    other_size = recognise(tmp_path / name, SIZES["gemma-7b"], {})
    assert other_size.model is None
    assert "gemma-7b and gemma-7b-it and gemma-1.1-7b-it equally" in other_size.how


def test_a_shape_without_a_name_is_not_guessed(tmp_path):
    found = recognise(with_name(tmp_path, "mine"), SIZES["gemma-2b"], {})
    assert found.model is None
    assert "gemma-2b and gemma-2b-it and gemma-1.1-2b-it equally (and CodeGemma of that size)" in found.how


def test_bad_use(command, tmp_path):
    unknown = command("--as", "gemma-3b")[2]
    assert "--as is 'gemma-3b', no model that figures exist for: expected one of gemma-2b" in unknown
    assert "a Gemma 2, which cannot be computed here yet" in command("--as", "gemma-2-2b")[2]
    (tmp_path / "config.json").write_text('{"model_type": "gemma2"}')
    code, _, err = command(tmp_path)
    assert code == 2
    assert "figures of Gemma 2 are on record, for gemma-2-2b, gemma-2-9b" in err
    assert command(tmp_path / "absent")[0] == 2
    assert command("tiny-it", "--golden", "a", "--figures", "b")[0] == 2


# ---- golden files


def golden_line(logits, ids, prompt="a b"):
    return json.dumps({"prompt": prompt, "tokens": ids, "logits": np.asarray(logits).tolist()})


@pytest.fixture(scope="module")
def golden():
    """A model, ids, and its true logits with eight columns more, as Flax tables have them."""
    model = random_model(5, num_layers=2)
    config = model.config
    ids = [2, 7, 3, 9]
    logits = truth_logits(model.params, config, np.array([ids]))[0]
    gemma = refgemma.Gemma(config, model.params, None, refgemma.numerics.FLOAT32, frozenset())
    return gemma, ids, np.concatenate([logits, logits[:, :8] + 30], axis=1)


def test_a_golden_file(golden, tmp_path):
    gemma, ids, logits = golden
    path = tmp_path / "golden.jsonl"
    path.write_text("\n".join([golden_line(logits, ids), "", golden_line(logits[:2], ids[:2])]) + "\n")
    figures = list(golden_figures(path))
    assert [figure.id for figure in figures] == ["golden.jsonl/a b"] * 2
    assert figures[0].note == "its hash matches no golden file on record"
    for figure in figures:
        found = measure_golden(gemma, figure)
        assert found.problem is None
        assert found.values == pytest.approx([0] * len(found.values), abs=1e-8)
    wrong = replace(figures[0], fields={**figures[0].fields, "logits": figures[0].fields["logits"] * np.float32(1.2)})
    assert "apart, although the probabilities agree" in measure_golden(gemma, wrong).problem
    nan = replace(figures[0], fields={**figures[0].fields, "logits": figures[0].fields["logits"] * np.float32(np.nan)})
    assert "is above 0.015" in measure_golden(gemma, nan).problem


def test_bfloat16_logits_pass_where_a_known_bug_does_not(golden, tmp_path):
    """Logits rounded to bfloat16 are within the tolerance; those of a model that is wrong by more than a little not."""
    gemma, ids, logits = golden
    (tmp_path / "a.jsonl").write_text(golden_line(nearest(logits[:, : gemma.config.vocab_size]), ids))
    assert measure_golden(gemma, next(golden_figures(tmp_path / "a.jsonl"))).problem is None
    for bug in ("A1", "A3", "A4", "B1", "B2", "C3", "D7"):
        wrong = truth_logits(gemma.params, gemma.config, np.array([ids]), bugs={bug})[0]
        (tmp_path / "a.jsonl").write_text(golden_line(wrong, ids))
        assert measure_golden(gemma, next(golden_figures(tmp_path / "a.jsonl"))).problem, bug


def test_the_hash_is_that_of_git(tmp_path, monkeypatch):
    path = tmp_path / "renamed.jsonl"
    path.write_text(golden_line([[0.0, 1.0]], [2]))
    data = path.read_bytes()
    sha1 = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    entry = {"sha1": sha1, "family": "gemma1", "model": "gemma-2b", "url": "https://github.com/x", "max_kl": 0.5}
    monkeypatch.setitem(read_json("golden_files.json"), "files", [entry])
    assert known_file(path) == entry
    figure = next(golden_figures(path))
    assert (figure.models, figure.fields["max_kl"], figure.url) == (("gemma-2b",), 0.5, "https://github.com/x")


def test_golden_files_on_record():
    entries = read_json("golden_files.json")["files"]
    assert len(entries) == 9
    assert {entry["model"] for entry in entries if entry["family"] == "gemma1"} == {"gemma-2b"}
    assert all(len(entry["sha1"]) == 40 and entry["url"].startswith("https://github.com/") for entry in entries)


def test_golden_from_the_command_line(command, tmp_path, tiny_it):
    ids = [2, 17, 23]
    (tmp_path / "g.jsonl").write_text(golden_line(tiny_it.logits(ids).astype(float), ids))
    code, out, _ = command("tiny-it", "--golden", tmp_path / "g.jsonl", "--json")
    assert (code, json.loads(out)["figures"][0]["verdict"]) == (0, "holds")
    (tmp_path / "g.jsonl").write_text(golden_line(tiny_it.logits(ids)[:, ::-1].astype(float), ids))
    assert command("tiny-it", "--golden", tmp_path / "g.jsonl")[0] == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("{", "line 1"),
        ('{"tokens": [2], "logits": [1.0]}', "1 tokens, logits of shape (1,)"),
        ('{"tokens": [2], "logits": [[1.0], [2.0]]}', "1 tokens, logits of shape (2, 1)"),
        ('{"tokens": [2], "logits": [["a"]]}', "line 1"),
        ('{"tokens": "x", "logits": [[1]]}', "line 1"),
    ],
)
def test_a_broken_golden_file(command, tmp_path, text, words):
    (tmp_path / "g.jsonl").write_text(text)
    code, out, err = command("tiny-it", "--golden", tmp_path / "g.jsonl")
    assert (code, out) == (2, "")
    assert words in err
    assert len(err.strip().splitlines()) == 1
    assert command("tiny-it", "--golden", tmp_path / "absent")[0] == 2


def test_configuration_of_the_shipped_model_is_of_no_published_size():
    assert read_config(find_model("tiny-it")) not in SIZES.values()
