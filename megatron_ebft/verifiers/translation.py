"""The verifiers `bleu` and `chrf`, by sacrebleu with its default settings."""

from collections.abc import Callable

from megatron_ebft.verifiers.questions import texts
from megatron_ebft.verifiers.verdict import RIGHT, Verdict, wrong

PERFECT = 1 - 1e-9
"""Scores from here on are 1: sacrebleu's logarithms and exponentials round."""


def check(question: dict) -> None:
    """Raise ValueError unless the question has a `reference` or `references`."""
    texts(question, "reference", "references")


def load(name: str) -> Callable[[dict, str], Verdict]:
    """The judge by sentence BLEU or sentence chrF."""
    import sacrebleu

    metric = sacrebleu.BLEU(effective_order=True) if name == "bleu" else sacrebleu.CHRF()

    def judge(question: dict, completion: str) -> Verdict:
        references = [_in_one_line(x) for x in texts(question, "reference", "references")]
        score = metric.sentence_score(_in_one_line(completion), references).score / 100
        return RIGHT if score >= PERFECT else wrong(f"{name} {score:.3f}", score)

    return judge


def corpus_score(name: str, answers: list[tuple[dict, str]]) -> tuple[float, str]:
    """BLEU or chrF of all answers together, from 0 to 100 as sacrebleu's command gives it, and its signature."""
    import sacrebleu

    metric = sacrebleu.BLEU() if name == "bleu" else sacrebleu.CHRF()
    references = [[_in_one_line(x) for x in texts(question, "reference", "references")] for question, _ in answers]
    streams = [[x[i] if i < len(x) else None for x in references] for i in range(max(map(len, references)))]
    score = metric.corpus_score([_in_one_line(completion) for _, completion in answers], streams).score
    return score, str(metric.get_signature())


def _in_one_line(text: str) -> str:
    """The text as a line of the files that sacrebleu's command reads."""
    return " ".join(text.split("\n")).strip()
