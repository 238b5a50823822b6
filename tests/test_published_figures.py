"""Figures that public repositories give for the real checkpoints of the Gemma family.

They are checked where REFGEMMA_WEIGHTS names a folder with sub-folders such as gemma-2b or gemma-1.1-7b-it, each in
Hugging Face layout. Everywhere else the measuring itself is put to the test, on a random model.
"""

import functools
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import refgemma
from refgemma.checkpoint.names import FAMILIES, SHAPES
from refgemma.config import SIZES, read_config
from refgemma.oracle.published.figures import (
    DATA,
    Figure,
    figures_of,
    kinds_of,
    models,
    parameter_counts,
    published,
    read_figures,
)
from refgemma.oracle.published.measures import MEASURES, NEAR_TIE, measure
from refgemma.oracle.published.verify import KINDS
from tests.checkpoint.files import write_model
from tests.models import random_model
from tests.truth import truth_logits, truth_row

GEMMA1 = read_figures(DATA / "gemma1_figures.json")
MODELS = sorted({model for figure in GEMMA1 for model in figure.models})
CASES = [(model, figure) for model in MODELS for figure in GEMMA1 if model in figure.models]


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


@pytest.mark.parametrize(("model", "figure"), CASES, ids=[f"{model}:{figure.id}" for model, figure in CASES])
def test_published_figure(model, figure):
    problem = measure(loaded(checkpoint(model)), figure).problem
    assert problem is None, f"{problem} ({figure.computed_in}; {figure.url})"


@pytest.mark.parametrize("model", MODELS)
def test_published_configuration(model):
    assert read_config(checkpoint(model)) == SIZES["gemma-2b" if "2b" in model else "gemma-7b"]


@pytest.mark.parametrize("size", ["gemma-2b", "gemma-7b"])
def test_published_parameter_count(size):
    assert SIZES[size].num_parameters == parameter_counts()[size][0]


def test_every_figure_is_complete():
    """Its source is public, its kind is known, its tolerance has a reason, and no figure stands in twice."""
    assert len({figure.id for figure in published()}) == len(published())
    for figure in published():
        assert figure.url.startswith("https://github.com/"), figure.id
        assert figure.kind in MEASURES, figure.id
        assert figure.reason or figure.kind == "reply_contains", figure.id
        assert figure.trust in ("high", "medium"), figure.id
        assert figure.computed_in in NEAR_TIE, figure.id
        assert figure.family in FAMILIES, figure.id
        assert {models()[name]["family"] for name in figure.models} == {figure.family}, figure.id
        for name in ("columns", "pieces"):
            if name in figure.fields:
                assert len(figure.fields[name]) == len(figure.fields["expected"]), figure.id
        if "first" in figure.fields:
            assert len(figure.fields["ids"]) - figure.fields["first"] == len(figure.fields["expected"]), figure.id
        if "following" in figure.fields:
            assert len(figure.fields["following"]) == len(figure.fields["expected"]), figure.id
        if "position" in figure.fields and "ids" in figure.fields:
            assert figure.fields["position"] < len(figure.fields["ids"]), figure.id
    assert set(MEASURES) == set(KINDS)


def test_which_figures_exist():
    """The counts that the data had when it was transcribed; gemma-7b has texts and nothing sharper."""
    families = [figure.family for figure in published() if "tiny-it" not in figure.models]
    assert {family: families.count(family) for family in FAMILIES} == {"gemma1": 55, "gemma2": 214, "gemma3": 41}
    assert kinds_of("gemma-7b") == {"greedy_text": 9}
    assert "greedy texts are all there is" in models()["gemma-7b"]["lacks"]
    sharp = {"logits_slice", "logit_mean", "hidden_slice", "token_logprob"}
    assert [name for name in MODELS if sharp & set(kinds_of(name))] == ["gemma-2b"]
    assert figures_of("gemma-3-12b") == []


