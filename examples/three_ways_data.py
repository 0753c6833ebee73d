"""Make the questions, answers and tokenizer of three_ways.sh.

    python examples/three_ways_data.py DIR

1. A question asks for a Python expression: "the sum of the squares of the even numbers above 5". Its answer is
   `sum(x * x for x in numbers if x % 2 == 0 and x > 5)`. Other spellings of the same expression are right as well.
2. In `pretrain.jsonl`, the share WRONG of the answers is wrong in one part. `train.jsonl` and `valid.jsonl` have right
   answers. No question is in two of the three files.
3. A line has `prompt`, `completion` (one spelling) and `answer` (all right spellings, for the verifier `exact`).
4. `tokenizer.model` is the quickstart's kind of tokenizer, trained on the pretraining text only.
"""

import itertools
import json
import random
import sys
from pathlib import Path
from typing import NamedTuple

from quickstart_data import train_tokenizer

from megatron_ebft.common.disk import aside

FUNCTIONS = {"sum": "sum", "product": "prod", "largest": "max", "smallest": "min"}
VALUES = {"": ("x",), "the squares of ": ("x * x", "x ** 2"), "the cubes of ": ("x * x * x", "x ** 3"),
          "the doubles of ": ("2 * x", "x + x"), "the opposites of ": ("-x", "0 - x")}
KINDS = {"even numbers": ("x % 2 == 0", "not x % 2"), "odd numbers": ("x % 2 == 1", "x % 2"),
         "multiples of three": ("x % 3 == 0", "not x % 3")}
SIDES = {"above": ("x > {}", "{} < x"), "below": ("x < {}", "{} > x")}
BOUNDS = {str(bound): str(bound) for bound in range(2, 42)}
VALID, TRAIN = 256, 1500
"""Questions to evaluate on and to fine-tune on. Pretraining takes the others."""
WRONG = 0.6
"""Share of the pretraining answers that are wrong."""
REPEATS = 2
"""Pretraining documents of each question."""
VOCAB_SIZE = 352  # 256 of them are bytes


class Question(NamedTuple):
    """A question by its parts, each a key of the table of that name."""

    function: str
    value: str
    kind: str
    side: str
    bound: str

    def text(self) -> str:
        return f"the {self.function} of {self.value}the {self.kind} {self.side} {self.bound}\n"

    def answers(self) -> list[str]:
        """All right answers."""
        sides = [side.format(self.bound) for side in SIDES[self.side]]
        return [f"{FUNCTIONS[self.function]}({value} for x in numbers if {first} and {second})"
                for value, kind, side in itertools.product(VALUES[self.value], KINDS[self.kind], sides)
                for first, second in ((kind, side), (side, kind))]

    def mistaken(self, random_numbers: random.Random) -> "Question":
        """A question that differs in one part."""
        parts, index = list(self), random_numbers.randrange(len(self))
        parts[index] = random_numbers.choice([key for key in TABLES[index] if key != parts[index]])
        return Question(*parts)


TABLES = (FUNCTIONS, VALUES, KINDS, SIDES, BOUNDS)


def line(question: Question, answered: Question, random_numbers: random.Random) -> dict:
    """A question with an answer to a question that is perhaps another."""
    return {"prompt": question.text(), "completion": random_numbers.choice(answered.answers()),
            "answer": question.answers()}


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    random_numbers = random.Random(0)
    questions = list(itertools.starmap(Question, itertools.product(*TABLES)))
    random_numbers.shuffle(questions)
    splits = {"valid": [line(question, question, random_numbers) for question in questions[:VALID]],
              "train": [line(question, question, random_numbers) for question in questions[VALID:VALID + TRAIN]],
              "pretrain": []}
    for question in questions[VALID + TRAIN:] * REPEATS:
        is_wrong = random_numbers.random() < WRONG
        answered = question.mistaken(random_numbers) if is_wrong else question
        splits["pretrain"].append(line(question, answered, random_numbers))
    for split, lines in splits.items():
        with aside(folder / f"{split}.jsonl") as unfinished, open(unfinished, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(fields) + "\n" for fields in lines)
        print(f"{split}: {len(lines)} questions with an answer")
    texts = [fields["prompt"] + fields["completion"] for fields in splits["pretrain"]]
    with aside(folder / "tokenizer.model") as unfinished:  # the model appears last: it marks the data as complete
        unfinished.write_bytes(train_tokenizer(texts, VOCAB_SIZE))
    print(f"tokenizer: {VOCAB_SIZE} pieces")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
