"""Settings are checked at the door: what is kept is plain Python, what is refused is refused in one sentence."""

from dataclasses import FrozenInstanceError

import numpy as np
import pytest

from refgemma.sampling import SamplingParams


def test_defaults():
    assert vars(SamplingParams()) == {
        "temperature": 0.6,
        "top_k": None,
        "top_p": None,
        "repetition_penalty": 1.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "seed": None,
        "max_tokens": 256,
        "stop": (),
    }


@pytest.mark.parametrize(
    ("name", "given", "kept"),
    [
        ("temperature", np.float64(0.7), 0.7),
        ("temperature", np.float32(0.5), 0.5),
        ("temperature", np.int64(1), 1.0),
        ("temperature", 0, 0.0),
        ("top_p", np.float16(0.5), 0.5),
        ("top_p", 1, 1.0),
        ("top_k", np.int64(5), 5),
        ("top_k", np.uint8(1), 1),
        ("seed", np.uint64(2**64 - 1), 2**64 - 1),
        ("seed", 0, 0),
        ("max_tokens", np.int32(9), 9),
        ("frequency_penalty", -2, -2.0),
        ("presence_penalty", np.float64(-0.5), -0.5),
        ("repetition_penalty", 2, 2.0),
        ("stop", "END", ("END",)),
        ("stop", ["a", "b"], ("a", "b")),
        ("stop", (), ()),
    ],
)
def test_good_values_become_plain_python(name, given, kept):
    value = getattr(SamplingParams(**{name: given}), name)
    assert value == kept
    assert type(value) is type(kept)


NUMBERS = ("temperature", "top_p", "repetition_penalty", "frequency_penalty", "presence_penalty")
COUNTS = ("top_k", "seed", "max_tokens")


@pytest.mark.parametrize(
    ("name", "given"),
    [
        *(
            (name, bad)
            for name in NUMBERS
            for bad in (True, np.True_, "0.5", float("nan"), float("inf"), 10**400, [1.0], 1j)
        ),
        *((name, bad) for name in COUNTS for bad in (True, np.False_, "5", 5.0, np.float64(5), -1, [5])),
        *((name, None) for name in (*NUMBERS, "max_tokens") if name != "top_p"),
        ("temperature", -1e-9),
        ("top_p", -1e-9),
        ("top_p", 1 + 1e-9),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1),
        ("top_k", 0),
        ("max_tokens", 0),
        ("seed", 2**64),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", ["a", 5]),
        ("stop", None),
        ("stop", b"a"),
        ("stop", {"a"}),
    ],
)
def test_bad_values_are_one_clear_sentence(name, given):
    with pytest.raises(ValueError, match=rf"^{name} is .*: expected ") as caught:
        SamplingParams(**{name: given})
    message = str(caught.value)
    assert "\n" not in message
    assert repr(given) in message


def test_off_is_named_where_zero_is_tried():
    with pytest.raises(ValueError, match=r"top_k is 0: .*\(None is off\)"):
        SamplingParams(top_k=0)
    with pytest.raises(ValueError, match=r"repetition_penalty is 0: .*\(1 is off\)"):
        SamplingParams(repetition_penalty=0)
    with pytest.raises(ValueError, match="repetition_penalty is 0: "):
        SamplingParams(repetition_penalty=-0.0)


def test_settings_are_frozen_and_named():
    with pytest.raises(FrozenInstanceError):
        SamplingParams().temperature = 1.0
    with pytest.raises(TypeError):
        SamplingParams(0.7)
    with pytest.raises(TypeError, match="max_token"):
        SamplingParams(max_token=5)
