"""Attention of rollout tokens without FlexAttention: to the gold tokens before their anchor and to the tokens of their
own rollout up to themselves. In decoding, and in packed rows.

1. The two parts are computed apart and merged by their log-sum-exp. The gold part is a few large products, in chunks of
   rollouts; the own part, of at most G keys each, is small. So gold keys are never copied, and decoding uses the same
   masks in every step.
2. The backward pass of the gold part is that of plain attention with the merged output and log-sum-exp: with
   P = exp(S − lse) it computes dS = P·(dP − rowsum(dO·O)), which is the gradient of the whole. So no probabilities of
   gold keys are kept, and on a CPU torch's own kernels serve both passes.
3. The query heads that share a key head are rows of that head (`pack_heads`).

Suffixes: B rows, H query heads, J key heads, R rollout tokens, U rollouts, Q = R·H/J packed queries, C gold keys,
M packed queries of a rollout, t its keys, D head dimension.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ebft.layout.packed_row import RowLayout
from megatron_ebft.layout.visible_keys import VisibleKeys
from megatron_ebft.model import flex_attention
from megatron_ebft.model.flex_attention import TileMask

CHUNK_QUERIES = 256
"""Approximate number of packed queries in a chunk. Smaller chunks need more kernel launches; larger ones compute more
pairs that the mask hides."""


def pack_heads(q_BHRD: Tensor, key_heads: int) -> Tensor:
    """Queries as rows of their key heads, the H/J heads of one query next to each other: [B, J, R·H/J, D]."""
    return q_BHRD.unflatten(1, (key_heads, -1)).transpose(2, 3).flatten(2, 3)


def unpack_heads(out_BJQD: Tensor, heads: int) -> Tensor:
    """The inverse of `pack_heads`: [B, H, R, D], in memory as [R, B, H, D], which is what the next layer reads."""
    out_RBJMD = out_BJQD.unflatten(2, (-1, heads // out_BJQD.shape[1])).permute(2, 0, 1, 3, 4).contiguous()
    return out_RBJMD.flatten(2, 3).permute(1, 2, 0, 3)


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to add to scores: 0 where visible, −inf elsewhere."""
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, -torch.inf)


@dataclass
class Chunk:
    """Rollouts whose gold part is computed together."""

    queries: slice
    """Of the packed queries."""
    gold: int
    """They see no gold keys but [0, gold)."""
    mask_B1QC: Tensor
    """Additive; of one row where all rows see the same."""


@dataclass
class Prefixes:
    """Which gold keys the rollout tokens of a pass see. It serves all layers, and all steps of decoding."""

    chunks: list[Chunk]
    own_mask_Mt: Tensor | None
    """Additive; None where every token sees all given tokens of its rollout, as in decoding."""


