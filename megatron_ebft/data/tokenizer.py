"""Tokenizers: text to ids and back, behind one interface and under Megatron's flag names.

1. No ids are added around a text. The end-of-document id (eod), and the id that some models expect before a document
   (bos), are added when a dataset is made.
2. Some tokenizers put a space before every text. A text that follows another is tokenised as its continuation, so that
   the ids of both decode to both.
3. The fingerprint of a tokenizer depends on what it does, not on where its files are. A dataset or a checkpoint that
   was made with another tokenizer is refused.
"""

import contextlib
import functools
import hashlib
import json
import os
from abc import ABC, abstractmethod
from pathlib import Path

TOKENIZER_TYPES = ("SentencePieceTokenizer", "HuggingFaceTokenizer", "NullTokenizer")

# The ids of this text are part of the fingerprint of a Hugging Face tokenizer: two tokenizers with the same id table
# may still split, merge or normalise differently.
_PROBE = "Energy-Based Fine-Tuning: naïve café, 1234 + 5.67 = ¾?\n\tdef f(x):\n\t\treturn {'Ω': x ** 2}  # 你好 🙂"

_MARK = "\ue000"
"""A character for private use. No tokenizer merges it with what follows, so that what follows is a continuation."""
MOST_IDS = 1 << 31
"""Ids are stored in 32 bits."""


def first_difference(text: str, other: str) -> str:
    """How another text differs from a text, where it first does; empty if they are equal."""
    if text == other:
        return ""
    first = len(os.path.commonprefix([text, other]))
    around = slice(max(0, first - 10), first + 20)
    return f"{text[around]!r} becomes {other[around]!r}"


@contextlib.contextmanager
def _reading(path: str, what: str):
    """Any error of another library's parser becomes a ValueError that names the file."""
    try:
        yield
    except BaseException as error:  # a panic of Rust code is no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        reason = " ".join(f"{error}".split())[:300]
        raise ValueError(f"--tokenizer-model {path}: {what} ({type(error).__name__}: {reason})") from error


