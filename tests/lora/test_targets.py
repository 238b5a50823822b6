"""PEFT's matching rules, case by case; tests/peers holds them against PEFT itself."""

import pytest

from refgemma.lora.adapter_config import (
    AdapterConfig,
    low_rank_modules,
    rank_and_alpha,
    saved_modules,
    trained_tokens,
    unused_patterns,
)

PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
         "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
LAYERS = [f"model.layers.{i}.{part}" for i in range(12) for part in PARTS]
MATRICES = ["model.embed_tokens", *LAYERS, "lm_head"]
NORMS = [f"model.layers.{i}.{norm}_layernorm" for i in range(12) for norm in ("input", "post_attention")]
MODULES = [*MATRICES, *NORMS, "model.norm"]


def ending(*ends):
    return [module for module in MATRICES if module.endswith(ends)]


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, ending("q_proj", "v_proj")),
        ({"target_modules": ["self_attn.q_proj"]}, ending("q_proj")),
        ({"target_modules": ["model.layers.1.self_attn.q_proj"]}, ["model.layers.1.self_attn.q_proj"]),  # not 11
        ({"target_modules": "all-linear"}, LAYERS),
        ({"target_modules": "All-Linear"}, LAYERS),
        ({"target_modules": r".*layers\.[01]\.mlp\..*"}, [m for m in LAYERS[:14] if "mlp" in m]),
        ({"target_modules": ["embed_tokens", "lm_head"]}, ["model.embed_tokens", "lm_head"]),
        ({"target_modules": "all-linear", "exclude_modules": ["o_proj"]}, [m for m in LAYERS if "o_proj" not in m]),
        ({"target_modules": "all-linear", "exclude_modules": r".*mlp.*"}, [m for m in LAYERS if "mlp" not in m]),
        ({"target_modules": ["q_proj"], "layers_to_transform": 1}, ["model.layers.1.self_attn.q_proj"]),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [1, 11], "layers_pattern": "layers"},
            ["model.layers.1.self_attn.q_proj", "model.layers.11.self_attn.q_proj"],
        ),
        ({"target_modules": ["q_proj", "embed_tokens"], "layers_to_transform": [0]}, LAYERS[:1]),
        ({"target_modules": ["q_proj", "o_proj"], "modules_to_save": ["o_proj"]}, ending("q_proj")),
    ],
)  # fmt: skip
def test_modules_with_factors(fields, wanted):
    problems = []
    assert low_rank_modules(AdapterConfig(**fields), MATRICES, problems) == wanted
    assert not problems


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"target_modules": ["q_proj", "query"]}, "target_modules names 'query', and the model has no such module"),
        ({"target_modules": ["proj"]}, "target_modules names 'proj'"),  # an end, but not of a whole name
        ({"target_modules": "q_proj"}, "target_modules 'q_proj' matches no module"),  # an expression is for whole names
        ({"target_modules": ["q_proj"], "layers_to_transform": [3, 12]}, "layer 12, and the model has no such layer"),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [3], "layers_pattern": "blocks"},
            "layers_pattern 'blocks' leaves none of the target_modules",
        ),
    ],
)  # fmt: skip
def test_a_name_that_matches_nothing_is_told(fields, sentence):
    problems = []
    low_rank_modules(AdapterConfig(**fields), MATRICES, problems)
    assert len(problems) == 1
    assert sentence in problems[0]


def test_saved_modules_are_matched_by_their_plain_end():
    problems = []
    found = saved_modules(AdapterConfig(modules_to_save=["norm", "mlp", "lm_head"]), MODULES, problems)
    assert found == [m for m in MODULES if "norm" in m or ".mlp." in m or m == "lm_head"]
    assert not problems
    saved_modules(AdapterConfig(modules_to_save=["score"]), MODULES, problems)
    assert problems == ["modules_to_save names 'score', and the model has no such module"]


def test_the_first_pattern_that_matches_the_end_of_a_name_decides():
    config = AdapterConfig(
        r=8, lora_alpha=16,
        rank_pattern={r"layers\.1\.self_attn\.q_proj": 2, "q_proj": 4},
        alpha_pattern={"(q|k)_proj": 32},
    )  # fmt: skip
    assert rank_and_alpha(config, "model.layers.1.self_attn.q_proj") == (2, 32)
    assert rank_and_alpha(config, "model.layers.11.self_attn.q_proj") == (4, 32)
    assert rank_and_alpha(config, "model.layers.1.self_attn.k_proj") == (8, 32)
    assert rank_and_alpha(config, "model.layers.1.self_attn.v_proj") == (8, 16)


def test_a_pattern_goes_to_the_end_of_a_name():
    """And begins at a dot, or anywhere if it contains one; "q_pro" and "self_attn" are not whole ends."""
    for pattern in ("q_pro", "self_attn", r"layers\.1", "proj", "_proj"):
        config = AdapterConfig(r=8, lora_alpha=16, rank_pattern={pattern: 2}, alpha_pattern={pattern: 3})
        assert rank_and_alpha(config, "model.layers.1.self_attn.q_proj") == (8, 16)
        assert len(unused_patterns(config, ["model.layers.1.self_attn.q_proj"])) == 2


@pytest.mark.parametrize("pattern", ["o_proj", r"mlp\..*", r"model\.layers", r".*o_pro"])
def test_an_expression_of_what_to_exclude_is_for_whole_names(pattern):
    config = AdapterConfig(target_modules="all-linear", exclude_modules=pattern)
    assert low_rank_modules(config, MATRICES, []) == LAYERS


def test_a_pattern_that_no_module_with_factors_matches_is_told():
    config = AdapterConfig(rank_pattern={"q_proj": 4}, alpha_pattern={"k_proj": 2, "v_porj": 2})
    assert unused_patterns(config, ending("q_proj", "k_proj")) == [
        "alpha_pattern has 'v_porj', which matches none of the modules with factors"
    ]


def test_trained_tokens_of_a_bare_list_are_rows_of_the_embedding():
    problems = []
    assert trained_tokens(AdapterConfig(trainable_token_indices=[5, 2]), MATRICES, problems) == {
        "model.embed_tokens": [5, 2]
    }
    config = AdapterConfig(trainable_token_indices={"lm_head": [1], "q_proj": [2]})
    assert trained_tokens(config, MATRICES, problems) == {"lm_head": [1]}
    assert problems == ["trainable_token_indices names 'q_proj': expected embed_tokens or lm_head"]
