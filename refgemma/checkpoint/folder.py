"""A model folder: where a name is looked up, and its weights, read and written in the layout of Hugging Face.

A name is a folder, a shipped model ("tiny-it"), or a hub id ("google/gemma-2b-it") that was downloaded before; nothing
here uses the network. Weights are one ``model.safetensors``, or shards of it and an index that says which tensor lies
in which. A folder in any other layout is refused with a sentence that says what it holds.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from refgemma.errors import InputError, InputTypeError
from refgemma.files.kinds import refused_by_name
from refgemma.files.safetensors import SafetensorsWriter, StoredTensor, read_safetensors
from refgemma.numerics import Array

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True, eq=False)
class Outgoing:
    """A tensor to be written."""

    name: str  # in the file
    form: str  # "bfloat16", "float16", "float32" or "float64"
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[Array]]  # gives its numbers as they are stored, some rows at a time; bfloat16 as bits

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * (2 if self.form == "bfloat16" else np.dtype(self.form).itemsize)


def find_model(name: str | Path, *, search: Sequence[str | Path] | None = None) -> Path:
    """Look up a model by name; of a cached one, the snapshot that ``refs/main`` names."""
    if not isinstance(name, (str, Path)):
        raise InputTypeError(f"the model is {name!r:.60}: expected the name of a model or its folder")
    if not str(name):
        raise InputError(
            "the model name is empty: expected a folder, or a name such as 'tiny-it' or 'google/gemma-2b-it'"
        )
    try:
        path = Path(name).expanduser()
    except RuntimeError:
        raise FileNotFoundError(f"{name} begins with the home folder of an unknown user") from None
    if path.is_file():
        raise InputError(f"{path} is a file: give the folder that holds it, with config.json beside the weights")
    places = default_places() if search is None else [Path(place) for place in search]
    candidates = [path, *(folder for place in places for folder in _in_place(str(name), place))]
    for folder in candidates:
        if (folder / "config.json").is_file():
            return folder
    for folder in candidates:
        if folder.is_dir():
            raise FileNotFoundError(f"{folder} holds no config.json: expected it in a model folder, beside the weights")
    patterns = ("*/config.json", "*/*/config.json")
    found = {
        config.parent.relative_to(place) for place in places for pattern in patterns for config in place.glob(pattern)
    }
    others = f" (found there: {', '.join(sorted(map(str, found)))})" if found else ""
    raise FileNotFoundError(
        f"no model {str(name)!r}: no such folder, and nothing of that name in {', '.join(map(str, places))}{others};"
        " give the folder that holds its config.json, or fetch one with `refgemma download OWNER/NAME`"
    )


def default_places() -> list[Path]:
    """Folders of models that are searched when no others are given."""
    repository = [_PACKAGE.parent / "weights"] if (_PACKAGE.parent / "pyproject.toml").is_file() else []
    return [Path("weights"), *repository, _PACKAGE / "_weights", hub_cache()]


def hub_cache() -> Path:
    """Folder in which huggingface_hub keeps downloads; the rules are its own."""
    if cache := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(cache).expanduser()
    if home := os.environ.get("HF_HOME"):
        return Path(home).expanduser() / "hub"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "huggingface" / "hub"


def _in_place(name: str, place: Path) -> Iterator[Path]:
    """Folders that may be the model, in one place."""
    short = name.removeprefix("google/")  # of no other owner: bob/gemma-2b-it is another model
    for folder in (f"google/{short}", short):
        yield place / folder
        cached = place / f"models--{folder.replace('/', '--')}"
        if (cached / "refs" / "main").is_file():
            yield cached / "snapshots" / (cached / "refs" / "main").read_text(encoding="utf-8").strip()


def read_folder(folder: str | Path) -> dict[str, StoredTensor]:
    """Map all tensors of a model folder."""
    folder = Path(folder)
    if (folder / INDEX).is_file():
        tensors = _read_shards(folder)
    elif (folder / SINGLE).is_file():
        tensors = read_safetensors(folder / SINGLE)
    else:
        raise FileNotFoundError(_what_is_there_instead(folder))
    return dict(sorted(tensors.items(), key=lambda item: _natural(item[0])))


def _read_shards(folder: Path) -> dict[str, StoredTensor]:
    """Map every shard that the index names; both must agree."""
    weight_map = parse_index((folder / INDEX).read_bytes(), folder / INDEX)
    shards = sorted(set(weight_map.values()))
    if SINGLE not in shards and (folder / SINGLE).is_file():
        raise InputError(f"{folder} holds two models, {SINGLE} and the shards of {INDEX}: remove one of them")
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}, which {INDEX} names: fetch what is missing")
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        for name, tensor in read_safetensors(folder / shard).items():
            if name in tensors:
                raise InputError(f"{folder} holds {name!r} twice, in {tensors[name].file.name} and in {shard}")
            tensors[name] = tensor
    found = {name: tensor.file.name for name, tensor in tensors.items()}
    wrong = [
        f"it places {name!r} in {weight_map.get(name, 'no shard')}, found in {found.get(name, 'no shard')}"
        for name in sorted(weight_map.keys() | found.keys(), key=_natural)
        if weight_map.get(name) != found.get(name)
    ]
    if wrong:
        raise InputError(f"{folder / INDEX} does not fit its shards: {'; '.join(wrong)}")
    return tensors


def parse_index(data: bytes, path: str | Path) -> dict[str, str]:
    """Parse ``model.safetensors.index.json``."""
    try:
        weight_map = json.loads(data.decode("utf-8"))["weight_map"]
        shards = list(weight_map.values())
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        raise InputError(
            f'{path} is damaged: expected JSON with an object "weight_map", tensor name to file name'
        ) from None
    for shard in shards:
        # A name with a folder in it could make the reader open any file of the machine.
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise InputError(f"{path} names the shard {shard!r}: expected a safetensors file in the same folder")
    if not shards:
        raise InputError(f"{path} names no shard: expected the place of every tensor of the model")
    return dict(weight_map)


def split_into_files(tensors: Iterable[Outgoing], shard_bytes: int) -> dict[str, list[Outgoing]]:
    """The tensors of each file, in order, at most `shard_bytes` of them unless one alone has more."""
    files: list[list[Outgoing]] = [[]]
    room = shard_bytes
    for tensor in tensors:
        if files[-1] and tensor.nbytes > room:
            files.append([])
            room = shard_bytes
        files[-1].append(tensor)
        room -= tensor.nbytes
    if len(files) == 1:
        return {SINGLE: files[0]}
    return {f"model-{i:05}-of-{len(files):05}.safetensors": held for i, held in enumerate(files, start=1)}


def total_bytes(files: dict[str, list[Outgoing]]) -> int:
    """Size of all tensors."""
    return sum(tensor.nbytes for held in files.values() for tensor in held)


def write_weights(
    folder: Path, files: dict[str, list[Outgoing]], progress: Callable[[int, int], None] | None = None
) -> None:
    """Write the weights of a model as a stream, and the index if there are several files."""
    done, total = 0, total_bytes(files)
    for name, held in files.items():
        with (folder / name).open("wb") as file:
            tensors = {tensor.name: (tensor.form, tensor.shape) for tensor in held}
            writer = SafetensorsWriter(file, tensors, {"format": "pt"})  # transformers refuses a file without it
            for tensor in held:
                start = 0
                for block in tensor.blocks():
                    writer.write(tensor.name, start, block)
                    start += block.size
                    done += block.nbytes
                    if progress:
                        progress(done, total)
            file.flush()
            os.fsync(file.fileno())  # a disk may report only now that it is full
    if list(files) != [SINGLE]:
        weight_map = {tensor.name: name for name, held in files.items() for tensor in held}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _what_is_there_instead(folder: Path) -> str:
    """Say what a folder without readable weights holds."""
    if not folder.is_dir():
        return f"{folder} is not a folder: expected one that holds config.json and {SINGLE}"
    found = sorted(entry.name for entry in folder.iterdir())

    lacks = f"{folder} holds neither {SINGLE} nor {INDEX}"
    if SINGLE in found or INDEX in found:
        return f"{folder}: {SINGLE if SINGLE in found else INDEX} is a link to a file that is gone: fetch it again"
    if "adapter_config.json" in found:
        return f"{lacks}: it is a LoRA adapter, to be given beside a model and not as one"
    if shard := next((name for name in found if re.fullmatch(r"model-\d+-of-\d+\.safetensors", name)), None):
        return f"{lacks}: there are shards such as {shard}, so only the index is missing; fetch it"
    if other := next((name for name in found if name.endswith(".safetensors")), None):
        return f"{lacks}: if {other} holds the whole model, rename it to {SINGLE}"
    if other := refused_by_name([name for name in found if not name.endswith(".json")]):
        return f"{lacks}: {other}"
    return f"{lacks}: fetch the weights of the model into it"


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorting key under which layer 10 comes after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
