"""Rewards, advantages and CFM: numbers worked out from the equations (golden/energy.json), and brute-force loops."""

import json

import equations
import pytest
import torch
from golden import GOLDEN

from megatron_ebft.method import energy
from megatron_ebft.run.flags.table import FLAGS

CASES = json.loads((GOLDEN / "energy.json").read_text())
TOLERANCE = 1e-6
WHITENINGS, ADVANTAGES = (FLAGS[f"ebft_{name}"].choices for name in ("whitening", "advantage"))


def close(actual, expected, tolerance=TOLERANCE):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=torch.float64), atol=tolerance, rtol=0.0)


def gram(rollouts, reference):
    return energy.gram(torch.cat([torch.as_tensor(rollouts), torch.as_tensor(reference).unsqueeze(-2)], dim=-2))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("whitening", WHITENINGS)
def test_rewards_and_advantages_of_the_golden_groups(case, whitening):
    alignment, diversity = energy.rewards(gram(case["rollouts"], case["reference"]), whitening)
    close(alignment, case[whitening]["alignment"])
    close(diversity, case[whitening]["diversity"])
    for alpha in (1.0, 0.5, 0.0):
        close(energy.advantages(alignment, diversity, "rloo", 1.0, alpha), case[whitening][f"advantage_alpha_{alpha}"])


@pytest.mark.parametrize("case", CASES)
def test_cfm_of_the_golden_groups(case):
    biased, unbiased = energy.cfm(gram(case["rollouts"], case["reference"]))
    close(biased, case["cfm_biased"])
    close(unbiased, case["cfm_unbiased"])


def random_groups(seed: int, n: int, dimension: int, duplicates: int):
    """[3, 2] groups of n rollouts, the last `duplicates` of each equal to the first, of unit length; and references."""
    generator = torch.Generator().manual_seed(seed)
    rollouts = torch.randn(3, 2, n, dimension, generator=generator, dtype=torch.float64)
    reference = torch.randn(3, 2, dimension, generator=generator, dtype=torch.float64)
    if duplicates:
        rollouts[:, :, -duplicates:] = rollouts[:, :, :1]
    return equations.unit(rollouts), equations.unit(reference)


@pytest.mark.parametrize("n, dimension, duplicates",
                         [(2, 6, 0), (2, 6, 1), (3, 6, 0), (4, 12, 2), (4, 12, 3), (5, 3, 0), (8, 24, 0), (1, 6, 0)])
@pytest.mark.parametrize("whitening", WHITENINGS)
def test_random_groups_against_loops(n, dimension, duplicates, whitening):
    rollouts, reference = random_groups(n * 100 + dimension, n, dimension, duplicates)
    M = gram(rollouts, reference)
    alignment, diversity = energy.rewards(M, whitening)
    biased, unbiased = energy.cfm(M)
    for group in torch.cartesian_prod(torch.arange(3), torch.arange(2)).tolist():
        X, y, here = rollouts[*group], reference[*group], tuple(group)
        for alpha in (1.0, 0.5):
            expected_alignment, expected_diversity, _ = equations.rewards(X, y, alpha, whitening)
            close(alignment[here], expected_alignment)
            close(diversity[here], expected_diversity)
            for kind in ADVANTAGES if n > 1 else ["reinforce"]:
                if kind == "group_norm" and duplicates == n - 1:
                    continue  # no spread: 0/0 up to rounding
                expected = equations.advantages(expected_alignment, expected_diversity, alpha, kind)
                close(energy.advantages(alignment, diversity, kind, 1.0, alpha)[here], expected)
        close(biased[here], equations.cfm_biased(X, y))
        if n > 1:
            close(unbiased[here], equations.cfm_unbiased(X, y))
        else:
            assert unbiased[here].isnan()


@pytest.mark.parametrize("kind", ["rloo", "group_norm"])
@pytest.mark.parametrize("whitening", WHITENINGS)
def test_equal_rollouts_have_no_advantage(kind, whitening):
    rollouts, reference = random_groups(0, 4, 12, duplicates=3)
    alignment, diversity = energy.rewards(gram(rollouts, reference), whitening)
    close(energy.advantages(alignment, diversity, kind, 1.0, 1.0), torch.zeros(3, 2, 4), tolerance=1e-6)
    equal = (x[..., :1].expand_as(x) for x in (alignment, diversity))  # no rounding in these: none in what is left
    assert (energy.advantages(*equal, kind, 0.9, 0.7) == 0).all()


def test_the_alignment_coefficient_scales_reward_and_baseline():
    rollouts, reference = random_groups(1, 4, 12, duplicates=0)
    alignment, diversity = energy.rewards(gram(rollouts, reference), "none")
    for kind in ("rloo", "reinforce"):
        close(energy.advantages(alignment, diversity, kind, 3.0, 0.5),
              3 * energy.advantages(alignment, diversity, kind, 1.0, 0.5 / 3))


def test_gram_is_a_sum_over_the_feature_dimension():
    rollouts, reference = random_groups(2, 4, 12, duplicates=0)
    parts = zip(rollouts.float().split([5, 7], dim=-1), reference.float().split([5, 7], dim=-1))
    close(sum(gram(*pair) for pair in parts), gram(rollouts.float(), reference.float()), 1e-12)


def test_paper_whitening_rewards_what_is_left_of_the_reference():
    """With n < D and distinct rollouts: no diversity, and the squared cosines of a group sum to 1."""
    alignment, diversity = energy.rewards(gram(*random_groups(3, 4, 12, duplicates=0)), "paper")
    close(diversity, torch.zeros_like(diversity), 1e-9)
    close((alignment / 2).square().sum(-1), torch.ones(3, 2), 1e-9)


@pytest.mark.parametrize("kind", ["rloo", "group_norm"])
def test_one_rollout_has_no_others(kind):
    alignment, diversity = energy.rewards(gram(*random_groups(0, 1, 6, duplicates=0)), "none")
    with pytest.raises(AssertionError, match="one rollout has no others"):
        energy.advantages(alignment, diversity, kind, 1.0, 1.0)


def test_unknown_kinds_are_named():
    M = gram(*random_groups(0, 2, 6, duplicates=0))
    with pytest.raises(AssertionError, match="pca"):
        energy.rewards(M, "pca")
    with pytest.raises(AssertionError, match="gae"):
        energy.advantages(*energy.rewards(M, "none"), "gae", 1.0, 1.0)
