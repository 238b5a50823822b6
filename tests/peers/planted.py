"""Known bugs planted in transformers' own Gemma, and every named tensor of what it then computes.

Written in torch, from the catalogue's sentences and threads, without `refgemma.oracle`: what the diagnoser is judged by
must not share its code. An honest run (no bugs) replaces nothing; hooks and wrappers watch it.

`planted_tensors(model, bugs)` gives {our name: float32 array}, in our axes, zero at padding and where a query may not
attend. A `model` has `config`, `params` (float32 arrays; the embedding may be `Adapted`), `tokens` and `positions`, as
a `tests.models.Model` has.
"""

import contextlib
import math
from types import MethodType
from unittest import mock

import numpy as np
import torch
from transformers.models.gemma import modeling_gemma
from transformers.models.gemma.configuration_gemma import GemmaConfig

from refgemma.ops.linear import Adapted
from tests.models import hf_config, hf_tensors

BF16 = torch.bfloat16

# Key: (what is done wrong, the dtypes in which the engine shows it).
BUGS = {
    "A1": ("the embedding is not scaled", "float32"),
    "A2": ("sqrt(D) rounded to bfloat16 in float32 runs; not rounded in bfloat16 runs", "both"),
    "A3": ("sqrt(D) is baked into the tied table, so the head has it, too", "float32"),
    "A4": ("sqrt(D) applied twice", "float32"),
    "A5": ("the low-rank delta of the embedding is not scaled", "float32"),
    "B1": ("norm gain w", "float32"),
    "B2": ("norm gain 2 + w", "float32"),
    "B4": ("narrowed before the gain is applied, which is formed in bfloat16", "bfloat16"),
    "B5": ("1 + w formed in bfloat16", "both"),
    "B6": ("mean square in bfloat16", "both"),
    "B8": ("norm after the residual add, not before attention and MLP", "float32"),
    "B8 gemma2": ("the norm before the MLP taken for Gemma 2's norm of attention's output", "float32"),
    "B9": ("eps added outside the root", "float32"),
    "B9 1e-5": ("eps ten times too large", "float32"),
    "C1": ("GELU by erf", "float32"),
    "C2": ("SiLU", "float32"),
    "C3": ("the activation is on up, not on gate", "float32"),
    "C3 weights": ("the weights of gate and up are each other's", "float32"),
    "C3 reshaped": ("the gate weight is reshaped where it should be transposed", "float32"),
    "D1": ("frequencies and angles in bfloat16", "both"),
    "D1 frequencies": ("inverse frequencies in bfloat16", "both"),
    "D1 table": ("cosines and sines in bfloat16", "float32"),
    "D2": ("positions in bfloat16", "float32"),
    "D3": ("position times 1 / timescale in float32: what transformers does anyway", "float32"),
    "D3 divided": ("position over timescale in float32", "float32"),
    "D7": ("lanes 2i and 2i + 1 paired", "float32"),
    "D9": ("the last token of a left-padded row takes the position of a row without padding", "float32"),
    "D9 restarted": ("the last token of each row has position 0: positions start anew in a second call", "float32"),
    "E2": ("query scale (D / N) ** -0.5", "float32"),
    "E6": ("query head n reads key head n % K", "float32"),
    "G1": ("fresh keys are not rounded, and only those of the trace are", "bfloat16"),
    "H1 missing": ("the first token is not fed", "float32"),
    "H1 double": ("the first token is fed twice", "float32"),
}


def planted_tensors(model, bugs=(), *, dtype=torch.float32, attention="eager"):
    """Every named tensor of transformers' run with these bugs in it, {name: float32 array}; eager attention."""
    bugs = frozenset(bugs)
    if unknown := bugs - set(BUGS):
        raise ValueError(f"no such bug: {sorted(unknown)}")
    tokens, positions = model.tokens, model.positions
    if bugs & {"H1 missing", "H1 double"}:
        tokens, positions = fed_otherwise(tokens, positions, 0 if "H1 missing" in bugs else 2)
    peer = peer_of(model, dtype, attention)
    recorder = Recorder(peer, tokens, positions)
    with contextlib.ExitStack() as stack:
        plant(peer, bugs, model, positions, recorder, stack)
        recorder.watch(stack)
        with torch.no_grad():
            peer(
                input_ids=torch.from_numpy(np.ascontiguousarray(tokens)),
                attention_mask=torch.from_numpy((positions >= 0).astype(np.int64)),
                position_ids=torch.from_numpy(np.maximum(positions, 0)),
                use_cache=False,
            )
    return recorder.seen


def planted_logits(model, bugs=(), **options):
    """Logits (B, T, V) alone."""
    return planted_tensors(model, bugs, **options)["logits"]


