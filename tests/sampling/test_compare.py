"""Engines side by side: what the table says, and the step at which two of them part."""

import numpy as np
import pytest

import refgemma
from refgemma.sampling import SamplingParams
from refgemma.sampling.comparison import UNIT, agree, compare, parting, removed_at
from refgemma.sampling.engines import ENGINES, distribution


def logits_of(*probs):
    return np.log(np.array(probs, dtype=np.float64))


def compared(engines, logits, prompt=(), output=(), **settings):
    return compare(logits, SamplingParams(**{"temperature": 1.0} | settings), engines, prompt, output)


PROMPT, OUTPUT = [3, 3, 3], [0, 1]

PARTINGS = {
    # The order: .6 is all that P = .6 wants, but .473 at T = 2.
    "top_p": (["transformers", "llama.cpp"], logits_of(0.6, 0.3, 0.1), {"temperature": 2.0, "top_p": 0.59}),
    # The order: of what top-k left, .4 is .571.
    "top_p, k": (["transformers", "gemma_pytorch"], logits_of(0.1, 0.2, 0.3, 0.4), {"top_k": 2, "top_p": 0.5}),
    "top_p, not renormalised": (["vllm", "keras-hub"], logits_of(0.1, 0.2, 0.3, 0.4), {"top_k": 2, "top_p": 0.5}),
    # Equality.
    "top_p, equality": (["llama.cpp", "keras-hub"], np.zeros(8), {"top_p": 0.5}),
    "top_p, ties": (["refgemma", "deepmind"], np.zeros(8), {"top_p": 0.5}),
    # Three tie for two places; top-p then cuts both, but not to the same.
    "top_k": (["refgemma", "transformers"], np.array([2.0, 1, 1, 0]), {"top_k": 2}),
    "top_k, then top_p": (["refgemma", "transformers"], np.array([1.0, 1, 1, 0]), {"top_k": 2, "top_p": 0.5}),
    # vLLM's min-p leaves .5 and .3, so that top-p stops at .625.
    "top_p, min_p": (["transformers", "vllm"], logits_of(0.5, 0.3, 0.1, 0.1), {"top_p": 0.6, "min_p": 0.3}),
    # Prompt or output alone: the change is at the penalty, though tokens go at top-p.
    "frequency_penalty": (["vllm", "llama.cpp"], np.arange(4.0), {"frequency_penalty": 1.0, "top_p": 0.7}),
    "presence_penalty": (["refgemma", "llama.cpp"], np.arange(4.0), {"presence_penalty": 1.0}),
    "repetition_penalty": (
        ["transformers", "llama.cpp"],
        np.arange(1.0, 5.0),
        {"repetition_penalty": 1.5, "top_k": 4},
    ),
    # The same tokens, other probabilities; and the orders differ.
    "temperature": (["transformers", "gemma.cpp"], logits_of(0.1, 0.2, 0.3, 0.4), {"temperature": 0.5, "top_k": 3}),
    "temperature, raised": (["refgemma", "vllm"], np.array([1.0, 1.01]), {"temperature": 0.005}),
}


@pytest.mark.parametrize("case", PARTINGS)
def test_the_step_at_which_engines_part(case):
    engines, logits, settings = PARTINGS[case]
    prompt = PROMPT if "repetition_penalty" not in case else [0, *[3] * 64]  # beyond a window of 64
    step = case.partition(",")[0]
    if "penalty" not in case:
        prompt, output = [], []
    else:
        output = OUTPUT if "repetition" not in case else []
    for names in (engines, engines[::-1]):
        result = compared(names, logits, prompt, output, **settings)
        (found,) = result.partings
        assert found.step == step
        assert found.engines == tuple(result.distributions)
        for name, rule in zip(found.engines, found.rules, strict=True):
            states = {state.name: state.rule for state in result.distributions[name].states}
            assert rule == states[step]
        one, other = (set(d.kept.tolist()) for d in result.distributions.values())
        assert [set(ids) for ids in found.kept_by_one] == [one - other, other - one]
        assert f"part at {step}." in str(found)


