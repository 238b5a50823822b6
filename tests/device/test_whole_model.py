"""The shipped model on a device says what it says on the processor: answers, adapters, traces, judgements.

On a GPU sums are taken in other orders; the stand-in takes NumPy's. So logits agree within the float32 bounds that were
measured against the same truth, and greedy answers where no decision is that near to another.
"""

import functools

import numpy as np
import pytest

from refgemma import lora
from refgemma.batching import Batching
from refgemma.cache import KVCache, PrefixCache
from refgemma.device import placed
from refgemma.model import forward
from refgemma.numerics import Bfloat16Matrix
from refgemma.oracle import compare, trace
from refgemma.sampling import SamplingParams
from tests.judge import FLOAT64_BOUND, error
from tests.tiny_it import tiny_it

PROMPT = "What is 17 + 25?"
GREEDY = {"temperature": 0.0, "max_tokens": 12}

# Of the largest logit. On this model transformers is off by up to 4e-6, see tests/test_tiny_it.py; we may be off by
# twice that, on either side.
FLOAT32_BOUND = 2 * 2 * 4e-6


@pytest.fixture
def on_device(device_xp):
    """Function from settings of `load` to the model on the device."""
    return functools.partial(tiny_it, xp=device_xp)


def leaves(value):
    """Every array of a tree of parameters."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from leaves(item)
    elif hasattr(value, "__dataclass_fields__"):
        yield from leaves([getattr(value, name) for name in value.__dataclass_fields__])
    elif hasattr(value, "dtype"):
        yield value


@pytest.mark.parametrize(
    ("numerics", "weights", "bound"),
    [
        ("float64", None, FLOAT64_BOUND),
        ("float64", "bfloat16", FLOAT64_BOUND),
        ("float32", None, FLOAT32_BOUND),
        ("float32", "bfloat16", FLOAT32_BOUND),
    ],
)
def test_logits(on_device, device_xp, numerics, weights, bound):
    here, gemma = tiny_it(numerics, weights), on_device(numerics, weights)
    assert all(isinstance(array, device_xp.ndarray) for array in leaves(gemma.params))
    tokens = [here.encode_prompt(PROMPT), here.encode_prompt("Who are you")]
    rows = [row[:14] for row in tokens]
    got, want = gemma.logits(rows), here.logits(rows)
    assert isinstance(got, np.ndarray)
    assert got.dtype == want.dtype
    assert error(got, want) <= bound
    shifted = np.roll(want, 1, axis=1)
    assert error(shifted, want) > 1000 * bound  # it can fail
    assert error(gemma.logits(rows[0], last=True), want[0, -1]) <= bound


def test_answers(on_device):
    here, gemma = tiny_it(), on_device()
    assert gemma.generate(PROMPT, **GREEDY).text == here.generate(PROMPT, **GREEDY).text
    drawn = {"seed": 7, "temperature": 1.0, "max_tokens": 12}
    prompts = [PROMPT, "Tell me a story about a fox."]
    assert [out.tokens for out in gemma.generate_batch(prompts, **drawn)] == [
        out.tokens for out in here.generate_batch(prompts, **drawn)
    ]
    assert gemma.generate(PROMPT, **GREEDY, record=True).record.replay().first_difference is None
    ours, theirs = here.score("Once upon a time"), gemma.score("Once upon a time")
    # Each log-probability is a logit less a mean of logits, none of which is beyond 30 on this model.
    assert np.abs(ours.logprobs - theirs.logprobs).max() <= 2 * FLOAT32_BOUND * 30


def test_a_chat_reads_on_from_its_prefix(on_device):
    gemma, prefix = on_device(), PrefixCache()
    first = "".join(event.text for event in gemma.stream(PROMPT, prefix=prefix, **GREEDY))
    assert first == gemma.generate(PROMPT, **GREEDY).text
    turns = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": first}]
    more = [*turns, {"role": "user", "content": "And 1 + 1?"}]
    again = "".join(event.text for event in gemma.stream(more, prefix=prefix, **GREEDY))
    assert again == gemma.generate(more, **GREEDY).text


@pytest.mark.parametrize("name", ["pirate", "json", "letter"])
def test_adapters(on_device, device_xp, name):
    here, gemma = tiny_it(), on_device()
    adapter = lora.read(lora.find_adapter(name))
    tokens = here.encode_prompt(PROMPT)
    want = here.with_lora(adapter, 0.8).logits(tokens)
    attached = gemma.with_lora(adapter, 0.8)
    assert all(isinstance(array, device_xp.ndarray) for array in leaves(attached.params))
    assert error(attached.logits(tokens), want) <= 2 * FLOAT32_BOUND
    assert error(here.logits(tokens), want) > 1000 * FLOAT32_BOUND  # it can fail
    merged = gemma.merge_lora(adapter, 0.8)
    assert all(isinstance(array, device_xp.ndarray) for array in leaves(merged.params))
    assert error(merged.logits(tokens), want) <= 2 * FLOAT32_BOUND
    assert merged.unmerge_lora().params is gemma.params


def test_each_row_its_own_adapter(on_device):
    here, gemma = tiny_it(), on_device()
    pirate = lora.read(lora.find_adapter("pirate"))
    prompts, adapters = [PROMPT, PROMPT], [pirate, None]
    want = [out.text for out in here.generate_batch(prompts, lora=adapters, **GREEDY)]
    assert [out.text for out in gemma.generate_batch(prompts, lora=adapters, **GREEDY)] == want
    assert want[0] != want[1]


def test_many_requests_share_a_model(on_device):
    here, gemma = tiny_it(), on_device()
    pirate = lora.read(lora.find_adapter("pirate"))
    settings = SamplingParams(**GREEDY)
    with Batching(gemma, max_rows=2) as engine:
        streams = [
            engine.submit(gemma.encode_prompt(PROMPT), settings, adapter=adapter) for adapter in (None, pirate, None)
        ]
        texts = ["".join(event.text for event in stream) for stream in streams]
    plain, adapted = (g.generate(PROMPT, **GREEDY).text for g in (here, here.with_lora(pirate)))
    assert texts == [plain, adapted, plain]


def test_an_audit_of_what_a_merge_loses_is_the_same(on_device):
    here, gemma = tiny_it(), on_device()
    pirate = lora.read(lora.find_adapter("pirate"))
    tokens = here.encode_prompt(PROMPT)
    ours, theirs = lora.audit(here, pirate, tokens=tokens), lora.audit(gemma, pirate, tokens=tokens)
    assert theirs.total == ours.total  # read from the weights, which are the same numbers
    assert [change.flips for change in theirs.logits] == [change.flips for change in ours.logits]


# ---- the tap sees device arrays; a trace is on the host


def test_a_tap_computes_on_the_device(on_device, device_xp):
    gemma, seen = on_device(), set()

    def louder(name, value):
        seen.add(type(value))
        return value * 2 if name == "layers.0.mlp.down" else value

    tokens = np.array([gemma.encode_prompt(PROMPT)])
    plain = forward(gemma.params, gemma.config, tokens)
    tapped = forward(gemma.params, gemma.config, tokens, tap=louder)
    assert seen == {device_xp.ndarray} == {type(plain), type(tapped)}
    assert bool((plain != tapped).any())


def test_a_trace_and_its_judgement(on_device, tmp_path):
    here, gemma = tiny_it(), on_device()
    tokens = here.encode_prompt(PROMPT)
    for last in (False, True):
        want, got = (trace(g, tokens, last=last, model="tiny-it") for g in (here, gemma))
        assert got.meta["weights"] == want.meta["weights"] != ""
        for name, tensor in want.tensors.items():
            assert isinstance(got.tensors[name], np.ndarray)
            # Only that each name has its own numbers: how near they are is judged below, by derived bounds.
            assert np.abs(got.tensors[name] - tensor).max() <= 1e-3 * np.abs(tensor).max(), name
    path = tmp_path / "device.safetensors"
    streamed = trace(gemma, tokens, to=path, model="tiny-it")
    assert np.array_equal(streamed.tensors["logits"], trace(gemma, tokens).tensors["logits"])
    report = compare(here_path(here, tokens, tmp_path), path, model=gemma)  # judged by the weights on the device
    assert report.first_divergence is None


def here_path(gemma, tokens, folder):
    trace(gemma, tokens, model="tiny-it").save(folder / "here.safetensors")
    return folder / "here.safetensors"


# ---- the cache


def test_a_cache_of_the_wrong_library_is_one_clear_sentence(on_device, device_xp):
    gemma = on_device()
    cache = KVCache(gemma.config, batch=1, capacity=4)
    with pytest.raises(
        ValueError, match=r"^the cache is in numpy arrays, the model computes with cupy: make it with xp=cupy$"
    ):
        forward(gemma.params, gemma.config, np.array([[2]]), cache=cache)
    other = KVCache(gemma.config, batch=1, capacity=4, xp=device_xp)
    with pytest.raises(ValueError, match=r"^the cache is in cupy arrays, the model computes with numpy"):
        forward(tiny_it().params, gemma.config, np.array([[2]]), cache=other)


def test_a_cache_shows_itself_and_forgets(on_device, device_xp):
    gemma = on_device()
    caches = [KVCache(gemma.config, batch=2, capacity=6, xp=xp) for xp in (np, device_xp)]
    tokens, positions = np.array([[2, 5, 6], [2, 7, 8]]), np.array([[0, 1, 2], [-1, 0, 1]])
    for params, cache in zip((tiny_it().params, gemma.params), caches, strict=True):
        forward(params, gemma.config, tokens, positions=positions, cache=cache)
        forward(params, gemma.config, tokens[:, :1], cache=cache)  # positions count on
        cache.truncate(3)
    assert repr(caches[0]) == repr(caches[1])
    assert "row 1: 1 x padding, 0-1" in repr(caches[1])
    assert caches[1].next_positions(2).get().tolist() == [[3, 4], [2, 3]]


def test_tokens_may_be_on_either_side(on_device, device_xp):
    gemma = on_device()
    tokens = np.array([[2, 5, 6]])
    host, device = (forward(gemma.params, gemma.config, ids) for ids in (tokens, device_xp.asarray(tokens)))
    assert bool((host == device).all())
    with pytest.raises(ValueError, match=r"^token id 99999 is outside the vocabulary"):
        forward(gemma.params, gemma.config, device_xp.asarray([[99999]]))


def test_weights_in_bfloat16_stay_so(on_device, device_xp):
    gemma = on_device("float32", "bfloat16")
    matrix = gemma.params["layers"][0]["mlp"]["gate"]
    assert isinstance(matrix, Bfloat16Matrix)
    assert matrix.bits.dtype == np.uint16
    back = placed(gemma.params, np)
    assert np.array_equal(back["embed"].bits, tiny_it("float32", "bfloat16").params["embed"].bits)
