"""Tokenises JSON Lines, plain or compressed by gzip or Zstandard, into Megatron's indexed datasets.

    python tools/preprocess_data.py --input a.jsonl b.jsonl --output-prefix data/mine \
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model /models/llama --workers 8

1. Plain text: a dataset for each of --json-keys, `<prefix>_<key>_document.bin` and `.idx`.
2. With --question-key and --answer-key a document is question + answer + eod, in `<prefix>_text_document`, and
   `<prefix>_text_document_answer_mask` holds a byte for each token: 1 in the answer and on its eod, else 0. The answer
   is tokenised as what follows the question, so that every token belongs to one of them and both decode to the text.
3. Ids are decoded again. A warning counts the documents that do not decode to their text (the tokenizer normalises
   texts, or does not know a character) and shows the first.
4. The `.json` file of a dataset names its tokenizer. Training compares it with its own.
5. Files are written under temporary names and renamed at the end. The text's .idx comes last: if it exists, the dataset
   is whole.
6. The output does not depend on the number of workers.
"""

import argparse
import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta

import numpy
from json_lines import Batch, parse_line, read_batches
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from megatron_ebft.data.rows import ANSWER_MASK_SUFFIX
from megatron_ebft.data.tokenizer import TOKENIZER_TYPES, Tokenizer, build_tokenizer
from megatron_ebft.run.flags.flag import Flag, Group, at_least
from megatron_ebft.run.flags.parser import Parser

PIECE = 1 << 20
"""Characters that are tokenised together. Longer texts are cut, before a word if possible: a tokenizer needs 60 times
the memory of its text."""
PROGRESS_SECONDS = 10
"""Longest time between progress lines."""
PREPROCESSING = Group("preprocessing", (
    Flag("--input", str, "JSON Lines files, read in order, plain or compressed by gzip or Zstandard", many=True,
         metavar="FILE", required=True),
    Flag("--output-prefix", str, "start of the output's names, <prefix>_<key>_document.bin, .idx and .json",
         metavar="PATH", required=True),
    Flag("--json-keys", str, "keys of the texts; each makes its own dataset", many=True, metavar="KEY",
         default_text="text"),
    Flag("--question-key", str, "key of the question; with --answer-key, a document is question + answer",
         metavar="KEY"),
    Flag("--answer-key", str, "key of the answer, whose tokens the answer mask marks", metavar="KEY"),
    Flag("--tokenizer-type", str, "kind of tokenizer", choices=TOKENIZER_TYPES, required=True),
    Flag("--tokenizer-model", str, "SentencePiece .model file, or local folder of a Hugging Face tokenizer",
         metavar="PATH"),
    Flag("--vocab-size", int, "vocabulary of the model, if it is larger than the tokenizer's; size of a NullTokenizer",
         default_text="the tokenizer's"),
    Flag("--append-eod", bool, "end every document with the tokenizer's end-of-document id, from which a model learns "
         "where a text ends", default=True),
    Flag("--prepend-bos", bool, "begin every document with the tokenizer's beginning-of-text id, for models that were "
         "trained with one", default_text="what the tokenizer does by itself"),
    Flag("--workers", int, "number of processes that tokenise", default=1, valid=at_least(1)),
    Flag("--log-interval", int, f"documents between progress lines; at least one line is printed every "
         f"{PROGRESS_SECONDS} s", default=100_000, valid=at_least(1))))


@dataclass
class Document:
    """Token ids of a document; those from `answer_start` on are its answer."""

    ids: numpy.ndarray
    answer_start: int
    change: str = ""
    """Where the ids do not decode to the text: the place, and what became of it."""