def peer_of(model, dtype=torch.float32, attention="eager"):
    """GemmaForCausalLM with the model's weights; in bfloat16 as ``from_pretrained(dtype=...)`` makes it."""
    fields = hf_config(model.config)
    rope = {"rope_type": "default", "rope_theta": fields.pop("rope_theta")}
    own = {name: value for name, value in fields.items() if name not in ("architectures", "model_type")}
    peer = modeling_gemma.GemmaForCausalLM(GemmaConfig(**own, rope_parameters=rope, attn_implementation=attention))
    base = model.params["embed"]
    params = model.params | {"embed": base.base, "head": base.base} if isinstance(base, Adapted) else model.params
    tensors = {name: torch.from_numpy(np.array(array, np.float32)) for name, array in hf_tensors(params).items()}
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    peer.load_state_dict(tensors, strict=True)
    frequencies = peer.model.rotary_emb.inv_freq.clone()
    peer.to(dtype)
    peer.model.rotary_emb.inv_freq = frequencies  # as after from_pretrained, and unlike after .to()
    return peer.eval()


def fed_otherwise(tokens, positions, times):
    """Tokens and positions with the first real token of each row fed `times` times; rows stay padded where they are."""
    rows, places = [], []
    for row, where in zip(tokens.tolist(), positions.tolist(), strict=True):
        at = next(i for i, position in enumerate(where) if position >= 0)
        count = sum(position >= 0 for position in where) - 1 + times
        rows.append(row[:at] + [row[at]] * times + row[at + 1 :])
        places.append([-1] * at + [where[at] + i for i in range(count)] + [-1] * (len(row) - 1 + times - at - count))
    return np.array(rows), np.array(places)


# ---- planting


def plant(peer, bugs, model, positions, recorder, stack):
    """Replace what the bugs change, and nothing else."""
    body, config = peer.model, model.config
    D, N = config.hidden_size, config.layers[0].num_heads
    if isinstance(model.params["embed"], Adapted):  # PEFT multiplies by the scale that the module has
        scale = torch.ones(()) if "A5" in bugs else scale_with(bugs, D, body.dtype)
        add_delta(body.embed_tokens, model.params["embed"].deltas, scale)
    if bugs & {"A1", "A2", "A4"}:
        plant_scale(body.embed_tokens, bugs, D)
    if "A3" in bugs:
        peer.lm_head.weight = torch.nn.Parameter(peer.lm_head.weight.detach() * math.sqrt(D))
    if bugs & {"B1", "B2", "B4", "B5", "B6", "B9", "B9 1e-5"}:
        for norm in (m for m in body.modules() if isinstance(m, modeling_gemma.GemmaRMSNorm)):
            norm.forward = MethodType(norm_with(bugs), norm)
    for layer in body.layers:
        if bugs & {"B8", "B8 gemma2"}:
            layer.forward = MethodType(layer_with(bugs, recorder), layer)
        if bugs & {"C1", "C2"}:
            layer.mlp.act_fn = torch.nn.GELU() if "C1" in bugs else torch.nn.SiLU()
        if "C3 weights" in bugs:
            layer.mlp.gate_proj, layer.mlp.up_proj = layer.mlp.up_proj, layer.mlp.gate_proj
        if "C3" in bugs:
            layer.mlp.forward = MethodType(mlp_on_up, layer.mlp)
        if "C3 reshaped" in bugs:
            weight = layer.mlp.gate_proj.weight.detach()
            layer.mlp.gate_proj.weight = torch.nn.Parameter(weight.reshape(weight.shape[::-1]).T.contiguous())
        if "E2" in bugs:
            layer.self_attn.scaling = (D / N) ** -0.5
    if bugs & {"D1", "D1 frequencies", "D1 table", "D2", "D3 divided", "D9", "D9 restarted", "G1"}:
        body.rotary_emb.forward = MethodType(angles_with(bugs, positions), body.rotary_emb)
    if bugs & {"D7", "G1"}:
        stack.enter_context(mock.patch.object(modeling_gemma, "apply_rotary_pos_emb", turn_with(bugs)))
    if "G1" in bugs:
        stack.enter_context(mock.patch.object(modeling_gemma, "eager_attention_forward", attention_of_wide_keys))
    if "E6" in bugs:
        stack.enter_context(mock.patch.object(modeling_gemma, "repeat_kv", tile_kv))


