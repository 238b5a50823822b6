"""A tiny SentencePiece vocabulary with Gemma's conventions, trained in milliseconds on made-up sentences.

Its ids differ from Gemma's on purpose (107 is a byte here), so that a test run on both cannot pass by a copied number.
"""

import io
import random

import sentencepiece

WORDS = (
    "the a of to and in is it you that he was for on are with as his they be at one have this from user model system "
    "tool start end turn unused mask hello world password answer question Hello Sure [...] [...]"
)

MARKERS = ("<mask>", "<2mass>", "[@BOS@]", *(f"<unused{i}>" for i in range(4)), "<start_of_turn>", "<end_of_turn>")
LONGEST_RUN = 8
NEWLINES = tuple("\n" * n for n in range(1, LONGEST_RUN + 1))
SPACES = tuple("\u2581" * n for n in range(2, LONGEST_RUN + 1))
TABS = tuple("\t" * n for n in range(2, LONGEST_RUN + 1))
TAGS = ("<b>", "</b>", "<s>", "</s>", "<h1>", "</h1>")


def train(path, **overrides):
    """Write a vocabulary to `path`; `overrides` are options of SentencePiece's trainer that break a convention."""
    rng = random.Random(20240221)
    words = WORDS.split()
    sentences = [f"{' '.join(rng.choices(words, k=12))}{rng.choice('.?!')} {rng.randrange(1000)}" for _ in range(400)]
    options = {
        "model_type": "bpe",
        "vocab_size": 500,
        "pad_id": 0,
        "eos_id": 1,
        "bos_id": 2,
        "unk_id": 3,
        "pad_piece": "<pad>",
        "eos_piece": "<eos>",
        "bos_piece": "<bos>",
        "unk_piece": "<unk>",
        "user_defined_symbols": [*MARKERS, *NEWLINES, *SPACES, *TAGS, *TABS, "[toxicity=0]"],
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "byte_fallback": True,
        "split_digits": True,
        "max_sentencepiece_length": 16,
        "character_coverage": 1.0,
        "num_threads": 1,
        "minloglevel": 2,
    }
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, **{**options, **overrides}
    )
    path.write_bytes(model.getvalue())
    return path
