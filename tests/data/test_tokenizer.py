"""Tokenizers: text to ids and back, fingerprints, and what is refused."""

import shutil
import sys

import pytest
from small_data import null_tokenizer, train_hugging_face, train_sentencepiece, train_tokenizer

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


def test_tokenizer_errors(tmp_path, monkeypatch):
    def refuses(message, *args):
        with pytest.raises(ValueError, match=message):
            build_tokenizer(*args)

    refuses("--tokenizer-type Word: choose from SentencePieceTokenizer", "Word", None)
    refuses("--tokenizer-model: SentencePieceTokenizer needs one", "SentencePieceTokenizer", None)
    refuses("--tokenizer-model .*no such file", "SentencePieceTokenizer", str(tmp_path / "none.model"))
    (tmp_path / "junk.model").write_bytes(b"junk")
    refuses("not a sentencepiece model", "SentencePieceTokenizer", str(tmp_path / "junk.model"))
    without_eos = train_sentencepiece(tmp_path / "no_eos.model", eos_id=-1)
    refuses("no eos id.*--eos_id=2", "SentencePieceTokenizer", str(without_eos))
    refuses("--tokenizer-model .*no such folder", "HuggingFaceTokenizer", str(tmp_path / "none"))
    refuses("finds no tokenizer there", "HuggingFaceTokenizer", str(tmp_path))
    refuses("no eos token.*tokenizer_config.json", "HuggingFaceTokenizer", str(train_hugging_face(tmp_path / "no_eos")))
    refuses("--vocab-size: NullTokenizer needs one", "NullTokenizer", None)
    refuses("leave the flag out", "NullTokenizer", "model", 10)
    with pytest.raises(ValueError, match="--vocab-size 10: the text holds ids from 3 to 10"):
        null_tokenizer(10).tokenize("3 10")
    monkeypatch.setitem(sys.modules, "transformers", None)
    refuses("pip install transformers", "HuggingFaceTokenizer", str(tmp_path))
