"""Strictness: nothing of the file unused, nothing claimed missing, every misfit told, all in one error."""

import re

import numpy as np
import pytest

from refgemma import lora
from tests.lora.folders import factors, model, write
from tests.lora.peft_folders import PREFIX
from tests.models import random_config

Q = f"{PREFIX}model.layers.0.self_attn.q_proj."


def refusal(folder, config):
    with pytest.raises(ValueError, match="does not fit the model") as error:
        lora.fit(lora.read(folder), config)
    return str(error.value)


def test_a_good_adapter_changes_what_it_claims(tmp_path):
    m = model()
    changes, notes = lora.fit(lora.read(write(tmp_path, m)), m.config)
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
        (transposed(Q + "lora_A.weight"), {}, ["q_proj.lora_A has shape ", ": it is transposed"]),
        (transposed(Q + "lora_B.weight"), {}, ["q_proj.lora_B has shape ", ": it is transposed"]),
        (other_rank, {}, ["q_proj.lora_A has shape (5, ", ": its rank is 5, the configuration says 3"]),
        (wider, {}, [": it belongs to a model of other widths"]),
        (drop("nothing"), {"use_dora": True}, ["q_proj has no lora_magnitude_vector"]),
        (drop("nothing"), {"lora_bias": True}, ["q_proj has no lora_B.bias"]),
        (drop("nothing"), {"alpha_pattern": {"q_porj": 3}}, ["alpha_pattern has 'q_porj', which matches none"]),
        (drop("nothing"), {"rank_pattern": {"x": 3}}, ["rank_pattern has 'x', which matches none"]),
        (drop("nothing"), {"modules_to_save": ["score"]}, ["modules_to_save names 'score'"]),
        (drop("nothing"), {"trainable_token_indices": [10**6]}, ["has 1000000, outside the vocabulary of"]),
        (drop("nothing"), {"trainable_token_indices": [3, 3]}, ["names a token twice", "has no trainable_tokens"]),
        (
            drop("nothing"), {"trainable_token_indices": [3], "modules_to_save": ["lm_head"]},
            ["trainable_token_indices stands beside another change of the same table"],
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


def test_a_square_factor_says_what_was_checked(tmp_path):
    """At rank D a factor of shape (R, D) is square: transposed or not, it fits."""
    m = model()
    D = m.config.hidden_size
    tensors = factors(m, rank=D)
    changes, notes = lora.fit(lora.read(write(tmp_path / "some", m, tensors, r=D)), m.config)
    assert len(changes) == 4
    assert len(notes) == 1
    # Square are A of q_proj (D, D) and B of down_proj (D, D) in two layers; the other four are not.
    assert notes[0].startswith("model.layers.0.self_attn.q_proj.lora_A and 3 more: square, so its shape cannot show")
    assert "4 other factors of the file are not square, and stand as PEFT writes them" in notes[0]
    assert not lora.fit(lora.read(write(tmp_path / "none", m)), m.config).notes


def test_a_stored_table_of_another_size_is_refused(tmp_path):
    m = model()
    V, D = m.config.vocab_size, m.config.hidden_size
    tensors = factors(m) | {f"{PREFIX}model.embed_tokens.weight": np.zeros((V + 64, D))}
    said = refusal(write(tmp_path, m, tensors), m.config)
    assert "model.embed_tokens.weight would not be used: the configuration does not claim it" in said
