"""Each engine against the worked examples of its rule, and against a slow walk in exact arithmetic."""

from fractions import Fraction

import numpy as np
import pytest

from refgemma.sampling import SamplingParams, decide
from refgemma.sampling.engines import ENGINES, Refused, distribution, engine, google

UNIT = 2.0**-24  # half a unit in the last place of a float32, relatively

WITH_TOP_P = ("refgemma", "transformers", "vllm", "llama.cpp", "gemma_pytorch", "google-deepmind/gemma", "keras-hub")


def of(name, logits, prompt=(), output=(), **settings):
    """What an engine would draw from, at temperature 1 unless said otherwise."""
    return distribution(name, np.asarray(logits), SamplingParams(**{"temperature": 1.0} | settings), prompt, output)


def kept(name, logits, *tokens, **settings):
    return of(name, logits, *tokens, **settings).kept.tolist()


def logits_of(*probs):
    return np.log(np.array(probs, dtype=np.float64))


@pytest.fixture
def powers_of_two(monkeypatch):
    """Probabilities are ``2 ** logit``, exact for whole logits, so that equality is equality on every machine."""

    def exact(logits):
        return np.exp2(logits - logits.max())

    for module in (engine, google):
        monkeypatch.setattr(module, "exp_below", exact)


# ---- worked examples

HALF_QUARTER_EIGHTHS = (-1.0, -2.0, -3.0, -3.0)  # .5 .25 .125 .125, as powers of two
WORKED = {  # ids kept; of the tied pair the one that a stable sort leaves
    "transformers": {0.0: [0], 0.5: [0], 0.75: [0, 1], 0.8: [0, 1, 3]},
    "vllm": {0.5: [0], 0.75: [0, 1], 0.8: [0, 1, 3]},
    "llama.cpp": {0.0: [0], 0.5: [0], 0.75: [0, 1], 0.8: [0, 1, 2]},
    "google-deepmind/gemma": {0.0: [0], 0.5: [0], 0.75: [0, 1], 0.8: [0, 1, 2, 3]},
    "gemma_pytorch": {0.0: [0], 0.5: [0, 1], 0.75: [0, 1, 2], 0.8: [0, 1, 2]},
    "keras-hub": {0.0: [0], 0.5: [0, 1], 0.75: [0, 1, 2], 0.8: [0, 1, 2]},
}


@pytest.mark.parametrize("name", WORKED)
def test_top_p_worked_example(name, powers_of_two):
    assert {p: kept(name, HALF_QUARTER_EIGHTHS, top_p=p) for p in WORKED[name]} == WORKED[name]
    for p in (1.0, None):
        assert kept(name, HALF_QUARTER_EIGHTHS, top_p=p) == [0, 1, 2, 3]


def test_top_p_stops_at_equality_or_one_later():
    """Eight equal tokens: every probability and every sum is exact in float32."""
    counts = {name: len(kept(name, np.full(8, -3.7), top_p=0.5)) for name in WITH_TOP_P}
    one_later = {"gemma_pytorch": 5, "keras-hub": 5, "google-deepmind/gemma": 8}
    assert counts == {name: one_later.get(name, 4) for name in WITH_TOP_P}


@pytest.mark.parametrize(
    ("name", "ids"),
    [
        ("refgemma", [3]),
        ("transformers", [3]),
        ("vllm", [3]),
        ("llama.cpp", [3]),
        ("gemma_pytorch", [2, 3]),
        ("keras-hub", [2, 3]),
    ],
)
def test_order_of_top_k_and_top_p(name, ids):
    """p = .1 .2 .3 .4, k = 2, P = .5: .4 is .571 of what top-k leaves, but .4 of all."""
    got = of(name, logits_of(0.1, 0.2, 0.3, 0.4), top_k=2, top_p=0.5)
    assert got.kept.tolist() == ids
    want = np.array([0, 0, 3 / 7, 4 / 7] if ids == [2, 3] else [0, 0, 0, 1])
    assert np.abs(got.probs - want).max() < 8 * UNIT  # an exponential, two divisions, a sum of two


def test_temperature_comes_last_with_llama_cpp():
    """p = .6 .3 .1 at T = 2 is .473 .334 .193: P = .6 keeps two of these, one of those."""
    for name in WITH_TOP_P:
        assert kept(name, logits_of(0.6, 0.3, 0.1), temperature=2.0, top_p=0.59) == (
            [0] if name == "llama.cpp" else [0, 1]
        )


