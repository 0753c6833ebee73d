"""Leaving rollouts out of the encoder's and the policy's rows changes no result, and leaves out what it should.

The other side is the same step with every rollout in its row (`skip_duplicates=False`), in float64. test_strided.py
holds both against brute force, test_invariance.py one way of sharing out the work against another.
"""

from dataclasses import replace

import brute_force as bf
import models
import plain_llama
import pytest
import torch
from models import largest_difference

from megatron_ebft.layout.packed_row import split_blocks
from megatron_ebft.layout.strided import StridedLayout, computed_rollouts, document_starts, first_alike
from megatron_ebft.method import gradient
from megatron_ebft.method.means import Means
from megatron_ebft.rollout.sampler import Rollouts
from megatron_ebft.run.configs import ebft_config
from megatron_ebft.run.flags import parse_args

pytestmark = pytest.mark.usefixtures("one_rank", "float64")
T, N, VOCAB, ROWS = 19, 4, 13, 4
LAYOUT = StridedLayout(T, context_length=3, stride=2, rollout_length=3, num_samples=N)
K, G = LAYOUT.num_blocks, LAYOUT.rollout_length
SETTINGS = bf.Settings(bf.Geometry(3, 2, 3, N), temperature=0.8, ce_coef=0.3, alpha=0.7)


