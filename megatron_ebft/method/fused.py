"""The fused step: the forward pass that samples the rollouts is the one that is differentiated.

EBFT is on-policy, so sampling and training compute the same activations. Here each micro-batch keeps the autograd graph
while it samples: gold pass, G − 1 cached decoding steps, features, rewards, advantages, loss. Megatron-Core's schedule
then runs its backward pass. What separate passes do (rollout/sampler.py, gradient.py) costs one more forward pass.

1. The denominators of the loss are known before (`Loss`), and rewards need only the rollouts of a block. So no
   micro-batch waits for another.
2. The log-probability of a rollout token is read from the logits it was drawn from. Sampler and training pass cannot
   differ.
3. With `blocks_per_microbatch`, each part of the blocks is a micro-batch, with a gold pass of its own. Blocks of other
   parts are not decoded, nor, with `skip_duplicates`, blocks that do not count.
4. A weight is used in G passes of one graph. Autograd sums its G gradients before Megatron-Core adds them to the
   gradient buffer: in the weight's dtype, and in a buffer that lives until the backward pass of the gold tokens. In
   bfloat16 that takes 2 bytes a parameter, and rounds G times: measured, gradients are as exact as those of separate
   passes (tests/method/test_fused_bf16.py).
5. With `skip_duplicates`, rollouts of a block that begin alike share the decoding steps of what they have in common
   (layout/tree.py), and their gradients add up there. This costs a wait for the GPU in each step, until none have
   anything in common. Rollouts without advantage are differentiated like the others: they are known too late.
6. Logits are kept until the backward pass, which recomputes their softmax alone. Recomputing them as well would add the
   operations of the output head once more.
7. It needs one pipeline stage, no activation recomputation and no FP8 of the policy (run/flags/checks.py).
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_ebft.common.device import upload
from megatron_ebft.data.micro_batches import GoldBatch, row_slices
from megatron_ebft.layout.packed_row import split_blocks
from megatron_ebft.method.computed import Computed
from megatron_ebft.method.config import EBFTConfig
from megatron_ebft.method.gradient import Loss, LossTerms, Scores, score
from megatron_ebft.method.means import Means
from megatron_ebft.method.passes import run_schedule
from megatron_ebft.method.rewards import Rewards, compute_advantages, compute_rewards, feature_grams
from megatron_ebft.rollout.sampler import Rollouts, ScoredRollouts, sample_and_score


@dataclass
class _Part:
    """Some rows and some of their blocks."""

    gold: GoldBatch
    blocks: slice
    decoded_BK: Tensor
    """Blocks whose rollouts are decoded, bool."""
    on_host_BK: Tensor | None
    """The same on the host; None: all."""
    valid_BK: Tensor
    """Those of them that count, bool."""
    is_first: bool
    """Whether gold tokens count in this part of the rows."""


@dataclass
class _Parts:
    """The micro-batches of a fused step."""

    gold: GoldBatch
    config: EBFTConfig

    def __post_init__(self):
        size = self.config.blocks_per_microbatch or self.config.layout.num_blocks
        self.blocks = [slice(first, first + size) for first in range(0, self.config.layout.num_blocks, size)]
        self.rows = row_slices(self.gold, self.micro_batch_size)
        self.valid_BK = self.gold.valid_blocks(self.config.layout)
        self.decoded_BK = None  # all
        if self.config.skip_duplicates or len(self.blocks) > 1:  # waits for the GPU
            self.decoded_BK = (self.valid_BK if self.config.skip_duplicates else torch.ones_like(self.valid_BK)).cpu()

    @property
    def micro_batch_size(self) -> int:
        return self.config.micro_batch_size

    @property
    def row_length(self) -> int:
        return self.config.layout.seq_length

    def __len__(self) -> int:
        return len(self.rows) * len(self.blocks)

    def __iter__(self) -> Iterator[_Part]:
        for rows in self.rows:
            for blocks in self.blocks:
                valid_BK, on_host_BK = self.valid_BK[rows], None
                if self.decoded_BK is not None:
                    on_host_BK = torch.zeros_like(self.decoded_BK[rows])
                    on_host_BK[:, blocks] = self.decoded_BK[rows, blocks]
                decoded_BK = torch.ones_like(valid_BK) if on_host_BK is None else upload(on_host_BK)
                yield _Part(self.gold.rows(rows), blocks, decoded_BK, on_host_BK, valid_BK & decoded_BK,
                            is_first=blocks.start == 0)


def fused_gradient(policy: list, encoder, start, gold: GoldBatch, config: EBFTConfig, iteration: int, means: Means,
                   phase: Callable[[str], AbstractContextManager], after_rollouts: Callable[[], None]) -> Computed:
    """Rollouts, features, rewards, advantages and loss of each micro-batch, and its backward pass; gradients are left
    in the policy's buffers. Arguments as for `ebft_step`.

    Args:
        means: receives the parts of the loss, and the shares of tokens that were left out.
    """
    loss, parts, done = Loss(gold, config, means), _Parts(gold, config), []
    layout = config.layout
    whole = split_blocks(layout, config.blocks_per_microbatch, layout.rollout_length)[0]
    full = layout.seq_length + (layout.rollout_length - 1) * whole.decode_length
    config = replace(config, blocks_per_microbatch=0)  # the encoder and the start do not split a part again

    def forward_step(iterator, model):
        part = next(iterator)
        with phase("rollout"):
            scored = sample_and_score(model, part.gold, config.layout, config.sampling, iteration, part.on_host_BK,
                                      share=config.skip_duplicates)
        if not done:
            after_rollouts()
        rollouts = scored.rollouts
        with phase("features"):
            gram = feature_grams(encoder, part.gold, rollouts, config, means,
                                 None if part.on_host_BK is None else part.decoded_BK, whole.length)
            rewards = compute_rewards(gram, rollouts, config)
            advantage_BKN = compute_advantages(rewards, config)
        start_BKNG = None
        if start is not None:
            with phase("start_scores"):
                needed_BKN = part.decoded_BK[..., None].expand_as(advantage_BKN)
                start_BKNG = score(start, part.gold, rollouts, config, needed_BKN).rollout_BKNG
        means.add("training_tokens_saved", float(max(0, full - scored.tokens_per_row)), float(full))
        done.append((part, Computed(rollouts=rollouts, gram=gram, rewards=rewards, advantage_BKN=advantage_BKN,
                                    scores=_scores(scored, part.decoded_BK), start_BKNG=start_BKNG)))
        terms = LossTerms(advantage_BKN=advantage_BKN, valid_BK=part.valid_BK, sampled_BKNG=rollouts.log_probs_BKNG,
                          gold_valid_BT=part.gold.gold_valid() if part.is_first else None,
                          start_BKNG=start_BKNG if config.kl_coef else None)
        total = loss(scored.log_probs_BKNG, scored.gold_BT, terms)
        return total, lambda total: (total, torch.zeros((), dtype=torch.int), {})

    with phase("train"):
        run_schedule(forward_step, parts, policy, forward_only=False)
    return _joined(done)


def _scores(scored: ScoredRollouts, decoded_BK: Tensor) -> Scores:
    log_probs_BKNG = scored.log_probs_BKNG.detach()
    is_scored_BKNG = decoded_BK[..., None, None].expand(log_probs_BKNG.shape).clone()
    is_scored_BKNG[..., 0] = True
    return Scores(log_probs_BKNG.where(is_scored_BKNG, torch.nan), scored.gold_BT.detach(), is_scored_BKNG)


def _joined(done: list[tuple[_Part, Computed]]) -> Computed:
    """What all parts have computed, for all rows and blocks."""

    def blocks(values: Callable[[Computed], Tensor]) -> Tensor:
        """[B, K, ...], from the blocks that each part has computed."""
        rows: list[list[Tensor]] = []
        for part, computed in done:
            if part.is_first:
                rows.append([])
            rows[-1].append(values(computed)[:, part.blocks])
        return torch.cat([torch.cat(x, dim=1) for x in rows])

    return Computed(
        rollouts=Rollouts(blocks(lambda x: x.rollouts.tokens_BKNG), blocks(lambda x: x.rollouts.log_probs_BKNG),
                          blocks(lambda x: x.rollouts.entropy_BKNG)),
        gram=blocks(lambda x: x.gram),
        rewards=Rewards(blocks(lambda x: x.rewards.alignment_BKn), blocks(lambda x: x.rewards.diversity_BKn)),
        advantage_BKN=blocks(lambda x: x.advantage_BKN),
        scores=Scores(blocks(lambda x: x.scores.rollout_BKNG),
                      torch.cat([x.scores.gold_BT for part, x in done if part.is_first]),
                      blocks(lambda x: x.scores.is_scored_BKNG)),
        start_BKNG=None if done[0][1].start_BKNG is None else blocks(lambda x: x.start_BKNG))
