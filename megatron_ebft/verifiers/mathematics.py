"""The verifier `math`: whether the expression in an answer equals the question's, by math-verify."""

import logging
from collections.abc import Callable

from megatron_ebft.verifiers.questions import texts
from megatron_ebft.verifiers.verdict import RIGHT, Verdict, failure, wrong


def check(question: dict) -> None:
    """Raise ValueError unless the question has an `answer`."""
    texts(question, "answer")


def load() -> Callable[[dict, str], Verdict]:
    """The judge. Call it in the main thread: math-verify's own clock needs signals."""
    import math_verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its clock is off; a worker has another

    def parse(text: str) -> list:
        return math_verify.parse(text, parsing_timeout=None)

    def judge(question: dict, completion: str) -> Verdict:
        answers = texts(question, "answer")
        got = parse(completion)
        for answer in answers:
            gold = parse(answer if "$" in answer or r"\boxed" in answer else f"${answer}$")
            if not gold:
                return failure(f"answer {answer!r} has no expression that math-verify can read; correct it, or use the "
                               "verifier exact")
            if math_verify.verify(gold, got, timeout_seconds=None):
                return RIGHT
        return wrong(f"expected {' or '.join(answers)}, got {got[-1] if got else 'no expression'}")

    return judge
