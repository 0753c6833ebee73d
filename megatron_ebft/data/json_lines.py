"""Reads JSON Lines in batches, plain or compressed by gzip or Zstandard. The first bytes of a file tell which."""

import contextlib
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_ebft.common.disk import is_regular, unreadable

BATCH_BYTES = 1 << 18
"""Input sent to a worker at a time. A longer line is sent alone."""
OTHER_FORMATS = {b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"PK\x03\x04": "a ZIP archive", b"PAR1": "Parquet",
                 b"ARROW1": "Arrow", b"\xff\xfe": "text in UTF-16", b"\xfe\xff": "text in UTF-16"}
"""By their first bytes."""


@dataclass
class Batch:
    """Consecutive lines of an input file."""

    path: str
    first_line: int
    """Number of the first line, counted from 1."""
    lines: list[bytes]
    num_bytes: int = 0
    """Bytes of the file that were read for them."""

    def records(self) -> Iterator[tuple[str, dict]]:
        """The JSON object of each line that is not blank, with its place, `file:line`.

        Raises:
            ValueError: a line is no JSON object; names the place.
        """
        for number, line in enumerate(self.lines, self.first_line):
            if not line.isspace():
                place = f"{self.path}:{number}"
                with named(place):
                    fields = parse_line(line)
                yield place, fields


@contextlib.contextmanager
def named(place: str):
    """A ValueError inside gets the place's name. JSON and Unicode errors are ValueErrors, too."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def read_batches(paths: list[str], flag: str = "--input") -> Iterator[Batch]:
    """The lines of the files, in order.

    Args:
        flag: that named them.

    Raises:
        ValueError: a file has another format or is damaged; names it.
        OSError: a file cannot be read.
    """
    for path in paths:
        batch, size, read = Batch(path, 1, []), 0, 0
        with open(path, "rb") as raw, _lines(path, raw, flag) as lines:
            for line in lines:
                batch.lines.append(line)
                size += len(line)
                if size >= BATCH_BYTES:
                    batch.num_bytes, read, size = raw.tell() - read, raw.tell(), 0
                    yield batch
                    batch = Batch(path, batch.first_line + len(batch.lines), [])
            batch.num_bytes = raw.tell() - read
        if batch.lines:
            yield batch


def read_objects(path: str, flag: str) -> list[tuple[str, dict]]:
    """All objects of a file, each behind its place (Batch.records).

    Raises:
        ValueError: the file cannot be read, or has no lines, or a line is no JSON object; names the flag and the place.
        OSError: a passing one (common/disk.py).
    """
    if not is_regular(path):
        raise ValueError(f"{flag} {path}: no such file")
    lines = []
    try:
        for batch in read_batches([path], flag):
            try:
                lines += batch.records()
            except ValueError as error:
                raise ValueError(f"{flag} {error}") from error
    except OSError as error:
        raise unreadable(error, f"{flag} {path}") from error
    if not lines:
        raise ValueError(f"{flag} {path}: has no lines")
    return lines


@contextlib.contextmanager
def _lines(path: str, raw: io.BufferedReader, flag: str):
    """The lines of an open file, decompressed."""
    head = raw.peek(8)
    for magic, name in OTHER_FORMATS.items():
        if head.startswith(magic):
            raise ValueError(f"{flag} {path}: is {name}; give JSON Lines, plain or compressed by gzip or Zstandard")
    try:
        if head.startswith(b"\x1f\x8b"):
            yield gzip.GzipFile(fileobj=raw)
        elif head.startswith(b"\x28\xb5\x2f\xfd"):
            yield _zstandard(path, raw, flag)
        else:
            yield raw
    except (EOFError, zlib.error, gzip.BadGzipFile, ZstdError) as error:
        raise ValueError(f"{flag} {path}: is damaged ({error}); copy or compress it again") from error


def parse_line(line: bytes) -> dict:
    """The JSON object of a line.

    Raises:
        ValueError: it is none.
    """
    try:
        fields = json.loads(line)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError as error:
        start = line[:16].strip()
        if start in (b"[", b"{") or start.startswith(b"[{"):
            raise ValueError(f"{error}: a whole JSON object must be on each line; `jq -c '.[]'` makes lines of a JSON "
                             "array, and `jq -c .` of objects that span lines") from error
        raise
    if not isinstance(fields, dict):
        hint = "; `jq -c '.[]'` makes lines of a JSON array" if isinstance(fields, list) else ""
        raise ValueError(f"not a JSON object, {{...}}{hint}")
    return fields


try:
    from compression.zstd import ZstdError, ZstdFile  # from Python 3.14 on
except ImportError:
    try:
        from zstandard import ZstdError
    except ImportError:
        class ZstdError(Exception):
            """Stands in for a package that is not installed."""
    ZstdFile = None


def _zstandard(path: str, raw: io.BufferedReader, flag: str) -> io.BufferedIOBase:
    if ZstdFile is not None:
        return ZstdFile(raw)
    try:
        import zstandard
    except ImportError as error:
        raise ValueError(f"{flag} {path}: is compressed by Zstandard: pip install zstandard, or decompress it"
                         ) from error
    return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True))
