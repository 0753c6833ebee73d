"""Tokenizers: text to ids and back, fingerprints, and what is refused."""

import json
import shutil
import sys

import pytest
import tokenizers
from megatron.core.datasets.indexed_dataset import IndexedDataset
from small_data import null_tokenizer, preprocess, train_hugging_face, train_sentencepiece, train_tokenizer, write_lines

from megatron_ebft.data.tokenizer import build_tokenizer


@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "HuggingFaceTokenizer"])
def test_tokenizer(kind, tmp_path):
    path = train_tokenizer(kind, tmp_path)
    tokenizer = build_tokenizer(kind, str(path))
    text = "the lazy fox"
    ids = tokenizer.tokenize(text)
    assert tokenizer.eod not in ids and max(ids) < tokenizer.vocab_size
    assert tokenizer.detokenize([-1, *ids, tokenizer.eod, tokenizer.vocab_size, 10**9]) == text

    padded = build_tokenizer(kind, str(path), 1000)
    assert padded.vocab_size == 1000 and padded.detokenize([*ids, 999]) == text
    with pytest.raises(ValueError, match="--vocab-size 10: "):
        build_tokenizer(kind, str(path), 10)

    # The fingerprint goes with what the tokenizer does, not with the place of its files.
    copy = tmp_path / "copy"
    (shutil.copytree if path.is_dir() else shutil.copy)(path, copy)
    assert build_tokenizer(kind, str(copy)).fingerprint == tokenizer.fingerprint == padded.fingerprint
    other = train_sentencepiece(tmp_path / "other.model", model_type="bpe") if path.is_file() else train_hugging_face(
        tmp_path / "other", 50, eos_token="<eos>")
    assert build_tokenizer(kind, str(other)).fingerprint != tokenizer.fingerprint


def sentencepiece_that_changes_nothing(path):
    return train_sentencepiece(path, model_type="bpe", normalization_rule_name="identity",
                               remove_extra_whitespaces=False)


def changed_hugging_face(folder, **parts):
    """A Hugging Face tokenizer with other parts in its tokenizer.json."""
    path = train_hugging_face(folder, eos_token="<eos>") / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | parts))
    return folder


