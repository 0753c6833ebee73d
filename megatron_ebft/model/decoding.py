"""Cached decoding: the patterns of a pass over gold rows and of the decoding steps after it, and the keys and values
that they keep.

1. Without gradient and with FlexAttention, the keys and values of a layer are one buffer, [gold | own tokens of every
   rollout], written step by step.
2. Otherwise gold tokens and rollouts have separate tensors, and those of rollouts grow by a step in a way that autograd
   knows (`prefix_attention.append`: in place, past what earlier steps see), so that all steps may be differentiated
   together (`sampler.sample_and_score`). Each step may then have other rollouts: the nodes of a tree (layout/tree.py).

Suffixes: B rows, S row length, T gold tokens, K blocks, N samples, H query heads, J key heads, D head dimension.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_ebft.layout.packed_row import RowLayout
from megatron_ebft.layout.visible_keys import VisibleKeys
from megatron_ebft.model import flex_attention, prefix_attention
from megatron_ebft.model.attention import CausalPattern
from megatron_ebft.model.flex_attention import TILE, TileMask, tile_mask
from megatron_ebft.model.prefix_attention import Prefixes, pack_heads, prefixes, unpack_heads


@dataclass
class RolloutCache:
    """Keys and values of one group of rows during sampling, by layer number.

    Those of gold tokens are computed once, and all blocks and samples share them.
    """

    row: RowLayout
    """G − 1 steps: no query sees the key of the last one."""
    visible: VisibleKeys
    """What the first decoded tokens of this row see (`visible_keys.decoding`)."""
    document_BT: Tensor | None = None
    gold: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Keys and values of gold tokens, [B, J, T, D]."""
    own: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Keys and values of the rollouts' tokens, [B, J, U, t, D] after t steps."""
    buffers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """In place of the two: [B, J, T + U·steps, D], padded to whole tiles; zero where not yet written."""
    _tiles: TileMask | None = None
    _prefixes: Prefixes | TileMask | None = None

    def move_to(self, row: RowLayout, visible: VisibleKeys) -> None:
        """Go on with other rollouts."""
        self.row, self.visible, self._prefixes = row, visible, None

    def tile_mask(self, step: int, heads_per_group: int) -> TileMask:
        """FlexAttention's mask of one step over buffers. All steps use the same lists of tiles, which the first call
        makes."""
        def visible(step):
            return self.visible.at_step(step).repeat(heads_per_group)

        if self._tiles is None:
            self._tiles = tile_mask(visible(0), widest=visible(self.row.steps - 1))
        return self._tiles.with_intervals(visible(step))

    def prefixes(self, heads_per_group: int, dtype: torch.dtype, flex: bool) -> Prefixes | TileMask:
        """What the rollouts of this row see of the gold tokens, in every step."""
        if self._prefixes is None:  # of no padding: a backward pass visits every query tile that is listed
            visible = self.visible.queries(slice(0, self.row.num_rollouts))
            self._prefixes = tile_mask(visible.gold_alone(self.row.layout.seq_length).repeat(heads_per_group)) \
                if flex else prefixes(self.row, visible, 1, heads_per_group, dtype)
        return self._prefixes

    def split(self, buffer: Tensor) -> tuple[Tensor, Tensor]:
        """Views of a buffer: gold tokens [B, J, T, D] and rollout tokens [B, J, U, steps, D]."""
        gold, end = self.row.layout.seq_length, self.row.end
        return buffer[:, :, :gold], buffer[:, :, gold:end].unflatten(2, (-1, self.row.steps))


@dataclass
class PrefillPattern:
    """Causal attention over gold rows, which also keeps their keys and values in the cache."""

    cache: RolloutCache

    def __post_init__(self):
        self._causal = CausalPattern(self.cache.document_BT)

    def attend(self, layer_number: int, q_BHSD, k_BJSD, v_BJSD, scale, flex: bool) -> Tensor:
        if flex and not torch.is_grad_enabled():
            own = self.cache.row.num_rollout_tokens + -self.cache.row.end % TILE
            self.cache.buffers[layer_number] = tuple(
                torch.cat([x, x.new_zeros((*x.shape[:2], own, x.shape[3]))], 2).contiguous() for x in (k_BJSD, v_BJSD))
        else:
            self.cache.gold[layer_number] = k_BJSD, v_BJSD
        return self._causal.attend(layer_number, q_BHSD, k_BJSD, v_BJSD, scale, flex)


@dataclass
class DecodePattern:
    """One decoding step: the queries are tokens `step` of all rollouts, [B, U], and padding."""

    cache: RolloutCache
    step: int
    parent_BW: Tensor | None = None
    """Which rollouts of the step before these W continue, int64; None: the same."""
    _mask: TileMask | None = None
    """Made by the first layer, used by all."""

    def attend(self, layer_number: int, q_BHSD, k_BJSD, v_BJSD, scale, flex: bool) -> Tensor:
        count, length = self.cache.row.num_rollouts, q_BHSD.shape[2]
        new = k_BJSD[:, :, :count], v_BJSD[:, :, :count]  # without padding
        if layer_number in self.cache.buffers:
            return self._attend_buffer(layer_number, q_BHSD, *new, scale)
        cache, groups = self.cache, k_BJSD.shape[1]
        before = cache.own.get(layer_number, (None, None))
        cache.own[layer_number] = tuple(prefix_attention.append(*x, cache.row.steps, self.parent_BW)
                                        for x in zip(before, new))
        seen = cache.prefixes(q_BHSD.shape[1] // groups, q_BHSD.dtype, flex)
        attend = prefix_attention.attend_flex if flex else prefix_attention.attend
        out = attend(q_BHSD[:, :, :count], cache.gold[layer_number], cache.own[layer_number], seen, scale)
        return torch.nn.functional.pad(out, (0, 0, 0, length - count)) if length > count else out

    def _attend_buffer(self, layer_number: int, q_BHSD, k_BJUD, v_BJUD, scale) -> Tensor:
        assert self.parent_BW is None, "a buffer has the rollouts of the whole row"
        cache, heads, groups = self.cache, q_BHSD.shape[1], k_BJUD.shape[1]
        keys, values = cache.buffers[layer_number]
        cache.split(keys)[1][:, :, :, self.step] = k_BJUD
        cache.split(values)[1][:, :, :, self.step] = v_BJUD
        if self._mask is None:
            self._mask = cache.tile_mask(self.step, heads // groups)
        packed = flex_attention.attend(pack_heads(q_BHSD, groups), keys, values, self._mask, scale)
        return unpack_heads(packed, heads)