@dataclass
class Encoder:
    """JSON lines to documents."""

    tokenizer: Tokenizer
    dtype: type[numpy.number]
    """dtype of the token ids."""
    parts: list[list[str]]
    """The keys that make up a document, for each dataset: [key], or [question key, answer key]."""
    append_eod: bool
    prepend_bos: bool

    def encode(self, batch: Batch) -> list[list[Document | None]]:
        """The documents of each line that is not blank: one per dataset, None for an empty text.

        Raises:
            ValueError: naming file and line, if it is no JSON object with the keys' texts.
        """
        documents = []
        for number, line in enumerate(batch.lines, batch.first_line):
            if line.isspace():
                continue
            place = f"{batch.path}:{number}"
            try:
                fields = parse_line(line)
                documents.append([self._document(fields, keys, place) for keys in self.parts])
            except ValueError as error:  # JSON and Unicode errors are ValueErrors too
                raise ValueError(f"{place}: {error}") from error
        return documents

    def _document(self, fields: dict, keys: list[str], place: str) -> Document | None:
        *question, answer = (self._text(fields, key) for key in keys)
        question = "".join(question)
        if len(question) + len(answer) <= PIECE:
            *parts, decoded = self.tokenizer.tokenize_pair(question, answer)
            question_ids, answer_ids = (numpy.array(ids, dtype=self.dtype) for ids in parts)
            change = describe_change(question + answer, decoded, place)
        else:
            question_ids, change = self._tokenize_long(question, place, follows=False)
            answer_ids, other = self._tokenize_long(answer, place, follows=len(question_ids) > 0)
            change = change or other
        if len(answer_ids) == 0:
            return None
        bos = [self.tokenizer.bos] if self.prepend_bos else []
        eod = [self.tokenizer.eod] if self.append_eod else []
        ids = numpy.concatenate([bos, question_ids, answer_ids, eod], dtype=self.dtype, casting="unsafe")
        return Document(ids, len(bos) + len(question_ids), change)

    def _tokenize_long(self, text: str, place: str, follows: bool) -> tuple[numpy.ndarray, str]:
        """The ids of a text, tokenised piece by piece, and the first change."""
        parts, change, tokenizer = [numpy.empty(0, dtype=self.dtype)], "", self.tokenizer
        for piece in pieces(text):
            is_first = not follows and len(parts) == 1
            ids = tokenizer.tokenize(piece) if is_first else tokenizer.continue_text(piece)
            decoded = tokenizer.decode(ids) if is_first else tokenizer.decode_continued(ids)
            change = change or describe_change(piece, decoded, place)
            parts.append(numpy.array(ids, dtype=self.dtype))
        return numpy.concatenate(parts), change

    def _text(self, fields: dict, key: str) -> str:
        if key not in fields:
            raise ValueError(f"no key {key!r}; the line has {', '.join(map(repr, fields))}")
        if not isinstance(fields[key], str):
            raise ValueError(f"{key!r} is not a text")
        fields[key].encode()  # refuses lone surrogates, on which tokenizers disagree
        return fields[key]


def pieces(text: str) -> Iterator[str]:
    """The text in pieces of at most PIECE characters, cut before a single space in the second half if there is one."""
    begin = 0
    while len(text) - begin > PIECE:
        end, low = begin + PIECE, begin + PIECE // 2
        space = text.rfind(" ", low, end - 1)
        while space > low and (text[space - 1].isspace() or text[space + 1].isspace()):
            space = text.rfind(" ", low, space)
        end = space if space > low else end
        yield text[begin:end]
        begin = end
    if begin < len(text):
        yield text[begin:]


def describe_change(text: str, decoded: str, place: str) -> str:
    """Where and how a text differs from what its ids decode to; empty if they are equal."""
    if text == decoded:
        return ""
    first = len(os.path.commonprefix([text, decoded]))
    around = slice(max(0, first - 10), first + 20)
    return f"{place}: {text[around]!r} becomes {decoded[around]!r}"


