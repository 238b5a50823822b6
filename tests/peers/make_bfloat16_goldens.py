"""Write tests/goldens/bfloat16_ENGINE.npz: every named tensor that an engine computes in bfloat16, for one small model.

``python -m tests.peers.make_bfloat16_goldens bf16-transformers`` where torch and transformers are installed;
``python -m tests.peers.make_bfloat16_goldens bf16-deepmind`` in a virtual environment of its own, with
``pip install jax==0.4.38 flax==0.10.2 numpy==2.2.6`` and ``pip install --no-deps gemma==2.0.2``.
"""

import hashlib
import importlib.metadata
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from refgemma.numerics import from_bfloat16, to_bfloat16
from tests.bfloat16 import causal, narrow_params
from tests.models import Model, digest, random_model

GOLDENS = Path(__file__).parents[1] / "goldens"


def golden_model():
    """Two layers, grouped heads, no width and no scale that bfloat16 holds exactly; one row near 0, one near 1000.

    Every other token is so quiet that eps, and where it is rounded, counts.
    """
    sizes = {"hidden_size": 40, "intermediate_size": 72, "head_dim": 24, "num_heads": 4, "num_kv_heads": 2}
    drawn = random_model(2, num_layers=2, vocab_size=60, query_scale=24**-0.5, **sizes)
    rng = np.random.default_rng(20240221)
    T = 10
    tokens, positions = rng.integers(60, size=(2, T)), np.stack([np.arange(T), 1000 + np.arange(T)])
    quiet = np.flatnonzero(np.abs(drawn.params["embed"]).max(axis=1) < 0.1)
    tokens[:, ::2] = rng.choice(quiet, size=(2, T // 2))
    return Model(2, drawn.config, narrow_params(drawn.params), tokens, positions)


def main():
    """Compute and write the files of the engine named on the command line."""
    (engine,) = sys.argv[1:]
    model = golden_model()
    if engine == "bf16-transformers":
        import torch

        from tests.peers.recorded import narrow_model, record

        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as folder:
            seen = record(narrow_model(model, Path(folder)), model.tokens, model.positions)
        libraries, how = ("torch", "transformers"), "from_pretrained(dtype=torch.bfloat16), eager attention"
    else:
        from tests.peers.recorded_deepmind import jitted_logits, record

        seen = record(model.params, model.config, model.tokens, model.positions)
        jitted = jitted_logits(model.params, model.config, model.tokens, model.positions)
        libraries, how = ("gemma", "jax", "flax"), "parameters in bfloat16, operation by operation, not jitted"
        print(f"compiled whole, {np.mean(jitted == seen['logits']):.1%} of the logits are the same")
    for name, value in seen.items():
        if name.endswith("attn.scores"):
            value[..., ~causal(value.shape[-1])] = 0
        if not np.array_equal(from_bfloat16(to_bfloat16(value)), value):
            raise ValueError(f"{name} is not in bfloat16")
    arrays = {name: to_bfloat16(value) for name, value in seen.items()}
    path = GOLDENS / f"bfloat16_{engine.removeprefix('bf16-')}.npz"
    with path.with_suffix(".part").open("wb") as file:
        np.savez_compressed(file, **arrays)
    path.with_suffix(".part").replace(path)
    certificate = {
        "what": "every tensor that refgemma.model.forward names, as bits of bfloat16; scores that no query sees are 0",
        "made_by": f"python -m tests.peers.make_bfloat16_goldens {engine}",
        "how": how,
        "device": "CPU",
        "library_versions": {name: importlib.metadata.version(name) for name in (*libraries, "numpy")},
        "model": "tests.peers.make_bfloat16_goldens.golden_model()",
        "model_digest": digest(model),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    part = path.with_suffix(".json.part")
    part.write_text(json.dumps(certificate, indent=1) + "\n", encoding="utf-8")
    part.replace(path.with_suffix(".json"))


if __name__ == "__main__":
    main()
