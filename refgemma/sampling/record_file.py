"""Records on disk: JSON lines, and beside them the logits.

``run.jsonl``: the first line says what it is, and each further line holds one decision::

    {"format": "refgemma sampling record", "version": 1, "params": {...}, "prompt_tokens": [...], "tokens": T,
     "vocab_size": V, "logits": {"file": "run.logits.safetensors", "sha256": "..."}, "pieces": {"5": "▁cat", ...}}
    {"t": 0, "token": 5, "u": 0.872, ...}

``run.logits.safetensors``: one tensor, ``logits``, of shape (T, V), in F16, BF16, F32 or F64.

Only ``t``, ``token`` and ``u`` are read from a line. The rest, the fields of `Entry`, follows from the logits and is
written for other programs. So a record made by hand needs only these three and the logits, and may leave out ``sha256``
and ``pieces``.
"""

from __future__ import annotations

import dataclasses
import json
import reprlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from refgemma.errors import InputError
from refgemma.files.atomic import whole_file
from refgemma.files.safetensors import FLOATS, SafetensorsWriter, read_safetensors
from refgemma.numerics import Array
from refgemma.sampling.entry import Entry
from refgemma.sampling.params import SamplingParams

FORMAT, VERSION = "refgemma sampling record", 1


def logits_file_of(path: Path) -> Path:
    """Place of the logits beside a record."""
    return path.parent / f"{path.name.removesuffix('.jsonl')}.logits.safetensors"


def write(
    path: str | Path,
    entries: Sequence[Entry],
    logits: Sequence[Array] | Array,
    *,
    params: SamplingParams,
    prompt_tokens: tuple[int, ...],
    piece: Callable[[int], str],
) -> None:
    """Write a record and its logits, each whole or not at all."""
    path = Path(path)
    _check(len(entries) > 0, "the record holds no decision: expected at least one token")
    beside = logits_file_of(path)
    with whole_file(path) as file, whole_file(beside) as logits_file:
        ids = {*prompt_tokens, *(i for entry in entries for i in _mentioned(entry))}
        header = {
            "format": FORMAT,
            "version": VERSION,
            "params": dataclasses.asdict(params),
            "prompt_tokens": prompt_tokens,
            "tokens": len(entries),
            "vocab_size": len(logits[0]),
            "logits": {"file": beside.name, "sha256": _write_logits(logits, logits_file)},
            "pieces": {str(i): text for i in sorted(ids) if (text := piece(i))},
        }
        for line in (header, *(entry.to_json() for entry in entries)):
            file.write(json.dumps(line, ensure_ascii=False, allow_nan=False).encode() + b"\n")


def read(path: str | Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Pieces by id, as texts both, and the other fields of a record."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist or is not a file: expected a sampling record, JSON lines")
    try:
        header, *lines = _parse(path.read_bytes())
        _check(isinstance(header, dict) and header.get("format") == FORMAT, f"its first line is not of a {FORMAT}")
        version, T, V = (header.get(name) for name in ("version", "tokens", "vocab_size"))
        _check(
            type(version) is int and version == VERSION,
            f"it is of version {version!r}: this reader knows version {VERSION}",
        )
        params = _params(header.get("params"))
        _check(
            all(type(count) is int and count > 0 for count in (T, V)),
            f"tokens is {T!r} and vocab_size {V!r}: expected two whole numbers above 0",
        )
        _check(
            len(lines) == T, f"{len(lines)} decisions are there, its first line promises {T}: it is cut off or damaged"
        )
        prompt = _ids("prompt_tokens", header.get("prompt_tokens"), V)
        for t, line in enumerate(lines):
            _check(isinstance(line, dict) and line.get("t") == t, f"line {t + 2} is not that of token {t}")
            u = line.get("u")
            _check(type(u) in (int, float) and 0 <= u < 1, f"u of token {t} is {u!r}: expected a number in [0, 1)")
        pieces = header.get("pieces", {})
        _check(
            isinstance(pieces, dict) and all(isinstance(piece, str) for piece in pieces.values()),
            f"pieces is {reprlib.repr(pieces)}: expected texts by token id",
        )
        return pieces, {
            "params": params,
            "prompt_tokens": prompt,
            "tokens": _ids("token", [line.get("token") for line in lines], V),
            "uniforms": tuple(float(line["u"]) for line in lines),
            "logits": _read_logits(path, header.get("logits"), (T, V)),
        }
    except InputError as error:
        raise InputError(f"{path} is not a sound record: {error}") from None