def test_the_later_families_are_as_their_sources_print_them(shared_json):
    """A number of each source, found in the collection that was transcribed."""
    by_id = {figure.id: figure.fields for figure in published()}
    slices = {case["id"]: case for case in shared_json("published/maxtext_gemma2_flax_logits.json")["cases"]}
    for case in slices.values():
        size, kind, words = case["id"].split("/")
        bf16 = "bf16/" if kind == "bfloat16" else ""
        for want in case["expected"]:
            ours = by_id[f"{size}/{words.lower().replace('_', '-')}/{bf16}{want['position']}"]
            assert (ours["columns"], ours["expected"]) == (want["vocab_index"], want["values"])
            assert ours["ids"] == case["token_ids"]
    hidden = shared_json("published/gemma_hs_gemma3_1b_it.json")["cases"][0]["hidden"]
    for after, want in zip(["embed", *(f"layers.{i}.out" for i in range(25)), "final_norm"], hidden, strict=True):
        ours = by_id[f"gemma-3-1b-it/2-plus-2/{after}"]
        assert (ours["at"] if after != "final_norm" else "final_norm") == after
        assert ours["expected"] == want["first_10"] + want["last_10"]
    for model in shared_json("published/config_and_param_counts.json")["models"]:
        name = model["model_id"].split()[0].removeprefix("google/")
        assert parameter_counts()[name][0] == model["published_parameters"]
        shape, config = SHAPES[name], model["config"]
        assert [shape[x] for x in "DFLNKH"] == [
            config[field]
            for field in (
                "hidden_size",
                "intermediate_size",
                "num_layers",
                "num_heads",
                "num_kv_heads",
                "head_dim",
            )
        ]


def test_published_texts_have_the_published_number_of_tokens(gemma_tokenizer):
    """Continuations are encoded here as the engines that wrote them decoded them. Gemma 3 has another tokenizer."""
    for figure in published():
        if figure.kind == "greedy_text" and figure.family != "gemma3" and "new_tokens" in figure.fields:
            for text in figure.fields["continuations"]:
                if isinstance(text, str):
                    ids = gemma_tokenizer.encode(text, control="markers")
                    assert len(ids) == figure.fields["new_tokens"], figure.id
    means = next(figure for figure in published() if figure.id == "gemma-2b/cover-drive/mean").fields
    assert len(gemma_tokenizer.encode(means["text"], bos=True)) == len(means["expected"])


def test_pieces_are_single_tokens(gemma_tokenizer):
    for figure in published():
        if figure.kind == "topk_prob" and figure.family == "gemma2":
            for piece in figure.fields["pieces"]:
                assert len(gemma_tokenizer.encode(piece, control="all")) == 1, (figure.id, piece)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not valid JSON"),
        ("[]", "is not a file of figures"),
        ('{"family": "x", "sources": {}, "tolerances": {}, "figures": [{"id": "a"}]}', "has no models, kind, source"),
        (
            '{"family": "gemma1", "sources": {"s": {"url": ""}}, "tolerances": {}, "figures":'
            ' [{"id": "a", "models": [], "kind": "entropy", "source": "s", "atol": "0"}]}',
            "figure a has atol '0': expected a number",
        ),
    ],
)
def test_a_broken_file_of_figures(tmp_path, text, words):
    (tmp_path / "figures.json").write_text(text)
    with pytest.raises(ValueError, match=words) as error:
        read_figures(tmp_path / "figures.json")
    assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="expected a JSON file of figures"):
        read_figures(tmp_path / "absent.json")


# Measuring, on a random model whose figures the truth gives.

TEXT = "the user was at the end of the world, and the answer is: hello hello."


@pytest.fixture(scope="module")
def model(small_tokenizer):
    return random_model(5, vocab_size=small_tokenizer.vocab_size, num_layers=2, num_tokens=4)


