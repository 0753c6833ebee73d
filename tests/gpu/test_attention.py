"""Attention kernels on a GPU against float64: FlexAttention and chunked SDPA, rows and cached decoding, both passes."""

import pytest
import torch
from gpu_cases import SHAPES, row_and_documents
from torch.nn.functional import scaled_dot_product_attention

from megatron_ebft.layout import visible_keys
from megatron_ebft.layout.strided import document_starts
from megatron_ebft.model.attention import StridedPattern
from megatron_ebft.model.decoding import DecodePattern, PrefillPattern, RolloutCache
from megatron_ebft.model.kernels import no_flex_attention

pytestmark = pytest.mark.gpu
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 1e-2}
"""Relative error of outputs and gradients: some roundings of the dtype."""
KERNELS = pytest.mark.parametrize("flex", [True, False], ids=["flex", "sdpa"])
DTYPES = pytest.mark.parametrize("dtype", LIMITS, ids=["float32", "bfloat16"])


def heads(row, dtype, heads=8, groups=2, dim=64):
    generator = torch.Generator("cuda").manual_seed(0)
    return [torch.randn(2, h, row.length, dim, generator=generator, device="cuda").to(dtype).requires_grad_()
            for h in (heads, groups, groups)]


def needs(flex, dtype):
    if flex and no_flex_attention(dtype, 64):
        pytest.skip(no_flex_attention(dtype, 64))


def exact(row, document_BT, q, k, v):
    """Output and gradients in float64, with the mask written out; of padding, zero."""
    reach = visible_keys.strided(row, None if document_BT is None else document_starts(document_BT), 2)
    mask = reach.sees(torch.arange(row.length, device="cuda"))[:, None]
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out = scaled_dot_product_attention(*leaves, attn_mask=mask, scale=0.2, enable_gqa=True)
    return out, torch.autograd.grad(out[:, :, :row.end].square().sum(), leaves)


def error(actual, expected) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


@KERNELS
@DTYPES
@pytest.mark.parametrize("has_documents", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_rows(flex, dtype, has_documents, shape):
    needs(flex, dtype)
    row, document_BT = row_and_documents(has_documents)
    q, k, v = heads(row, dtype, *shape)
    expected, gradients = exact(row, document_BT, q, k, v)
    out = StridedPattern(row, document_BT).attend(1, q, k, v, 0.2, flex)
    assert out.isfinite().all()
    assert error(out[:, :, :row.end], expected[:, :, :row.end]) < LIMITS[dtype]
    for found, wanted in zip(torch.autograd.grad(out[:, :, :row.end].square().sum(), (q, k, v)), gradients):
        assert found.isfinite().all() and error(found, wanted) < 2 * LIMITS[dtype]


@KERNELS
@DTYPES
@pytest.mark.parametrize("has_documents", [False, True])
@torch.no_grad()
def test_decoding(flex, dtype, has_documents):
    needs(flex, dtype)
    row, document_BT = row_and_documents(has_documents)
    starts = None if document_BT is None else document_starts(document_BT)
    q, k, v = (x.detach() for x in heads(row, dtype))
    with torch.enable_grad():
        whole = exact(row, document_BT, q, k, v)[0].detach()
    cache = RolloutCache(row, visible_keys.decoding(row, starts, 2), document_BT)
    PrefillPattern(cache).attend(1, *(x[:, :, :256] for x in (q, k, v)), 0.2, flex)
    for step in range(row.steps):
        index = row.rollout_index(range(step, step + 1)).flatten().cuda()
        now = [torch.nn.functional.pad(x[:, :, index], (0, 0, 0, row.decode_length - len(index))) for x in (q, k, v)]
        out = DecodePattern(cache, step).attend(1, *now, 0.2, flex)
        assert out.isfinite().all() and error(out[:, :, :len(index)], whole[:, :, index]) < LIMITS[dtype]


@KERNELS
@DTYPES
@pytest.mark.parametrize("has_documents", [False, True])
def test_decoding_with_gradient(flex, dtype, has_documents):
    """All steps differentiated together, as in a fused step: rows leave blocks out, and steps are padded to tiles."""
    needs(flex, dtype)
    row, document_BT = row_and_documents(has_documents, pad_to=128)
    wanted = (torch.arange(row.size) % 3 > 0)[None, :, None].expand(2, -1, 4)
    row = row.keep(wanted, torch.arange(4).expand_as(wanted), row.room(wanted))
    q, k, v = heads(row, dtype)
    gradients = exact(row, document_BT, q, k, v)[1]
    starts = None if document_BT is None else document_starts(document_BT)
    cache = RolloutCache(row, visible_keys.decoding(row, starts, 2), document_BT)
    total = PrefillPattern(cache).attend(1, *(x[:, :, :256] for x in (q, k, v)), 0.2, flex).float().square().sum()
    for step in range(row.steps):
        index = 256 + torch.arange(row.num_rollouts, device="cuda") * row.steps + step
        now = [torch.nn.functional.pad(x[:, :, index], (0, 0, 0, row.decode_length - len(index))) for x in (q, k, v)]
        out = DecodePattern(cache, step).attend(1, *now, 0.2, flex)
        total = total + out[:, :, :len(index)].float().square().sum()
    for actual, wanted in zip(torch.autograd.grad(total, (q, k, v)), gradients):
        assert actual.isfinite().all() and error(actual, wanted) < 2 * LIMITS[dtype]


def test_one_kernel_serves_all_documents():
    needs(True, torch.bfloat16)
    row, document_BT = row_and_documents(True)
    StridedPattern(row, document_BT).attend(1, *heads(row, torch.bfloat16), 0.2, True).sum().backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        StridedPattern(row, document_BT.flip(0)).attend(1, *heads(row, torch.bfloat16), 0.2, True).sum().backward()
