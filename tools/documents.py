"""Records to documents: token ids, which of them are answers, and the question that is kept beside them.

A kind of document (`Pair`, `Chat`) turns the fields of a record into ids. `Encoder` adds what every document
has, whatever its kind: beginning-of-text and end-of-document ids, the limit on its length, its question.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy
from tables import TableBatch

from megatron_ebft.data.chat import ASSISTANT, ChatTemplate, NoAnswer, read_messages
from megatron_ebft.data.json_lines import Batch, named
from megatron_ebft.data.tokenizer import Tokenizer, first_difference

PIECE = 1 << 20
"""Characters of a text that are tokenised together. Longer texts are cut, before a word if possible: a tokenizer needs
60 times the memory of its text. A conversation is never cut."""


@dataclass
class Document:
    """A document of L tokens."""

    ids: numpy.ndarray
    """Token ids [L]."""
    answer_L: numpy.ndarray
    """bool, True on the answer's tokens."""
    change: str = ""
    """Where the ids do not decode to the text: the place, and what became of it."""
    notes: list[str] = field(default_factory=list)
    """What to count and tell the user, each in the plural."""
    question: str = ""
    """Its line in --questions-output, without the line's end."""


@dataclass
class Part:
    """What a kind of document makes of a record: a document without what `Encoder` adds."""

    ids: numpy.ndarray
    answer_L: numpy.ndarray
    change: str = ""
    """As in `Document`, without the place."""
    ends_document: bool = False
    """Whether it needs no end-of-document id."""
    notes: list[str] = field(default_factory=list)
    prompt: str = ""
    """What a model is asked with."""
    answer: str = ""


class Left(Exception):
    """A record makes no document. The message says why, of several records."""


class Kind(ABC):
    """A kind of document: which fields of a record it reads, and what it makes of them."""

    keys: list[str]
    """The fields that it reads."""

    @abstractmethod
    def part(self, fields: dict, dtype: type[numpy.number]) -> Part:
        """The document of a record.

        Args:
            dtype: of the ids.

        Raises:
            ValueError: the fields are not what they should be.
            Left: there is no document.
        """


def field_of(fields: dict, key: str) -> object:
    """A field of a record; ValueError if it is missing."""
    if key not in fields:
        raise ValueError(f"no key {key!r}; the line has {', '.join(map(repr, fields))}")
    return fields[key]


def text_of(fields: dict, key: str) -> str:
    """A text of a record; an empty one for null."""
    text = field_of(fields, key)
    if text is None:
        return ""
    if not isinstance(text, str):
        raise ValueError(f"{key!r} is not a text")
    text.encode()  # refuses lone surrogates, on which tokenizers disagree
    return text


@dataclass
class Pair(Kind):
    """question + answer: the answer's tokens continue the question's. Questions of several fields are joined by blank
    lines; empty fields are left out. Plain text is an answer without a question."""

    tokenizer: Tokenizer
    question_keys: list[str]
    answer_key: str

    @property
    def keys(self) -> list[str]:
        return [*self.question_keys, self.answer_key]

    def part(self, fields: dict, dtype: type[numpy.number]) -> Part:
        question, answer = question_of(fields, self.question_keys), text_of(fields, self.answer_key)
        if len(question) + len(answer) <= PIECE:
            *parts, decoded = self.tokenizer.tokenize_pair(question, answer)
            question_ids, answer_ids = (numpy.array(ids, dtype=dtype) for ids in parts)
            change = first_difference(question + answer, decoded)
        else:
            question_ids, change = self._tokenize_long(question, dtype, follows=False)
            answer_ids, other = self._tokenize_long(answer, dtype, follows=len(question_ids) > 0)
            change = change or other
        if len(answer_ids) == 0:
            raise Left("empty answers" if self.question_keys else "empty texts")
        ids = numpy.concatenate([question_ids, answer_ids])
        return Part(ids, numpy.arange(len(ids)) >= len(question_ids), change, prompt=question, answer=answer)

    def _tokenize_long(self, text: str, dtype: type[numpy.number], follows: bool) -> tuple[numpy.ndarray, str]:
        """The ids of a text, tokenised piece by piece, and the first change."""
        parts, change, tokenizer = [numpy.empty(0, dtype=dtype)], "", self.tokenizer
        for piece in pieces(text):
            is_first = not follows and len(parts) == 1
            ids = tokenizer.tokenize(piece) if is_first else tokenizer.continue_text(piece)
            decoded = tokenizer.decode(ids) if is_first else tokenizer.decode_continued(ids)
            change = change or first_difference(piece, decoded)
            parts.append(numpy.array(ids, dtype=dtype))
        return numpy.concatenate(parts), change


