"""The text of each token of a vocabulary, from the tokenizer of any model.

A SentencePiece vocabulary writes a space as U+2581 and a byte as ``<0x0A>``; everything else is literal.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import sentencepiece

from refgemma.errors import InputError

_BYTE = re.compile("<0x([0-9A-F]{2})>")
_LARGEST = 10_000_000  # id; far above any vocabulary, so that a wrong file cannot exhaust memory
_WANTED = 'expected a list of texts, an object {"text": id} or {"id": text}, or a tokenizer.json'


def read_pieces(path: str | Path) -> list[str]:
    """Read the names of all tokens."""
    path = Path(path)
    path = path / "tokenizer.model" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: expected a tokenizer.model, or a JSON file of token texts")
    if path.suffix == ".json":
        pieces = _from_json(path)
    else:
        try:
            vocabulary = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError):
            raise InputError(f"{path} is not a SentencePiece model: expected one, or JSON in a file *.json") from None
        pieces = vocabulary.id_to_piece(list(range(vocabulary.get_piece_size())))
    for token, piece in enumerate(pieces):
        if any("\ud800" <= character <= "\udfff" for character in piece):
            raise InputError(
                f"{path}: the text of token {token} holds half a surrogate pair: expected whole characters"
            )
    return pieces


def spell(pieces: Iterable[str]) -> list[str]:
    """The text that each token of a sequence adds."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    texts: list[str] = []
    for piece in pieces:
        byte = _BYTE.fullmatch(piece)
        if byte:
            texts.append(decoder.decode(bytes.fromhex(byte[1])))
            continue
        broken = decoder.decode(b"", final=True)
        if broken:
            texts[-1] += broken
        texts.append(piece.replace("\u2581", " "))
    if texts:
        texts[-1] += decoder.decode(b"", final=True)
    return texts


def _from_json(path: Path) -> list[str]:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}): {_WANTED}") from None
    vocabulary: Any = content
    added: list[Any] = []
    if isinstance(content, dict) and isinstance(content.get("model"), dict):  # a whole tokenizer.json
        vocabulary, added = content["model"].get("vocab"), content.get("added_tokens") or []
        if isinstance(vocabulary, list):  # of a Unigram model: [text, score]
            vocabulary = [entry[0] if isinstance(entry, list) and entry else entry for entry in vocabulary]
    names = dict(enumerate(vocabulary)) if isinstance(vocabulary, list) else _by_id(vocabulary, path)
    for entry in added:
        if isinstance(entry, dict) and {"id", "content"} <= entry.keys():
            names[entry["id"]] = entry["content"]
    if not names or not all(type(i) is int and i >= 0 and isinstance(name, str) for i, name in names.items()):
        raise InputError(f"{path} holds {vocabulary!r:.40}: {_WANTED}")
    if max(names) > _LARGEST:
        raise InputError(f"{path} has a token id {max(names)}: expected ids below {_LARGEST:,}")
    return [names.get(token, "") for token in range(max(names) + 1)]


def _by_id(vocabulary: Any, path: Path) -> dict[int, Any]:
    """Token texts by id, from a mapping in either direction."""
    if not isinstance(vocabulary, Mapping):
        raise InputError(f"{path} holds {vocabulary!r:.40}: {_WANTED}")
    if all(type(value) is int for value in vocabulary.values()):
        return {value: name for name, value in vocabulary.items()}
    if all(name.isascii() and name.isdigit() for name in vocabulary):
        return {int(name): value for name, value in vocabulary.items()}
    raise InputError(f"{path} holds {vocabulary!r:.40}: {_WANTED}")
