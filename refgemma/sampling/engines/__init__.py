"""How other engines get from logits to a distribution, each in its own order, format and edge cases.

One engine a file: which steps it takes, and each step of its own with the rule and where it was read. What engines draw
from a distribution cannot be compared, since no two share a stream of random numbers; the distributions can.
"""

from __future__ import annotations

from collections.abc import Sequence

from refgemma.numerics import Array
from refgemma.sampling.decision import check_ids, check_logits
from refgemma.sampling.engines import (
    deepmind,
    gemma_cpp,
    gemma_pytorch,
    keras_hub,
    llama_cpp,
    openai,
    reference,
    transformers,
    vllm,
)
from refgemma.sampling.engines.engine import Distribution, Engine, State, run
from refgemma.sampling.engines.parts import Refused
from refgemma.sampling.params import SamplingParams

__all__ = ["ENGINES", "Distribution", "Engine", "Refused", "State", "distribution", "find"]

ENGINES: dict[str, Engine] = {
    module.ENGINE.name: module.ENGINE
    for module in (reference, transformers, vllm, llama_cpp, gemma_pytorch, deepmind, keras_hub, gemma_cpp, openai)
}
ALSO_CALLED = {"deepmind": "google-deepmind/gemma"}


def find(engine: str) -> Engine:
    """Engine of this name.

    Parameters
    ----------
    engine : str
        A name in `ENGINES`, in any case of letters, or "deepmind".

    Returns
    -------
    Engine
        As in `ENGINES`.

    Raises
    ------
    ValueError
        If there is none.
    """
    names = {name.lower(): name for name in ENGINES} | ALSO_CALLED
    name = names.get(str(engine).lower())
    if name is None:
        raise ValueError(f"{engine!r} is no engine known here: expected one of {', '.join(ENGINES)}")
    return ENGINES[name]


def distribution(
    engine: str,
    logits: Array,
    params: SamplingParams,
    prompt_tokens: Sequence[int] = (),
    output_tokens: Sequence[int] = (),
) -> Distribution:
    """What an engine would draw the next token from.

    Parameters
    ----------
    engine : str
        A name in `ENGINES`, in any case of letters, or "deepmind".
    logits : ndarray of float, shape (V,)
        Scores of the model; minus infinity for what may not be chosen.
    params : SamplingParams
        The settings. What is off there is off: an engine's own defaults do not act, but for the 64 tokens that the
        penalties of llama.cpp look back over.
    prompt_tokens, output_tokens : sequence of int
        What has been read and written so far, token ids in ``[0, V)``.

    Returns
    -------
    Distribution
        The kept ids, their probabilities, and the scores after each step.

    Raises
    ------
    Refused
        If the engine does not take these settings, or would draw from NaN; a kind of ValueError.
    ValueError
        If there is no such engine, or the input is bad.
    TypeError
        If token ids are no whole numbers.

    Examples
    --------
    >>> import numpy as np
    >>> half = SamplingParams(temperature=1.0, top_p=0.5)
    >>> for name in ("llama.cpp", "gemma_pytorch"):
    ...     print(name, distribution(name, np.zeros(4), half).kept)
    llama.cpp [0 1]
    gemma_pytorch [0 1 2]
    """
    found = find(engine)
    wide = check_logits(logits, 0.0)
    V = len(wide)
    prompt, output = check_ids("prompt_tokens", prompt_tokens, V), check_ids("output_tokens", output_tokens, V)
    check_ids("logit_bias", list(dict(params.logit_bias)), V)
    check_ids("banned", tuple(params.banned), V)
    return run(found, wide, params, prompt, output)
