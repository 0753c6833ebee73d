"""Tokenises JSON Lines, Parquet and `datasets` folders into Megatron's indexed datasets.

    python tools/preprocess_data.py --input 'chats/*.jsonl.gz' more.parquet --messages-key messages \
        --output-prefix data/chats --tokenizer-type HuggingFaceTokenizer --tokenizer-model /models/llama --workers 8

1. Plain text: a dataset for each of --json-keys, `<prefix>_<key>_document.bin` and `.idx`.
2. With --question-key and --answer-key a document is question + answer + eod, in `<prefix>_text_document`, and
   `<prefix>_text_document_answer_mask` holds a byte for each token: 1 in the answer and on its eod, else 0. The answer
   is tokenised as what follows the question, so that every token belongs to one of them and both decode to the text.
3. With --messages-key (or --apply-chat-template for questions and answers) the tokenizer's chat template writes the
   document, as it does for inference. All turns of the assistant are answers, each with the token that ends it
   (megatron_ebft/data/chat.py). A template that rewrites earlier turns is refused. The eod is added unless the template
   ends with it; it is answer if the token before it is.
4. Ids are decoded again. A warning counts the documents that do not decode to their text (the tokenizer normalises
   texts, or does not know a character) and shows the first.
5. The `.json` file of a dataset names its tokenizer. Training compares it with its own.
6. Files are written under temporary names and renamed at the end. The text's .idx comes last: if it exists, the dataset
   is whole.
7. The output does not depend on the number of workers. Whatever is left out is counted.
"""

import argparse
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from datetime import timedelta

from dataset_report import READS, report
from dataset_writer import DatasetWriter
from documents import Chat, Document, Encoder, Kind, Pair
from input_files import find_files, read_records
from lines_file import LinesFile
from megatron.core.datasets.indexed_dataset import DType
from tables import TableBatch

from megatron_ebft.data.chat import ChatTemplate
from megatron_ebft.data.json_lines import Batch
from megatron_ebft.data.tokenizer import TOKENIZER_TYPES, Tokenizer, build_tokenizer
from megatron_ebft.run.flags.checks import check_args
from megatron_ebft.run.flags.flag import Flag, Group, at_least
from megatron_ebft.run.flags.parser import Parser

PROGRESS_SECONDS = 10
"""Longest time between progress lines."""
PREPROCESSING = Group("preprocessing", (
    Flag("--input", str, "files, globs, and folders that `datasets` saved, read in order: JSON Lines, plain or "
         "compressed by gzip or Zstandard; Parquet; Arrow", many=True, metavar="FILE", required=True),
    Flag("--output-prefix", str, "start of the output's names, <prefix>_<key>_document.bin, .idx and .json",
         metavar="PATH", required=True),
    Flag("--json-keys", str, "keys of the texts; each makes its own dataset", many=True, metavar="KEY",
         default_text="text"),
    Flag("--question-key", str, "key of the question; with --answer-key, a document is question + answer. Several keys "
         "(instruction input) are joined by blank lines, without the empty ones", many=True, metavar="KEY"),
    Flag("--answer-key", str, "key of the answer, whose tokens the answer mask marks", metavar="KEY"),
    Flag("--messages-key", str, "key of a conversation, a list of messages with role and content (or ShareGPT's from "
         "and value); the answer mask marks the assistant's turns", metavar="KEY"),
    Flag("--apply-chat-template", bool, "write question and answer by the chat template, as messages of user and "
         "assistant", default=False),
    Flag("--chat-template", str, "Jinja file of a chat template", metavar="FILE", default_text="the tokenizer's"),
    Flag("--last-turn-only", bool, "of a conversation, only the assistant's last turn is an answer", default=False),
    Flag("--max-document-length", int, "leave out documents of more tokens", valid=at_least(1),
         default_text="leave out none"),
    Flag("--questions-output", str, "JSON Lines of the questions of the documents, in their order: prompt (as the chat "
         "template writes it, up to the last answer), answer, and --keep-keys", metavar="FILE"),
    Flag("--keep-keys", str, "keys that --questions-output copies, such as tests for a verifier", many=True,
         metavar="KEY"),
    Flag("--tokenizer-type", str, "kind of tokenizer", choices=TOKENIZER_TYPES, required=True),
    Flag("--tokenizer-model", str, "SentencePiece .model file, or local folder of a Hugging Face tokenizer",
         metavar="PATH"),
    Flag("--vocab-size", int, "vocabulary of the model, if it is larger than the tokenizer's; size of a NullTokenizer",
         default_text="the tokenizer's"),
    Flag("--append-eod", bool, "end every document with the tokenizer's end-of-document id, from which a model learns "
         "where a text ends", default=True),
    Flag("--prepend-bos", bool, "begin every document with the tokenizer's beginning-of-text id, for models that were "
         "trained with one", default_text="what the tokenizer does by itself; with a chat template, what that does"),
    Flag("--report", str, "JSON file of what the last lines of the output say", metavar="FILE"),
    Flag("--workers", int, "number of processes that tokenise", default=1, valid=at_least(1)),
    Flag("--log-interval", int, f"documents between progress lines; at least one line is printed every "
         f"{PROGRESS_SECONDS} s", default=100_000, valid=at_least(1))))


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
        left = timedelta(seconds=round((self.total_bytes - self.bytes) * seconds / max(self.bytes, 1)))
        print(f"{self.documents} documents, {self.documents / seconds:.0f} documents/s, "
              f"{self.bytes / seconds / 1e6:.2f} MB/s, {100 * self.bytes / self.total_bytes:.1f} %, {left} left",
              flush=True)


