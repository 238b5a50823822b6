"""What the embedding table of a checkpoint tells: whether the head is tied to it, which rows no token uses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from refgemma.checkpoint.health.folder import Patient, Remark
from refgemma.checkpoint.health.numbers import Numbers, tiles_of

_EMBED, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def about_head(patient: Patient) -> Iterator[Remark]:
    """Remark on the output head: tied to the embedding or not, and whether config.json knows."""
    if _EMBED not in patient.tensors:
        return
    tied = patient.fields.get("tie_word_embeddings", True)
    if _HEAD not in patient.tensors:
        if tied:
            yield Remark("fine", "head", "tied: the embedding is the head")
        else:
            what = "tie_word_embeddings is false, and there is no lm_head.weight"
            yield Remark("wrong", "head", what, "set it to true: every published Gemma 1 is tied")
        return
    embed, head = patient.tensors[_EMBED], patient.tensors[_HEAD]
    same = embed.dtype == head.dtype and embed.shape == head.shape
    same = same and all(a.tobytes() == b.tobytes() for a, b in zip(tiles_of(embed), tiles_of(head), strict=True))
    if tied and not same:
        what = "lm_head.weight differs from the embedding, yet tie_word_embeddings is true"
        todo = "set it to false to use the stored head, or remove the head to use the embedding"
        yield Remark("wrong", "head", what, todo)
    elif same:
        yield Remark(
            "look", "head", "lm_head.weight is the embedding, stored twice", "nothing; without it there is more room"
        )
    else:
        todo = "nothing, if it was trained so: every published Gemma 1 is tied"
        yield Remark("look", "head", "untied: a head of its own", todo)


def about_vocabulary(patient: Patient, numbers: Mapping[str, Numbers]) -> Iterator[Remark]:
    """Remark on rows of the table that stand for no piece."""
    if _EMBED not in patient.tensors or patient.tensors[_EMBED].data.ndim != 2 or patient.num_pieces is None:
        return  # another shape is not said here
    rows, pieces = patient.tensors[_EMBED].shape[0], patient.num_pieces
    if rows < pieces:
        what = f"the table has {rows:,} rows, the tokenizer {pieces:,} pieces"
        todo = "these files do not belong together: fetch the tokenizer of this model"
        yield Remark("wrong", "vocabulary", what, todo)
    elif rows == pieces:
        yield Remark("fine", "vocabulary", f"{rows:,} rows and pieces")
    else:
        zero = min(numbers[_EMBED].zero_rows, rows - pieces) if _EMBED in numbers else 0
        what = f"{rows - pieces:,} rows beyond the {pieces:,} pieces, {zero:,} of them zero"
        todo = f"never sample ids from {pieces:,} on: ban them, or cut table and vocab_size to {pieces:,}"
        yield Remark("look", "vocabulary", what, todo)
