"""Conversations as tokens, and which of them are the assistant's.

1. A chat template renders the whole conversation as one text, which is tokenised once, as for inference. No ids are
   added.
2. An answer is what the assistant adds: it begins where the text of the messages before it ends, the template's
   generation prompt included. The token that ends the turn belongs to it. White space after that token is the
   template's, and a model that stops at the token never writes it.
3. Both ends are found by rendering the beginning of the conversation. If the whole text does not begin with that
   rendering, the template rewrites earlier turns (some drop earlier reasoning), and training would show the model
   other texts than inference does. Such a conversation is refused.
4. A token belongs to an answer if any of its characters does, as in `Tokenizer.tokenize_pair`.
"""

import hashlib
from dataclasses import dataclass

import numpy

from megatron_ebft.common.disk import read_bytes
from megatron_ebft.data.tokenizer import HuggingFaceTokenizer, Tokenizer, first_difference

ASSISTANT = "assistant"
SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": ASSISTANT, "assistant": ASSISTANT,
                  "tool": "tool", "function": "tool", "observation": "tool"}
"""The role of each `from` in ShareGPT's messages, {"from": ..., "value": ...}."""


class NoAnswer(Exception):
    """A conversation has no answer to train on. The message says why, of several conversations."""


@dataclass
class ChatTokens:
    """A conversation of L tokens."""

    text: str
    """What the template made of it."""
    ids: list[int]
    answer_L: numpy.ndarray
    """bool, True on the assistant's tokens."""
    prompt: str
    """The text before the last answer, generation prompt included."""
    answer: str
    """Content of the last answer's message."""
    ends_document: bool
    """Whether the last id is the end-of-document id, but for white space."""
    empty_turns: int
    """The assistant's messages without content. They are no answers."""
    split_tokens: int
    """Answers that begin inside a token: inference, which tokenises the prompt alone, has other tokens there."""


def read_messages(value: object) -> list[dict]:
    """The messages of a conversation, each with a `role`, without keys that are null. Accepts ShareGPT's names.

    Raises:
        ValueError: it is no list of messages; names the message, counted from 1.
    """
    if not isinstance(value, list):
        raise ValueError('not a list of messages, [{"role": ..., "content": ...}, ...]')
    messages = []
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict):
            raise ValueError(f"message {number} is not an object with role and content")
        message = {key: part for key, part in message.items() if part is not None}
        if "role" not in message and "from" in message:
            speaker = str(message["from"])
            if speaker not in SHAREGPT_ROLES:
                raise ValueError(f"message {number} is from {speaker!r}; known are {', '.join(SHAREGPT_ROLES)}")
            message = {"role": SHAREGPT_ROLES[speaker], "content": message.get("value")}
        role, content = message.get("role"), message.get("content", "" if len(message) > 1 else None)
        if not isinstance(role, str) or not isinstance(content, str | list):
            raise ValueError(f"message {number} needs a role and a content; it has {', '.join(map(repr, message))}")
        messages.append(message)
    return messages


def _is_empty(message: dict) -> bool:
    """Whether a message says nothing: no content, and no tool calls or the like either."""
    content = message.get("content", "")
    return message.keys() <= {"role", "content"} and not (content.strip() if isinstance(content, str) else content)


class ChatTemplate:
    """Renders and tokenises conversations.

    Args:
        tokenizer: a Hugging Face tokenizer.
        path: a Jinja file; None: the tokenizer's own template.
        last_turn_only: the assistant's last message is the only answer.

    Raises:
        ValueError: the tokenizer is of another type, or there is no template; names the flag.
    """

    def __init__(self, tokenizer: Tokenizer, path: str | None = None, last_turn_only: bool = False):
        if not isinstance(tokenizer, HuggingFaceTokenizer):
            raise ValueError(f"--tokenizer-type {tokenizer.name}: chat templates need a HuggingFaceTokenizer")
        self.tokenizer, self.last_turn_only = tokenizer, last_turn_only
        if path is None:
            self.source = tokenizer.chat_template()
        else:
            try:
                self.source = read_bytes(path).decode()
            except (OSError, ValueError) as error:
                raise ValueError(f"--chat-template {path}: cannot be read ({error}); give a Jinja file") from error
        self.fingerprint = hashlib.sha256(self.source.encode()).hexdigest()

    def render(self, messages: list[dict], add_generation_prompt: bool = False) -> str:
        """The text of messages; with the generation prompt, what the assistant continues."""
        return self.tokenizer.render_chat(messages, self.source, add_generation_prompt)

    def tokenize(self, messages: list[dict]) -> ChatTokens:
        """The tokens of a conversation, and which are answers.

        Raises:
            NoAnswer: the assistant says nothing, or speaks first.
            ValueError: the template fails, or rewrites earlier turns; names the message, counted from 1.
        """
        turns = [i for i, message in enumerate(messages) if message["role"] == ASSISTANT]
        spoken = [i for i in turns if not _is_empty(messages[i])]
        if not spoken:
            raise NoAnswer("conversations without an answer")
        if spoken[0] == 0:
            raise NoAnswer("conversations that begin with an answer")
        text = self.render(messages)
        text.encode()  # refuses lone surrogates, on which tokenizers disagree
        ids, places = self.tokenizer.tokenize_with_places(text)
        begin_L, end_L = numpy.array(places, dtype=numpy.int64).reshape(-1, 2).T
        answers = [self._answer(messages, turn, text) for turn in (spoken[-1:] if self.last_turn_only else spoken)]
        answer_L = numpy.zeros(len(ids), dtype=bool)
        for begin, end in answers:
            answer_L |= (begin_L < end) & (end_L > begin)
        if not answer_L.any():
            raise ValueError("the chat template writes nothing of the assistant's messages; give another, "
                             "--chat-template")
        split = sum(bool(((begin_L < begin) & (end_L > begin)).any()) for begin, _ in answers)
        last = next((i for i in reversed(range(len(ids))) if text[slice(*places[i])].strip()), 0)
        begin, end = answers[-1]
        content = messages[spoken[-1]].get("content")
        return ChatTokens(text, ids, answer_L, text[:begin], content if isinstance(content, str) else text[begin:end],
                          ids[last] == self.tokenizer.eod, len(turns) - len(spoken), split)

    def _answer(self, messages: list[dict], turn: int, text: str) -> tuple[int, int]:
        """Where an answer begins and ends in the conversation's text."""
        before = self.render(messages[:turn], add_generation_prompt=True)
        after = self.render(messages[:turn + 1])
        if not after.startswith(before):
            raise ValueError(f"message {turn + 1}: the chat template does not begin the assistant's turn as its "
                             f"generation prompt does ({first_difference(before, after)}): give a template that does, "
                             "--chat-template")
        if not text.startswith(after):
            raise ValueError(f"message {turn + 1}: the chat template writes it otherwise once other messages follow "
                             f"({first_difference(after, text)}): train on the last answer alone, --last-turn-only, or "
                             "give a template that keeps earlier turns, --chat-template")
        written = after.rstrip()
        is_ended = len(written) > len(before) and written.endswith(self.tokenizer.special_texts)
        return len(before), len(written) if is_ended else len(after)
