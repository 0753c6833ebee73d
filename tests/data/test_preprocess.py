"""tools/preprocess_data.py: the same output for any number of workers, several keys, and what is refused."""

import gzip
import os
import re
import signal
import sys

import documents
import numpy
import preprocess_data
import pytest
import zstandard
from megatron.core.datasets.indexed_dataset import IndexedDataset
from small_data import VOCAB, preprocess, sentences, train_sentencepiece, train_tokenizer, write_lines

from megatron_ebft.data import json_lines
from megatron_ebft.data.tokenizer import build_tokenizer


def test_output_does_not_depend_on_workers(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(json_lines, "BATCH_BYTES", 300)  # many batches
    texts = sentences(400)
    inputs = [write_lines(tmp_path / f"{i}.jsonl", [dict(q=q, a=a) for q, a in zip(texts[i::4], texts[i + 2::4])])
              for i in range(2)]
    model, outputs = train_sentencepiece(tmp_path / "m.model"), []
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        preprocess("--input", *inputs, "--output-prefix", folder / "out", "--question-key", "q", "--answer-key", "a",
                   "--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", model,
                   "--workers", workers, "--log-interval", 50)
        outputs.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert outputs[0] == outputs[1]
    name = "out_text_document"  # these files, and no temporary one
    assert set(outputs[0]) == {name + end for end in (".bin", ".idx", ".json", "_answer_mask.bin", "_answer_mask.idx")}
    assert "documents/s" in capsys.readouterr().out


BAD_INPUT = {
    "missing": (None, "--input .*in.jsonl: no such file"),
    "empty": (b"", "--input .*in.jsonl: the file is empty"),
    "JSON": (b'{"text": "1"}\n\n{"text": \n', r"in.jsonl:3: Expecting value"),
    "UTF-8": (b'{"text": "1"}\n{"text": "\xff"}\n', r"in.jsonl:2: 'utf-8' codec"),
    "surrogate": (b'{"text": "\\ud800"}\n', r"in.jsonl:1: 'utf-8' codec.*surrogates"),
    "key": (b'{"text": "1"}\n{"body": "1"}\n', r"in.jsonl:2: no key 'text'; the line has 'body'"),
    "type": (b'{"text": 1}\n', r"in.jsonl:1: 'text' is not a text"),
    "array": (b'[{"text": "1"}]\n', r"in.jsonl:1: not a JSON object.*`jq -c '.\[\]'` makes lines"),
    "array on lines": (b'[\n{"text": "1"},\n', r"in.jsonl:1: .*a whole JSON object must be on each line; `jq -c"),
    "object on lines": (b'{\n"text": "1"\n}\n', r"in.jsonl:1: .*a whole JSON object must be on each line; `jq -c"),
    "number": (b'7\n', r"in.jsonl:1: not a JSON object, {...}"),
    "nesting": (b'{"text": "1", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", "in.jsonl:1: nested too deeply"),
    "gzip": (gzip.compress(b'{"text": "1"}\n' * 9999)[:-20], "--input .*in.jsonl: is damaged"),
    "ZIP": (b"PK\3\4\0\0", "--input .*in.jsonl: is a ZIP archive; give JSON Lines, plain or compressed by gzip or Z"),
    "UTF-16": ('{"text": "1"}\n'.encode("utf-16"), "--input .*in.jsonl: is text in UTF-16"),
    "id": (b'{"text": "200"}\n', r"in.jsonl:1: --vocab-size 200"),
    "texts": (b'{"text": ""}\n', r"no documents for .*out_text_document \(1 empty texts\)"),
}


@pytest.mark.parametrize("content, message", BAD_INPUT.values(), ids=BAD_INPUT)
@pytest.mark.parametrize("workers", [1, 2])
def test_bad_input_is_refused(tmp_path, capsys, monkeypatch, content, message, workers):
    monkeypatch.setattr(json_lines, "BATCH_BYTES", 1)  # a line is a batch
    if content is not None:
        (tmp_path / "in.jsonl").write_bytes(content)
    preprocess("--input", tmp_path / "in.jsonl", "--output-prefix", tmp_path / "out", "--tokenizer-type",
               "NullTokenizer", "--vocab-size", VOCAB, "--workers", workers, code=2)
    error = capsys.readouterr().err
    assert re.fullmatch(f"error: .*{message}.*\n", error)
    assert [path.name for path in tmp_path.iterdir()] == ([] if content is None else ["in.jsonl"])  # nothing half made


def test_compressed_input_makes_the_same_dataset(tmp_path, monkeypatch):
    """Whatever the file's name, and if it holds several compressed parts."""
    lines, made = [b'{"text": "%d %d"}\n' % (i, i + 1) for i in range(100)], []
    halves = b"".join(lines[:50]), b"".join(lines[50:])
    for compress in (bytes, gzip.compress, zstandard.compress):
        folder = tmp_path / str(len(made))
        folder.mkdir()
        (folder / "in.jsonl").write_bytes(b"".join(map(compress, halves)))
        prefix = preprocess("--input", folder / "in.jsonl", "--output-prefix", folder / "out", "--tokenizer-type",
                            "NullTokenizer", "--vocab-size", VOCAB)
        made.append([open(prefix + ending, "rb").read() for ending in (".bin", ".idx", ".json")])
    assert made[0] == made[1] == made[2] and IndexedDataset(prefix).sequence_lengths.tolist() == [3] * 100


def test_zstandard_without_its_package(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(json_lines, "ZstdFile", None)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "in.jsonl").write_bytes(b"\x28\xb5\x2f\xfd....")
    preprocess("--input", tmp_path / "in.jsonl", "--output-prefix", tmp_path / "out", "--tokenizer-type",
               "NullTokenizer", "--vocab-size", VOCAB, code=2)
    assert "in.jsonl: is compressed by Zstandard: pip install zstandard" in capsys.readouterr().err


def test_a_killed_worker_ends_with_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(preprocess_data, "_encode", lambda batch: os.kill(os.getpid(), signal.SIGKILL))
    monkeypatch.setattr(preprocess_data._encode, "__qualname__", "_encode")  # for pickle
    monkeypatch.setattr(preprocess_data._encode, "__module__", "preprocess_data")
    source = write_lines(tmp_path / "in.jsonl", [dict(text="1 2")])
    preprocess("--input", source, "--output-prefix", tmp_path / "out", "--tokenizer-type", "NullTokenizer",
               "--vocab-size", VOCAB, "--workers", 2, code=2)
    error = capsys.readouterr().err
    assert re.fullmatch(r"error: --workers 2: a worker process was killed while it read .*in.jsonl; .*\n", error)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "HuggingFaceTokenizer"])
