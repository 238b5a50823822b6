"""Names of tokens from the tokenizers of other models, and the text that they spell."""

import json

import pytest

from refgemma.text.token_texts import read_pieces, spell
from tests import vocabulary


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_any_sentencepiece_model(small_tokenizer, tmp_path):
    want = [small_tokenizer.piece(token) for token in range(small_tokenizer.vocab_size)]
    assert read_pieces(small_tokenizer.path) == read_pieces(small_tokenizer.path.parent) == want
    # One without Gemma's conventions, as most models have: a Tokenizer would refuse it.
    other = vocabulary.train(
        tmp_path / "other.model", model_type="unigram", vocab_size=100, byte_fallback=False, user_defined_symbols=[]
    )
    assert read_pieces(other)[:4] == ["<pad>", "<eos>", "<bos>", "<unk>"]
    assert len(read_pieces(other)) == 100


@pytest.mark.parametrize(
    "content",
    [
        ["a", "\u2581b", "", "\U0001f98a"],
        {"a": 0, "\U0001f98a": 3, "\u2581b": 1},
        {"0": "a", "3": "\U0001f98a", "1": "\u2581b"},
        {
            "model": {"type": "BPE", "vocab": {"a": 0, "\u2581b": 1}},
            "added_tokens": [{"id": 3, "content": "\U0001f98a"}],
        },
        {
            "model": {"type": "Unigram", "vocab": [["a", -1.5], ["x", -2], ["", 0]]},
            "added_tokens": [{"id": 3, "content": "\U0001f98a"}, {"id": 1, "content": "\u2581b"}],
        },
    ],
)
def test_lists_objects_and_tokenizer_json(tmp_path, content):
    assert read_pieces(write(tmp_path / "t.json", content)) == ["a", "\u2581b", "", "\U0001f98a"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("3", "holds 3: expected a list of texts"),
        ("[]", "holds []"),
        ("{}", "holds {}"),
        ("[3]", "holds [3]"),
        ('{"a": "b"}', "holds {'a': 'b'}"),
        ('{"a": -1}', "holds {'a': -1}"),
        ('{"a": true}', "holds {'a': True}"),
        ('{"model": {"vocab": 3}}', "holds 3"),
        ('{"a": 99999999999}', "has a token id 99999999999: expected ids below"),
        ('["\\ud83d"]', "token 0 holds half a surrogate pair"),
    ],
)
def test_other_json_is_refused_in_a_sentence(tmp_path, content, words):
    with pytest.raises(ValueError, match="expected") as error:
        read_pieces(write(tmp_path / "t.json", content))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_other_files_are_refused_in_a_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"does not exist: expected a tokenizer\.model"):
        read_pieces(tmp_path)
    with pytest.raises(ValueError, match="is not a SentencePiece model: expected one, or JSON"):
        read_pieces(write(tmp_path / "t.model", "hello"))


@pytest.mark.parametrize(
    ("pieces", "texts"),
    [
        (["\u2581a", "b\u2581c"], [" a", "b c"]),
        (["<0x0A>", "x"], ["\n", "x"]),
        (["<0xF0>", "<0x9F>", "<0xA6>", "<0x8A>", "!"], ["", "", "", "\U0001f98a", "!"]),
        (["<0xF0>", "<0x9F>", "x"], ["", "\ufffd", "x"]),  # half a character, cut short by another token
        (["x", "<0xC3>"], ["x", "\ufffd"]),  # or by the end
        (["<0xC3>", "<0xC3>", "<0xA9>"], ["", "\ufffd", "\u00e9"]),
        (["<0xc3>", "<0x0A", ""], ["<0xc3>", "<0x0A", ""]),  # no byte pieces
        ([], []),
    ],
)
def test_spelling(pieces, texts):
    assert spell(pieces) == texts


def test_spelling_is_decoding(tokenizer):
    tokens = tokenizer.encode("h\u00e9llo  w\u00f6rld \U0001f98a \u2028\n\nend", control="none")
    assert "".join(spell(map(tokenizer.piece, tokens))) == tokenizer.decode(tokens)
