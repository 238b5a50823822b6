"""Settings are checked at the door: what is kept is plain Python, what is refused is refused in one sentence."""

import re
from dataclasses import FrozenInstanceError, replace

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
        "penalty_window": None,
        "min_p": None,
        "typical_p": None,
        "logit_bias": (),
        "banned": (),
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
        ("min_p", np.float32(0.5), 0.5),
        ("typical_p", 0, 0.0),
        ("penalty_window", np.int8(64), 64),
        ("banned", {7, 3}, (3, 7)),
        ("banned", np.array([5, 5]), (5,)),
        ("banned", [], ()),
        ("logit_bias", {7: 1, np.int64(3): np.float32(-0.5)}, ((3, -0.5), (7, 1.0))),
        ("logit_bias", [[7, 1], [3, -0.5]], ((3, -0.5), (7, 1.0))),
        ("logit_bias", {}, ()),
        ("stop", "END", ("END",)),
        ("stop", ["a", "b"], ("a", "b")),
        ("stop", (), ()),
    ],
)
def test_good_values_become_plain_python(name, given, kept):
    value = getattr(SamplingParams(**{name: given}), name)
    assert value == kept
    assert type(value) is type(kept)


NUMBERS = ("temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "frequency_penalty", "presence_penalty")
COUNTS = ("top_k", "penalty_window", "seed", "max_tokens")


@pytest.mark.parametrize(
    ("name", "given"),
    [
        *(
            (name, bad)
            for name in NUMBERS
            for bad in (True, np.True_, "0.5", float("nan"), float("inf"), 10**400, [1.0], 1j)
        ),
        *((name, bad) for name in COUNTS for bad in (True, np.False_, "5", 5.0, np.float64(5), -1, [5])),
        *((name, None) for name in (*NUMBERS, "max_tokens") if not name.endswith("_p")),
        ("temperature", -1e-9),
        ("top_p", -1e-9),
        ("top_p", 1 + 1e-9),
        ("min_p", 1.5),
        ("typical_p", -0.1),
        ("penalty_window", 0),
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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"banned": 5}, "banned is 5: expected a list of token ids"),
        ({"banned": "12"}, "banned is '12': expected a list of token ids"),
        ({"banned": {1: 2}}, "banned is {1: 2}: expected a list of token ids"),
        ({"banned": [1, -1]}, "a token id of banned is -1: expected a whole number of at least 0"),
        ({"banned": [1.0]}, "a token id of banned is 1.0: expected a whole number of at least 0"),
        ({"logit_bias": 5}, "logit_bias is 5: expected a mapping from token ids to numbers"),
        ({"logit_bias": [1, 2]}, "logit_bias is [1, 2]: expected a mapping from token ids to numbers"),
        ({"logit_bias": None}, "logit_bias is None: expected a mapping from token ids to numbers"),
        ({"logit_bias": {"5": 1.0}}, "a token id of logit_bias is '5': expected a whole number of at least 0"),
        ({"logit_bias": {-5: 1.0}}, "a token id of logit_bias is -5: expected a whole number of at least 0"),
        ({"logit_bias": {5: "1"}}, "the bias of token 5 is '1': expected a finite number"),
        ({"logit_bias": {5: float("-inf")}}, "the bias of token 5 is -inf: expected a finite number"),
        ({"logit_bias": [(5, 1), (5, 2)]}, "logit_bias is [(5, 1), (5, 2)]: expected every token id once"),
    ],
)
def test_bad_biases_and_bans_are_one_clear_sentence(settings, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        SamplingParams(**settings)


def test_settings_compare_hash_and_come_back_from_what_they_hold():
    settings = SamplingParams(logit_bias={7: 1, 3: -0.5}, banned=[9], stop="END", seed=5)
    assert SamplingParams(**vars(settings)) == settings
    assert hash(replace(settings)) == hash(settings)
    assert replace(settings, banned=()) != settings