def test_min_p_comes_before_top_p_with_vllm_alone():
    """p = .5 .3 .1 .1, min_p = .3 leaves .5 .3, of which .5 is .625."""
    settings = {"top_p": 0.6, "min_p": 0.3}
    assert kept("vllm", logits_of(0.5, 0.3, 0.1, 0.1), **settings) == [0]
    for name in ("refgemma", "transformers", "llama.cpp"):
        assert kept(name, logits_of(0.5, 0.3, 0.1, 0.1), **settings) == [0, 1]


def test_typical_comes_before_top_p_with_llama_cpp():
    """Surprises .69 1.20 1.90 2.53 with entropy 1.17: nearest are .3, then .5; alone, .3 has all the mass."""
    logits = logits_of(0.5, 0.3, 0.15, 0.05)
    assert kept("llama.cpp", logits, typical_p=0.2, top_p=0.4) == [1]
    for name in ("refgemma", "transformers"):
        assert kept(name, logits, typical_p=0.2, top_p=0.4) == [0]


# ---- ties


def test_ties_at_the_kth_token():
    logits = [1.0, 3.0, 2.0, 3.0, 2.0]
    keeping_ties = {"transformers": [1, 2, 3, 4], "vllm": [1, 2, 3, 4], "gemma.cpp": [1, 3, 4]}
    for name in set(ENGINES) - {"openai"}:
        assert kept(name, logits, top_k=3) == keeping_ties.get(name, [1, 2, 3])


def test_gemma_cpp_breaks_ties_by_the_packed_id_and_loses_three_bits():
    assert kept("gemma.cpp", [2.0, 2.0, 2.0], top_k=2) == [1, 2]  # a larger id makes a positive number larger
    assert kept("gemma.cpp", [-2.0, -2.0, -2.0], top_k=2) == [0, 1]  # and a negative one smaller
    nearly = np.float32([2.0, 2.0 + 7 * 2**-22, 1.0])  # seven units in the last place: the first three bits
    assert kept("gemma.cpp", nearly, top_k=2) == [0, 1]
    assert len(set(of("gemma.cpp", nearly, top_k=2).probs[:2].tolist())) == 1
    assert len(set(of("transformers", nearly, top_k=2).probs[:2].tolist())) == 2
    assert kept("gemma.cpp", nearly[[1, 0, 2]], banned=[2], top_k=1) == [1]  # not the largest
    assert kept("gemma.cpp", nearly[[1, 0, 2]], top_k=1) == [0]  # k = 1 alone takes another way


# ---- temperature


def test_temperature_0():
    logits = [1.0, 3.0, 2.0, 3.0]
    for name in ("refgemma", "vllm", "llama.cpp", "gemma_pytorch", "openai"):
        got = of(name, logits, temperature=0.0)
        assert got.kept.tolist() == [1]
        assert got.probs.tolist() == [0, 1, 0, 0]
    assert kept("gemma_pytorch", logits, temperature=0.0, top_k=3, top_p=0.1) == [1]
    assert kept("gemma.cpp", logits, temperature=0.0, top_k=1) == [1]
    for name in ("transformers", "google-deepmind/gemma", "keras-hub", "gemma.cpp"):
        with pytest.raises(Refused, match=r"emperature"):
            of(name, logits, temperature=0.0)


def test_vllm_raises_small_temperatures_to_a_hundredth():
    logits = [1.0, 1.01, 0.99]
    want = of("vllm", logits, temperature=0.01).probs
    for temperature in (1e-6, 1e-5, 0.009):
        assert np.array_equal(of("vllm", logits, temperature=temperature).probs, want)
    assert of("transformers", logits, temperature=0.009).probs[1] > want[1]


def test_temperature_has_no_effect_with_gemma_cpp():
    logits = logits_of(0.1, 0.2, 0.3, 0.4)
    for temperature in (0.1, 0.7, 5.0):
        got = of("gemma.cpp", logits, temperature=temperature).probs
        # 2**-20 of a logit of size 2.3 for the bits that make room for the id; the rest is less.
        assert np.abs(got - [0.1, 0.2, 0.3, 0.4]).max() < 2.0**-20 * 3


# ---- penalties

PROMPT, OUTPUT = [0, 1, 1], [1, 2, 2]


def after(name, step, logits, prompt=PROMPT, output=OUTPUT, **settings):
    """Logits right after a step."""
    states = of(name, logits, prompt, output, **settings).states
    return next(state.scores for state in states if state.name == step).tolist()


