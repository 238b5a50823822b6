"""What a file really is, by its first bytes: names lie, and a failed download leaves anything under the right name.

Only safetensors, .npy and .npz files are opened. Every reader refuses the rest in the same words, from the same table.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from refgemma.errors import InputError

PICKLED = "pickled and never opened, because a pickle can run code"


class _Kind(NamedTuple):
    """A kind of file that is refused."""

    beginning: bytes  # regular expression
    endings: tuple[str, ...]  # of names that usually hold it
    name: str
    advice: str


_REFUSED = (
    _Kind(rb"version https://git-lfs", (), "a Git LFS pointer", "run `git lfs pull` in its folder to fetch the file"),
    _Kind(rb"GGUF|gg(la|mf|ml|jt)", (".gguf",), "a GGUF file", "convert it to safetensors"),
    _Kind(
        rb"\x80[\x02-\x05][^\0]|PK\x03\x04.{26}[^/]+/(data\.pkl|\.format_version|\.data/|byteorder)",  # of PyTorch
        (".bin", ".pt", ".pth", ".ckpt", ".pkl"), PICKLED, "convert it to safetensors",
    ),
    _Kind(rb"\x89HDF\r\n", (".h5", ".hdf5"), "an HDF5 file", "convert it to safetensors"),
    # A map of one to some 65,000 entries, the first of which has a text of up to 31 bytes for its name.
    _Kind(
        rb"([\x81-\x8f]|\xde..)[\xa1-\xbf][!-~]", (".msgpack",), "a msgpack file, as Flax writes",
        "convert it to safetensors",
    ),
    _Kind(rb"\x1f\x8b", (".gz", ".tgz"), "compressed with gzip", "unpack it"),
    _Kind(
        rb"\s*<[!?A-Za-z]", (".html",), "a web page",
        "the download was refused; log in or accept the licence, then fetch it again",
    ),
    _Kind(rb"\s*[\[{]\s*[\[{\"\d\]}-]", (".json",), "a JSON file", "expected the numbers themselves"),
    _Kind(rb"[\s!-~]{5}", (".txt",), "a text file", "fetch it again"),
)  # fmt: skip


def kind_of(path: Path, expected: str) -> str:
    """Tell "safetensors", "npy" and "zip" apart; refuse every other file, saying what it is.

    `expected` says what is wanted, such as "a safetensors file".
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist or is not a file: expected {expected}")
    with path.open("rb") as file:
        beginning = file.read(256)
    if not beginning:
        raise InputError(f"{path} is empty, 0 bytes: expected {expected}; fetch it again")
    # The length of the header, below 2**32, then its brace: no other kind has these four zeros.
    if beginning[4:9] == b"\0\0\0\0{" or (len(beginning) < 9 and not any(beginning[4:])):
        return "safetensors"
    for kind in _REFUSED:
        if re.match(kind.beginning, beginning, re.DOTALL):
            raise InputError(f"{path} is {kind.name}: {kind.advice}")
    if beginning.startswith((b"\x93NUMPY", b"PK\x03\x04")):
        return "npy" if beginning.startswith(b"\x93") else "zip"
    raise InputError(f"{path} is not {expected}: fetch it again, or save it again")


def refused_by_name(names: list[str]) -> str | None:
    """What the first file is that has the ending of a kind that is refused; no file is opened."""
    for kind in _REFUSED:
        if found := next((name for name in names if name.endswith(kind.endings or ("\0",))), None):
            return f"{found} is {kind.name}: {kind.advice}"
    return None