class DatasetWriter:
    """Writes an indexed dataset, its answer mask and its metadata. They get their names together, at the end."""

    def __init__(self, prefix: str, dtype: type[numpy.number], with_answers: bool):
        self.prefix = prefix
        self.documents = self.tokens = self.answer_tokens = self.changed = 0
        self.first_change = ""
        self._temporary = f"{prefix}.{os.getpid()}.tmp"
        self._text = IndexedDatasetBuilder(self._temporary + ".bin", dtype)
        self._mask = None
        if with_answers:
            self._mask = IndexedDatasetBuilder(self._temporary + ANSWER_MASK_SUFFIX + ".bin", numpy.uint8)

    def add(self, document: Document) -> None:
        length, start = len(document.ids), document.answer_start
        self._text.add_document(document.ids, [length])
        if self._mask is not None:
            self._mask.add_document(numpy.arange(length) >= start, [length])
        self.documents += 1
        self.tokens += length
        self.answer_tokens += length - start
        self.changed += bool(document.change)
        self.first_change = self.first_change or document.change

    def finish(self, metadata: dict) -> None:
        """Write the indices and the metadata, and rename everything. Replaces an older dataset."""
        counts = dict(documents=self.documents, tokens=self.tokens)
        endings = [".bin", ".json", ".idx"]
        self._text.finalize(self._temporary + ".idx")
        if self._mask is not None:
            counts["answer_tokens"] = self.answer_tokens
            endings = [ANSWER_MASK_SUFFIX + ".bin", ANSWER_MASK_SUFFIX + ".idx", *endings]
            self._mask.finalize(self._temporary + ANSWER_MASK_SUFFIX + ".idx")
        with open(self._temporary + ".json", "w", encoding="utf-8") as file:
            json.dump(metadata | counts, file, indent=2)
            file.write("\n")
        for stale in (".idx", ANSWER_MASK_SUFFIX + ".idx", ANSWER_MASK_SUFFIX + ".bin"):
            _remove(self.prefix + stale)
        for ending in endings:
            os.replace(self._temporary + ending, self.prefix + ending)

    def discard(self) -> None:
        """Remove the temporary files. After `finish` there are none."""
        for builder in filter(None, (self._text, self._mask)):
            builder.data_file.close()
        for ending in (".bin", ".json", ".idx", ANSWER_MASK_SUFFIX + ".bin", ANSWER_MASK_SUFFIX + ".idx"):
            _remove(self._temporary + ending)


def _remove(path: str) -> None:
    if os.path.exists(path):
        os.remove(path)


class Progress:
    """Prints rates and time left, every `log_interval` documents and at least every PROGRESS_SECONDS."""

    def __init__(self, total_bytes: int, log_interval: int):
        self.total_bytes, self.log_interval = total_bytes, log_interval
        self.documents = self.bytes = 0
        self._start = self._last_time = time.monotonic()
        self._last_documents = 0

    def update(self, documents: int, num_bytes: int) -> None:
        self.documents += documents
        self.bytes += num_bytes
        now = time.monotonic()
        if self.documents - self._last_documents < self.log_interval and now - self._last_time < PROGRESS_SECONDS:
            return
        self._last_time, self._last_documents = now, self.documents
        seconds = max(now - self._start, 1e-6)
        left = timedelta(seconds=round((self.total_bytes - self.bytes) * seconds / self.bytes))
        print(f"{self.documents} documents, {self.documents / seconds:.0f} documents/s, "
              f"{self.bytes / seconds / 1e6:.2f} MB/s, {100 * self.bytes / self.total_bytes:.1f} %, {left} left",
              flush=True)


_encoder: Encoder  # of a worker process


