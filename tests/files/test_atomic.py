"""Files and folders appear whole or not at all, whatever goes wrong on the way."""

import errno
from pathlib import Path

import pytest

from refgemma.files.atomic import check_file_place, check_folder_place, whole_file, whole_folder
from tests.checkpoint.files import one_sentence

ERRORS = [ValueError("a reason"), KeyboardInterrupt(), SystemExit(3)]


def names_in(folder):
    return [path.name for path in folder.iterdir()]


def test_a_file_is_replaced_at_the_end_only(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with whole_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert names_in(tmp_path) == ["x"]


@pytest.mark.parametrize("error", ERRORS)
def test_an_error_or_an_interruption_changes_nothing(tmp_path, error):
    path = tmp_path / "x"
    path.write_bytes(b"old")

    def write_half_a_file():
        with whole_file(path) as file:
            file.write(b"half")
            raise error

    def fill_half_a_folder():
        with whole_folder(tmp_path / "folder") as folder:
            (folder / "half").write_bytes(b"half")
            raise error

    for fail in (write_half_a_file, fill_half_a_folder):
        with pytest.raises(type(error)) as raised:
            fail()
        assert raised.value is error
    assert names_in(tmp_path) == ["x"]
    assert path.read_bytes() == b"old"


def test_a_link_stays_and_its_file_is_replaced(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with whole_file(tmp_path / "link") as file:
        file.write(b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


def test_devices_are_written_to_only_when_allowed(tmp_path):
    with whole_file("/dev/null", devices=True) as file:
        file.write(b"gone")
    for devices in (False, True):
        (tmp_path / "folder").mkdir(exist_ok=True)
        with pytest.raises(OSError, match=r"is a directory$"), whole_file(tmp_path / "folder", devices=devices):
            pytest.fail("opened")
    with pytest.raises(OSError, match="is a device or a pipe: expected the name of a file"), whole_file("/dev/null"):
        pytest.fail("opened")
    assert not Path("/dev/null").is_file()


def test_places_are_refused_before_the_work(tmp_path):
    with pytest.raises(OSError, match=r"no such folder$") as error:
        check_file_place(tmp_path / "absent" / "x")
    one_sentence(error)
    with pytest.raises(FileExistsError, match="exists: expected the name of a folder to make"):
        check_folder_place(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        check_folder_place(tmp_path / "absent" / "x")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    with pytest.raises(FileExistsError, match="exists"):
        check_folder_place(tmp_path / "dangling")


def test_a_folder_that_appears_meanwhile_is_left_alone(tmp_path):
    place = tmp_path / "folder"

    def make_it_twice():
        with whole_folder(place) as folder:
            (folder / "half").touch()
            place.mkdir()

    with pytest.raises(FileExistsError, match="exists"):
        make_it_twice()
    assert names_in(tmp_path) == ["folder"]
    assert names_in(place) == []


def test_a_full_disk_is_a_sentence_and_other_errors_are_not_blamed_on_the_file(tmp_path):
    full, other = OSError(errno.ENOSPC, "No space left on device"), ConnectionResetError(errno.ECONNRESET, "reset")
    with pytest.raises(OSError, match=r"^cannot write .*x: no space left on device; nothing was written$") as error:
        raise_inside(whole_file(tmp_path / "x"), full)
    one_sentence(error)
    for place in (whole_file(tmp_path / "x"), whole_folder(tmp_path / "x")):
        with pytest.raises(ConnectionResetError):
            raise_inside(place, other)
    assert names_in(tmp_path) == []


def raise_inside(place, error):
    with place:
        raise error
