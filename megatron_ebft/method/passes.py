"""Forward and backward passes over micro-batches, by Megatron-Core's pipeline schedules."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_ebft.data.micro_batches import GoldBatch, GoldMicroBatches
from megatron_ebft.model import fp8
from megatron_ebft.model.attention import CausalPattern, as_mask
from megatron_ebft.model.log_probabilities import LogProbs, gold_section


class Batches(Protocol):
    """Micro-batches of a pass, each what `forward_step` takes from its iterator."""

    row_length: int
    """Tokens of a row, of the first micro-batch."""
    micro_batch_size: int

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator: ...


def run_schedule(forward_step, micro_batches: Batches, model, forward_only: bool) -> None:
    """Run Megatron's pipeline schedule over the micro-batches; with a backward pass, in the precision of training.

    Args:
        model: a model, or a policy's list of virtual stages, each of which sees all micro-batches.
    """
    chunks = model if isinstance(model, list) else [model]
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    schedule = get_forward_backward_func(stages, len(chunks) if len(chunks) > 1 else None)
    with contextlib.nullcontext() if forward_only else fp8.training(chunks):
        schedule(
            forward_step_func=forward_step, data_iterator=[iter(micro_batches) for _ in chunks], model=chunks,
            num_microbatches=len(micro_batches), seq_length=micro_batches.row_length,
            micro_batch_size=micro_batches.micro_batch_size, forward_only=forward_only)


def plain_pass(model, rows: GoldBatch, micro_batch_size: int, temperature: float,
               loss: Callable[[slice, Tensor], Tensor], forward_only: bool) -> None:
    """A pass over rows of T tokens without rollouts; unless `forward_only`, with the gradient of the loss.

    Args:
        temperature: of the log-probabilities.
        loss: makes some rows' share of the loss from their log-probabilities of tokens 1..T−1, float32 [b, T−1]. Called
            on the last stage.
    """
    def forward_step(iterator, model):
        mb = next(iterator)

        def loss_func(sections):
            return loss(mb.rows, sections[0].squeeze(-1).t()), torch.zeros((), dtype=torch.int), {}

        readout = LogProbs([gold_section(mb.tokens, temperature)])
        return model(mb.tokens, mb.positions, as_mask(CausalPattern(mb.document_BT)), readout=readout), loss_func

    run_schedule(forward_step, GoldMicroBatches(rows, micro_batch_size), model, forward_only)
