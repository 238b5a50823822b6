"""Known mistakes of LoRA code, to plant in the reference: a comparison that misses them is worth nothing.

Names as in the project's catalogue of known bugs. Each is a function of a `Gemma` with an adapter on it and of the case
(its model and settings); it gives the Gemma with the mistake, or None where the mistake would change nothing.
"""

from dataclasses import replace

import numpy as np

from refgemma.lora.merge import materialise
from refgemma.numerics import Bfloat16Matrix, from_bfloat16, to_bfloat16
from refgemma.ops.linear import Adapted
from tests.lora.peft_judge import adapted, map_operands, operands, stored_bytes


def with_deltas(change):
    """Function of (gemma, case) that changes every delta, or None where nothing is changed."""

    def plant(gemma, case):
        seen = []

        def planted(path, operand):
            if not isinstance(operand, Adapted):
                return operand
            deltas = tuple(change(path, operand, delta, case) for delta in operand.deltas)
            seen.extend(new is not old for new, old in zip(deltas, operand.deltas, strict=True))
            return Adapted(operand.base, deltas)

        params = map_operands(planted, gemma.params)
        return replace(gemma, params=params) if any(seen) else None

    return plant


def is_rows(delta):
    """Whether a delta only replaces rows of a table."""
    return set(np.unique(delta.b)) <= {0, 1} or set(np.unique(delta.a)) <= {0, 1}


def unscaled_embedding(path, operand, delta, case):
    return replace(delta, scale=delta.scale / case.model.config.hidden_size**0.5) if path == "embed" else delta


def scaled_by(power):
    """Alpha over another power of the rank."""

    def change(path, operand, delta, case):
        rank = len(delta.a)
        own = 0.5 if case.settings.get("use_rslora") else 1.0
        if is_rows(delta) or rank == 1 or own == power:
            return delta
        return replace(delta, scale=delta.scale * float(rank) ** (own - power))

    return change


def transposed_factors(path, operand, delta, case):
    """Where they are square, so that no shape tells."""
    a, b = (w.T if w.shape[0] == w.shape[1] else w for w in (delta.a, delta.b))
    return delta if a is delta.a and b is delta.b else replace(delta, a=a, b=b)


def transposed_product(path, operand, delta, case):
    """fan_in_fan_out taken at its word: B A transposed, where the weight is square."""
    if operand.shape[0] != operand.shape[1] or is_rows(delta) or path == "embed":
        return delta
    return replace(delta, a=delta.b.T, b=delta.a.T)


def no_magnitude(path, operand, delta, case):
    return delta if delta.gain is None else replace(delta, gain=None)


def norm_of_the_base(path, operand, delta, case):
    """DoRA's gain from the norms of the weight as it was."""
    if delta.gain is None:
        return delta
    up, down = (delta.a.T, delta.b.T) if path == "embed" else (delta.b, delta.a)
    axis = 0 if path == "embed" else 1
    norms = [np.linalg.norm(w, axis=axis) for w in (operand.base + delta.scale * up @ down, operand.base)]
    return replace(delta, gain=delta.gain * norms[0] / norms[1])


def head_in_the_embedding(gemma, case):
    """A tied head takes the embedding along."""
    head = gemma.params["head"]
    base = gemma.before.params["embed"]
    if not case.model.config.tie_word_embeddings or gemma.params["embed"] is not base or head is base:
        return None
    table = head
    if isinstance(head, Adapted):  # one that is looked up holds its factors transposed
        if head.deltas[0].bias is not None or head.deltas[0].gain is not None:
            return None
        table = Adapted(head.base, tuple(replace(delta, a=delta.b.T, b=delta.a.T) for delta in head.deltas))
    return replace(gemma, params={**gemma.params, "embed": table})


def head_of_the_base(gemma, case):
    """A trained head is lost when the adapter is read back."""
    base = gemma.before.params["head"]
    return None if gemma.params["head"] is base else replace(gemma, params={**gemma.params, "head": base})


BUGS = {
    "A5 the embedding's delta is not scaled by sqrt(D)": with_deltas(unscaled_embedding),
    "I3 scale alpha / r for alpha / sqrt(r)": with_deltas(scaled_by(1.0)),
    "I3 scale alpha / sqrt(r) for alpha / r": with_deltas(scaled_by(0.5)),
    "I3 scale alpha": with_deltas(scaled_by(0.0)),
    "I4 square factors transposed": with_deltas(transposed_factors),
    "I4 product transposed where the weight is square": with_deltas(transposed_product),
    "I5 a change of the tied head is in the embedding": head_in_the_embedding,
    "I5 the trained head is lost": head_of_the_base,
    "I6 nothing matches, the base answers": lambda gemma, case: gemma.before,
    "I8 DoRA's magnitudes are ignored": with_deltas(no_magnitude),
    "I8 DoRA's norms are those of the base": with_deltas(norm_of_the_base),
}


# ---- I2: unmerge by subtraction


def subtract(gemma, merged, attached, weights):
    """Bytes after taking the changes from the merged weights again, in the format they are kept in."""
    before, after = operands(gemma.params), operands(merged.params)
    got = stored_bytes(gemma.params)
    for path, operand in adapted(attached.params).items():
        change = materialise(operand, "float64", table=path == "embed") - wide(before[path])
        got[path] = narrow(wide(after[path]) - wide(narrow(change, weights)), weights).tobytes()
    return got


def wide(w):
    if isinstance(w, Bfloat16Matrix):
        w = w.bits
    return (from_bfloat16(w) if w.dtype == np.uint16 else w).astype(np.float64)


def narrow(w, weights):
    return to_bfloat16(w.astype(np.float32)) if weights == "bfloat16" else w.astype(weights)