@pytest.fixture(scope="module")
def gemma(model, small_tokenizer, tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("published") / "random", model)
    shutil.copy(small_tokenizer.path, folder / "tokenizer.model")
    return refgemma.load(folder)


def problem(gemma, fields):
    """What is wrong with a figure given as a dict."""
    about = {"id": "a", "family": "gemma1", "models": (), "url": "", "note": "", "trust": "high", "reason": ""}
    computed_in = fields.get("computed_in", "float32")
    return measure(gemma, Figure(**about, kind=fields["kind"], computed_in=computed_in, fields=fields)).problem


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
    named = truth_row(model.params, model.config, np.array(ids), np.arange(len(ids)), bugs=bugs)
    hidden, stream = named["final_norm"], named["layers.0.out"]
    following = logprobs([*ids, *bare[:5]])[-5:]
    columns = [3, 5, 8]
    last = np.exp(logits(ids)[-1] / 2.0)
    last /= math.fsum(last)
    pieces = [" the", "."]
    likely = [last[tokenizer.encode(piece)[0]] for piece in pieces]
    surprise = -math.fsum(last * np.log2(last))
    end = bits_per_byte(bare, cap=30.0)
    block = {"at": "layers.0.out"}
    figures = [
        {"kind": "logit_mean", "ids": ids, "expected": logits(ids).mean(axis=-1), "atol": 0.002},
        {"kind": "logit_mean", "text": TEXT, "expected": logits(ids).mean(axis=-1), "atol": 0.002},
        {"kind": "logits_slice", "ids": ids, "position": 4, "columns": columns, "expected": logits(ids)[4, columns]},
        {"kind": "hidden_slice", "ids": ids, "position": 4, "columns": columns, "expected": hidden[4, columns]},
        {"kind": "hidden_slice", "ids": ids, "position": 4, "columns": columns, "expected": stream[4, columns]} | block,
        {"kind": "topk_prob", "text": TEXT, "temperature": 2.0, "pieces": pieces, "expected": likely, "atol": 1e-4},
        {"kind": "entropy", "text": TEXT, "temperature": 2.0, "expected": surprise, "atol": 0.002},
        {"kind": "token_logprob", "text": TEXT, "following": bare[:5], "expected": following, "atol": 0.15},
        {"kind": "token_logprob", "ids": ids, "first": 2, "expected": logprobs(ids)[1:], "atol": 0.15, "rtol": 0.05},
        {"kind": "cross_entropy", "text": TEXT, "bos": True, "expected": bits_per_byte(ids), "atol": 0.02},
        {"kind": "cross_entropy", "text": TEXT, "bos": False, "expected": bits_per_byte(bare), "atol": 0.02},
        {"kind": "cross_entropy", "text": TEXT, "bos": False, "final_cap": 30.0, "less_than": end + 1e-3},
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
    assert {figure["kind"] for figure in figures} == set(MEASURES)
    for figure in figures:
        assert problem(gemma, figure) is None
        complaint = problem(gemma, spoiled(figure))
        assert isinstance(complaint, str), figure
        assert "\n" not in complaint


@pytest.mark.parametrize("bug", ["A1", "B1", "B2", "C2", "C3", "D7", "E6"])
def test_the_checker_catches_a_wrong_model(gemma, model, small_tokenizer, bug):
    """Figures of a model with a known bug are not ours; a single mean or a text may be, by chance."""
    for figure in true_figures(model, small_tokenizer, bugs={bug}):
        if figure["kind"] in ("logit_mean", "logits_slice", "hidden_slice", "token_logprob"):
            assert problem(gemma, figure) is not None, figure["kind"]


def test_the_checker_catches_other_lengths_and_not_a_number(gemma, model, small_tokenizer):
    figure = true_figures(model, small_tokenizer)[0]
    assert "tokenised" in problem(gemma, figure | {"expected": figure["expected"][:-1]})
    assert problem(gemma, figure | {"expected": np.full_like(figure["expected"], np.nan)}) is not None
