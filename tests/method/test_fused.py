"""The fused step against brute force, in float64: random geometries, models and masks.

It samples its own rollouts. Everything then computed on them must be what brute_force.py computes, where each rollout
is a sequence of its own.
"""

from contextlib import nullcontext
from dataclasses import replace

import models
import pytest
import torch
from hypothesis import example, given, settings, strategies
from random_steps import TOLERANCE, Case, Step, assert_close, check_gradient, random_case

from megatron_ebft.method.fused import fused_gradient
from megatron_ebft.method.means import Means

pytestmark = pytest.mark.usefixtures("one_rank", "float64")


def fused(step: Step, means: Means, start=None, config=None):
    encoder = models.build_encoder(step.config, step.encoder_weights)
    return fused_gradient(step.policy, encoder, start, step.gold, config or step.method, 7, means,
                          lambda phase: nullcontext(), lambda: None)


@settings(derandomize=True, database=None, deadline=None, max_examples=20)
@given(strategies.integers(0, 2**32 - 1).map(random_case))
@example(Case(G=1, s=3, blocks_per_microbatch=2))
@example(Case(n=1, advantage="reinforce"))
@example(Case(s=1, G=4, blocks_per_microbatch=3))  # overlapping completions; a smaller last part
@example(Case(s=5, G=2, rows=4, micro_batch_size=2, eods=(0, 7)))
@example(Case(eods=(2, 3, 4, 5, 6, 7, 8), answers=(6, 12)))  # documents shorter than a completion
@example(Case(answers=(14, 14)))  # nothing to train on
@example(Case(n=4, G=1, temperature=0.1, eods=(6,), rows=4, micro_batch_size=2, blocks_per_microbatch=3))  # duplicates
@example(Case(T=40, c=2, s=1, G=5, n=4, rows=1, eods=(9, 20)))  # several chunks of attention
@example(Case(T=20, c=1, G=5, n=4, rows=4, micro_batch_size=2, temperature=0.3, eods=(9, 4)))  # rollouts begin alike
@example(Case(T=20, c=1, n=4, rows=3, micro_batch_size=3, temperature=0.3, answers=(0, 20)))  # row 0 leaves none out
def test_a_fused_step_is_brute_force(case):
    step, means = Step(replace(case, has_duplicates=False)), Means()
    computed = fused(step, means)
    valid = step.gold.valid_blocks(step.method.layout).cpu()
    assert torch.equal(computed.rollouts.tokens_BKNG.cpu()[valid], step.rollouts.tokens_BKNG.cpu()[valid])
    assert_close(computed.rollouts.entropy_BKNG.cpu()[valid], step.rollouts.entropy_BKNG.cpu()[valid])

    expected = step.brute_force()
    for key, actual in (("alignment", computed.rewards.alignment_BKn), ("diversity", computed.rewards.diversity_BKn),
                        ("advantage", computed.advantage_BKN)):
        assert_close(actual.cpu()[valid], expected[key][valid])
    scores = computed.scores
    assert scores.is_scored_BKNG[valid.to(scores.is_scored_BKNG.device)].all()
    assert scores.rollout_BKNG.isfinite().equal(scores.is_scored_BKNG)
    assert_close(scores.rollout_BKNG.cpu()[valid], expected["log_probs"][valid])
    assert torch.equal(scores.rollout_BKNG[scores.is_scored_BKNG],
                       computed.rollouts.log_probs_BKNG[scores.is_scored_BKNG])  # sampler and training pass are one
    assert_close(scores.gold_BT.cpu(), expected["gold_log_probs"])
    losses = means.reduce()
    for key in ("rl_loss", "ce_loss"):
        assert losses.get(key, 0.0) == pytest.approx(expected[key].item(), abs=TOLERANCE)
    check_gradient(step, expected["grads"])


def test_what_rollouts_have_in_common_is_decoded_once():
    """In as many places as the fullest row needs, rounded up twice: to a sixteenth of a row, and to `pad_to`."""
    step, saved = Step(Case(T=20, c=1, G=5, n=4, rows=2, micro_batch_size=2, temperature=0.3)), Means()
    computed = fused(step, saved, config=replace(step.method, layout=replace(step.method.layout, pad_to=4)))
    distinct = [[len({(block, *rollout[:length]) for block, rollouts in enumerate(row) for rollout in rollouts})
                 for length in range(1, 5)] for row in computed.rollouts.tokens_BKNG.tolist()]
    whole = step.method.layout.num_blocks * 4
    room = -(-whole // 16)
    decoded = [min(whole, -(-max(counts) // room) * room) for counts in zip(*distinct)]
    full, padded = -(-whole // 4) * 4, sum(-(-count // 4) * 4 for count in decoded)
    share = (4 * full - padded) / (20 + 4 * full)
    assert saved.reduce()["training_tokens_saved"] == pytest.approx(share) and share > 0.1


def test_small_parts_save_nothing():
    """Rounded up, such a part has room for more rollouts than it has."""
    means = Means()
    fused(Step(Case(T=40, c=2, s=1, n=4, rows=1, temperature=1.0, blocks_per_microbatch=2)), means)
    assert means.reduce()["training_tokens_saved"] == 0


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_the_kl_term_is_brute_force(estimator):
    step = Step(Case(n=4, temperature=0.4, eods=(6,), blocks_per_microbatch=3), kl_coef=0.5, kl_estimator=estimator)
    means = Means()
    fused(step, means, models.build_start(step.config, step.reference_weights))
    expected = step.brute_force()
    assert means.reduce()["kl_loss"] == pytest.approx(expected["kl"].item(), abs=TOLERANCE)
    check_gradient(step, expected["grads"])
