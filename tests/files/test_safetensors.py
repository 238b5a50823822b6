import ctypes
import json
import mmap
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from refgemma.files.safetensors import read_safetensors, release_memory
from tests.checkpoint.files import base_of, one_sentence, safetensors_bytes

A = np.arange(6, dtype=np.float32).reshape(2, 3)
B = np.array([1, 2, 0x3F80, 0xFFFF], dtype=np.uint16)  # bfloat16 bits


@pytest.fixture
def read(tmp_path):
    """Write bytes to a file and read them."""

    def write_and_read(content):
        path = tmp_path / "model.safetensors"
        path.unlink(missing_ok=True)  # never write into a mapped file
        path.write_bytes(content)
        return read_safetensors(path)

    return write_and_read


def test_reads_what_the_library_writes(tmp_path):
    rng = np.random.default_rng(1)
    dtypes = ["?", "u1", "i1", "u2", "i2", "f2", "u4", "i4", "f4", "u8", "i8", "f8"]
    arrays = {dtype: (rng.normal(size=(3, 5)) * 9).astype("i8").astype(dtype) for dtype in dtypes}
    arrays |= {"scalar": np.array(7, np.float32), "empty": np.zeros((0, 4), np.float32)}
    safetensors.numpy.save_file(arrays, tmp_path / "all.safetensors", metadata={"format": "np"})
    tensors = read_safetensors(tmp_path / "all.safetensors")
    assert tensors.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(tensors[name].data, array, strict=True)
        assert (tensors[name].shape, tensors[name].nbytes) == (array.shape, array.nbytes)


def test_arrays_are_read_only_views_of_the_mapped_file(read):
    for tensor in read(safetensors_bytes({"a": A, "b": B})).values():
        assert isinstance(base_of(tensor.data), mmap.mmap)
        with pytest.raises(ValueError, match="read-only"):
            tensor.data[0] = 0


