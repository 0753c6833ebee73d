"""A verifier: judges answers to questions."""

from collections.abc import Callable

from megatron_ebft.verifiers import translation
from megatron_ebft.verifiers.pool import Pool
from megatron_ebft.verifiers.verdict import Verdict


class Verifier:
    """Judges answers in child processes. Use it in the thread that makes it: the children end with this thread.

    Args:
        name: one of build.NAMES, or module:function.
        check: raises ValueError for a question that lacks a field.
        pool: the children.
    """

    def __init__(self, name: str, check: Callable[[dict], None], pool: Pool):
        self.name = name
        self.signature = ""
        """sacrebleu's signature of the last corpus score."""
        self._check, self._pool = check, pool

    def check_question(self, question: dict) -> None:
        """Raise ValueError, naming the field, if a question line lacks one or has a malformed one.

        Of `math`, a child reads the answers.
        """
        self._check(question)
        if self.name == "math":
            verdict, = self._pool.run([(question, "")])
            if verdict.failed:
                raise ValueError(verdict.reason)

    def verify(self, answers: list[tuple[dict, str]]) -> list[Verdict]:
        """Judge answers: question line and completion of each. Verdicts come in the same order.

        An answer that hangs, or whose child crashes, has `failed`, and counts as wrong; no other verdict changes. With
        `code`, one that hangs is wrong.
        """
        return self._pool.run(answers)

    def corpus_score(self, answers: list[tuple[dict, str]]) -> dict[str, float]:
        """Corpus BLEU or chrF, from 0 to 100, as sacrebleu's command gives it. {} for other verifiers."""
        if self.name not in ("bleu", "chrf") or not answers:
            return {}
        score, self.signature = translation.corpus_score(self.name, answers)
        return {self.name: score}

    def close(self) -> None:
        """End the child processes."""
        self._pool.close()
