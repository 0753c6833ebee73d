"""The training pass over completions: log-probabilities, loss and gradient (METHOD: "RLVR").

Suffixes: Q questions of this rank, N completions of each, C tokens of completions, B rows, T tokens of a row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ebft.common.device import upload
from megatron_ebft.data.packing import PackedSequences, Sequence, pack
from megatron_ebft.data.questions import Question
from megatron_ebft.method import losses
from megatron_ebft.method.config import RLVRConfig
from megatron_ebft.method.diagnostics import measure_sampler
from megatron_ebft.method.means import Means
from megatron_ebft.method.passes import plain_pass
from megatron_ebft.rollout.generation import Completion


@dataclass
class CompletionBatch:
    """Completions of this rank, packed behind their prompts. Values of tokens are ordered by their numbers in
    `packed`."""

    packed: PackedSequences
    advantage_C: Tensor
    """float64; a completion's advantage, for each of its tokens."""
    sampled_C: Tensor
    """float64; log-probabilities under the sampler."""

    def log_probs(self, rows: slice, log_probs_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Of what a pass over some rows has read: log-probabilities of completion tokens, and their numbers."""
        places, numbers = self.packed.completion_tokens(rows)
        return log_probs_BT.flatten()[places], numbers


def completion_batch(questions: list[Question], completions_QN: list[list[Completion]], advantage_QN: Tensor,
                     needed_QN: Tensor, config: RLVRConfig) -> CompletionBatch:
    """The completions that are needed (bool). All data-parallel ranks must call."""
    needed, advantage = needed_QN.nonzero().tolist(), advantage_QN.tolist()
    sequences = [Sequence(questions[q].prompt, completions_QN[q][n].tokens) for q, n in needed]
    advantages = [advantage[q][n] for q, n in needed for _ in completions_QN[q][n].tokens]
    sampled = [log_prob for q, n in needed for log_prob in completions_QN[q][n].log_probs]
    packed = pack(sequences, config.row_length, config.micro_batch_size * config.rows_multiple)
    return CompletionBatch(packed, *(upload(torch.tensor(x, dtype=torch.float64)) for x in (advantages, sampled)))


@torch.no_grad()
def completion_scores(model, batch: CompletionBatch, config: RLVRConfig) -> Tensor:
    """Log-probabilities of the completion tokens under a model, float64 [C], forward only. Zero but on the last stage.
    """
    scores_C = torch.zeros_like(batch.sampled_C)

    def collect(rows: slice, log_probs_BT: Tensor) -> Tensor:
        log_probs_C, numbers = batch.log_probs(rows, log_probs_BT)
        scores_C[numbers] = log_probs_C.double()
        return log_probs_BT.sum()

    plain_pass(model, batch.packed.rows, config.micro_batch_size, config.generation.temperature, collect,
               forward_only=True)
    return scores_C


def completion_gradient(policy: list, batch: CompletionBatch, start_C: Tensor | None, num_tokens: Tensor,
                        config: RLVRConfig, means: Means) -> None:
    """Forward and backward of rl_coef·L_RL + β·KL; gradients are left in the policy's buffers.

    Args:
        start_C: log-probabilities under the start; None: not measured, and β must be 0.
        num_tokens: completion tokens of the global batch, over which the loss is a mean. Completions that were left out
            count, too: their terms are 0.
        means: receives the parts of the loss as sums, "rl_loss" without the number of its terms.
    """
    def loss(rows: slice, log_probs_BT: Tensor) -> Tensor:
        log_probs_C, numbers = batch.log_probs(rows, log_probs_BT)
        counted_C = torch.ones_like(log_probs_C, dtype=torch.bool)
        advantage_C, sampled_C = (x[numbers].to(log_probs_C.dtype) for x in (batch.advantage_C, batch.sampled_C))
        weight_C = losses.importance_weight(log_probs_C, sampled_C, config.importance_cap)
        rl = losses.reinforce_loss(log_probs_C[:, None], advantage_C, counted_C, weight_C[:, None])
        means.add("rl_loss", rl.detach(), 0.0)
        measure_sampler(log_probs_C.detach(), sampled_C, counted_C, config.importance_cap, means)
        total = config.rl_coef * rl
        if start_C is not None:
            started_C = start_C[numbers].to(log_probs_C.dtype)
            means.add_masked("distance_to_start", (log_probs_C - started_C).abs(), counted_C)
        if config.kl_coef:
            kl_C = losses.kl_estimate(log_probs_C, started_C, config.kl_estimator)
            means.add_masked("kl_loss", kl_C, counted_C)
            total = total + config.kl_coef * kl_C.sum()
        return total / num_tokens

    plain_pass(policy, batch.packed.rows, config.micro_batch_size, config.generation.temperature, loss,
               forward_only=False)
