"""Rotary embedding of queries and keys at explicit positions, one kernel a layer.

1. Cosines and sines are computed once a pass, in float32 (`Angles`), and shared by all layers.
2. The core attention rotates q and k just before its pattern attends (attention.py), so Megatron-Core's own rotary
   embedding, which computes both anew for q and for k of every layer, gets nothing to do.
3. A rotation is linear and orthogonal: its backward pass is the rotation by the opposite angle, and saves only the
   shared cosines and sines.
4. On GPUs q and k are one tensor while they are rotated: one compiled kernel reads both and writes both.

Suffixes: S row length, B rows, H query heads, J key heads, D head dimension, R rotated dimensions of a head (the rest
passes through).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_ebft.model import kernels


class Angles(NamedTuple):
    """Of one pass; computed in the dtype of the frequencies."""

    cos_SB1R: Tensor
    """Both halves alike."""
    sin_SB1R: Tensor
    """The first half negated."""


def angles(positions_BS: Tensor, frequencies: Tensor) -> Angles:
    """Cosines and sines at explicit positions (int64); frequencies: [R/2]."""
    angle_SB1R2 = positions_BS.t()[:, :, None, None].to(frequencies.dtype) * frequencies
    cos, sin = angle_SB1R2.cos(), angle_SB1R2.sin()
    return Angles(torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1))


def rotate(q_SBHD: Tensor, k_SBJD: Tensor, by: Angles) -> tuple[Tensor, Tensor]:
    """q and k in their own dtype, rotated in that of the angles; dimension i of a head pairs with i + R/2."""
    return _Rotation.apply(q_SBHD, k_SBJD, *by)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotate_both(q, k, cos, sin, 1)

    @staticmethod
    def backward(ctx, grad_q, grad_k):
        return *_rotate_both(grad_q, grad_k, *ctx.saved_tensors, -1), None, None


def _rotate_both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sign: int) -> tuple[Tensor, Tensor]:
    if kernels.found().no_compiler:
        return _rotated(q, cos, sin, sign), _rotated(k, cos, sin, sign)
    tokens = (x.detach().flatten(0, 1) for x in (q, k, cos, sin))
    both = _rotated_together(*tokens, sign).unflatten(0, q.shape[:2])
    return both.split([q.shape[2], k.shape[2]], dim=2)


@kernels.compiled
def _rotated_together(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """Of [S·B, heads, D]: B would be one more dimension whose 1, or equality to another, compiles a kernel of its own.
    """
    return torch.cat([_rotated(q, cos, sin, sign), _rotated(k, cos, sin, sign)], dim=-2)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """x [..., heads, D], rotated by sign · angle."""
    width = cos.shape[-1]
    part = x[..., :width]
    part = torch.addcmul(part * cos, part.roll(width // 2, -1), sin, value=sign).to(x.dtype)
    return part if width == x.shape[-1] else torch.cat([part, x[..., width:]], dim=-1)