SPACE = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
META = {"type": "Metaspace", "replacement": "Ġ", "prepend_scheme": "always", "split": True}
PAIRS = {  # how it is made; whether it puts a space before a text; whether decoding takes it away again
    "normalising SentencePiece": (train_sentencepiece, True, True),
    "SentencePiece": (sentencepiece_that_changes_nothing, True, True),
    "byte-level": (changed_hugging_face, False, True),
    "byte-level with a space": (lambda folder: changed_hugging_face(folder, pre_tokenizer=SPACE), True, False),
    "Metaspace": (lambda folder: changed_hugging_face(folder, pre_tokenizer=META, decoder=META), True, True),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_an_answer_continues_its_question(kind, tmp_path):
    """As what SentencePiece's dummy prefix does: "1+5=" and "6" must not become "1+5= 6"."""
    make, has_prefix, is_text = PAIRS[kind]
    path = make(tmp_path / "tokenizer")
    tokenizer = build_tokenizer("HuggingFaceTokenizer" if path.is_dir() else "SentencePieceTokenizer", str(path))
    space = "" if is_text else " "
    for question, answer in [("the lazy", "fox"), ("the lazy", " fox"), ("the la", "zy dog"), ("", "fox")]:
        question_ids, answer_ids, text = tokenizer.tokenize_pair(question, answer)
        assert tokenizer.decode(question_ids + answer_ids) == text
        assert text == space + question + answer
        if question and "normalising" not in kind:
            assert question_ids == tokenizer.tokenize(question)
            assert tokenizer.decode_continued(answer_ids) == answer
    separate = tokenizer.decode(tokenizer.tokenize("the lazy") + tokenizer.tokenize("fox"))
    assert separate == space + ("the lazy fox" if has_prefix else "the lazyfox")


def test_a_text_that_cannot_be_divided(tmp_path):
    """A tokenizer of whole words: the id that has characters of both belongs to the answer."""
    words = tokenizers.models.WordLevel({"<eos>": 0, "[UNK]": 1, "the": 2, "lazy": 3, "la": 4}, unk_token="[UNK]")
    model = tokenizers.Tokenizer(words)
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    train_hugging_face(tmp_path, eos_token="<eos>")
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = build_tokenizer("HuggingFaceTokenizer", str(tmp_path))
    assert tokenizer.tokenize_pair("the la", "zy") == ([2], [3], "the lazy")
    assert tokenizer.tokenize_pair("the", " lazy") == ([2], [3], "the lazy")


def test_the_id_before_a_text_is_the_tokenizers_choice(tmp_path):
    source = write_lines(tmp_path / "in.jsonl", [dict(q="the", a="dog")])
    template = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<eos>", "type_id": 0}},
                                                         {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                "special_tokens": {"<eos>": {"id": "<eos>", "ids": [0], "tokens": ["<eos>"]}}}
    adds = train_hugging_face(tmp_path / "adds", eos_token="<eos>", bos_token="<eos>")
    path = adds / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": template}))
    plain = train_hugging_face(tmp_path / "plain", eos_token="<eos>", bos_token="<eos>")
    model = train_sentencepiece(tmp_path / "m.model")
    for kind, path, flags, bos in (("HuggingFaceTokenizer", adds, (), 0), ("HuggingFaceTokenizer", plain, (), None),
                                   ("HuggingFaceTokenizer", adds, ("--no-prepend-bos",), None),
                                   ("SentencePieceTokenizer", model, (), None),
                                   ("SentencePieceTokenizer", model, ("--prepend-bos",), 1)):
        prefix = preprocess("--input", source, "--output-prefix", tmp_path / "out", "--question-key", "q",
                            "--answer-key", "a", "--tokenizer-type", kind, "--tokenizer-model", path, *flags)
        tokenizer, sidecar = build_tokenizer(kind, str(path)), json.loads(open(prefix + ".json").read())
        question, answer, _ = tokenizer.tokenize_pair("the", "dog")
        data, mask = IndexedDataset(prefix), IndexedDataset(prefix + "_answer_mask")
        ids = data[0].tolist()
        assert ids == [bos] * (bos is not None) + question + answer + [tokenizer.eod]
        assert mask[0].sum() == len(answer) + 1
        assert sidecar["prepend_bos"] == (bos is not None)
        assert tokenizer.detokenize(ids) == "thedog"
    nothing = train_hugging_face(tmp_path / "nothing", eos_token="<eos>")
    preprocess("--input", source, "--output-prefix", tmp_path / "out", "--json-keys", "q", "--tokenizer-type",
               "HuggingFaceTokenizer", "--tokenizer-model", nothing, "--prepend-bos", code=2)


DEEP = "[" * 100_000 + "]" * 100_000
BROKEN = {  # file: contents that no tokenizer of this version has
    "tokenizer.json": ["", "{}", "[]", DEEP, '{"version": "9.0", "model": {"type": "New"}}', lambda text: text[:200],
                       lambda text: text.replace('"BPE"', '"Later"'), lambda text: text.replace('"merges":', '"x":'),
                       lambda text: text.replace('"<eos>":0', '"<eos>":99999999999')],
    "tokenizer_config.json": ["[]", "{", DEEP, "{\"eos_token\": 7}", "{\"eos_token\": [1]}", '{"eos_token": {}}',
                              '{"tokenizer_class": "Later", "auto_map": {"AutoTokenizer": ["x.Later", null]}}',
                              '{"added_tokens_decoder": {"x": 1}, "eos_token": "<eos>"}'],
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_tokenizer_files_are_named(name, tmp_path):
    whole = train_hugging_face(tmp_path / "whole", eos_token="<eos>")
    for number, change in enumerate(BROKEN[name]):
        folder = shutil.copytree(whole, tmp_path / str(number))
        text = (whole / name).read_text().replace(": ", ":")
        (folder / name).write_text(change(text) if callable(change) else change)
        assert not callable(change) or change(text) != text, number
        with pytest.raises(ValueError, match=f"^--tokenizer-model {folder}: "):
            build_tokenizer("HuggingFaceTokenizer", str(folder))


def test_tokenizer_errors(tmp_path, monkeypatch):
    def refuses(message, *args):
        with pytest.raises(ValueError, match=message):
            build_tokenizer(*args)

    refuses("--tokenizer-type Word: choose from SentencePieceTokenizer", "Word", None)
    refuses("--tokenizer-model: SentencePieceTokenizer needs one", "SentencePieceTokenizer", None)
    refuses("--tokenizer-model .*no such file", "SentencePieceTokenizer", str(tmp_path / "none.model"))
    (tmp_path / "junk.model").write_bytes(b"junk")
    refuses("not a sentencepiece model", "SentencePieceTokenizer", str(tmp_path / "junk.model"))
    whole = train_sentencepiece(tmp_path / "whole.model").read_bytes()
    for cut in (1, 100, len(whole) - 1):
        (tmp_path / "junk.model").write_bytes(whole[:cut])
        refuses("--tokenizer-model .*junk.model", "SentencePieceTokenizer", str(tmp_path / "junk.model"))
    without_eos = train_sentencepiece(tmp_path / "no_eos.model", eos_id=-1)
    refuses("no eos id.*--eos_id=2", "SentencePieceTokenizer", str(without_eos))
    refuses("--tokenizer-model .*no such folder", "HuggingFaceTokenizer", str(tmp_path / "none"))
    refuses("reads no tokenizer there", "HuggingFaceTokenizer", str(tmp_path))
    refuses("no eos token.*tokenizer_config.json", "HuggingFaceTokenizer", str(train_hugging_face(tmp_path / "no_eos")))
    refuses("--vocab-size: NullTokenizer needs one", "NullTokenizer", None)
    refuses("leave the flag out", "NullTokenizer", "model", 10)
    with pytest.raises(ValueError, match="--vocab-size 10: the text holds ids from 3 to 10"):
        null_tokenizer(10).tokenize("3 10")
    monkeypatch.setitem(sys.modules, "transformers", None)
    refuses("pip install transformers", "HuggingFaceTokenizer", str(tmp_path))