_encoder: Encoder  # of a worker process


def _start_worker(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder


def _encode(batch: Batch | TableBatch) -> list[list[Document | str]]:
    return _encoder.encode(batch)


def encode_all(encoder: Encoder, paths: list[str],
               workers: int) -> Iterator[tuple[Batch | TableBatch, list[list[Document | str]]]]:
    """Yield each batch with its documents, in order. Runs `workers` processes if that is above 1.

    Raises:
        ValueError: a line is wrong, naming it, or a worker was killed.

    Only a few batches are in flight, and a dead worker raises an error. multiprocessing's imap would read all the input
    into memory, and wait for the dead worker.
    """
    if workers == 1:
        for batch in read_records(paths, encoder.keys):
            yield batch, encoder.encode(batch)
        return
    with ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(encoder,)) as pool:
        waiting = deque()
        try:
            for batch in read_records(paths, encoder.keys):
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
    """ValueError, naming the flag, if flags contradict each other."""
    has_questions = options.question_key is not None
    if has_questions != (options.answer_key is not None):
        raise ValueError("--question-key and --answer-key: give both or neither")
    if options.json_keys is not None and (has_questions or options.messages_key is not None):
        raise ValueError("--json-keys: give either this, or --question-key and --answer-key, or --messages-key")
    if has_questions and options.messages_key is not None:
        raise ValueError("--messages-key: give either this, or --question-key and --answer-key")
    if options.apply_chat_template and not has_questions:
        raise ValueError("--apply-chat-template: is for --question-key and --answer-key; leave it out")
    has_template = options.apply_chat_template or options.messages_key is not None
    for flag, is_given, is_used, needed in (
            ("--chat-template", options.chat_template is not None, has_template,
             "--messages-key or --apply-chat-template"),
            ("--last-turn-only", options.last_turn_only, options.messages_key is not None, "--messages-key"),
            ("--questions-output", options.questions_output is not None, has_questions or has_template,
             "--messages-key, or --question-key and --answer-key"),
            ("--keep-keys", options.keep_keys is not None, options.questions_output is not None,
             "--questions-output")):
        if is_given and not is_used:
            raise ValueError(f"{flag}: needs {needed}")
    if "prompt" in (options.keep_keys or []):
        raise ValueError("--keep-keys prompt: the prompt is written anyway; leave it out, or rename the data's")
    check_args(options)


