"""Everything that can be read of a model folder, and a remark on each thing that cannot.

Unlike the loader, this never refuses: files are read one by one, prefixes of names are removed, and damage becomes a
remark.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from refgemma.checkpoint.folder import INDEX, SINGLE, parse_index, read_folder
from refgemma.errors import InputError
from refgemma.files.safetensors import StoredTensor, read_safetensors
from refgemma.text.tokenizer import Tokenizer

Grade = Literal["wrong", "look", "fine"]

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
