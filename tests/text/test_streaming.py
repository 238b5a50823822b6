"""A stream of text is the text: same characters, none of them halved, and no work done twice."""

import random

import numpy as np
import pytest

from refgemma.text.streaming import StreamDecoder
from refgemma.text.tokenizer import Tokenizer

# Bytes where UTF-8 decoders disagree: ends of the ranges of lead and continuation bytes, and ASCII.
BYTES = [0x00, 0x41, 0x7F, 0x80, 0x82, 0x9F, 0xA0, 0xBF, 0xC0, 0xC1, 0xC2, 0xDF, 0xE0, 0xE2, 0xED, 0xEF]
BYTES += [0xF0, 0x90, 0x8F, 0xF4, 0xF5, 0xF7, 0xF8, 0xFB, 0xFC, 0xFE, 0xFF]


def random_ids(rng, tokenizer):
    byte = {value: i for i, value in tokenizer.byte_values.items()}
    special = [*tokenizer.controls.values(), *tokenizer.markers.values()]
    ids = []
    for _ in range(rng.randrange(25)):
        kind = rng.randrange(6)
        if kind < 3:
            ids += [byte[rng.choice(BYTES)] for _ in range(rng.randrange(1, 6))]
        elif kind == 3:
            ids += [byte[value] for value in rng.choice(["é", "€", "漢", "🤗", "\U0010ffff", "\ufffd"]).encode()]
        elif kind == 4:
            ids.append(rng.choice(special))
        else:
            ids.append(rng.randrange(tokenizer.vocab_size))
    return ids


def test_streamed_text_is_the_decoded_text(tokenizer):
    rng = random.Random(5)
    token_by_token = 0
    for _ in range(1500):
        ids = random_ids(rng, tokenizer)
        decoder = StreamDecoder(tokenizer)
        text = ""
        for count, token in enumerate(ids, start=1):
            text += decoder.feed(token)
            so_far = tokenizer.decode(ids[:count])
            # Only broken bytes at the very end may be missing, and never as many as a character can have.
            assert so_far.startswith(text), ids
            assert so_far[len(text) :] in ("", "\ufffd", "\ufffd" * 2, "\ufffd" * 3), ids
            if token not in tokenizer.byte_values:
                assert text == so_far, ids
        assert text + decoder.flush() == tokenizer.decode(ids), ids
        token_by_token += "".join(tokenizer.decode([i]) for i in ids) != tokenizer.decode(ids)
    assert token_by_token > 200  # the usual shortcut is seen to be wrong


@pytest.mark.parametrize("character", ["é", "€", "漢", "🤗", "\U0010ffff"])
def test_a_character_comes_whole(tokenizer, character):
    byte = {value: i for i, value in tokenizer.byte_values.items()}
    decoder = StreamDecoder(tokenizer)
    parts = [decoder.feed(byte[value]) for value in character.encode()]
    assert parts == [""] * (len(parts) - 1) + [character]
    assert decoder.flush() == ""


def test_an_unfinished_character_comes_out_at_the_end(tokenizer):
    byte = {value: i for i, value in tokenizer.byte_values.items()}
    decoder = StreamDecoder(tokenizer)
    assert [decoder.feed(byte[value]) for value in "🤗".encode()[:3]] == ["", "", ""]
    assert decoder.flush() == "\ufffd\ufffd\ufffd"
    assert decoder.flush() == ""
    # What follows does not complete the character, so both are certain at once.
    decoder.feed(byte[0xF0])
    assert decoder.feed(tokenizer.end_of_turn_id) == "\ufffd<end_of_turn>"


@pytest.mark.parametrize("value", [0x80, 0xBF, 0xF8, 0xFF])
def test_a_byte_that_begins_no_character_is_not_waited_for(tokenizer, value):
    byte = {value: i for i, value in tokenizer.byte_values.items()}
    assert StreamDecoder(tokenizer).feed(byte[value]) == "\ufffd"


def test_a_long_text_is_not_decoded_again_and_again(small_tokenizer, monkeypatch):
    decoded = []

    def counting(self, ids, original=Tokenizer.decode):
        ids = list(ids)
        decoded.append(len(ids))
        return original(self, ids)

    ids = small_tokenizer.encode("the 🤗 é漢 answer " * 200)
    monkeypatch.setattr(Tokenizer, "decode", counting)
    decoder = StreamDecoder(small_tokenizer)
    for token in ids:
        decoder.feed(token)
    # One call a token, each token decoded once; the re-decoding variant needs len(ids) ** 2 / 2.
    assert len(decoded) == len(ids)
    assert sum(decoded) == len(ids)


def test_numpy_tokens(small_tokenizer):
    ids = np.array(small_tokenizer.encode("Hello 🤗 world"))
    decoder = StreamDecoder(small_tokenizer)
    assert "".join(decoder.feed(token) for token in ids) == "Hello 🤗 world"


def test_a_refused_token_leaves_the_stream_as_it_was(small_tokenizer):
    byte = {value: i for i, value in small_tokenizer.byte_values.items()}
    decoder = StreamDecoder(small_tokenizer)
    decoder.feed(byte[0xC3])
    with pytest.raises(ValueError, match="token id 500 is outside the vocabulary"):
        decoder.feed(500)
    with pytest.raises(TypeError, match="integer"):
        decoder.feed(1.0)
    assert decoder.feed(byte[0xA9]) == "é"