def build_kinds(options: argparse.Namespace, tokenizer: Tokenizer) -> list[Kind]:
    """The kind of document of each dataset."""
    if options.messages_key is not None or options.apply_chat_template:
        template = ChatTemplate(tokenizer, options.chat_template, options.last_turn_only)
        return [Chat(template, options.messages_key, options.question_key or [], options.answer_key)]
    if options.question_key is not None:
        return [Pair(tokenizer, options.question_key, options.answer_key)]
    return [Pair(tokenizer, [], key) for key in options.json_keys or ["text"]]


def build_encoder(options: argparse.Namespace, tokenizer: Tokenizer) -> Encoder:
    """What makes documents of records, as the options ask.

    Raises:
        ValueError: the tokenizer lacks what they ask for; names the flag.
    """
    kinds = build_kinds(options, tokenizer)
    prepend_bos = options.prepend_bos
    if prepend_bos is None:
        prepend_bos = tokenizer.adds_bos and not isinstance(kinds[0], Chat)
    if prepend_bos and tokenizer.bos is None:
        raise ValueError(f"--prepend-bos: this {tokenizer.name} has no beginning-of-text id; leave the flag out")
    keep_keys = None if options.questions_output is None else options.keep_keys or []
    return Encoder(tokenizer, DType.optimal_dtype(tokenizer.vocab_size), kinds, options.append_eod, prepend_bos,
                   options.max_document_length, keep_keys)


def write(options: argparse.Namespace, paths: list[str], encoder: Encoder) -> list[DatasetWriter]:
    """Write the datasets and the questions; returns the datasets' writers, which have counted."""
    with_answers = options.question_key is not None or options.messages_key is not None
    progress = Progress(sum(map(os.path.getsize, paths)), options.log_interval)
    with ExitStack() as stack:
        writers, questions = [], None
        if options.questions_output is not None:
            questions = stack.enter_context(LinesFile(options.questions_output, "--questions-output"))
        for name in ["text"] if with_answers else options.json_keys or ["text"]:
            prefix = f"{options.output_prefix}_{name}_document"
            writers.append(DatasetWriter(prefix, encoder.dtype, with_answers))
            stack.callback(writers[-1].discard)
        for batch, records in encode_all(encoder, paths, options.workers):
            for documents in records:
                for writer, document in zip(writers, documents, strict=True):
                    writer.add(document)
                if questions is not None and isinstance(documents[0], Document):
                    questions.write_line(documents[0].question + "\n")
            progress.update(len(records), batch.num_bytes)
        for writer in writers:
            if writer.documents == 0:
                reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(writer.left_out.items()))
                raise ValueError(f"--input: no documents for {writer.prefix} ({reasons or 'no records'})")
        for writer in writers:
            writer.finish(metadata(encoder))
    return writers


def metadata(encoder: Encoder) -> dict:
    """How a dataset was made, for its .json file."""
    tokenizer, kind = encoder.tokenizer, encoder.kinds[0]
    made = dict(tokenizer_type=tokenizer.name, tokenizer_fingerprint=tokenizer.fingerprint,
                vocab_size=tokenizer.vocab_size, eod=tokenizer.eod, append_eod=encoder.append_eod,
                prepend_bos=encoder.prepend_bos)
    return made | ({"chat_template_fingerprint": kind.template.fingerprint} if isinstance(kind, Chat) else {})


def preprocess(options: argparse.Namespace) -> None:
    """Make the datasets that the options describe.

    Raises:
        ValueError: wrong options or input, naming the flag, or the file and line.
        OSError: the output cannot be written.
    """
    check_options(options)
    paths = find_files(options.input)
    tokenizer = build_tokenizer(options.tokenizer_type, options.tokenizer_model, options.vocab_size)
    encoder = build_encoder(options, tokenizer)
    for path in filter(None, (options.output_prefix, options.questions_output, options.report)):
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    report(options, write(options, paths, encoder), tokenizer)


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0, or 2 after an error message."""
    try:
        preprocess(Parser("tools/preprocess_data.py", __doc__, own=(PREPROCESSING,), reads=READS).parse_args(argv))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
