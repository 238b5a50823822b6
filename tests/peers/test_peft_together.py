"""Several adapters of PEFT at once, for some rows of a batch, in pieces through the cache, on bfloat16 weights."""

import functools
from dataclasses import replace

import numpy as np
import pytest

from refgemma import lora
from refgemma.cache import KVCache
from refgemma.numerics import FLOAT32
from tests.judge import FLOAT64_BOUND, error
from tests.lora.peft_folders import NARROW, draw_tensors, model_to_adapt, write_adapter
from tests.lora.peft_judge import float32_bound, gemma_of, logits_of
from tests.models import map_params

pytestmark = pytest.mark.peers

PLAIN = {"task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 8}
KINDS = {
    "queries": PLAIN | {"target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    "all": PLAIN | {"target_modules": "all-linear", "r": 2},
    "tables": PLAIN | {"target_modules": ["embed_tokens", "lm_head", "o_proj"], "lora_alpha": 5},
    "biased": PLAIN | {"target_modules": ["q_proj", "down_proj"], "lora_bias": True},
    "dora": PLAIN | {"target_modules": ["q_proj", "o_proj", "embed_tokens"], "use_dora": True},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Function of a seed: a model, and {kind: folder} of adapters for it; tied and untied in turn."""
    pytest.importorskip("peft", reason="needs torch, transformers and peft: pip install refgemma[peers]")
    from tests.peers import peft_side

    @functools.cache
    def make(seed):
        model = model_to_adapt(1000 + seed, tied=seed % 2 == 0, weights="bfloat16")
        tokens, positions = (np.repeat(x[:1], 4, axis=0) for x in (model.tokens, model.positions))  # four rows alike
        model = replace(model, tokens=tokens, positions=positions)
        folders = {}
        for kind, options in KINDS.items():
            folder = tmp_path_factory.mktemp("together") / kind
            settings, shapes = peft_side.what_peft_writes(model, options, folder)
            folders[kind] = write_adapter(folder, settings, draw_tensors(seed, shapes, settings, model))
        return model, folders

    return make


def with_weights(model, folders, weights):
    """PEFT's model with several adapters active, each with its weight."""
    from tests.peers import peft_side

    names = [f"adapter{i}" for i in range(len(folders))]
    peer = peft_side.load(model, *folders, names=names)
    peer.base_model.set_adapter(names)
    for module in peer.modules():
        if hasattr(module, "set_scale"):
            for name, weight in zip(names, weights, strict=True):
                module.set_scale(name, weight)
    return peer


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("kinds", "weights"),
    [
        (["queries"], [0.5]),
        (["dora"], [0.5]),  # the norms are those of the weight with half the product
        (["dora"], [-2.0]),
        (["queries", "all"], [1.0, 1.0]),
        (["queries", "all", "biased"], [0.7, -1.5, 0.25]),
        (["tables", "queries"], [1.0, 2.0]),
        (["dora", "queries"], [1.0, 0.5]),  # DoRA first: PEFT computes it on top of what came before
        (["dora", "all", "biased"], [0.5, 1.0, -1.0]),
    ],
)
def test_adapters_with_weights(world, seed, kinds, weights):
    from tests.peers import peft_side

    model, folders = world(seed)
    want = peft_side.logits(with_weights(model, [folders[kind] for kind in kinds], weights), model)[model.real]
    gemma = gemma_of(model)
    for kind, weight in zip(kinds, weights, strict=True):
        gemma = gemma.with_lora(lora.read(folders[kind]), weight)
    assert error(logits_of(gemma, model), want) <= FLOAT64_BOUND
    if "biased" not in kinds:
        assert error(logits_of(gemma.merge_lora(), model), want) <= FLOAT64_BOUND
    if len(kinds) > 1:  # it can fail: each of them counts
        assert error(logits_of(gemma_of(model).with_lora(lora.read(folders[kinds[0]]), weights[0]), model), want) > 1e-3


def test_two_tables_at_once(world):
    """PEFT writes the untouched table beside the factors of each; it is not a change, and they are summed."""
    from tests.peers import peft_side

    for seed in range(4):
        model, folders = world(seed)
        other = folders["tables"].parent / "other"
        settings, shapes = peft_side.what_peft_writes(model, KINDS["tables"], other)
        write_adapter(other, settings, draw_tensors(99, shapes, settings, model))
        both = [folders["tables"], other]
        want = peft_side.logits(with_weights(model, both, [1.0, 0.5]), model)[model.real]
        gemma = gemma_of(model).with_lora(lora.read(both[0])).with_lora(lora.read(both[1]), 0.5)
        assert error(logits_of(gemma, model), want) <= FLOAT64_BOUND


def test_two_doras_are_summed_and_not_one_upon_the_other(world):
    """PEFT multiplies the gain of the second into what the first has changed; its merge then has other weights.

    Here each is the change that it makes alone. By hand: ``W + sum_j (m_j (W + s B_j A_j) / |W + s B_j A_j| - W)``.
    """
    from tests.peers import peft_side

    for seed in range(4):
        model, folders = world(seed)
        options = KINDS["dora"] | {"target_modules": ["q_proj"]}
        pair, changes = [], []
        for number in range(2):
            folder = folders["dora"].parent / f"dora{number}"
            settings, shapes = peft_side.what_peft_writes(model, options, folder)
            tensors = draw_tensors(50 + number, shapes, settings, model)
            pair.append(write_adapter(folder, settings, tensors))
            changes.append(tensors)
        gemma = gemma_of(model)
        layers = []
        for i, layer in enumerate(gemma.params["layers"]):
            total = weight = layer["attn"]["q"]
            for tensors in changes:
                at = f"base_model.model.model.layers.{i}.self_attn.q_proj."
                changed = weight + 8 / 3 * tensors[at + "lora_B.weight"] @ tensors[at + "lora_A.weight"]
                gain = tensors[at + "lora_magnitude_vector"] / np.sqrt((changed**2).sum(axis=1))
                total = total + gain[:, None] * changed - weight
            layers.append({"attn": {**layer["attn"], "q": total}, "mlp": layer["mlp"]})
        by_hand = logits_of(replace(gemma, params={**gemma.params, "layers": layers}), model)
        both = gemma.with_lora(lora.read(pair[0])).with_lora(lora.read(pair[1]))
        summed = peft_side.logits(with_weights(model, pair, [1.0, 1.0]), model)[model.real]
        assert error(logits_of(both, model), by_hand) <= FLOAT64_BOUND
        assert error(logits_of(both.merge_lora(), model), by_hand) <= FLOAT64_BOUND
        assert error(summed, by_hand) > 1e-3


@pytest.mark.parametrize("seed", range(6))
def test_adapters_for_rows(world, seed):
    """PEFT's ``adapter_names``: one for each row, of which one has none. It has no DoRA there."""
    from tests.peers import peft_side

    model, folders = world(seed)
    names = ["queries", "tables", "__base__", "all"]
    used = ["queries", "tables", "all"]
    peer = peft_side.load(model, *(folders[name] for name in used), names=used)
    want = peft_side.logits(peer, model, adapter_names=names)[model.real]
    gemma = gemma_of(model)
    for name in used:
        gemma = gemma.with_lora(lora.read(folders[name]), rows=[other == name for other in names])
    got = logits_of(gemma, model)
    assert error(got, want) <= FLOAT64_BOUND
    # It can fail: the rows are alike but for their adapters.
    turned = gemma_of(model)
    for name in used:
        turned = turned.with_lora(lora.read(folders[name]), rows=[other == name for other in names[::-1]])
    assert error(logits_of(turned, model), want) > 1e-3
    rows = got.reshape(4, -1)
    for row, name in enumerate(names):
        alone = gemma_of(model) if name == "__base__" else gemma_of(model).with_lora(lora.read(folders[name]))
        assert error(logits_of(alone, model).reshape(4, -1)[row], rows[row]) <= FLOAT64_BOUND


def test_in_pieces_through_the_cache_on_bfloat16_weights(peft_cases):
    """Activations in float32, matrices as the bits of their file: within the float32 bound of PEFT's float64."""
    errors = []
    for case in [case for case in peft_cases if case.dtype == "bfloat16"]:
        model, gemma = case.model, gemma_of(case.model, FLOAT32, "bfloat16").with_lora(case.adapter)
        B, T = model.tokens.shape
        cache = KVCache(gemma.config, batch=B, capacity=T, dtype=np.float32)
        pieces = []
        for part in (slice(0, 7), slice(7, 8), slice(8, T)):
            tokens, positions = model.tokens[:, part], model.positions[:, part]
            piece = replace(model, tokens=tokens, positions=positions)
            got = np.zeros((*tokens.shape, gemma.config.vocab_size), np.float32)
            got[piece.real] = logits_of(gemma, piece, cache=cache)
            pieces.append(got)
        got = np.concatenate(pieces, axis=1)[model.real]
        errors.append(error(got, case.attached))
        assert errors[-1] <= float32_bound(case.attached_error), case
    print(f"\n{len(errors)} cases, worst {max(errors):.1e}", end="")
    assert len(errors) >= 25


def test_wide_files_on_bfloat16_weights(peft_cases):
    """What was trained whole is stored wider than the base and than the activations: it is brought to them."""
    seen = 0
    for case in [case for case in peft_cases if case.dtype == "float64"]:
        rounded = replace(case.model, params=map_params(NARROW["bfloat16"], case.model.params))
        narrow = logits_of(gemma_of(rounded, FLOAT32, "bfloat16").with_lora(case.adapter), case.model)
        wide = logits_of(gemma_of(rounded).with_lora(case.adapter), case.model)
        assert error(narrow, wide) <= float32_bound(case.attached_error), case
        seen += bool(case.settings["modules_to_save"])
    assert seen >= 5
