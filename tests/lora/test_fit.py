"""Strictness: no tensor unused, no claimed module missing, and one error that lists every misfit."""

import re
from dataclasses import replace

import numpy as np
import pytest

from refgemma import lora
from refgemma.lora.attach import attach
from refgemma.lora.fit import Replaced, ReplacedRows, fit
from refgemma.lora.merge import materialise
from tests.lora.folders import factors, model, write
from tests.lora.peft_folders import PREFIX
from tests.models import random_config

Q = f"{PREFIX}model.layers.0.self_attn.q_proj."


def refusal(folder, config):
    with pytest.raises(ValueError, match="does not fit the model") as error:
        fit(lora.read(folder), config)
    return str(error.value)


def test_a_good_adapter_changes_what_it_claims(tmp_path):
    m = model()
    changes, notes = fit(lora.read(write(tmp_path, m)), m.config)
    assert [c.path for c in changes] == [f"layers.{i}.{part}" for part in ("attn.q", "mlp.down") for i in range(2)]
    assert all(c.scale == 2.0 and c.magnitude is None and c.bias is None for c in changes)
    assert not notes


def drop(name):
    return lambda t: t.pop(name)


def rename(old, new):
    def spoil(t):
        for name in [n for n in t if old in n]:
            t[name.replace(old, new)] = t.pop(name)

    return spoil


def transposed(name):
    def spoil(t):
        t[name] = t[name].T.copy()

    return spoil


def wider(t):
    for name in [n for n in t if "lora_A" in n]:
        t[name] = np.ones((3, t[name].shape[1] + 8))


def other_rank(t):
    t[Q + "lora_A.weight"] = np.ones((5, t[Q + "lora_A.weight"].shape[1]))
    t[Q + "lora_B.weight"] = np.ones((t[Q + "lora_B.weight"].shape[0], 5))


