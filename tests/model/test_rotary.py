"""Rotary embedding: the rotation against complex numbers, and who computes its angles how often."""

from collections import Counter
from dataclasses import replace

import models
import plain_llama
import pytest
import torch
from golden import GOLDEN, Case
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ebft.method import batches
from megatron_ebft.model import kernels, rotary
from megatron_ebft.model.attention import CausalPattern, as_mask
from megatron_ebft.model.build import build_start
from megatron_ebft.model.weights import unwrap
from megatron_ebft.rollout.sampler import sample_rollouts

S, B, H, J, D = 9, 3, 4, 2, 8


class Counted(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def heads(dtype, sizes=(S, B, H, J), dim=D):
    """q, and k as a view of the matrix that Q, K and V come in."""
    S, B, H, J = sizes
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(S, B, J, (H // J + 2) * dim, generator=generator, dtype=torch.float64).to(dtype)
    q, k, _ = mixed.split([H // J * dim, dim, dim], dim=-1)
    return q.reshape(S, B, H, dim), k


def positions(sizes=(S, B)):
    """Others in each row, in no order."""
    return torch.randint(0, 1000, sizes[1::-1], generator=torch.Generator().manual_seed(1))


def frequencies(width, dtype=torch.float64):
    return (10000.0 ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)).to(dtype)


def as_complex(x_SBHD, width):
    """(x_i + i·x_{i + R/2})·exp(i·position·frequency); what is not rotated as it is."""
    half = width // 2
    z = torch.complex(x_SBHD[..., :half], x_SBHD[..., half:width])
    z = z * torch.polar(torch.ones((), dtype=torch.float64),
                        positions().t()[:, :, None, None] * frequencies(width))
    return torch.cat([z.real, z.imag, x_SBHD[..., width:]], dim=-1)


@pytest.mark.parametrize("width", [D, D // 2, 6])
def test_rotation_is_a_product_of_complex_numbers(width):
    leaves = [x.requires_grad_() for x in heads(torch.float64)]
    weights = [torch.randn(x.shape, dtype=torch.float64) for x in leaves]
    rotated = rotary.rotate(*leaves, rotary.angles(positions(), frequencies(width)))
    expected = [as_complex(x, width) for x in leaves]
    gradients = [torch.autograd.grad(sum((x * w).sum() for x, w in zip(out, weights)), leaves)
                 for out in (rotated, expected)]
    for actual, wanted in zip((*rotated, *gradients[0]), (*expected, *gradients[1])):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-12)


def test_bfloat16_is_rounded_once():
    q, k = heads(torch.bfloat16)
    by = rotary.angles(positions(), frequencies(D, torch.float32))
    assert by.cos_SB1R.dtype == torch.float32
    for rotated, exact in zip(rotary.rotate(q, k, by), rotary.rotate(q.float(), k.float(), by)):
        assert rotated.dtype == torch.bfloat16 and rotated.equal(exact.bfloat16())


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("recompute", models.RECOMPUTE)
def test_a_pass_computes_its_angles_once(recompute):
    """Policy and encoder, forward and backward, and sampling: one cosine and one sine a pass, whatever the layers."""
    case = Case("step", 1, 3, **models.RECOMPUTE[recompute])
    tokens_BKNG = case.rollouts.tokens_BKNG
    needed_BKN = case.gold.valid_blocks(case.config.layout)[..., None].expand(tokens_BKNG.shape[:3])
    passes = (len(batches.encoder_rows(case.gold, case.rollouts, case.config, needed_BKN))
              + len(batches.training_rows(case.gold, case.rollouts, case.config, needed_BKN)))
    assert case.model["num_hidden_layers"] > 1 and passes > 1
    with Counted() as operations:
        case.gradient()
    assert operations.calls["cos"] == operations.calls["sin"] == passes
    with Counted() as operations:
        sample_rollouts(case.policy, case.gold, case.config.layout, case.config.sampling, 0)
    assert operations.calls["cos"] == operations.calls["sin"] == case.config.layout.rollout_length


@pytest.mark.usefixtures("one_rank")
def test_learned_positions_are_not_rotated():
    config, _ = plain_llama.load_llama(GOLDEN / "llama")
    model = build_start(replace(models.architecture(config), position_embedding_type="learned_absolute"))
    assert unwrap(model).rotary is None
    tokens = torch.arange(8)[None]
    with Counted() as operations:
        model(tokens, tokens, as_mask(CausalPattern()), readout=lambda hidden, model: model.head(hidden))
    assert operations.calls["cos"] == operations.calls["sin"] == 0


def compiled(monkeypatch, **options):
    """rotate by the compiled kernel, as on GPUs."""
    torch._dynamo.reset()
    kernel = torch.compile(rotary._rotated_together.__wrapped__, dynamic=True, fullgraph=True, **options)
    monkeypatch.setattr(rotary, "_rotated_together", kernel)
    monkeypatch.setattr(kernels, "available", lambda: kernels.Available(no_compiler=""))


def both_passes(sizes, width):
    """q and k rotated, and gradients."""
    leaves = [x.detach().requires_grad_() for x in heads(torch.bfloat16, sizes)]
    out = rotary.rotate(*leaves, rotary.angles(positions(sizes), frequencies(width, torch.float32)))
    return *out, *torch.autograd.grad(sum(x.float().square().sum() / 2 for x in out), leaves)


def test_q_and_k_are_one_kernel(monkeypatch):
    """Of inductor's; on GPUs it joins pointwise tensors in a pointwise kernel without being told to."""
    from torch._inductor import metrics

    expected = both_passes((48, 2, 8, 2), D // 2)
    compiled(monkeypatch, options={"force_pointwise_cat": True})
    metrics.reset()
    results = both_passes((48, 2, 8, 2), D // 2)
    assert metrics.generated_kernel_count == 2  # both directions
    for actual, wanted in zip(results, expected):
        torch.testing.assert_close(actual, wanted)
