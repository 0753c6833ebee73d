"""Checks the files of Megatron's indexed datasets before anything is built from them.

Every rank makes the same checks: a rank that raised alone would leave the others waiting.
"""

import hashlib
import logging
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset
from megatron.core.utils import log_single_rank

from megatron_ebft.common.disk import is_regular, read_json
from megatron_ebft.data.rows import ANSWER_MASK_SUFFIX, first_unknown, unknown_id
from megatron_ebft.data.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# The header of an .idx file: magic, version, dtype code, number of sequences, number of document bounds.
_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
_INTEGERS = [dtype.value for dtype in DType if dtype.name not in ("float64", "float32")]
PART = 1 << 20
"""Entries of an index that are read together."""
CHUNKS, CHUNK = 128, 1 << 16
"""Parts of a dataset that are looked at before a run, evenly spread, and tokens of each. A dataset that is not larger
is looked at as a whole. The ids of a row are checked whenever it is read."""


def check_dataset(prefix: str, flag: str = "--data-path") -> numpy.ndarray:
    """Check the index of a dataset and the sizes of its files; returns the lengths of its documents, int32 [documents].

    Raises:
        ValueError: a file is missing, truncated, empty or of the wrong kind, the index contradicts itself, or the
            answer mask does not fit the text; names the flag.
    """
    lengths = _checked_lengths(prefix, flag)
    mask = prefix + ANSWER_MASK_SUFFIX
    if os.path.exists(mask + ".idx") or os.path.exists(mask + ".bin"):
        if not numpy.array_equal(_checked_lengths(mask, flag), lengths):
            raise ValueError(f"{flag} {prefix}: its answer mask {mask} has documents of other lengths; make both "
                             "again with tools/preprocess_data.py")
    return lengths


def _checked_lengths(prefix: str, flag: str) -> numpy.ndarray:
    idx, binary = Path(prefix + ".idx"), Path(prefix + ".bin")
    for path in (idx, binary):
        if not path.is_file():
            raise ValueError(f"{flag} {prefix}: {path} does not exist; give the path without its ending, as "
                             "tools/preprocess_data.py wrote it")
    with open(idx, "rb") as file:
        head = file.read(_HEADER.size)
    magic, version, code, sequences, bounds = _HEADER.unpack(head) if len(head) == _HEADER.size else (b"", 0, 0, 0, 0)
    if magic != _MAGIC or version != 1 or code not in _INTEGERS:
        raise ValueError(f"{flag} {prefix}: {idx} is truncated or no Megatron index; make the dataset again")
    expected = _HEADER.size + sequences * (4 + 8) + bounds * 8  # lengths int32, pointers int64, bounds int64
    if idx.stat().st_size != expected:
        raise ValueError(f"{flag} {prefix}: {idx} has {idx.stat().st_size} bytes and should have {expected}: it is "
                         "truncated; copy it again or make the dataset again")
    lengths = numpy.fromfile(idx, dtype=numpy.int32, count=sequences, offset=_HEADER.size)
    _check_index(f"{flag} {prefix}: {idx}", idx, lengths, bounds, DType.size(code))
    tokens = int(lengths.sum(dtype=numpy.int64))
    expected = tokens * DType.size(code)
    if binary.stat().st_size != expected:
        raise ValueError(f"{flag} {prefix}: {binary} has {binary.stat().st_size} bytes and its index counts "
                         f"{expected}: it is truncated or belongs to another index; copy or make both again")
    if tokens == 0:
        raise ValueError(f"{flag} {prefix}: the dataset is empty; leave it out")
    return lengths


def _check_index(what: str, idx: Path, lengths: numpy.ndarray, bounds: int, size: int) -> None:
    """Check that the lengths, the pointers into the .bin file and the bounds of documents go together.

    Parts of the index are read one after the other, since an index may not fit into memory.
    """
    if len(lengths) and lengths.min() < 0:
        raise ValueError(f"{what} has the length {lengths.min()} for document {lengths.argmin()} (counted from 0): it "
                         "is damaged; copy it again or make the dataset again")
    if bounds == 0:
        raise ValueError(f"{what} has no bounds of documents: it is damaged; make the dataset again")
    first, pointer = _HEADER.size + lengths.nbytes, 0
    for begin in range(0, len(lengths), PART):
        part = lengths[begin:begin + PART].astype(numpy.int64) * size
        stored = numpy.fromfile(idx, dtype=numpy.int64, count=len(part), offset=first + 8 * begin)
        expected = numpy.append(0, part.cumsum()[:-1]) + pointer
        if not numpy.array_equal(stored, expected):
            raise ValueError(f"{what} does not point to its documents one after the other: it is damaged; copy it "
                             "again or make the dataset again")
        pointer += int(part.sum())
    last, first = 0, first + 8 * len(lengths)
    for begin in range(0, bounds, PART):
        part = numpy.fromfile(idx, dtype=numpy.int64, count=min(bounds - begin, PART), offset=first + 8 * begin)
        steps = numpy.diff(part, prepend=last)
        if steps.min() < 0 or (begin == 0 and part[0] != 0):
            raise ValueError(f"{what} has bounds of documents in the wrong order: it is damaged; copy it again or make "
                             "the dataset again")
        if steps.max() > 1:
            raise ValueError(f"{what} has documents of several sequences, as --split-sentences makes them; rows would "
                             "take the sentences apart: make the dataset again without it")
        last = int(part[-1])
    if last != len(lengths):
        raise ValueError(f"{what} has bounds for {last} documents and lengths for {len(lengths)}: it is damaged; copy "
                         "it again or make the dataset again")


