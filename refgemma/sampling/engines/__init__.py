"""How other engines get from logits to a distribution, each in its own order, format and edge cases.

Each engine is a table of its steps, and each step of its own states its rule and where it was read. What engines draw
from a distribution cannot be compared, since no two share a stream of random numbers; the distributions can.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import numpy as np

from refgemma.errors import InputError
from refgemma.numerics import Array
from refgemma.sampling import steps
from refgemma.sampling.decision import GREEDY_BELOW, Step, checked, steps_of
from refgemma.sampling.engines.engine import (
    Context,
    Distribution,
    Engine,
    LogitsDtype,
    Refused,
    engine_of,
    first_maximum,
    is_on,
    rounded,
    run,
)
from refgemma.sampling.engines.google import DEEPMIND, GEMMA_CPP, GEMMA_PYTORCH, KERAS_HUB
from refgemma.sampling.engines.llama_cpp import LLAMA_CPP
from refgemma.sampling.engines.transformers import TRANSFORMERS, VLLM
from refgemma.sampling.params import SamplingParams

__all__ = ["ENGINES", "Refused", "distribution"]

# ---- this package


def _steps_of_refgemma(params: SamplingParams, context: Context) -> list[Step]:
    """Steps of `decide`, and the greedy choice as one more."""
    chosen = steps_of(params, context.prompt, context.output)
    return [*chosen, ("greedy", first_maximum)] if params.temperature < GREEDY_BELOW else chosen


REFGEMMA = Engine("refgemma", "this package", _steps_of_refgemma, dtype=np.float64, total=np.float64)


# ---- OpenAI's API, as far as it is documented: a bias and two penalties on the logits, and a temperature

_RANGES = {"temperature": (0, 2), "frequency_penalty": (-2, 2), "presence_penalty": (-2, 2)}


def _refusal_of_openai(params: SamplingParams, context: Context) -> str:
    if is_on(params, "top_p"):
        return (
            f"openai documents top_p (given {params.top_p}) as a share of mass, neither its border nor its order: "
            "leave it at 1 to see the documented penalties"
        )
    for name, (low, high) in _RANGES.items():
        if not low <= getattr(params, name) <= high:
            return f"openai refuses {name} {getattr(params, name)}: it must be between {low} and {high}"
    beyond = [bias for bias in dict(params.logit_bias).values() if not -100 <= bias <= 100]
    return f"openai refuses a logit_bias of {beyond[0]}: it must be between -100 and 100" if beyond else ""


OPENAI = engine_of(
    "openai",
    "OpenAI API documentation: Frequency and presence penalties",
    {
        "logit_bias": steps.logit_bias,
        "frequency_penalty": steps.frequency_penalty,
        "presence_penalty": steps.presence_penalty,
        "temperature": steps.temperature,
    },
    _refusal_of_openai,
)


# ---- all of them

ENGINES: dict[str, Engine] = {
    engine.name: engine
    for engine in (
        REFGEMMA, TRANSFORMERS, VLLM, LLAMA_CPP, GEMMA_PYTORCH, DEEPMIND, KERAS_HUB, GEMMA_CPP, OPENAI
    )
}  # fmt: skip
_ALSO_CALLED = {"deepmind": "google-deepmind/gemma"}


def find(engine: str) -> Engine:
    """Engine of this name, in any case of letters."""
    names = {name.lower(): name for name in ENGINES} | _ALSO_CALLED
    name = names.get(str(engine).lower())
    if name is None:
        raise InputError(f"unknown engine {engine!r}: expected one of {', '.join(ENGINES)}")
    return ENGINES[name]


def distribution(
    engine: str,
    logits: Array,
    params: SamplingParams,
    prompt_tokens: Sequence[int] = (),
    output_tokens: Sequence[int] = (),
    *,
    logits_dtype: LogitsDtype | None = None,
) -> Distribution:
    """Distribution that an engine would draw the next token from.

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
    logits_dtype : {"float32", "float16", "bfloat16"}, optional
        Format in which the model gave the logits, for engines that go on in it: gemma_pytorch and DeepMind's. By
        default that of the array, where it is float16, else float32; NumPy has no bfloat16, so that must be said.

    Returns
    -------
    Distribution
        The kept ids, their probabilities, and the scores after each step.

    Raises
    ------
    Refused
        If the engine does not take these settings, or would draw from NaN; a kind of ValueError.
    ValueError
        If there is no such engine, or the input is bad, or a logit is not a number of `logits_dtype`.
    TypeError
        If token ids are not whole numbers.

    Examples
    --------
    >>> import numpy as np
    >>> half = SamplingParams(temperature=1.0, top_p=0.5)
    >>> for name in ("llama.cpp", "gemma_pytorch"):
    ...     print(name, distribution(name, np.zeros(4), half).kept)
    llama.cpp [0 1]
    gemma_pytorch [0 1 2]

    Logits of 10.625 and 10.6875 at temperature 1.1 are 9.66 and 9.72, to bfloat16 both 9.6875:

    >>> params = SamplingParams(temperature=1.1)
    >>> distribution("gemma_pytorch", np.array([10.625, 10.6875]), params, logits_dtype="bfloat16").probs.tolist()
    [0.5, 0.5]
    """
    found = find(engine)
    wide, prompt, output = checked(logits, params, prompt_tokens, output_tokens)
    dtype = _logits_dtype(np.asarray(logits), logits_dtype)
    return run(found, wide, params, Context(prompt=prompt, output=output, V=len(wide), logits_dtype=dtype))


def _logits_dtype(logits: Array, wanted: LogitsDtype | None) -> LogitsDtype:
    """The format, once every logit is known to be a number of it."""
    if wanted is None:
        return "float16" if logits.dtype == np.float16 else "float32"
    if wanted not in get_args(LogitsDtype):
        raise InputError(f"logits_dtype is {wanted!r}: expected one of {', '.join(get_args(LogitsDtype))}, or None")
    if wanted != "float32":  # all logits are rounded to float32
        with np.errstate(over="ignore"):  # beyond float32 is beyond the others
            other = np.flatnonzero(rounded(logits.astype(np.float32), wanted) != logits)
        if len(other):
            raise InputError(
                f"the logit of token {other[0]} is {logits[other[0]]}, which is not a {wanted}: expected logits as the "
                "model gave them, or logits_dtype=None"
            )
    return wanted
