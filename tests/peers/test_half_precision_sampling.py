"""Engines that go on in the format of half-precision logits against the library that they compute with.

PyTorch for gemma_pytorch, JAX for DeepMind's gemma: the operations that the engine names, on the same logits. And
transformers, which widens first. JAX is no part of the extra `peers`; ``pip install jax`` lets its tests run.
"""

import functools

import numpy as np
import pytest

from refgemma.sampling import SamplingParams
from refgemma.sampling.comparison import shares
from refgemma.sampling.engines import distribution
from refgemma.sampling.engines.engine import rounded

pytestmark = pytest.mark.peers

CASES = 400
HALVES = ("float16", "bfloat16")
SIZES = [3, 16, 40, 300, 2000]
UNIT = 2.0**-24  # half a unit in the last place of a float32, relatively


def random_case(rng, dtype):
    """Logits in the format, as float32, and settings."""
    V = int(rng.choice(SIZES))
    logits = rounded((rng.normal(size=V) * rng.choice([0.3, 3.0])).astype(np.float32), dtype)
    return logits, float(rng.uniform(0.2, 3)), float(rng.uniform(0.05, 0.99))


def states_of(name, logits, dtype, **settings):
    states = distribution(name, logits, SamplingParams(**settings), logits_dtype=dtype).states
    return {state.name: state for state in states}


# ---- gemma_pytorch


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="needs torch: pip install refgemma[peers]")


def in_torch(torch, logits, dtype, temperature, p, k):
    """Quotients, probabilities, and what is left of them: the temperature in place, the softmax in float32."""
    scores = torch.from_numpy(logits.copy())[None].to(getattr(torch, dtype))
    scores.div_(torch.tensor([[temperature]]))
    assert scores.dtype == getattr(torch, dtype)
    probs = torch.softmax(scores, dim=-1, dtype=torch.float32)
    descending, ids = probs.sort(dim=-1, descending=True, stable=True)
    mass_before = descending.cumsum(dim=-1) - descending
    stays = (mass_before <= torch.tensor([[p]])) & (torch.arange(len(logits)) < k)
    left = torch.zeros_like(probs).scatter(-1, ids, torch.where(stays, descending, 0))
    return scores[0].float().numpy(), probs[0].numpy(), (left / left.sum())[0].numpy()


@pytest.mark.parametrize("dtype", HALVES)
def test_gemma_pytorch_rounds_as_torch_does(torch, dtype):
    rng = np.random.default_rng(31)
    border = widened = rejected = 0
    for _ in range(CASES):
        logits, temperature, p = random_case(rng, dtype)
        V = len(logits)
        k = int(rng.integers(1, V + 1))
        quotients, full, left = in_torch(torch, logits, dtype, temperature, p, k)
        settings = {"temperature": temperature, "top_p": p, "top_k": k}
        ours = distribution("gemma_pytorch", logits, SamplingParams(**settings), logits_dtype=dtype)
        states = {state.name: state for state in ours.states}
        # One division and one or two roundings, each to the nearest: nothing may differ.
        assert np.array_equal(states["temperature"].scores, quotients)
        # Exponential, sum of V, division, on either side; all probabilities are positive.
        bound = 2 * (V + 4) * UNIT
        assert np.all(np.abs(states["softmax"].scores - full) <= bound * full)
        if np.array_equal(ours.kept, np.flatnonzero(left)):
            assert np.all(np.abs(ours.probs - left) <= 2 * bound * left)  # divided by a sum once more
        else:
            border += 1
            mass = np.cumsum(np.sort(shares(states["softmax"]))[::-1])
            assert np.abs(mass - p).min() <= bound
        wide = states_of("gemma_pytorch", logits, "float32", **settings)
        widened += not np.array_equal(wide["temperature"].scores, quotients)
        rejected += not np.all(np.abs(wide["softmax"].scores - full) <= bound * full)
    print(
        f"\ngemma_pytorch, {dtype}: {CASES} cases, {border} at a border; "
        f"widened, {widened} have other quotients, {rejected} other probabilities"
    )
    assert border <= 0.02 * CASES
    assert widened >= 0.95 * CASES
    assert rejected >= 0.75 * CASES


@pytest.mark.parametrize("dtype", HALVES)
def test_a_temperature_in_the_format_of_the_logits_is_another_rule(torch, dtype):
    """DeepMind's way with the temperature is not PyTorch's, and the test above tells them apart."""
    rng = np.random.default_rng(32)
    logits = rounded(rng.normal(size=1000).astype(np.float32) * 3, dtype)
    quotients, *_ = in_torch(torch, logits, dtype, 0.7, 1.0, 1000)
    other = states_of("google-deepmind/gemma", logits, dtype, temperature=0.7)["temperature"].scores
    assert np.mean(other != quotients) > 0.1


