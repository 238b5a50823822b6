"""Known bugs of Gemma ports, each with the place where it was found and the edits that make the reference do the same.

A key is a letter for the part of the model and a number; a related bug under the same number adds a word. `README.md`
beside this file is the same table as a page.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from refgemma.errors import InputError
from refgemma.numerics import Array
from refgemma.oracle.bugs import edits
from refgemma.oracle.bugs.edits import Edit
from refgemma.oracle.bugs.port import Setup

# Wrong in any arithmetic; a rounding that should not be; one that engines choose differently, all of them in good
# faith; a mistake in the tokens that are fed.
Kind = Literal["bug", "rounding", "profile", "tokens"]

_NORMS = ("attn.norm", "mlp.norm", "final_norm")
_ROTATED = ("attn.q_rope", "attn.k_rope")


@dataclass(frozen=True)
class Bug:
    """One known way to compute something else than Gemma."""

    key: str  # name in the catalogue
    title: str  # a few words
    sentence: str  # what is wrong, and what is right
    thread: str  # where it was found: a public issue, pull request, commit or article
    where: tuple[str, ...]  # tensors, as named in the table of operations, that come out wrong from right inputs
    edits: tuple[Edit, ...]  # more than one where ports reach the same logits through different tensors
    kind: Kind = "bug"

    def setups(self, setup: Setup) -> list[Setup]:
        """The setup with this bug in it, once for each edit that can show."""
        return [edited for edit in self.edits if (edited := edit(setup)) is not None]


def find(key: str) -> Bug:
    """The bug with a key."""
    found = next((bug for bug in BUGS if bug.key == key), None)
    if found is None:
        raise InputError(f"unknown bug {key!r}: expected one of {', '.join(bug.key for bug in BUGS)}")
    return found


def with_bugs(setup: Setup, bugs: Iterable[Bug]) -> list[Setup]:
    """The setup with several bugs in it, in every way in which they can show together."""
    setups = [setup]
    # Later ones first: tokens are set before positions, and positions are moved before they are rounded.
    for bug in sorted(bugs, key=BUGS.index, reverse=True):
        setups = [edited for one in setups for edited in bug.setups(one)]
    return setups


def _after_padding(row: Array, last: int) -> int:
    return int(row[last] + np.count_nonzero(row[:last] < 0))


# fmt: off
BUGS: tuple[Bug, ...] = (
    # ---- A: embedding
    Bug("A1", "embedding not scaled",
        "Rows of the table go in as they are; Gemma multiplies them by sqrt(D).",
        "https://github.com/marin-community/levanter/pull/978",
        ("embed",), (edits.field(embedding="bare"),)),
    Bug("A2", "precision of sqrt(D)",
        "sqrt(D) is rounded to bfloat16 where the reference has it exact, or the other way round; engines differ.",
        "https://github.com/huggingface/transformers/pull/29402",
        ("embed",), (edits.other_scale_precision,), "profile"),
    Bug("A3", "sqrt(D) in the table",
        "sqrt(D) is baked into the tied table, so the logits have it as well; it belongs to the lookup alone.",
        "https://github.com/mattn/tensai/pull/248",
        ("logits",), (edits.field(head_scaled=True),)),
    Bug("A4", "embedding scaled twice",
        "The lookup module scales the rows already, and they are scaled a second time.",
        "https://github.com/RLinf/RLinf/pull/1098",
        ("embed",), (edits.field(embedding="scaled twice"),)),
    Bug("A5", "adapter's embedding not scaled",
        "An adapter's delta of the embedding lacks the factor sqrt(D) that the table's rows get.",
        "https://github.com/huggingface/peft/pull/2825",
        ("embed",), (edits.bare_delta,)),
    # ---- B: norm
    Bug("B1", "norm gain w",
        "Norms multiply by w; Gemma's files hold the distance from one, so the gain is 1 + w.",
        "https://github.com/linkedin/Liger-Kernel/pull/85",
        _NORMS, (edits.gain_plus(-1.0),)),
    Bug("B2", "norm gain 2 + w",
        "One is added twice: GGUF files hold 1 + w already, checkpoints hold w.",
        "https://github.com/ggml-org/llama.cpp/pull/5631",
        _NORMS, (edits.gain_plus(1.0),)),
    Bug("B4", "narrowed before the gain",
        "The normed vector is rounded, then multiplied by a rounded gain, as in Llama; Gemma rounds once, last.",
        "https://github.com/google/gemma_pytorch/pull/67",
        _NORMS, (edits.rounded("norm.normed", "norm.gain"),), "rounding"),
    Bug("B5", "1 + w in bfloat16",
        "The gain 1 + w is rounded to bfloat16, which moves it by up to 0.4 %; engines differ.",
        "https://github.com/vllm-project/vllm/pull/3653",
        _NORMS, (edits.rounded("norm.gain"),), "profile"),
    Bug("B6", "mean square in bfloat16",
        "Squares and their mean are rounded to bfloat16; they need float32.",
        "https://github.com/sgl-project/sglang/pull/27540",
        _NORMS, (edits.rounded("norm.square", "norm.mean"), edits.narrow_squares), "rounding"),
    Bug("B8", "norm after the residual add",
        "Norms are applied after each residual add; Gemma 1 applies them to a copy, before attention and MLP.",
        "https://github.com/google-deepmind/gemma/commit/205e096",
        ("attn.norm", "attn.residual", "mlp.norm", "out"), (edits.field(norms="after"),)),
    Bug("B8 Gemma 2", "norm placed as in Gemma 2",
        "post_attention_layernorm is applied to attention's output; in Gemma 1 it is the norm before the MLP.",
        "https://github.com/kekzl/imp/pull/65",
        ("attn.residual", "mlp.norm"), (edits.field(norms="as in Gemma 2"),)),
    Bug("B9", "eps outside the root",
        "Norms divide by sqrt(mean square) + eps; Gemma has eps inside the root.",
        "https://github.com/NVIDIA/TransformerEngine/pull/364",
        _NORMS, (edits.field(eps_outside=True),)),
    Bug("B9 1e-5", "eps ten times too large",
        "Norms use another model's eps, 1e-5; Gemma's is 1e-6.",
        "https://github.com/mosaicml/llm-foundry/pull/1399",
        _NORMS, (edits.larger_eps,)),
    # ---- C: MLP
    Bug("C1", "GELU by erf",
        "The MLP uses the erf form of GELU; Gemma was trained with the tanh form.",
        "https://github.com/google/gemma_pytorch/pull/37",
        ("mlp.act",), (edits.field(activation="erf"),)),
    Bug("C2", "SiLU",
        "The MLP uses SiLU, as Llama does; Gemma uses GELU.",
        "https://github.com/NVIDIA/TensorRT-Model-Connect/pull/177",
        ("mlp.act",), (edits.field(activation="silu"),)),
    Bug("C3", "gate and up swapped",
        "The activation is applied to what the up matrix gives, not to what the gate matrix gives.",
        "https://github.com/google-deepmind/gemma/commit/5e2ff66",
        ("mlp.gate", "mlp.up", "mlp.act", "mlp.gated"),
        (edits.field(activated="up"), edits.swapped_gate)),
    Bug("C3 reshaped", "gate reshaped",
        "The gate matrix is reshaped where it should be transposed: the right shape, and wrong numbers.",
        "https://github.com/google-deepmind/gemma/commit/5e2ff66",
        ("mlp.gate",), (edits.reshaped_gate,)),
    # ---- D: rotary embedding
    Bug("D1", "rotary angles in bfloat16",
        "Frequencies and angles are rounded to bfloat16; they need float32.",
        "https://github.com/huggingface/transformers/pull/29285",
        _ROTATED, (edits.rounded("rope.frequency", "rope.angle"),), "rounding"),
    Bug("D1 frequencies", "rotary frequencies in bfloat16",
        "Inverse frequencies are rounded to bfloat16, as when a whole model is cast; they need float32.",
        "https://github.com/keras-team/keras-hub/pull/1497",
        _ROTATED, (edits.rounded("rope.frequency"),), "rounding"),
    Bug("D1 table", "cosines and sines in bfloat16",
        "The rotary table is rounded to bfloat16; engines that run in bfloat16 differ in this.",
        "https://github.com/EricLBuehler/candle-vllm/pull/50",
        _ROTATED, (edits.rounded("rope.table"),), "profile"),
    Bug("D2", "positions in bfloat16",
        "Positions are rounded to bfloat16, which cannot count past 256: 257 becomes 256; they must stay integers.",
        "https://github.com/keras-team/keras-hub/issues/1494",
        _ROTATED, (edits.positions_in_bfloat16,)),
    Bug("D3", "angle as position * (1 / timescale)",
        "Angles are formed in float32 by a reciprocal: off by up to 0.015 at position 131071, a division by half.",
        "https://unsloth.ai/blog/gemma-bugs",
        _ROTATED, (edits.float32_angles(divided=False),), "profile"),
    Bug("D3 divided", "angle as position / timescale",
        "Angles are formed in float32 by a division, off by up to 0.007 at position 131071.",
        "https://unsloth.ai/blog/gemma-bugs",
        _ROTATED, (edits.float32_angles(divided=True),), "profile"),
    Bug("D7", "rotary lanes paired as neighbours",
        "Lanes 2i and 2i + 1 turn together; in Gemma it is lanes i and i + H/2.",
        "https://github.com/huggingface/transformers/issues/25199",
        _ROTATED, (edits.field(lanes="neighbours"),)),
    Bug("D9", "last position shared",
        "The last token of a left-padded row has the position of a row without padding; padding does not count.",
        "https://github.com/unslothai/unsloth/pull/4078",
        _ROTATED, (edits.last_position(_after_padding),)),
    Bug("D9 restarted", "last position restarted",
        "The last token has position 0, as if every call began a text; positions count on.",
        "https://github.com/TransformerLensOrg/TransformerLens/pull/1610",
        _ROTATED, (edits.last_position(lambda row, last: 0),)),
    # ---- E: attention
    Bug("E2", "head width assumed to be D / N",
        "Queries are scaled by (D/N)**-0.5; Gemma's head width is given, not derived.",
        "https://github.com/meta-pytorch/gpt-fast/pull/115",
        ("attn.scores",), (edits.scale_of_assumed_width,)),
    Bug("E6", "key heads read in turn",
        "Query head n reads key head n % K; in Gemma it is n // G, with G = N // K.",
        "https://github.com/apple/axlearn/pull/842",
        ("attn.scores", "attn.mix"), (edits.heads_in_turn,)),
    # ---- G: cache; H: tokens
    Bug("G1", "fresh keys not rounded",
        "Keys of this call are used before they are rounded, cached ones after it: cached and full runs differ.",
        "https://github.com/oarriaga/paz/pull/415",
        ("attn.scores",), (edits.wide_keys,), "rounding"),
    Bug("H1 missing", "<bos> missing",
        "The first token, <bos>, was not fed.",
        "https://unsloth.ai/blog/gemma-bugs",
        (), (edits.first_token(0),), "tokens"),
    Bug("H1 double", "<bos> twice",
        "The first token, <bos>, was fed twice: by the template and by the tokenizer.",
        "https://github.com/huggingface/text-generation-inference/pull/1594",
        (), (edits.first_token(2),), "tokens"),
)
# fmt: on