@pytest.mark.parametrize(
    ("spoil", "settings", "sentences"),
    [
        (drop(Q + "lora_B.weight"), {}, ["q_proj has no lora_B, which the configuration claims"]),
        (
            drop("nothing"), {"target_modules": ["q_proj", "down_proj", "up_proj"]},
            ["model.layers.0.mlp.up_proj has no lora_A, which the configuration claims"],
        ),
        (
            drop("nothing"), {"target_modules": ["q_proj"]},
            ["model.layers.0.mlp.down_proj.lora_A would not be used: the configuration does not claim it"],
        ),
        (
            rename("model.layers.", "language_model.layers."), {},
            ["would not be used: the model has no such module (nearest: 'model.layers.0.self_attn.q_proj')"],
        ),
        (transposed(Q + "lora_A.weight"), {}, ["q_proj.lora_A has shape ", ": as if transposed"]),
        (transposed(Q + "lora_B.weight"), {}, ["q_proj.lora_B has shape ", ": as if transposed"]),
        (other_rank, {}, ["q_proj.lora_A has shape (5, ", ": its rank is 5, the configuration says 3"]),
        (wider, {}, [": its rank is right, but it is for a width of "]),
        (drop("nothing"), {"use_dora": True}, ["q_proj has no lora_magnitude_vector"]),
        (drop("nothing"), {"lora_bias": True}, ["q_proj has no lora_B.bias"]),
        (drop("nothing"), {"alpha_pattern": {"q_porj": 3}}, ["alpha_pattern has 'q_porj', which matches none"]),
        (drop("nothing"), {"rank_pattern": {"x": 3}}, ["rank_pattern has 'x', which matches none"]),
        (drop("nothing"), {"modules_to_save": ["score"]}, ["modules_to_save names 'score'"]),
        (drop("nothing"), {"trainable_token_indices": [10**400]}, ["has 1000", "outside the vocabulary of"]),
        (drop("nothing"), {"trainable_token_indices": [10**6]}, ["has 1000000, outside the vocabulary of"]),
        (drop("nothing"), {"trainable_token_indices": [3, 3]}, ["names a token twice", "has no trainable_tokens"]),
        (
            drop("nothing"), {"trainable_token_indices": [3], "modules_to_save": ["lm_head"]},
            ["trainable_token_indices and another change of the same table: not supported together"],
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told(spoil, settings, sentences, tmp_path):
    m = model()
    tensors = factors(m) | {"nothing": None}
    spoil(tensors)
    tensors.pop("nothing", None)
    said = refusal(write(tmp_path, m, tensors, **settings), m.config)
    assert said.startswith(f"adapter {tmp_path} does not fit the model")
    for sentence in sentences:
        assert sentence in said


def test_an_adapter_of_another_model_names_what_it_was_trained_on(tmp_path):
    m = model()
    other = random_config(np.random.default_rng(5), 0, num_layers=3)
    said = refusal(write(tmp_path, m, base_model_name_or_path="google/gemma-7b-it"), other)
    assert "(it says it was trained on 'google/gemma-7b-it')" in said
    assert re.search(r"\d+ problems:\n", said)
    assert "model.layers.2.self_attn.q_proj has no lora_A" in said  # and the third layer has nothing at all


def strange(t):
    t[Q + "lora_A.weight"] = np.ones((5, t[Q + "lora_A.weight"].shape[1] + 8))
    t[Q + "lora_B.weight"] = np.ones((7, 3, 1))


def test_nothing_is_guessed_about_a_shape_that_fits_nowhere(tmp_path):
    """Neither rank nor width agrees, or there is an axis too many: what was found and expected, and no more."""
    m = model()
    tensors = factors(m)
    strange(tensors)
    O, I = m.params["layers"][0]["attn"]["q"].shape
    lines = refusal(write(tmp_path, m, tensors), m.config).splitlines()
    assert f"  model.layers.0.self_attn.q_proj.lora_A has shape (5, {I + 8}), expected (3, {I})" in lines
    assert f"  model.layers.0.self_attn.q_proj.lora_B has shape (7, 3, 1), expected ({O}, 3)" in lines


def test_a_vector_of_another_length_is_no_rank(tmp_path):
    m = model()
    lengths = {name: len(w) for name, w in factors(m).items() if "lora_B" in name}
    magnitudes = {n.replace("lora_B.weight", "lora_magnitude_vector"): np.ones(k + 1) for n, k in lengths.items()}
    said = refusal(write(tmp_path, m, factors(m) | magnitudes, use_dora=True), m.config)
    assert "lora_magnitude_vector has shape" in said
    assert "rank" not in said


def test_what_every_layer_has_is_one_line(tmp_path):
    m = model()
    c = random_config(np.random.default_rng(6), 0, num_layers=12)
    said = refusal(write(tmp_path, m, target_modules=["q_proj", "down_proj"]), c)
    lines = said.splitlines()
    missing = [line for line in lines if "has no lora_A" in line]
    assert len(missing) == 2
    assert missing[0].startswith("  model.layers.2.self_attn.q_proj has no lora_A, which the configuration claims")
    assert missing[0].endswith("(and 9 more like it in other layers)")
    assert int(re.search(r": (\d+) problems:", lines[0])[1]) >= 40  # every one of them counts
    assert len(lines) < 12


def test_a_square_factor_says_what_was_checked(tmp_path):
    """At rank D a factor of shape (R, D) is square: transposed or not, it fits."""
    m = model()
    D = m.config.hidden_size
    tensors = factors(m, rank=D)
    changes, notes = fit(lora.read(write(tmp_path / "some", m, tensors, r=D)), m.config)
    assert len(changes) == 4
    assert len(notes) == 1
    # Square are A of q_proj (D, D) and B of down_proj (D, D) in two layers; the other four are not.
    assert notes[0].startswith("model.layers.0.self_attn.q_proj.lora_A and 3 more: square, so its shape cannot show")
    assert "4 other factors of the file are not square, and stand as PEFT writes them" in notes[0]
    assert not fit(lora.read(write(tmp_path / "none", m)), m.config).notes


def test_a_stored_table_of_another_size_is_refused(tmp_path):
    m = model()
    V, D = m.config.vocab_size, m.config.hidden_size
    tensors = factors(m) | {f"{PREFIX}model.embed_tokens.weight": np.zeros((V + 64, D))}
    said = refusal(write(tmp_path, m, tensors), m.config)
    assert "model.embed_tokens.weight would not be used: the configuration does not claim it" in said


def test_a_stored_table_that_changed_is_that_of_a_tied_head_too(tmp_path):
    """What the factors were trained on top of: one table under either name, as in the base."""
    m = model()
    V, D = m.config.vocab_size, m.config.hidden_size
    other = m.params["embed"] + 1
    tensors = factors(m) | {
        f"{PREFIX}model.embed_tokens.lora_embedding_A": np.ones((3, V)),
        f"{PREFIX}model.embed_tokens.lora_embedding_B": np.ones((D, 3)),
        f"{PREFIX}model.embed_tokens.base_layer.weight": other,
    }
    settings = {"target_modules": ["q_proj", "down_proj", "embed_tokens"]}
    adapter = lora.read(write(tmp_path, m, tensors, "float32", **settings))
    whole = {c.path: c.weight for c in fit(adapter, m.config).changes if isinstance(c, Replaced)}
    assert whole.keys() == {"embed", "head"}
    assert whole["embed"] is whole["head"]
    assert np.array_equal(whole["head"], other)
    apart = replace(m.config, tie_word_embeddings=False)
    assert [c.path for c in fit(adapter, apart).changes if isinstance(c, Replaced)] == ["embed"]


def test_token_ids_are_in_the_order_of_the_rows(tmp_path):
    """PEFT keeps the order in which they were given."""
    m = model()
    rows = np.arange(3.0)[:, None] * np.ones(m.config.hidden_size)
    tensors = factors(m) | {f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": rows}
    adapter = lora.read(write(tmp_path, m, tensors, trainable_token_indices=[7, 2, 5]))
    found = {c.path: c for c in fit(adapter, m.config).changes if isinstance(c, ReplacedRows)}
    assert found.keys() == {"embed", "head"}
    for path, change in found.items():
        assert change.ids == (7, 2, 5)
        table = materialise(attach(m.params, [change], dtype=np.float64)[path], table=path == "embed")
        assert [table[i, 0] for i in (7, 2, 5)] == [0, 1, 2]