def add_delta(embedding, deltas, scale):
    """Low-rank deltas on the lookup, as PEFT adds them: not on the head."""

    def with_delta(module, args, out):
        for delta in deltas:
            a, b = (torch.from_numpy(np.array(x, np.float32)).to(out.dtype) for x in (delta.a, delta.b))
            out = out + torch.nn.functional.embedding(args[0], a.T) @ b.T * delta.scale * scale
        return out

    embedding.register_forward_hook(with_delta)


def plant_scale(embedding, bugs, D):
    def forward(self, ids):
        rows = torch.nn.functional.embedding(ids, self.weight)
        if "A2" in bugs and rows.dtype == BF16:
            return (rows.float() * math.sqrt(D)).to(BF16)
        return rows * scale_with(bugs, D, rows.dtype)

    embedding.forward = MethodType(forward, embedding)


def scale_with(bugs, D, dtype):
    """Factor of the embedding."""
    scale = torch.tensor(1.0 if "A1" in bugs else float(D) if "A4" in bugs else math.sqrt(D))
    return scale.to(BF16).to(dtype) if "A2" in bugs else scale.to(dtype)


def norm_with(bugs):
    def forward(self, x):
        wide = x.float()
        square = x.to(BF16).pow(2).mean(-1, keepdim=True).float() if "B6" in bugs else wide.pow(2).mean(-1, True)
        eps = self.eps * (10 if "B9 1e-5" in bugs else 1)
        normed = wide / (square.sqrt() + eps) if "B9" in bugs else wide * torch.rsqrt(square + eps)
        one = 0.0 if "B1" in bugs else 2.0 if "B2" in bugs else 1.0
        gain = one + self.weight.float()
        if "B4" in bugs or "B5" in bugs:
            gain = gain.to(BF16).float()
        if "B4" in bugs:
            normed = normed.to(BF16).float()
        return (normed * gain).type_as(x)

    return forward


def layer_with(bugs, recorder):
    """Decoder layer with its norms elsewhere; it tells the recorder what hooks would see in the wrong place."""

    def forward(self, hidden_states, **kwargs):
        i = self.self_attn.layer_idx
        after = "B8" in bugs
        given = hidden_states if after else self.input_layernorm(hidden_states)
        recorder.keep(f"layers.{i}.attn.norm", given)
        attention, _ = self.self_attn(hidden_states=given, **kwargs)
        if "B8 gemma2" in bugs:
            attention = self.post_attention_layernorm(attention)
        residual = hidden_states + attention
        if after:
            residual = self.input_layernorm(residual)
        recorder.keep(f"layers.{i}.attn.residual", residual)
        recorder.keep(f"layers.{i}.mlp.norm", residual)
        out = residual + self.mlp(residual)
        return self.post_attention_layernorm(out) if after else out

    recorder.unwatched |= {"attn.norm", "attn.residual", "mlp.norm"}
    return forward


def mlp_on_up(self, x):
    return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


def angles_with(bugs, positions):
    moved = moved_positions(bugs, positions)

    def forward(self, x, position_ids):
        at = torch.from_numpy(moved)[..., None].float()
        frequency = self.inv_freq.float()
        if "D2" in bugs:
            at = at.to(BF16).float()
        if "D1" in bugs or "D1 frequencies" in bugs:
            frequency = frequency.to(BF16).float()
        angle = at * frequency
        if "D3 divided" in bugs:
            lane = torch.arange(0, self.config.head_dim, 2, dtype=torch.float)
            angle = at / self.config.rope_parameters["rope_theta"] ** (lane / self.config.head_dim)
        if "D1" in bugs:
            angle = angle.to(BF16).float()
        both = torch.cat((angle, angle), dim=-1)
        cos, sin = both.cos(), both.sin()
        if "G1" in bugs:
            return cos, sin  # wide: keys are turned in float32
        narrow = BF16 if "D1 table" in bugs else x.dtype
        return cos.to(narrow).to(x.dtype), sin.to(narrow).to(x.dtype)

    return forward


def moved_positions(bugs, positions):
    """Positions that the angles are formed from."""
    moved = np.maximum(positions, 0)
    for b, row in enumerate(positions):
        last = np.flatnonzero(row >= 0)[-1]
        if "D9" in bugs:
            moved[b, last] += np.count_nonzero(row[:last] < 0)
        if "D9 restarted" in bugs:
            moved[b, last] = 0
    return moved


