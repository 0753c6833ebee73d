"""Formats of input: the same records make the same dataset, and files that are none are refused by name."""

import gzip
import json
import re
import sys

import numpy
import pyarrow
import pytest
import tables
from pyarrow import parquet
from small_data import VOCAB, preprocess, read_documents

from megatron_ebft.data import json_lines

RECORDS = [dict(q=f"{i} {i + 1}", a="7 " * (i % 5), unused=[dict(x="y" * 50)], tests=[i]) for i in range(100)]


def make(folder, *inputs, workers=1, code=0):
    prefix = preprocess("--input", *inputs, "--output-prefix", folder / "out", "--question-key", "q", "--answer-key",
                        "a", "--questions-output", folder / "q.jsonl", "--keep-keys", "tests", "--tokenizer-type",
                        "NullTokenizer", "--vocab-size", VOCAB, "--workers", workers, code=code)
    return [open(path, "rb").read() for path in (prefix + ".bin", prefix + ".idx", prefix + "_answer_mask.bin",
                                                 folder / "q.jsonl")] if code == 0 else None


def lines(records) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def write_parquet(path, records):
    parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=30)


def write_arrow(path, records, new=pyarrow.ipc.new_stream):
    table = pyarrow.Table.from_pylist(records)
    with pyarrow.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=40)


def save_to_disk(folder, records):
    """As `datasets` does, in two files."""
    folder.mkdir()
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for name, part in zip(names, (records[:60], records[60:])):
        write_arrow(folder / name, part)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")


WRITERS = {
    "Parquet": write_parquet, "Arrow stream": write_arrow, "datasets folder": save_to_disk,
    "Arrow file": lambda path, records: write_arrow(path, records, pyarrow.ipc.new_file),
    "gzip": lambda path, records: path.write_bytes(gzip.compress(lines(records)))}


@pytest.mark.parametrize("workers", [1, 2])
def test_all_formats_make_the_same_dataset(tmp_path, monkeypatch, capsys, workers):
    """Whatever the file's name."""
    monkeypatch.setattr(json_lines, "BATCH_BYTES", 500)  # many batches
    (tmp_path / "in.jsonl").write_bytes(lines(RECORDS))
    expected = make(tmp_path, tmp_path / "in.jsonl")
    assert "20 empty answers left out" in capsys.readouterr().out
    for number, write in enumerate(WRITERS.values()):
        write(tmp_path / f"{number}.part", RECORDS)
        assert make(tmp_path, tmp_path / f"{number}.part", workers=workers) == expected


def test_several_files_and_globs(tmp_path):
    """In the order of the flag; a glob's by name."""
    (tmp_path / "all.jsonl").write_bytes(lines(RECORDS))
    expected = make(tmp_path, tmp_path / "all.jsonl")
    write_parquet(tmp_path / "first", RECORDS[:10])
    for name, part in (("b", RECORDS[40:]), ("a", RECORDS[10:40])):
        (tmp_path / f"{name}.json.gz").write_bytes(gzip.compress(lines(part)))
    assert make(tmp_path, tmp_path / "first", tmp_path / "*.json.gz") == expected
    (tmp_path / "a[0].jsonl").write_bytes(lines(RECORDS))  # a name that looks like a glob
    assert make(tmp_path, tmp_path / "a[0].jsonl") == expected


@pytest.mark.parametrize("kind", ["Parquet", "Arrow stream", "Arrow file"])
def test_batches_are_small(tmp_path, monkeypatch, kind):
    """A part of a row group or record batch, and what is sent of it holds no more than its rows and keys."""
    records = [dict(text="x" * 1000, other="y" * 9000) for _ in range(400)]
    WRITERS[kind](tmp_path / "in", records)
    monkeypatch.setattr(json_lines, "BATCH_BYTES", 20_000)
    batches = list(tables.read_tables(str(tmp_path / "in"), ["text"]))
    assert max(len(batch.content) for batch in batches) < 25_000
    assert [fields for batch in batches for _, fields in batch.records()] == [dict(text="x" * 1000)] * 400
    assert [batch.first_row for batch in batches] == numpy.cumsum(
        [1] + [len(list(batch.records())) for batch in batches[:-1]]).tolist()
    assert sum(batch.num_bytes for batch in batches) == pytest.approx((tmp_path / "in").stat().st_size, rel=1e-5)


def cut(folder, write):
    write(folder / "in", RECORDS)
    (folder / "in").write_bytes((folder / "in").read_bytes()[:-3000])


def unknown_column(folder):
    write_parquet(folder / "in", [dict(q="1", answer="2", tests=[])])


def another_type(folder):
    write_parquet(folder / "in", [dict(q=1, a="2", tests=[])])


def bytes_beside_a_question(folder):
    write_parquet(folder / "in", [dict(q="1", a="2", tests=b"\0")])


def splits(folder):
    (folder / "in").mkdir()
    (folder / "in" / "dataset_dict.json").write_text("{}")


def plain_folder(folder):
    (folder / "in").mkdir()


def selection(folder):
    save_to_disk(folder / "in", RECORDS)
    state = json.loads((folder / "in" / "state.json").read_text())
    (folder / "in" / "state.json").write_text(json.dumps(state | {"_indices_data_files": [{"filename": "i.arrow"}]}))


def outside(folder):
    (folder / "in").mkdir()
    (folder / "in" / "state.json").write_text('{"_data_files": [{"filename": "../x.arrow"}]}')


REFUSED = {
    "cut Parquet": (lambda folder: cut(folder, write_parquet), "--input .*in: is damaged, or no whole Parquet"),
    "cut Arrow": (lambda folder: cut(folder, write_arrow), "--input .*in: is damaged, or no whole Parquet or Arrow"),
    "unknown column": (unknown_column, "--input .*in: no column 'a'; it has 'q', 'answer', 'tests'"),
    "another type": (another_type, "in:1: 'q' is not a text"),
    "bytes beside a question": (bytes_beside_a_question, "in:1: --keep-keys tests: .*keep texts, numbers and lists"),
    "splits": (splits, "--input .*in: holds several splits; name one, such as .*in/train"),
    "plain folder": (plain_folder, "--input .*in: is a folder, but not one .*no state.json in it.*files, such as"),
    "selection": (selection, "--input .*in: holds a selection of rows as indices; .*flatten_indices"),
    "outside": (outside, "--input .*in: its state.json names no data files of the folder"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(tmp_path, capsys, kind):
    write, message = REFUSED[kind]
    write(tmp_path)
    make(tmp_path, tmp_path / "in", code=2)
    assert re.search(f"^error: .*{message}", capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_globs_without_a_match_and_tables_without_pyarrow(tmp_path, capsys, monkeypatch):
    make(tmp_path, tmp_path / "*.jsonl", code=2)
    assert re.search(r"--input .*\*.jsonl: no file matches", capsys.readouterr().err)
    write_parquet(tmp_path / "in", RECORDS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    make(tmp_path, tmp_path / "in", code=2)
    assert re.search("--input .*in: is Parquet: pip install pyarrow", capsys.readouterr().err)


def test_null_is_an_empty_text(tmp_path):
    write_parquet(tmp_path / "in", [dict(q=None, a="1", tests=[]), dict(q="2", a=None, tests=[])])
    make(tmp_path, tmp_path / "in")
    assert read_documents(tmp_path / "out_text_document") == [[1, VOCAB - 1]]
