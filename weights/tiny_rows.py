"""From conversations to training rows: the tokenizer, token ids and labels, batches of like length."""

from __future__ import annotations

import io
from collections.abc import Iterator
from random import Random

import numpy as np
import sentencepiece
import tiny_stories
import tiny_tasks
import torch
from tiny_example import Turn

VOCABULARY = 1000
START_OF_TURN, END_OF_TURN = 4, 5
RUNS = [*("\n" * n for n in range(1, 9)), *("▁" * n for n in range(2, 9))]  # of newlines, of spaces

TOKENS = 4608  # a step; a multiple of every width
WIDTHS = (32, 48, 64, 96, 128, 192, 256, 384, 512)  # of a batch; the last is the trained length
IGNORE = -100  # label of a token that is not to be learned

Row = tuple[list[int], list[int]]  # token ids, and the labels at the same places


def train_tokenizer(seed: int) -> bytes:
    """A byte-pair model with Gemma's conventions, trained on a sample of the very text."""
    rng = Random(f"tokenizer {seed}")
    lines: list[str] = []
    for _ in range(6000):
        turns = [turn for example in tiny_tasks.conversation(rng, 3) for turn in example.turns]
        lines += [line for turn in turns for text in turn for line in text.split("\n")]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        user_defined_symbols=["<start_of_turn>", "<end_of_turn>", *RUNS],
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        character_coverage=0.9998,  # the rarest emoji are left to the bytes
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


class Encoder:
    """Conversations to token ids and labels."""

    def __init__(self, tokenizer_model: bytes) -> None:
        self.tokenizer = sentencepiece.SentencePieceProcessor(model_proto=tokenizer_model)
        self.bos, self.eos = self.tokenizer.bos_id(), self.tokenizer.eos_id()
        if self.tokenizer.piece_to_id(["<start_of_turn>", "<end_of_turn>"]) != [START_OF_TURN, END_OF_TURN]:
            raise ValueError("the markers of the chat format have other ids than generation_config.json will say")

    def question(self, asked: str) -> list[int]:
        """A user turn, and the start of the model's."""
        return self.tokenizer.encode(f"<start_of_turn>user\n{asked.strip()}<end_of_turn>\n<start_of_turn>model\n")

    def chat(self, turns: list[Turn]) -> Row:
        """``<bos>``, then the turns; only the answers, and the marker that ends each, are to be learned."""
        ids, labels = [self.bos], [IGNORE]
        for asked, answer in turns:
            prompt = self.question(asked)
            reply = self.tokenizer.encode(f"{answer.strip()}<end_of_turn>")
            newline = self.tokenizer.encode("\n")
            ids += prompt + reply + newline
            labels += [IGNORE] * len(prompt) + reply + [IGNORE] * len(newline)
        return ids, labels

    def plain(self, text: str) -> Row:
        """``<bos>`` text ``<eos>``, all of it to be learned, for raw prompts."""
        ids = [self.bos, *self.tokenizer.encode(text), self.eos]
        return ids, [IGNORE, *ids[1:]]


def make_row(rng: Random, encoder: Encoder) -> Row:
    """One training row: a plain story, or a conversation of one to sixteen examples."""
    while True:
        if rng.random() < 0.02:
            row = encoder.plain(tiny_stories.tell(rng))
        else:
            longest = rng.choices([1, rng.randint(2, 4), rng.randint(5, 16)], [0.78, 0.18, 0.04])[0]
            turns = [turn for example in tiny_tasks.conversation(rng, longest) for turn in example.turns]
            if rng.random() < 0.05:
                asked, answer = turns[0]
                turns[0] = (f"{rng.choice(tiny_tasks.SYSTEM)}\n\n{asked}", answer)
            row = encoder.chat(turns)
        if len(row[0]) <= WIDTHS[-1] + 1:
            return row


def batches(rng: Random, encoder: Encoder) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and labels of `TOKENS` tokens, (B, T + 1); rows of like length share a batch, so that little is padding."""
    waiting: dict[int, list[Row]] = {width: [] for width in WIDTHS}
    while True:
        row = make_row(rng, encoder)
        width = next(width for width in WIDTHS if len(row[0]) <= width + 1)
        rows = waiting[width]
        rows.append(row)
        if len(rows) * width == TOKENS:
            ids = np.zeros((len(rows), width + 1), np.int64)
            labels = np.full_like(ids, IGNORE)
            for i, (row_ids, row_labels) in enumerate(rows):
                ids[i, : len(row_ids)], labels[i, : len(row_labels)] = row_ids, row_labels
            rows.clear()
            yield torch.from_numpy(ids), torch.from_numpy(labels)