def _start_worker(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder


def _encode(batch: Batch) -> list[list[Document | None]]:
    return _encoder.encode(batch)


def encode_all(encoder: Encoder, paths: list[str], workers: int) -> Iterator[tuple[Batch, list[list[Document | None]]]]:
    """Yield each batch with its documents, in order. Runs `workers` processes if that is above 1.

    Raises:
        ValueError: a line is wrong, naming it, or a worker was killed.

    Only a few batches are in flight, and a dead worker raises an error. multiprocessing's imap would read all the input
    into memory, and wait for the dead worker.
    """
    if workers == 1:
        for batch in read_batches(paths):
            yield batch, encoder.encode(batch)
        return
    with ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(encoder,)) as pool:
        waiting = deque()
        try:
            for batch in read_batches(paths):
                waiting.append((batch, pool.submit(_encode, batch)))
                if len(waiting) >= 4 * workers:
                    batch, result = waiting.popleft()
                    yield batch, result.result()
            while waiting:
                batch, result = waiting.popleft()
                yield batch, result.result()
        except BrokenProcessPool as error:
            raise ValueError(f"--workers {workers}: a worker process was killed while it read {batch.path}; give fewer "
                             "if memory was short") from error
        finally:
            pool.shutdown(cancel_futures=True)


def check_options(options: argparse.Namespace) -> None:
    """ValueError, naming the flag, if flags contradict each other or an input file is missing or empty."""
    if (options.question_key is None) != (options.answer_key is None):
        raise ValueError("--question-key and --answer-key: give both or neither")
    if options.question_key is not None and options.json_keys is not None:
        raise ValueError("--json-keys: give either this or --question-key and --answer-key")
    for path in options.input:
        if not os.path.isfile(path):
            raise ValueError(f"--input {path}: no such file")
        if os.path.getsize(path) == 0:
            raise ValueError(f"--input {path}: the file is empty")


def preprocess(options: argparse.Namespace) -> None:
    """Make the datasets that the options describe.

    Raises:
        ValueError: wrong options or input, naming the flag, or the file and line.
        OSError: the output cannot be written.
    """
    check_options(options)
    tokenizer = build_tokenizer(options.tokenizer_type, options.tokenizer_model, options.vocab_size)
    prepend_bos = tokenizer.adds_bos if options.prepend_bos is None else options.prepend_bos
    if prepend_bos and tokenizer.bos is None:
        raise ValueError(f"--prepend-bos: this {tokenizer.name} has no beginning-of-text id; leave the flag out")
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    metadata = dict(tokenizer_type=tokenizer.name, tokenizer_fingerprint=tokenizer.fingerprint,
                    vocab_size=tokenizer.vocab_size, eod=tokenizer.eod, append_eod=options.append_eod,
                    prepend_bos=prepend_bos)

    with_answers = options.question_key is not None
    keys = options.json_keys or ["text"]
    names = ["text"] if with_answers else keys
    parts = [[options.question_key, options.answer_key]] if with_answers else [[key] for key in keys]
    encoder = Encoder(tokenizer, dtype, parts, options.append_eod, prepend_bos)
    progress = Progress(sum(map(os.path.getsize, options.input)), options.log_interval)
    empty = 0

    os.makedirs(os.path.dirname(options.output_prefix) or ".", exist_ok=True)
    with ExitStack() as stack:
        writers = []
        for name in names:
            writers.append(DatasetWriter(f"{options.output_prefix}_{name}_document", dtype, with_answers))
            stack.callback(writers[-1].discard)
        for batch, lines in encode_all(encoder, options.input, options.workers):
            for documents in lines:
                for writer, document in zip(writers, documents, strict=True):
                    if document is None:
                        empty += 1
                    else:
                        writer.add(document)
            progress.update(len(lines), batch.num_bytes)
        for writer in writers:
            if writer.documents == 0:
                raise ValueError(f"--input: no documents for {writer.prefix} ({empty} empty texts)")
        for writer in writers:
            writer.finish(metadata)
            print(f"{writer.prefix}: {writer.documents} documents, {writer.tokens} tokens")
            if writer.changed:
                print(f"warning: {writer.changed} of {writer.documents} documents do not decode to their text. The "
                      f"first is {writer.first_change}. This {tokenizer.name} normalises texts or lacks characters")
    if empty:
        print(f"{empty} empty {'answers' if with_answers else 'texts'} left out")


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0, or 2 after an error message."""
    try:
        preprocess(Parser("tools/preprocess_data.py", __doc__, own=(PREPROCESSING,)).parse_args(argv))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
