"""Property test of the whole step: random geometries, models and masks against one-sequence-at-a-time brute force.

Rollouts are sampled by the package. Everything then computed on them — the sampler's and the training pass's
log-probabilities, gold log-probabilities, features, advantages, losses and gradients, with blocks and rows split at
random — must be what brute_force.py computes, where each rollout is a sequence of its own. Both sides work in float64,
but the package keeps advantages and the sampler's log-probabilities in float32. (All in float32 the largest errors are
5e-6 for log-probabilities, 6e-7 for features and 1e-5 for gradients, which leaves no room for another machine.)
"""

from dataclasses import replace

import brute_force as bf
import models
import pytest
import torch
from hypothesis import example, given, settings, strategies
from random_steps import EOD, TOLERANCE, Case, Step, assert_close, check_gradient, random_case

from megatron_ebft.data.micro_batches import MicroBatches
from megatron_ebft.method import gradient
from megatron_ebft.method.means import Means

pytestmark = pytest.mark.usefixtures("one_rank", "float64")
@settings(derandomize=True, database=None, deadline=None, max_examples=20)
@given(strategies.integers(0, 2**32 - 1).map(random_case))
@example(Case(T=15, c=4, s=3, G=2))  # (T − G − c) not a multiple of s
@example(Case(G=1, s=3, blocks_per_microbatch=2))
@example(Case(n=1, advantage="reinforce"))
@example(Case(s=1, G=4, blocks_per_microbatch=3))  # overlapping completions; the last part has a slot past the end
@example(Case(s=5, G=2, rows=4, micro_batch_size=2, eods=(0, 7)))
@example(Case(T=12, c=4, s=4, G=4, eods=(3,), blocks_per_microbatch=1))  # eod right before an anchor
@example(Case(eods=(2, 3, 4, 5, 6, 7, 8), answers=(6, 12)))  # documents shorter than a completion
@example(Case(answers=(14, 14)))  # nothing to train on
@example(Case(n=4, has_duplicates=True, eods=(6,), rows=4, micro_batch_size=2, blocks_per_microbatch=3))
@example(Case(T=40, c=2, s=1, G=5, n=4, rows=1, eods=(9, 20)))  # several chunks of attention
def test_a_step_is_brute_force(case):
    step = Step(case)
    expected = step.brute_force()
    valid = step.gold.valid_blocks(step.method.layout).cpu()
    assert torch.equal(valid, expected["valid"])

    encoder = models.build_encoder(step.config, step.encoder_weights)
    for features, key in zip(step.features(encoder), ("features_rollout", "features_gold")):
        assert_close(features.cpu()[valid], expected[key][valid])
    rewards = models.rewarded(encoder, step.gold, step.rollouts, step.method)
    for key in ("alignment", "diversity", "advantage"):
        assert_close(getattr(rewards, key).cpu()[valid], expected[key][valid])

    means = Means()
    scores = gradient.policy_gradient(step.policy, step.gold, step.rollouts, rewards.advantage, step.method, means)
    assert_close(step.rollouts.log_probs_BKNG.cpu()[valid], expected["log_probs"][valid])
    is_scored = scores.is_scored_BKNG
    assert is_scored[..., 0].all() and (is_scored.all() or case.skip_duplicates)
    assert scores.rollout_BKNG.isfinite().equal(is_scored)
    assert_close(scores.rollout_BKNG[is_scored], step.rollouts.log_probs_BKNG[is_scored])
    assert_close(scores.gold_BT.cpu(), expected["gold_log_probs"])
    scored = gradient.score(step.policy[0], step.gold, step.rollouts, step.method)
    assert_close(scored.rollout_BKNG, step.rollouts.log_probs_BKNG)  # of blocks that do not count, too
    assert_close(scored.gold_BT, scores.gold_BT)
    losses = means.reduce()
    for key in ("rl_loss", "ce_loss"):
        assert losses.get(key, 0.0) == pytest.approx(expected[key].item(), abs=TOLERANCE)  # left out if nothing counts
    check_gradient(step, expected["grads"])


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_kl_term_is_brute_force(estimator):
    """k1's gradient is d·∇logp, which is k2's (losses.py); the others' is that of their value."""
    step = Step(Case(eods=(6,), blocks_per_microbatch=3, qkv_bias=True), kl_coef=0.5, kl_estimator=estimator)
    expected = step.brute_force()
    if estimator == "k1":
        grads = step.brute_force(replace(step.settings, kl_estimator="k2"))["grads"]
    else:
        grads = expected["grads"]
    start_model = models.build_start(step.config, step.reference_weights)
    encoder = models.build_encoder(step.config, step.encoder_weights)
    start = gradient.score(start_model, step.gold, step.rollouts, step.method).rollout_BKNG
    rewards = models.rewarded(encoder, step.gold, step.rollouts, step.method)
    means = Means()
    gradient.policy_gradient(step.policy, step.gold, step.rollouts, rewards.advantage, step.method, means, start)
    assert means.reduce()["kl_loss"] == pytest.approx(expected["kl"].item(), abs=TOLERANCE)
    check_gradient(step, grads)


def test_features_of_completions_cut_short():
    """One encoder pass gives the features of several lengths, as evaluation asks for them."""
    step = Step(Case(T=16, G=5, s=4, eods=(8,), pooling="mean"))
    encoder = models.build_encoder(step.config, step.encoder_weights)
    rows = MicroBatches(step.gold, step.rollouts.tokens_BKNG, step.method.layout, 5, 2, 0)
    with torch.no_grad():
        by_length = models.block_features(encoder, step.method.feature_map, next(iter(rows)), [1, 2, 5])
    layers, anchors = bf.feature_layers(step.config), step.settings.geometry.anchors(16)
    hidden, _ = bf.rollout_pass(step.encoder_weights, step.config, step.docs, step.rollouts.tokens_BKNG.cpu(),
                                step.settings.geometry, EOD)
    gold_hidden, _ = bf.gold_pass(step.encoder_weights, step.config, step.docs, EOD)
    features, gold_features = bf.token_features(hidden, layers), bf.token_features(gold_hidden, layers)
    for length, (rollouts, reference) in zip((1, 2, 5), by_length):
        assert_close(rollouts, features[..., :length, :].mean(-2))
        assert_close(reference, torch.stack([gold_features[:, a : a + length].mean(1) for a in anchors], dim=1))
