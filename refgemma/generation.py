"""Tokens in, a stream of tokens and text out.

A prompt is read in chunks, so that memory stays bounded however long it is; then each step feeds one token per row,
decides the next, and releases the text that is certain: never half a character, never the beginning of a stop text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import numpy as np

from refgemma.cache import KVCache, PrefixCache, in_common
from refgemma.checkpoint.load import Progress
from refgemma.config import Config
from refgemma.errors import InputError
from refgemma.model import Tap, forward
from refgemma.numerics import Array, Numerics, namespace_of, to_host
from refgemma.params import Params
from refgemma.sampling import Decision, Record, SamplingParams, decide, uniform
from refgemma.sampling.decision import seed_of
from refgemma.text.streaming import StreamDecoder, split_at_stop
from refgemma.text.tokenizer import Tokenizer

FinishReason = Literal["stop", "length"]

# Tokens fed in one call: large enough for fast matrix products, small enough that scores and MLP rows stay bounded.
CHUNK = 512


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens counted."""

    prompt_tokens: int  # read, ``<bos>`` and turn markers included
    completion_tokens: int  # generated, the stop token included

    @property
    def total_tokens(self) -> int:
        """Sum of the two."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A finished output.

    Attributes
    ----------
    text : str
        Without stop tokens, and up to the stop text that ended it.
    tokens : list of int
        All generated tokens, a final stop token included.
    finish_reason : {"stop", "length"}
        "stop" after a stop token or stop text, "length" at `max_tokens` or at the end of the context.
    usage : Usage
        Tokens counted.
    seed : int
        Of the draws; the same seed, prompt and settings reproduce the output.
    record : Record or None
        Every decision, if recorded.
    """

    text: str
    tokens: list[int]
    finish_reason: FinishReason
    usage: Usage
    seed: int
    record: Record | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class Event:
    """One generated token of one row.

    Attributes
    ----------
    text : str
        Text that became certain with it: often empty, sometimes the text of several tokens.
    token : int
        Its id.
    row : int
        Which prompt of the batch.
    decision : Decision or None
        How it was chosen; None for a request in a shared batch that is not recorded.
    logits : ndarray, shape (V,), or None
        Its logits, if recorded.
    result : Generation or None
        The whole output, with the last token of the row.
    """

    text: str
    token: int
    row: int
    decision: Decision | None
    result: Generation | None = None
    logits: Array | None = field(default=None, repr=False, compare=False)


class Model(Protocol):
    """The parts of a `refgemma.Gemma` that are needed here."""

    @property
    def params(self) -> Params: ...
    @property
    def config(self) -> Config: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def numerics(self) -> Numerics: ...
    @property
    def stop_ids(self) -> frozenset[int]: ...


def generate(
    model: Model, rows: Sequence[Row], *, prefix: PrefixCache | None = None, progress: Progress | None = None
) -> Iterator[Event]:
    """Continue a batch of prompts, token by token."""
    if not rows:
        return
    params, config, numerics = model.params, model.config, model.numerics
    xp = namespace_of(params["final_norm"])
    prompts = [row.prompt for row in rows]
    capacity = max(map(len, prompts)) + max(row.limit for row in rows)
    if prefix is None:
        cache = KVCache(config, batch=len(rows), capacity=capacity, dtype=numerics.dtype, xp=xp)
        fed: list[int] = []
    else:
        cache, fed = prefix.resume(prompts[0], params, config, numerics, xp=xp)
        if len(rows) > 1:
            shared = in_common([prompt[:-1] for prompt in prompts])
            if cache.length < shared:
                read_prompts(params, config, [prompts[0][:shared]], cache, fed, numerics=numerics)
            cache, fed = cache.fork(min(cache.length, shared), batch=len(rows), capacity=capacity), []
    scores = read_prompts(params, config, prompts, cache, fed, numerics=numerics, progress=progress)
    live = list(rows)
    while True:
        for row in live:
            yield row.next(scores[row.index])
        live = [row for row in live if row.finish_reason is None]
        if not live:
            return
        # A finished row is fed padding: it costs its share of the step, but nothing attends to it.
        tokens = np.full((len(rows), 1), model.tokenizer.pad_id)
        positions = np.full((len(rows), 1), -1)
        for row in live:
            tokens[row.index] = row.output[-1]
            positions[row.index] = row.position
        scores = forward(params, config, tokens, positions=positions, cache=cache, logits="last", numerics=numerics)
        fed.append(int(tokens[0, 0]))