class Tokenizer(ABC):
    """Text to token ids and back.

    Args:
        name: Megatron's name of the type.
        num_ids: number of ids that the tokenizer defines.
        vocab_size: --vocab-size, or None.
        eod: end-of-document id.
        fingerprint: sha256, hexadecimal, of what defines the tokenizer.
        bos: id that begins a document, or None.
        adds_bos: whether the tokenizer itself puts it before a text.

    Raises:
        ValueError: --vocab-size is smaller than the number of ids, or there are too many.
    """

    def __init__(self, name: str, num_ids: int, vocab_size: int | None, eod: int, fingerprint: str,
                 bos: int | None = None, adds_bos: bool = False):
        if not 0 <= eod < num_ids <= MOST_IDS:
            raise ValueError(f"--tokenizer-model: this {name} has ids up to {num_ids - 1} and ends documents with "
                             f"{eod}; an id must be below {MOST_IDS}")
        if vocab_size is not None and vocab_size < num_ids:
            raise ValueError(f"--vocab-size {vocab_size}: the {name} has {num_ids} ids; leave the flag out, or give "
                             f"at least {num_ids}")
        self.name = name
        self.num_ids = num_ids
        self.vocab_size: int = num_ids if vocab_size is None else vocab_size
        """Upper bound of the ids. --vocab-size may make it larger than `num_ids` (a model with a padded vocabulary)."""
        self.eod = eod
        """The id that ends a document."""
        self.bos, self.adds_bos = bos, adds_bos
        self.fingerprint = fingerprint
        """sha256, hexadecimal. Equal for tokenizers that do the same."""

    @property
    def unique_identifiers(self) -> dict[str, str]:
        """The tokenizer's part of the key of Megatron-Core's dataset cache."""
        return {"class": self.name, "fingerprint": self.fingerprint}

    @abstractmethod
    def tokenize(self, text: str) -> list[int]:
        """The ids of a text, without special ids around it."""

    def detokenize(self, ids: list[int]) -> str:
        """The text of ids. Ids that the tokenizer does not define (padding, a padded vocabulary) are left out."""
        return self._decode([int(i) for i in ids if 0 <= i < self.num_ids])

    @abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """The text of valid ids, without special ids."""

    def decode(self, ids: list[int]) -> str:
        """The text of ids that `tokenize` made, with the special ids that the text spelled."""
        return self._decode(ids)

    def prompt_ids(self, text: str) -> list[int]:
        """The ids of a text that a model is to continue: with the beginning-of-text id if the tokenizer adds one, and
        the text, such as that of a chat template, does not begin with it.

        Raises:
            ValueError: the text cannot be tokenised.
        """
        text.encode()  # refuses lone surrogates, on which tokenizers disagree
        ids = self.tokenize(text)
        return [self.bos, *ids] if self.adds_bos and ids[:1] != [self.bos] else ids

    def completion_text(self, ids: list[int]) -> str:
        """The text of ids that follow others, without special ids."""
        mark = [] if self._is_additive else self._mark_ids
        return self.detokenize(mark + ids)[len(self.detokenize(mark)):]

    def continue_text(self, text: str) -> list[int]:
        """The ids of a text that follows another text."""
        if self._is_additive:
            return self.tokenize(text)
        marked = self.tokenize(_MARK + text)
        is_marked = marked[:len(self._mark_ids)] == self._mark_ids
        return marked[len(self._mark_ids):] if is_marked else self.tokenize(text)

    def decode_continued(self, ids: list[int]) -> str:
        """The text of ids that `continue_text` made."""
        return self.decode(self._mark_ids + ids)[len(self.decode(self._mark_ids)):]

    @functools.cached_property
    def _is_additive(self) -> bool:
        """Whether the ids of texts, one after the other, decode to the texts one after the other."""
        first = self.tokenize("a")
        return all(self.decode(first + self.tokenize(text)) == "a" + text for text in ("b", " b", "1"))

    @functools.cached_property
    def _mark_ids(self) -> list[int]:
        return self.tokenize(_MARK)

    def tokenize_pair(self, question: str, answer: str) -> tuple[list[int], list[int], str]:
        """The ids of a question, those of the answer that follows it, and the text that both decode to.

        That text is question + answer, unless the tokenizer changes texts (a normalisation, unknown characters). It
        then is what the tokenizer makes of question + answer as one text. Where the two meet inside a word that the
        tokenizer cannot divide there, the id that has characters of both belongs to the answer.
        """
        question_ids = self.tokenize(question) if question else []
        answer_ids = self.continue_text(answer) if question_ids else self.tokenize(answer)
        text = self.decode(question_ids + answer_ids)
        if question and text != question + answer:
            whole = self.tokenize(question + answer)
            if text != (text := self.decode(whole)):
                common = len(os.path.commonprefix([question_ids, whole]))
                return whole[:common], whole[common:], text
        return question_ids, answer_ids, text


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model file; its eos ends documents."""

    def __init__(self, path: str, vocab_size: int | None):
        import sentencepiece

        if not Path(path).is_file():
            raise ValueError(f"--tokenizer-model {path}: no such file; give the .model file sentencepiece wrote")
        with _reading(path, "not a sentencepiece model"):
            model = Path(path).read_bytes()
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
            self._model.encode(_PROBE)
        if self._model.eos_id() < 0:
            raise ValueError(f"--tokenizer-model {path}: the model has no eos id to end documents with; train it "
                             "with one (spm_train's default, --eos_id=2; -1 leaves it out)")
        super().__init__("SentencePieceTokenizer", self._model.get_piece_size(), vocab_size, self._model.eos_id(),
                         hashlib.sha256(model).hexdigest(), self._model.bos_id() if self._model.bos_id() >= 0 else None)

    def tokenize(self, text: str) -> list[int]:
        return self._model.encode(text)

    def _decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)


class HuggingFaceTokenizer(Tokenizer):
    """A local folder that transformers' AutoTokenizer reads; its eos token ends documents."""

    def __init__(self, path: str, vocab_size: int | None):
        try:
            import transformers
        except ImportError as error:
            raise ValueError("--tokenizer-type HuggingFaceTokenizer needs the transformers package: "
                             "pip install transformers") from error
        if not Path(path).is_dir():
            raise ValueError(f"--tokenizer-model {path}: no such folder; give a local folder that holds the "
                             "tokenizer's files (nothing is downloaded)")
        with _reading(path, f"transformers {transformers.__version__} reads no tokenizer there; a file is missing, "
                            "damaged or of another version"):
            # Code of the tokenizer's own is never run; without the last argument, transformers would ask.
            self._model = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True,
                                                                     trust_remote_code=False)
            eod, bos, table = self._model.eos_token_id, self._model.bos_token_id, self._model.get_vocab()
            content = json.dumps([sorted(table.items()), eod, self.tokenize(_PROBE)])
            adds_bos = bos is not None and self._model.encode("a")[:1] == [bos]
        if eod is None:
            raise ValueError(f"--tokenizer-model {path}: the tokenizer has no eos token to end documents with; name "
                             'one as "eos_token" in its tokenizer_config.json')
        super().__init__("HuggingFaceTokenizer", max(table.values()) + 1, vocab_size, eod,
                         hashlib.sha256(content.encode()).hexdigest(), bos, adds_bos)

    def tokenize(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False)

    def _decode(self, ids: list[int]) -> str:
        return self._model.decode(ids, skip_special_tokens=True)

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def tokenize_with_places(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of a text, and the characters that each is of: begin and end.

        Raises:
            ValueError: the tokenizer cannot tell.
        """
        if not self._model.is_fast:
            raise ValueError("--tokenizer-model: this tokenizer does not tell the places of its ids in a text; give "
                             "one with a tokenizer.json")
        encoded = self._model(text, add_special_tokens=False, return_offsets_mapping=True)
        return encoded["input_ids"], encoded["offset_mapping"]

    def chat_template(self) -> str:
        """The tokenizer's own chat template.

        Raises:
            ValueError: it has none; names the flags.
        """
        try:
            return self._model.get_chat_template()
        except ValueError as error:
            raise ValueError("--tokenizer-model: this tokenizer has no chat template; give one, --chat-template"
                             ) from error

    def render_chat(self, messages: list[dict], template: str, add_generation_prompt: bool) -> str:
        """The text that a chat template makes of messages.

        Raises:
            ValueError: the template fails.
        """
        try:
            return self._model.apply_chat_template(messages, chat_template=template, tokenize=False,
                                                   add_generation_prompt=add_generation_prompt)
        except Exception as error:  # a template is a program, and raises whatever it likes
            raise ValueError(f"the chat template fails ({type(error).__name__}: {error})") from error

    @functools.cached_property
    def special_texts(self) -> tuple[str, ...]:
        """The texts of special ids."""
        added = (token.content for token in self._model.added_tokens_decoder.values() if token.special)
        return tuple({*self._model.all_special_tokens, *added})


class NullTokenizer(Tokenizer):
    """For tests and benchmarks: the text is a list of decimal ids, separated by spaces. The last id ends documents."""

    _is_additive = True

    def __init__(self, vocab_size: int):
        super().__init__("NullTokenizer", vocab_size, vocab_size, vocab_size - 1,
                         hashlib.sha256(f"NullTokenizer {vocab_size}".encode()).hexdigest())

    def tokenize(self, text: str) -> list[int]:
        try:
            ids = [int(word) for word in text.split()]
        except ValueError as error:
            raise ValueError(f"a NullTokenizer's text is a list of numbers ({error})") from error
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise ValueError(f"--vocab-size {self.vocab_size}: the text holds ids from {min(ids)} to {max(ids)}")
        return ids

    def _decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def tokenize_pair(self, question: str, answer: str) -> tuple[list[int], list[int], str]:
        return self.tokenize(question), self.tokenize(answer), question + answer


def build_tokenizer(tokenizer_type: str, tokenizer_model: str | None, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer of --tokenizer-type, --tokenizer-model and --vocab-size.

    Args:
        tokenizer_type: SentencePieceTokenizer, HuggingFaceTokenizer or NullTokenizer.
        tokenizer_model: the .model file, or the local folder; None for NullTokenizer.
        vocab_size: number of ids. Required by NullTokenizer; for the others the model's, if it is larger than the
            tokenizer's.

    Raises:
        ValueError: a flag is missing or wrong; names the flag.
    """
    if tokenizer_type == "NullTokenizer":
        if tokenizer_model is not None:
            raise ValueError("--tokenizer-model: NullTokenizer has no model; leave the flag out")
        if vocab_size is None or vocab_size < 2:
            raise ValueError("--vocab-size: NullTokenizer needs one, of at least 2")
        return NullTokenizer(vocab_size)
    classes = {"SentencePieceTokenizer": SentencePieceTokenizer, "HuggingFaceTokenizer": HuggingFaceTokenizer}
    if tokenizer_type not in classes:
        raise ValueError(f"--tokenizer-type {tokenizer_type}: choose from {', '.join(TOKENIZER_TYPES)}")
    if tokenizer_model is None:
        raise ValueError(f"--tokenizer-model: {tokenizer_type} needs one")
    return classes[tokenizer_type](tokenizer_model, vocab_size)
