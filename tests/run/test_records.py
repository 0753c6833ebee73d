"""ebft.json with parts that are missing, of another type or of impossible sizes: each is refused by name, or changes
nothing."""

import copy
import json
import re
import zlib

import pytest
from small_run import MODEL, SMALL, save, start

from megatron_ebft.checkpointing.folders import MANIFEST, RECORD
from megatron_ebft.checkpointing.record import architecture_of, read_record
from megatron_ebft.hf.config import describe
from megatron_ebft.model.architecture import read_architecture
from megatron_ebft.run.flags import parse_args
from megatron_ebft.run.resume import (
    check_flags,
    check_origins,
    check_tokenizer,
    find_resume,
    progress,
    restore_architecture,
)

VALUES = (..., None, True, -5, 10**12, "x", [], {"a": 1})
"""What each part becomes; `...`: it is removed."""
EXPECTED = ("ebft.json|a checkpoint of format|weights are not those|trained with another tokenizer|holds weights alone|"
            "no supported family|initial weights depend|was saved by --training-mode|is at step .* already|"
            "was trained with ")


@pytest.fixture(scope="module")
def made(tmp_path_factory, data, one_rank):
    """A training checkpoint, its metadata and its arguments."""
    folder = tmp_path_factory.mktemp("records")
    run, _ = start(parse_args([*data, *MODEL, *SMALL, "--train-iters", "4", "--tensorboard-dir", str(folder / "x")]))
    save(run, folder)
    return folder / "iter_0000000", run


def parts(value, path=()):
    """Paths of everything in a record. Flags are one part: training compares them and reads no more."""
    yield path
    if isinstance(value, dict) and path[-1:] != ("arguments",):
        for key in value:
            yield from parts(value[key], (*path, key))


def put(record: dict, path: tuple, value) -> None:
    *parents, last = path
    for key in parents:
        record = record[key]
    record.pop(last) if value is ... else record.update({last: value})


def write(folder, text: str) -> None:
    """Write a record, with its checksum."""
    (folder / RECORD).write_text(text)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest[RECORD] = {"bytes": len(text.encode()), "crc32": f"{zlib.crc32(text.encode()):08x}"}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def read(folder, run, args) -> None:
    """All that training, conversion and replay do with a record."""
    args = copy.copy(args)
    assert find_resume(args) or args.pretrained_checkpoint
    restore_architecture(args, "--load", str(folder))
    saved, _ = progress(args, str(folder))
    check_tokenizer(saved, run.tokenizer, "--load")
    architecture = read_architecture(saved["architecture"], architecture_of(str(folder), "--load"))
    check_flags(saved, args, architecture)
    check_origins(saved, run.metadata, args)
    describe(architecture, "--load")


def test_parts_of_a_record(made, arguments):
    folder, run = made
    args = arguments("--load", str(folder), "--use-checkpoint-args")
    original, refused = json.loads((folder / RECORD).read_text()), 0
    read(folder, run, args)
    for path in filter(None, parts(original)):
        for value in VALUES:
            record = json.loads(json.dumps(original))
            put(record, path, value)
            write(folder, json.dumps(record))
            try:
                read(folder, run, args)
            except ValueError as error:
                assert re.match(f"--.*({EXPECTED})", str(error)), (path, value, error)
                refused += 1
    write(folder, json.dumps(original))
    assert refused > 300


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"a":' * 9999, "[" * 500 + "]" * 500, '{"format": 1e999}',
                                  '{"format": [4]}'])
def test_records_that_are_none(made, text):
    folder, _ = made
    before = (folder / RECORD).read_text()
    write(folder, text)
    with pytest.raises(ValueError, match=f"--load {folder}: .*(ebft.json|a checkpoint of format)"):
        read_record(str(folder), "--load")
    write(folder, before)


def test_the_longest_row_comes_from_the_checkpoint(made, arguments):
    """Otherwise the export would publish --seq-length."""
    folder, run = made
    record = json.loads((folder / RECORD).read_text())
    record["metadata"]["architecture"]["max_position_embeddings"] = 4096
    write(folder, json.dumps(record))
    for flags, expected in (([], 4096), (["--max-position-embeddings", "99"], 99)):
        args = arguments("--use-checkpoint-args", "--pretrained-checkpoint", str(folder), *flags)
        restore_architecture(args, "--pretrained-checkpoint", str(folder))
        assert args.max_position_embeddings == expected
