"""Reads Parquet files and Arrow files, such as those of a `datasets` folder, in batches of rows, by pyarrow."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_ebft.data import json_lines

FORMATS = {b"PAR1": "Parquet", b"ARROW1": "an Arrow file", b"\xff\xff\xff\xff": "an Arrow stream"}
"""By their first bytes."""
PARQUET_ROWS = 1000
"""Rows that are decoded together."""


@dataclass
class TableBatch:
    """Consecutive rows of an input file."""

    path: str
    first_row: int
    """Number of the first row, counted from 1."""
    content: bytes
    """The rows as an Arrow stream, small enough to send to another process."""
    num_bytes: int
    """Bytes of the file that were read for them, about."""

    def records(self) -> Iterator[tuple[str, dict]]:
        """Each row as a dict, with its place, `file:row`."""
        import pyarrow

        with pyarrow.ipc.open_stream(self.content) as reader:
            for number, fields in enumerate(reader.read_all().to_pylist(), self.first_row):
                yield f"{self.path}:{number}", fields


def table_format(path: str) -> str:
    """What kind of table a file is, by its first bytes; "" if it is none."""
    with open(path, "rb") as file:
        head = file.read(8)
    return next((name for magic, name in FORMATS.items() if head.startswith(magic)), "")


def read_tables(path: str, columns: list[str]) -> Iterator[TableBatch]:
    """The rows of a file, with these columns alone.

    Only a part of the file is in memory at a time: of Parquet a row group, of Arrow a record batch.

    Raises:
        ValueError: pyarrow is not installed, a column is missing, or the file is damaged; names the file.
    """
    kind = table_format(path)
    try:
        import pyarrow
    except ImportError as error:
        raise ValueError(f"--input {path}: is {kind}: pip install pyarrow, or make JSON Lines of it") from error
    first, size, read = 1, os.path.getsize(path), 0
    try:
        with contextlib.closing(_parquet(path, columns) if kind == "Parquet" else _arrow(path, columns)) as parts:
            for rows, share in parts:
                step = max(1, rows.num_rows * json_lines.BATCH_BYTES // max(rows.nbytes, 1))
                for begin in range(0, rows.num_rows, step):
                    part, done = rows.slice(begin, step), round(size * share)
                    yield TableBatch(path, first, _as_stream(part), done - read)
                    first, read = first + part.num_rows, done
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"--input {path}: is damaged, or no whole Parquet or Arrow file ({error}); copy or make it "
                         "again") from error


def _parquet(path: str, columns: list[str]) -> Iterator[tuple]:
    """Record batches, each with the share of the file up to its end."""
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        _check_columns(path, file.schema_arrow.names, columns)
        done = 0
        for rows in file.iter_batches(PARQUET_ROWS, columns=columns, use_threads=False):  # workers are forked
            done += rows.num_rows
            yield rows, done / file.metadata.num_rows


def _arrow(path: str, columns: list[str]) -> Iterator[tuple]:
    """As `_parquet`, of an Arrow file or stream."""
    import pyarrow

    with pyarrow.memory_map(path) as source:
        if table_format(path) == "an Arrow stream":
            reader = pyarrow.ipc.open_stream(source)
            batches = ((batch, source.tell() / source.size()) for batch in reader)
        else:
            reader = pyarrow.ipc.open_file(source)
            number = reader.num_record_batches
            batches = ((reader.get_batch(i), (i + 1) / number) for i in range(number))
        _check_columns(path, reader.schema.names, columns)
        for batch, share in batches:
            yield batch.select(columns), share


def _as_stream(rows) -> bytes:
    """A record batch as an Arrow stream. Pickle would send the whole batch that it is a slice of."""
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_batch(rows)
    return sink.getvalue().to_pybytes()


def _check_columns(path: str, there: list[str], columns: list[str]) -> None:
    for column in columns:
        if column not in there:
            raise ValueError(f"--input {path}: no column {column!r}; it has {', '.join(map(repr, there))}")
