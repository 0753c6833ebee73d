"""Evaluation by questions: completions are generated, verified and counted.

1. The greedy completion of each question gives its accuracy. Samples give pass@k, the probability that one of k samples
   is right, by the unbiased estimator of Chen et al. (2021).
2. Intervals are bootstraps over questions: 95 % of the means of as many questions, drawn with replacement.
3. Every evaluation draws the same random numbers, so that two evaluations differ by the policy alone.
4. Questions are answered in parts, after each of which an evaluation can be ended.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy

from megatron_ebft.data.questions import Question
from megatron_ebft.method.evaluation import EVALUATION_ITERATION
from megatron_ebft.method.verdicts import Failures, Verify, failures, verdicts
from megatron_ebft.parallel.groups import collected, dealt, dp_size
from megatron_ebft.rollout.generation import Completion, GenerationConfig, generate
from megatron_ebft.verifiers.verdict import Verdict

RESAMPLES = 2000
"""Draws of a bootstrap."""
ROUNDS = 2
"""Completions of a part, on each rank, as multiples of those that decode together. A row is then used twice or more."""


@dataclass(kw_only=True)
class AnswersConfig:
    """How questions are answered."""

    generation: GenerationConfig
    """Of the samples. Its `num_samples` is K."""
    pass_at: tuple[int, ...]
    """k of pass@k, each at most K. Empty: greedy completions alone."""

    @property
    def num_answers(self) -> int:
        """Answers of each question."""
        return 1 + (self.generation.num_samples if self.pass_at else 0)


@dataclass
class Answer:
    """A completion of a question, and what the verifier says of it."""

    completion: Completion
    verdict: Verdict


@dataclass(frozen=True)
class Mean:
    """A mean over questions."""

    values: list[float] = field(repr=False)
    """Of each question."""

    @property
    def value(self) -> float:
        return float(numpy.mean(self.values))

    def interval(self) -> tuple[float, float]:
        """Bounds of the 95 % interval, by a bootstrap of RESAMPLES draws."""
        values_Q, generator = numpy.asarray(self.values), numpy.random.default_rng(0)
        drawn = [values_Q[generator.integers(len(values_Q), size=len(values_Q))].mean() for _ in range(RESAMPLES)]
        low, high = numpy.quantile(drawn, (0.025, 0.975))
        return float(low), float(high)


@dataclass
class Answered:
    """What an evaluation by questions has found."""

    means: dict[str, Mean]
    """`accuracy`, `score` and `length` of the greedy answers; `sampled_score` and `pass@k` of the samples; `failed`:
    the share of all answers that the verifier could not judge."""
    corpus: dict[str, float]
    """BLEU or chrF of the greedy answers together, with these verifiers."""
    answers: list[list[Answer]] = field(repr=False)
    """Of each question, the greedy one first."""
    failures: Failures
    """Of all answers."""


def evaluate_answers(policy: list, questions: list[Question], verify: Verify, config: AnswersConfig,
                     corpus_score: Callable[[list[tuple[Question, Completion]]], dict[str, float]],
                     between: Callable[[], None] = lambda: None,
                     done: Callable[[int], None] = lambda answered: None) -> Answered:
    """Answer all questions and count the right answers; the same on every rank.

    Args:
        questions: the same on every rank. Data-parallel ranks share them out.
        corpus_score: scores of all greedy answers together.
        between: is called after each part of the questions; may end the evaluation by an exception.
        done: is called after each part with the number of answers so far: `config.num_answers` of each question, in
            the end.
    """
    greedy = _answers(policy, questions, verify, replace(config.generation, temperature=0.0, num_samples=1), between,
                      done)
    firsts = [answers[0] for answers in greedy]
    means = {"accuracy": Mean([float(answer.verdict.is_right) for answer in firsts]),
             "score": Mean([answer.verdict.score for answer in firsts]),
             "length": Mean([float(len(answer.completion.tokens)) for answer in firsts])}
    corpus = corpus_score([(question, answer.completion) for question, answer in zip(questions, firsts)])
    whole = greedy
    if config.pass_at:
        samples = _answers(policy, questions, verify, config.generation, between,
                           lambda answered: done(len(questions) + answered))
        means["sampled_score"] = Mean([sum(answer.verdict.score for answer in answers) / len(answers)
                                       for answers in samples])
        for k in config.pass_at:
            means[f"pass@{k}"] = Mean([pass_at_k(len(answers), sum(answer.verdict.is_right for answer in answers), k)
                                       for answers in samples])
        whole = [first + others for first, others in zip(greedy, samples, strict=True)]
    means["failed"] = Mean([sum(answer.verdict.failed for answer in answers) / len(answers) for answers in whole])
    failed = failures([[answer.verdict for answer in answers] for answers in dealt(whole)])
    return Answered(means, corpus, whole, failed)


def _answers(policy: list, questions: list[Question], verify: Verify, generation: GenerationConfig,
             between: Callable[[], None], done: Callable[[int], None]) -> list[list[Answer]]:
    """Answers to all questions, `[question][sample]`, on every rank."""
    answers: list[list[Answer]] = []
    size = -(-ROUNDS * generation.rows // generation.num_samples) * dp_size()
    for first in range(0, len(questions), size):
        mine = dealt(questions[first : first + size])
        completions_QN = generate(policy, [question.prompt for question in mine], generation,
                                  iteration=EVALUATION_ITERATION)
        verdicts_QN = verdicts(mine, completions_QN, verify)
        answers += collected([list(map(Answer, *pair)) for pair in zip(completions_QN, verdicts_QN, strict=True)])
        done(len(answers) * generation.num_samples)
        between()
    return answers


def pass_at_k(samples: int, right: int, k: int) -> float:
    """1 − C(samples − right, k) / C(samples, k): the share of the sets of k samples that have a right one."""
    assert 0 <= right <= samples >= k >= 1
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)
