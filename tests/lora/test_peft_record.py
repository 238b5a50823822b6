"""Adapters attached and merged against what PEFT computed for them, without torch; known bugs are rejected.

Sixteen small ones over PEFT's format (tests/goldens/peft_cases.json); tests/peers/test_peft.py has a hundred and more.
"""

import dataclasses
import json

import numpy as np
import pytest

from refgemma import lora
from refgemma.device import placed
from refgemma.numerics import FLOAT32, FLOAT64
from tests.judge import FLOAT64_BOUND, error
from tests.lora.peft_bugs import BUGS, subtract
from tests.lora.peft_folders import NARROW, write_adapter
from tests.lora.peft_judge import adapted, float32_bound, gemma_of, logits_of, stored_bytes
from tests.lora.peft_record import GOLDEN, REMAKE, recorded
from tests.models import map_params
from tests.tiny_it import sha256
from tests.truth import truth_logits

NAMES = [entry["name"] for entry in json.loads(GOLDEN.read_text(encoding="utf-8"))["cases"]]
BIASED = {"bias of the second factor"}


@pytest.fixture
def read(tmp_path):
    """Function that writes a case's folder and reads it."""

    def write_and_read(case, **how):
        return lora.read(write_adapter(tmp_path / "adapter", case.settings, case.tensors, case.dtype, **how))

    return write_and_read


@pytest.fixture
def gemma_on(xp):
    """`gemma_of`, with its weights in the arrays of each library in turn."""

    def gemma_on(model, *how):
        gemma = gemma_of(model, *how)
        return dataclasses.replace(gemma, params=placed(gemma.params, xp))

    return gemma_on


def apart(gemma, case):
    """Error of a model's logits against the record."""
    return error(case.kept(logits_of(gemma, case.model)), case.attached)


def test_the_record_is_whole():
    assert sha256(GOLDEN.with_suffix(".npz")) == json.loads(GOLDEN.read_text(encoding="utf-8"))["sha256"], REMAKE
    assert len(recorded()) >= 12
    for case in recorded().values():
        assert apart(gemma_of(case.model), case) > 1e-3  # none is about an adapter that does nothing


@pytest.mark.parametrize("name", NAMES)
def test_attached(read, gemma_on, name):
    case = recorded()[name]
    # Both sum in float64; an angle at a far position, rounded in another order, is off by 2e-13.
    assert apart(gemma_on(case.model).with_lora(read(case)), case) <= FLOAT64_BOUND
    assert apart(gemma_on(case.model, FLOAT32).with_lora(read(case)), case) <= float32_bound(case.attached_error)


@pytest.mark.parametrize("name", NAMES)
def test_the_name_of_the_adapter_in_the_file_changes_nothing(read, name):
    case = recorded()[name]
    want = logits_of(gemma_of(case.model).with_lora(read(case)), case.model)
    got = logits_of(gemma_of(case.model).with_lora(read(case, adapter_name="my-own")), case.model)
    assert np.array_equal(got, want)


@pytest.mark.parametrize("name", sorted(set(NAMES) - BIASED))
def test_merged(read, gemma_on, name):
    """PEFT's merge is its attached model in float64; in float32, merging rounds every weight once more."""
    case = recorded()[name]
    for numerics, bound in ((FLOAT64, FLOAT64_BOUND), (FLOAT32, 2 * float32_bound(case.attached_error))):
        assert apart(gemma_on(case.model, numerics).merge_lora(read(case)), case) <= bound


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", sorted(set(NAMES) - BIASED))
def test_unmerge_gives_the_very_bytes_and_subtraction_does_not(read, gemma_on, name, weights):
    case = recorded()[name]
    gemma = gemma_on(case.model, FLOAT32, weights)
    before, merged = stored_bytes(gemma.params), gemma.merge_lora(read(case))
    assert stored_bytes(merged.params) != before
    assert stored_bytes(gemma.params) == stored_bytes(merged.unmerge_lora().params) == before
    gemma = gemma_of(case.model, FLOAT32, weights)
    assert subtract(gemma, gemma.merge_lora(read(case)), gemma.with_lora(read(case)), weights) != before