def prefixes(row: RowLayout, visible: VisibleKeys, steps: int, heads_per_group: int, dtype: torch.dtype) -> Prefixes:
    """The chunks of a pass.

    Args:
        visible: of the rollout tokens.
        steps: queries of each rollout: 1 in decoding, else `row.steps`.
    """
    if steps == 0:  # with rollouts of one token, a training row is gold alone
        return Prefixes([], None)
    blocks = max(1, CHUNK_QUERIES // (row.layout.num_samples * steps * heads_per_group))
    chunks = []
    for chunk in row.chunks(blocks):
        tokens = chunk.tokens(steps)
        keys = torch.arange(chunk.gold, device=visible.gold_end.device)
        is_visible = visible.queries(tokens).repeat(heads_per_group).sees(keys)
        chunks.append(Chunk(slice(tokens.start * heads_per_group, tokens.stop * heads_per_group), chunk.gold,
                            additive(is_visible, dtype)[:, None]))
    if steps == 1:
        return Prefixes(chunks, None)
    step = torch.arange(steps, device=visible.gold_end.device)
    sees_own = step.repeat_interleave(heads_per_group)[:, None] >= step
    return Prefixes(chunks, additive(sees_own, torch.promote_types(dtype, torch.float32)))


def append(before_BJUtD: Tensor | None, new_BJWD: Tensor, steps: int, parent_BW: Tensor | None = None) -> Tensor:
    """Keys or values of the steps so far, with those of the next: [B, J, W, t + 1, D], differentiable, in at least
    float32.

    Args:
        before_BJUtD: what the last call returned; None in the first step.
        steps: of all calls. While W stay the same, only one call makes room for them, and later ones do not copy what
            is there. So each result can be appended to only once.
        parent_BW: which of the U before each of the W continues, int64; what these have is copied. None: the same.
    """
    return _Append.apply(_room(new_BJWD, steps)[:, :, :, :0] if before_BJUtD is None else before_BJUtD, new_BJWD, steps,
                         parent_BW)


def _room(like_BJWD: Tensor, steps: int) -> Tensor:
    """Memory for keys or values of so many steps, [B, J, W, steps, D]."""
    shape = (*like_BJWD.shape[:3], steps, like_BJWD.shape[3])
    return like_BJWD.new_empty(shape, dtype=torch.promote_types(like_BJWD.dtype, torch.float32))


class _Append(torch.autograd.Function):
    @staticmethod
    def forward(ctx, before_BJUtD, new_BJWD, steps, parent_BW):
        ctx.dtype, ctx.before, ctx.parent_BW = new_BJWD.dtype, before_BJUtD.shape[2], parent_BW
        filled, held = before_BJUtD.shape[3], before_BJUtD.stride(2) // before_BJUtD.stride(3)
        assert filled < steps, "more steps than announced"
        if parent_BW is None and filled < held:
            # Through .data: autograd would take this for a change of what earlier steps have saved, which stays as it
            # is.
            shape = (*before_BJUtD.shape[:3], held, before_BJUtD.shape[4])
            room = before_BJUtD.data.as_strided(shape, before_BJUtD.stride())
        elif parent_BW is None:
            room = _room(new_BJWD, steps)
            room[:, :, :, :filled] = before_BJUtD
        else:  # no more than is needed: the next step may part again, and the graph keeps all of them
            room = _room(new_BJWD, filled + 1)
            room[:, :, :, :filled] = before_BJUtD.transpose(1, 2)[_rows(parent_BW), parent_BW].transpose(1, 2)
        after = room[:, :, :, : filled + 1]
        after[:, :, :, filled] = new_BJWD
        return after

    @staticmethod
    def backward(ctx, grad_BJWtD):
        grad_before, grad_new = grad_BJWtD[:, :, :, :-1], grad_BJWtD[:, :, :, -1].to(ctx.dtype)
        if ctx.parent_BW is not None:  # gradients of those that continue the same one add up
            grad_BWJtD = grad_before.transpose(1, 2)
            grad_BUJtD = grad_BWJtD.new_zeros(len(grad_BWJtD), ctx.before, *grad_BWJtD.shape[2:])
            place_BW = _rows(ctx.parent_BW) * ctx.before + ctx.parent_BW
            grad_BUJtD.flatten(0, 1).index_add_(0, place_BW.flatten(), grad_BWJtD.flatten(0, 1))
            grad_before = grad_BUJtD.transpose(1, 2)
        return grad_before, grad_new, None, None


def _rows(index_BW: Tensor) -> Tensor:
    return torch.arange(len(index_BW), device=index_BW.device)[:, None]


def attend(q_BHRD: Tensor, gold: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], seen: Prefixes,
           scale: float) -> Tensor:
    """Attention of R rollout tokens, as many of each rollout: [B, H, R, D], differentiable in all tensors.

    Args:
        gold: keys and values of gold tokens, [B, J, T, D].
        own: keys and values of the rollouts' tokens, [B, J, U, t, D].
    """
    packed = _PrefixAttention.apply(seen, scale, pack_heads(q_BHRD, gold[0].shape[1]), *gold, *own)
    return unpack_heads(packed, q_BHRD.shape[1])


