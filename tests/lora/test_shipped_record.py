"""The shipped adapters, attached and merged, against what PEFT computes with the same files."""

import pytest

from refgemma import lora
from tests.judge import FLOAT64_BOUND, error
from tests.lora.peft_bugs import BUGS
from tests.lora.shipped_record import ADAPTERS, GOLDEN, POSITIONS, REMAKE, certificate, hashes, records
from tests.tiny_it import sha256, tiny_it

RECORDS = list(records()) if GOLDEN.exists() else []  # the first test says so
ADAPTER_NAMES = sorted({adapter for adapter, _ in RECORDS})


def adapter_of(record):
    return lora.read(ADAPTERS / record.adapter)


def apart(gemma, record):
    return error(gemma.logits(record.tokens)[-POSITIONS:], record.logits)


def test_the_record_is_about_these_files():
    assert GOLDEN.exists(), REMAKE
    assert sorted(path.parent.name for path in ADAPTERS.glob("*/adapter_config.json")) == ADAPTER_NAMES, REMAKE
    assert hashes(ADAPTER_NAMES) == certificate()["files_sha256"], REMAKE
    assert sha256(GOLDEN.with_suffix(".npz")) == certificate()["sha256"], REMAKE


@pytest.mark.parametrize("key", RECORDS)
def test_logits(key, xp):
    """Float64: both round at 1e-16, over six layers. Float32, and bfloat16 as stored: the float32 bound of PEFT."""
    record = records()[key]
    for numerics, weights in (("float64", None), ("float32", None), ("float32", "bfloat16")):
        bound = FLOAT64_BOUND if numerics == "float64" else record.float32_bound("attached")
        assert apart(tiny_it(numerics, weights, xp).with_lora(adapter_of(record)), record) <= bound
    for numerics in ("float64", "float32"):  # bfloat16 would lose some of the change: see `lora.audit`
        bound = FLOAT64_BOUND if numerics == "float64" else record.float32_bound("merged")
        assert apart(tiny_it(numerics, None, xp).merge_lora(adapter_of(record)), record) <= bound


@pytest.mark.parametrize("key", RECORDS)
def test_answers(key, xp):
    """Greedy, and no decision is so near to another that float32 could turn it."""
    record = records()[key]
    assert record.margin > 4 * record.float32_bound("attached")
    gemma = tiny_it(xp=xp).with_lora(adapter_of(record))
    assert gemma.generate(record.prompt, temperature=0, max_tokens=len(record.answer)).tokens == record.answer
    assert tiny_it().generate(record.prompt, temperature=0, max_tokens=len(record.answer)).tokens != record.answer


@pytest.mark.parametrize("adapter", ADAPTER_NAMES)
def test_known_bugs_are_rejected(adapter):
    """Those that can be planted in this adapter."""
    record = records()[adapter, "sum"]
    gemma = tiny_it("float64").with_lora(adapter_of(record))
    case = Case(adapter_of(record).config, gemma)
    planted = {bug: plant(gemma, case) for bug, plant in BUGS.items()}
    seen = [bug for bug, wrong in planted.items() if wrong is not None]
    assert "I6 nothing matches, the base answers" in seen
    assert "I3 scale alpha" in seen
    for bug in seen:
        assert apart(planted[bug], record) > max(1000 * FLOAT64_BOUND, record.float32_bound("attached")), bug


class Case:
    """What the planted bugs ask of a case."""

    def __init__(self, config, model):
        self.settings, self.model = {"use_rslora": config.use_rslora}, model
