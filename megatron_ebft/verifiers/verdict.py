"""What a verifier says about one answer."""

from dataclasses import dataclass, replace

LONGEST_REASON = 200
"""Characters of a reason. Answers can put any text into the messages of their exceptions."""


@dataclass(kw_only=True)
class Verdict:
    """The verdict on one answer."""

    score: float
    """From 0 to 1."""
    is_right: bool
    """Whether the answer solves the question. BLEU, chrF and functions of the user: whether the score is 1."""
    reason: str = ""
    """Why not, in one line; "" if it is right."""
    failed: bool = False
    """Whether the verifier itself could not judge: it raised, died, took too long, or returned what is no score."""


RIGHT = Verdict(score=1.0, is_right=True)


def wrong(reason: str, score: float = 0.0) -> Verdict:
    """The verdict on an answer that is not right."""
    line = "".join(x if x.isprintable() else " " for x in reason[:4 * LONGEST_REASON])
    line = " ".join(line.split()) or "no reason given"
    return Verdict(score=score, is_right=False,
                   reason=line if len(line) <= LONGEST_REASON else line[:LONGEST_REASON - 1] + "…")


def failure(reason: str) -> Verdict:
    """The verdict on an answer that the verifier could not judge. It counts as wrong."""
    return replace(wrong(reason), failed=True)