def read_prompts(
    params: Params,
    config: Config,
    prompts: Sequence[Sequence[int]],
    cache: KVCache,
    fed: list[int],
    *,
    numerics: Numerics,
    progress: Progress | None = None,
) -> Array:
    """Feed prompts to the cache, chunk by chunk."""
    held, longest = cache.length, max(map(len, prompts))
    tokens = np.zeros((len(prompts), longest - held), dtype=np.int64)
    positions = np.full_like(tokens, -1)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = prompt[held:]
        positions[row, longest - len(prompt) :] = np.arange(held, len(prompt))
    for start in range(held, longest, CHUNK):
        stop = min(start + CHUNK, longest)
        part = np.s_[:, start - held : stop - held]
        watched = (
            {} if progress is None else {"tap": _layer_by_layer(progress, start, stop, longest, config.num_layers)}
        )
        scores = forward(
            params,
            config,
            tokens[part],
            positions=positions[part],
            cache=cache,
            logits="last",
            numerics=numerics,
            **watched,
        )
        fed.extend(tokens[part][0].tolist())
        if progress is not None:
            progress(stop, longest)
    return scores


def _layer_by_layer(progress: Progress, start: int, stop: int, total: int, num_layers: int) -> Tap:
    """Tap that reports progress within a chunk, since one chunk of a large model takes seconds."""
    ends = {f"layers.{i}.out": start + (stop - start) * (i + 1) // num_layers for i in range(num_layers - 1)}

    def tap(name: str, value: Array) -> Array:
        if name in ends:
            progress(ends[name], total)
        return value

    return tap


class Row:
    """One prompt and its output so far: tokens, text that is not yet certain, why it ended."""

    def __init__(
        self, index: int, prompt: Sequence[int], settings: SamplingParams, model: Model, record: bool = False
    ) -> None:
        context = model.config.max_positions
        if not prompt:
            raise InputError("the prompt has no tokens: expected at least <bos>")
        self.limit = min(settings.max_tokens, context - len(prompt))
        if self.limit < 1:
            raise InputError(
                f"the prompt has {len(prompt)} tokens, too many for a context of {context} that must also "
                "hold the answer: shorten it"
            )
        self.index = index
        self.prompt = list(prompt)
        self.position = len(prompt) - 1  # of its last token, counted from 0 at the first of the prompt
        self.settings = settings
        self.seed = seed_of(settings)  # of its draws
        self.output: list[int] = []  # generated so far
        self.finish_reason: FinishReason | None = None  # why it ended; None while it goes on
        self._stop_ids = model.stop_ids
        self._tokenizer = model.tokenizer
        self._decoder = StreamDecoder(model.tokenizer)
        self._released = ""
        self._held = ""  # decoded, but perhaps the beginning of a stop text
        self._logits: list[Array] | None = [] if record else None

    def next(self, scores: Array) -> Event:
        """Decide one token from scores (V,), and release the text that it makes certain."""
        # Some tables have more rows than the vocabulary, to fill a multiple of 128; those are not tokens.
        scores = to_host(scores[: self._tokenizer.vocab_size])
        u = uniform(self.seed, len(self.output))
        decision = decide(scores, self.settings, self.prompt, self.output, u, record=self._logits is not None)
        logits = None
        if self._logits is not None:
            logits = scores.copy()
            self._logits.append(logits)
        self.output.append(decision.token)
        self.position += 1

        if decision.token in self._stop_ids:
            self.finish_reason = "stop"
        else:
            self._held += self._decoder.feed(decision.token)
            if len(self.output) == self.limit:
                self.finish_reason = "length"
        if self.finish_reason:
            self._held += self._decoder.flush()
        text, stopped = self._held, False
        self._held = ""
        if self.settings.stop:
            text, self._held, stopped = split_at_stop(text, self.settings.stop)
        if stopped:
            self.finish_reason = "stop"
        if self.finish_reason:
            text += self._held
        self._released += text
        result = None
        if self.finish_reason is not None:
            result = Generation(
                text=self._released,
                tokens=self.output,
                finish_reason=self.finish_reason,
                usage=Usage(prompt_tokens=len(self.prompt), completion_tokens=len(self.output)),
                seed=self.seed,
                record=None if self._logits is None else self._record(self._logits),
            )
        return Event(text=text, token=decision.token, row=self.index, decision=decision, result=result, logits=logits)

    def _record(self, logits: list[Array]) -> Record:
        return Record(
            params=replace(self.settings, seed=self.seed),
            prompt_tokens=tuple(self.prompt),
            tokens=tuple(self.output),
            uniforms=tuple(uniform(self.seed, t) for t in range(len(self.output))),
            logits=logits,
            piece=self._tokenizer.piece,
        )