def test_long_texts_are_tokenised_in_pieces(kind, tmp_path, monkeypatch, capsys):
    """With the ids of the whole text, if it has spaces to cut at."""
    text = " ".join(sentences(40))
    source = write_lines(tmp_path / "in.jsonl", [dict(q=text, a="  " + text), dict(q="", a=text)])
    path, made, seen = train_tokenizer(kind, tmp_path), [], []
    tokenize = build_tokenizer(kind, str(path)).__class__.tokenize
    for piece in (1 << 20, 100):
        monkeypatch.setattr(documents, "PIECE", piece)
        with monkeypatch.context() as patch:
            patch.setattr(f"megatron_ebft.data.tokenizer.{kind}.tokenize",
                          lambda self, text: (seen.append(len(text)), tokenize(self, text))[1])
            prefix = preprocess("--input", source, "--output-prefix", tmp_path / str(piece), "--question-key", "q",
                                "--answer-key", "a", "--tokenizer-type", kind, "--tokenizer-model", path)
        made.append([open(prefix + ending, "rb").read() for ending in (".bin", ".idx", "_answer_mask.bin")])
    assert max(seen[-30:]) <= 101 < max(seen)
    if kind == "HuggingFaceTokenizer":
        assert made[0] == made[1] and "warning" not in capsys.readouterr().out
    assert "".join(documents.pieces("x" * 250 + " y")) == "x" * 250 + " y"


def test_texts_that_a_tokenizer_changes_are_counted(tmp_path, capsys):
    source = write_lines(tmp_path / "in.jsonl", [dict(text=text) for text in ("the dog", "the  dog", "the dög")])
    preprocess("--input", source, "--output-prefix", tmp_path / "out", "--tokenizer-type", "SentencePieceTokenizer",
               "--tokenizer-model", train_tokenizer("SentencePieceTokenizer", tmp_path))
    assert (f"warning: 2 of 3 documents do not decode to their text. The first is {source}:2: 'the  dog' becomes 'the "
            "dog'") in capsys.readouterr().out


def test_bad_options_are_refused(tmp_path, capsys):
    source = write_lines(tmp_path / "in.jsonl", [dict(text="1", q="1", a="2")])
    common = ("--input", source, "--output-prefix", tmp_path / "out", "--tokenizer-type", "NullTokenizer",
              "--vocab-size", VOCAB)
    for flags, message in [(("--question-key", "q"), "--question-key and --answer-key: give both or neither"),
                           (("--question-key", "q", "--answer-key", "a", "--json-keys", "text"), "--json-keys: give"),
                           (("--workers", 0), "--workers 0: must be at least 1"),
                           (("--tokenizer-model", "x"), "--tokenizer-model: NullTokenizer has no model")]:
        preprocess(*common, *flags, code=2)
        assert message in capsys.readouterr().err


def test_several_keys_make_several_datasets(tmp_path):
    source = write_lines(tmp_path / "in.jsonl", [dict(text="1 2", more="3"), dict(text="4", more="")])
    preprocess("--input", source, "--output-prefix", tmp_path / "out", "--json-keys", "text", "more",
               "--tokenizer-type", "NullTokenizer", "--vocab-size", 70000, "--no-append-eod")
    text, more = (IndexedDataset(str(tmp_path / f"out_{key}_document")) for key in ("text", "more"))
    assert [list(text[i]) for i in range(len(text))] == [[1, 2], [4]] and [list(more[0])] == [[3]] and len(more) == 1
    assert text.index.dtype == numpy.int32  # more ids than 16 bits hold
