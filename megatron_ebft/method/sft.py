"""Next-token training: the step of the SFT mode, and the cross entropy of evaluation."""

from collections.abc import Callable
from contextlib import AbstractContextManager

from torch import Tensor

from megatron_ebft.data.micro_batches import GoldBatch
from megatron_ebft.method import losses
from megatron_ebft.method.means import Means
from megatron_ebft.method.passes import plain_pass
from megatron_ebft.method.update import clear_gradients, update
from megatron_ebft.parallel.groups import dp_sum


def sft_step(*, policy: list, optimizer, gold: GoldBatch, micro_batch_size: int,
             phase: Callable[[str], AbstractContextManager]) -> dict[str, float]:
    """One optimizer step of next-token training on the global batch; returns its metrics, the same on every rank.

    Where no token of the batch counts, there is no loss among the metrics.

    Args:
        gold: this rank's rows of the global batch.
        phase: makes the context of each phase, from its name.

    Raises:
        StepFailed: a loss or gradient that is not finite; the weights are as they were.
    """
    means = Means()
    clear_gradients(policy, optimizer)
    with phase("train"):
        cross_entropy_pass(policy, gold, micro_batch_size, means, forward_only=False)
    metrics = means.reduce()
    if "ce_loss" in metrics:
        metrics["loss"] = metrics["ce_loss"]
    with phase("optimizer"):
        metrics["grad_norm"] = update(optimizer, metrics.get("loss", 0.0))
    return metrics


def cross_entropy_pass(model, gold: GoldBatch, micro_batch_size: int, means: Means, forward_only: bool) -> None:
    """Mean next-token loss over the valid gold tokens of the global batch; unless `forward_only`, with its gradient.

    Adds "ce_loss" (nats per token) to `means`.
    """
    valid = gold.gold_valid()
    count = dp_sum(valid.sum().float()).clamp(min=1)

    def loss(rows: slice, log_probs_BT: Tensor) -> Tensor:
        ce = losses.cross_entropy(log_probs_BT, valid[rows])
        means.add("ce_loss", ce.detach(), valid[rows].sum())
        return ce / count

    plain_pass(model, gold, micro_batch_size, 1.0, loss, forward_only)
