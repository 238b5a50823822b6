"""Adapters on a model in bfloat16, as PEFT computes them on the CPU: factors in float32 beside a narrow base.

Operation by operation: each gets PEFT's own inputs, so a rounding that falls the other way is not carried on.

`pytest -m peers tests/peers/test_bf16_peft.py -s` prints the shares of bit-equal numbers.
"""

from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest

from refgemma import lora
from refgemma.lora.attach import attach
from refgemma.lora.fit import fit
from refgemma.model import forward
from refgemma.numerics import PROFILES, from_bfloat16, to_bfloat16
from refgemma.ops.linear import Adapted, linear
from tests.bfloat16 import narrow_example
from tests.lora.peft_folders import draw_tensors, write_adapter
from tests.lora.peft_judge import adapted, gemma_of

pytestmark = pytest.mark.peers

PROFILE = PROFILES["bf16-transformers"]
PLAIN = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6}
KINDS = {
    "all linear": PLAIN | {"target_modules": "all-linear"},
    "DoRA": PLAIN | {"target_modules": "all-linear", "use_dora": True},
    "biases": PLAIN | {"target_modules": "all-linear", "lora_bias": True},
    "embedding": PLAIN | {"target_modules": ["embed_tokens", "q_proj"]},
    "DoRA of the embedding": PLAIN | {"target_modules": ["embed_tokens"], "use_dora": True},
    "head": PLAIN | {"target_modules": ["lm_head"]},
    "trained whole": PLAIN | {"target_modules": ["q_proj"], "modules_to_save": ["norm", "lm_head", "up_proj"]},
    "rows": PLAIN | {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5, 8]},
}
# Both sum in float32, in another order; where a sum lies within some 2**-24 of a midpoint it goes the other way.
BAR = 0.99


@pytest.fixture(scope="module")
def peft():
    """PEFT, and our recorder of models of transformers."""
    peft = pytest.importorskip("peft", reason="needs torch, transformers and peft: pip install refgemma[peers]")
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield peft
    torch.set_num_threads(threads)


def folder_of(kind, model, where, name="adapter"):
    """A float32 file, as PEFT writes it, with our numbers in it."""
    from tests.peers import peft_side

    folder = where / name
    settings, shapes = peft_side.what_peft_writes(model, KINDS[kind], folder)
    return write_adapter(folder, settings, draw_tensors(model.seed, shapes, settings, model), "float32")


def seen_by_peft(peft, model, where, *folders):
    """Every named tensor of PEFT's model, with the adapters of these folders on it."""
    from tests.peers import peft_side, recorded

    with peft_side.quiet():
        peer = peft.PeftModel.from_pretrained(recorded.narrow_model(model, where), folders[0], adapter_name="0")
        for i, folder in enumerate(folders[1:], start=1):
            peer.load_adapter(folder, str(i))
        peer.base_model.set_adapter([str(i) for i in range(len(folders))])
    return recorded.record(peer.get_base_model().eval(), model.tokens, model.positions)


def shares(gemma, model, seen):
    """By kind of operation: the share of numbers that come out to the bit, given PEFT's inputs."""
    equal, total = defaultdict(int), defaultdict(int)

    def tap(name, value):
        kind = name.split(".", 2)[-1]
        if kind != "attn.scores":  # recorded with the mask on
            equal[kind] += np.count_nonzero(value == seen[name])
            total[kind] += value.size
        return seen[name]

    forward(gemma.params, gemma.config, model.tokens, positions=model.positions, numerics=PROFILE, tap=tap)
    return {kind: equal[kind] / total[kind] for kind in total}


@pytest.mark.parametrize("kind", KINDS)
def test_every_operation_with_an_adapter(peft, kind, tmp_path):
    found = defaultdict(list)
    for seed in range(6):
        model = narrow_example(seed)
        (where := tmp_path / str(seed)).mkdir()
        folder = folder_of(kind, model, where)
        gemma = gemma_of(model, PROFILE).with_lora(lora.read(folder))
        for name, share in shares(gemma, model, seen_by_peft(peft, model, where, folder)).items():
            found[name].append(share)
    means = {name: np.mean(share) for name, share in found.items()}
    print(f"\n{kind}: " + ", ".join(f"{name} {share:.4f}" for name, share in means.items()))
    assert {name: share for name, share in means.items() if share < BAR} == {}


