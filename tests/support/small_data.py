"""Small texts, datasets and trained tokenizers, for tests of the data pipeline."""

import json
from pathlib import Path

import numpy
import preprocess_data
import sentencepiece
import tokenizers
import torch
import transformers
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_ebft.data.datasets import build_datasets
from megatron_ebft.data.tokenizer import build_tokenizer

WORDS = "the quick brown fox jumps over a lazy dog while energy based fine tuning matches features not tokens".split()
VOCAB = 200  # of the NullTokenizer
T = 8


def sentences(count, seed=0):
    """Random sentences of WORDS."""
    rng = numpy.random.RandomState(seed)
    return [" ".join(rng.choice(WORDS, rng.randint(1, 20))) for _ in range(count)]


def write_lines(path, records):
    """Write records as JSON lines; returns the path."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def preprocess(*flags, code=0):
    """Run tools/preprocess_data.py; returns the prefix of its text dataset."""
    flags = [str(flag) for flag in flags]
    assert preprocess_data.main(flags) == code
    return flags[flags.index("--output-prefix") + 1] + "_text_document"


def null_dataset(folder, name, documents, *flags):
    """Make a dataset of lists of ids, or of (question ids, answer ids); returns its prefix."""
    text = [tuple(" ".join(map(str, part)) for part in (d if isinstance(d, tuple) else (d,))) for d in documents]
    keys = ("q", "a") if len(text[0]) == 2 else ("text",)
    source = write_lines(folder / f"{name}.jsonl", [dict(zip(keys, parts, strict=True)) for parts in text])
    if len(keys) == 2:
        flags = ("--question-key", "q", "--answer-key", "a", *flags)
    return preprocess("--input", source, "--output-prefix", folder / name, "--tokenizer-type", "NullTokenizer",
                      "--vocab-size", VOCAB, *flags)


def read_documents(prefix) -> list[list[int]]:
    """The ids of a dataset, or its mask, by document."""
    data = IndexedDataset(str(prefix))
    return [data[i].tolist() for i in range(len(data))]  # the dataset itself does not end an iteration


def null_tokenizer(vocab_size=VOCAB):
    """A NullTokenizer."""
    return build_tokenizer("NullTokenizer", None, vocab_size)


def build(folder, sizes, **kwargs):
    """build_datasets with settings that suit most tests."""
    settings = dict(seq_length=T, seed=1234, tokenizer=null_tokenizer(), data_cache_path=str(folder / "cache"))
    return build_datasets(sizes=sizes, **(settings | kwargs))


def all_rows(dataset):
    """Tokens of all rows, [rows, T]."""
    return torch.stack([dataset[i]["tokens"] for i in range(len(dataset))])


def question_answers(count, seed=0):
    """Questions of ids below 100 and answers of ids from 100 on, so that the tokens tell the right mask."""
    rng = numpy.random.RandomState(seed)
    return [(rng.randint(0, 100, rng.randint(0, 12)), rng.randint(100, VOCAB - 1, rng.randint(1, 12)))
            for _ in range(count)]


def train_sentencepiece(path: Path, **options) -> Path:
    """Train a sentencepiece model of about 60 ids; returns its file."""
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences(300)), model_writer=file, vocab_size=60, hard_vocab_limit=False,
            minloglevel=2, **options)
    return path


def train_hugging_face(folder: Path, vocab_size: int = 60, **special) -> Path:
    """Train a Hugging Face tokenizer; returns its folder."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    model.train_from_iterator(sentences(300), tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<eos>"], show_progress=False))
    transformers.PreTrainedTokenizerFast(tokenizer_object=model, **special).save_pretrained(folder)
    return folder


def chat_tokenizer(folder: Path, template: str | None, special: list[str], merges=(), **named) -> Path:
    """A Hugging Face tokenizer whose tokens are bytes, what `merges` makes of two of them, and special texts; returns
    its folder.

    Args:
        named: eos_token, bos_token.
    """
    texts = [*sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    model = tokenizers.Tokenizer(tokenizers.models.BPE({text: i for i, text in enumerate(texts)}, list(merges)))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    model.add_special_tokens(special)
    transformers.PreTrainedTokenizerFast(tokenizer_object=model, chat_template=template, **named
                                         ).save_pretrained(folder)
    return folder


def train_tokenizer(kind: str, folder: Path) -> Path:
    """Train a SentencePieceTokenizer or HuggingFaceTokenizer; returns what --tokenizer-model takes."""
    if kind == "SentencePieceTokenizer":
        return train_sentencepiece(folder / "small.model")
    return train_hugging_face(folder / "small", eos_token="<eos>")
