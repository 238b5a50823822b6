"""Merge adapters into a checkpoint on disk: a new model folder that transformers loads; the base stays as it is.

The base is mapped, and each weight is merged and written some rows at a time, so that memory does not depend on the
size of the model. The folder is made under another name beside its place and renamed at the very end.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np

from refgemma.checkpoint.folder import Outgoing, find_model, read_folder, split_into_files, total_bytes, write_weights
from refgemma.checkpoint.load import Progress, check_tensors, load_params
from refgemma.checkpoint.names import Tensor, tensors_of
from refgemma.config import Config, read_config
from refgemma.errors import InputError
from refgemma.files.atomic import check_folder_place, check_room, whole_folder
from refgemma.files.safetensors import FLOATS, StoredTensor
from refgemma.lora.adapter import Adapter, find_adapter, read, split_scale
from refgemma.lora.attach import attach
from refgemma.lora.fit import fit
from refgemma.lora.merge import naming, stored_rows
from refgemma.lora.tiles import tiles
from refgemma.numerics import Array
from refgemma.ops.linear import Operand
from refgemma.params import Params, at

Adapters: TypeAlias = str | Path | Adapter | Sequence[str | Path | Adapter]

# What belongs to a model besides configuration and weights, its licence included.
_COPIED = (
    "generation_config.json", "tokenizer*", "special_tokens*", "added_tokens*", "chat_template*", "LICENSE*", "NOTICE*",
)  # fmt: skip
_BLOCK = 2**24  # numbers that are computed before they are written: 64 MB as float32


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What was written."""

    folder: Path  # the new checkpoint
    dtype: str  # its format, the widest if the base has several
    changed: tuple[str, ...]  # weights that the adapters changed, such as ``layers.0.attn.q``
    untied: bool  # whether the head was the embedding and is now stored by itself, because the two differ
    files: int  # how many hold weights
    nbytes: int  # size of all weights


def merge_checkpoint(
    base: str | Path,
    adapters: Adapters,
    out: str | Path,
    dtype: str | None = None,
    shard_bytes: int = 5_000_000_000,
    progress: Progress | None = None,
) -> Merged:
    """Write a checkpoint with adapters merged into its weights.

    Parameters
    ----------
    base : str or Path
        Folder or name of the model.
    adapters : str, Path or Adapter, or a sequence of them
        Folders or names of adapters, each perhaps followed by ``:SCALE``. Their changes are summed.
    out : str or Path
        Folder to make.
    dtype : {"bfloat16", "float16", "float32"}, optional
        Format of all weights; by default each keeps its own, and what no adapter changes is copied byte for byte.
    shard_bytes : int
        Largest size of one file of weights.
    progress : callable, optional
        Called as ``progress(done, total)``, in bytes of the new weights.

    Returns
    -------
    Merged
        What was written.

    Raises
    ------
    FileNotFoundError
        If the base or an adapter is missing.
    FileExistsError
        If `out` exists.
    ValueError
        If an adapter does not fit or cannot be merged, or a number is too large for the format.
    OSError
        If the disk has no room, or `out` cannot be written. Nothing is left behind.

    Notes
    -----
    Computed in float64 and rounded once. Where the head is the embedding and they come out different, the head is
    stored by itself and ``tie_word_embeddings`` becomes false.
    """
    if dtype not in (None, "bfloat16", "float16", "float32"):
        raise InputError(f"dtype is {dtype!r}: expected 'bfloat16', 'float16' or 'float32', or None to keep the base's")
    place = Path(out).expanduser().absolute()
    check_folder_place(place)
    folder = find_model(base)
    config = read_config(folder)
    stored = read_folder(folder)
    before = load_params(folder, config, weights="stored", norm_dtype=np.float64)
    params = _attached(before, config, adapters)
    tied = _stays_tied(params, before, stored, dtype)
    untied = config.tie_word_embeddings and not tied
    config = replace(config, tie_word_embeddings=tied)

    tensors, changed = [], []
    for tensor in tensors_of(config):
        new, old = at(params, tensor.path), at(before, tensor.path)
        source = stored.get(tensor.name) or stored["model.embed_tokens.weight"]  # of a head that was the embedding
        tensors.append(_outgoing(tensor, source, new, dtype, changed=new is not old))
        changed += [tensor.path] if new is not old else []
    if tied and at(params, "embed") is not at(before, "embed"):
        changed.append("head")
    files = split_into_files(tensors, shard_bytes)
    copied = [path for pattern in _COPIED for path in sorted(folder.glob(pattern)) if path.is_file()]
    check_room(place, total_bytes(files) + sum(path.stat().st_size for path in copied))
    forms = {tensor.form for tensor in tensors}
    form = forms.pop() if len(forms) == 1 else "float32"
    with whole_folder(place) as temporary:
        _write_config(folder / "config.json", temporary / "config.json", form, tied)
        for path in copied:
            shutil.copyfile(path, temporary / path.name)
        write_weights(temporary, files, progress)
        check_tensors(read_folder(temporary), read_config(temporary), temporary)
    return Merged(
        folder=place, dtype=form, changed=tuple(changed), untied=untied, files=len(files), nbytes=total_bytes(files)
    )


def _attached(before: Params, config: Config, adapters: Adapters) -> Params:
    given = [adapters] if isinstance(adapters, (str, Path, Adapter)) else list(adapters)
    if not given:
        raise InputError("no adapter was given: there is nothing to merge")
    params = before
    for adapter in given:
        scale = 1.0
        if not isinstance(adapter, Adapter):
            name, scale = split_scale(adapter)
            adapter = read(find_adapter(name))
        # Factors keep the file's dtype: widened, those of a large model would take more memory than anything else here.
        changes = fit(adapter, config).changes
        params = attach(params, changes, before=before, scale=scale, dtype=None)
    return params


def _outgoing(tensor: Tensor, source: StoredTensor, operand: Operand, dtype: str | None, *, changed: bool) -> Outgoing:
    """One weight, computed only when it is written."""
    form = dtype or FLOATS[source.dtype]
    copied = not changed and form == FLOATS[source.dtype]

    def blocks() -> Iterator[Array]:
        for rows in tiles(tensor.shape, numbers=_BLOCK):
            yield source.data[rows] if copied else _rows_of(operand, form, tensor.path, rows)

    return Outgoing(name=tensor.name, form=form, shape=tensor.shape, blocks=blocks)


def _rows_of(operand: Operand, form: str, path: str, rows: slice) -> Array:
    with naming(path):
        return stored_rows(operand, rows, form, table=path == "embed")


def _stays_tied(params: Params, before: Params, stored: dict[str, StoredTensor], dtype: str | None) -> bool:
    """Whether one table still serves as embedding and head: unchanged, or changed to the same numbers as both."""
    embed, head = params["embed"], params["head"]
    if before["head"] is not before["embed"]:
        return False
    if (embed is before["embed"]) != (head is before["head"]):
        return False
    if embed is head:
        return True
    form = dtype or FLOATS[stored["model.embed_tokens.weight"].dtype]
    return all(
        np.array_equal(_rows_of(embed, form, "embed", rows), _rows_of(head, form, "head", rows))
        for rows in tiles(embed.shape, numbers=_BLOCK)
    )


def _write_config(source: Path, target: Path, form: str, tied: bool) -> None:
    """The base's own, with the new format of weights under the name used there, and whether the head is tied."""
    fields = json.loads(source.read_text(encoding="utf-8"))
    named = [name for name in ("dtype", "torch_dtype") if name in fields] or ["torch_dtype"]  # read by all versions
    fields |= dict.fromkeys(named, form) | {"tie_word_embeddings": tied}
    target.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
