"""What other engines call the tensors of a trace, recognised with some tolerance.

A name is cut at dots, slashes and brackets. The layer number is found anywhere in it; what follows is looked up in a
table, in which a module means its output, and ``.input`` after it what it was given. One foreign tensor may map to
several of the reference: to one of them, identified by its shape, or to all, concatenated.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from refgemma.config import Config
from refgemma.errors import InputError, nearest_name
from refgemma.oracle.operations import FIRST, IN_LAYER, LAST, names_of

# By what follows the layer number. "before" is the stream that enters the layer: the output of the one before it, or
# the embedding.
IN_LAYERS: dict[str, tuple[str, ...]] = {
    # Modules of transformers; gemma_pytorch differs in qkv_proj alone. Flax names of google-deepmind/gemma below.
    "": ("out",),
    "input": ("before",),
    "input_layernorm": ("attn.norm",),
    "input_layernorm.input": ("before",),
    "self_attn.q_proj": ("attn.q",),
    "self_attn.k_proj": ("attn.k",),
    "self_attn.v_proj": ("attn.v",),
    "self_attn.qkv_proj": ("attn.q", "attn.k", "attn.v"),
    "self_attn.q_proj.input": ("attn.norm",),
    "self_attn.k_proj.input": ("attn.norm",),
    "self_attn.v_proj.input": ("attn.norm",),
    "self_attn.input": ("attn.norm",),
    "self_attn.q_embed": ("attn.q_rope",),  # as apply_rotary_pos_emb calls its results
    "self_attn.k_embed": ("attn.k_rope",),
    "self_attn.q_rope": ("attn.q_rope",),
    "self_attn.k_rope": ("attn.k_rope",),
    "self_attn.attn_scores": ("attn.scores",),
    "self_attn.scores": ("attn.scores",),
    "self_attn.attn_weights": ("attn.probs",),  # what transformers calls by this name is the softmax
    "self_attn.probs": ("attn.probs",),
    "self_attn.o_proj.input": ("attn.mix",),
    "self_attn.o_proj": ("attn.out",),
    "self_attn": ("attn.out", "attn.probs"),  # eager attention gives both
    "post_attention_layernorm.input": ("attn.residual",),
    "post_attention_layernorm": ("mlp.norm",),  # in Gemma 1 the norm before the MLP, whatever it says
    "mlp.input": ("mlp.norm",),
    "mlp.gate_proj.input": ("mlp.norm",),
    "mlp.up_proj.input": ("mlp.norm",),
    "mlp.gate_proj": ("mlp.gate",),
    "mlp.up_proj": ("mlp.up",),
    "mlp.gate_up_proj": ("mlp.gate", "mlp.up"),
    "mlp.act_fn": ("mlp.act",),
    "mlp.act_fn.input": ("mlp.gate",),
    "mlp.down_proj.input": ("mlp.gated",),
    "mlp.down_proj": ("mlp.down",),
    "mlp": ("mlp.down",),
    "pre_attention_norm": ("attn.norm",),
    "pre_attention_norm.input": ("before",),
    "attn.q_einsum": ("attn.q",),
    "attn.kv_einsum": ("attn.k", "attn.v"),
    "attn.qkv_einsum": ("attn.q", "attn.k", "attn.v"),
    "attn.attn_vec_einsum.input": ("attn.mix",),
    "attn.attn_vec_einsum": ("attn.out",),
    "attn": ("attn.out",),
    "pre_ffw_norm.input": ("attn.residual",),
    "pre_ffw_norm": ("mlp.norm",),
    "mlp.gating_einsum": ("mlp.gate", "mlp.up"),
    "mlp.linear.input": ("mlp.gated",),
    "mlp.linear": ("mlp.down",),
} | {name: (name,) for name in IN_LAYER}

OUTSIDE: dict[str, str] = {
    "embed_tokens": "embed",
    "embedder": "embed",
    "embedder.encode": "embed",
    "inputs_embeds": "embed",
    "norm.input": "before",
    "norm": "final_norm",
    "final_norm.input": "before",
    "lm_head.input": "final_norm",
    "last_hidden_state": "final_norm",
    "lm_head": "logits",
    "embedder.decode": "logits",
} | {name: name for name in (*FIRST, *LAST)}

# Modules that include the scaling factor in some releases and not in others: the stream itself is preferred.
UNSURE = ("embed_tokens", "embedder")

_LAYER = re.compile(r"(?:^|\.)(?:layers?|blocks?|h)[._]?(\d+)(?=\.|$)")
_TUPLE = re.compile(r"(?:^|\.)(hidden_states|attentions)[._](\d+)$")
# What dumps append to the name of a module, besides the number of a tuple's entry.
_OUTPUT = ("output", "outputs", "out", "__call__", "forward")
_INPUT = ("input", "inputs", "args", "in")
# Not activations, though they are named after modules.
_OTHER = re.compile(r"(?:^|\.)(?:params|weights?|grads?|gradients?|kernel|scale|bias|w|past_key_values|cache)(?:\.|$)")


_I = "{i}"  # in mappings


class Match(NamedTuple):
    """The tensors that a foreign name means, several if it may join them; the lowest rank for a tensor wins.

    Ranks: 0 the user's mapping, 1 the tensor itself, 2 what the next module was given, 3 a list of the whole stream,
    4 a module that may or may not scale.
    """

    tensors: tuple[str, ...]
    rank: int


def match(name: str, config: Config) -> Match | None:
    """Recognise a foreign name."""
    plain = re.sub(r"[/\[\]:|\s]+", ".", name).strip(".")
    if _OTHER.search(plain):
        return None
    L = config.num_layers
    if found := _TUPLE.search(plain):
        i = int(found[2])
        if found[1] == "attentions":
            return Match((f"layers.{i}.attn.probs",), 2) if i < L else None
        # transformers: what enters each layer, then the stream after the final norm.
        return Match((_before(i) if i < L else "final_norm",), 3) if i <= L else None
    if layers := list(_LAYER.finditer(plain)):
        i, tail = int(layers[-1][1]), _known(plain[layers[-1].end() :].strip("."), IN_LAYERS)
        if i >= L or tail is None:
            return None
        tensors = tuple(_before(i) if kind == "before" else f"layers.{i}.{kind}" for kind in IN_LAYERS[tail])
        return Match(tensors, 2 if tail.endswith("input") else 1)
    words = plain.split(".")
    for first in range(len(words)):  # skip whatever wraps the model
        if (tail := _known(".".join(words[first:]), OUTSIDE)) is not None:
            kind = _before(L) if OUTSIDE[tail] == "before" else OUTSIDE[tail]
            return Match((kind,), 4 if tail in UNSURE else 2 if tail.endswith("input") else 1)
    return None


def _known(tail: str, table: Mapping[str, object]) -> str | None:
    """Entry of a table that a name means, without what dumps append."""
    while tail not in table:
        rest, _, last = tail.rpartition(".")
        if last in _INPUT:
            tail = f"{rest}.input".lstrip(".")
            return tail if tail in table else None
        if not tail or not (last in _OUTPUT or last.isdecimal()):
            return None
        tail = rest
    return tail


def mapped(mapping: Mapping[str, str], names: list[str], config: Config) -> dict[str, Match]:
    """Matches of a mapping that the user gave: names in the file to names of the reference."""
    known = names_of(config)
    found: dict[str, Match] = {}
    for source, target in mapping.items():
        if (_I in source) != (_I in target):
            has, lacks = (source, target) if _I in source else (target, source)
            raise InputError(
                f"the mapping has {source!r} for {target!r}: {has!r} contains {_I}, {lacks!r} does not; "
                "write it in both, or the number of a layer"
            )
        there = {name: target.replace(_I, str(i)) for i, name in _expanded(source, config) if name in names}
        if not there:
            near = nearest_name(source, names)
            raise InputError(
                f"the mapping names {source!r}, which is not in the file"
                + (f": the nearest is {near!r}" if near else "")
            )
        for name, tensor in there.items():
            if tensor not in known:
                near = nearest_name(tensor, known)
                raise InputError(
                    f"the mapping has {source!r} for {target!r}, which is not the name of a tensor"
                    + (f": the nearest is {near!r}" if near else "")
                )
            if other := next((one for one, had in found.items() if had.tensors == (tensor,) and one != name), None):
                raise InputError(f"the mapping has both {other!r} and {name!r} for {tensor!r}: leave one out")
            found[name] = Match((tensor,), 0)
    return found


def only_some_layers(mapping: Mapping[str, str], names: list[str], config: Config) -> list[str]:
    """Notes on patterns of a mapping that the file has for some layers and not for others."""
    lines = []
    for source in (source for source in mapping if _I in source):
        missing = [i for i, name in _expanded(source, config) if name not in names]
        if missing:
            share = f"{len(missing)} of {config.num_layers} layers: {', '.join(map(str, missing))}"
            lines.append(f"the mapping's {source!r} is not in the file for {share}")
    return lines


def _expanded(source: str, config: Config) -> list[tuple[int, str]]:
    """Names that a line of a mapping covers, and their layers."""
    return [(i, source.replace(_I, str(i))) for i in range(config.num_layers if _I in source else 1)]


def _before(i: int) -> str:
    """The stream that enters layer `i`."""
    return f"layers.{i - 1}.out" if i else "embed"
