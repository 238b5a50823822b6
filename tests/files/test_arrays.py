"""Arrays come out of safetensors, .npz and .npy as they went in; what cannot be read is one sentence."""

import io
import zipfile

import numpy as np
import pytest

from refgemma.files.arrays import read_arrays
from refgemma.numerics import from_bfloat16, to_bfloat16
from tests.checkpoint.files import safetensors_bytes

NUMBERS = np.random.default_rng(5).normal(size=(2, 3, 4)).astype(np.float32)
BITS = to_bfloat16(NUMBERS)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int64"])
@pytest.mark.parametrize("ending", ["safetensors", "npz"])
def test_numbers_and_formats(tmp_path, dtype, ending):
    array = (NUMBERS * 100).astype(dtype)
    path = tmp_path / f"a.{ending}"
    if ending == "npz":
        np.savez_compressed(path, **{"layer_0/attn": array, "second": array[0]})
    else:
        path.write_bytes(safetensors_bytes({"layer_0/attn": array, "second": array[0]}))
    got = read_arrays(path)
    assert list(got) == ["layer_0/attn", "second"]
    assert got["layer_0/attn"].dtype == dtype
    assert got["second"].shape == (3, 4)
    assert got["layer_0/attn"].read().dtype == dtype
    assert np.array_equal(got["layer_0/attn"].read(), array)
    assert np.array_equal(got["second"].read(), array[0])


def test_bfloat16_in_safetensors_and_as_jax_saves_it(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(safetensors_bytes({"x": BITS}))
    np.savez(tmp_path / "a.npz", x=BITS.view("V2"))  # NumPy writes the dtype of ml_dtypes as two bytes of no kind
    for name in ("a.safetensors", "a.npz"):
        got = read_arrays(tmp_path / name)["x"]
        assert (got.dtype, got.shape) == ("bfloat16", (2, 3, 4))
        assert np.array_equal(got.read(), from_bfloat16(BITS))


def test_a_lone_array_is_logits_in_any_layout_of_memory(tmp_path):
    for array in (NUMBERS, np.asfortranarray(NUMBERS), NUMBERS.astype(">f4")):
        np.save(tmp_path / "a.npy", array)
        got = read_arrays(tmp_path / "a.npy")
        assert list(got) == ["logits"]
        assert got["logits"].dtype == "float32"
        assert got["logits"].read().dtype == np.float32
        assert np.array_equal(got["logits"].read(), NUMBERS)


def test_the_content_says_what_a_file_is_and_not_its_name(tmp_path):
    for content in (safetensors_bytes({"logits": NUMBERS}), npz(logits=NUMBERS), npy(NUMBERS)):
        for name in ("a.safetensors", "a.npz", "a.npy", "a.pt", "a"):
            (tmp_path / name).unlink(missing_ok=True)  # it may be mapped
            (tmp_path / name).write_bytes(content)
            assert np.array_equal(read_arrays(tmp_path / name)["logits"].read(), NUMBERS)


def npz(**arrays):
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


def npy(array):
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def archive(name, content):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr(name, content)
    return out.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.npz", b"", r"a\.npz is empty, 0 bytes: expected a safetensors, \.npz or \.npy file"),
        ("a.npz", bytes(100), r"a\.npz is not a safetensors, \.npz or \.npy file"),
        ("a.npz", b"\x80\x02}q\x00.", "is pickled and never opened, because a pickle can run code"),
        (
            "a.npz",
            npz(x=np.array([{}], dtype=object)),
            "holds objects that are pickled and never opened, because a pickle can run code",
        ),
        (
            "a.npy",
            npy(np.array([{}], dtype=object)),
            "holds objects that are pickled and never opened, because a pickle can run code",
        ),
        ("a.npz", archive("x.txt", b"nothing"), r"is a zip archive without arrays: expected a safetensors, \.npz or"),
        ("a.npz", archive("archive/data.pkl", b"\x80\x02}q\x00."), "is pickled and never opened"),
        ("a.npz", npz(x=NUMBERS)[:-30], "is damaged"),
        ("a.npz", archive("x.npy", b"nothing of the kind"), "is damaged"),
        ("a.npy", npy(NUMBERS)[:-8], "is damaged"),
        ("a.npy", npy(NUMBERS)[:20], "is damaged"),
        ("a.safetensors", b"GGUF\x03", "is a GGUF file"),
        ("a.safetensors", safetensors_bytes({"x": NUMBERS})[:-1], "is cut off"),
    ],
)
def test_bad_files(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words) as raised:
        read_arrays(tmp_path / name)
    assert "\n" not in str(raised.value)


def test_an_absent_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist or is not a file"):
        read_arrays(tmp_path / "a.npz")


def test_an_archive_damaged_inside_an_array_is_a_sentence_when_that_is_read(tmp_path):
    content = bytearray(npz(x=NUMBERS))
    content[200] ^= 0xFF
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ValueError, match="is damaged"):
        read_arrays(tmp_path / "a.npz")["x"].read()
