"""Adapters of PEFT, attached and merged, against PEFT itself, live: random settings over all of its format.

Both sides read the same folder. PEFT says which tensors an adapter has; their values are drawn here, and none is what
PEFT starts from. In float64 PEFT wraps transformers' model with its narrow spots widened (tests/peers/eager.py).

`pytest -m peers tests/peers/test_peft.py -s` prints what was covered and how the errors compare.
"""

from collections import Counter

import numpy as np
import pytest

from refgemma.numerics import FLOAT32, FLOAT64
from tests.judge import FLOAT64_BOUND, UNIT, error
from tests.lora.peft_judge import float32_bound, gemma_of, logits_of
from tests.models import hf_tensors

pytestmark = pytest.mark.peers


def report(name, errors, unit=1.0):
    quantiles = ", ".join(f"{value / unit:.3g}" for value in np.percentile(errors, [0, 50, 90, 100]))
    print(f"\n{name}: {len(errors)} cases, least, median, 90 %, worst: {quantiles}", end="")


def features(case):
    """What of the format a case is about."""
    settings, names = case.settings, "".join(case.tensors)
    tokens = settings["trainable_token_indices"]
    found = {option for option, value in case.options.items() if value not in (None, False, "none", 0.0)}
    found |= {f"targets as {type(settings['target_modules']).__name__}"}
    found |= {f"target {name}" for name in ("lm_head.lora_A", "lora_embedding_A") if name in names}
    found |= {f"DoRA of {name}" for name in ("embed_tokens", "q_proj") if f"{name}.lora_magnitude" in names}
    found |= {f"saved {name}" for name in settings["modules_to_save"] or ()}
    found |= {f"tokens as {type(tokens).__name__}"} if tokens else set()
    tied = case.model.config.tie_word_embeddings
    tables = any(name in names for name in ("lm_head", "embed_tokens"))
    found |= {f"{'tied' if tied else 'untied'}{', tables changed' if tables else ''}"}
    return found


def test_the_cases_cover_the_format(peft_cases):
    counts = Counter(feature for case in peft_cases for feature in features(case))
    print(f"\n{dict(sorted(counts.items()))}")
    assert len(peft_cases) >= 100
    assert counts["saved norm"] >= 2
    assert counts["saved embed_tokens"] >= 2
    assert counts["saved mlp"] + counts["saved layers.0.mlp"] >= 2
    for feature in (
        *("targets as list", "targets as str", "exclude_modules", "use_rslora", "rank_pattern", "alpha_pattern"),
        *("layers_to_transform", "layers_pattern", "fan_in_fan_out", "bias", "lora_bias", "use_dora", "DoRA of q_proj"),
        *("modules_to_save", "tokens as list", "tokens as dict", "ensure_weight_tying", "target lm_head.lora_A"),
        *("target lora_embedding_A", "DoRA of embed_tokens", "tied, tables changed", "untied, tables changed"),
    ):
        assert counts[feature] >= 4, feature


def test_every_case_changes_its_model(peft_cases):
    """By at least a thousand times what any test here allows: none is about an adapter that does nothing."""
    changes = [error(logits_of(gemma_of(case.model), case.model), case.attached) for case in peft_cases]
    report("base against PEFT", changes)
    assert min(changes) > 1e-3


def test_attached_in_float64(peft_cases):
    # Both sum in float64. Positions reach 2000, where an angle rounded in another order is off by 2e-13.
    found = [logits_of(gemma_of(case.model).with_lora(case.adapter), case.model) for case in peft_cases]
    errors = [error(got, case.attached) for got, case in zip(found, peft_cases, strict=True)]
    report("attached, float64", errors)
    assert max(errors) <= FLOAT64_BOUND


def test_attached_in_float32(peft_cases):
    errors = []
    for case in peft_cases:
        got = logits_of(gemma_of(case.model, FLOAT32).with_lora(case.adapter), case.model)
        assert got.dtype == np.float32
        errors.append(error(got, case.attached))
        assert errors[-1] <= float32_bound(case.attached_error), case
    report("attached, float32, in 2**-24", errors, UNIT)
    report("PEFT", [case.attached_error for case in peft_cases], UNIT)


def test_merged_in_float64(peft_cases):
    """Against PEFT's merge, and against our own attached: the same numbers, so to both within the bound."""
    mergeable = [case for case in peft_cases if case.mergeable]
    assert len(mergeable) >= 100
    to_peft, to_attached = [], []
    for case in mergeable:
        got = logits_of(gemma_of(case.model).merge_lora(case.adapter), case.model)
        to_peft.append(error(got, case.merged))
        to_attached.append(error(got, logits_of(gemma_of(case.model).with_lora(case.adapter), case.model)))
    report("merged, float64", to_peft)
    report("merged against attached, float64", to_attached)
    assert max(to_peft + to_attached) <= FLOAT64_BOUND


def test_merged_in_float32(peft_cases):
    """The rounding of the weights comes on top; PEFT's merge has that, and its product's, so the rule is the same.

    Hence merged is within both bounds of attached.
    """
    errors = []
    for case in (case for case in peft_cases if case.mergeable):
        merged = logits_of(gemma_of(case.model, FLOAT32).merge_lora(case.adapter), case.model)
        attached = logits_of(gemma_of(case.model, FLOAT32).with_lora(case.adapter), case.model)
        bound = float32_bound(case.merged_error)
        errors.append(error(merged, case.merged))
        assert errors[-1] <= bound, case
        apart = np.abs(merged - attached).max() / np.abs(case.attached).max()
        assert apart <= bound + float32_bound(case.attached_error) + FLOAT64_BOUND, case
    report("merged, float32, in 2**-24", errors, UNIT)


def test_a_bias_is_not_merged(peft_cases):
    for case in (case for case in peft_cases if not case.mergeable):
        with pytest.raises(ValueError, match="no weight of Gemma has a place for one"):
            gemma_of(case.model).merge_lora(case.adapter)


@pytest.mark.parametrize("numerics", [FLOAT64, FLOAT32], ids=lambda numerics: numerics.name)
def test_merged_weights_are_those_of_peft_rounded_once(peft_cases, numerics):
    """Not only what they compute: PEFT's in float64, and in float32 the nearest to them."""
    from tests.peers import peft_side

    compared = 0
    for case in [case for case in peft_cases if case.mergeable][:60]:
        merged = peft_side.weights(peft_side.merged(peft_side.load(case.model, case.folder)))
        for name, got in hf_tensors(gemma_of(case.model, numerics).merge_lora(case.adapter).params).items():
            want = merged[name]
            assert got.dtype == numerics.dtype
            # Float64: products summed in another order. Float32: half a spacing, and what float64 left open.
            spacing = 0.0 if numerics is FLOAT64 else 0.5 * np.spacing(np.abs(want).astype(np.float32))
            assert np.all(np.abs(got - want) <= spacing + 1e-14 * np.abs(want).max()), (name, case)
            compared += 1
    print(f"\n{compared} weights in {numerics.name}", end="")
    assert compared >= 1000
