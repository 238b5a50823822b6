"""Whether a loaded model gives a published figure: one function a kind of figure, described in gemma1_figures.json."""

import json
import math
from pathlib import Path

import numpy as np

from refgemma.cache import KVCache
from refgemma.model import forward

FOLDER = Path(__file__).parent
CHUNK = 256  # tokens whose logits are held at once: 260 MB at V = 256,000

# How far below our best logit a published token may be, by the format its engine computed in. bfloat16 is spaced by
# 0.125 to 0.25 for logits of 16 to 64, two of them are compared, and the layers before add as much again: five runs of
# one request differ by 0.1. float16 is 8 times finer; float32 leaves the order of summation, over 18 layers.
NEAR_TIE = {"float32": 0.02, "float16": 0.1, "bfloat16": 0.5, "8-bit weights": 0.5, "unknown": 0.5}


def read(name):
    """A JSON file of this folder."""
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


def problem(gemma, figure):
    """What is wrong with a figure on this model, in a sentence, or None."""
    return CHECKS[figure["kind"]](gemma, figure)


def ids_of(gemma, figure, *, bos=True):
    """The token ids a figure is about; its text is plain except for markup tags."""
    if "ids" in figure:
        return figure["ids"]
    text = read("texts.json")["texts"][figure["text_ref"]] if "text_ref" in figure else figure["text"]
    return gemma.tokenizer.encode(text, bos=bos, control="markers")


def difference(got, figure):
    """A sentence if the numbers differ by more than atol + rtol * |expected|."""
    want = np.asarray(figure["expected"], dtype=np.float64)
    got = np.asarray(got, dtype=np.float64)
    if got.shape != want.shape:
        return f"{got.size} numbers, {want.size} published: the text may be tokenised differently"
    excess = np.abs(got - want) - (figure["atol"] + figure.get("rtol", 0) * np.abs(want))
    if np.all(excess <= 0):
        return None
    worst = int(np.argmax(np.where(np.isnan(excess), np.inf, excess)))
    return f"number {worst} is {got.flat[worst]:.6g}, published {want.flat[worst]:.6g}, tolerance {figure['atol']}"


def logit_mean(gemma, figure):
    """Mean over the vocabulary, at every position."""
    return difference(gemma.logits(ids_of(gemma, figure)).mean(axis=-1, dtype=np.float64), figure)


def logits_slice(gemma, figure):
    """Some logits at one position."""
    return difference(gemma.logits(ids_of(gemma, figure))[figure["position"], figure["columns"]], figure)


def hidden_slice(gemma, figure):
    """Some components after the final norm, at one position."""
    seen = {}

    def tap(name, value):
        seen[name] = value
        return value

    tokens = np.array([ids_of(gemma, figure)])
    forward(gemma.params, gemma.config, tokens, numerics=gemma.numerics, tap=tap)
    return difference(seen["final_norm"][0, figure["position"], figure["columns"]], figure)


def token_logprob(gemma, figure):
    """Natural log-probability of each id from `first` on."""
    ids = ids_of(gemma, figure)
    return difference(logprobs_of(gemma, ids)[figure["first"] - 1 :], figure)


def cross_entropy(gemma, figure):
    """Bits per byte of a text, log2(V) standing for the first id."""
    text = read("texts.json")["texts"][figure["text_ref"]]
    if figure["bos"] and "final_cap" not in figure:
        logprobs = gemma.score(text).logprobs
    else:
        ids = ids_of(gemma, figure, bos=figure["bos"])
        logprobs = logprobs_of(gemma, ids, final_cap=figure.get("final_cap"))
    nats = math.log(gemma.config.vocab_size) - np.maximum(logprobs, -64).sum()
    bits_per_byte = nats / math.log(2) / len(text.encode("utf-8"))
    if "less_than" in figure:
        return (
            None if bits_per_byte < figure["less_than"] else f"{bits_per_byte:.4f} is not below {figure['less_than']}"
        )
    return difference([bits_per_byte], figure | {"expected": [figure["expected"]]})


def greedy_text(gemma, figure):
    """One of the continuations is ours: each token our best, or so close to it that the engine's rounding decided."""
    prompt = ids_of(gemma, figure)
    complaints = []
    for text in figure["continuations"]:
        ids = gemma.tokenizer.encode(text, control="markers") if isinstance(text, str) else text
        logits = gemma.logits([*prompt, *ids])[len(prompt) - 1 : -1]
        behind = logits.max(axis=-1) - logits[np.arange(len(ids)), ids]
        wrong = np.flatnonzero(~(behind <= NEAR_TIE[figure["computed_in"]]))
        if wrong.size == 0:
            return None
        first = wrong[0]
        ours = gemma.tokenizer.decode([int(logits[first].argmax())])
        theirs = gemma.tokenizer.decode([ids[first]])
        complaints.append(
            f"{first} leading tokens of {len(ids)} agree, then {theirs!r} is {behind[first]:.3g} behind our {ours!r}"
        )
    return "; ".join(complaints)


def reply_contains(gemma, figure):
    """A string occurs in the greedy continuation of a bare question."""
    reply = gemma.generate(figure["text"], raw=True, temperature=0.0, max_tokens=figure["max_tokens"]).text
    return None if figure["expected"] in reply else f"{figure['expected']!r} is not in the reply {reply!r}"


def logprobs_of(gemma, ids, *, final_cap=None):
    """Natural log-probability of ids[1:], each given all before it, (T - 1,)."""
    tokens, logprobs = np.array([ids]), []
    cache = KVCache(gemma.config, batch=1, capacity=len(ids), dtype=gemma.numerics.dtype)
    for start in range(0, len(ids) - 1, CHUNK):
        chunk = tokens[:, start : start + CHUNK]
        logits = forward(gemma.params, gemma.config, chunk, cache=cache, numerics=gemma.numerics)[0].astype(np.float64)
        if final_cap is not None:
            logits = final_cap * np.tanh(logits / final_cap)
        following = tokens[0, start + 1 : start + 1 + CHUNK]
        logits = logits[: len(following)]
        top = logits.max(axis=-1)
        total = top + np.log(np.exp(logits - top[:, None]).sum(axis=-1))
        logprobs.append(logits[np.arange(len(following)), following] - total)
    return np.concatenate(logprobs)


CHECKS = {
    check.__name__: check
    for check in (logit_mean, logits_slice, hidden_slice, token_logprob, cross_entropy, greedy_text, reply_contains)
}
