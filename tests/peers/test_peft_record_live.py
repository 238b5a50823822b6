"""The record of small adapters that the default tests use is what PEFT writes, and computes, here and now."""

import pytest

from tests.judge import FLOAT64_BOUND, error
from tests.lora.peft_folders import write_adapter
from tests.lora.peft_judge import float32_bound
from tests.lora.peft_record import recorded
from tests.peers.make_peft_golden import BASE, CASES

pytestmark = pytest.mark.peers


@pytest.fixture(scope="module")
def peft_side():
    pytest.importorskip("peft", reason="needs torch, transformers and peft: pip install refgemma[peers]")
    from tests.peers import peft_side

    return peft_side


@pytest.mark.parametrize("name", CASES)
def test_the_record_is_what_peft_computes_here(peft_side, tmp_path, name):
    case = recorded()[name]
    write_adapter(tmp_path, case.settings, case.tensors, case.dtype)
    for float64, bound in ((True, FLOAT64_BOUND), (False, float32_bound(case.attached_error))):
        here = peft_side.logits(peft_side.load(case.model, tmp_path, float64=float64), case.model)
        assert error(case.kept(here[case.model.real]), case.attached) <= bound


@pytest.mark.parametrize("name", CASES)
def test_the_record_holds_what_peft_writes_here(peft_side, tmp_path, name):
    case = recorded()[name]
    options = BASE | CASES[name][2]
    if options.get("trainable_token_indices"):
        options["trainable_token_indices"] = case.settings["trainable_token_indices"]
    settings, shapes = peft_side.what_peft_writes(case.model, options, tmp_path)
    assert {name: tuple(shape) for name, shape in shapes.items()} == {k: v.shape for k, v in case.tensors.items()}
    for field in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "modules_to_save", "trainable_token_indices"):
        assert settings[field] == case.settings.get(field, settings[field])
    assert sorted(settings["target_modules"]) == sorted(case.settings["target_modules"])  # PEFT writes a set
