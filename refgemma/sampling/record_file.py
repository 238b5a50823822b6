"""Records on disk: JSON lines, and beside them the logits.

``run.jsonl``: the first line says what it is, and each further line holds one decision::

    {"format": "refgemma sampling record", "version": 1, "params": {...}, "prompt_tokens": [...], "tokens": T,
     "vocab_size": V, "logits": {"file": "run.logits.safetensors", "sha256": "..."}, "pieces": {"5": "▁cat", ...}}
    {"t": 0, "token": 5, "u": 0.872, ...}

``run.logits.safetensors``: one tensor, ``logits``, of shape (T, V), in F16, BF16, F32 or F64.

Only ``t``, ``token`` and ``u`` are read from a line. The rest, the fields of `Entry`, follows from the logits and is
written for other programs. So a record made by hand needs no more than these three and the logits, and may leave out
``sha256`` and ``pieces``.
"""

from __future__ import annotations

import dataclasses
import json
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from refgemma.compute.threads import in_parallel
from refgemma.errors import InputError
from refgemma.files.atomic import whole_file
from refgemma.sampling.entry import Entry
from refgemma.sampling.params import SamplingParams
from refgemma.sampling.record import Record, no_piece
from refgemma.sampling.sidecar import read_sidecar, sidecar_of, write_sidecar

FORMAT, VERSION = "refgemma sampling record", 1


def write_record(record: Record, path: str | Path) -> None:
    """Write a record to ``PATH`` and its logits beside it, each whole or not at all.

    Parameters
    ----------
    record : Record
        What to write.
    path : str or Path
        Of the JSON lines.

    Raises
    ------
    ValueError
        If the record is empty.
    OSError
        If the files cannot be written, or one of the places is a device, a pipe or a folder.
    """
    path = Path(path)
    if not len(record):
        raise InputError("the record holds no decision: expected at least one token")
    sidecar = sidecar_of(path)
    with whole_file(path) as file, whole_file(sidecar) as logits_file:
        digest = write_sidecar(record.logits, logits_file)
        in_parallel(record.__getitem__, len(record))  # the record keeps them
        entries = list(record)
        ids = {*record.prompt_tokens, *(i for entry in entries for i in _mentioned(entry))}
        header = {
            "format": FORMAT,
            "version": VERSION,
            "params": dataclasses.asdict(record.params),
            "prompt_tokens": record.prompt_tokens,
            "tokens": len(record),
            "vocab_size": record.vocab_size,
            "logits": {"file": sidecar.name, "sha256": digest},
            "pieces": {str(i): piece for i in sorted(ids) if (piece := record.piece(i))},
        }
        for line in (header, *(entry.to_json() for entry in entries)):
            file.write(json.dumps(line, ensure_ascii=False, allow_nan=False).encode() + b"\n")


def read_record(path: str | Path) -> Record:
    """Read a record and its logits.

    Parameters
    ----------
    path : str or Path
        Of the JSON lines.

    Returns
    -------
    Record
        Its logits are mapped: they cost no memory until they are looked at.

    Raises
    ------
    FileNotFoundError
        If one of the two files is missing.
    ValueError
        If a file is cut off, damaged, of another version, or the two do not belong together.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist or is no file: expected a sampling record, JSON lines")
    try:
        header, *lines = _parse(path.read_bytes())
        _check(isinstance(header, dict) and header.get("format") == FORMAT, f"its first line is not of a {FORMAT}")
        version = header.get("version")
        _check(
            type(version) is int and version == VERSION,
            f"it is of version {version!r}: this reader knows version {VERSION}",
        )
        params = _params(header.get("params"))
        T, V = (header.get(name) for name in ("tokens", "vocab_size"))
        _check(
            _is_count(T) and _is_count(V), f"tokens is {T!r} and vocab_size {V!r}: expected two whole numbers above 0"
        )
        _check(
            len(lines) == T, f"{len(lines)} decisions are there, its first line promises {T}: it is cut off or damaged"
        )
        prompt = _ids("prompt_tokens", header.get("prompt_tokens"), V)
        for t, line in enumerate(lines):
            _check(isinstance(line, dict) and line.get("t") == t, f"line {t + 2} is not that of token {t}")
        tokens = _ids("token", [line.get("token") for line in lines], V)
        uniforms = [line.get("u") for line in lines]
        for t, u in enumerate(uniforms):
            _check(type(u) in (int, float) and 0 <= u < 1, f"u of token {t} is {u!r}: expected a number in [0, 1)")
        pieces = header.get("pieces", {})
        _check(
            isinstance(pieces, dict) and all(isinstance(piece, str) for piece in pieces.values()),
            f"pieces is {reprlib.repr(pieces)}: expected texts by token id",
        )
        logits = read_sidecar(path, header.get("logits"), (T, V))
    except ValueError as error:
        raise InputError(f"{path} is no sound record: {error}") from None
    return Record(
        params=params,
        prompt_tokens=prompt,
        tokens=tokens,
        uniforms=tuple(map(float, uniforms)),
        logits=logits,
        piece=(lambda token: pieces.get(str(token), "")) if pieces else no_piece,
    )


def _mentioned(entry: Entry) -> Iterator[int]:
    """Token ids of which the entry speaks."""
    for candidate in entry.candidates:
        yield candidate.id
    for step in entry.steps:
        yield from step.ids
    if entry.flip_token is not None:
        yield entry.flip_token


def _parse(data: bytes) -> list[Any]:
    """One value a line."""
    _check(bool(data), "it is empty")
    _check(data.endswith(b"\n"), "its last line is cut off")
    values = []
    for number, line in enumerate(data[:-1].split(b"\n"), start=1):  # and not where Unicode sees a line end
        try:
            values.append(json.loads(line.decode("utf-8"), parse_constant=_no_constant))
        except (ValueError, RecursionError) as error:
            raise InputError(f"line {number} is no JSON ({error})") from None
    return values


def _no_constant(word: str) -> None:
    raise InputError(f"{word} is not a number of JSON")


def _check(sound: bool, problem: str) -> None:
    if not sound:
        raise InputError(problem)


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _ids(name: str, values: Any, V: int) -> tuple[int, ...]:
    _check(isinstance(values, list), f"{name} is {reprlib.repr(values)}: expected a list of token ids")
    for value in values:
        _check(type(value) is int and 0 <= value < V, f"{name} has {value!r}: expected a token id from 0 to {V - 1}")
    return tuple(values)


def _params(fields: Any) -> SamplingParams:
    _check(isinstance(fields, dict), f"params is {reprlib.repr(fields)}: expected settings by name")
    known = {field.name for field in dataclasses.fields(SamplingParams)}
    _check(fields.keys() <= known, f"params has {', '.join(sorted(fields.keys() - known))}, which is no setting")
    settings = SamplingParams(**fields)
    _check("temperature" in fields, "params has no temperature: expected the one that the tokens were drawn with")
    return settings
