"""Everything that can be read of a model folder, statistics of its numbers among it; a remark on what cannot be read.

Unlike the loader, this never refuses: files are read one by one, prefixes of names are removed, and damage becomes a
remark. Each tensor is read once, some rows at a time, so that a checkpoint may be larger than memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from refgemma.checkpoint.folder import INDEX, SINGLE, parse_index, read_folder
from refgemma.errors import InputError
from refgemma.files.safetensors import StoredTensor, read_safetensors
from refgemma.numerics import Array, from_bfloat16
from refgemma.text.tokenizer import Tokenizer

Grade = Literal["wrong", "look", "fine"]
READ_FORMATS = ("BF16", "F16", "F32")
_TILE = 2**22  # numbers

# Prefixes that wrappers add to names: vision models, PEFT, compiled and parallel modules.
_PREFIX = re.compile(r"^(?:base_model\.model\.|language_model\.|_orig_mod\.|module\.)+|^model\.(?=language_model\.)")


@dataclass(frozen=True)
class Remark:
    """One finding."""

    grade: Grade  # "wrong": the model cannot be loaded or would not be itself; "look": unusual; "fine": as it should be
    about: str  # the subject, in a word or two
    what: str  # what was found
    todo: str = ""  # what to do about it; empty where nothing needs to be done


@dataclass
class Contents:
    """The readable contents of a folder."""

    folder: Path
    fields: dict[str, Any] = field(default_factory=dict)  # ``config.json``; empty where it cannot be read
    # all tensors, under the names of a plain Hugging Face checkpoint
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    num_pieces: int | None = None  # pieces of the tokenizer; None where there is none
    remarks: list[Remark] = field(default_factory=list)  # on what could not be read

    def shape(self, name: str) -> tuple[int, ...] | None:
        return self.tensors[name].shape if name in self.tensors else None


@dataclass(frozen=True)
class Numbers:
    """Statistics of one tensor."""

    nans: int
    infinite: int
    lowest: float  # this, highest and mean: of the finite numbers
    highest: float
    mean: float
    negative: int  # how many are below zero
    zero_rows: int  # rows of zeros at the end

    @property
    def all_zero(self) -> bool:
        """Whether every number is zero."""
        return self.lowest == self.highest == 0.0 and not self.nans and not self.infinite


def read_contents(folder: str | Path) -> Contents:
    """Read everything readable in a folder."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: expected one that holds a model")
    contents = Contents(folder)
    _read_config(contents)
    _read_tensors(contents)
    _read_tokenizer(contents)
    return contents


def _read_config(contents: Contents) -> None:
    path = contents.folder / "config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(fields, dict):
            raise InputError(f"it holds a JSON {type(fields).__name__}")
        contents.fields = fields
    except OSError:
        what = "there is no config.json"
        contents.remarks.append(Remark("wrong", "config", what, "download it from where the weights came from"))
    except (ValueError, RecursionError) as error:
        what = f"config.json is not valid JSON ({error})"
        contents.remarks.append(Remark("wrong", "config", what, "download it again, or correct it by hand"))


def _read_tensors(contents: Contents) -> None:
    """Read by the index if possible, else file by file, keeping what can be read."""
    try:
        found: Mapping[str, StoredTensor] = read_folder(contents.folder)
    except (InputError, OSError) as error:
        found = _file_by_file(contents)
        said = [remark.what for remark in contents.remarks]
        remark = _remark("files", str(error))
        contents.remarks += [] if remark.what in said else [remark]
    renamed = {}
    for name in found:
        plain = _PREFIX.sub("", name)
        plain = _PREFIX.sub("", plain)
        # language_model.model.layers, and model.language_model.layers of newer files
        plain = plain if plain.startswith(("model.", "lm_head.")) or plain == name else f"model.{plain}"
        renamed[name] = plain
    prefixes = {name[: name.find(plain.removeprefix("model."))] for name, plain in renamed.items() if name != plain}
    if prefixes:
        what = f"names begin with {' and '.join(sorted(prefixes))}"
        todo = 'rename the tensors so that they begin with "model.layers.0."'
        contents.remarks.append(Remark("wrong", "names", what, todo))
    contents.tensors = {plain: found[name] for name, plain in renamed.items()}


