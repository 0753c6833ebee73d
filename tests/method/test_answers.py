"""Counting right answers: pass@k against all sets of samples, and intervals of means."""

from itertools import combinations

import pytest

from megatron_ebft.method.answers import mean, pass_at_k


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
        interval = mean([float(generator.random() < 0.3) for _ in range(60)])
        assert interval.low <= interval.value <= interval.high
        held += interval.low <= 0.3 <= interval.high
    assert 0.89 <= held / 200 <= 0.99
    assert mean([0.5] * 9) == mean([0.5] * 9) and mean([0.5] * 9).low == mean([0.5] * 9).high == 0.5
