"""Stop ids: those of the configuration and the two that every Gemma answer may end with."""

import json

import pytest

from refgemma.text.streaming import read_generation_config, stop_ids


@pytest.mark.parametrize(
    "config", [None, {}, {"eos_token_id": None}, {"eos_token_id": 1}, {"eos_token_id": [1]}, {"top_k": 64}]
)
def test_eos_and_end_of_turn_always_stop(tokenizer, config):
    assert stop_ids(tokenizer, config) == (tokenizer.eos_id, tokenizer.end_of_turn_id)


def test_ids_of_the_configuration_are_added(tokenizer):
    assert stop_ids(tokenizer, {"eos_token_id": [200, 1]}) == tuple(sorted({1, 200, tokenizer.end_of_turn_id}))
    assert stop_ids(tokenizer, {"eos_token_id": (300,)}) == tuple(sorted({1, 300, tokenizer.end_of_turn_id}))
    assert stop_ids(tokenizer, {"eos_token_id": 0}) == (0, 1, tokenizer.end_of_turn_id)


def test_gemma_stops_on_1_and_107(gemma_tokenizer):
    assert (
        stop_ids(gemma_tokenizer, {"eos_token_id": 1})
        == stop_ids(gemma_tokenizer, {"eos_token_id": [1, 107]})
        == (1, 107)
    )


@pytest.mark.parametrize("given", [500, -1, "1", [1, None], 1.0, True, [[1]], {"a": 1}])
def test_stop_ids_that_are_no_ids(small_tokenizer, given):
    with pytest.raises(
        ValueError, match=r"^eos_token_id holds .*: expected whole numbers from 0 to 499, one or a list$"
    ):
        stop_ids(small_tokenizer, {"eos_token_id": given})


def test_generation_config_is_read(tmp_path, small_tokenizer):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 33], "top_p": 0.95}))
    assert read_generation_config(tmp_path) == {"eos_token_id": [1, 33], "top_p": 0.95}
    assert 33 in stop_ids(small_tokenizer, read_generation_config(tmp_path))


def test_generation_config_is_optional(tmp_path):
    assert read_generation_config(tmp_path) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "is not valid JSON"),
        (b"\xff", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"[1]", "holds a JSON list"),
    ],
)
def test_broken_generation_config(tmp_path, text, message):
    (tmp_path / "generation_config.json").write_bytes(text)
    with pytest.raises(ValueError, match=message):
        read_generation_config(tmp_path)
