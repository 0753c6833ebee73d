"""Rotary embedding of queries and keys at explicit positions, one kernel a layer.

1. Cosines and sines are computed once a pass, in float32 (`Angles`), and all layers share them.
2. The core attention rotates q and k before its pattern attends (attention.py). Megatron-Core's own rotary embedding,
   which would compute cosines and sines for q and for k of every layer, is not used.
3. A rotation is linear and orthogonal: its backward pass rotates by the opposite angle, and needs only the shared
   cosines and sines.
4. On GPUs one compiled kernel reads q and k and writes both.

Suffixes: S row length, B rows, H query heads, J key heads, D head dimension, R rotated dimensions of a head (the others
stay as they are).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_ebft.model import kernels


class Angles(NamedTuple):
    """Cosines and sines of one pass, in the dtype of the frequencies."""

    cos_SB1R: Tensor
    """Its two halves are equal."""
    sin_SB1R: Tensor
    """Its first half is the second one negated."""


def angles(positions_BS: Tensor, frequencies: Tensor) -> Angles:
    """Cosines and sines of position · frequency.

    Args:
        positions_BS: int64.
        frequencies: [R/2], radians per token.
    """
    angle_SB1R2 = positions_BS.t()[:, :, None, None].to(frequencies.dtype) * frequencies
    cos, sin = angle_SB1R2.cos(), angle_SB1R2.sin()
    return Angles(torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1))


def rotate(q_SBHD: Tensor, k_SBJD: Tensor, by: Angles) -> tuple[Tensor, Tensor]:
    """q and k, rotated in the dtype of the angles and returned in their own.

    Dimensions i and i + R/2 of a head are rotated together.
    """
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
    if kernels.available().no_compiler:
        return _rotated(q, cos, sin, sign), _rotated(k, cos, sin, sign)
    tokens = (x.detach().flatten(0, 1) for x in (q, k, cos, sin))
    both = _rotated_together(*tokens, sign).unflatten(0, q.shape[:2])
    return both.split([q.shape[2], k.shape[2]], dim=2)


@kernels.compiled
def _rotated_together(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """q and k [S·B, heads, D] as one tensor. S and B are one dimension, or each B would compile a kernel of its own."""
    return torch.cat([_rotated(q, cos, sin, sign), _rotated(k, cos, sin, sign)], dim=-2)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """x [..., heads, D] rotated by sign · angle."""
    width = cos.shape[-1]
    part = x[..., :width]
    part = torch.addcmul(part * cos, part.roll(width // 2, -1), sin, value=sign).to(x.dtype)
    return part if width == x.shape[-1] else torch.cat([part, x[..., width:]], dim=-1)
