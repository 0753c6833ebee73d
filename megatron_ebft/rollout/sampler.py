"""Block-parallel sampling: all blocks and samples of a group of rows decode together, in G steps.

The gold rows pass through the policy once. Their keys and values, and the logits before each anchor, serve all n
samples. Then follow G − 1 cached steps with one token per rollout, or, in a fused step, with one for all rollouts that
have drawn the same so far (layout/tree.py). With pipeline stages, several groups of rows are in flight at once
(schedule.py).
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ebft.common.device import upload, work_clock
from megatron_ebft.data.micro_batches import GoldBatch
from megatron_ebft.layout import visible_keys
from megatron_ebft.layout.packed_row import RowLayout, split_blocks
from megatron_ebft.layout.strided import StridedLayout, document_starts, pad
from megatron_ebft.layout.tree import Nodes, RolloutTree
from megatron_ebft.model.attention import as_mask
from megatron_ebft.model.decoding import DecodePattern, PrefillPattern, RolloutCache
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
from megatron_ebft.rollout.scored_draws import ScoredDraws
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
    row = split_blocks(layout, 0, layout.rollout_length - 1)[0]
    groups = [_Group(policy, gold.rows(part), row, config, iteration, link) for part in rows]
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


@dataclass
class ScoredRollouts:
    """Rollouts with their log-probabilities and those of gold tokens, by one forward pass with gradient."""

    rollouts: Rollouts
    log_probs_BKNG: Tensor
    """float32, of the rollout tokens at the sampling temperature; differentiable."""
    gold_BT: Tensor
    """float32 [B, T−1]: of gold tokens 1..T−1 at temperature 1; differentiable."""
    tokens_per_row: int
    """Tokens, and padding, of each row that went through the policy."""


def sample_and_score(model, gold: GoldBatch, layout: StridedLayout, config: SamplingConfig, iteration: int,
                     blocks_BK: Tensor | None = None, share: bool = False) -> ScoredRollouts:
    """Sample rollouts and keep the autograd graph, so that no other forward pass is needed for their gradient.

    Draws the same tokens as `sample_rollouts`. All rows decode together. Needs a single pipeline stage.

    Args:
        model: the policy's only stage.
        blocks_BK: blocks whose rollouts are wanted, bool, on the host; those of others have arbitrary tokens after
            their first and log-probabilities without meaning. None: all.
        share: compute what rollouts of a block have in common once (layout/tree.py). Waits for the device before each
            step, until none have anything in common.
    """
    row, tree = split_blocks(layout, 0, layout.rollout_length - 1)[0], None
    needed_BKN = torch.ones(len(gold.tokens_BT), row.size, layout.num_samples, dtype=torch.bool)
    if blocks_BK is not None:
        needed_BKN &= blocks_BK[..., None]
        each_BKN = torch.arange(layout.num_samples).expand_as(needed_BKN)
        row = row.keep(needed_BKN, each_BKN, row.room(needed_BKN))
    if share and layout.num_samples > 1:
        assert torch.is_grad_enabled(), "buffers of a pass without gradient have no nodes"
        tree = RolloutTree(row, needed_BKN)
    group, decoded = _Group([model], gold, row, config, iteration, link=None, scored=True), 0
    for step in range(layout.rollout_length if row.num_rollouts else 1):
        if step:
            group.grow(tree, step)
            decoded += group.nodes.row.decode_length
        group.work(step, 0, group.receive(step, 0))
    tokens, log_probs, entropy = group.drawn()
    return ScoredRollouts(Rollouts(tokens, log_probs.detach(), entropy), log_probs, group.gold_log_probs,
                          layout.seq_length + decoded)


class _Group:
    """Rows that decode together: their cache on this stage and, on the last one, what was drawn."""

    def __init__(self, policy: list, gold: GoldBatch, row: RowLayout, config: SamplingConfig, iteration: int,
                 link: PipelineLink | None, scored: bool = False):
        self.policy, self.gold, self.row, self.layout, self.link = policy, gold, row, row.layout, link
        self.config, self.iteration, self.scored = config, iteration, scored
        self.starts_BT = starts_BT = None if gold.document_BT is None else document_starts(gold.document_BT)
        batch = len(gold.tokens_BT)
        # Everything that the host computes is computed here: but for `grow`, decoding launches work and never waits for
        # the device.
        self.blocks, self.predictors = upload(row.blocks), upload(row.anchor_predictors())
        positions = upload(row.positions(starts_BT, batch))
        self.gold_positions = positions[:, : self.layout.seq_length]
        self.positions_BUt = positions[:, self.layout.seq_length : row.end].unflatten(1, (row.num_rollouts, row.steps))
        self.pick_BU = None if row.kept is None else upload(row.kept.pick_BU)
        if is_last_stage():
            numbers_BKNG = self._numbers()
            self.first_numbers_BKN, self.numbers_BUG = numbers_BKNG[..., 0], row.of_rollouts(numbers_BKNG)
        self.visible = visible_keys.decoding(row, starts_BT, batch)
        self.cache: RolloutCache | None = None
        self.steps: list[tuple[Tensor, Tensor, Tensor]] = []
        self.gold_log_probs: Tensor | None = None
        self.nodes = Nodes(row)

    def grow(self, tree: RolloutTree | None, step: int) -> None:
        """Before a step: let it decode the tree's next nodes."""
        if tree is None:
            return
        tokens_BKN = None if tree.is_apart else self.row.of_slots(self._last_tokens(step)[..., None]).squeeze(-1)
        self.nodes = tree.grow(tokens_BKN)
        if self.nodes.row is not self.cache.row:
            visible = self.visible if self.nodes.shared is None else visible_keys.decoding(
                self.nodes.row, self.starts_BT, len(self.gold.tokens_BT))
            self.cache.move_to(self.nodes.row, visible)

    def receive(self, step: int, virtual: int) -> Tensor | None:
        """Input of a task: tokens [b, length] where the model begins, else hidden states [length (/tp), b, H]."""
        if is_first_stage() and virtual == 0:
            if step == 0:
                return self.gold.tokens_BT
            return pad(self._of_nodes(self._last_tokens(step)), self.nodes.row.decode_length)
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
                out = self._keep(step, *out)
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
        positions = self._of_nodes(self.positions_BUt[:, :, step - 1])
        return (pad(positions, self.nodes.row.decode_length),
                DecodePattern(self.cache, step - 1, self.nodes.parent_BW), slice(0, positions.shape[1]))

    def _of_nodes(self, values_BU: Tensor) -> Tensor:
        """Of each node, the value of its first rollout."""
        return values_BU if self.nodes.shared is None else values_BU.gather(1, self.nodes.shared.first_BW)

    def _last_tokens(self, step: int) -> Tensor:
        """Tokens of this row's rollouts drawn in the step before, [b, U]."""
        if self.link is not None:
            shape = (self.row.size, self.layout.num_samples) if step == 1 else (self.row.num_rollouts,)
            tokens = self.link.receive((len(self.gold.tokens_BT), *shape), torch.int64)
        else:
            tokens = self.steps[-1][0]
        if step > 1:
            return tokens
        return tokens.flatten(1) if self.pick_BU is None else tokens.flatten(1).gather(1, self.pick_BU)

    def _draws(self, rows: Tensor | slice, step: int) -> Draws | ScoredDraws:
        """The draws of a step: from one distribution per block in step 0, afterwards from one per rollout."""
        config, numbers_BPM = self.config, self.numbers_BUG[..., step, None] if step else self.first_numbers_BKN
        draws = Draws(rows, numbers_BPM, config.temperature, config.top_p, config.top_k)
        gold_BT = None if step else self.gold.tokens_BT
        return ScoredDraws(draws, gold_BT, self.nodes.shared) if self.scored else draws

    def _numbers(self) -> Tensor:
        """The random numbers of all draws, float64 [b, K, N, G]."""
        samples, device = self.layout.num_samples, self.blocks.device
        sample_N = torch.arange(samples, device=device) + sample_rank() * samples
        return uniform(self.config.seed, self.iteration, self.gold.index_B[:, None, None, None],
                       self.blocks[:, None, None], sample_N[:, None],
                       torch.arange(self.layout.rollout_length, device=device))

    def _keep(self, step: int, tokens_BPM, log_probs_BPM, entropy_BP, gold_log_probs=None) -> Tensor:
        """Keeps what a step has drawn; returns its tokens, [b, K, N] in step 0 and then [b, U]."""
        if step == 0:
            self.gold_log_probs = gold_log_probs
            drawn = tokens_BPM, log_probs_BPM, entropy_BP[..., None].expand(tokens_BPM.shape)
        else:
            drawn = tokens_BPM.squeeze(-1), log_probs_BPM.squeeze(-1), entropy_BP
        self.steps.append(drawn)
        return drawn[0]

    def drawn(self) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, log-probabilities and entropies of all steps, [b, K, N, G] each; on stages other than the last, empty
        tensors to receive into."""
        shape = (len(self.gold.tokens_BT), self.row.size, self.layout.num_samples, self.layout.rollout_length)
        if not self.steps:
            device = self.gold.tokens_BT.device
            return tuple(torch.empty(shape, dtype=dtype, device=device)
                         for dtype in (torch.int64, torch.float32, torch.float32))
        return tuple(self._join(values) for values in zip(*self.steps))

    def _join(self, values: tuple[Tensor, ...]) -> Tensor:
        """Values of all steps, [b, K, N, G], from `_keep`'s of each."""
        first_BKN, *later = values
        shape = (len(first_BKN), self.row.num_rollouts, self.row.steps)
        later_BUt = torch.stack(later, dim=-1) if later else first_BKN.new_zeros(shape)
        return self.row.join_steps(first_BKN, later_BUt)
