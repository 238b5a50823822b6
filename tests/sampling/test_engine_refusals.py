"""What engines refuse, each in its own words, and what no engine can use."""

import numpy as np
import pytest

from refgemma.sampling.engines import ENGINES, Refused, find
from tests.sampling.test_engines import kept, of

REFUSED = [
    ("transformers", {"temperature": 0}, "transformers refuses temperature 0.0: .* do_sample=False"),
    (
        "transformers",
        {"frequency_penalty": 0.5},
        r"transformers has no frequency_penalty \(given 0.5\): leave it at 0.0",
    ),
    ("transformers", {"presence_penalty": 0.5}, "transformers has no presence_penalty"),
    ("transformers", {"penalty_window": 9}, r"transformers has no penalty_window \(given 9\): leave it at None"),
    ("transformers", {"typical_p": 0}, "transformers refuses typical_p 0.0"),
    ("vllm", {"top_p": 0}, r"vllm refuses top_p 0.0: it must be in \(0, 1\]"),
    ("vllm", {"temperature": 2.5}, r"vllm refuses temperature 2.5: it must be in \[0, 2\]"),
    ("vllm", {"frequency_penalty": -2.5}, r"vllm refuses frequency_penalty -2.5: it must be in \[-2, 2\]"),
    ("vllm", {"presence_penalty": 2.5}, "vllm refuses presence_penalty 2.5"),
    ("vllm", {"typical_p": 0.5}, "vllm has no typical_p"),
    ("gemma_pytorch", {"repetition_penalty": 1.5}, "gemma_pytorch has no repetition_penalty"),
    ("gemma_pytorch", {"banned": [1]}, r"gemma_pytorch has no banned \(given \(1,\)\): leave it at \(\)"),
    ("gemma_pytorch", {"min_p": 0.5}, "gemma_pytorch has no min_p"),
    ("deepmind", {"top_k": 2, "top_p": 0.5}, "google-deepmind/gemma cannot combine top_k and top_p"),
    ("deepmind", {"temperature": 0}, "google-deepmind/gemma divides by temperature 0: .* Greedy"),
    ("deepmind", {"top_k": 4}, "google-deepmind/gemma refuses top_k 4: there are 3 tokens"),
    ("deepmind", {"repetition_penalty": 1.5}, "google-deepmind/gemma has no repetition_penalty"),
    ("keras-hub", {"temperature": 0}, "keras-hub divides by temperature 0: .* GreedySampler"),
    ("keras-hub", {"top_k": 4}, "keras-hub refuses top_k 4: there are 3 tokens"),
    ("keras-hub", {"logit_bias": {0: 1.0}}, "keras-hub has no logit_bias"),
    ("gemma.cpp", {"temperature": 0}, "gemma.cpp gets no finite probabilities from its step temperature"),
    ("gemma.cpp", {"top_p": 0.5}, "gemma.cpp has no top_p"),
    ("gemma.cpp", {"top_k": 4}, "gemma.cpp refuses top_k 4: there are 3 tokens"),
    ("openai", {"top_p": 0.5}, "openai documents top_p .* neither its border nor its order"),
    ("openai", {"top_k": 2}, "openai has no top_k"),
    ("openai", {"repetition_penalty": 1.5}, "openai has no repetition_penalty"),
    ("openai", {"temperature": 2.5}, "openai refuses temperature 2.5: it must be between 0 and 2"),
    ("openai", {"presence_penalty": -2.5}, "openai refuses presence_penalty -2.5: it must be between -2 and 2"),
    ("openai", {"logit_bias": {0: 101.0}}, "openai refuses a logit_bias of 101.0: it must be between -100 and 100"),
]


@pytest.mark.parametrize(("name", "settings", "reason"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_an_engine_refuses_is_one_clear_sentence(name, settings, reason):
    with pytest.raises(Refused, match=f"^{reason}") as caught:
        of(name, [1.0, 2.0, 3.0], [0], [1], **settings)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_names_of_engines():
    assert find("vLLM") is ENGINES["vllm"]
    assert find("OpenAI") is ENGINES["openai"]
    assert find("DeepMind") is ENGINES["google-deepmind/gemma"]
    for name in ("vlm", "", None, 3):
        with pytest.raises(ValueError, match=r"unknown engine .*: expected one of refgemma, transformers, vllm,"):
            find(name)


@pytest.mark.parametrize("name", ENGINES)
def test_bad_input_is_not_the_engines_fault(name):
    for logits, reason in (
        ([1.0, np.nan], "^logits hold NaN"),
        ([-np.inf, -np.inf], "^logits are all minus infinity"),
        ([[1.0]], r"of shape \(1, 1\)"),
        ([], r"of shape \(0,\)"),
    ):
        with pytest.raises(ValueError, match=reason) as caught:
            of(name, np.array(logits, dtype=np.float64))
        assert not isinstance(caught.value, Refused)
    with pytest.raises(ValueError, match=r"^token id 9 of output_tokens is outside the vocabulary of 2"):
        of(name, [1.0, 2.0], [0], [9])
    with pytest.raises(TypeError, match=r"^prompt_tokens are"):
        of(name, [1.0, 2.0], ["a"])


def test_what_float32_cannot_hold_is_refused():
    assert kept("refgemma", [1e300, 0.0]) == [0, 1]
    with pytest.raises(Refused, match=r"^transformers gets no finite probabilities from its step logits"):
        of("transformers", [1e300, 0.0])
    with pytest.raises(Refused, match=r"^transformers gets no finite probabilities from its step temperature"):
        of("transformers", [1e5, 0.0], temperature=1e-36)


def test_a_token_removed_beforehand_stays_removed():
    for name in ENGINES:
        got = of(name, [-np.inf, 1.0, 2.0], temperature=0.9)
        assert got.kept.tolist() == [1, 2]
        assert got.probs[0] == 0
