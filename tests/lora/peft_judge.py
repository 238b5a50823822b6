"""Our side of a comparison with PEFT, without a tokenizer and without torch."""

import numpy as np

from refgemma.gemma import Gemma
from refgemma.model import forward
from refgemma.numerics import FLOAT64, Bfloat16Matrix, to_bfloat16, to_host
from refgemma.ops.linear import Adapted
from tests.judge import UNIT
from tests.models import map_params, widened

STORED = {  # how matrices are kept in memory; norms stay float32
    "float32": lambda w: w,
    "float16": lambda w: w.astype(np.float16) if w.ndim == 2 else w,
    "bfloat16": lambda w: Bfloat16Matrix(to_bfloat16(w)) if w.ndim == 2 else w,
}


def gemma_of(model, numerics=FLOAT64, weights="float32"):
    """A `tests.models.Model` as users hold one."""
    params = widened(model.params) if numerics is FLOAT64 else map_params(STORED[weights], model.params)
    return Gemma(model.config, params, None, numerics, frozenset())


def logits_of(gemma, model, **arguments):
    """Logits at all real positions of the model's batch, (positions, V)."""
    arguments = {"positions": model.positions, "numerics": gemma.numerics} | arguments
    return to_host(forward(gemma.params, gemma.config, model.tokens, **arguments))[model.real]


def float32_bound(error_of_peft):
    """Largest error of float32: twice that of PEFT, and four roundings; the rule of `tests.judge`."""
    return 2 * error_of_peft + 4 * UNIT


def map_operands(change, params):
    """Params with ``change(path, operand)`` in the place of each; a head tied to the embedding stays tied."""
    embed = change("embed", params["embed"])
    layers = [
        {part: {name: change(f"{part}.{name}", w) for name, w in weights.items()} for part, weights in layer.items()}
        for layer in params["layers"]
    ]
    head = embed if params["head"] is params["embed"] else change("head", params["head"])
    return {"embed": embed, "layers": layers, "final_norm": change("final_norm", params["final_norm"]), "head": head}


def operands(params):
    """All operands of a model, by path."""
    found = {"embed": params["embed"], "head": params["head"], "final_norm": params["final_norm"]}
    for i, layer in enumerate(params["layers"]):
        found |= {f"layers.{i}.{part}.{name}": w for part, weights in layer.items() for name, w in weights.items()}
    return found


def adapted(params):
    """Those with deltas."""
    return {path: operand for path, operand in operands(params).items() if isinstance(operand, Adapted)}


def stored_bytes(params):
    """The bytes of every weight in memory."""
    return {path: getattr(w, "bits", w).tobytes() for path, w in operands(params).items()}
