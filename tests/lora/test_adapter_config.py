"""adapter_config.json: what is used, what is inert, and what is refused by name."""

import json
import math
import re

import pytest

from refgemma.lora.adapter_config import adapter_config, read_adapter_config

PLAIN = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 16, "target_modules": ["q_proj"]}

# Fields of a file that PEFT 0.21 wrote with its own defaults; nothing in them asks for anything.
PEFT_DEFAULTS = {
    "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None, "auto_mapping": None,
    "base_model_name_or_path": "google/gemma-2b-it", "bias": "none", "corda_config": None,
    "ensure_weight_tying": False, "eva_config": None, "exclude_modules": None, "fan_in_fan_out": False,
    "inference_mode": True, "init_lora_weights": True, "layer_replication": None, "layers_pattern": None,
    "layers_to_transform": None, "loftq_config": {}, "lora_bias": False, "lora_dropout": 0.05, "megatron_config": None,
    "megatron_core": "megatron.core", "modules_to_save": None, "peft_version": "0.21.2", "qalora_group_size": 16,
    "rank_pattern": {}, "revision": None, "target_parameters": None, "trainable_token_indices": None,
    "use_bdlora": None, "use_dora": False, "use_qalora": False, "use_rslora": False,
}  # fmt: skip


def test_a_file_as_peft_writes_it_is_taken(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(PEFT_DEFAULTS | PLAIN))
    config = read_adapter_config(tmp_path)
    assert (config.r, config.lora_alpha, config.target_modules) == (4, 16, ["q_proj"])
    assert config.base_model_name_or_path == "google/gemma-2b-it"


@pytest.mark.parametrize(("rslora", "wrong"), [(False, True), (True, False)])
def test_scale_is_alpha_over_rank_or_over_its_root(rslora, wrong):
    config = adapter_config(PLAIN | {"use_rslora": rslora})
    assert config.scale(9, 16) == 16 / (3 if rslora else 9)  # exact: one division of small whole numbers
    assert config.scale(9, 16) != adapter_config(PLAIN | {"use_rslora": wrong}).scale(9, 16)
    assert config.scale(9, 16) != 16  # alpha alone
    assert math.isclose(config.scale(8, 16), 16 / (math.sqrt(8) if rslora else 8), rel_tol=2**-52)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3': expected 'LORA'"),
        ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS': expected 'CAUSAL_LM'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', which changes the base model"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq', which changes the base model"),
        ({"init_lora_weights": "OLoRA"}, "init_lora_weights is 'OLoRA', which changes the base model"),
        ({"init_lora_weights": "corda"}, "init_lora_weights is 'corda', which changes the base model"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights is 'lora_ga', which changes the base model"),
        (
            {"init_lora_weights": "next_year"},
            "init_lora_weights is 'next_year', which is unknown and may have changed the base",
        ),
        ({"init_lora_weights": "true"}, "init_lora_weights is 'true', which is unknown and may have changed the base"),
        ({"init_lora_weights": [1]}, "init_lora_weights is [1], which is unknown and may have changed the base"),
        ({"arrow_config": {"top_k": 1}}, "arrow_config is {'top_k': 1}: this option is not supported"),
        ({"kasa_config": {"beta": 1.0}}, "kasa_config is {'beta': 1.0}: this option is not supported"),
        ({"velora_config": {"scale": 1.0}}, "velora_config is {'scale': 1.0}: this option is not supported"),
        ({"monteclora_config": {"num_samples": 8}}, "monteclora_config is {'num_samples': 8}: this option is not"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora is {'nblocks': 2}: this option is not supported"),
        ({"megatron_config": {"a": 1}}, "megatron_config is {'a': 1}: this option is not supported"),
        ({"r": 10**400}, "r is 1000"),
        ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
        ({"alpha_pattern": {"q_proj": 10**400}}, "alpha_pattern is {'q_proj': 1000"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is [[0, 2]]: this option is not supported"),
        ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens is [3]: this option is not supported"),
        ({"target_parameters": ["x.weight"]}, "target_parameters is ['x.weight']: this option is not supported"),
        ({"use_qalora": True}, "use_qalora is True: this option is not supported"),
        ({"use_something_new": 1}, "use_something_new is 1: this option is not supported"),
        ({"r": 0}, "r is 0: expected a whole number from 1 to 999,999"),
        ({"r": True}, "r is True: expected a whole number"),
        ({"lora_alpha": "16"}, "lora_alpha is '16': expected a finite number"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan: expected a finite number"),
        ({"target_modules": 3}, "target_modules is 3: expected a string or a list of strings"),
        ({"target_modules": "("}, "'(' is not a regular expression"),
        ({"rank_pattern": {"[": 2}}, "'[' is not a regular expression"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern is {'q_proj': 0}: expected an object of names and ranks"),
        ({"alpha_pattern": []}, "alpha_pattern is []: expected an object of names and numbers"),
        ({"layers_to_transform": [-1]}, "layers_to_transform is [-1]: expected a layer number or a list of them"),
        ({"trainable_token_indices": [1.5]}, "trainable_token_indices is [1.5]: expected a list of token ids"),
        ({"use_dora": "yes"}, "use_dora is 'yes': expected true or false"),
        ({"use_dora": True, "lora_bias": True}, "lora_bias and use_dora are both true"),
        ({"bias": "some"}, "bias is 'some': expected 'none', 'all' or 'lora_only'"),
        (
            {"target_modules": "q.*", "layers_to_transform": [0]},
            "layers_to_transform needs target_modules to be a list",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(fields, sentence, tmp_path):
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(PLAIN | fields))
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: .*{re.escape(sentence)}"):
        read_adapter_config(tmp_path)


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "Gaussian", "eva", "orthogonal", "mica"])
def test_a_start_that_leaves_the_base_alone_is_taken(start):
    assert adapter_config(PLAIN | {"init_lora_weights": start}).r == PLAIN["r"]


def test_settings_of_a_start_that_was_not_used_are_taken():
    """As PEFT, which warns and passes over them; an adapter that it converted still holds them."""
    settings = {"eva_config": {"rho": 2.0}, "corda_config": {"corda_method": "ipm"}, "loftq_config": {"loftq_bits": 4}}
    assert adapter_config(PLAIN | settings | {"lora_ga_config": {"direction": "ArB2r"}}).r == PLAIN["r"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("[1]", "holds a JSON list: expected an object"),
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
    ],
)
def test_a_broken_file_is_one_sentence(content, sentence, tmp_path):
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(ValueError, match=sentence):
        read_adapter_config(tmp_path)


def test_a_missing_file_says_what_belongs_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds adapter_config.json and adapter_model.safetensors"):
        read_adapter_config(tmp_path)