@pytest.mark.parametrize(
    ("engines", "settings"),
    [
        (["transformers", "llama.cpp"], {"temperature": 0.6, "top_k": 5}),  # in another order, with the same end
        (
            ["refgemma", "transformers", "vllm"],
            {"temperature": 0.6, "top_k": 5, "top_p": 0.8, "repetition_penalty": 1.2},
        ),
        (["refgemma", "transformers", "llama.cpp"], {"min_p": 0.1, "temperature": 1.0}),
        (["refgemma", "gemma_pytorch", "keras-hub", "deepmind"], {"temperature": 1.5, "top_p": 0.77}),
        (["refgemma", "vllm", "openai"], {"frequency_penalty": 0.5, "presence_penalty": 0.5, "temperature": 0.9}),
        (["refgemma", "gemma.cpp", "gemma_pytorch", "keras-hub", "deepmind"], {"top_k": 7}),
        (["refgemma", "vllm", "llama.cpp", "gemma_pytorch", "openai"], {"temperature": 0.0}),
        (["refgemma", "transformers"], {"temperature": 0.05}),  # logits of size 200: 1e-5 in a probability is rounding
    ],
)
def test_engines_that_agree_but_for_rounding(engines, settings):
    rng = np.random.default_rng(12)
    for _ in range(20):
        result = compared(engines, rng.normal(size=50) * 4, [], [1, 1, 2], **settings)
        assert result.partings == ()
        assert result.refusals == {}
        assert str(result).endswith("They agree: the same tokens, and the same probabilities but for rounding.")


def test_a_difference_above_rounding_is_seen():
    """Logits of size 10 pass at most 16 units each and in the mean: 2**-24 * 16 * 20, that is 2e-5, is agreement."""
    logits = np.random.default_rng(2).normal(size=100)
    logits[0] = 10.0
    one = distribution("refgemma", logits, SamplingParams(temperature=1.0))
    for shift, same in ((UNIT * 10, True), (2e-4, False)):
        moved = logits.copy()
        moved[1:] += shift
        other = distribution("transformers", moved, SamplingParams(temperature=1.0))
        assert agree(one.states[-1], other.states[-1]) is same
        found = parting(one, other)
        assert (found is None) if same else (found.step == "logits")


def test_a_removed_giant_does_not_blur_the_comparison():
    """A bias of minus a billion is how some engines ban a token: its rounding must not excuse the others."""
    logits = np.array([1.0, 2.0, -1e9])
    assert compared(["refgemma", "gemma.cpp"], logits, temperature=0.9).partings[0].step == "temperature"


def test_the_table():
    result = compared(["transformers", "llama.cpp"], logits_of(0.6, 0.3, 0.1), temperature=2.0, top_p=0.59)
    lines = str(result).splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["token", "logit", "transformers", "llama.cpp"],
        ["0", "-0.5108", "0.585786", "1.000000"],
        ["1", "-1.2040", "0.414214", "out", "at", "top_p"],
    ]
    assert lines[4].split() == ["kept", "2", "of", "3", "1", "of", "3"]
    assert len({len(line) for line in lines[:5]}) == 1
    assert lines[5] == "transformers and llama.cpp part at top_p."
    assert lines[6].endswith("(top_p = 0.59). Its order: temperature, top_p.")
    assert lines[7].endswith("(top_p = 0.59). Its order: top_p, temperature.")
    assert lines[8:] == [
        "  In the end only transformers keeps 1.",
        "  The tokens more likely than 1 hold 0.4727339 with transformers, 0.6000000 with llama.cpp.",
    ]
    assert repr(result) == str(result)


def test_the_note_gives_mass_as_the_engine_sees_it():
    result = compared(["transformers", "keras-hub"], logits_of(0.1, 0.2, 0.3, 0.4), top_k=2, top_p=0.5)
    assert result.partings[0].note == (
        "The tokens more likely than 2 hold 0.5714286 with transformers, 0.4000000 with keras-hub."
    )


def test_the_note_says_that_tokens_tie():
    result = compared(["refgemma", "transformers"], np.array([2.0, 1.0, 1.0]), top_p=0.7)
    assert [d.kept.tolist() for d in result.distributions.values()] == [[0, 1], [0, 2]]
    assert result.partings[0].note == "Tokens 1 and 2 are equally likely: which of them stays is a matter of sorting."