def in_memory(path):
    """Bytes of a mapped file that count as this process's memory."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    found = [next(line for line in lines if line.startswith("Rss:")) for line in lines if line.endswith(str(path))]
    return 1024 * sum(int(line.split()[1]) for line in found)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux tells how much of a file is in memory")
def test_numbers_that_were_let_go_leave_memory_and_can_be_read_again(tmp_path):
    page = mmap.PAGESIZE // 4  # numbers
    array = np.arange(64 * page, dtype=np.float32).reshape(64, page)
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_bytes({"a": A, "large": array}))  # the pages of the array are not those of the file
    tensor = read_safetensors(path)["large"]
    for rows in (slice(None), slice(3, 50), slice(5, 6), slice(5, 5)):
        assert np.array_equal(tensor.data, array)
        before = in_memory(path)
        assert before >= array.nbytes
        release_memory(tensor.data[rows])
        gone = before - in_memory(path)
        # Whole pages only: of those that are shared with what lies before and after, none.
        assert max(0, len(array[rows]) - 1) * mmap.PAGESIZE <= gone <= len(array[rows]) * mmap.PAGESIZE
    assert np.array_equal(tensor.data, array)


def test_locked_memory_stays_and_is_no_error(tmp_path):
    array = np.arange(2**14, dtype=np.float32)
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_bytes({"a": array}))
    data = read_safetensors(path)["a"].data
    place, size = ctypes.c_void_p(data.ctypes.data), ctypes.c_size_t(data.nbytes)
    if not hasattr(mmap, "MADV_DONTNEED") or ctypes.CDLL(None).mlock(place, size):
        pytest.skip("this system locks no memory, or not for this user")
    release_memory(data)
    assert np.array_equal(data, array)


def test_an_array_that_is_not_mapped_is_not_touched():
    array = np.arange(2**16)
    release_memory(array)
    assert np.array_equal(array, np.arange(2**16))


def test_bfloat16_is_read_although_numpy_has_no_name_for_it(read):
    # https://github.com/safetensors/safetensors/issues/598
    tensor = read(safetensors_bytes({"a": A, "b": B}))["b"]
    assert tensor.dtype == "BF16"
    np.testing.assert_array_equal(tensor.data, B, strict=True)


def test_a_file_cut_off_anywhere_is_refused(read):
    whole = safetensors_bytes({"a": A, "b": B})
    for length in range(len(whole)):
        with pytest.raises(ValueError, match="is cut off" if length else "is empty") as error:
            read(whole[:length])
        assert str(length) in one_sentence(error)
    assert str(len(whole)) in one_sentence(error)  # it says how many there should be
    read(whole)


def test_bytes_after_the_last_tensor_are_refused(read):
    with pytest.raises(ValueError, match="3 bytes belong to no tensor"):
        read(safetensors_bytes({"a": A}) + b"abc")


def test_a_damaged_header_is_refused_or_harmless(read):
    """Flip every bit of a header. What we accept, the library must accept too, and both must read the same."""
    whole = safetensors_bytes({"a": A, "b": B})
    data_start = 8 + struct.unpack("<Q", whole[:8])[0]
    refused = 0
    for position in range(data_start):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            try:
                ours = read(bytes(damaged))
            except ValueError:
                refused += 1
                continue
            theirs = dict(safetensors.deserialize(bytes(damaged)))
            assert {(t.name, t.dtype, t.shape, t.data.tobytes()) for t in ours.values()} == {
                (name, view["dtype"], tuple(view["shape"]), bytes(view["data"])) for name, view in theirs.items()
            }
    assert refused > data_start * 8 / 2  # most of them matter


def entry(dtype="F32", shape=(2, 3), offsets=(0, 24)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "sentence"),
    [
        ("", "not a safetensors file"),
        ("  {}", "not a safetensors file"),  # the format wants the brace first
        ("[1]", "not a safetensors file"),
        ("{", "damaged header: Expecting property name"),
        ('{"a":' + "[" * 100_000, "damaged header"),
        ('{"a":' + "9" * 5000 + "}", "damaged header"),
        ('{"a":NaN}', "NaN is not valid JSON"),
        ('{"\udcff":1}', "damaged header: 'utf-8' codec"),
        ('{"a":1,"a":1}', "'a' occurs twice"),
        ('{"a":{"dtype":"F32","dtype":"F32"}}', "'dtype' occurs twice"),
        ({"__metadata__": {"step": 3}}, "expected an object of strings"),
        ({"a": [1, 2]}, "expected dtype, shape and data_offsets"),
        ({"a": {"dtype": "F32", "shape": [2, 3]}}, "expected dtype, shape and data_offsets"),
        ({"a": entry("F33")}, "'a' has dtype 'F33'"),
        ({"a": entry(["F32"])}, "'a' has dtype"),
        ({"a": entry(shape=[2, -3])}, "'a' has shape"),
        ({"a": entry(shape=[2, 3.0])}, "'a' has shape"),
        ({"a": entry(shape=[True] * 6)}, "'a' has shape"),
        ({"a": entry(shape=6)}, "'a' has shape"),
        ({"a": entry(shape=[2**40, 2**40])}, "'a' has shape"),
        ({"a": entry(shape=[0, 2**62, 2**62], offsets=(0, 0))}, "'a' has shape"),
        ({"a": entry(shape=[1] * 65, offsets=(0, 4))}, "'a' has shape"),
        ({"a": entry(offsets=[24, 0])}, "'a' has F32 of shape (2, 3), 24 bytes, but lies from byte 24 to 0"),
        ({"a": entry(offsets=[-24, 0])}, "'a' has data_offsets"),
        ({"a": entry(offsets=[0, 2**64])}, "'a' has data_offsets"),
        ({"a": entry(offsets=[0, 24, 48])}, "'a' has data_offsets"),
        ({"a": entry(offsets=["0", "24"])}, "'a' has data_offsets"),
        ({"a": entry(offsets=[0, 20])}, "'a' has F32 of shape (2, 3), 24 bytes, but lies from byte 0 to 20"),
        ({"a": entry("F16")}, "'a' has F16 of shape (2, 3), 12 bytes, but lies from byte 0 to 24"),
        ({"a": entry(offsets=[1, 25])}, "'a' leaves a gap"),
        ({"a": entry(), "b": entry("BF16", [4], [20, 28])}, "'b' overlaps the tensor before it"),
        ({"a": entry(), "b": entry()}, "'b' overlaps the tensor before it"),
        ({"a": entry(), "b": entry("BF16", [4], [28, 36])}, "'b' leaves a gap"),
        ({"a": entry(), "b": entry("BF16", [0], [12, 12])}, "overlaps"),
        ({"a": entry(shape=[2**20, 2**20], offsets=[0, 2**42])}, "is cut off"),
        ({"a": entry()}, "8 bytes belong to no tensor"),
        ("{}", "32 bytes belong to no tensor"),
    ],
)
def test_a_header_that_lies_is_refused(read, header, sentence):
    content = safetensors_bytes({"a": A, "b": B}, header=header)
    with pytest.raises(ValueError) as error:  # noqa: PT011  the sentence is checked below
        read(content)
    assert sentence in one_sentence(error)
    if "twice" not in sentence:  # what JSON readers keep of two equal names differs, so we are stricter there
        with pytest.raises((safetensors.SafetensorError, OverflowError, ValueError)):
            safetensors.deserialize(content)


@pytest.mark.parametrize("length", [0, 1, 100_000_001, 2**31, 2**63 - 1, 2**63, 2**64 - 1])
def test_an_impossible_header_length_is_refused(read, length):
    with pytest.raises(ValueError, match="not a safetensors file") as error:
        read(struct.pack("<Q", length) + b"{}")
    one_sentence(error)


def test_a_name_may_be_anything_and_breaks_no_message(read):
    header = json.dumps({'new\nline "\ud800': entry(offsets=[1, 25])})
    with pytest.raises(ValueError, match="leaves a gap") as error:
        read(safetensors_bytes({"a": A}, header=header))
    one_sentence(error).encode("utf-8")


def test_offsets_in_another_order_than_the_header_are_fine(read):
    header = {"b": entry("BF16", [4], [24, 32]), "a": entry()}
    tensors = read(safetensors_bytes({"a": A, "b": B}, header=header))
    assert list(tensors) == ["a", "b"]
    np.testing.assert_array_equal(tensors["b"].data, B)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 12\n", "Git LFS pointer"),
        (b"GGUF\x03\x00\x00\x00" + bytes(40), "GGUF"),
        (b"PK\x03\x04\x00\x00\x08\x08" + bytes(40), "pickled"),
        (b"<!DOCTYPE html><html>Access to model google/gemma-2b is restricted</html>", "web page"),
        (b'{"weight_map": {"model.norm.weight": "model.safetensors"}}', "JSON"),
        (b"Entry not found, really not", "a text file"),
        (bytes(5000), "not a safetensors file"),
    ],
)
def test_what_is_no_safetensors_file_is_called_what_it_is(read, content, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        read(content)
    one_sentence(error)


def test_a_header_whose_length_spells_an_impostor_is_read(read):
    header = '{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}'
    for length in b"<{":  # 60 bytes look like the start of a web page, 123 like JSON
        content = safetensors_bytes({"a": A}, header=header, padding=length)
        assert content[0] == length
        np.testing.assert_array_equal(read(content)["a"].data, A)


def test_a_missing_file_is_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist") as error:
        read_safetensors(tmp_path / "absent.safetensors")
    one_sentence(error)
    with pytest.raises(FileNotFoundError, match="is not a file"):
        read_safetensors(tmp_path)
