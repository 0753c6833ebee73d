"""FP8 by emulation: its error, what it touches, and that the loss's correction takes back what it changes."""

from itertools import product

import brute_force as bf
import models
import plain_llama
import pytest
import torch
from models import relative_error
from small_run import scalars, start
from toy import TEMPERATURE, T, Toy

from megatron_ebft.common.device import device
from megatron_ebft.common.errors import StepFailed
from megatron_ebft.method import energy, gradient
from megatron_ebft.method.means import Means
from megatron_ebft.model import fp8
from megatron_ebft.model.fp8 import FP8, quantised
from megatron_ebft.rollout.sampler import Rollouts, sample_rollouts
from megatron_ebft.run import loop, self_check
from megatron_ebft.run.callbacks import health
from megatron_ebft.run.flags import method_flags

BLOCKWISE, TENSORWISE = FP8("blockwise", emulate=True), FP8("tensorwise", emulate=True)


# ---------------------------------------------------------------- numbers


def blocks_by_hand(x: torch.Tensor, height: int) -> torch.Tensor:
    """Blocks of height × 128, one after the other, with Python's numbers for the scale."""
    out = torch.empty_like(x)
    for i, j in product(range(0, x.shape[0], height), range(0, x.shape[1], 128)):
        block = x[i : i + height, j : j + 128]
        scale = 2.0 ** -(-float(torch.log2(block.abs().max() / 448)) // 1)  # rounded up
        out[i : i + height, j : j + 128] = (block / scale).to(torch.float8_e4m3fn).float() * scale
    return out


@pytest.mark.parametrize("rows, columns", [(256, 384), (200, 300), (1, 5)])
def test_blocks(rows, columns):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, columns, generator=generator) * torch.logspace(-3, 3, rows)[:, None]
    x[0] = 0 if rows > 128 else x[0]
    x[-1, 0] = 1e5
    nonzero = x.abs().sum(1) > 0
    assert torch.equal(fp8.round_activations(x, "blockwise")[nonzero], blocks_by_hand(x[nonzero], 1))
    assert not fp8.round_activations(x, "blockwise")[~nonzero].any()
    assert torch.equal(fp8.round_weights(x, "blockwise"), blocks_by_hand(x, 128))
    together, alone = fp8.round_activations(x, "blockwise"), fp8.round_activations(x[-1:], "blockwise")
    assert torch.equal(together[-1:], alone)  # a token is the same in any company; by tensor it is not
    if rows > 1:
        alone = fp8.round_activations(x[1:2], "tensorwise")
        assert not torch.equal(fp8.round_activations(x, "tensorwise")[1:2], alone) and alone.any()


@pytest.mark.parametrize("recipe", ["blockwise", "tensorwise"])
def test_error_of_a_matrix_product(recipe):
    """Relative, of normally distributed numbers: e4m3 has 3 bits after the leading one."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(512, 1024, generator=generator), torch.randn(768, 1024, generator=generator)
    product = fp8.round_activations(x, recipe) @ fp8.round_weights(weight, recipe).t()
    exact = x @ weight.t()
    assert 0.03 <= (product - exact).norm() / exact.norm() <= 0.05


# ---------------------------------------------------------------- what it touches


@pytest.fixture
def policy(one_rank):
    config, weights = plain_llama.random_llama(0, layers=4, hidden=32, ffn=48, heads=4, kv_heads=2, vocab=40)
    return models.build_policy(config, weights)


def sampler(policy, precision=FP8(), seed=0):
    settings = bf.Settings(bf.Geometry(4, 4, 4, 3), 1.0)
    method = models.ebft_config(settings, 24, 4, seed=seed, rollout_fp8=precision)
    tokens = torch.randint(40, (2, 24), generator=torch.Generator().manual_seed(1))
    return sample_rollouts(policy, models.gold_batch(tokens), method.layout, method.sampling, iteration=0)


def test_it_changes_what_it_should_and_leaves_nothing_behind(policy):
    before = {name: p.detach().clone() for name, p in models.unwrap(policy[0]).named_parameters()}
    plain = sampler(policy)
    for precision in (BLOCKWISE, TENSORWISE):
        rounded = sampler(policy, precision)
        change = (plain.entropy_BKNG[..., 0] - rounded.entropy_BKNG[..., 0]).abs()  # before anything was drawn
        assert 1e-4 < change.mean() < 0.1
    nothing = FP8("blockwise", emulate=True, at_start=2, at_end=2)
    some = FP8("blockwise", emulate=True, at_start=1, at_end=1)
    assert torch.equal(sampler(policy, nothing).log_probs_BKNG, plain.log_probs_BKNG)
    assert not torch.equal(sampler(policy, some).log_probs_BKNG, sampler(policy, BLOCKWISE).log_probs_BKNG)
    assert all(torch.equal(p, before[name]) for name, p in models.unwrap(policy[0]).named_parameters())
    assert torch.equal(sampler(policy).log_probs_BKNG, plain.log_probs_BKNG)
    with pytest.raises(RuntimeError, match="in a rollout"), torch.no_grad(), quantised(policy, BLOCKWISE):
        raise RuntimeError("in a rollout")
    assert all(torch.equal(p, before[name]) for name, p in models.unwrap(policy[0]).named_parameters())


def test_changed_weights_change_the_sampler(policy):
    """No weights of an earlier rollout are used again."""
    first = sampler(policy, BLOCKWISE).entropy_BKNG
    with torch.no_grad():
        for name, p in models.unwrap(policy[0]).named_parameters():
            if "linear_fc2" in name:
                p.mul_(1.5)
    second = sampler(policy, BLOCKWISE).entropy_BKNG
    assert not torch.equal(first[..., 0], second[..., 0])


class CachingLinear(torch.nn.Linear):
    """As Transformer Engine's layers in Megatron-Core 0.16: keeps what it made of its weight until told otherwise."""

    is_first_microbatch = True
    _fp8_workspaces = None


