"""A model folder as the doctor sees it: whatever can be read of it, and remarks on what cannot.

Unlike the loader this never refuses: files are read one by one, names are brought into one form, and what is broken
becomes a remark.
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

# What wrappers put before the names: vision models, PEFT, compiled and parallel modules.
_PREFIX = re.compile(r"^(?:base_model\.model\.|language_model\.|_orig_mod\.|module\.)+|^model\.(?=language_model\.)")


@dataclass(frozen=True)
class Remark:
    """One thing that the doctor has to say."""

    grade: Grade  # "wrong": the model cannot be loaded or would not be itself; "look": unusual; "fine": as it should be
    about: str  # of what, in a word or two
    what: str  # what was found
    todo: str = ""  # what to do about it; empty where nothing needs to be done


@dataclass
class Patient:
    """What a folder holds."""

    folder: Path  # where
    fields: dict[str, Any] = field(default_factory=dict)  # ``config.json``; empty where it cannot be read
    # all tensors, under the names of a plain Hugging Face checkpoint
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    num_pieces: int | None = None  # pieces of the tokenizer; None where there is none
    remarks: list[Remark] = field(default_factory=list)  # what was found while reading

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of a tensor."""
        return self.tensors[name].shape if name in self.tensors else None


def admit(folder: str | Path) -> Patient:
    """Read what can be read of a folder."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder: expected one that holds a model")
    patient = Patient(folder)
    _read_config(patient)
    _read_tensors(patient)
    _read_tokenizer(patient)
    return patient


def _read_config(patient: Patient) -> None:
    path = patient.folder / "config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(fields, dict):
            raise InputError(f"it holds a JSON {type(fields).__name__}")
        patient.fields = fields
    except OSError:
        what = "there is no config.json"
        patient.remarks.append(Remark("wrong", "config", what, "fetch it from where the weights are from"))
    except (ValueError, RecursionError) as error:
        what = f"config.json is not valid JSON ({error})"
        patient.remarks.append(Remark("wrong", "config", what, "fetch it again, or mend it by hand"))


def _read_tensors(patient: Patient) -> None:
    """By the index where all is well; else file by file, keeping what can be read."""
    try:
        found: Mapping[str, StoredTensor] = read_folder(patient.folder)
    except (ValueError, OSError) as error:
        found = _file_by_file(patient)
        said = [remark.what for remark in patient.remarks]
        remark = _remark("files", str(error))
        patient.remarks += [] if remark.what in said else [remark]
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
        todo = 'rename the tensors: a plain model has "model.layers.0...", and nothing before it'
        patient.remarks.append(Remark("wrong", "names", what, todo))
    patient.tensors = {plain: found[name] for name, plain in renamed.items()}


def _file_by_file(patient: Patient) -> dict[str, StoredTensor]:
    found: dict[str, StoredTensor] = {}
    shards = sorted(patient.folder.glob("*.safetensors"))
    adapters = [path for path in shards if path.name.startswith("adapter_")]
    for path in [path for path in shards if path not in adapters]:
        try:
            found |= read_safetensors(path)
        except (ValueError, OSError) as error:
            patient.remarks.append(_remark("files", str(error)))
    if (patient.folder / INDEX).is_file() and not (patient.folder / SINGLE).is_file():
        try:
            listed = parse_index((patient.folder / INDEX).read_bytes(), INDEX)
        except ValueError:
            return found  # said above
        lost = [name for name in listed if name not in found]
        if lost:
            what = f"{len(lost)} tensors of the index are in no file that can be read, {lost[0]} first"
            patient.remarks.append(Remark("wrong", "files", what, "fetch the shards that are missing or damaged"))
    return found


def _read_tokenizer(patient: Patient) -> None:
    try:
        patient.num_pieces = Tokenizer(patient.folder / "tokenizer.model").vocab_size
    except FileNotFoundError:
        todo = "fetch tokenizer.model; tokenizer.json alone is not read"
        patient.remarks.append(Remark("wrong", "tokenizer", "there is no tokenizer.model", todo))
    except ValueError as error:
        patient.remarks.append(_remark("tokenizer", str(error)))


def _remark(about: str, sentence: str) -> Remark:
    """Sentence of the loader, whose last part says what was expected or what to do."""
    what, _, todo = sentence.rpartition("; ") if "; " in sentence else sentence.rpartition(": ")
    return Remark("wrong", about, what, todo) if what else Remark("wrong", about, todo, "fetch it again")
