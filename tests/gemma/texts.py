"""Texts of a given length, for a model that reads so many tokens."""

CONTEXT = 1024

TEXT = "the world is a hello to the user, and it was for you that he asked the question. " * 40


def pieces(gemma, count):
    """A text of so many tokens, <bos> not counted."""
    text = gemma.tokenizer.decode(gemma.tokenizer.encode(TEXT)[:count])
    assert len(gemma.tokenizer.encode(text)) == count
    return text
