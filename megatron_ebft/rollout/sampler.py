"""Block-parallel sampling: all blocks and samples of a group of rows decode together, in G steps.

The gold rows pass through the policy once. Their keys and values, and the logits before each anchor, serve all n
samples. Then follow G − 1 cached steps with one token per rollout. With pipeline stages, several groups of rows are in
flight at once (schedule.py).
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ebft.common.device import upload, work_clock
from megatron_ebft.data.micro_batches import GoldBatch
from megatron_ebft.layout import visible_keys
from megatron_ebft.layout.packed_row import split_blocks
from megatron_ebft.layout.strided import StridedLayout, document_starts, pad
from megatron_ebft.model.attention import DecodePattern, PrefillPattern, RolloutCache, as_mask
from megatron_ebft.model.fp8 import FP8, quantised
from megatron_ebft.model.weights import unwrap
from megatron_ebft.parallel.groups import (
    from_last_stage,
    is_first_stage,
    is_last_stage,
    pp_group,
    sample_rank,
    tp_group,
)
from megatron_ebft.rollout.pipeline_link import PipelineLink
from megatron_ebft.rollout.schedule import row_groups, tasks
from megatron_ebft.rollout.token_sampling import Draws, uniform


@dataclass
class SamplingConfig:
    """How rollouts are drawn. The flags were checked (run/flags)."""

    temperature: float
    top_p: float
    top_k: int
    """0: off."""
    seed: int
    fp8: FP8 = FP8()
    """What of the policy runs in FP8 while it samples."""

    def __post_init__(self):
        assert self.temperature > 0 and 0 < self.top_p <= 1 and self.top_k >= 0, self


@dataclass
class Rollouts:
    """Sampled completions of B rows, K blocks, N samples, G steps."""

    tokens_BKNG: Tensor
    """int64."""
    log_probs_BKNG: Tensor | None
    """float32, of softmax(logits / τ) before top-p and top-k; None where rollouts came from elsewhere without them."""
    entropy_BKNG: Tensor | None
    """float32, nats, of that distribution."""


@torch.no_grad()
def sample_rollouts(policy: list, gold: GoldBatch, layout: StridedLayout, config: SamplingConfig, iteration: int,
                    rows_per_group: int = 0, timeline: list | None = None) -> Rollouts:
    """Sample n rollouts for every block of every row; the result is on every rank that shares the model.

    Args:
        policy: stages as `build_policy` makes them; left in the mode (train or eval) they were in.
        iteration: names the step in the random numbers.
        rows_per_group: rows that decode together; 0: all, or as many as keep the pipeline busy (schedule.py). Bounds
            the memory of the cache, does not change the result.
        timeline: receives (step, virtual stage, group, seconds of work) for every task of this stage; slows it down.
    """
    was_training = policy[0].training
    for chunk in policy:
        chunk.eval()
    stages = dist.get_world_size(pp_group())
    link = PipelineLink() if stages > 1 else None
    rows = row_groups(len(gold.tokens_BT), stages, rows_per_group)
    groups = [_Group(policy, gold.rows(part), layout, config, iteration, link) for part in rows]
    with quantised(policy, config.fp8):
        for step, virtual, number in tasks(len(groups), stages, layout.rollout_length, len(policy)):
            group = groups[number]
            given = group.receive(step, virtual)
            begun = None if timeline is None else work_clock()
            out = group.work(step, virtual, given)
            if timeline is not None:
                timeline.append((step, virtual, number, work_clock() - begun))
            group.hand_on(step, virtual, out)
    if link is not None:
        link.finish()
    for chunk in policy:
        chunk.train(was_training)
    drawn = (torch.cat(parts) for parts in zip(*(group.drawn() for group in groups)))
    return Rollouts(*map(from_last_stage, drawn))


class _Group:
    """Rows that decode together: their cache on this stage and, on the last one, what was drawn."""

    def __init__(self, policy: list, gold: GoldBatch, layout: StridedLayout, config: SamplingConfig, iteration: int,
                 link: PipelineLink | None):
        self.policy, self.gold, self.layout, self.link = policy, gold, layout, link
        self.config, self.iteration = config, iteration
        self.row = split_blocks(layout, 0, layout.rollout_length - 1)[0]
        starts_BT = None if gold.document_BT is None else document_starts(gold.document_BT)
        batch = len(gold.tokens_BT)
        # Everything that the host computes is computed here: decoding launches work and never waits for the device.
        self.blocks, self.predictors = upload(self.row.blocks), upload(self.row.anchor_predictors())
        positions = upload(self.row.positions(starts_BT, batch))
        self.gold_positions = positions[:, : layout.seq_length]
        self.step_positions = positions[:, upload(self.row.rollout_index(range(self.row.steps)))].flatten(1, 2)
        self.numbers_BKNG = self._numbers() if is_last_stage() else None
        self.visible = visible_keys.decoding(self.row, starts_BT, batch)
        self.cache: RolloutCache | None = None
        self.steps: list[tuple[Tensor, Tensor, Tensor]] = []

    def receive(self, step: int, virtual: int) -> Tensor | None:
        """Input of a task: tokens [b, length] where the model begins, else hidden states [length (/tp), b, H]."""
        if is_first_stage() and virtual == 0:
            return self.gold.tokens_BT if step == 0 else pad(self._last_tokens().flatten(1), self.row.decode_length)
        config = unwrap(self.policy[virtual]).config
        length = self.row.decode_length if step else self.layout.seq_length
        if config.sequence_parallel:
            length //= dist.get_world_size(tp_group())
        return self.link.receive((length, len(self.gold.tokens_BT), config.hidden_size), config.params_dtype)

    def work(self, step: int, virtual: int, given: Tensor) -> Tensor:
        """One step on one stage; step 0 passes over the gold rows. Returns the tokens drawn, or hidden states."""
        chunk, tokens = self.policy[virtual], None
        if is_first_stage() and virtual == 0:
            tokens = given
        else:
            unwrap(chunk).set_input_tensor(given)
        positions, pattern, rows = self._inputs(step)
        is_last = is_last_stage() and virtual == len(self.policy) - 1
        out = chunk(tokens, positions, as_mask(pattern), readout=self._draws(rows, step) if is_last else None)
        unwrap(chunk).set_input_tensor(None)
        if virtual == len(self.policy) - 1:
            if is_last:
                self.steps.append(self._by_sample(out))
                out = self.steps[-1][0]
            if step == self.layout.rollout_length - 1:
                self.cache = None
        return out

    def hand_on(self, step: int, virtual: int, out: Tensor) -> None:
        """Send the result to the stage that needs it next. Nobody needs the last tokens."""
        is_last = is_last_stage() and (step, virtual) == (self.layout.rollout_length - 1, len(self.policy) - 1)
        if self.link is not None and not is_last:
            self.link.send(out)

    def _inputs(self, step: int):
        """Positions [b, length], the attention pattern, and the rows after which tokens are drawn."""
        if self.cache is None:
            self.cache = RolloutCache(self.row, self.visible, self.gold.document_BT)
        if step == 0:
            return self.gold_positions, PrefillPattern(self.cache), self.predictors
        positions = self.step_positions[:, :, step - 1]
        return (pad(positions, self.row.decode_length), DecodePattern(self.cache, step - 1),
                slice(0, positions.shape[1]))

    def _last_tokens(self) -> Tensor:
        """Tokens drawn in the step before, [b, K, N]."""
        if self.link is None:
            return self.steps[-1][0]
        return self.link.receive((len(self.gold.tokens_BT), self.row.size, self.layout.num_samples), torch.int64)

    def _draws(self, rows: Tensor | slice, step: int) -> Draws:
        """The draws of a step: from one distribution per block in step 0, afterwards from one per rollout."""
        config, numbers_BKN = self.config, self.numbers_BKNG[..., step]
        numbers_BPM = numbers_BKN if step == 0 else numbers_BKN.flatten(1)[..., None]
        return Draws(rows, numbers_BPM, config.temperature, config.top_p, config.top_k)

    def _numbers(self) -> Tensor:
        """The random numbers of all draws, float64 [b, K, N, G]."""
        samples, device = self.layout.num_samples, self.blocks.device
        sample_N = torch.arange(samples, device=device) + sample_rank() * samples
        return uniform(self.config.seed, self.iteration, self.gold.index_B[:, None, None, None],
                       self.blocks[:, None, None], sample_N[:, None],
                       torch.arange(self.layout.rollout_length, device=device))

    def _by_sample(self, drawn: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, log-probabilities and entropies, [b, K, N]."""
        shape = (len(self.gold.tokens_BT), self.row.size, self.layout.num_samples)
        tokens, log_probs, entropy = (x.reshape(*shape[:2], -1) for x in drawn)
        return tokens, log_probs, entropy.expand(shape)

    def drawn(self) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, log-probabilities and entropies of all steps, [b, K, N, G] each; on stages other than the last, empty
        tensors to receive into."""
        if self.steps:
            return tuple(torch.stack(x, dim=-1) for x in zip(*self.steps))
        shape = (len(self.gold.tokens_BT), self.row.size, self.layout.num_samples, self.layout.rollout_length)
        device = self.gold.tokens_BT.device
        return tuple(torch.empty(shape, dtype=dtype, device=device)
                     for dtype in (torch.int64, torch.float32, torch.float32))
