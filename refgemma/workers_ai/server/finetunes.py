"""Finetunes on disk: a folder each, named by its id, with what it is called and the two files of its adapter.

Nothing that a user chose is ever part of a path: folders are named by ids made here, files by the two names that there
are. A file is written beside its place, checked there together with what is there already, and then renamed.

Whoever asks what there is waits for nobody: lists and names are replaced whole. One lock orders what is made, and one a
finetune the uploads of its two files, since the second is checked together with the first.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from refgemma.lora import read
from refgemma.workers_ai.ai import AI
from refgemma.workers_ai.errors import AiError
from refgemma.workers_ai.schema import short
from refgemma.workers_ai.server.adapter_check import FILES, check
from refgemma.workers_ai.server.finetune import Finetune, check_stored, given, uploaded
from refgemma.workers_ai.server.limits import FINETUNES

ABOUT = "finetune.json"
STAGE = ".new-"  # begins the name of a folder in which something is made ready


class Finetunes:
    """Finetunes that were uploaded, and those that the server was started with."""

    def __init__(self, ai: AI, folder: Path | None = None) -> None:
        self._ai = ai
        self._folder = Path(tempfile.mkdtemp(prefix="refgemma-finetunes-")) if folder is None else folder
        self._folder.mkdir(parents=True, exist_ok=True)
        self._kept = folder is not None
        if not self._kept:
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        for stage in self._folder.glob(f"{STAGE}*"):  # of a process that was killed
            shutil.rmtree(stage, ignore_errors=True)
        self._making = threading.Lock()
        self._uploads: dict[str, threading.Lock] = {}  # by id, of those that were made here
        self._all: tuple[Finetune, ...] = ()  # what was given, then the oldest first
        self._by_key: dict[str, Finetune] = {}  # by id and by name
        for finetune in [given(name, ai) for name in ai.loras]:
            ai.loras[finetune.id] = ai.loras[finetune.name]
            self._enter(finetune)
        for finetune in self._stored():
            self._enter(finetune, made_here=True)
            self._offer(finetune)

    def every(self, *, public: bool = False) -> list[dict[str, Any]]:
        """What there is."""
        return [asdict(finetune) for finetune in self._all if finetune.public or not public]

    def create(self, fields: Any) -> Finetune:
        """Make a finetune without files."""
        finetune = uploaded(fields)
        if finetune.model not in self._ai.models:
            served = " and ".join(self._ai.models)
            raise AiError(5005, f"Model {short(finetune.model)} does not support LoRA here: expected {served}")
        with self._making:
            if finetune.name in self._by_key:
                raise AiError(5006, f"there is a finetune {finetune.name!r}: expected another name")
            if len(self._uploads) >= FINETUNES:
                raise AiError(3040, f"there are {FINETUNES} finetunes, as many as there may be")
            with self._staged() as stage:
                (stage / ABOUT).write_text(json.dumps(asdict(finetune), indent=1), encoding="utf-8")
                stage.rename(self._folder / finetune.id)
            self._enter(finetune, made_here=True)
        return finetune

    def add(self, key: str, file_name: str, source: Path) -> None:
        """Add one of the two files, and with the second make the finetune usable."""
        finetune = self._by_key.get(key)
        if finetune is None or finetune.id not in self._uploads:
            raise AiError(3037, f"Finetune {short(key)} not found")
        if file_name not in FILES:
            raise AiError(5006, f"file_name is {short(file_name)!r}: expected {' or '.join(FILES)}")
        folder = self._folder / finetune.id
        with self._uploads[finetune.id], self._staged() as stage:
            if (folder / file_name).exists():
                raise AiError(5006, f"{file_name} is there already: files are never replaced, so make another finetune")
            shutil.move(source, stage / file_name)
            for other in set(FILES) - {file_name}:
                if (folder / other).exists():
                    _link(folder / other, stage / other)
            check(stage, self._ai.models.get(finetune.model), finetune.model)
            (stage / file_name).rename(folder / file_name)
        self._offer(finetune)

    def check_complete(self, key: str) -> None:
        """Tell a finetune that lacks files from one that is not there."""
        finetune = self._by_key.get(key)
        missing = [] if finetune is None else self._missing(finetune)
        if missing:
            raise AiError(3039, f"Finetune {short(key)} is missing required files: {' and '.join(missing)}")

    def check_model(self, key: str | None, model: str) -> None:
        """Make sure that a finetune is for a model."""
        finetune = None if key is None else self._by_key.get(key)
        if finetune is not None and finetune.id in self._uploads and finetune.model != model:
            raise AiError(5006, f"Finetune {short(finetune.name)} was made for {finetune.model}, not for {model}")

    def close(self) -> None:
        """Remove what was not to be kept: a process that a signal ends runs no finalizers."""
        if not self._kept:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _enter(self, finetune: Finetune, *, made_here: bool = False) -> None:
        """Let a finetune be known; what was given at the start takes no files."""
        if made_here:
            self._uploads[finetune.id] = threading.Lock()
        self._by_key[finetune.id] = self._by_key[finetune.name] = finetune
        self._all = (*self._all, finetune)

    def _missing(self, finetune: Finetune) -> list[str]:
        if finetune.id not in self._uploads:
            return []
        return [name for name in FILES if not (self._folder / finetune.id / name).exists()]

    def _offer(self, finetune: Finetune) -> None:
        """Give a complete finetune to the models."""
        if self._missing(finetune):
            return
        try:
            adapter = read(self._folder / finetune.id)
        except (OSError, ValueError) as error:
            warnings.warn(f"finetune {finetune.name} cannot be used: {error}", stacklevel=2)
            return
        self._ai.loras[finetune.id] = self._ai.loras[finetune.name] = adapter

    def _stored(self) -> Iterator[Finetune]:
        """What an earlier run left, the oldest first; what cannot be read, or has a taken name, stays where it is."""
        found = []
        for about in self._folder.glob(f"*/{ABOUT}"):
            try:
                finetune = Finetune(**json.loads(about.read_text(encoding="utf-8")))
                check_stored(finetune, about.parent.name)
                found.append(finetune)
            except (OSError, ValueError, TypeError, RecursionError) as error:
                warnings.warn(f"{about} is left out: {error}", stacklevel=2)
        for finetune in sorted(found, key=lambda finetune: (finetune.created_at, finetune.id)):
            if other := self._by_key.get(finetune.name):
                about = self._folder / finetune.id / ABOUT
                why = f"its name {finetune.name!r} is that of {other.id}, which is older or was given at the start"
                warnings.warn(f"{about} is left out: {why}", stacklevel=2)
            else:
                yield finetune

    @contextmanager
    def _staged(self) -> Iterator[Path]:
        stage = Path(tempfile.mkdtemp(prefix=STAGE, dir=self._folder))
        try:
            yield stage
        finally:
            shutil.rmtree(stage, ignore_errors=True)


def _link(source: Path, target: Path) -> None:
    """Let a file be in two folders; where the disk cannot do that, copy it."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