def test_two_adapters_are_summed_before_the_rounding(peft, tmp_path):
    model = narrow_example(1)
    folders = [folder_of(kind, model, tmp_path, kind) for kind in ("DoRA", "all linear")]
    gemma = gemma_of(model, PROFILE)
    for folder in folders:
        gemma = gemma.with_lora(lora.read(folder))
    found = shares(gemma, model, seen_by_peft(peft, model, tmp_path, *folders))
    assert {name: share for name, share in found.items() if share < BAR} == {}


def rounded(x):
    return from_bfloat16(to_bfloat16(x))


@pytest.mark.parametrize("kind", ["all linear", "DoRA"])
def test_other_roundings_are_seen(peft, kind, tmp_path):
    """A module alone: PEFT's share of bit-equal numbers, and those of the ways that it does not take."""
    model = narrow_example(2)
    folder = folder_of(kind, model, tmp_path)
    seen = seen_by_peft(peft, model, tmp_path, folder)
    operand = adapted(gemma_of(model, PROFILE).with_lora(lora.read(folder)).params)["layers.0.mlp.up"]
    (delta,), x, recorded = operand.deltas, seen["layers.0.mlp.norm"], seen["layers.0.mlp.up"]
    base = linear(x, operand.base)
    gain = 1 if delta.gain is None else delta.gain.astype(np.float32)
    low = linear(linear(x, delta.a), delta.b)
    narrow = rounded(linear(rounded(linear(x, rounded(delta.a))), rounded(delta.b)))
    assert np.mean(linear(x, operand, numerics=PROFILE) == recorded) >= BAR
    wrong = {
        "base not rounded": (base + low * delta.scale) * gain,
        "delta rounded": (rounded(base) + rounded(low * delta.scale)) * gain,
        "factors and products in bfloat16": (rounded(base) + narrow * delta.scale) * gain,
        "sum rounded before the gain": rounded(rounded(base) + low * delta.scale) * gain,
    }
    found = {name: np.mean(rounded(value) == recorded) for name, value in wrong.items()}
    print(f"\n{kind}: {found}")
    if delta.gain is None:
        del found["sum rounded before the gain"]  # there is none
    assert max(found.values()) < 0.95


def test_whole_weights_that_stay_wide_are_seen(peft, tmp_path):
    """modules_to_save in a float32 file: PEFT copies them into a bfloat16 model."""
    model = narrow_example(3)
    folder = folder_of("trained whole", model, tmp_path)
    seen = seen_by_peft(peft, model, tmp_path, folder)
    gemma = gemma_of(model, PROFILE)
    wide = attach(gemma.params, fit(lora.read(folder), gemma.config).changes)
    found = shares(replace(gemma, params=wide), model, seen)
    assert max(found["mlp.up"], found["logits"], found["attn.norm"]) < 0.95


def test_rows_as_a_change_are_seen(peft, tmp_path):
    """New rows of a table added as differences from the old: off by a rounding of what the old ones give."""
    model = narrow_example(4)
    folder = folder_of("rows", model, tmp_path)
    seen = seen_by_peft(peft, model, tmp_path, folder)
    gemma = gemma_of(model, PROFILE)
    added = attach(gemma.params, fit(lora.read(folder), gemma.config).changes)
    assert isinstance(added["head"], Adapted)
    places = np.array(KINDS["rows"]["trainable_token_indices"])
    x, recorded = seen["final_norm"], seen["logits"][..., places]
    exact = gemma.with_lora(lora.read(folder)).params["head"]
    assert np.mean(linear(x, exact, numerics=PROFILE)[..., places] == recorded) >= BAR
    assert np.mean(linear(x, added["head"], numerics=PROFILE)[..., places] == recorded) < 0.95
