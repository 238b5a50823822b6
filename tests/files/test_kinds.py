"""Every file that is not opened is called what it is, by its content; no file that can be read is mistaken for one."""

import gzip
import io
import json
import pickle
import zipfile

import numpy as np
import pytest

from refgemma.files.kinds import kind_of, refused_by_name
from tests.checkpoint.files import one_sentence, safetensors_bytes


def archive(name):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr(name, b"\x80\x02}q\x00.")
    return out.getvalue()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty, 0 bytes: expected a file of numbers"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 12\n", "is a Git LFS pointer: run `git lfs"),
        (b"GGUF\x03\x00\x00\x00" + bytes(40), "is a GGUF file: convert it to safetensors"),
        (b"GGUF\x03\x00\x00\x00\x7b" + bytes(40), "is a GGUF file"),  # of 123 tensors: { where safetensors has it
        (b"ggml" + bytes(40), "is a GGUF file"),
        *((pickle.dumps({"a": [1.0]}, protocol=n), "is pickled and never opened") for n in (2, 3, 4, 5)),
        (archive("archive/data.pkl"), "is pickled and never opened, because a pickle can run code"),
        (archive("model/data.pkl"), "is pickled and never opened"),
        (b"\x89HDF\r\n\x1a\n" + bytes(40), "is an HDF5 file"),
        (b"\x81\xa6params\x83\xa5embed\xc7", "is a msgpack file, as Flax writes"),
        (b"\xde\x00\x20\xa6params\x83\xa5embed\xc7", "is a msgpack file"),
        (gzip.compress(b"numbers", mtime=0), "is compressed with gzip: unpack it"),
        (b"<!DOCTYPE html><html>Access to model google/gemma-2b is restricted</html>", "is a web page: the download"),
        (b"\n  <html lang='en'>", "is a web page"),
        (b'{"weight_map": {"model.norm.weight": "model.safetensors"}}', "is a JSON file"),
        (b'{\n  "error": "Repository not found"\n}', "is a JSON file"),
        (b"[[1.0, 2.0]]", "is a JSON file"),
        (b"Entry not found", "is a text file"),
        (bytes(5000), "is not a file of numbers"),
        (b"\xff" * 100, "is not a file of numbers"),
    ],
)
def test_what_is_refused_is_called_what_it_is(tmp_path, content, sentence):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors is ") as error:
        kind_of(tmp_path / "model.safetensors", "a file of numbers")
    assert sentence in one_sentence(error)


def test_a_header_of_any_length_is_a_safetensors_file(tmp_path):
    """The first bytes are a number, and may be those of any other kind: `<`, `{`, of a pickle, of msgpack."""
    path = tmp_path / "x"
    header = '{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    for length in (*range(len(header), 1000), 0x0280, 0xA081, 0x8B1F):
        path.write_bytes(safetensors_bytes({}, header=header.ljust(length), padding=1))
        assert kind_of(path, "") == "safetensors"


def test_numpy_files(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros(3))
    np.savez(tmp_path / "x.npz", np.zeros(3))
    np.savez_compressed(tmp_path / "y.npz", logits=np.zeros(3))
    assert [kind_of(tmp_path / name, "") for name in ("x.npy", "x.npz", "y.npz")] == ["npy", "zip", "zip"]


def test_a_name_is_enough_where_nothing_is_opened():
    assert "pytorch_model.bin is pickled and never opened" in refused_by_name(["a.safetensors", "pytorch_model.bin"])
    assert "gemma.gguf is a GGUF file" in refused_by_name(["gemma.gguf", "README.md"])
    assert refused_by_name(["model.safetensors", "README.md"]) is None


def test_json_that_is_cut_off_is_still_json(tmp_path):
    (tmp_path / "x").write_text(json.dumps({"a": 1, "b": 2})[:-3])
    with pytest.raises(ValueError, match="is a JSON file"):
        kind_of(tmp_path / "x", "")
