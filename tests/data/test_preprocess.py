"""tools/preprocess_data.py: the same output for any number of workers, several keys, and what is refused."""

import re

import numpy
import preprocess_data
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from small_data import VOCAB, preprocess, sentences, train_sentencepiece, write_lines


def test_output_does_not_depend_on_workers(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(preprocess_data, "BATCH_BYTES", 300)  # many batches
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
    "list": (b'["text"]\n', r"in.jsonl:1: not a JSON object"),
    "id": (b'{"text": "200"}\n', r"in.jsonl:1: --vocab-size 200"),
    "texts": (b'{"text": ""}\n', r"no documents for .*out_text_document \(1 empty texts\)"),
}


@pytest.mark.parametrize("content, message", BAD_INPUT.values(), ids=BAD_INPUT)
@pytest.mark.parametrize("workers", [1, 2])
def test_bad_input_is_refused(tmp_path, capsys, monkeypatch, content, message, workers):
    monkeypatch.setattr(preprocess_data, "BATCH_BYTES", 1)  # a line is a batch
    if content is not None:
        (tmp_path / "in.jsonl").write_bytes(content)
    preprocess("--input", tmp_path / "in.jsonl", "--output-prefix", tmp_path / "out", "--tokenizer-type",
               "NullTokenizer", "--vocab-size", VOCAB, "--workers", workers, code=2)
    error = capsys.readouterr().err
    assert re.fullmatch(f"error: .*{message}.*\n", error)
    assert [path.name for path in tmp_path.iterdir()] == ([] if content is None else ["in.jsonl"])  # nothing half made


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
