"""Text to token ids and back by SentencePiece, plus one decision: what control text may mean.

A Gemma vocabulary has two kinds of control text. *Controls* (``<pad>``, ``<eos>``, ``<bos>``, ``<unk>``) are never
found in text by SentencePiece. *Markers* (``<start_of_turn>``, ``<end_of_turn>``, ``<mask>``, ``<unused7>`` ...) are,
so a user who types one steers the model: https://github.com/huggingface/transformers/issues/29279. Hence the three
modes of `encode`.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, Literal, SupportsIndex

import sentencepiece

from refgemma.errors import InputError, InputTypeError

Control = Literal["none", "markers", "all"]

CONTROLS = ("<pad>", "<eos>", "<bos>", "<unk>")
TURN_MARKERS = ("<start_of_turn>", "<end_of_turn>")

# What a marker may look like, wherever one could start. With no bracket inside, each position has at most one.
_BRACKETED = re.compile(r"(?=(<[^<>]+>|\[[^\[\]]+\]))")
# Spaces at both ends, a full-width sign, a no-break space: any normalisation of text changes one of them.
_PROBE = "  \uff1cA\u00a0 "


class Tokenizer:
    """A SentencePiece vocabulary with Gemma's conventions.

    Parameters
    ----------
    path : str or Path
        A ``tokenizer.model``, or the folder that holds one.

    Attributes
    ----------
    path : Path
        The vocabulary file.
    vocab_size : int
        Number of pieces, V.
    pad_id, eos_id, bos_id, unk_id : int
        Ids of ``<pad>``, ``<eos>``, ``<bos>`` and ``<unk>``.
    start_of_turn_id, end_of_turn_id : int
        Ids of the turn markers; looked up by name, because they differ between Gemma 1, 2 and Gemma 3.
    controls, markers : dict of str to int
        All control text, and its ids; see Notes.
    byte_values : dict of int to int
        Id of each byte piece, and its byte.

    Raises
    ------
    FileNotFoundError
        If the file does not exist.
    ValueError
        If it is not a SentencePiece model, or not one with Gemma's conventions.

    Notes
    -----
    A marker is a user-defined piece of the form ``<...>`` or ``[...]`` that is not a markup tag: it has no
    closing twin, as ``<table>`` has ``</table>``. SentencePiece does not expose which pieces are user-defined, but
    their score is 0, which no learnt piece has except the first, and that one is two characters long.
    In the vocabulary of Gemma 1 and 2 this finds ``<mask>``, ``<2mass>``, ``[@BOS@]``, ``[toxicity=0]``, the two turn
    markers and a hundred ``<unusedN>``.

    References
    ----------
    Kudo and Richardson, "SentencePiece", 2018. The vocabulary: google/gemma_pytorch, ``tokenizer/tokenizer.model``.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        self.path = path / "tokenizer.model" if path.is_dir() else path
        self._spm = _read_model(self.path)
        self.vocab_size: int = self._spm.get_piece_size()
        pieces: list[str] = self._spm.id_to_piece(list(range(self.vocab_size)))
        bracketed = {piece: i for i, piece in enumerate(pieces) if _is_bracketed(piece)}
        self.controls = {name: bracketed[name] for name in CONTROLS if name in bracketed}
        self.byte_values = {i: int(piece[3:5], 16) for piece, i in bracketed.items() if self._spm.is_byte(i)}
        self.markers = {
            piece: i
            for piece, i in bracketed.items()
            if self._is_user_defined(i) and not piece.startswith("</") and "</" + piece[1:] not in bracketed
        }
        missing = [name for name in CONTROLS if name not in self.controls]
        missing += [name for name in TURN_MARKERS if name not in self.markers]
        if missing:
            raise InputError(f"{self.path} has no {', '.join(missing)}: expected a vocabulary with Gemma's conventions")
        if self._spm.normalize(_PROBE) != _PROBE.replace(" ", "\u2581"):
            raise InputError(
                f"{self.path} normalises text before splitting it: expected a vocabulary that does not, such as Gemma's"
            )
        if len(self.byte_values) != 256:
            raise InputError(
                f"{self.path} has {len(self.byte_values)} byte pieces: expected 256, as in Gemma's vocabulary"
            )
        self.pad_id, self.eos_id, self.bos_id, self.unk_id = (self.controls[name] for name in CONTROLS)
        self.start_of_turn_id, self.end_of_turn_id = (self.markers[name] for name in TURN_MARKERS)

    def __repr__(self) -> str:
        return f"Tokenizer({str(self.path)!r}, vocab_size={self.vocab_size})"

    def encode(self, text: str, bos: bool = False, control: Control = "none") -> list[int]:
        """Token ids of a text.

        Parameters
        ----------
        text : str
            Any text. A literal U+2581 becomes a space, since that is how the vocabulary writes one.
        bos : bool, default False
            Put ``<bos>`` first, unless the text starts with it.
        control : {"none", "markers", "all"}, default "none"
            "none", for untrusted text: nothing in it becomes a control or a marker. "markers", what plain
            SentencePiece does: markers count. "all", as Hugging Face tokenizers do: controls count as well.

        Returns
        -------
        list of int
            Ids in [0, V).

        Raises
        ------
        TypeError
            If `text` is not a str.
        ValueError
            If `text` holds half a surrogate pair, or `control` is none of the three.
        """
        if control == "none":
            ids = self.encode_inert(text, self.markers)
        elif control == "markers":
            ids = self._spm.encode(checked_text(text))
        elif control == "all":
            runs = re.split(f"({'|'.join(CONTROLS)})", checked_text(text))  # text, control, text, ..., text
            ids = [i for run in runs for i in ([self.controls[run]] if run in CONTROLS else self._spm.encode(run))]
        else:
            raise InputError(f"control is {control!r}: expected 'none', 'markers' or 'all'")
        return [self.bos_id, *ids] if bos and ids[:1] != [self.bos_id] else ids

    def encode_inert(self, text: str, inert: Collection[str]) -> list[int]:
        """Token ids of a text in which some markers are ordinary characters.

        Parameters
        ----------
        text : str
            Any text.
        inert : collection of str
            Names of those markers. The other markers count, controls never do.

        Returns
        -------
        list of int
            Ids in [0, V).

        Raises
        ------
        TypeError
            If `text` is not a str.
        ValueError
            If `text` holds half a surrogate pair.

        Notes
        -----
        The text is cut after the first character of each such marker, and the runs are encoded one by one. A run is a
        stretch of the text that holds no such marker whole, so none is found in it, however they are nested.
        """
        text = checked_text(text)
        cuts = [match.start() + 1 for match in _BRACKETED.finditer(text) if match[1] in inert]
        runs = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        return [i for run in runs for i in self._spm.encode(run)]

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """Text of token ids.

        Parameters
        ----------
        ids : iterable of int, NumPy integers included
            Ids in [0, V).

        Returns
        -------
        str
            Controls vanish, markers come out as text, ``<unk>`` is U+2047 between spaces, and each byte that belongs to
            no UTF-8 character is U+FFFD.

        Raises
        ------
        TypeError
            If `ids` are not whole numbers.
        ValueError
            If one is outside the vocabulary.
        """
        text: str = self._spm.decode(self._checked_ids(ids))
        return text

    def piece(self, token: SupportsIndex) -> str:
        """Name of one token, as the vocabulary writes it.

        Parameters
        ----------
        token : int
            An id in [0, V).

        Returns
        -------
        str
            For example ``▁Hello``, ``<bos>`` or ``<0x0A>``.

        Raises
        ------
        TypeError
            If `token` is not a whole number.
        ValueError
            If it is outside the vocabulary.
        """
        name: str = self._spm.id_to_piece(self._checked_ids([token])[0])
        return name

    def _is_user_defined(self, i: int) -> bool:
        spm = self._spm
        special = spm.is_control(i) or spm.is_unknown(i) or spm.is_unused(i) or spm.is_byte(i)
        return bool(not special and spm.get_score(i) == 0.0)

    def _checked_ids(self, ids: Iterable[SupportsIndex]) -> list[int]:
        try:
            numbers = [operator.index(i) for i in ids]
        except TypeError:
            raise InputTypeError(f"token ids are {ids!r:.60}: expected a flat list of whole numbers") from None
        for number in numbers:
            if not 0 <= number < self.vocab_size:
                raise InputError(f"token id {number} is outside the vocabulary: expected 0 to {self.vocab_size - 1}")
        return numbers


def _is_bracketed(piece: str) -> bool:
    match = _BRACKETED.match(piece)
    return match is not None and match[1] == piece


def checked_text(text: str) -> str:
    """The text, if it can be encoded; an error otherwise."""
    if not isinstance(text, str):
        raise InputTypeError(f"text is {text!r:.60}: expected a str")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X} at index {error.start}"
        raise InputError(f"text holds half a surrogate pair, {half}: expected whole characters") from None
    return text


def _read_model(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: a model folder holds tokenizer.model beside its weights")
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise InputError(
            f"{path} is not a SentencePiece model ({error}): expected a complete tokenizer.model"
        ) from None
