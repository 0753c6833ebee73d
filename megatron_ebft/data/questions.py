"""Questions whose answers can be verified, from JSON Lines.

1. A line is a JSON object: `prompt`, a text, and the fields that the verifier reads.
2. The questions of a step depend on the consumed samples alone, not on the number of ranks. Every epoch shuffles them
   by (seed, epoch).
3. Every rank holds all lines, and tokenises the prompts that it draws.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy

from megatron_ebft.data.json_lines import read_objects
from megatron_ebft.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Question:
    """One line of the file."""

    fields: dict
    """Its JSON object."""
    prompt: list[int]
    """Token ids of its `prompt` (Tokenizer.prompt_ids)."""
    occurrence: int = 0
    """How often the same prompt comes before it in its global batch, on all ranks."""


class Questions:
    """The questions of a file, without end: one shuffled epoch after the other.

    Raises:
        ValueError: the file cannot be read, has no lines, or a line is no JSON object; names the flag and the place.
        OSError: a passing one (common/disk.py).
    """

    def __init__(self, path: str, tokenizer: Tokenizer, seed: int, flag: str = "--ebft-questions"):
        self.tokenizer, self.seed, self.flag = tokenizer, seed, flag
        self.lines = read_objects(path, flag)
        """Place (`file:line`) and JSON object of each question."""
        digest = hashlib.sha256()
        for _, fields in self.lines:
            digest.update(json.dumps(fields).encode())
        self.content_hash = digest.hexdigest()[:16]
        """Of what the lines say, however the file is written."""
        self._epoch, self._order = -1, None

    def __len__(self) -> int:
        """Questions of an epoch."""
        return len(self.lines)

    def check(self, numbers: Iterable[int], check_fields: Callable[[dict], None], longest: int,
              room: str) -> None:
        """Check some lines: their `prompt`, its length, and what the verifier asks of them.

        Args:
            numbers: of the lines, counted from 0.
            check_fields: raises ValueError, naming the field, if a question cannot be verified.
            longest: tokens that a prompt may have.
            room: the flags that leave so many, for the error.

        Raises:
            ValueError: names the place of the first wrong line.
        """
        for number in numbers:
            place, fields = self.lines[number]
            try:
                if not isinstance(fields.get("prompt"), str):
                    raise ValueError("has no text `prompt`")
                length = len(self.tokenizer.prompt_ids(fields["prompt"]))
                if length == 0:
                    raise ValueError("`prompt` has no tokens")
                if length > longest:
                    raise ValueError(f"its prompt has {length} tokens, and {room} leaves room for {longest}: change "
                                     "these, or leave the line out")
                check_fields(fields)
            except ValueError as error:
                raise ValueError(f"{self.flag} {place}: {error}") from error

    def of_step(self, consumed_samples: int, global_batch_size: int, rank: int, size: int) -> list[Question]:
        """One rank's part of the questions that follow `consumed_samples`; `size` ranks share them out."""
        count, seen, mine = global_batch_size // size, Counter(), []
        for position in range((rank + 1) * count):
            fields = self.lines[self._number(consumed_samples + position)][1]
            if position >= rank * count:
                mine.append(self._made(fields, seen[fields["prompt"]]))
            seen[fields["prompt"]] += 1
        return mine

    def in_order(self) -> list[Question]:
        """All questions, in the order of the file."""
        return [self._made(fields) for _, fields in self.lines]

    def _number(self, index: int) -> int:
        """Which line comes at a place of all epochs."""
        epoch, position = divmod(index, len(self.lines))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = numpy.random.default_rng((self.seed, epoch)).permutation(len(self.lines))
        return self._order[position]

    def _made(self, fields: dict, occurrence: int = 0) -> Question:
        return Question(fields, self.tokenizer.prompt_ids(fields["prompt"]), occurrence)
