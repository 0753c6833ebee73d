"""The files that --input names, whatever their format, and their records in batches.

1. A value is a file, a glob, or a folder that `datasets` saved (save_to_disk), whose Arrow files are read in its order.
2. The first bytes of a file tell its format, whatever its name: JSON Lines, plain or compressed by gzip or Zstandard;
   Parquet; Arrow.
"""

import glob
import os
from collections.abc import Iterator

from tables import TableBatch, read_tables, table_format

from megatron_ebft.common.disk import is_inside, read_json
from megatron_ebft.data.json_lines import Batch, read_batches


def find_files(values: list[str]) -> list[str]:
    """The files that --input names, in order; a glob's are sorted by name.

    Raises:
        ValueError: a file is missing or empty, a glob matches nothing, or a folder is none that `datasets` saved.
    """
    paths = []
    for value in values:
        matches = [value]
        if not os.path.exists(value) and any(character in value for character in "*?["):
            matches = sorted(glob.glob(value, recursive=True))
            if not matches:
                raise ValueError(f"--input {value}: no file matches")
        for path in matches:
            paths += _files_of_folder(path) if os.path.isdir(path) else [path]
    for path in paths:
        if not os.path.isfile(path):
            raise ValueError(f"--input {path}: no such file")
        if os.path.getsize(path) == 0:
            raise ValueError(f"--input {path}: the file is empty")
    return paths


def _files_of_folder(folder: str) -> list[str]:
    """The Arrow files of a folder that `datasets` saved."""
    flag, state = f"--input {folder}", os.path.join(folder, "state.json")
    splits = os.path.join(folder, "dataset_dict.json")
    if os.path.isfile(splits):
        raise ValueError(f"{flag}: holds several splits; name one, such as {os.path.join(folder, 'train')}")
    if not os.path.isfile(state):
        raise ValueError(f"{flag}: is a folder, but not one that `datasets` saved (no state.json in it); name its "
                         f"files, such as '{os.path.join(folder, '*.jsonl')}'")
    content = read_json(state, flag)
    if content.get("_indices_data_files"):
        raise ValueError(f"{flag}: holds a selection of rows as indices; load it with `datasets`, call "
                         "flatten_indices(), and save it again")
    try:
        names = [entry["filename"] for entry in content["_data_files"]]
    except (KeyError, TypeError):
        names = []
    if not names or not all(isinstance(name, str) and is_inside(name) for name in names):
        raise ValueError(f"{flag}: its state.json names no data files of the folder; save it again")
    return [os.path.join(folder, name) for name in names]


def read_records(paths: list[str], keys: list[str]) -> Iterator[Batch | TableBatch]:
    """The records of the files, in order.

    Args:
        keys: the only columns that are read of Parquet and Arrow files.

    Raises:
        ValueError: a file has another format or is damaged, or lacks a column; names it.
        OSError: a file cannot be read.
    """
    for path in paths:
        yield from read_tables(path, keys) if table_format(path) else read_batches([path], "--input")