def test_which_tokens_the_penalties_see():
    ones = [1.0] * 5
    for name in ("refgemma", "transformers", "vllm", "llama.cpp"):
        assert after(name, "repetition_penalty", ones, repetition_penalty=2.0) == [0.5, 0.5, 0.5, 1, 1]
    for name in ("refgemma", "vllm", "openai"):
        assert after(name, "frequency_penalty", ones, frequency_penalty=0.25) == [1, 0.75, 0.5, 1, 1]
        assert after(name, "presence_penalty", ones, presence_penalty=0.25) == [1, 0.75, 0.75, 1, 1]
    assert after("llama.cpp", "frequency_penalty", ones, frequency_penalty=0.25) == [0.75, 0.25, 0.5, 1, 1]
    assert after("llama.cpp", "presence_penalty", ones, presence_penalty=0.25) == [0.75, 0.75, 0.75, 1, 1]
    both = {"frequency_penalty": 0.25, "presence_penalty": 0.125}
    assert after("llama.cpp", "frequency_penalty", ones, **both) == [0.625, 0.125, 0.375, 1, 1]
    assert after("openai", "presence_penalty", ones, **both) == [1, 0.625, 0.375, 1, 1]


def test_penalties_of_llama_cpp_look_back_64_tokens_or_as_many_as_said():
    prompt = [0, *[1] * 63]
    for output, seen in (([], True), ([1], False)):
        got = after("llama.cpp", "repetition_penalty", [1.0] * 3, prompt, output, repetition_penalty=2.0)
        assert got == [0.5 if seen else 1, 0.5, 1]
        assert after("vllm", "repetition_penalty", [1.0] * 3, prompt, output, repetition_penalty=2.0) == [0.5, 0.5, 1]
    settings = {"repetition_penalty": 2.0, "penalty_window": 65}
    assert after("llama.cpp", "repetition_penalty", [1.0] * 3, prompt, [1], **settings) == [0.5, 0.5, 1]


@pytest.mark.parametrize("name", ["transformers", "vllm", "llama.cpp"])
def test_penalties_make_negative_logits_smaller_and_come_before_the_temperature(name):
    got = after(name, "repetition_penalty", [2.0, -2.0, 0.0], [0, 1, 2], [], repetition_penalty=1.5, temperature=0.5)
    assert got == np.float32([2 / 1.5, -3, 0]).tolist()
    order = [state.name for state in of(name, [2.0, 1], [0], repetition_penalty=1.5, temperature=0.5).states]
    assert order == ["logits", "repetition_penalty", "temperature"]


def test_bias_and_bans():
    for name in ("refgemma", "transformers", "vllm", "llama.cpp", "openai"):
        assert after(name, "logit_bias", [1.0, 2, 3], logit_bias={1: 0.5}) == [1, 2.5, 3]
    for name in ("refgemma", "transformers", "vllm", "llama.cpp", "google-deepmind/gemma", "gemma.cpp"):
        assert kept(name, [1.0, 2, 3], banned=[2, 0]) == [1]
    assert after("vllm", "logit_bias", [1.0, 2, 3], logit_bias={0: 1e6, 1: -1e6}) == [101, -98, 3]


# ---- every engine


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_without_settings_gives_the_softmax(name):
    logits = np.random.default_rng(3).normal(size=300) * 3
    before = logits.copy()
    got = of(name, logits)
    assert got.engine == name
    assert got.kept.tolist() == list(range(300))
    want = np.exp(logits - logits.max())
    want /= want.sum()
    # Rounding a logit of size 12 to float32, or gemma.cpp's to three bits less; the rest is a few roundings more.
    units = {"refgemma": 2**-28, "gemma.cpp": 16 * 12}.get(name, 2 * 12) + 2**-27
    assert np.all(np.abs(got.probs - want) <= want * UNIT * (units if name == "refgemma" else units + 16))
    assert got.probs.dtype == (np.float64 if name == "refgemma" else np.float32)
    assert np.array_equal(logits, before)


@pytest.mark.parametrize("name", ENGINES)
def test_states_tell_how_the_distribution_came_about(name):
    settings = {"temperature": 0.7}
    if name != "openai":
        settings["top_k"] = 20
    got = of(name, np.random.default_rng(4).normal(size=100), **settings)
    assert got.states[0].name == "logits"
    assert {state.name for state in got.states} >= {"temperature"}
    for earlier, later in zip(got.states[:-1], got.states[1:], strict=True):
        assert set(later.kept) <= set(earlier.kept)
    assert got.states[-1].kept.tolist() == got.kept.tolist() == np.flatnonzero(got.probs).tolist()
    for state in got.states:
        assert state.rule[0].isupper()
        assert "\n" not in state.rule
    rule = next(state.rule for state in got.states if state.name == "temperature")
    assert rule.endswith("(temperature = 0.7)")
    assert ENGINES[name].source


