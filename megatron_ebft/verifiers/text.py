"""The verifiers `exact` and `regex`, which compare texts."""

import re

from megatron_ebft.verifiers.questions import texts
from megatron_ebft.verifiers.verdict import RIGHT, Verdict, wrong


def check_exact(question: dict) -> None:
    """Raise ValueError unless the question has an `answer`."""
    texts(question, "answer")


def judge_exact(question: dict, completion: str) -> Verdict:
    """Right if the completion is one of the answers, white space at both ends aside."""
    return _is_one_of(texts(question, "answer"), completion)


def check_regex(question: dict) -> None:
    """Raise ValueError unless the question has a `pattern` that compiles, with a group if it has an `answer`."""
    pattern, = texts(question, "pattern", is_single=True)
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"pattern {pattern!r} is no regular expression ({error})") from error
    if "answer" in question:
        texts(question, "answer")
        if not groups:
            raise ValueError(f"pattern {pattern!r} has no group to compare with answer; put one in parentheses")


def judge_regex(question: dict, completion: str) -> Verdict:
    """Right if the pattern is found and its first group is one of the answers, where there are any."""
    found = re.search(question["pattern"], completion)
    if found is None:
        return wrong(f"{question['pattern']} is not found")
    return _is_one_of(texts(question, "answer"), found[1] or "") if "answer" in question else RIGHT


def _is_one_of(answers: list[str], text: str) -> Verdict:
    expected, got = [x.strip() for x in answers], text.strip()
    return RIGHT if got in expected else wrong(f"expected {' or '.join(expected)}, got {got}")
