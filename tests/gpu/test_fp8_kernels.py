"""FP8 by Transformer Engine on a Hopper GPU: its error, what it touches, and that changed weights reach the sampler."""

import dataclasses

import brute_force as bf
import models
import plain_llama
import pytest
import torch
from models import relative_error

from megatron_ebft.method import gradient
from megatron_ebft.method.means import Means
from megatron_ebft.model import fp8, fp8_sizes, kernels
from megatron_ebft.model.fp8 import FP8, quantised
from megatron_ebft.rollout.sampler import sample_rollouts

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("one_rank")]
SIZES = dict(layers=4, hidden=512, ffn=1024, heads=8, kv_heads=4, vocab=512)
BF16 = dict(params_dtype=torch.bfloat16, bf16=True, transformer_impl="transformer_engine")


@pytest.fixture(params=["blockwise", "tensorwise"])
def precision(request):
    missing = kernels.no_transformer_engine(torch.bfloat16) or kernels.available().no_fp8[request.param]
    if missing:
        pytest.skip(missing)
    return FP8(request.param)


@pytest.fixture
def policy():
    return models.build_policy(*plain_llama.random_llama(0, **SIZES), **BF16)


def sampled(policy, precision, pad_to=fp8_sizes.ROWS):
    """Rollouts of two rows in FP8, padded as a run's, with their rows and the method's configuration."""
    settings = bf.Settings(bf.Geometry(8, 8, 8, 4), 1.0)
    config = models.ebft_config(settings, 128, SIZES["layers"], rollout_fp8=precision)
    config = dataclasses.replace(config, layout=dataclasses.replace(config.layout, pad_to=pad_to))
    gold = models.gold_batch(torch.randint(SIZES["vocab"], (2, 128), generator=torch.Generator().manual_seed(1)))
    return gold, config, sample_rollouts(policy, gold, config.layout, config.sampling, iteration=0)


def test_a_layer_is_off_by_what_e4m3_rounds_away(policy, precision):
    """One linear layer against float32, and against the emulation on the same numbers."""
    linear = models.unwrap(policy[0]).decoder.layers[0].self_attention.linear_proj
    x = torch.randn(256, 1, SIZES["hidden"], device="cuda", dtype=torch.bfloat16)
    exact = x.float() @ linear.weight.float().t()
    emulated = fp8.round_activations(x.float(), precision.recipe) @ fp8.round_weights(
        linear.weight.float(), precision.recipe).t()
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import Float8BlockScaling, Float8CurrentScaling, Format

    recipe = {"blockwise": Float8BlockScaling, "tensorwise": lambda: Float8CurrentScaling(fp8_format=Format.E4M3)}
    with torch.no_grad(), te.autocast(enabled=True, recipe=recipe[precision.recipe]()):
        found = linear(x)[0].float()
    assert 0.02 < relative_error(found.cpu(), exact.cpu()) < 0.06
    assert relative_error(found.cpu(), emulated.cpu()) < 0.01


def test_sampler_and_training_pass(policy, precision):
    gold, config, rollouts = sampled(policy, precision)
    scores = gradient.score(policy[0], gold, rollouts, config)
    mismatch = (scores.rollout_BKNG - rollouts.log_probs_BKNG).abs().mean().item()
    _, _, plain = sampled(policy, FP8())
    in_bf16 = (gradient.score(policy[0], gold, plain, config).rollout_BKNG - plain.log_probs_BKNG).abs().mean().item()
    assert 2 * in_bf16 < mismatch < 0.3  # FP8 did run, and is FP8


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("number_format", ["e4m3", "hybrid"])
def test_training_pass(policy, precision, number_format, recompute):
    """Its gradient is that of bf16 but for rounding (0.26 by emulation: large weights), after a step that of a policy
    that never had other weights: each tensor's, over two micro-batches."""
    gold, config, rollouts = sampled(policy, FP8(), fp8_sizes.BLOCK)
    advantage = torch.ones(rollouts.tokens_BKNG.shape[:3], device=rollouts.tokens_BKNG.device)
    full = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1) if recompute else {}
    flags = dict(**BF16, **full, fp8=number_format, fp8_recipe=precision.recipe)

    def gradients(chunks):
        chunks[0].zero_grad_buffer()
        gradient.policy_gradient(chunks, gold, rollouts, advantage, config, Means())
        return {name: x.float() for name, x in models.whole_tensors(chunks, of_gradients=True).items()}

    in_fp8, fresh = (models.build_policy(*plain_llama.random_llama(0, **SIZES), **flags) for _ in range(2))
    expected, found = gradients(policy), gradients(in_fp8)
    assert all(0.001 < relative_error(found[name], expected[name]) < 0.5 for name in expected)
    for chunks in (in_fp8, fresh):
        with torch.no_grad():
            for parameter in chunks[0].parameters():
                parameter[: len(parameter) // 2].neg_()
    expected, found = gradients(fresh), gradients(in_fp8)
    assert all(relative_error(found[name], expected[name]) < 0.01 for name in expected)


def test_changed_weights_change_the_sampler(policy, precision):
    first = sampled(policy, precision)[2].entropy_BKNG[..., 0]
    with torch.no_grad():
        for name, parameter in models.unwrap(policy[0]).named_parameters():
            if "linear_fc2" in name:
                parameter.mul_(1.5)
    assert not torch.equal(first, sampled(policy, precision)[2].entropy_BKNG[..., 0])
    with torch.no_grad(), quantised(policy, precision):
        pass
    workspaces = [m._fp8_workspaces for m in models.unwrap(policy[0]).modules() if hasattr(m, "_fp8_workspaces")]
    assert workspaces and not any(workspaces)
