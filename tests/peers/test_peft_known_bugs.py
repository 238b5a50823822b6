"""The comparison with PEFT is strict: known mistakes of LoRA code, each planted in the reference, fail its assertions.

Names as in the project's catalogue of known bugs. Each is planted in every case that it concerns.
"""

import json

import numpy as np
import pytest

from refgemma import lora
from refgemma.numerics import FLOAT32
from tests.judge import FLOAT64_BOUND, error
from tests.lora.peft_bugs import BUGS, subtract
from tests.lora.peft_folders import PREFIX, write_adapter
from tests.lora.peft_judge import float32_bound, gemma_of, logits_of, stored_bytes

pytestmark = pytest.mark.peers

LEAST = {"A5": 20, "I3": 20, "I4": 5, "I5": 5, "I6": 100, "I8": 30}  # cases that each must be seen in


@pytest.mark.parametrize("bug", BUGS)
def test_it_is_rejected(peft_cases, bug):
    """In float64 by its bound, and by the float32 bound as well: none hides in rounding."""
    errors = []
    for case in peft_cases:
        wrong = BUGS[bug](gemma_of(case.model).with_lora(case.adapter), case)
        if wrong is None:
            continue
        errors.append(error(logits_of(wrong, case.model), case.attached))
        assert errors[-1] > 1000 * FLOAT64_BOUND, case
        assert errors[-1] > float32_bound(case.attached_error), case
    print(f"\n{bug}: {len(errors)} cases, least error {min(errors):.1e}", end="")
    assert len(errors) >= LEAST[bug.split()[0]]


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "float16"])
def test_unmerge_gives_the_very_bytes_and_subtraction_does_not(peft_cases, weights):
    subtracted, exact = 0, 0
    for case in [case for case in peft_cases if case.mergeable]:
        gemma = gemma_of(case.model, FLOAT32, weights)
        before = stored_bytes(gemma.params)
        merged = gemma.merge_lora(case.adapter)
        after = stored_bytes(merged.params)
        assert stored_bytes(gemma.params) == before  # merging does not touch what is merged into
        assert after != before
        assert stored_bytes(merged.unmerge_lora().params) == before
        exact += 1
        subtracted += subtract(gemma, merged, gemma.with_lora(case.adapter), weights) != before
    print(f"\n{weights}: {exact} exact; by subtraction {subtracted} came back changed", end="")
    assert exact >= 100
    assert subtracted >= 0.9 * exact


# ---- I6, I7: what PEFT passes over in silence is an error here


def test_names_of_another_model_are_refused(peft_cases, tmp_path):
    for number, case in enumerate(peft_cases[:20]):
        for prefix in ("model.", "language_model.", "base_model.", "base_model.model.model."):
            renamed = {prefix + name.removeprefix(PREFIX): value for name, value in case.tensors.items()}
            folder = write_adapter(tmp_path / f"{number}", case.settings, renamed, case.dtype)
            with pytest.raises(ValueError, match=r"does not fit the model|is not a tensor of a LoRA adapter"):
                gemma_of(case.model).with_lora(lora.read(folder))


def test_names_with_that_of_the_adapter_are_the_same(peft_cases, tmp_path):
    for number, case in enumerate(peft_cases[:40]):
        want = logits_of(gemma_of(case.model).with_lora(case.adapter), case.model)
        for name in ("default", "my-pirate_2"):
            folder = write_adapter(tmp_path / f"{number}", case.settings, case.tensors, case.dtype, adapter_name=name)
            got = logits_of(gemma_of(case.model).with_lora(lora.read(folder)), case.model)
            assert np.array_equal(got, want)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("target_modules", "q_prj"),
        ("rank_pattern", {"q_prj": 3}),
        ("alpha_pattern", {r"layers\.99\..*": 32}),
        ("modules_to_save", "input_layer_norm"),
        ("layers_to_transform", 99),
    ],
)
def test_what_matches_nothing_is_refused_where_peft_passes_over_it(peft_cases, tmp_path, field, value):
    from tests.peers import peft_side

    passed = 0
    for number, case in enumerate(peft_cases):
        settings = json.loads(json.dumps(case.settings))
        old = settings[field]
        if isinstance(value, dict):
            settings[field] = {**(old or {}), **value}
        elif field == "layers_to_transform":
            if not isinstance(old, list):
                continue
            settings[field] = [*old, value]
        elif isinstance(settings["target_modules"], list) or field != "target_modules":
            settings[field] = [*(old or []), value]
        else:
            continue
        folder = write_adapter(tmp_path / f"{number}", settings, case.tensors, case.dtype)
        with pytest.raises(ValueError, match=f"{field} (has|names) "):
            gemma_of(case.model).with_lora(lora.read(folder))
        loaded = peft_side.logits(peft_side.load(case.model, folder), case.model)[case.model.real]
        assert np.array_equal(loaded, case.attached)  # PEFT reports nothing, and computes the same as without it
        passed += 1
        if passed == 8:
            break
    assert passed >= 3