def question_of(fields: dict, keys: list[str]) -> str:
    """The question of a record."""
    return "\n\n".join(filter(None, (text_of(fields, key) for key in keys)))


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


@dataclass
class Chat(Kind):
    """A conversation, of a field with messages, or of a question and its answer."""

    template: ChatTemplate
    messages_key: str | None
    question_keys: list[str]
    answer_key: str | None

    @property
    def keys(self) -> list[str]:
        return [self.messages_key] if self.messages_key else [*self.question_keys, self.answer_key]

    def part(self, fields: dict, dtype: type[numpy.number]) -> Part:
        try:
            chat = self.template.tokenize(self._messages(fields))
        except NoAnswer as error:
            raise Left(str(error) if self.messages_key else "empty answers") from error
        notes = ["empty turns of the assistant are not trained on"] * chat.empty_turns
        notes += ["answers begin inside a token, which is an answer's then; a prompt that ends there has other tokens"
                  ] * chat.split_tokens
        tokenizer, prompt = self.template.tokenizer, chat.prompt
        if tokenizer.adds_bos:  # so do those who read the question
            prompt = prompt.removeprefix(tokenizer.decode([tokenizer.bos]))
        return Part(numpy.array(chat.ids, dtype=dtype), chat.answer_L,
                    first_difference(chat.text, tokenizer.decode(chat.ids)), chat.ends_document, notes, prompt,
                    chat.answer)

    def _messages(self, fields: dict) -> list[dict]:
        if self.messages_key is None:
            return [dict(role="user", content=question_of(fields, self.question_keys)),
                    dict(role=ASSISTANT, content=text_of(fields, self.answer_key))]
        try:
            return read_messages(field_of(fields, self.messages_key))
        except ValueError as error:
            raise ValueError(f"{self.messages_key!r}: {error}") from error


@dataclass
class Encoder:
    """Records to documents."""

    tokenizer: Tokenizer
    dtype: type[numpy.number]
    """dtype of the token ids."""
    kinds: list[Kind]
    """The kind of document of each dataset."""
    append_eod: bool
    prepend_bos: bool
    max_length: int | None
    """Longer documents are left out."""
    keep_keys: list[str] | None
    """Fields that are kept beside each question; None: no questions are written."""

    @property
    def keys(self) -> list[str]:
        """The fields that are read, each once."""
        return list(dict.fromkeys([*(key for kind in self.kinds for key in kind.keys), *(self.keep_keys or [])]))

    def encode(self, batch: Batch | TableBatch) -> list[list[Document | str]]:
        """The documents of each record: one per dataset, or why there is none.

        Raises:
            ValueError: naming file and line, if it is no record with the keys' texts.
        """
        documents = []
        for place, fields in batch.records():
            with named(place):
                documents.append([self._document(fields, kind, place) for kind in self.kinds])
        return documents

    def _document(self, fields: dict, kind: Kind, place: str) -> Document | str:
        try:
            part = kind.part(fields, self.dtype)
        except Left as reason:
            return str(reason)
        ids, answer_L = part.ids, part.answer_L
        if self.prepend_bos and ids[0] != self.tokenizer.bos:
            ids, answer_L = numpy.append(self.tokenizer.bos, ids), numpy.append(False, answer_L)
        if self.append_eod and not part.ends_document:
            ids, answer_L = numpy.append(ids, self.tokenizer.eod), numpy.append(answer_L, answer_L[-1])
        if self.max_length is not None and len(ids) > self.max_length:
            return f"documents of more than {self.max_length} tokens"
        change = f"{place}: {part.change}" if part.change else ""
        return Document(ids.astype(self.dtype), answer_L, change, part.notes, self._question(part, fields))

    def _question(self, part: Part, fields: dict) -> str:
        """The line of --questions-output; "" if there is none."""
        if self.keep_keys is None:
            return ""
        kept = {key: field_of(fields, key) for key in self.keep_keys}
        try:
            return json.dumps({"prompt": part.prompt, "answer": part.answer} | kept, ensure_ascii=False)
        except TypeError as error:  # tables hold dates and bytes, too
            raise ValueError(f"--keep-keys {' '.join(kept)}: {error}; keep texts, numbers and lists") from error
