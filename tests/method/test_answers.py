"""Counting right answers: pass@k against all sets of samples, and intervals of means."""

from itertools import combinations

import pytest

from megatron_ebft.data.questions import Question
from megatron_ebft.method import answers
from megatron_ebft.method.answers import AnswersConfig, Mean, evaluate_answers, pass_at_k
from megatron_ebft.rollout.generation import Completion, GenerationConfig
from megatron_ebft.verifiers.verdict import RIGHT, failure, wrong


@pytest.mark.parametrize("samples", [1, 2, 5, 7])
def test_pass_at_k_counts_the_sets_with_a_right_sample(samples):
    for right in range(samples + 1):
        verdicts = [i < right for i in range(samples)]
        for k in range(1, samples + 1):
            sets = list(combinations(verdicts, k))
            assert pass_at_k(samples, right, k) == pytest.approx(sum(map(any, sets)) / len(sets), abs=1e-12)


def test_intervals_cover_the_mean_as_often_as_they_say():
    """Of means of 60 questions of which 30 % are right: 95 % of the intervals hold 0.3, within sampling error."""
    import random

    generator, held = random.Random(0), 0
    for _ in range(200):
        mean = Mean([float(generator.random() < 0.3) for _ in range(60)])
        low, high = mean.interval()
        assert low <= mean.value <= high
        held += low <= 0.3 <= high
    assert 0.89 <= held / 200 <= 0.99
    assert Mean([0.5] * 9).interval() == (0.5, 0.5)


QUESTIONS = [Question({}, [i]) for i in range(11)]


def evaluated(monkeypatch, **calls):
    """Of questions with three samples each, four completions at a time; the sample's place is its text."""
    monkeypatch.setattr(answers, "generate", lambda policy, prompts, config, iteration: [
        [Completion(prompt + [i]) for i in range(config.num_samples)] for prompt in prompts])
    verdicts = [wrong("no"), RIGHT, failure("broken")]
    config = AnswersConfig(generation=GenerationConfig(max_new_tokens=9, temperature=1.0, num_samples=3, rows=4),
                           pass_at=(1, 3))
    return evaluate_answers([], QUESTIONS, lambda given: [
        verdicts[sum(completion.tokens) % 3] for _, completion in given], config, lambda given: {}, **calls)


def test_an_evaluation_can_be_ended_after_every_part(one_rank, monkeypatch):
    """Parts of eight greedy answers, then of three questions with their samples; the figures are those of all."""
    counts, ended = [], []
    result = evaluated(monkeypatch, between=lambda: ended.append(len(counts)), done=counts.append)
    assert counts == [8, 11, 20, 29, 38, 44] and ended == [1, 2, 3, 4, 5, 6]
    assert [[answer.completion.tokens for answer in group] for group in result.answers] == [
        [[i, 0], [i, 0], [i, 1], [i, 2]] for i in range(11)]
    assert {name: x.value for name, x in result.means.items()} == pytest.approx({
        "accuracy": 4 / 11, "score": 4 / 11, "length": 2, "sampled_score": 1 / 3, "pass@1": 1 / 3, "pass@3": 1,
        "failed": 14 / 44})
    assert (result.failures.count, result.failures.total, result.failures.reason) == (14, 44, "broken")

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluated(monkeypatch, between=stop, done=counts.append)
    assert counts[6:] == [8]