def test_cached_weights_are_forgotten():
    linear = CachingLinear(4, 4)
    linear.is_first_microbatch, linear._fp8_workspaces = False, {"weight": linear.weight.detach().clone()}
    fp8._forget_weights(torch.nn.Sequential(linear))
    assert linear.is_first_microbatch and not linear._fp8_workspaces


def test_training(arguments, tmp_path, one_rank, monkeypatch, capsys):
    """With rollouts and encoder in FP8; the self-check tells rounding from a mistake in the sampler."""
    flags = ["--ebft-rollout-fp8", "blockwise", "--ebft-encoder-fp8", "blockwise", "--ebft-fp8-emulate", "--seq-length",
             "32", "--tensorboard-dir", str(tmp_path), "--train-iters", "3", "--init-method-std", "0.2"]
    run, log = start(arguments(*flags))
    assert run.config.layout.pad_to == 16 and loop.train(run, log)
    assert method_flags(run.args)["ebft_importance_cap"] == 2.0  # a dumped step's loss can be computed again
    log.close(0.0)
    logged = scalars(tmp_path)
    assert all(1.001 < value < 2 for _, value in logged["train/mismatch_ratio"])
    assert all(0 < value < 0.1 for _, value in logged["train/mismatch_kl"]) and "train/importance_truncated" in logged
    capsys.readouterr()
    monkeypatch.setattr(health, "HEALTHY_MISMATCH", 1.001)
    run, log = start(arguments(*flags))
    loop.train(run, log)
    assert capsys.readouterr().out.count("warning: step 1: sampler and training pass differ by a factor of 1.") == 1
    for name, value, match in (
            ("LIMIT_FP8", 1e-6, "--ebft-rollout-fp8 blockwise: changes log-probabilities by .* another recipe"),
            ("mismatch_without_fp8", lambda *_: 0.01, "differ .* by 1.00e-02 a token on average without FP8")):
        monkeypatch.setattr(self_check, name, value)
        run, log = start(arguments(*flags))
        with pytest.raises(StepFailed, match=match):
            loop.train(run, log)


def test_the_self_check_knows_training_in_fp8(arguments, tmp_path, one_rank, monkeypatch):
    """The start is then compared with a pass that rounds; sampler and trainer are compared without."""
    run, log = start(arguments("--tensorboard-dir", str(tmp_path), "--train-iters", "1", "--ebft-kl-coef", "0.1"))
    run.args.fp8_format = "e4m3"  # the pass itself needs a GPU
    monkeypatch.setattr(self_check, "LIMIT_FLOAT32", -1.0)
    monkeypatch.setattr(self_check, "mismatch_without_fp8", lambda *_: -2.0)
    loop.train(run, log)
    for limit, match in (("LIMIT_FP8", "--fp8-format blockwise: changes .*starting policy's by .* before the"),
                         ("LIMIT_FLOAT32", "on average without FP8 .limit -3e")):
        run, log = start(arguments("--tensorboard-dir", str(tmp_path), "--train-iters", "1", "--ebft-kl-coef", "0.1"))
        run.args.fp8_format = "e4m3"
        with monkeypatch.context() as patch, pytest.raises(StepFailed, match=match):
            patch.setattr(self_check, limit, -3.0)
            loop.train(run, log)