@pytest.mark.parametrize("bug", BUGS)
def test_known_bugs_are_rejected(read, bug):
    seen = 0
    for case in recorded().values():
        wrong = BUGS[bug](gemma_of(case.model).with_lora(read(case)), case)
        if wrong is not None:
            seen += 1
            assert apart(wrong, case) > max(1000 * FLOAT64_BOUND, float32_bound(case.attached_error)), case
    assert seen >= 1


def test_the_truth_written_by_hand_has_the_embedding_of_peft(read):
    """And A5 planted in the truth itself, which has no adapters, only what is added to the table."""
    case = recorded()["embedding alone, tied"]
    base = "base_model.model.model."
    table = (
        case.tensors[base + "embed_tokens.lora_embedding_A"].T @ case.tensors[base + "embed_tokens.lora_embedding_B"].T
    )
    scale = case.settings["lora_alpha"] / case.settings["r"]
    params = map_params(lambda w: w.astype(np.float64), case.model.params)
    for i, layer in enumerate(params["layers"]):
        at = f"{base}layers.{i}.self_attn.v_proj."
        layer["attn"]["v"] += scale * case.tensors[at + "lora_B.weight"] @ case.tensors[at + "lora_A.weight"]
    for bugs, right in (((), True), (("A5",), False)):
        logits = truth_logits(
            params,
            case.model.config,
            case.model.tokens[:1],
            case.model.positions[:1],
            bugs=set(bugs),
            embed_delta=scale * table,
        )
        assert (error(logits[0, -len(case.attached) :], case.attached) <= FLOAT64_BOUND) == right


def test_an_adapter_twice_by_halves_is_the_adapter(read):
    """The table that PEFT writes beside its factors is not a change, so that two such adapters add up."""
    linear = [
        c for c in recorded().values() if not {"use_dora", "modules_to_save", "trainable_token_indices"} & {*c.settings}
    ]
    assert len(linear) >= 8
    for case in linear:
        adapter = read(case)
        assert apart(gemma_of(case.model).with_lora(adapter, 0.5).with_lora(adapter, 0.5), case) <= FLOAT64_BOUND
        assert apart(gemma_of(case.model).with_lora(adapter, 0.5), case) > 1e-3


def test_a_wide_file_on_bfloat16_weights(read):
    """A matrix trained whole, stored in float64, beside matrices kept in bfloat16 and activations in float32."""
    case = recorded()["norms and head trained whole"]
    model = dataclasses.replace(case.model, params=map_params(NARROW["bfloat16"], case.model.params))
    adapter = read(dataclasses.replace(case, dtype="float64"))
    narrow = logits_of(gemma_of(model, FLOAT32, "bfloat16").with_lora(adapter), model)
    assert error(narrow, logits_of(gemma_of(model).with_lora(adapter), model)) <= float32_bound(case.attached_error)


# ---- I6, I7: what matches nothing


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("target_modules", ["q_proj", "k_proj", "q_prj"]),
        ("target_modules", r".*\.q_prj"),
        ("rank_pattern", {"q_prj": 2}),
        ("alpha_pattern", {"q_prj": 20}),
        ("modules_to_save", ["input_norm"]),
        ("layers_to_transform", [0, 1, 7]),
    ],
)
def test_what_matches_nothing_is_refused(read, field, value):
    case = recorded()["all linear, rsLoRA, patterns"]
    settings = {**case.settings, "target_modules": ["q_proj", "k_proj"], field: value}
    with pytest.raises(ValueError, match=rf"{field} (names|has|'.*' matches no module)"):
        gemma_of(case.model).with_lora(read(dataclasses.replace(case, settings=settings)))


@pytest.mark.parametrize("prefix", ["model.", "language_model.", "base_model.", "base_model.model.model."])
def test_names_that_match_nothing_are_refused(read, prefix):
    case = recorded()["all linear, rsLoRA, patterns"]
    tensors = {prefix + name.removeprefix("base_model.model."): value for name, value in case.tensors.items()}
    with pytest.raises(ValueError, match="has no lora_A, which the configuration claims"):
        gemma_of(case.model).with_lora(read(dataclasses.replace(case, tensors=tensors)))


def test_an_adapter_is_on_the_operands_it_names(read):
    case = recorded()["expression, exclusion, fan_in_fan_out"]
    params = gemma_of(case.model).with_lora(read(case)).params
    assert sorted(adapted(params)) == sorted(f"layers.{i}.attn.{name}" for i in range(2) for name in "qkv")