def check_ids(prefix: str, flag: str, lengths: numpy.ndarray, tokenizer: Tokenizer) -> None:
    """Check a bounded sample of a dataset's ids.

    Args:
        lengths: what `check_dataset` returned.

    Raises:
        ValueError: the tokenizer does not know an id; names the flag, the document and the id.
    """
    for begin, tokens in _sample(prefix):
        place = first_unknown(tokens, tokenizer.vocab_size)
        if place is not None:
            ends = lengths.cumsum(dtype=numpy.int64)
            document = int(numpy.searchsorted(ends, begin + place, side="right"))
            raise ValueError(f"{flag} {unknown_id(prefix, document, tokens[place], tokenizer)}")


def _sample(prefix: str) -> Iterator[tuple[int, numpy.ndarray]]:
    """Parts of a dataset's ids, each with the place of its first id."""
    with open(prefix + ".idx", "rb") as file:
        code = _HEADER.unpack(file.read(_HEADER.size))[2]
    tokens = numpy.memmap(prefix + ".bin", dtype=DType.dtype_from_code(code), mode="r")
    begins = numpy.linspace(0, max(len(tokens) - CHUNK, 0), CHUNKS, dtype=numpy.int64)
    if len(tokens) <= CHUNKS * CHUNK:
        begins = numpy.arange(0, len(tokens), CHUNK)
    for begin in begins.tolist():
        yield begin, tokens[begin:begin + CHUNK]


def content_hash(prefix: str) -> str:
    """A hash of a dataset: the lengths of its documents, and a bounded sample of its ids and of its answer mask."""
    digest = hashlib.sha256()
    for path in (prefix, prefix + ANSWER_MASK_SUFFIX):
        if IndexedDataset.exists(path):
            with open(path + ".idx", "rb") as file:
                head = file.read(_HEADER.size)
            digest.update(head)
            digest.update(numpy.memmap(path + ".idx", dtype=numpy.int32, mode="r", offset=_HEADER.size,
                                       shape=_HEADER.unpack(head)[3]))
            for _, tokens in _sample(path):
                digest.update(tokens)
    return digest.hexdigest()[:16]


def _sidecar(prefix: str) -> dict:
    """Content of `<prefix>.json`; empty if there is no such file (Megatron's own tool writes none)."""
    path = prefix + ".json"
    if not is_regular(path):
        return {}
    sidecar = read_json(path)
    if not all(isinstance(sidecar.get(key), str) for key in ("tokenizer_fingerprint", "tokenizer_type")):
        raise ValueError(f"{path}: not what tools/preprocess_data.py writes; make the dataset again, or remove the "
                         "file if you know that --tokenizer-model is right")
    return sidecar


def check_cached(folder: str) -> None:
    """Check that the cached indices in a folder are whole arrays.

    Megatron-Core unpickles a file that is none, which may run any code.

    Raises:
        ValueError: one is none; names it.
    """
    for path in sorted(Path(folder).rglob("*_index.npy")):
        try:
            array = numpy.lib.format.open_memmap(path, mode="r")  # reads no pickles
            del array
        except (OSError, ValueError, SyntaxError, RecursionError, MemoryError) as error:
            raise ValueError(f"--data-cache-path: {path} is no whole array ({error}): remove it, and it will be made "
                             "again, or wait if another run is writing it") from error


def check_answers(prefix: str, flag: str) -> None:
    """ValueError, naming the flag, unless a dataset has an answer mask."""
    if not IndexedDataset.exists(prefix + ANSWER_MASK_SUFFIX):
        raise ValueError(f"--ebft-answer-only: {flag} {prefix} has no answer mask; make it with "
                         "tools/preprocess_data.py --messages-key, or --question-key and --answer-key, or leave the "
                         "flag out")


def check_tokenizer(prefixes: Sequence[str], tokenizer: Tokenizer) -> None:
    """Compare the tokenizer with the one in the `<prefix>.json` of each dataset.

    A dataset without that file (Megatron's own tool writes none) causes a warning.

    Raises:
        ValueError: the fingerprints differ or the file cannot be read; names --tokenizer-model.
    """
    for prefix in prefixes:
        made_with = _sidecar(prefix)
        if not made_with:
            log_single_rank(logger, logging.WARNING, f"{prefix}.json does not exist: cannot tell whether the data were "
                                                     f"made with this {tokenizer.name}")
            continue
        fingerprint = made_with["tokenizer_fingerprint"]
        if fingerprint != tokenizer.fingerprint:
            raise ValueError(f"--tokenizer-model: {prefix} was made with another tokenizer ({prefix}.json says "
                             f"{made_with['tokenizer_type']} {fingerprint[:12]}, this is {tokenizer.name} "
                             f"{tokenizer.fingerprint[:12]}); give that one, or make the dataset again with this one")
