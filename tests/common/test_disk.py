"""Files that are written aside: whole or not at all."""

import json
import os

import pytest

from megatron_ebft.common.disk import aside, write_json


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


def test_a_pipe_is_written_as_it_is():
    reader, writer = os.pipe()
    with aside(f"/dev/fd/{writer}") as file:
        write_json(file, {"é": 1})
    os.close(writer)
    with open(reader, encoding="utf-8") as file:
        assert json.load(file) == {"é": 1}
