"""What every training step does around its gradient: clear the buffers before, clip and apply after."""

import math

from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from megatron_ebft.common.errors import NotFinite


def clear_gradients(policy: list, optimizer) -> None:
    """Set the policy's gradient buffers to zero."""
    for chunk in policy:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()


def update(optimizer, loss: float) -> float:
    """Clip and apply the gradients; returns their norm before clipping.

    Raises:
        NotFinite: the loss or the norm is not finite; the weights are as they were.
    """
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise NotFinite(f"loss {loss}, gradient norm {norm}: not finite, stopped before the optimizer step; lower --lr "
                        "or --clip-grad, or look at these samples")
    parameters = optimizer.get_parameters()  # none in a rank's share of a small model
    if parameters and optimizer.config.clip_grad > 0:  # Megatron's step() would compute the norm a second time
        clip_grad_by_total_norm_fp32(parameters, optimizer.config.clip_grad, norm)
    successful = optimizer.step_with_ready_grads()
    assert successful, "only fp16 loss scaling skips steps"
    return norm