def test_a_large_vocabulary_shows_the_likely_and_the_disputed():
    logits = np.random.default_rng(6).normal(size=5000)
    logits[4321] = 12.0
    result = compared(["transformers", "llama.cpp", "openai"], logits, temperature=3.0, top_p=0.3)
    lines = str(result).splitlines()
    assert lines[1].split()[0] == "4321"
    assert any("out at top_p" in line and "0.0" in line for line in lines[1:13])
    assert "(4988 more tokens)" in lines
    assert any(" more." in line for line in lines)
    assert "openai documents top_p" in str(result)


def test_engines_that_refuse_are_reported():
    result = compared(["transformers", "vllm", "deepmind", "refgemma"], np.arange(3.0), temperature=0.0)
    assert list(result.distributions) == ["vllm", "refgemma"]
    assert list(result.refusals) == ["transformers", "google-deepmind/gemma"]
    assert "transformers refuses temperature 0.0" in str(result)
    everyone = compared(["transformers", "keras-hub"], np.arange(3.0), temperature=0.0)
    assert everyone.distributions == {}
    assert everyone.partings == ()
    assert "keras-hub divides by temperature 0" in str(everyone)
    assert str(everyone).splitlines() == [f"{reason}." for reason in everyone.refusals.values()]


def test_the_package_itself_compares():
    logits, params = logits_of(0.6, 0.3, 0.1), SamplingParams(temperature=2.0, top_p=0.59)
    result = refgemma.sampling.compare(logits, params, ["transformers", "llama.cpp"])
    assert {name: d.kept.tolist() for name, d in result.distributions.items()} == {
        "transformers": [0, 1],
        "llama.cpp": [0],
    }
    # By hand: at temperature 2 the roots of .6 and .3 share what is left, 1 / (1 + 2**-.5) of it the first. 1e-6: some
    # float32 roundings of 6e-8 each.
    np.testing.assert_allclose(result.distributions["transformers"].probs[:2], [0.585786, 0.414214], atol=1e-6)
    assert result.distributions["llama.cpp"].probs.tolist() == [1, 0, 0]
    assert [found.step for found in result.partings] == ["top_p"]


def test_long_numbers_keep_the_table_narrow():
    lines = str(compared(["refgemma", "transformers"], np.array([1e38, -123456.75, -1e38]))).splitlines()
    assert [line.split()[1] for line in lines[1:4]] == ["1e+38", "-123456.7500", "-1e+38"]


def test_the_others_are_held_against_the_first():
    result = compared(["refgemma", "transformers", "gemma_pytorch", "keras-hub"], np.zeros(8), top_p=0.5)
    assert [found.engines for found in result.partings] == [
        ("refgemma", name) for name in ("transformers", "gemma_pytorch", "keras-hub")
    ]


def test_where_a_token_went():
    params = SamplingParams(temperature=1.0, top_k=3, top_p=0.7)
    got = distribution("refgemma", np.array([3.0, 2.0, 1.0, 0.0, -np.inf]), params)
    assert [removed_at(got, token) for token in range(5)] == [None, None, "top_p", "top_k", "logits"]


@pytest.mark.parametrize(
    "engines", ["vllm", ["vllm"], [], ["vllm", "vLLM"], None, 3, ["deepmind", "google-deepmind/gemma"]]
)
def test_two_different_engines_are_wanted(engines):
    with pytest.raises(ValueError, match=r"^engines are .*: expected two or more of refgemma, .*, each once"):
        compared(engines, np.zeros(3))


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="unknown engine 'vlm'"):
        compared(["vlm", "refgemma"], np.zeros(3))
    with pytest.raises(ValueError, match="logits hold NaN"):
        compared(["vllm", "refgemma"], np.array([np.nan]))


def test_any_two_engines_can_be_compared():
    rng = np.random.default_rng(30)
    for _ in range(30):
        settings = {"temperature": float(rng.choice([0.0, 0.5, 1.0, 3.0]))}
        for name, value in (("top_k", int(rng.integers(1, 9))), ("top_p", float(rng.random())), ("min_p", 0.2)):
            if rng.random() < 0.5:
                settings[name] = value
        logits = rng.integers(-3, 4, size=8).astype(np.float64)
        for first in ENGINES:
            result = compared([first, *(name for name in ENGINES if name != first)], logits, [1], [2], **settings)
            assert len(result.distributions) + len(result.refusals) == len(ENGINES)
            for found in result.partings:
                assert found.step in {
                    state.name for name in found.engines for state in result.distributions[name].states
                }
            assert str(result)
