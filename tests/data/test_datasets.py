"""Blends and splits; datasets that are damaged, or made with another tokenizer, are refused."""

import pickle
import shutil
from pathlib import Path

import numpy
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from small_data import VOCAB, T, all_rows, build, null_dataset, null_tokenizer, question_answers

from megatron_ebft.data import dataset_files
from megatron_ebft.data.dataset_files import check_dataset


def test_damaged_datasets_are_refused(tmp_path):
    prefix = null_dataset(tmp_path, "qa", question_answers(20))

    def refuses(message, ending, change):
        path = Path(prefix + ending)
        whole = path.read_bytes()
        path.unlink() if change is None else path.write_bytes(change(whole))
        with pytest.raises(ValueError, match=message):
            build(tmp_path, [5, 0, 0], data_path=[prefix])
        path.write_bytes(whole)

    for mask in ("", "_answer_mask"):
        refuses(rf"--data-path .*{mask}.bin does not exist", mask + ".bin", None)
        refuses(rf"--data-path .*{mask}.idx does not exist", mask + ".idx", None)
        refuses(r".bin has \d+ bytes and its index counts \d+: it is trunc", mask + ".bin", lambda whole: whole[:-2])
        refuses(r".idx has \d+ bytes and should have \d+: it is truncated", mask + ".idx", lambda whole: whole[:-8])
        refuses(r".idx is truncated or no Megatron index", mask + ".idx", lambda whole: whole[:20])
        refuses(r".idx is truncated or no Megatron index", mask + ".idx", lambda whole: b"x" + whole[1:])
    for damaged in (b"{", b"[" * 100_000, b"[]"):
        refuses(r"text_document.json is not (a )?JSON", ".json", lambda whole: damaged)
    for damaged in (b"{}", b'{"tokenizer_fingerprint": 7, "tokenizer_type": "x"}'):
        refuses(r"text_document.json: not what tools/preprocess_data.py writes", ".json", lambda whole: damaged)
    assert len(check_dataset(prefix)) == 20

    other = null_dataset(tmp_path, "other", question_answers(20, seed=1))
    for ending in (".bin", ".idx"):
        shutil.copy(other + "_answer_mask" + ending, prefix + "_answer_mask" + ending)
    with pytest.raises(ValueError, match="its answer mask .* has documents of other lengths"):
        check_dataset(prefix)
    IndexedDatasetBuilder(str(tmp_path / "none.bin"), numpy.uint16).finalize(str(tmp_path / "none.idx"))
    with pytest.raises(ValueError, match="--train-data-path .*none: the dataset is empty"):
        build(tmp_path, [5, 0, 0], train_data_path=[str(tmp_path / "none")])


def test_fields_of_the_index_are_checked(tmp_path, monkeypatch):
    prefix = null_dataset(tmp_path, "text", [range(i + 1) for i in range(20)])
    path, count = Path(prefix + ".idx"), 20
    whole = path.read_bytes()
    places = dict(lengths=(34, numpy.int32), pointers=(34 + 4 * count, numpy.int64),
                  bounds=(34 + 12 * count, numpy.int64))

    def refuses(message, field, *changes):
        start, dtype = places[field]
        damaged = bytearray(whole)
        values = numpy.frombuffer(damaged, dtype=dtype, offset=start)
        for place, change in changes:
            values[place] += change
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"--data-path {prefix}: {path} {message}"):
            check_dataset(prefix)

    monkeypatch.setattr(dataset_files, "PART", 7)  # an index is read in parts
    assert len(check_dataset(prefix)) == count
    refuses("has the length -1 for document 3", "lengths", (3, -6), (4, 6))  # the sum is right
    refuses("does not point to its documents one after the other", "lengths", (10, 1), (11, -1))
    refuses("does not point to its documents", "pointers", (14, 2))
    refuses("has bounds of documents in the wrong order", "bounds", (0, 1))
    refuses("has bounds of documents in the wrong order", "bounds", (8, -2))
    refuses("has documents of several sequences, as --split-sentences", "bounds", (7, -1))
    refuses("has bounds for 19 documents and lengths for 20", "bounds", (20, -1))
    damaged = bytearray(whole)
    damaged[17] = 7  # float32
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="is truncated or no Megatron index"):
        check_dataset(prefix)


class Marker:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_cached_indices_run_no_code(tmp_path, one_rank):
    """Megatron-Core unpickles a cached index that is no array."""
    prefix = null_dataset(tmp_path, "text", [range(20)] * 20)
    build(tmp_path, [8, 0, 0], data_path=[prefix, prefix])
    cached = sorted((tmp_path / "cache").glob("*.npy"))
    assert len(cached) == 5  # those of rows, and of the blend
    for path in cached:
        whole = path.read_bytes()
        for content in (pickle.dumps(Marker(tmp_path / "marker")), whole[:-1], b""):
            path.write_bytes(content)
            with pytest.raises(ValueError, match=f"^--data-cache-path: {path} is no whole array .*: remove it"):
                build(tmp_path, [8, 0, 0], data_path=[prefix, prefix])
        path.write_bytes(whole)
    assert build(tmp_path, [8, 0, 0], data_path=[prefix, prefix])[0] and not (tmp_path / "marker").exists()


