"""Whole steps on a GPU: the released code's, in float32 and BF16 with every kind of kernel; decoding without waiting.

Limits for BF16 are twice what a CPU's BF16 gives on the same steps: 0.015 for rewards and advantages, 0.056
and 0.025 for log-probabilities of rollouts and gold tokens, 0.035 for gradients.
"""

import brute_force as bf
import models
import pytest
import torch
from golden import STEPS, Case, by_sample
from gpu_cases import BF16, FLOAT32, small_sampler
from models import largest_difference, relative_error

from megatron_ebft.method import gradient
from megatron_ebft.model import kernels
from megatron_ebft.model.attention import CausalPattern, as_mask
from megatron_ebft.rollout import sampler
from megatron_ebft.rollout.generation import GenerationConfig, generate
from megatron_ebft.run.self_check import LIMIT_BF16, LIMIT_FLOAT32

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("one_rank")]
PATHS = {f"{layers}, {attention}, {name}": dict(transformer_impl=layers, attention_kernel=attention, **precision)
         for name, precision in (("float32", FLOAT32), ("bf16", BF16)) for layers in ("local", "transformer_engine")
         for attention in ("sdpa", "flex") if (layers, name) != ("transformer_engine", "float32")}


@pytest.fixture(params=PATHS)
def path(request):
    """Overrides of a model for one kind of kernels; skipped, with the reason, where it cannot be."""
    options = PATHS[request.param]
    try:
        kernels.choose(options["transformer_impl"], options["attention_kernel"], dtype=options["params_dtype"],
                       head_dim=16)
    except ValueError as error:
        pytest.skip(str(error))
    return options


@pytest.mark.parametrize("is_fused", [False, True])
@pytest.mark.parametrize("name", STEPS)
def test_golden_step(name, is_fused, path, monkeypatch):
    case, is_bf16 = Case(name, 1, 3, **path), "bf16" in path
    rewards = case.rewards()
    scores = case.fused_gradient(monkeypatch).scores if is_fused else case.gradient()
    golden = {key: by_sample(case.golden[key], case.docs) for key in ("alignment", "advantage")}
    T, (_, K, _, G) = case.docs.shape[1], case.tokens.shape
    log_probs = case.golden["log_probs"].unflatten(0, (len(case.docs), -1))
    rollouts = log_probs[:, :, T - 1:].unflatten(2, (G, K)).permute(0, 3, 1, 2)
    for key, found in (("alignment", rewards.alignment), ("advantage", rewards.advantage)):
        assert largest_difference(found, golden[key]) <= (0.04 if is_bf16 else 1e-4), key
    for key, grad in models.gradients(case.policy, case.model).items():
        assert relative_error(grad, case.golden["grad." + key]) <= (0.08 if is_bf16 else 1e-3), key
    assert largest_difference(scores.rollout_BKNG, rollouts) <= (0.12 if is_bf16 else 1e-4)
    assert largest_difference(scores.gold_BT, log_probs[:, 0, : T - 1]) <= (0.06 if is_bf16 else 1e-4)


def test_sampler_and_training_pass_agree(path):
    policy, gold, layout, draw = small_sampler(path)
    config = models.ebft_config(bf.Settings(bf.Geometry(8, 8, 8, 4), temperature=0.6), 128, 4)
    rollouts = draw()
    scores = gradient.score(policy[0], gold, rollouts, config)
    difference = (scores.rollout_BKNG - rollouts.log_probs_BKNG).abs().mean().item()
    assert difference < (LIMIT_BF16 if "bf16" in path else LIMIT_FLOAT32)


def test_decoding_does_not_wait_for_the_device(path, monkeypatch):
    """Every step after the prefill only launches work: CUDA refuses whatever would wait."""
    _, _, _, draw = small_sampler(path)
    expected, work = draw(), sampler._Group.work

    def watched(self, step, virtual, given):
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            return work(self, step, virtual, given)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(sampler._Group, "work", watched)
    assert torch.equal(draw().tokens_BKNG, expected.tokens_BKNG)


def test_shared_beginnings(path):
    """Rollouts that share decoding steps: log-probabilities are those of packed rows. In float32, where the tokens are
    the same, so are gradients without sharing."""
    policy, gold, layout, _ = small_sampler(path)
    config = models.ebft_config(bf.Settings(bf.Geometry(8, 8, 8, 4), temperature=0.2), 128, 4)
    tokens, gradients, is_bf16 = [], [], "bf16" in path
    for share in (True, False):
        scored = sampler.sample_and_score(policy[0], gold, layout, config.sampling, 3, share=share)
        assert (scored.tokens_per_row < 128 + 7 * len(layout.anchors()) * 4) == share
        scores = gradient.score(policy[0], gold, scored.rollouts, config)
        difference = (scores.rollout_BKNG - scored.log_probs_BKNG).abs().mean().item()
        assert difference < (LIMIT_BF16 if is_bf16 else LIMIT_FLOAT32)
        policy[0].zero_grad_buffer()
        scored.log_probs_BKNG.sum().backward()
        tokens.append(scored.rollouts.tokens_BKNG)
        gradients.append(torch.cat([p.main_grad.flatten() for p in policy[0].parameters()]))
    if torch.equal(*tokens):
        assert relative_error(*gradients) <= (0.08 if is_bf16 else 1e-3)
    assert is_bf16 or (tokens[0] == tokens[1]).float().mean() > 0.999


def test_kernels_draw_the_same_tokens():
    """In float32, where they differ by roundings too small to move a draw."""
    drawn = []
    for attention in ("sdpa", "flex"):
        if attention == "flex" and kernels.no_flex_attention(torch.float32, 16):
            pytest.skip(kernels.no_flex_attention(torch.float32, 16))
        draw = small_sampler(dict(transformer_impl="local", attention_kernel=attention, **FLOAT32))[3]
        drawn.append(draw().tokens_BKNG)
    assert (drawn[0] == drawn[1]).float().mean() > 0.999


def test_generation(path):
    """Each greedy token is the most likely one after all before it, up to rounding, while completions come and go."""
    policy, gold, _, _ = small_sampler(path)
    prompts = [gold.tokens_BT[0, :length].tolist() for length in (3, 40, 17, 64, 5)]
    completions = generate(policy, prompts, GenerationConfig(max_new_tokens=24, temperature=0.0, rows=2))
    for prompt, (completion,) in zip(prompts, completions):
        tokens = torch.tensor([prompt + completion.tokens], device="cuda")
        positions = torch.arange(tokens.shape[1], device="cuda")[None]
        with torch.no_grad():
            logits_SBV = policy[0](tokens, positions, as_mask(CausalPattern()),
                                   readout=lambda hidden, model: model.head(hidden)[..., : model.num_real_ids])
        logits_PV = logits_SBV[len(prompt) - 1 : -1, 0].float()
        chosen_P = logits_PV.gather(1, tokens[0, len(prompt):, None]).squeeze(1)
        assert len(completion.tokens) == 24
        assert (logits_PV.max(-1).values - chosen_P).max() < (LIMIT_BF16 if "bf16" in path else LIMIT_FLOAT32)
