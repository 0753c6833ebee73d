"""Formulas for torch's FLOP counter: attention on a CPU. Importing this module registers them."""

import torch
from torch.utils import flop_counter


def _attention_flops(query_shape, key_shape, value_shape) -> int:
    """FLOPs of both products of attention without a mask: [B, H, Q, D] with [B, J, C, D] and [B, J, C, E]."""
    batch, heads, queries, dim = query_shape
    keys = key_shape[2]
    return 2 * batch * heads * queries * keys * (dim + value_shape[3])


def _sdpa(query, key, value, *args, out_shape=None, **kwargs):
    return _attention_flops(query, key, value)


def _sdpa_backward(grad, query, key, value, *args, out_shape=None, **kwargs):
    """Recomputes the scores, then takes the gradients of both operands of both products: 5 products for 2."""
    batch, heads, queries, dim = query
    return 2 * batch * heads * queries * key[2] * (3 * dim + 2 * value[3])


for _operation, _formula in (("_scaled_dot_product_flash_attention_for_cpu", _sdpa),
                             ("_scaled_dot_product_flash_attention_for_cpu_backward", _sdpa_backward)):
    # torch has no formulas for these before 2.15, and its others do not know grouped heads before 2.13.
    flop_counter.flop_registry.pop(getattr(torch.ops.aten, _operation), None)
    flop_counter.register_flop_formula(getattr(torch.ops.aten, _operation))(_formula)
