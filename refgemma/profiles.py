"""Where named engines round when they run in bfloat16: one table, engine by rounding point.

The formulas are the same everywhere; what differs is the format that each step's result is written down in. A cell
names that format. "float32" is what the arithmetic of a profile has anyway, and says that the engine takes this
step in float32; None says that the engine has no such value.

Each column says what the source asks for, operation by operation. Matrix products sum in float32 and round their result
once, which is what torch on the CPU (oneDNN) and XLA do with bfloat16 operands. Compiled code may keep float32 between
operations that it fuses: a norm of DeepMind's under ``jax.jit`` on the CPU does so with its squares,
``without("norm.square")``. Weights are not rounded, so those of the model must be bfloat16 numbers.

References
----------
transformers
    ``models/gemma/modeling_gemma.py`` of 5.23, eager attention, ``from_pretrained(dtype=torch.bfloat16)``. A model cast
    by ``.to(torch.bfloat16)`` also holds its frequencies in bfloat16: ``with_("rope.frequency", "bfloat16")``.
DeepMind
    google-deepmind/gemma, release 2.0.2: ``layers.py``, ``modules.py``, ``positional_embeddings.py``; ``jax.nn.gelu``
    and ``jax.nn.softmax``. JAX rounds the result of every operation to the dtype of its operands, constants included.
gemma_pytorch
    google/gemma_pytorch at 014acb7ac: ``gemma/model.py``.
"""

from __future__ import annotations

BF16, F32 = "bfloat16", "float32"

ENGINES = ("bf16-transformers", "bf16-deepmind", "bf16-gemma-pytorch")

# point: (what it is, format in each of ENGINES). In the order of the computation; each point is passed once by every
# value that it names.
ROUNDINGS: dict[str, tuple[str, str | None, str | None, str | None]] = {
    "embed.scale": ("sqrt(D), before it multiplies the table row", BF16, BF16, BF16),
    "embed": ("the scaled embedding", BF16, BF16, BF16),
    "norm.square": ("x**2", F32, BF16, F32),
    "norm.mean": ("mean of the squares", F32, BF16, F32),
    "norm.eps": ("eps, before it is added to the mean", F32, BF16, F32),
    "norm.shifted": ("mean plus eps", F32, BF16, F32),
    "norm.inverse": ("1 / rms, where x is multiplied by it and not divided by the rms", F32, BF16, F32),
    "norm.normed": ("x / rms, before the gain", F32, BF16, F32),
    "norm.gain": ("1 + weight, before it multiplies", F32, BF16, F32),
    "norm.out": ("the output of every norm", BF16, BF16, BF16),
    "linear": ("the output of every matrix product with a weight", BF16, BF16, BF16),
    "rope.exponent": ("2 i / H", F32, F32, F32),
    "rope.timescale": ("theta ** (2 i / H)", F32, F32, F32),
    "rope.frequency": ("its inverse, where a position is multiplied by it and not divided", F32, None, F32),
    "rope.angle": ("position times frequency", F32, F32, F32),
    "rope.table": ("cosines and sines", BF16, F32, F32),
    "rope.product": ("each product of a half head with the table", BF16, F32, F32),
    "rope.out": ("their sum", BF16, BF16, BF16),
    "attn.scale": ("the query scale, before it multiplies", F32, BF16, F32),
    "attn.query": ("the scaled query", None, BF16, BF16),
    "attn.product": ("bare query times key, where the scale comes after it", BF16, None, None),
    "attn.scores": ("scaled query times key", BF16, BF16, BF16),
    "attn.shifted": ("scores less the largest of their row", F32, BF16, F32),
    "attn.exp": ("their exponentials", F32, BF16, F32),
    "attn.total": ("the sum of those", F32, BF16, F32),
    "attn.probs": ("the softmax", BF16, BF16, BF16),
    "attn.mix": ("probabilities times values", BF16, BF16, BF16),
    "attn.residual": ("the residual stream after attention", BF16, BF16, BF16),
    "gelu.constant": ("sqrt(2 / pi) and 0.044715", F32, BF16, F32),
    "gelu.square": ("x**2", F32, BF16, F32),
    "gelu.cube": ("x**3", F32, BF16, F32),
    "gelu.term": ("0.044715 x**3", F32, BF16, F32),
    "gelu.sum": ("x + 0.044715 x**3", F32, BF16, F32),
    "gelu.inner": ("that times sqrt(2 / pi)", F32, BF16, F32),
    "gelu.tanh": ("its hyperbolic tangent", F32, BF16, F32),
    "gelu.shifted": ("one plus that", F32, BF16, F32),
    "mlp.act": ("gelu(gate)", BF16, BF16, BF16),
    "mlp.gated": ("gelu(gate) * up", BF16, BF16, BF16),
    "out": ("the residual stream after the MLP", BF16, BF16, BF16),
}


def roundings_of(engine: str) -> dict[str, str]:
    """Column of the table: the rounding points that an engine has, and the format at each."""
    column = ENGINES.index(engine)
    return {point: narrow for point, (_, *formats) in ROUNDINGS.items() if (narrow := formats[column])}


def table() -> str:
    """All of it as a Markdown table, one line a rounding point."""
    short = {BF16: "bf16", F32: "f32", None: "-"}
    lines = [f"| point | what is rounded | {' | '.join(ENGINES)} |", "|---" * (2 + len(ENGINES)) + "|"]
    for point, (meaning, *formats) in ROUNDINGS.items():
        lines.append(f"| `{point}` | {meaning} | {' | '.join(short[narrow] for narrow in formats)} |")
    return "\n".join(lines)