def rollout_tokens(kinds: int) -> torch.Tensor:
    """Random rollouts of every block, each one of `kinds` per block, [ROWS, K, N, G]; of row 0 all are different."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, VOCAB, (ROWS, K, N, G), generator=generator)
    tokens[..., 0] = torch.arange(1, N + 1)
    which = torch.randint(kinds, (ROWS, K, N), generator=generator)
    which[0] = torch.arange(N)
    return tokens.gather(2, which[..., None].expand_as(tokens))


def random_llama(seed: int):
    return plain_llama.random_llama(seed, layers=4, hidden=16, ffn=24, heads=4, kv_heads=2, vocab=VOCAB,
                                    dtype=torch.float64)


class Step:
    """Everything that one step computes on given rollouts."""

    def __init__(self, tokens_BKNG, skip: bool, reference: bool = False, eod: int | None = 5, **options):
        sizes = {key: options.pop(key) for key in ("micro_batch_size", "blocks_per_microbatch") if key in options}
        config, weights = random_llama(0)
        settings = replace(SETTINGS, kl_coef=0.2 * reference, **options)
        self.method = models.ebft_config(settings, T, 4, skip_duplicates=skip, **sizes)
        docs = torch.randint(VOCAB, (ROWS, T), generator=torch.Generator().manual_seed(1))
        self.gold, rollouts = models.gold_batch(docs, eod), Rollouts(tokens_BKNG, None, None)
        policy, encoder = models.build_policy(config, weights), models.build_encoder(config, weights)
        means = Means()
        start = None
        if reference:
            valid_BKN = self.gold.valid_blocks(LAYOUT)[..., None].expand(ROWS, K, N)
            start = gradient.score(models.build_start(config, random_llama(1)[1]), self.gold, rollouts, self.method,
                               valid_BKN).rollout_BKNG
        self.inputs = []
        for model in (encoder, policy[0]):
            model.register_forward_hook(lambda _module, arguments, _out: self.inputs.append(arguments[0]))
        self.rewards = models.rewarded(encoder, self.gold, rollouts, self.method, means)
        self.scores = gradient.policy_gradient(policy, self.gold, rollouts, self.rewards.advantage, self.method, means,
                                           start)
        self.gradient, self.means = models.gradients(policy, config), means.reduce()
        self.saved = [self.means.pop(f"{name}_tokens_saved") for name in ("encoder", "training")]


@pytest.mark.parametrize("options", [
    dict(micro_batch_size=1, blocks_per_microbatch=0), dict(micro_batch_size=2, blocks_per_microbatch=3),
    dict(advantage="group_norm", whitening="paper"), dict(advantage="reinforce", whitening="released", pooling="mean"),
    dict(norm="layer", pooling="mean", kl_estimator="k2", reference=True, micro_batch_size=4)])
def test_every_result_is_the_same(options):
    tokens = rollout_tokens(2)
    step, plain = Step(tokens, True, **options), Step(tokens, False, **options)
    valid = step.gold.valid_blocks(step.method.layout)
    assert 0 < valid.sum() < valid.numel() and min(step.saved) > 0.1 and plain.saved == [0, 0]
    for key in ("alignment", "diversity", "advantage"):
        assert largest_difference(getattr(step.rewards, key)[valid], getattr(plain.rewards, key)[valid]) <= 1e-6
    is_scored, log_probs = step.scores.is_scored_BKNG, step.scores.rollout_BKNG
    assert largest_difference(log_probs[is_scored], plain.scores.rollout_BKNG[is_scored]) <= 1e-12
    assert log_probs.isnan().equal(~is_scored) and is_scored[..., 0].all() and not is_scored.all()
    assert step.means == pytest.approx(plain.means, rel=1e-9, abs=1e-12)
    total = sum(x.norm() ** 2 for x in plain.gradient.values()) ** 0.5
    assert step.gradient.keys() == plain.gradient.keys() and total > 0.01
    for key, grad in plain.gradient.items():
        assert (step.gradient[key] - grad).norm() <= 1e-6 * (grad.norm() + 0.01 * total), key


def test_where_nothing_is_saved_everything_is_the_same_to_the_last_bit():
    tokens = rollout_tokens(2)[:1].expand(ROWS, -1, -1, -1).contiguous()
    step, plain = (Step(tokens, skip, eod=None, micro_batch_size=2) for skip in (True, False))
    assert step.saved == [0, 0] and step.means == plain.means
    assert torch.equal(step.rewards.gram, plain.rewards.gram)
    assert torch.equal(step.scores.rollout_BKNG, plain.scores.rollout_BKNG)
    assert all(torch.equal(grad, plain.gradient[key]) for key, grad in step.gradient.items())


@pytest.mark.parametrize("whitening", ["none", "paper", "released"])
def test_the_tokens_are_those_of_distinct_rollouts_that_matter(whitening):
    """Counted from the rollouts alone, up to the rounding of a row's room; and the metric says so. Whitening leaves
    rounding between identical rollouts, which must not make an advantage."""
    tokens = rollout_tokens(2)
    step = Step(tokens, True, whitening=whitening)
    valid = step.gold.valid_blocks(step.method.layout)
    room = -(-K * N // 16)
    for steps, saved, inputs in ((G, step.saved[0], step.inputs[:ROWS]), (G - 1, step.saved[1], step.inputs[ROWS:])):
        for b in range(ROWS):
            kinds = [len(set(map(tuple, tokens[b, k].tolist()))) for k in range(K) if valid[b, k]]
            count = sum(x for x in kinds if steps == G or x > 1)  # one kind: no advantage
            assert inputs[b].shape == (1, T + min(K * N, -(-count // room) * room) * steps)
        assert (first_alike(tokens)[valid] == 0).all(-1).any()
        length = sum(x.shape[1] for x in inputs)
        assert saved == pytest.approx(1 - length / (ROWS * (T + K * N * steps)))


def test_a_rollout_stands_where_its_equal_does():
    """Tokens and positions, found by the inverse index, of rows that differ in what they leave out."""
    tokens, needed = rollout_tokens(3), torch.rand(ROWS, K, N, generator=torch.Generator().manual_seed(2)) < 0.6
    needed[2] = False
    document_BT = (torch.arange(T) > 8).long().expand(ROWS, T)
    starts, gold = document_starts(document_BT), torch.zeros(ROWS, T, dtype=torch.long)
    first = first_alike(tokens)
    computed = computed_rollouts(needed, first)
    assert torch.equal(tokens, tokens.gather(2, first[..., None].expand_as(tokens)))
    for part in split_blocks(LAYOUT, 5, G):
        row = part.keep(computed, first, part.room(computed))
        counts = (computed[:, part.blocks] & part.is_real[:, None]).sum((1, 2))
        assert 0 <= row.num_rollouts - counts.max() < 2 and row.num_rollouts < part.num_rollouts
        assert row.kept.is_here_BKN[needed[:, part.blocks] & part.is_real[:, None]].all()
        index = row.pooled_index(range(G))
        for kept, plain in ((row.pack(gold, tokens), part.pack(gold, tokens)),
                             (row.positions(starts, ROWS), part.positions(starts, ROWS))):
            kept = kept.gather(1, index.flatten(1)).view(index.shape)
            plain = plain[:, part.pooled_index(range(G))[0]]
            here = torch.cat([row.kept.is_here_BKN, torch.ones(ROWS, row.size, 1, dtype=torch.bool)], dim=2)
            assert torch.equal(kept[here], plain[here])
            assert torch.equal(kept[~here], plain[:, :, -1:].expand_as(plain)[~here])  # where the reference does
        assert torch.equal(row.kept.is_here_BKN, computed.gather(-1, first)[:, part.blocks]
                           & part.is_real[:, None]) and not row.kept.is_here_BKN[2].any()


def test_runs_that_write_or_read_steps_leave_nothing_out():
    argv = ["--train-iters", "1", "--num-layers", "4"]
    for more, skips in (([], True), (["--no-ebft-skip-duplicates"], False), (["--ebft-dump-steps", "x"], False),
                        (["--ebft-replay-steps", "x"], False)):
        assert ebft_config(parse_args(argv + more), 4).skip_duplicates is skips
