"""Logits from files of other programs: read exactly, or refused in one sentence."""

import io
import json
import pickle
import zipfile

import numpy as np
import pytest
import safetensors.numpy

from refgemma.cli import main
from refgemma.numerics import from_bfloat16, to_bfloat16
from refgemma.sampling.logits_file import read_logits

ROWS = np.array([[0.1, -2.5, -np.inf, 3.0], [1e-3, 7.0, 0.0, -0.0]])


def save(path, array, **others):
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".npz":
        np.savez(path, **{"logits": array, **others})
    elif path.suffix == ".safetensors":
        safetensors.numpy.save_file({"logits": np.ascontiguousarray(array), **others}, path)
    else:
        path.write_text(json.dumps({"logits": array.tolist(), **others} if others else array.tolist()))
    return path


@pytest.mark.parametrize("ending", ["npy", "npz", "safetensors", "json"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_numbers_come_as_they_are(tmp_path, ending, dtype):
    array = ROWS.astype(dtype)
    read = read_logits(save(tmp_path / f"x.{ending}", array))
    assert read.dtype == (np.float64 if ending == "json" else dtype)
    np.testing.assert_array_equal(read, array)
    one = read_logits(save(tmp_path / f"y.{ending}", array[0]))
    np.testing.assert_array_equal(one, array[:1])


def test_bfloat16_is_widened_exactly(tmp_path):
    bits = to_bfloat16(ROWS.astype(np.float32))
    header = json.dumps({"x": {"dtype": "BF16", "shape": [2, 4], "data_offsets": [0, 16]}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bits.tobytes())
    np.testing.assert_array_equal(read_logits(path), from_bfloat16(bits))
    assert read_logits(path).dtype == np.float32


@pytest.mark.parametrize("dtype", [">f4", "<i4", "u1", np.longdouble])
def test_other_numbers_are_converted(tmp_path, dtype):
    array = np.array([3, 1, 2], dtype)
    read = read_logits(save(tmp_path / "x.npy", array))
    assert read.dtype == (np.float32 if dtype == ">f4" else np.float64)
    assert read.dtype.isnative
    np.testing.assert_array_equal(read, [[3, 1, 2]])


@pytest.mark.parametrize("ending", ["npz", "safetensors", "json"])
def test_an_array_is_found_by_its_name(tmp_path, ending):
    other = [9.0, 8.0] if ending == "json" else np.array([9.0, 8.0])
    path = save(tmp_path / f"x.{ending}", ROWS, tokens=other)
    np.testing.assert_array_equal(read_logits(path), ROWS)
    np.testing.assert_array_equal(read_logits(path, "tokens"), [[9.0, 8.0]])
    with pytest.raises(ValueError, match=r"has no array 'absent': it has the arrays 'logits', 'tokens'"):
        read_logits(path, "absent")


def test_of_several_arrays_none_is_guessed(tmp_path):
    np.savez(tmp_path / "x.npz", a=ROWS, b=ROWS)
    with pytest.raises(ValueError, match="holds the arrays 'a', 'b': expected one, or one called 'logits'"):
        read_logits(tmp_path / "x.npz")
    np.savez(tmp_path / "y.npz", scores=ROWS)  # a single one may have any name
    np.testing.assert_array_equal(read_logits(tmp_path / "y.npz"), ROWS)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (
            np.zeros((1, 2, 3)),
            "holds float64 of shape (1, 2, 3): expected logits (V,) or (T, V); save one row of the batch",
        ),
        (np.float32(3), "of shape ()"),
        (np.zeros(0), "of shape (0,)"),
        (np.zeros((0, 5)), "of shape (0, 5)"),
        (np.zeros((5, 0)), "of shape (5, 0)"),
        (np.array(["a", "b"]), "holds <U1 of shape (2,)"),
        (np.array([1j, 2]), "holds complex128"),
        (np.array([True, False]), "holds bool"),
        (np.array([1.0, np.nan]), "x.npy holds NaN, first for token 1"),
        (np.array([[1.0, 2.0], [0.0, np.nan]]), "row 1 of"),
        (np.array([1.0, np.inf]), "holds plus infinity, for token 1"),
        (np.array([[1.0, 2.0], [-np.inf, -np.inf]]), "is all minus infinity"),
    ],
)
def test_what_is_no_logits(tmp_path, array, words):
    with pytest.raises(ValueError, match="expected") as error:
        read_logits(save(tmp_path / "x.npy", array))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


class Bomb:
    """What a pickle can do: run anything."""

    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


@pytest.mark.parametrize("form", ["npy", "npz", "plain"])
def test_pickled_objects_are_never_opened(tmp_path, form):
    path = tmp_path / ("x.npz" if form == "npz" else "x.npy")
    array = np.array([Bomb(), Bomb()], dtype=object)
    if form == "plain":
        path.write_bytes(pickle.dumps(Bomb()))
    else:
        save(path, array)
    with pytest.raises(ValueError, match="pickled and never opened, because a pickle can run code"):
        read_logits(path)


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.npy", b"", "is empty, 0 bytes: expected a safetensors, .npz or .npy file"),
        ("x.npy", b"hello, world", "is a text file"),
        ("x.npy", npy(ROWS)[:-1], "is damaged"),
        ("x.npy", npy(ROWS)[:20], "is damaged"),
        ("x.npz", bytes(100), "is not a safetensors, .npz or .npy file"),
        ("x.npz", b"PK\x03\x04" + bytes(50), "is damaged"),
        ("x.safetensors", b"hello", "is a text file"),
        ("x.json", b"", "is not valid JSON"),
        ("x.json", b"[1, 2", "is not valid JSON"),
        ("x.json", b"\xff\xfe", "is not valid JSON"),
        ("x.json", b"[" * 100_000, "is not valid JSON"),
        ("x.json", b"[]", "holds []: expected a list of numbers"),
        ("x.json", b"3", "holds 3"),
        ("x.json", b'"text"', "holds 'text'"),
        ("x.json", b'[1, "2"]', "holds '2' for token 1"),
        ("x.json", b"[1, null]", "holds None for token 1"),
        ("x.json", b"[1, true]", "holds True for token 1"),
        ("x.json", b"[[1, 2], [3]]", "row 1 of"),
        ("x.json", b"[[1, 2], 3]", "row 1 of"),
        ("x.json", b"[[[1]]]", "holds [1] for token 0"),
        ("x.json", b"[1, NaN]", "holds NaN, first for token 1"),
        ("x.json", b"[1e999, 2]", "holds plus infinity, for token 0"),
        ("x.json", b"[" + b"9" * 400 + b", 2]", "holds a number beyond float64"),
        ("x.json", b"{}", "holds no arrays"),
        ("x.txt", b"1.0 2.0", "is a text file"),
        ("x", b"1.0 2.0", "is a text file"),
        ("x.npy", b"[1.0, 2.0]", "is a JSON file"),
    ],
)
def test_broken_files_are_one_sentence(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"x\b") as error:
        read_logits(tmp_path / name)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def with_header(text):
    """A .npy file, version 1, whose header is this text."""
    header = text.encode("latin-1").ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(64)