# ---- google-deepmind/gemma


@pytest.fixture(scope="module")
def jax():
    return pytest.importorskip("jax", reason="needs JAX: pip install jax")


def in_jax(jax, logits, dtype, temperature, p):
    """Quotients, running sums, and ids that top-p leaves; one operation after the other, all in the format."""
    jnp = jax.numpy
    scores = jnp.asarray(logits, dtype=dtype) / temperature
    descending = jnp.sort(scores, descending=True)
    mass = jnp.cumsum(jax.nn.softmax(descending))
    last = jnp.take_along_axis(descending, jnp.sum(mass < p, keepdims=True), axis=-1)
    assert scores.dtype == mass.dtype == last.dtype == jnp.dtype(dtype)
    return tuple(np.asarray(x, np.float32) for x in (scores, mass)), np.flatnonzero(~np.asarray(scores < last))


@pytest.mark.parametrize("dtype", HALVES)
def test_deepmind_rounds_as_jax_does(jax, dtype):
    rng = np.random.default_rng(33)
    differing = widened = beyond = 0
    for _ in range(CASES):
        logits, temperature, p = random_case(rng, dtype)
        p = 0.999 if rng.random() < 0.2 else p  # which running sums in half precision often do not reach
        (quotients, mass), kept = in_jax(jax, logits, dtype, temperature, p)
        states = states_of("google-deepmind/gemma", logits, dtype, temperature=temperature, top_p=p)
        assert np.array_equal(states["temperature"].scores, quotients)
        differing += not np.array_equal(states["top_p"].kept, kept)
        beyond += mass[-1] < rounded(np.array(p, np.float32), dtype)
        wide = states_of("google-deepmind/gemma", logits, "float32", temperature=temperature, top_p=p)
        widened += not np.array_equal(wide["top_p"].kept, kept)
    print(
        f"\nDeepMind, {dtype}: {CASES} cases, {differing} keep other tokens, widened {widened}; {beyond} sums below p"
    )
    # None differ on the machine this was written on. Two exponentials or sums in float32 may differ by a unit or two,
    # and then fall on two sides of a middle between numbers of the format: once in 2**11 at most, and seldom seen in a
    # cut.
    assert differing <= 2
    assert widened >= 0.1 * CASES
    assert beyond >= 1


def test_deepmind_from_float32_logits(jax):
    """Multiplied by the reciprocal of the temperature, which a division differs from by a unit."""
    rng = np.random.default_rng(34)
    divided = 0
    for _ in range(100):
        logits, temperature, p = random_case(rng, "float32")
        (quotients, _), kept = in_jax(jax, logits, "float32", temperature, p)
        states = states_of("google-deepmind/gemma", logits, "float32", temperature=temperature, top_p=p)
        assert np.array_equal(states["temperature"].scores, quotients)
        divided += not np.array_equal(logits / np.float32(temperature), quotients)
        ours = states["top_p"].kept
        if not np.array_equal(ours, kept):  # V roundings of a sum, and the exponentials
            mass = np.cumsum(np.sort(shares(states["temperature"]))[::-1])
            assert np.abs(mass - p).min() <= (len(logits) + 8) * UNIT
    assert divided >= 50


# ---- transformers


@pytest.mark.parametrize("dtype", HALVES)
def test_transformers_widens_the_logits_of_a_half_precision_model(torch, dtype):
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install refgemma[peers]")
    config = transformers.GemmaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=16, pad_token_id=0, bos_token_id=1,
        eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(5)
    model = transformers.GemmaForCausalLM(config).to(getattr(torch, dtype)).eval()
    seen = []

    def look(ids, scores):
        seen.append((scores.dtype, scores[0].numpy().copy()))
        return scores

    tokens = torch.tensor([[1, 5, 7]])
    out = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), do_sample=True, temperature=0.7, top_k=0, max_new_tokens=1,
        logits_processor=transformers.LogitsProcessorList([look]), return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    given, logits = seen[0]
    assert given == torch.float32
    assert np.array_equal(rounded(logits, dtype), logits)  # they were of the format, and have been widened
    after = out.scores[0][0].numpy()
    ours = functools.partial(states_of, "transformers", logits, temperature=0.7)
    assert np.array_equal(ours(dtype=dtype)["temperature"].scores, after)
    assert not np.array_equal(rounded(after, dtype), after)  # so no quotient was rounded to the format
