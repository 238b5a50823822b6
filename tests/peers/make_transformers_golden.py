"""Write tests/goldens/transformers_float32_error.json: how far transformers' float32 is from the truth, model by model.

Run ``python -m tests.peers.make_transformers_golden`` where torch and transformers are installed, whenever
`tests.models.random_model` draws other models.
"""

import json
from pathlib import Path

import numpy as np

from tests.models import digest, random_model
from tests.truth import truth_logits

MODELS = 200
UNIT = 2.0**-24  # half the spacing of float32 numbers just above 1
GOLDEN = Path(__file__).parents[1] / "goldens" / "transformers_float32_error.json"


def main():
    """Compute and write the file."""
    import torch
    import transformers

    from tests.peers.eager import eager_logits, eager_model

    entries = []
    for seed in range(MODELS):
        model = random_model(seed)
        want = truth_logits(model.params, model.config, model.tokens, model.positions)[model.real]
        got = eager_logits(eager_model(model), model.tokens, model.positions)[model.real]
        error = np.abs(got - want).max() / np.abs(want).max() / UNIT
        entries.append({"digest": digest(model), "error": round(float(error), 2)})
    golden = {
        "what": "largest error of transformers' logits in float32, in units of 2**-24 times the largest true logit, "
        "for tests.models.random_model(0), (1), ...",
        "made_by": "tests/peers/make_transformers_golden.py",
        "library_versions": {
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "attention": "eager",
        "dtype": "float32",
        "device": "CPU",
        "models": entries,
    }
    text = json.dumps(golden, indent=1).replace('{\n   "digest"', '{"digest"').replace('",\n   "error"', '", "error"')
    part = GOLDEN.with_suffix(".part")
    part.write_text(text.replace("\n  }", "}") + "\n", encoding="utf-8")
    part.replace(GOLDEN)


if __name__ == "__main__":
    main()
