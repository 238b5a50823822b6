"""Requests of every kind, and what each comes to when it is alone."""

import functools
from dataclasses import replace

import numpy as np

from refgemma import lora
from refgemma.batching.batch import Request
from refgemma.generation import Row, generate
from refgemma.sampling import SamplingParams

ADAPTERS = (None, "pirate", "json", "letter")
QUESTIONS = ("What is 17 + 25?", "Tell me a story about a fox.", "What is the capital of Nepal?", "Who are you?")


@functools.cache
def adapter(name):
    """A shipped adapter."""
    return None if name is None else lora.read(lora.find_adapter(name))


@functools.cache
def params(gemma, name):
    """The model with it."""
    return gemma.params if name is None else gemma.with_lora(adapter(name)).params


def asked(gemma, question="Who are you?", name=None, **settings):
    """One thing to ask: token ids, settings, the name of an adapter."""
    return gemma.encode_prompt(question), SamplingParams(**{"seed": 1, "max_tokens": 12} | settings), name


def random_asked(gemma, count, seed):
    """Many: questions and random tokens of many lengths, settings of all kinds, every adapter."""
    rng = np.random.default_rng(seed)
    many = []
    for i in range(count):
        if rng.random() < 0.5:
            prompt = gemma.encode_prompt(QUESTIONS[rng.integers(len(QUESTIONS))])
        else:
            prompt = [2, *rng.integers(10, gemma.tokenizer.vocab_size, size=rng.integers(0, 60)).tolist()]
        settings = SamplingParams(
            temperature=float(rng.choice([0.0, 0.7, 1.3])),
            top_k=[None, 30][rng.integers(2)],
            top_p=[None, 0.9][rng.integers(2)],
            repetition_penalty=float(rng.choice([1.0, 1.2])),
            frequency_penalty=float(rng.choice([0.0, 0.3])),
            seed=int(rng.integers(2**32)),
            max_tokens=int(rng.integers(1, 25)),
            stop=[(), (" the", "e.")][rng.integers(2)],
        )
        many.append((prompt, settings, ADAPTERS[i % len(ADAPTERS)]))
    return many


def alone(gemma, prompt, settings, name, *, record=False):
    """The answer to a request that has the model to itself."""
    model = replace(gemma, params=params(gemma, name))
    *_, last = generate(model, [Row(0, prompt, settings, model, record)])
    return last.result


def request(gemma, prompt, settings, name=None, *, record=False, stop_ids=None, tree=None):
    """The same as a request for a batch, and the list that its events go to."""
    model = gemma if stop_ids is None else replace(gemma, stop_ids=stop_ids)
    row = Row(0, prompt, settings, model, record)
    events = []
    return Request(row, params(gemma, name) if tree is None else tree, events.append, record), events


def run(batch):
    """Step until nothing is left."""
    while len(batch):
        batch.step()
