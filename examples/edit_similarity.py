"""A verifier of your own, for --ebft-verifier edit_similarity:ratio. Questions have an `answer`."""

import difflib


def ratio(question: dict, completion: str) -> float:
    """2 M / T, where T characters of completion and answer are in M pairs of equal ones, in order: 1 if they are equal.

    White space at both ends does not count.
    """
    texts = completion.strip(), question["answer"].strip()
    return difflib.SequenceMatcher(None, *texts, autojunk=False).ratio()
