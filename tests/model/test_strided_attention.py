"""Property test of the whole step: random geometries, models and masks against one-sequence-at-a-time brute force.

Rollouts are sampled by the package. Everything then computed on them — the sampler's and the training pass's
log-probabilities, gold log-probabilities, features, advantages, losses and gradients, with blocks and rows split at
random — must be what brute_force.py computes, where each rollout is a sequence of its own. Both sides work in float64,
but the package keeps advantages and the sampler's log-probabilities in float32. (All in float32 the largest errors are
5e-6 for log-probabilities, 6e-7 for features and 1e-5 for gradients, which leaves no room for another machine.)
"""

from dataclasses import dataclass, replace
from random import Random

import brute_force as bf
import models
import plain_llama
import pytest
import torch
from hypothesis import example, given, settings, strategies
from models import largest_difference
from plain_llama import LLAMA3_ROPE

from megatron_ebft.data.micro_batches import MicroBatches
from megatron_ebft.method import gradient
from megatron_ebft.method.means import Means
from megatron_ebft.rollout.sampler import sample_rollouts

pytestmark = pytest.mark.usefixtures("one_rank", "float64")
TOLERANCE = 1e-6
VOCAB, EOD = 13, 0


@dataclass(frozen=True)
class Case:
    """Geometry, model, masks and split of one step."""

    T: int = 14
    c: int = 3
    s: int = 2
    G: int = 3
    n: int = 2
    rows: int = 2
    micro_batch_size: int = 1
    blocks_per_microbatch: int = 0
    kv_heads: int = 2
    qkv_bias: bool = False
    tied: bool = False
    llama3_rope: bool = False
    eods: tuple[int, ...] | None = None
    """Positions of eod tokens, in row b moved by b; None: no document mask."""
    answers: tuple[int, int] | None = None
    """Answer tokens [first, last) of every row, in row b moved by b; None: no answer mask."""
    whitening: str = "none"
    norm: str = "joint"
    pooling: str = "last_token"
    advantage: str = "rloo"
    temperature: float = 0.8
    has_duplicates: bool = False
    """Sample 1 is sample 0 again, and in every second block all samples are."""
    skip_duplicates: bool = True
    seed: int = 0