def _file_by_file(contents: Contents) -> dict[str, StoredTensor]:
    found: dict[str, StoredTensor] = {}
    shards = sorted(contents.folder.glob("*.safetensors"))
    adapters = [path for path in shards if path.name.startswith("adapter_")]
    for path in [path for path in shards if path not in adapters]:
        try:
            found |= read_safetensors(path)
        except (InputError, OSError) as error:
            contents.remarks.append(_remark("files", str(error)))
    if (contents.folder / INDEX).is_file() and not (contents.folder / SINGLE).is_file():
        try:
            listed = parse_index((contents.folder / INDEX).read_bytes(), INDEX)
        except InputError:
            return found  # reported already
        lost = [name for name in listed if name not in found]
        if lost:
            what = f"{len(lost)} tensors of the index are in no file that can be read, {lost[0]} first"
            contents.remarks.append(Remark("wrong", "files", what, "fetch the shards that are missing or damaged"))
    return found


def _read_tokenizer(contents: Contents) -> None:
    try:
        contents.num_pieces = Tokenizer(contents.folder / "tokenizer.model").vocab_size
    except FileNotFoundError:
        todo = "fetch tokenizer.model; tokenizer.json alone is not read"
        contents.remarks.append(Remark("wrong", "tokenizer", "there is no tokenizer.model", todo))
    except InputError as error:
        contents.remarks.append(_remark("tokenizer", str(error)))


def _remark(about: str, sentence: str) -> Remark:
    """Split a sentence of the loader, whose last part says what was expected or what to do."""
    what, _, todo = sentence.rpartition("; ") if "; " in sentence else sentence.rpartition(": ")
    return Remark("wrong", about, what, todo) if what else Remark("wrong", about, todo, "fetch it again")


def read_numbers(contents: Contents, progress: Callable[[int, int], None] | None = None) -> dict[str, Numbers]:
    """Statistics of every tensor of floats."""
    found, done = {}, 0
    total = sum(tensor.nbytes for tensor in contents.tensors.values())
    for name, tensor in contents.tensors.items():
        if tensor.dtype in READ_FORMATS and tensor.data.size:
            found[name] = numbers_of(tensor)
        done += tensor.nbytes
        if progress is not None:
            progress(done, total)
    return found


def numbers_of(tensor: StoredTensor) -> Numbers:
    nans = infinite = negative = count = 0
    lowest, highest, total = np.inf, -np.inf, 0.0
    for tile in tiles_of(tensor):
        with np.errstate(invalid="ignore"):  # a signalling NaN
            wide = from_bfloat16(tile) if tensor.dtype == "BF16" else tile.astype(np.float32)
        finite = np.isfinite(wide)
        if not finite.all():
            bad = int(np.count_nonzero(np.isnan(wide)))
            nans, infinite = nans + bad, infinite + int(np.count_nonzero(~finite)) - bad
            wide = wide[finite]
        if wide.size:
            lowest, highest = min(lowest, float(wide.min())), max(highest, float(wide.max()))
            total += float(wide.sum(dtype=np.float64))
            negative += int(np.count_nonzero(wide < 0))
            count += wide.size
    if not count:
        lowest = highest = np.nan
    mean = total / count if count else np.nan
    return Numbers(nans, infinite, lowest, highest, mean, negative, _zero_rows_at_the_end(tensor.data))


def tiles_of(tensor: StoredTensor) -> Iterator[Array]:
    """Rows of a tensor, as stored, some at a time."""
    flat = tensor.data.reshape(-1) if tensor.data.ndim < 2 else tensor.data
    step = max(1, _TILE // max(1, flat.size // max(1, len(flat))))
    for start in range(0, len(flat), step):
        yield flat[start : start + step]


def _zero_rows_at_the_end(data: Array) -> int:
    if data.ndim < 2:
        return 0
    rows = 0
    for row in data[::-1]:
        if row.any():
            break
        rows += 1
    return rows
