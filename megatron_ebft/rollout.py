"""Block-parallel sampling: every block, sample and row of a group decodes together, in G steps.

The gold rows go through the policy once; their keys and values, and the logits before each anchor, serve all n samples.
Then G − 1 cached steps follow, each with one token per rollout.
"""

from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_ebft.attention import DecodePattern, PrefillPattern, RolloutCache, as_mask
from megatron_ebft.batch import GoldBatch
from megatron_ebft.layout import StridedLayout, document_starts
from megatron_ebft.readout import Logits
from megatron_ebft.sampling import sample, uniform


@dataclass
class SamplingConfig:
    """How rollouts are drawn.

    Raises:
        ValueError: naming the flag.
    """

    temperature: float
    top_p: float
    top_k: int
    """0: off."""
    seed: int

    def __post_init__(self):
        if self.temperature <= 0:
            raise ValueError(f"--ebft-temperature {self.temperature}: must be above 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--ebft-top-p {self.top_p}: must be in (0, 1]")
        if self.top_k < 0:
            raise ValueError(f"--ebft-top-k {self.top_k}: must be 0 (off) or more")


@dataclass
class Rollouts:
    """Sampled completions of B rows, K blocks, N samples, G steps."""

    tokens_BKNG: Tensor
    """int64."""
    log_probs_BKNG: Tensor
    """float32, of softmax(logits / τ) before top-p and top-k."""
    entropy_BKNG: Tensor
    """float32, nats, of that distribution."""


@torch.no_grad()
def sample_rollouts(policy, gold: GoldBatch, layout: StridedLayout, config: SamplingConfig, iteration: int,
                    rows_per_group: int = 0) -> Rollouts:
    """Sample n rollouts for every block of every row.

    Args:
        policy: a model as `build_policy` or `build_frozen` makes it; left in the mode (train or eval) it was in.
        iteration: names the step in the random numbers.
        rows_per_group: rows that decode together; 0: all. Bounds the memory of the cache, does not change the result.
    """
    was_training = policy.training
    policy.eval()
    size = rows_per_group or len(gold.tokens_BT)
    groups = [_sample_group(policy, gold, slice(i, i + size), layout, config, iteration)
              for i in range(0, len(gold.tokens_BT), size)]
    policy.train(was_training)
    return Rollouts(*(torch.cat(parts) for parts in zip(*groups)))


def _sample_group(policy, gold: GoldBatch, rows: slice, layout: StridedLayout, config: SamplingConfig,
                  iteration: int) -> tuple[Tensor, Tensor, Tensor]:
    tokens_BT, index_B = gold.tokens_BT[rows], gold.index_B[rows]
    document_BT = None if gold.document_BT is None else gold.document_BT[rows]
    starts_BT = None if document_BT is None else document_starts(document_BT)
    batch, device = len(tokens_BT), tokens_BT.device
    row = layout.parts(0, layout.rollout_length - 1)[0]
    positions = row.positions(starts_BT, batch).to(device)
    cache = RolloutCache(row, document_BT)
    block_K1 = row.blocks.to(device)[:, None]
    sample_N = torch.arange(layout.num_samples, device=device)
    tp_group = parallel_state.get_tensor_model_parallel_group()

    def draw(logits, step, shape):
        numbers = uniform(config.seed, iteration, index_B[:, None, None], block_K1, sample_N, step)
        drawn = sample(logits, numbers.view(shape), config.temperature, config.top_p, config.top_k, tp_group)
        return [x.view(batch, row.size, -1) for x in drawn]

    logits_KBV = policy(tokens_BT, positions[:, : layout.seq_length], as_mask(PrefillPattern(cache)),
                        labels=Logits(row.anchor_predictors().to(device)))
    tokens, log_probs, entropy = draw(logits_KBV.transpose(0, 1), 0, (batch, row.size, layout.num_samples))
    steps = [(tokens, log_probs, entropy.expand_as(log_probs))]
    for step in range(layout.rollout_length - 1):
        index_R = row.rollout_index(range(step, step + 1)).flatten().to(device)
        logits_RBV = policy(steps[-1][0].flatten(1), positions[:, index_R], as_mask(DecodePattern(cache, step)),
                            labels=Logits(None))
        steps.append(draw(logits_RBV.transpose(0, 1), step + 1, (batch, len(index_R), 1)))
    return tuple(torch.stack(x, dim=-1) for x in zip(*steps))