# ---------------------------------------------------------------- the correction


def sampler_log_probs(toy) -> torch.Tensor:
    """log q of every token of every outcome under the emulated sampler, [K, O, G]."""
    policy = models.build_policy(toy.config, toy.weights)
    method = models.ebft_config(bf.Settings(toy.geometry, TEMPERATURE), T, 4)
    rollouts = Rollouts(toy.outcomes.to(device()), None, None)
    with torch.no_grad(), quantised(policy, BLOCKWISE):
        return gradient.score(policy, models.gold_batch(toy.doc), rollouts, method).rollout_BKNG[0].cpu()


def expected_gradient(toy, log_q_KOG, cap: float, are_all_from_q: bool) -> dict:
    """E[gradient] by enumeration, as Toy.expected_policy_gradient, where rollouts are drawn from q.

    Args:
        are_all_from_q: else only the rollout whose gradient is taken is; the others of its block are from p.
    """
    tuples_RN = torch.tensor(list(product(range(len(toy.outcomes_OG)), repeat=toy.n)))
    R, K = len(tuples_RN), toy.blocks
    settings = bf.Settings(bf.Geometry(2, 2, toy.length, toy.n), TEMPERATURE)
    method = models.ebft_config(settings, T, 4, micro_batch_size=R, importance_cap=cap)
    tokens_RKNG = toy.outcomes_OG[tuples_RN][:, None].expand(R, K, -1, -1).to(device())
    log_q_RKNG = log_q_KOG[:, tuples_RN].transpose(0, 1).contiguous()
    gold, rollouts = models.gold_batch(toy.doc.expand(R, T)), Rollouts(tokens_RKNG, log_q_RKNG.to(device()), None)
    policy = models.build_policy(toy.config, toy.weights)
    rewards = models.rewarded(models.build_encoder(toy.config, toy.encoder_weights), gold, rollouts, method)
    exact = energy.advantages(*energy.rewards(rewards.gram, "none"), "rloo", 1.0, 1.0)
    log_q_RKN, log_p_RKN = log_q_RKNG.sum(-1), toy.log_probs(toy.weights)[:, tuples_RN].transpose(0, 1)
    of_the_others = log_q_RKN if are_all_from_q else log_p_RKN
    probability = (log_q_RKN + of_the_others.sum(-1, keepdim=True) - of_the_others).exp()
    gradient.policy_gradient(policy, gold, rollouts, exact * probability.to(device()), method, Means())
    return {name: R * grad for name, grad in models.gradients(policy, toy.config).items()}


@pytest.mark.parametrize("length", [1, 2])
def test_the_correction_of_the_loss(one_rank, float64, length):
    """Relative bias of the whole gradient when rollouts are drawn in FP8, by enumeration.

    Weighted by the ratio of its probabilities, a rollout of one token among others from the policy has none left, but
    what truncation makes. What the ratio of a token cannot know are the tokens before it and the block's other
    rollouts, from which rewards are worked out: then most of the bias goes, not all.
    """
    toy = Toy(2, length)
    log_q, count = sampler_log_probs(toy), toy.blocks * length
    expected = {name: grad / count for name, grad in toy.feature_matching_gradient().items()}

    def bias(cap: float, are_all_from_q: bool) -> float:
        actual = expected_gradient(toy, log_q, cap, are_all_from_q)
        return relative_error(*(torch.cat([x[name].flatten() for name in expected]) for x in (actual, expected)))

    off, on, untruncated = (bias(cap, are_all_from_q=True) for cap in (0.0, 2.0, 1e9))
    alone_off, alone_on, alone_untruncated = (bias(cap, are_all_from_q=False) for cap in (0.0, 2.0, 1e9))
    print(f"bias, rollouts of {length}: all in FP8 {off:.3f}, corrected {on:.3f} (untruncated {untruncated:.3f}); one "
          f"in FP8 {alone_off:.3f}, corrected {alone_on:.1e} (untruncated {alone_untruncated:.1e})")
    assert off > 0.02 and on < off / 3
    assert length > 1 or alone_untruncated < 1e-10