def test_refgemma_is_decide():
    rng = np.random.default_rng(8)
    for _ in range(100):
        logits = rng.normal(size=40) * 3
        params = SamplingParams(
            temperature=float(rng.choice([0, 0.7, 1, 2])),
            top_k=int(rng.integers(1, 50)),
            top_p=float(rng.random()),
            repetition_penalty=1.3,
            frequency_penalty=0.2,
        )
        got, decision = (
            distribution("refgemma", logits, params, PROMPT, OUTPUT),
            decide(logits, params, PROMPT, OUTPUT),
        )
        assert np.array_equal(got.probs, decision.probs)
        assert np.array_equal(got.kept, decision.kept)


# ---- against a slow walk


def walk(probs, p, *, one_later=False, with_ties=False):
    """Ids that stay, as the rule is said in words, in exact arithmetic; and how near p comes to a sum."""
    order = sorted(range(len(probs)), key=lambda i: (-probs[i], i))
    mass, stay, margin = Fraction(0), [], Fraction(1)
    for i in order:
        if stay and not (mass <= p if one_later else mass < p):
            break
        stay.append(i)
        mass += probs[i]
        margin = min(margin, abs(mass - p))
    margin = min([margin, *(abs(mass - probs[i] - p) for i in stay[-1:] if len(stay) > 1)])
    if with_ties:
        stay = [i for i in order if probs[i] >= probs[stay[-1]]]
    return stay, margin


def slowly(name, weights, p, k):
    """Ids that stay: what comes before what, and of what the mass is a share."""
    total = sum(weights)
    probs = [Fraction(weight, total) for weight in weights]
    if name == "google-deepmind/gemma":
        return walk(probs, p, with_ties=True)
    if name in ("gemma_pytorch", "keras-hub"):  # the first k of those that top-p keeps of all
        stay, margin = walk(probs, p, one_later=True)
        return stay[:k], margin
    order = sorted(range(len(weights)), key=lambda i: (-weights[i], i))
    chosen = order[:k]
    if name in ("transformers", "vllm"):
        chosen = [i for i in order if weights[i] >= weights[order[k - 1]]]
    left = sum(weights[i] for i in chosen)
    stay, margin = walk([Fraction(weights[i], left) for i in chosen], p)
    return [chosen[i] for i in stay], margin


@pytest.mark.parametrize("name", WITH_TOP_P)
def test_top_k_and_top_p_are_the_rule_in_words(name):
    rng = np.random.default_rng(17)
    sharp = tied = 0
    for _ in range(400):
        V = int(rng.integers(2, 30))
        weights = rng.integers(1, rng.choice([4, 1000]), size=V).tolist()
        p = Fraction(int(rng.integers(1, 64)), 64)
        k = V if name == "google-deepmind/gemma" else int(rng.integers(1, V + 1))
        settings = {} if name == "google-deepmind/gemma" else {"top_k": k}
        got = kept(name, np.log(weights), top_p=float(p), **settings)
        want, margin = slowly(name, weights, p, k)
        if (
            margin < 2**-16
        ):  # 30 sums of probabilities whose logits, of size 7, were rounded to float32: 2**-24 * 2 * 40
            continue
        sharp += 1
        tied += got != sorted(want)
        assert sorted(weights[i] for i in got) == sorted(weights[i] for i in want)  # ids where they do not tie
    assert sharp >= 300
    assert tied == 0 or name in ("transformers", "vllm")  # which leave the higher ids of tied tokens


OTHER_RULES = {
    "stops at equality": {},
    "one later": {"one_later": True},
    "with ties": {"with_ties": True},
    "one later, with ties": {"one_later": True, "with_ties": True},
}


@pytest.mark.parametrize("name", WORKED)
def test_top_p_follows_its_own_rule_and_no_other_where_sums_are_exact(name, powers_of_two):
    """Powers of two that sum to 1, and p in 64ths: p often is a sum, and no number is rounded."""
    rng = np.random.default_rng(23)
    right, seen = {"gemma_pytorch": "one later", "keras-hub": "one later", "google-deepmind/gemma": "with ties"}, set()
    for _ in range(300):
        weights = [64]
        for _ in range(rng.integers(1, 12)):
            i = int(rng.integers(len(weights)))
            if weights[i] > 1:
                weights[i : i + 1] = [weights[i] // 2] * 2
        rng.shuffle(weights)
        p = Fraction(int(rng.integers(1, 64)), 64)
        got = kept(name, np.log2(weights), top_p=float(p))
        for rule, how in OTHER_RULES.items():
            want, _ = walk([Fraction(weight, 64) for weight in weights], p, **how)
            same = sorted(weights[i] for i in got) == sorted(weights[i] for i in want)
            if rule == right.get(name, "stops at equality"):
                assert same
            elif not same:
                seen.add(rule)
    assert len(seen) == len(OTHER_RULES) - 1