@pytest.mark.parametrize("chunks, chunk, is_seen", [(128, 1 << 16, True), (2, 8, False)])
def test_ids_are_checked_in_a_sample_and_in_every_row(tmp_path, monkeypatch, chunks, chunk, is_seen):
    """Of a dataset that is larger than the sample, its beginning and its end are looked at."""
    monkeypatch.setattr(dataset_files, "CHUNKS", chunks)
    monkeypatch.setattr(dataset_files, "CHUNK", chunk)
    prefix = null_dataset(tmp_path, "text", [[7] * 6, [150], [7, 160], [8] * 40], "--no-append-eod")
    Path(prefix + ".json").unlink()
    build(tmp_path, [6, 0, 0], data_path=[prefix], split="1", tokenizer=null_tokenizer(161))
    message = f"{prefix}: document 2 .counted from 0. has the id 160, and this NullTokenizer has 160 ids"
    with pytest.raises(ValueError, match=f"^{'--data-path ' * is_seen}{message}"):
        all_rows(build(tmp_path, [6, 0, 0], data_path=[prefix], split="1", tokenizer=null_tokenizer(160))[0])


def test_another_tokenizer_is_refused(tmp_path, caplog):
    prefix = null_dataset(tmp_path, "text", [range(20)] * 4)
    with pytest.raises(ValueError, match="--tokenizer-model: .* was made with another tokenizer .*NullTokenizer"):
        build(tmp_path, [1, 0, 0], data_path=[prefix], tokenizer=null_tokenizer(VOCAB + 1))
    Path(prefix + ".json").unlink()  # as Megatron's own tool leaves it
    assert build(tmp_path, [1, 0, 0], data_path=[prefix], tokenizer=null_tokenizer(VOCAB + 1))[0] is not None
    assert "cannot tell whether the data were made with this NullTokenizer" in caplog.text


def test_blend_and_split(tmp_path):
    # Dataset i holds ids 20i .. 20i+19, a document holds one id: rows tell where they come from.
    prefixes = [null_dataset(tmp_path, str(i), [[20 * i + j % 20] * 15 for j in range(20 * (i + 1))]) for i in range(3)]
    eod = VOCAB - 1

    def sources(dataset):
        """Rows by dataset."""
        rows = all_rows(dataset)
        return torch.bincount(rows.masked_fill(rows == eod, 0).amax(1) // 20, minlength=3)

    def ids(dataset):
        return set(all_rows(dataset).flatten().tolist()) - {eod}

    train, valid, test = build(tmp_path, [60, 4, 4], data_path=prefixes[:1], split="80,10,10")
    assert [len(ids(dataset)) for dataset in (train, valid, test)] == [16, 2, 2]
    assert ids(train) | ids(valid) | ids(test) == set(range(20))  # each document in one split

    blend = ["1", prefixes[0], "3", prefixes[2]]
    train, valid, test = build(tmp_path, [80, 8, 0], data_path=blend, split="90,10")
    assert sources(train).tolist() == [20, 0, 60] and len(valid) == 8 and test is None
    again = build(tmp_path, [80, 8, 0], data_path=blend, split="90,10")[0]
    assert torch.equal(all_rows(again), all_rows(train))
    assert not torch.equal(all_rows(build(tmp_path, [80, 8, 0], data_path=blend, split="90,10", seed=1)[0]),
                           all_rows(train))

    train, valid, test = build(tmp_path, [None, 0, 0], data_path=prefixes, split="100,0,1")  # each once
    assert valid is None and test is None  # whatever its share
    assert sources(train).tolist() == [20 * 16 // T, 40 * 16 // T, 59 * 16 // T]

    train, valid, test = build(tmp_path, [10, None, 0], train_data_path=prefixes[:1], valid_data_path=prefixes[1:])
    assert sources(train)[1:].tolist() == [0, 0] and sources(valid).tolist() == [0, 80, 120] and test is None

    def refuses(message, sizes, **kwargs):
        with pytest.raises(ValueError, match=message):
            build(tmp_path, sizes, **kwargs)

    one = prefixes[:1]
    refuses("--data-path: no data", [1, 0, 0])
    refuses("--data-path: give either this or", [1, 0, 0], data_path=one, train_data_path=one)
    refuses("--split: divides --data-path", [1, 0, 0], split="1", train_data_path=one)
    refuses("--valid-data-path: 2 rows of it are needed", [1, 2, 0], train_data_path=one)
    refuses("--split 1,x: give up to three weights", [1, 0, 0], data_path=one, split="1,x")
    refuses("--split gives the valid split no share", [1, 2, 0], data_path=one, split="1")
    refuses("valid split has 0 of 20 documents and 0 tokens", [1, 2, 0], data_path=one, split="99,1")
    refuses("train split has 20 of 20 documents and 320 tokens, where at least 400", [None, 0, 0], data_path=one,
            split="1", seq_length=400)
    refuses("a weight before every prefix", [1, 0, 0], data_path=["1", prefixes[0], prefixes[1]])
    refuses("every weight must be above 0", [1, 0, 0], data_path=["1", prefixes[0], "0", prefixes[1]])
    refuses("weights need a number of train rows", [None, 0, 0], data_path=blend)
    refuses("500 rows of the train split are needed; .* give 240", [500, 0, 0], data_path=prefixes, split="1")
