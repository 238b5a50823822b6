"""Figures that public repositories give for the real Gemma 1 checkpoints.

They are checked where REFGEMMA_WEIGHTS names a folder with sub-folders such as gemma-2b or gemma-1.1-7b-it, each in
Hugging Face layout. Everywhere else the checker itself is put to the test, on a random model.
"""

import functools
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import refgemma
from refgemma.config import SIZES, read_config
from tests.checkpoint.files import write_model
from tests.models import random_model
from tests.published import check
from tests.truth import truth_logits, truth_row

FIGURES = check.read("gemma1_figures.json")
MODELS = sorted({model for figure in FIGURES["figures"] for model in figure["models"]})
CASES = [(model, figure) for model in MODELS for figure in FIGURES["figures"] if model in figure["models"]]


def checkpoint(name):
    """Folder of a real checkpoint; skips where there is none."""
    folder = os.environ.get("REFGEMMA_WEIGHTS")
    if not folder:
        pytest.skip("needs real weights: set REFGEMMA_WEIGHTS to a folder that holds gemma-2b, gemma-2b-it, ...")
    if not (Path(folder) / name).is_dir():
        pytest.skip(f"REFGEMMA_WEIGHTS holds no {name}")
    return Path(folder) / name


@functools.lru_cache(maxsize=1)  # cases come model by model; two at a time might not fit
def loaded(folder):
    return refgemma.load(folder, weights="bfloat16")


@pytest.mark.parametrize(("model", "figure"), CASES, ids=[f"{model}:{figure['id']}" for model, figure in CASES])
def test_published_figure(model, figure):
    complaint = check.problem(loaded(checkpoint(model)), figure)
    assert complaint is None, f"{complaint} ({figure['computed_in']}; {FIGURES['sources'][figure['source']]['url']})"


@pytest.mark.parametrize("model", MODELS)
def test_published_configuration(model):
    assert read_config(checkpoint(model)) == SIZES["gemma-2b" if "2b" in model else "gemma-7b"]


@pytest.mark.parametrize("size", ["gemma-2b", "gemma-7b"])
def test_published_parameter_count(size):
    assert SIZES[size].num_parameters == FIGURES["parameter_counts"][size]


def test_every_figure_names_its_source_and_is_of_a_known_kind():
    assert len({figure["id"] for figure in FIGURES["figures"]}) == len(FIGURES["figures"])
    for figure in FIGURES["figures"]:
        assert FIGURES["sources"][figure["source"]]["url"].startswith("https://github.com/")
        assert figure["kind"] in check.CHECKS
        assert figure["trust"] in ("high", "medium")
        assert figure["computed_in"] in check.NEAR_TIE
        assert set(figure["models"]) <= {f"gemma-{v}{s}" for v in ("", "1.1-") for s in ("2b", "7b", "2b-it", "7b-it")}


def test_published_texts_have_the_published_number_of_tokens(gemma_tokenizer):
    """Continuations are encoded here as the engines that wrote them decoded them."""
    for figure in FIGURES["figures"]:
        if figure["kind"] == "greedy_text":
            for text in figure["continuations"]:
                assert len(gemma_tokenizer.encode(text, control="markers")) == figure["new_tokens"], figure["id"]
    means = next(figure for figure in FIGURES["figures"] if figure["id"] == "gemma-2b/cover-drive/mean")
    assert len(gemma_tokenizer.encode(means["text"], bos=True)) == len(means["expected"])


# The checker, on a random model whose figures the truth gives.

TEXT = "the user was at the end of the world, and the answer is: hello hello."


@pytest.fixture(scope="module")
def model(small_tokenizer):
    return random_model(5, vocab_size=small_tokenizer.vocab_size, num_layers=2, num_tokens=4)