def random_case(seed: int) -> Case:
    """A case with every field drawn at random (evenly, unlike hypothesis, which likes small and repeated numbers)."""
    random = Random(seed)
    pick, number = random.choice, random.randint
    c, G, n, rows = number(1, 5), number(1, 5), pick((1, 2, 2, 3)), number(1, 4)
    T = c + G + number(0, 12)
    return Case(
        T, c, number(1, 4), G, n, rows, micro_batch_size=pick([x for x in (1, 2, 3, 4) if rows % x == 0]),
        blocks_per_microbatch=number(0, 4), kv_heads=pick((1, 2, 4)), qkv_bias=pick((False, True)),
        tied=pick((False, True)), llama3_rope=pick((False, True)),
        eods=pick((None, tuple(number(0, T - 1) for _ in range(number(0, 3))))),
        answers=pick((None, (number(0, T // 2), T))), whitening=pick(("none", "paper", "released")),
        norm=pick(("joint", "layer")), pooling=pick(("last_token", "mean")),
        advantage=pick(("rloo", "reinforce", "group_norm")) if n > 1 else "reinforce",
        temperature=pick((0.6, 1.0)), has_duplicates=pick((False, True)),
        skip_duplicates=pick((False, True)), seed=number(0, 1000))


class Step:
    """One case, set up for both sides."""

    def __init__(self, case: Case, **options):
        self.case = case
        self.config, self.weights = self.random_llama(case.seed)
        self.encoder_weights = self.random_llama(case.seed + 1)[1]
        self.reference_weights = self.random_llama(case.seed + 2)[1]
        generator = torch.Generator().manual_seed(case.seed)
        self.docs = torch.randint(1, VOCAB, (case.rows, case.T), generator=generator)
        self.answers = None if case.answers is None else torch.zeros_like(self.docs, dtype=torch.bool)
        for b in range(case.rows):
            for position in case.eods or ():
                self.docs[b, (position + b) % case.T] = EOD
            if case.answers is not None:
                self.answers[b, case.answers[0] + b : case.answers[1] + b] = True
        self.settings = bf.Settings(
            bf.Geometry(case.c, case.s, case.G, case.n), temperature=case.temperature, whitening=case.whitening,
            advantage=case.advantage, norm=case.norm, pooling=case.pooling, ce_coef=0.3, alpha=0.7,
            eod=None if case.eods is None else EOD, ce_document_starts=case.eods is None, **options)
        self.method = models.ebft_config(self.settings, case.T, self.config["num_hidden_layers"],
                                         micro_batch_size=case.micro_batch_size,
                                         blocks_per_microbatch=case.blocks_per_microbatch, seed=case.seed,
                                         skip_duplicates=case.skip_duplicates)
        self.gold = models.gold_batch(self.docs, self.settings.eod, self.answers)
        self.policy = models.build_policy(self.config, self.weights)
        self.rollouts = sample_rollouts(self.policy, self.gold, self.method.layout, self.method.sampling,
                                        iteration=7)
        if case.has_duplicates:
            for values_BKNG in (self.rollouts.tokens_BKNG, self.rollouts.log_probs_BKNG):
                values_BKNG[:, :, :2] = values_BKNG[:, :, :1].clone()
                values_BKNG[:, ::2] = values_BKNG[:, ::2, :1].clone()

    def random_llama(self, seed: int):
        case = self.case
        return plain_llama.random_llama(seed, layers=4, hidden=16, ffn=24, heads=4, kv_heads=case.kv_heads, vocab=VOCAB,
                               qkv_bias=case.qkv_bias, tied=case.tied, dtype=torch.float64,
                               rope_scaling=LLAMA3_ROPE if case.llama3_rope else None)

    def brute_force(self, settings=None) -> dict:
        return bf.step(self.weights, self.config, self.docs, self.rollouts.tokens_BKNG.cpu(), settings or self.settings,
                       encoder=self.encoder_weights, start=self.reference_weights, answer_mask=self.answers)

    def features(self, encoder):
        case, G = self.case, self.case.G
        rows = MicroBatches(self.gold, self.rollouts.tokens_BKNG, self.method.layout, G, case.micro_batch_size,
                            case.blocks_per_microbatch)
        with torch.no_grad():
            pairs = [models.block_features(encoder, self.method.feature_map, mb, [G])[0] for mb in rows]
        return tuple(rows.join_blocks(list(x)) for x in zip(*pairs))


def check_gradient(step: Step, expected: dict) -> None:
    total = sum(grad.norm() ** 2 for grad in expected.values()) ** 0.5
    found = models.gradients(step.policy, step.config)
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        assert (grad - expected[name]).norm() <= TOLERANCE * (expected[name].norm() + 0.01 * total), name


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
    for found, key in zip(step.features(encoder), ("features_rollout", "features_gold")):
        assert_close(found.cpu()[valid], expected[key][valid])
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


def assert_close(found, expected):
    if found.numel():
        assert largest_difference(found, expected.cpu()) <= TOLERANCE


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_kl_term_is_brute_force(estimator):
    """k1's gradient is d·∇logp, which is k2's (losses.py); the others' is that of their value."""
    step = Step(Case(eods=(6,), blocks_per_microbatch=3, qkv_bias=True), kl_coef=0.5, kl_estimator=estimator)
    expected = step.brute_force()
    if estimator == "k1":
        expected_gradient = step.brute_force(replace(step.settings, kl_estimator="k2"))["grads"]
    else:
        expected_gradient = expected["grads"]
    reference = models.build_start(step.config, step.reference_weights)
    encoder = models.build_encoder(step.config, step.encoder_weights)
    start = gradient.score(reference, step.gold, step.rollouts, step.method).rollout_BKNG
    rewards = models.rewarded(encoder, step.gold, step.rollouts, step.method)
    means = Means()
    gradient.policy_gradient(step.policy, step.gold, step.rollouts, rewards.advantage, step.method, means, start)
    assert means.reduce()["kl_loss"] == pytest.approx(expected["kl"].item(), abs=TOLERANCE)
    check_gradient(step, expected_gradient)


def test_features_of_completions_cut_short():
    """One encoder pass gives the features of several lengths, as evaluation asks for them."""
    step = Step(Case(T=16, G=5, s=4, eods=(8,), pooling="mean"))
    encoder = models.build_encoder(step.config, step.encoder_weights)
    rows = MicroBatches(step.gold, step.rollouts.tokens_BKNG, step.method.layout, 5, 2, 0)
    with torch.no_grad():
        found = models.block_features(encoder, step.method.feature_map, next(iter(rows)), [1, 2, 5])
    layers, anchors = bf.feature_layers(step.config), step.settings.geometry.anchors(16)
    hidden, _ = bf.rollout_pass(step.encoder_weights, step.config, step.docs, step.rollouts.tokens_BKNG.cpu(),
                                step.settings.geometry, EOD)
    gold_hidden, _ = bf.gold_pass(step.encoder_weights, step.config, step.docs, EOD)
    features, gold_features = bf.token_features(hidden, layers), bf.token_features(gold_hidden, layers)
    for length, (rollouts, reference) in zip((1, 2, 5), found):
        assert_close(rollouts, features[..., :length, :].mean(-2))
        assert_close(reference, torch.stack([gold_features[:, a : a + length].mean(1) for a in anchors], dim=1))