def with_shape(shape):
    return with_header(f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}")


def npz(*changes):
    """A .npz file, in both of whose headers these fields of two bytes are changed: (place in the local one, value)."""
    file = io.BytesIO()
    np.savez(file, logits=ROWS)
    content = bytearray(file.getvalue())
    central = content.index(b"PK\x01\x02")
    for place, value in changes:
        for start in (0, central + 2):  # the central one has a field more before
            content[start + place : start + place + 2] = value.to_bytes(2, "little")
    return bytes(content)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.npy", with_header("((("), "is damaged ("),
        ("x.npy", with_header("{" * 100), "is damaged ("),
        ("x.npy", with_shape("(True,)"), "is damaged ("),
        ("x.npy", with_shape("(1" + "0" * 22 + ",)"), "is damaged ("),
        ("x.npy", with_shape("(1" + "0" * 15 + ",)"), "is damaged ("),  # the file is shorter than that
        ("x.npz", npz((4, 199)), "is damaged ("),  # a zip of version 19.9
        ("x.npz", npz((6, 1)), "is encrypted"),
        ("x.npz", npz((6, 32)), "is damaged ("),  # compressed patched data
        ("x.npz", npz((8, 99)), "is damaged ("),  # an unknown compression
        ("x.npz", npz((8, 12)), "is damaged ("),  # said to be bzip2, but stored
    ],
)
def test_what_numpy_stumbles_over_is_one_sentence(tmp_path, capsys, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    assert main(["sample", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"refgemma: {path} ")
    assert words in err
    assert "save it again with numpy.save or numpy.savez" in err
    assert err.count("\n") == 1
    assert "--weights" not in err  # the advice for a model that is too large


@pytest.mark.filterwarnings("ignore")  # what NumPy warns of in a damaged file, the sentence says
@pytest.mark.parametrize("ending", ["npy", "npz"])
def test_damage_anywhere_ends_in_a_sentence(tmp_path, ending):
    sound = npy(ROWS) if ending == "npy" else npz()
    path = tmp_path / f"x.{ending}"
    rng = np.random.default_rng(17)
    said = []
    for _ in range(400):
        content = np.frombuffer(sound, np.uint8).copy()
        content[rng.integers(len(content), size=rng.integers(1, 4))] = rng.integers(256, size=1)
        path.write_bytes(content[: rng.integers(8, len(content) + 1)] if rng.random() < 0.2 else content)
        try:
            read_logits(path)
        except ValueError as error:
            said.append(str(error))
    assert len(said) > 100
    assert all(str(path) in words and "\n" not in words for words in said)


def test_an_archive_that_is_not_numpy_s(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:  # as torch.save makes them
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00.")
    with pytest.raises(ValueError, match="is pickled and never opened"):
        read_logits(tmp_path / "x.npz")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(
        FileNotFoundError,
        match=r"does not exist or is not a file: expected a safetensors, \.npz, \.npy or \.json file of logits",
    ):
        read_logits(tmp_path / "x.npy")


def test_a_name_for_a_file_that_has_none(tmp_path):
    with pytest.raises(ValueError, match="holds one array without a name: leave out --tensor"):
        read_logits(save(tmp_path / "x.npy", ROWS), "logits")