def turn_with(bugs):
    turn = modeling_gemma.apply_rotary_pos_emb

    def forward(q, k, cos, sin, unsqueeze_dim=1):
        if "D7" in bugs:
            half = cos.shape[-1] // 2
            c, s = (table[..., :half].unsqueeze(unsqueeze_dim) for table in (cos, sin))

            def turned(x):
                even, odd = x[..., 0::2], x[..., 1::2]
                return torch.stack((even * c - odd * s, odd * c + even * s), dim=-1).flatten(-2)

            return turned(q), turned(k)
        # G1: queries as ever, rounded tables and all; keys in float32.
        narrow_q, _ = turn(q, k, cos.to(q.dtype), sin.to(q.dtype), unsqueeze_dim=unsqueeze_dim)
        _, wide_k = turn(q.float(), k.float(), cos, sin, unsqueeze_dim=unsqueeze_dim)
        return narrow_q, wide_k

    return forward


def attention_of_wide_keys(module, query, key, value, attention_mask, scaling, **_):
    key = modeling_gemma.repeat_kv(key, module.num_key_value_groups)
    value = modeling_gemma.repeat_kv(value, module.num_key_value_groups)
    scores = (query.float() @ key.transpose(2, 3)).to(query.dtype) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    probs = torch.nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return (probs @ value).transpose(1, 2).contiguous(), probs


def tile_kv(x, repeats):
    return x.repeat(1, repeats, 1, 1)


# ---- watching


class Recorder:
    """Our names for what flows through a peer."""

    def __init__(self, peer, tokens, positions):
        self.peer, self.real = peer, positions >= 0
        self.B, self.T = tokens.shape
        self.H = peer.config.head_dim
        self.seen = {}
        self.unwatched = set()  # names of a layer that a planted layer keeps itself
        q, k = positions[:, :, None], positions[:, None, :]
        self.allowed = (k >= 0) & (k <= q)  # BTS
        self.layer = -1

    def keep(self, name, value, heads=False):
        value = (
            value.detach().to(BF16) if self.peer.dtype == BF16 else value.detach()
        )  # a trace holds the engine's dtype
        value = value.float().numpy().copy()
        if heads:
            value = value.reshape(self.B, self.T, -1, self.H)
        if name.endswith(("scores", "probs")):
            value = np.where(self.allowed[:, None], value, 0).astype(np.float32)
        else:
            value[~self.real] = 0
        self.seen[name] = value

    def watch(self, stack):
        """Put hooks on modules and wrappers round the functions between them, for as long as `stack` is open."""

        def hook(handle):
            stack.callback(handle.remove)

        def output(module, name, heads=False):
            hook(module.register_forward_hook(lambda _, args, out: self.keep(name, out, heads)))

        def given(module, name, heads=False):
            hook(module.register_forward_pre_hook(lambda _, args: self.keep(name, args[0], heads)))

        body = self.peer.model
        output(body.embed_tokens, "embed")
        for i, block in enumerate(body.layers):
            attn, mlp, at = block.self_attn, block.mlp, f"layers.{i}."
            if "attn.norm" not in self.unwatched:
                output(block.input_layernorm, at + "attn.norm")
                given(block.post_attention_layernorm, at + "attn.residual")
                output(block.post_attention_layernorm, at + "mlp.norm")
            for name, module in (("q", attn.q_proj), ("k", attn.k_proj), ("v", attn.v_proj)):
                output(module, f"{at}attn.{name}", heads=True)
            hook(
                attn.register_forward_hook(
                    lambda _, args, out, at=at: (out[1] is not None and self.keep(at + "attn.probs", out[1])) or None
                )
            )
            given(attn.o_proj, at + "attn.mix", heads=True)
            output(attn.o_proj, at + "attn.out")
            output(mlp.gate_proj, at + "mlp.gate")
            output(mlp.up_proj, at + "mlp.up")
            output(mlp.act_fn, at + "mlp.act")
            given(mlp.down_proj, at + "mlp.gated")
            output(mlp.down_proj, at + "mlp.down")
            output(block, at + "out")
        output(body.norm, "final_norm")
        output(self.peer.lm_head, "logits")
        self.watch_functions(stack)

    def watch_functions(self, stack):
        turn, softmax = modeling_gemma.apply_rotary_pos_emb, torch.nn.functional.softmax

        def watched_turn(q, k, cos, sin, **kwargs):
            self.layer += 1  # attention is where a layer begins to be watched
            turned = turn(q, k, cos, sin, **kwargs)
            for name, value in zip(("q_rope", "k_rope"), turned, strict=True):
                self.keep(f"layers.{self.layer}.attn.{name}", value.transpose(1, 2))
            return turned

        def watched_softmax(scores, **kwargs):
            self.keep(f"layers.{self.layer}.attn.scores", scores)
            return softmax(scores, **kwargs)

        stack.enter_context(mock.patch.object(modeling_gemma, "apply_rotary_pos_emb", watched_turn))
        stack.enter_context(mock.patch.object(torch.nn.functional, "softmax", watched_softmax))
