import json
from dataclasses import replace

import pytest

from refgemma.config import SIZES, Config, Layer, config_from_hf, read_config, to_json
from tests.models import reshaped


def hf_7b(**changes):
    """The fields of gemma-7b-it's config.json that decide the result; None removes one."""
    fields = {
        "model_type": "gemma",
        "vocab_size": 256000,
        "hidden_size": 3072,
        "intermediate_size": 24576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "hidden_act": "gelu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rope_scaling": None,
    } | changes
    return {name: value for name, value in fields.items() if value is not None}


def sentence_of(error):
    text = str(error.value)
    assert "\n" not in text
    return text


def test_published_parameter_counts():
    # keras-team/keras-hub at 71453d08, keras_hub/src/models/gemma/gemma_presets.py, "params".
    assert SIZES["gemma-2b"].num_parameters == 2_506_172_416
    assert SIZES["gemma-7b"].num_parameters == 8_537_680_896
    # The usual mistake: heads of width D / N, 192 in the 7B size.
    assert reshaped(SIZES["gemma-7b"], head_dim=192).num_parameters != 8_537_680_896


def test_an_untied_head_counts_as_a_table_of_its_own():
    untied = replace(SIZES["gemma-2b"], tie_word_embeddings=False)
    assert untied.num_parameters == SIZES["gemma-2b"].num_parameters + 256_000 * 2048


def test_the_7b_file_gives_the_7b_size():
    assert config_from_hf(hf_7b()) == SIZES["gemma-7b"]


def test_the_2b_file_gives_the_2b_size():
    shape = {"hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18}
    assert config_from_hf(hf_7b(**shape, num_attention_heads=8, num_key_value_heads=1)) == SIZES["gemma-2b"]


def test_head_dim_is_read_and_never_derived():
    # https://github.com/meta-pytorch/gpt-fast/pull/115: 3072 / 16 is 192, and the heads are 256 wide.
    (row,) = set(config_from_hf(hf_7b()).layers)
    assert (row.head_dim, row.query_scale) == (256, 1 / 16)
    with pytest.raises(ValueError, match="missing head_dim") as error:
        config_from_hf(hf_7b(head_dim=None))
    sentence_of(error)


def test_gelu_means_the_tanh_form():
    # https://github.com/huggingface/transformers/pull/29402
    for act in ("gelu", "gelu_pytorch_tanh"):
        assert config_from_hf(hf_7b(hidden_act=act)) == SIZES["gemma-7b"]
        assert config_from_hf(hf_7b(hidden_activation=act)) == SIZES["gemma-7b"]


@pytest.mark.parametrize("act", ["silu", "relu", "gelu_new", 3])
def test_another_activation_is_refused(act):
    for name in ("hidden_act", "hidden_activation"):
        with pytest.raises(ValueError, match=f"{name} is {act!r}: Gemma uses the tanh form") as error:
            config_from_hf(hf_7b(**{name: act}))
        sentence_of(error)


def test_rope_theta_may_stand_inside_rope_parameters():
    inside = {"rope_theta": 10000.0, "rope_type": "default"}
    assert config_from_hf(hf_7b(rope_theta=None, rope_parameters=inside)) == SIZES["gemma-7b"]
    assert config_from_hf(hf_7b() | {"rope_theta": None, "rope_parameters": inside}) == SIZES["gemma-7b"]
    assert config_from_hf(hf_7b(rope_parameters=inside)) == SIZES["gemma-7b"]
    assert {row.rope_theta for row in config_from_hf(hf_7b(rope_theta=5000)).layers} == {5000}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rope_theta": None}, "missing rope_theta"),
        (
            {"rope_theta": None, "rms_norm_eps": None, "vocab_size": None},
            "missing vocab_size, rms_norm_eps, rope_theta",
        ),
        ({"rope_parameters": {"rope_theta": 5000.0}}, "rope_theta is 10000.0, but 5000.0 in rope_parameters"),
        ({"rope_parameters": [10000.0]}, "rope_parameters is"),
        ({"rope_scaling": {"type": "linear", "factor": 8.0}}, "rope_type is 'linear'"),
        ({"rope_theta": "10000"}, "rope_theta is '10000': expected a positive number"),
        ({"rope_theta": [1]}, "rope_theta is"),
        ({"rope_theta": 10**400}, "rope_theta is"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0: expected a positive number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"vocab_size": 256000.0}, "vocab_size is 256000.0: expected a whole number"),
        ({"num_hidden_layers": 0}, "num_layers is 0"),
        ({"num_hidden_layers": True}, "num_layers is True"),
        ({"num_key_value_heads": 3}, "num_heads=16 is not a multiple of num_kv_heads=3"),
        ({"head_dim": 255}, "head_dim=255 is odd"),
        ({"head_dim": "256"}, "head_dim is '256'"),
        ({"head_dim": 0}, "head_dim is 0"),
        ({"head_dim": 10**400}, "head_dim is"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes': expected true or false"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ({"query_pre_attn_scalar": 144}, "query_pre_attn_scalar is 144"),
        ({"sliding_window": 4096}, "sliding_window is 4096"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
        ({"num_hidden_layers": 10_000_000}, "num_layers is 10000000: expected at most 10,000"),
    ],
)
def test_a_field_that_cannot_be_is_one_sentence(changes, sentence):
    with pytest.raises(ValueError) as error:  # noqa: PT011  the sentence is checked below
        config_from_hf(hf_7b(**changes))
    assert sentence in sentence_of(error)


def test_the_head_is_tied_unless_the_file_says_otherwise():
    assert config_from_hf(hf_7b()).tie_word_embeddings is True
    assert config_from_hf(hf_7b(tie_word_embeddings=False)).tie_word_embeddings is False


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "llama", None, ["gemma"]])
def test_another_model_type_is_told_what_is_supported(model_type):
    with pytest.raises(ValueError, match="supported is 'gemma'") as error:
        config_from_hf(hf_7b(model_type=model_type))
    assert f"model_type is {model_type!r}" in sentence_of(error)


def test_a_config_is_read_from_its_file_or_its_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(hf_7b()))
    assert read_config(tmp_path) == read_config(str(tmp_path / "config.json")) == SIZES["gemma-7b"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is not valid JSON"),
        ('{"model_type": "gemma",}', "is not valid JSON"),
        ("\xff\xfe", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ('{"vocab_size": ' + "9" * 5000 + "}", "is not valid JSON"),
        ("[]", "holds a JSON list: expected an object"),
        ('{"model_type": "gemma2"}', "model_type is 'gemma2'"),
    ],
)
def test_a_file_that_is_no_config_is_one_sentence(tmp_path, text, sentence):
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match="config") as error:
        read_config(tmp_path)
    assert f"{tmp_path / 'config.json'}" in sentence_of(error)
    assert sentence in sentence_of(error)


def test_a_missing_file_is_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a model folder holds config\.json beside") as error:
        read_config(tmp_path)
    sentence_of(error)


def test_no_number_has_a_default():
    with pytest.raises(TypeError, match="missing 6 required keyword-only arguments"):
        Config()
    with pytest.raises(TypeError, match="missing 6 required keyword-only arguments"):
        Layer()
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'rope_theta'"):
        Config.uniform(**{name: value for name, value in to_json(SIZES["gemma-2b"]).items() if name != "rope_theta"})