def _mentioned(entry: Entry) -> Iterator[int]:
    """Token ids in the entry."""
    yield from (candidate.id for candidate in entry.candidates)
    for step in entry.steps:
        yield from step.ids
    if entry.flip_token is not None:
        yield entry.flip_token


def _write_logits(rows: Sequence[Array] | Array, file: IO[bytes]) -> str:
    """Write logits as one tensor, row by row; returns the sha256 of the file."""
    V = len(rows[0])
    dtype = rows[0].dtype.name if rows[0].dtype.name in FLOATS.values() else "float64"
    writer = SafetensorsWriter(file, {"logits": (dtype, (len(rows), V))}, {})
    for t, row in enumerate(rows):
        writer.write("logits", t * V, row.astype(dtype, copy=False))
    file.flush()
    return _sha256(Path(file.name))


def _read_logits(path: Path, source: Any, shape: tuple[int, int]) -> Array:
    """Logits beside a record, once they are known to belong to it."""
    name = source.get("file") if isinstance(source, dict) else None
    if not isinstance(name, str) or not name or Path(name).name != name:
        raise InputError(f"logits is {reprlib.repr(source)}: expected the name of a file beside it")
    beside = path.with_name(name)
    if not beside.is_file():
        raise FileNotFoundError(f"{beside} is missing: it belongs to {path} and holds its logits")
    tensor = read_safetensors(beside).get("logits")
    if tensor is None:
        raise InputError(f"{beside} holds no tensor called logits")
    if tensor.dtype not in FLOATS or tensor.shape != shape:
        raise InputError(f"{beside} holds {tensor.dtype} of shape {tensor.shape}: expected floats of shape {shape}")
    if source.get("sha256") is not None and source["sha256"] != _sha256(beside):
        raise InputError(f"{beside} is not the file that was written with it: their sha256 differ")
    return tensor.numbers()


def _sha256(path: Path) -> str:
    import hashlib  # on first use: it loads OpenSSL

    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parse(data: bytes) -> list[Any]:
    """One value per line."""
    _check(bool(data), "it is empty")
    _check(data.endswith(b"\n"), "its last line is cut off")
    values = []
    for number, line in enumerate(data[:-1].split(b"\n"), start=1):  # not `splitlines`, which knows other line ends
        try:
            values.append(json.loads(line.decode("utf-8"), parse_constant=_no_constant))
        except (ValueError, RecursionError) as error:
            raise InputError(f"line {number} is not JSON ({error})") from None
    return values


def _no_constant(word: str) -> None:
    raise InputError(f"{word} is not a number of JSON")


def _check(sound: bool, problem: str) -> None:
    if not sound:
        raise InputError(problem)


def _ids(name: str, values: Any, V: int) -> tuple[int, ...]:
    _check(isinstance(values, list), f"{name} is {reprlib.repr(values)}: expected a list of token ids")
    for value in values:
        _check(type(value) is int and 0 <= value < V, f"{name} has {value!r}: expected a token id from 0 to {V - 1}")
    return tuple(values)


def _params(fields: Any) -> SamplingParams:
    _check(isinstance(fields, dict), f"params is {reprlib.repr(fields)}: expected settings by name")
    known = {field.name for field in dataclasses.fields(SamplingParams)}
    _check(fields.keys() <= known, f"params has unknown settings: {', '.join(sorted(fields.keys() - known))}")
    settings = SamplingParams(**fields)
    _check("temperature" in fields, "params has no temperature: expected the one that the tokens were drawn with")
    return settings
