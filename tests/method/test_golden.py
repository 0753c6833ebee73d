"""The three golden EBFT steps of the released code, reproduced from their tokens (golden/README.md).

Each at one row a micro-batch and at two, with the blocks whole and split, with and without activation recomputation.
"""

from dataclasses import replace

import equations
import models
import pytest
import torch
from golden import STEPS, Case, by_sample
from models import largest_difference, relative_error

from megatron_ebft.data.micro_batches import MicroBatches
from megatron_ebft.method import energy, gradient

pytestmark = pytest.mark.usefixtures("one_rank")
SPLITS = ((1, 0), (1, 3), (2, 0), (2, 3))  # rows of a micro-batch, blocks of a micro-batch (0: all)


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("split", SPLITS)
def test_features(name, split):
    case = Case(name, *split)
    length = case.config.layout.rollout_length
    rows = MicroBatches(case.gold, case.rollouts.tokens_BKNG, case.config.layout, length, *split)
    with torch.no_grad():
        pairs = [models.block_features(case.encoder, case.config.feature_map, mb, [length])[0] for mb in rows]
    rollouts, reference = (rows.join_blocks(list(x)) for x in zip(*pairs))
    assert largest_difference(rollouts, case.golden["features_rollout"].transpose(1, 2)) <= 1e-5
    assert largest_difference(reference, case.golden["features_gold"]) <= 1e-5


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("split", SPLITS)
def test_rewards_losses_and_gradient(name, split):
    case = Case(name, *split)
    rewards, scores = case.rewards(), case.gradient()
    check(case, rewards.alignment, rewards.diversity, rewards.advantage, scores)


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("split", SPLITS)
def test_a_fused_step(name, split, monkeypatch):
    case = Case(name, *split)
    computed = case.fused_gradient(monkeypatch)
    rewards = computed.rewards
    check(case, rewards.alignment_BKn.float(), rewards.diversity_BKn.float(), computed.advantage_BKN, computed.scores)


def check(case, alignment, diversity, advantage, scores):
    """Rewards, log-probabilities, losses and gradient against the released code's."""
    reward = alignment - case.config.diversity_coef * diversity
    for key, actual in (("alignment", alignment), ("diversity", diversity), ("reward", reward),
                        ("advantage", advantage)):
        assert largest_difference(actual, by_sample(case.golden[key], case.docs)) <= 1e-5, key

    B, T = case.docs.shape
    log_probs = case.golden["log_probs"].unflatten(0, (B, -1))  # [B, n, T + NB·G − 1]
    assert largest_difference(scores.gold_BT, log_probs[:, 0, : T - 1]) <= 2e-5
    _, K, n, G = case.tokens.shape
    step_major = log_probs[:, :, T - 1 :].view(B, n, G, K)
    assert largest_difference(scores.rollout_BKNG, step_major.permute(0, 3, 1, 2)) <= 2e-5

    losses = case.means.reduce()
    for key in ("rl_loss", "ce_loss"):
        assert abs(losses[key] - case.golden[key].item()) <= 1e-5, key
    case.check_gradient(1e-5)


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_activation_recomputation_gives_the_same_gradient(name, recompute):
    plain, recomputed = Case(name, 1, 3), Case(name, 1, 3, **models.RECOMPUTE[recompute])
    plain.gradient(), recomputed.gradient()
    recomputed.check_gradient(1e-5)
    expected = models.gradients(plain.policy, plain.model)
    for key, grad in models.gradients(recomputed.policy, plain.model).items():
        assert relative_error(grad, expected[key]) <= 1e-6, key


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_activations_are_recomputed(recompute):
    """The core attention of every layer runs a second time in the backward pass."""
    calls = {}
    for mode in ("off", recompute):
        case = Case("step", 2, 0, **models.RECOMPUTE[mode])
        attention = case.policy[0].module.decoder.layers[1].self_attention.core_attention
        count = []
        attention.register_forward_hook(lambda *_: count.append(1))
        case.gradient()
        calls[mode] = len(count)
    assert calls[recompute] == 2 * calls["off"]


def test_a_rollout_changes_its_own_block_only():
    """Golden tokens with one of them replaced: everything about the other blocks stays."""
    case = Case("step", 2, 0)
    before = gradient.score(case.policy[0], case.gold, case.rollouts, case.config)
    tokens = case.rollouts.tokens_BKNG.clone()
    tokens[0, 1, 0, 2] = (tokens[0, 1, 0, 2] + 1) % case.model["vocab_size"]
    after = gradient.score(case.policy[0], case.gold, replace(case.rollouts, tokens_BKNG=tokens), case.config)
    changed = (before.rollout_BKNG != after.rollout_BKNG).nonzero().tolist()
    assert changed and all(x[:3] == [0, 1, 0] and x[3] >= 2 for x in changed)
    assert torch.equal(before.gold_BT, after.gold_BT)


def test_cfm_of_golden_features():
    case = Case("step")
    biased, unbiased = energy.cfm(case.rewards().gram)
    features, reference = case.golden["features_rollout"].transpose(1, 2), case.golden["features_gold"]
    for b in range(biased.shape[0]):
        for k in range(biased.shape[1]):
            X, y = features[b, k].double(), reference[b, k].double()
            assert biased[b, k].item() == pytest.approx(equations.cfm_biased(X, y).item(), abs=1e-5)
            assert unbiased[b, k].item() == pytest.approx(equations.cfm_unbiased(X, y).item(), abs=1e-5)
