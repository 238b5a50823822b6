"""transformers loads the shipped model and answers, here and now: the record holds, and greedy answers are ours.

`pytest -m peers tests/peers/test_tiny_it_live.py -s` prints how far it is from the record.
"""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from tests.judge import error
from tests.models import map_params
from tests.peers.make_tiny_it_golden import DTYPES, load_peer, peer_logits
from tests.tiny_it import certificate, recorded, tiny_it

pytestmark = pytest.mark.peers

NAMES = [prompt["name"] for prompt in certificate()["prompts"]]
MAX_TOKENS = 48


@pytest.fixture(scope="module")
def peer():
    """transformers' model in a dtype, loaded once."""
    pytest.importorskip("torch", reason="needs torch: pip install refgemma[peers]")
    pytest.importorskip("transformers", reason="needs transformers: pip install refgemma[peers]")
    return cache(load_peer)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_record_is_what_transformers_computes_here(peer, dtype):
    for prompt in recorded().values():
        here = peer_logits(peer(dtype), prompt.tokens)[prompt.positions]
        to_record, to_truth = error(here, prompt.logits[dtype]), error(here, prompt.truth)
        print(f"\n{dtype} {prompt.name:9} to the record {to_record:.1e}, to the truth {to_truth:.1e}", end="")
        # Another processor sums in another order: it keeps to the same bound, and so differs from the record by no more
        # than twice that.
        assert to_truth <= prompt.bound(dtype)
        assert to_record <= 2 * prompt.bound(dtype)
        if dtype != "float64":  # it can fail: the next narrower dtype is beyond the bound
            assert to_truth > prompt.bound("float64" if dtype == "float32" else "float32")


@pytest.mark.parametrize("name", NAMES)
def test_greedy_answers_are_those_of_transformers(peer, name):
    theirs = greedy(peer("float32"), recorded()[name].tokens)
    ours = tiny_it().generate(recorded()[name].prompt, raw=recorded()[name].raw, temperature=0, max_tokens=MAX_TOKENS)
    assert first_real_difference(ours.tokens, theirs, recorded()[name]) is None


def test_a_wrong_answer_is_noticed(peer):
    """Norm gains w instead of 1 + w."""
    gemma, prompt = tiny_it(), recorded()["sum"]
    wrong = replace(gemma, params=map_params(lambda w: w - 1 if w.ndim == 1 else w, gemma.params))
    tokens = wrong.generate(prompt.prompt, temperature=0, max_tokens=MAX_TOKENS).tokens
    assert first_real_difference(tokens, greedy(peer("float32"), prompt.tokens), prompt) is not None


def greedy(peer, tokens):
    """Tokens that transformers' own `generate` appends."""
    import torch

    ids = torch.tensor([tokens])
    out = peer.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=MAX_TOKENS)
    return out[0, len(tokens) :].tolist()


def first_real_difference(ours, theirs, prompt):
    """Step at which two greedy answers part, unless the two tokens are a near-tie there; None if they do not."""
    steps = [t for t, (one, other) in enumerate(zip(ours, theirs, strict=False)) if one != other]
    if not steps:
        return None if len(ours) == len(theirs) else min(len(ours), len(theirs))
    t = steps[0]
    truth = tiny_it("float64").logits(prompt.tokens + ours[:t])[-1]
    # Each engine takes the token that it finds larger, and may be off by its float32 bound at either.
    bound = 2 * max(other.float32_bound for other in recorded().values()) * np.abs(truth).max()
    return None if abs(truth[ours[t]] - truth[theirs[t]]) <= bound else t
