"""A Gemma ready to use: configuration, weights and tokenizer in one object."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from refgemma import generation
from refgemma import lora as low_rank
from refgemma.cache import KVCache, PrefixCache
from refgemma.checkpoint.folder import find_model, read_folder
from refgemma.checkpoint.load import Progress, load_params
from refgemma.config import Config, read_config
from refgemma.device import array_library, placed
from refgemma.errors import InputError, InputTypeError
from refgemma.generation import CHUNK, Event, Generation, Row
from refgemma.lora import Adapter
from refgemma.lora.adapter import split_scale
from refgemma.lora.attach import attach, checked_scale, narrowed
from refgemma.lora.fit import fit
from refgemma.lora.merge import merge
from refgemma.model import forward
from refgemma.numerics import FLOAT64, PROFILES, Array, Numerics, namespace_of, to_host
from refgemma.params import Params
from refgemma.sampling import SamplingParams
from refgemma.text.chat import encode_chat
from refgemma.text.streaming import read_generation_config, stop_ids
from refgemma.text.tokenizer import Control, Tokenizer

Prompt: TypeAlias = str | Sequence[Mapping[str, Any]]
LoraNames: TypeAlias = str | Path | Sequence[str | Path]

# Logits of a whole chunk would take half a gigabyte at V = 256,000; scoring needs them only for a moment.
_SCORE_CHUNK = 128


@dataclass(frozen=True, eq=False)
class Score:
    """How likely a model finds a text.

    Attributes
    ----------
    tokens : list of int
        The text's ids, ``<bos>`` first.
    logprobs : ndarray of float64, shape (T - 1,)
        Natural log of the probability of ``tokens[1:]``, each given all before it.
    total : float
        Their sum.
    """

    tokens: list[int]
    logprobs: Array
    total: float


class Attached(NamedTuple):
    """An adapter attached to a model, its weight, and the rows of a batch that it applies to (None: all)."""

    adapter: Adapter
    scale: float
    rows: Array | None


@dataclass(frozen=True, eq=False)
class Gemma:
    """A model, its tokenizer and the arithmetic to run it in.

    Attributes
    ----------
    config : Config
        Shape and constants.
    params : Params
        Weights, nested by name.
    tokenizer : Tokenizer
        Text to ids and back.
    numerics : Numerics
        Arithmetic of activations.
    stop_ids : frozenset of int
        Tokens that end an answer.
    name : str
        What `load` was called with; empty if it was not.
    adapters : tuple of Attached
        The adapters attached to the model `before`.
    merged : bool
        Whether they are part of the weights.
    before : Gemma, optional
        The model without them.
    """

    config: Config
    params: Params
    tokenizer: Tokenizer
    numerics: Numerics
    stop_ids: frozenset[int]
    name: str = ""
    adapters: tuple[Attached, ...] = ()
    merged: bool = False
    before: Gemma | None = None

    def __repr__(self) -> str:
        c = self.config
        names = [on.adapter.name + ("" if on.scale == 1 else f" x {on.scale:g}") for on in self.all_adapters()]
        with_adapters = f", with {' and '.join(names)}" if names else ""
        return (
            f"Gemma: {c.num_parameters:,} parameters, {c.num_layers} layers of width {c.hidden_size}, "
            f"context {c.max_positions:,}, arithmetic {self.numerics.name}{with_adapters}"
        )

    def with_lora(self, adapter: Adapter, scale: float = 1.0, *, rows: ArrayLike | None = None) -> Gemma:
        """Put an adapter on this model; the model itself stays as it is.

        Parameters
        ----------
        adapter : Adapter
            From `refgemma.lora.read`.
        scale : float
            Weight of its changes; may be negative.
        rows : array_like of bool, shape (B,), optional
            For batches of B rows, the rows that it applies to; by default all rows of any batch.

        Returns
        -------
        Gemma
            Shares every array with this one. Call it again to add another adapter: their changes are summed.

        Raises
        ------
        TypeError
            If `adapter` is something else, such as the name of a folder.
        ValueError
            If the adapter does not fit the model, or the scale is not a finite number.

        Notes
        -----
        For DoRA the scale goes into the low-rank product, as PEFT's ``set_scale`` has it, and the norms are brought to
        the trained magnitudes all the same: a scale of 0 is not the base.
        """
        if not isinstance(adapter, Adapter):
            raise InputTypeError(
                f"adapter is a {type(adapter).__name__}: expected an Adapter, from refgemma.lora.read(folder)"
            )
        mask = None if rows is None else np.asarray(rows)
        if mask is not None and (mask.ndim != 1 or mask.dtype != bool):
            raise InputError(
                f"rows are {mask.dtype} of shape {mask.shape}: expected a list of true and false, one a row"
            )
        on = Attached(adapter, checked_scale(scale), mask)
        before = self if self.merged or self.before is None else self.before
        adapters = (on,) if before is self else (*self.adapters, on)
        params = self._with(on, self.params, before.params, self.numerics)
        return replace(self, params=params, adapters=adapters, merged=False, before=before)

    def merge_lora(self, adapter: Adapter | None = None, scale: float = 1.0) -> Gemma:
        """Add the changes of adapters to the weights themselves.

        Parameters
        ----------
        adapter : Adapter, optional
            Attached first; without it, the adapters already attached are merged.
        scale : float
            Its weight.

        Returns
        -------
        Gemma
            With plain weights: computed in float64, rounded once to the format of the base's. It keeps the base, whose
            unchanged arrays it shares.

        Raises
        ------
        ValueError
            If the adapter does not fit, applies to some rows of a batch only, or has biases, which Gemma cannot hold.
        """
        attached = self if adapter is None else self.with_lora(adapter, scale)
        if attached.merged or attached.before is None:
            raise InputError("no adapter is on this model: give one to merge")
        base = exact = attached.before.params  # with the factors as they are stored, not as activations meet them
        for on in attached.adapters:
            exact = attached._with(on, exact, base, FLOAT64)
        params = placed(merge(exact, base), self._xp)
        config = replace(self.config, tie_word_embeddings=params["head"] is params["embed"])
        return replace(attached, params=params, config=config, merged=True)

    def unmerge_lora(self) -> Gemma:
        """Take merged adapters out again.

        Returns
        -------
        Gemma
            The model they were merged into: the very arrays, not a difference, which would not give the old bytes back.

        Raises
        ------
        ValueError
            If nothing was merged.
        """
        if not self.merged or self.before is None:
            raise InputError("no adapter was merged into this model: there is nothing to take out")
        return self.before

    def all_adapters(self) -> tuple[Attached, ...]:
        """Every adapter on this model, merged ones among them.

        Returns
        -------
        tuple of Attached
            In the order they were put on.
        """
        return (*(self.before.all_adapters() if self.before else ()), *self.adapters)

    def encode_prompt(self, prompt: Prompt, *, raw: bool = False) -> list[int]:
        """Token ids that a prompt is fed as.

        Parameters
        ----------
        prompt : str or list of {"role", "content"}
            One user turn, or a conversation.
        raw : bool
            Take a text unchanged: no template, control text live, ``<bos>`` added if absent.

        Returns
        -------
        list of int
            Ids, ``<bos>`` first.

        Raises
        ------
        TypeError
            If the prompt is neither, or a conversation is to be taken raw.
        ValueError
            If the conversation cannot be rendered.
        """
        if isinstance(prompt, str):
            if raw:
                return self.tokenizer.encode(prompt, bos=True, control="all")
            return encode_chat(self.tokenizer, [{"role": "user", "content": prompt}])
        if raw:
            raise InputTypeError(f"the prompt is a {type(prompt).__name__}: expected a text, to be taken raw")
        return encode_chat(self.tokenizer, prompt)

    def logits(self, tokens: ArrayLike, *, last: bool = False, progress: Progress | None = None) -> Array:
        """Score every vocabulary entry as the next token, at every position.

        Parameters
        ----------
        tokens : array_like of int, shape (T,) or (B, T)
            Token ids; ``<bos>`` is not added.
        last : bool
            Only at the last position.
        progress : callable, optional
            ``progress(read, total)``, in tokens per row.

        Returns
        -------
        ndarray, shape (T, V) or (B, T, V); with `last`, (V,) or (B, V)
            Logits, in the dtype of activations.

        Raises
        ------
        ValueError
            If tokens have another shape, are not ids, or are more than the model reads.
        """
        try:
            ids = np.asarray(tokens)
        except ValueError:
            raise InputError("tokens have rows of different lengths: expected shape (T,) or (B, T)") from None
        if ids.ndim not in (1, 2) or not ids.size:
            raise InputError(f"tokens have shape {ids.shape}: expected (T,) or (B, T), at least one of each")
        rows = ids if ids.ndim == 2 else ids[None]
        self._check_length(rows.shape[1])
        if last:
            *_, (_, out) = self._chunks(rows, CHUNK, "last", progress)
        else:
            out = np.empty((*rows.shape, self.config.vocab_size), self.numerics.dtype)
            for part, scores in self._chunks(rows, CHUNK, "all", progress):
                out[:, part] = scores
        return out if ids.ndim == 2 else out[0]

    def score(self, text: str, *, control: Control = "none", progress: Progress | None = None) -> Score:
        """Log-probability of each token of a text.

        Parameters
        ----------
        text : str
            What to score; ``<bos>`` goes before it.
        control : {"none", "markers", "all"}
            Which control text in it counts as control tokens.
        progress : callable, optional
            ``progress(read, total)``, in tokens.

        Returns
        -------
        Score
            Natural logs.

        Raises
        ------
        ValueError
            If the text is longer than the model reads, or the model computes NaN.
        """
        tokens = self.tokenizer.encode(text, bos=True, control=control)
        self._check_length(len(tokens))
        ids = np.array(tokens)
        logprobs = np.empty(len(ids) - 1)
        for part, scores in self._chunks(ids[None], _SCORE_CHUNK, "all", progress):
            following = ids[part.start + 1 : part.stop + 1]
            rows = scores[0, : len(following)].astype(np.float64)
            if np.isnan(rows).any():
                raise InputError(
                    "logits hold NaN: the weights of this model are damaged, or too large for the arithmetic"
                )
            rows -= rows.max(axis=-1, keepdims=True)
            own = rows[np.arange(len(following)), following]
            logprobs[part.start : part.start + len(following)] = own - np.log(np.exp(rows, out=rows).sum(axis=-1))
        return Score(tokens, logprobs, float(logprobs.sum()))

    def generate(
        self,
        prompt: Prompt,
        *,
        raw: bool = False,
        prefix: PrefixCache | None = None,
        progress: Progress | None = None,
        record: bool = False,
        **settings: Any,
    ) -> Generation:
        """Answer a prompt.

        Parameters
        ----------
        prompt : str or list of {"role", "content"}
            One user turn, or a conversation.
        raw : bool
            Continue a text unchanged: no template, control text live, ``<bos>`` added if absent.
        prefix : PrefixCache, optional
            Skips the beginning that this prompt shares with an earlier one.
        progress : callable, optional
            ``progress(read, total)`` while the prompt is read, in tokens.
        record : bool
            Whether the result holds every decision with its logits: a megabyte per token at V = 256,000.
        **settings
            Fields of `SamplingParams`.

        Returns
        -------
        Generation
            Text, tokens, why it ended, and the seed that reproduces it.
        """
        ids = self.encode_prompt(prompt, raw=raw)
        row = Row(0, ids, SamplingParams(**settings), self, record)
        events = generation.generate(self, [row], prefix=prefix, progress=progress)
        return next(event.result for event in events if event.result is not None)

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        raw: bool = False,
        lora: Sequence[Adapter | None] | None = None,
        prefix: PrefixCache | None = None,
        progress: Progress | None = None,
        record: bool = False,
        **settings: Any,
    ) -> list[Generation]:
        """Answer several prompts side by side.

        Parameters
        ----------
        prompts : sequence of str or list of {"role", "content"}
            As `generate` takes them.
        raw : bool
            Continue texts unchanged, as `generate` does.
        lora : sequence of Adapter or None, optional
            The adapter of each row, in addition to those attached to the model.
        prefix : PrefixCache, optional
            The beginning that all prompts share is read at most once; not with `lora`, which makes other keys for
            every row.
        progress : callable, optional
            ``progress(read, total)`` while the prompts are read, in tokens per row.
        record : bool
            Whether the results hold every decision with its logits.
        **settings
            Fields of `SamplingParams`, the same for every row. With a seed, each row is what `generate` alone would
            return, up to the first decision so close that rounding decides it.

        Returns
        -------
        list of Generation
            In the order of the prompts.
        """
        if isinstance(prompts, str) or not isinstance(prompts, Sequence):
            raise InputTypeError(f"prompts is a {type(prompts).__name__}: expected a list of prompts")
        ids = [self.encode_prompt(prompt, raw=raw) for prompt in prompts]
        adapted = self
        if lora is not None:
            if prefix is not None:
                raise InputError("prefix was given with lora: rows with other adapters have other keys, none in common")
            if len(lora) != len(prompts):
                raise InputError(f"lora has {len(lora)} entries for {len(prompts)} prompts: expected one each, or None")
            for adapter in dict.fromkeys(a for a in lora if a is not None):
                adapted = adapted.with_lora(adapter, rows=[a is adapter for a in lora])
        params = SamplingParams(**settings)
        rows = [Row(i, prompt, params, adapted, record) for i, prompt in enumerate(ids)]
        events = generation.generate(adapted, rows, prefix=prefix, progress=progress)
        results = {event.row: event.result for event in events if event.result is not None}
        return [results[row] for row in range(len(prompts))]

    def stream(
        self,
        prompt: Prompt,
        *,
        raw: bool = False,
        prefix: PrefixCache | None = None,
        progress: Progress | None = None,
        record: bool = False,
        **settings: Any,
    ) -> Iterator[Event]:
        """Answer a prompt token by token.

        Parameters
        ----------
        prompt : str or list of {"role", "content"}
            One user turn, or a conversation.
        raw : bool
            Continue a text unchanged, as `generate` does.
        prefix : PrefixCache, optional
            Skips the beginning that this prompt shares with an earlier one; keep one for the length of a chat.
        progress : callable, optional
            ``progress(read, total)`` while the prompt is read, in tokens.
        record : bool
            Whether events hold the effect of each step, and the result every decision with its logits.
        **settings
            Fields of `SamplingParams`.

        Returns
        -------
        iterator of Event
            One per token; their texts joined are the answer, and the last holds the whole result.
        """
        ids = self.encode_prompt(prompt, raw=raw)
        row = Row(0, ids, SamplingParams(**settings), self, record)
        return generation.generate(self, [row], prefix=prefix, progress=progress)

    def _with(self, on: Attached, params: Params, before: Params, numerics: Numerics) -> Params:
        changes = fit(on.adapter, self.config).changes
        if numerics.rounding:
            changes = narrowed(changes, params, on.rows)
        attached = attach(params, changes, before=before, scale=on.scale, rows=on.rows, dtype=numerics.dtype)
        return placed(attached, self._xp)

    @property
    def _xp(self) -> Any:
        """Array library of the weights."""
        return namespace_of(self.params["final_norm"])

    def _chunks(
        self, tokens: Array, size: int, logits: Literal["all", "last"], progress: Progress | None
    ) -> Iterator[tuple[slice, Array]]:
        """Logits of a batch, some positions at a time."""
        B, T = tokens.shape
        cache = KVCache(self.config, batch=B, capacity=T, dtype=self.numerics.dtype, xp=self._xp)
        for start in range(0, T, size):
            part = slice(start, min(start + size, T))
            scores = forward(
                self.params, self.config, tokens[:, part], cache=cache, logits=logits, numerics=self.numerics
            )
            yield part, to_host(scores)
            if progress is not None:
                progress(part.stop, T)

    def _check_length(self, count: int) -> None:
        if count > self.config.max_positions:
            raise InputError(f"{count} tokens were given, the model reads at most {self.config.max_positions}")


def load(
    model: str | Path = "tiny-it",
    *,
    numerics: str = "float32",
    weights: str | None = None,
    lora: LoraNames = (),
    device: str = "cpu",
    progress: Progress | None = None,
) -> Gemma:
    """Load a model from its files.

    Parameters
    ----------
    model : str or Path
        A folder in Hugging Face layout, the name of a shipped model, or a hub id whose files are in ``weights/`` or in
        the local hub cache. Nothing is downloaded.
    numerics : str
        Arithmetic of activations: "float32", "float64", or the name of an engine's roundings in `refgemma.profiles`,
        such as "bf16-transformers".
    weights : str, optional
        How matrices stay in memory: "bfloat16" as stored, "float32" or "float64". By default "float64" when `numerics`
        is, else "float32".
    lora : str or Path, or a sequence of them
        Adapters to put on, each a folder or the name of a shipped one, with ``:SCALE`` behind it if not whole.
    device : {"cpu", "cuda"}
        Where to compute: with NumPy here, or with CuPy on an NVIDIA GPU (extra ``gpu``). Weights go there one by one;
        those in "bfloat16" are widened there, one whole matrix at a time, whenever one is multiplied.
    progress : callable, optional
        ``progress(done, total)`` while weights are read, in bytes.

    Returns
    -------
    Gemma
        Ready to use.

    Raises
    ------
    FileNotFoundError
        If there is no such model, or a file of it is missing.
    ValueError
        If a file is broken, does not fit the configuration, or a setting is unknown.

    Examples
    --------
    >>> gemma = load("tiny-it")
    >>> gemma.config.layers[0].num_kv_heads
    2
    """
    if numerics not in PROFILES:
        raise InputError(f"numerics is {numerics!r}: expected {', '.join(map(repr, PROFILES))}")
    profile = PROFILES[numerics]
    weights = weights or profile.dtype.name
    if weights not in ("bfloat16", "float32", "float64"):
        raise InputError(f"weights is {weights!r}: expected 'bfloat16', 'float32' or 'float64'")
    if weights == "float64" and profile.dtype != np.float64:
        raise InputError(
            f"weights are 'float64', wider than the arithmetic {numerics!r}: their extra digits would be lost"
        )
    xp = array_library(device)
    folder = find_model(model)
    config = read_config(folder)
    tokenizer = Tokenizer(folder / "tokenizer.model")
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} pieces, the embedding table {config.vocab_size} rows: "
            "these files do not belong together"
        )
    if profile.rounding and any(tensor.dtype != "BF16" for tensor in read_folder(folder).values()):
        raise InputError(
            f"{folder} stores numbers that are not bfloat16, which an engine such as {numerics!r} imitates would round "
            "when it loads them: use numerics='float32', or convert the files first"
        )
    params = load_params(folder, config, weights=weights, norm_dtype=profile.dtype, xp=xp, progress=progress)
    try:
        stops = frozenset(stop_ids(tokenizer, read_generation_config(folder)))
    except ValueError as error:
        raise InputError(f"{folder / 'generation_config.json'}: {error}") from None
    gemma = Gemma(config, params, tokenizer, profile, stops, str(model))
    for name in [lora] if isinstance(lora, (str, Path)) else lora:
        where, scale = split_scale(name)
        gemma = gemma.with_lora(low_rank.read(low_rank.find_adapter(where)), scale)
    return gemma
