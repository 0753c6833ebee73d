"""Files that are written aside: whole or not at all."""

import os

import pytest

from megatron_ebft.common.disk import aside


def test_a_file_appears_whole(tmp_path):
    path = tmp_path / "picture.png"
    path.write_text("old")
    with pytest.raises(OSError, match="no room"), aside(path) as file:
        file.write_text("half")
        assert file.suffix == ".png" and path.read_text() == "old"
        raise OSError("no room")
    assert path.read_text() == "old" and os.listdir(tmp_path) == [path.name]
    with aside(f"{path}") as file:
        file.write_text("new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == [path.name]


def test_a_device_is_written_as_it_is():
    with aside("/dev/null") as file:
        assert f"{file}" == "/dev/null"
        file.write_text("nothing")