def attend_flex(q_BHUD: Tensor, gold: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], seen: TileMask,
                scale: float) -> Tensor:
    """The same for one token of each rollout, with FlexAttention for the gold part."""
    heads, groups = q_BHUD.shape[1], gold[0].shape[1]
    q_BJQD = pack_heads(q_BHUD, groups)
    gold_BJQD, lse_BJQ = flex_attention.attend_with_lse(q_BJQD, *gold, seen, scale)
    q_BJUMD, keys_BJUtD, values_BJUtD = _own_part(q_BJQD, *own)
    scores_BJUMt = q_BJUMD @ keys_BJUtD.mT * scale
    own_lse_BJUM, gold_lse_BJUM = scores_BJUMt.logsumexp(-1), lse_BJQ.view(scores_BJUMt.shape[:-1])
    total_BJUM = torch.logaddexp(gold_lse_BJUM, own_lse_BJUM)
    out = (gold_BJQD.view(q_BJUMD.shape) * (gold_lse_BJUM - total_BJUM).exp()[..., None]
           + (scores_BJUMt - total_BJUM[..., None]).exp() @ values_BJUtD)
    return unpack_heads(out.to(q_BHUD.dtype).flatten(2, 3), heads)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, of many small matrices. On a CPU, torch multiplies the smallest of them one number at a time."""
    if a.is_cpu and a.shape[-2] * a.shape[-1] * b.shape[-1] < 400:
        return (a[..., None] * b[..., None, :, :]).sum(-2)
    return a @ b


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, seen: Prefixes, scale: float, q_BJQD, gold_k, gold_v, *own):
        q_BJUMD, keys_BJUtD, values_BJUtD = _own_part(q_BJQD, *own)
        scores_BJUMt = _product(q_BJUMD, keys_BJUtD.mT).mul_(scale)
        if seen.own_mask_Mt is not None:
            scores_BJUMt += seen.own_mask_Mt
        parts = [_gold_forward(q_BJQD[:, :, c.queries], gold_k[:, :, : c.gold], gold_v[:, :, : c.gold], c.mask_B1QC,
                               scale) for c in seen.chunks]
        gold_lse_BJQ = torch.cat([lse for _, lse in parts], dim=2)
        own_lse_BJQ = scores_BJUMt.logsumexp(-1).flatten(2)
        lse_BJQ = torch.logaddexp(gold_lse_BJQ, own_lse_BJQ.to(gold_lse_BJQ.dtype))
        probs_BJUMt = scores_BJUMt.sub_(lse_BJQ.view(scores_BJUMt.shape[:-1])[..., None]).exp_()
        merged_BJQD = _product(probs_BJUMt, values_BJUtD).flatten(2, 3)
        share_BJQ1 = (gold_lse_BJQ - lse_BJQ).exp_()[..., None]
        for chunk, (gold_BJQD, _) in zip(seen.chunks, parts):
            merged_BJQD[:, :, chunk.queries].addcmul_(gold_BJQD, share_BJQ1[:, :, chunk.queries])
        out_BJQD = merged_BJQD.to(q_BJQD.dtype)
        ctx.seen, ctx.scale = seen, scale
        ctx.save_for_backward(q_BJQD, gold_k, gold_v, out_BJQD, lse_BJQ, probs_BJUMt, *own)
        return out_BJQD

    @staticmethod
    def backward(ctx, grad_BJQD):
        q_BJQD, gold_k, gold_v, out_BJQD, lse_BJQ, probs_BJUMt, *own = ctx.saved_tensors
        grad_BJQD = grad_BJQD.contiguous()
        grad_q, grad_own = _own_backward(grad_BJQD, q_BJQD, out_BJQD, probs_BJUMt, own, ctx.scale)
        grad_k, grad_v = (torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
                          for x in (gold_k, gold_v))
        for chunk in ctx.seen.chunks:
            rows, gold = chunk.queries, slice(0, chunk.gold)
            dq, dk, dv = _gold_backward(grad_BJQD[:, :, rows], q_BJQD[:, :, rows], gold_k[:, :, gold],
                                        gold_v[:, :, gold], out_BJQD[:, :, rows], lse_BJQ[:, :, rows], chunk.mask_B1QC,
                                        ctx.scale)
            grad_q[:, :, rows] += dq
            grad_k[:, :, gold] += dk
            grad_v[:, :, gold] += dv
        return None, None, grad_q.to(q_BJQD.dtype), grad_k.to(gold_k.dtype), grad_v.to(gold_v.dtype), *grad_own


def _own_part(q_BJQD: Tensor, keys_BJUtD: Tensor, values_BJUtD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries by rollout, keys and values, in at least float32."""
    q_BJUMD = q_BJQD.unflatten(2, (keys_BJUtD.shape[2], -1))
    dtype = torch.promote_types(q_BJQD.dtype, torch.float32)
    return q_BJUMD.to(dtype), keys_BJUtD.to(dtype), values_BJUtD.to(dtype)


def _own_backward(grad_BJQD, q_BJQD, out_BJQD, probs_BJUMt, own, scale) -> tuple[Tensor, list[Tensor]]:
    """Gradients of the queries by way of the own part, and of its keys and values."""
    q_BJUMD, keys_BJUtD, values_BJUtD = _own_part(q_BJQD, *own)
    grad_BJUMD = grad_BJQD.to(q_BJUMD.dtype).view(q_BJUMD.shape)
    delta_BJUM1 = (grad_BJUMD * out_BJQD.view(q_BJUMD.shape)).sum(-1, keepdim=True)
    grad_values = _product(probs_BJUMt.mT, grad_BJUMD)
    grad_scores = _product(grad_BJUMD, values_BJUtD.mT).sub_(delta_BJUM1).mul_(probs_BJUMt).mul_(scale)
    grad_q, grad_keys = _product(grad_scores, keys_BJUtD), _product(grad_scores.mT, q_BJUMD)
    return grad_q.flatten(2, 3), [grad_keys.to(own[0].dtype), grad_values.to(own[1].dtype)]


def _gold_forward(q, k, v, mask, scale: float) -> tuple[Tensor, Tensor]:
    """Attention to gold keys, and its log-sum-exp [B, J, Q] in at least float32."""
    if q.is_cpu:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask, scale=scale)
    scores = _scores(q, k, mask, scale)
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp().to(v.dtype) @ v, lse


def _gold_backward(grad, q, k, v, out, lse, mask, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values, given output and log-sum-exp over all keys."""
    if q.is_cpu:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, False, attn_mask=mask, scale=scale)
    probs = (_scores(q, k, mask, scale) - lse[..., None]).exp()
    delta = (grad * out).sum(-1, keepdim=True, dtype=probs.dtype)
    grad_scores = (((grad @ v.mT) - delta) * probs * scale).to(q.dtype)
    return grad_scores @ k, grad_scores.mT @ q, probs.to(grad.dtype).mT @ grad


def _scores(q, k, mask, scale: float) -> Tensor:
    scores = q @ k.mT
    return scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale + mask