@pytest.fixture(scope="module")
def gemma(model, small_tokenizer, tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("published") / "random", model)
    shutil.copy(small_tokenizer.path, folder / "tokenizer.model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "read", lambda name: {"texts": {"tiny": TEXT}})  # a text the small vocabulary can spell
        yield refgemma.load(folder)


def true_figures(model, tokenizer, bugs=frozenset()):
    """A figure of each kind, by the truth; with bugs, by a wrong model."""

    def logits(ids):
        return truth_logits(model.params, model.config, np.array([ids]), bugs=bugs)[0]

    def greedy(ids, count):
        for _ in range(count):
            ids = [*ids, int(logits(ids)[-1].argmax())]
        return ids[-count:]

    def logprobs(ids, cap=None):
        z = logits(ids)[:-1]
        z = z if cap is None else cap * np.tanh(z / cap)
        return [row[i] - math.log(math.fsum(np.exp(row))) for row, i in zip(z, ids[1:], strict=True)]

    def bits_per_byte(ids, cap=None):
        return (math.log2(model.config.vocab_size) - math.fsum(logprobs(ids, cap)) / math.log(2)) / len(TEXT)

    bare, ids = tokenizer.encode(TEXT), tokenizer.encode(TEXT, bos=True)
    hidden = truth_row(model.params, model.config, np.array(ids), np.arange(len(ids)), bugs=bugs)["final_norm"]
    columns = [3, 5, 8]
    end = bits_per_byte(bare, cap=30.0)
    figures = [
        {"kind": "logit_mean", "ids": ids, "expected": logits(ids).mean(axis=-1), "atol": 0.002},
        {"kind": "logit_mean", "text": TEXT, "expected": logits(ids).mean(axis=-1), "atol": 0.002},
        {"kind": "logits_slice", "ids": ids, "position": 4, "columns": columns, "expected": logits(ids)[4, columns]},
        {"kind": "hidden_slice", "ids": ids, "position": 4, "columns": columns, "expected": hidden[4, columns]},
        {"kind": "token_logprob", "ids": ids, "first": 2, "expected": logprobs(ids)[1:], "atol": 0.15, "rtol": 0.05},
        {"kind": "cross_entropy", "text_ref": "tiny", "bos": True, "expected": bits_per_byte(ids), "atol": 0.02},
        {"kind": "cross_entropy", "text_ref": "tiny", "bos": False, "expected": bits_per_byte(bare), "atol": 0.02},
        {"kind": "cross_entropy", "text_ref": "tiny", "bos": False, "final_cap": 30.0, "less_than": end + 1e-3},
        {"kind": "greedy_text", "text": TEXT, "continuations": [bare[:5], greedy(ids, 8)], "computed_in": "float32"},
        {"kind": "reply_contains", "text": TEXT, "max_tokens": 8, "expected": tokenizer.decode(greedy(ids, 8)[2:6])},
    ]
    return [{"atol": 0.005} | figure for figure in figures]


def spoiled(figure):
    """The same figure, one number of it wrong by twice its tolerance, or one token another."""
    if figure["kind"] == "greedy_text":
        *start, last = figure["continuations"][-1]
        return figure | {"continuations": [[*start, last + 1]]}
    if figure["kind"] == "reply_contains":
        return figure | {"expected": figure["expected"] + " and more"}
    if "less_than" in figure:
        return figure | {"less_than": figure["less_than"] - 2e-3}
    wrong = np.array(figure["expected"], dtype=np.float64)
    wrong.flat[-1] += 2 * (figure["atol"] + figure.get("rtol", 0) * abs(wrong.flat[-1]))
    return figure | {"expected": wrong.tolist()}


def test_the_checker_accepts_the_truth_and_catches_a_wrong_figure(gemma, model, small_tokenizer):
    figures = true_figures(model, small_tokenizer)
    assert {figure["kind"] for figure in figures} == set(check.CHECKS)
    for figure in figures:
        assert check.problem(gemma, figure) is None
        complaint = check.problem(gemma, spoiled(figure))
        assert isinstance(complaint, str), figure
        assert "\n" not in complaint


@pytest.mark.parametrize("bug", ["A1", "B1", "B2", "C2", "C3", "D7", "E6"])
def test_the_checker_catches_a_wrong_model(gemma, model, small_tokenizer, bug):
    """Figures of a model with a known bug are not ours; a single mean or a text may be, by chance."""
    for figure in true_figures(model, small_tokenizer, bugs={bug}):
        if figure["kind"] in ("logit_mean", "logits_slice", "hidden_slice", "token_logprob"):
            assert check.problem(gemma, figure) is not None, figure["kind"]


def test_the_checker_catches_other_lengths_and_not_a_number(gemma, model, small_tokenizer):
    figure = true_figures(model, small_tokenizer)[0]
    assert "tokenised" in check.problem(gemma, figure | {"expected": figure["expected"][:-1]})
    assert check.problem(gemma, figure | {"expected": np.full_like(figure["expected"], np.nan)}) is not None
