"""A small model, run as it is or playing a script."""

import numpy as np
import pytest

from refgemma import generation
from refgemma.device import placed
from refgemma.gemma import Gemma
from refgemma.generation import Row, generate
from refgemma.numerics import FLOAT64
from refgemma.sampling import SamplingParams
from tests.generation.runs import CONTEXT
from tests.models import widened
from tests.talker import talker


@pytest.fixture(scope="module")
def model():
    return talker(max_positions=CONTEXT)


@pytest.fixture
def run(model, small_tokenizer, xp):
    """Function from prompts and settings to events, computing with each array library in turn."""
    there = placed(widened(model.params), xp)

    def run(*prompts, stop_ids=(), numerics=FLOAT64, params=there, tokenizer=small_tokenizer, **settings):
        options = {name: settings.pop(name) for name in ("prefix", "progress") if name in settings}
        record = settings.pop("record", False)
        gemma = Gemma(model.config, placed(params, xp), tokenizer, numerics, frozenset(stop_ids))
        params = SamplingParams(**settings)
        return generate(gemma, [Row(i, prompt, params, gemma, record) for i, prompt in enumerate(prompts)], **options)

    return run


@pytest.fixture
def play(monkeypatch, run, small_tokenizer, xp):
    """Function that runs a model which writes given outputs, one a row, and pads when it is through with one."""

    def play(*outputs, prompts=None, **settings):
        prompts = prompts or [[small_tokenizer.bos_id]] * len(outputs)

        def scripted(params, config, tokens, *, positions, cache, logits, numerics):
            cache.extend(xp.asarray(positions))
            scores = np.zeros((len(outputs), config.vocab_size))
            for row, output in enumerate(outputs):
                index = positions[row].max() + 1 - len(prompts[row])
                if 0 <= index < len(output):
                    scores[row, output[index]] = 1
            return scores

        monkeypatch.setattr(generation, "forward", scripted)
        return list(run(*prompts, temperature=0, **settings))

    return play
