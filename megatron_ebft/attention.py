"""Attention for strided blocks: the core attention of every layer, and the patterns it can follow.

1. A forward pass chooses a pattern (causal, strided row, cached decoding) and hands it to the model in the
   `attention_mask` argument, which Megatron-Core passes to the core attention untouched. `as_mask` wraps the
   pattern in a tensor, because activation recomputation stores its arguments as tensors.
2. Rollout queries are taken a few blocks at a time. Such a chunk attends to gold[0 : last anchor of the chunk] and
   to its own rollout tokens, with one additive mask for both: little is computed that the mask throws away.
3. The query heads that share a key head are laid out as further rows of it, so keys are never expanded.
4. Decoding writes each step's keys and values to a cache and runs the same chunks with one query per rollout.

Suffixes: B rows, S row length, T gold tokens, R rollout tokens, H query heads, J key heads, D head dimension,
Q queries of a chunk, C keys of a chunk.
"""

import math
from dataclasses import dataclass, field

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_ebft.layout import RowLayout, document_starts

CHUNK_ROWS = 128
"""Rollout tokens of a chunk in training, roughly: fewer waste launches, more waste keys of other blocks."""


class StridedAttention(MegatronModule):
    """Core attention that follows the pattern in its `attention_mask` (see `as_mask`).

    query [S, B, H, D], key and value [S, B, J, D] (rotary embedding applied) → [S, B, H·D]. Attention dropout is
    refused: a rollout must see the same network in sampling and in training.
    """

    def __init__(self, config, layer_number, attn_mask_type, attention_type, cp_comm_type=None, softmax_scale=None,
                 pg_collection=None):
        super().__init__(config=config)
        if config.attention_dropout != 0:
            raise ValueError(f"--attention-dropout {config.attention_dropout}: must be 0")
        if config.context_parallel_size != 1:
            raise ValueError(f"--context-parallel-size {config.context_parallel_size}: not supported, use 1")
        self.layer_number = layer_number
        self.scale = 1 / math.sqrt(config.kv_channels) if softmax_scale is None else softmax_scale

    def forward(self, query, key, value, attention_mask, /, *, attn_mask_type=None, attention_bias=None,
                packed_seq_params=None) -> Tensor:
        assert attention_bias is None and packed_seq_params is None
        q_BHSD, k_BJSD, v_BJSD = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out_BHSD = attention_mask.pattern.attend(self.layer_number, q_BHSD, k_BJSD, v_BJSD, self.scale)
        return out_BHSD.permute(2, 0, 1, 3).flatten(2)


class _PatternMask(torch.Tensor):
    """An empty tensor that carries a pattern through Megatron's activation recomputation."""

    def detach(self):
        return self


def as_mask(pattern) -> Tensor:
    """The `attention_mask` argument that makes every StridedAttention follow `pattern`."""
    mask = torch.Tensor._make_subclass(_PatternMask, torch.empty(0, dtype=torch.bool))  # floats are cast under bf16
    mask.pattern = pattern
    return mask


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where visible, −inf elsewhere."""
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, -torch.inf)


def _causal(q_BHTD, k_BJTD, v_BJTD, mask, scale) -> Tensor:
    if mask is not None:  # as rows of their key head: masks and expanded key heads do not go together in fused kernels
        heads_per_group = q_BHTD.shape[1] // k_BJTD.shape[1]
        q = q_BHTD.unflatten(1, (-1, heads_per_group)).flatten(2, 3)
        mask = mask.repeat(1, 1, heads_per_group, 1)
        out = scaled_dot_product_attention(q, k_BJTD, v_BJTD, attn_mask=mask, scale=scale)
        return out.unflatten(2, (heads_per_group, -1)).flatten(1, 2)
    return scaled_dot_product_attention(q_BHTD, k_BJTD, v_BJTD, is_causal=True, scale=scale,
                                        enable_gqa=q_BHTD.shape[1] != k_BJTD.shape[1])


@dataclass
class CausalPattern:
    """Plain causal attention, within documents when `document_BT` is given."""

    document_BT: Tensor | None = None
    _mask: Tensor | None = None

    def mask(self, like: Tensor) -> Tensor | None:
        """Additive mask [B, 1, T, T], or None when plain causal attention says it all."""
        if self.document_BT is None:
            return None
        if self._mask is None:
            same = self.document_BT[:, None, :, None] == self.document_BT[:, None, None, :]
            self._mask = _additive(same.tril(), like.dtype)
        return self._mask

    def attend(self, layer_number: int, q_BHSD, k_BJSD, v_BJSD, scale) -> Tensor:
        return _causal(q_BHSD, k_BJSD, v_BJSD, self.mask(q_BHSD), scale)


@dataclass
class _Chunk:
    """Blocks that attend together: slices of rollout queries and rollout keys, gold keys [0, gold), and the mask."""

    queries: slice
    keys: slice
    gold: int
    mask_B1QC: Tensor


def _chunks(row: RowLayout, query_steps: range, starts_BT: Tensor | None, heads_per_group: int,
            like: Tensor) -> list[_Chunk]:
    """Chunks for rollout queries of `query_steps` against cached or in-row keys of all `row.steps` steps."""
    if row.steps == 0:  # rollouts of one token: a training row is gold alone
        return []
    blocks_per_chunk = max(1, CHUNK_ROWS // (row.layout.num_samples * row.steps))
    chunks = []
    for chunk in row.chunks(blocks_per_chunk):
        mask = _additive(chunk.visible(query_steps, starts_BT, like.device), like.dtype)
        chunks.append(_Chunk(chunk.tokens(len(query_steps)), chunk.tokens(row.steps), chunk.gold,
                             mask.repeat(1, heads_per_group, 1)[:, None]))
    return chunks


def _attend_chunks(chunks, q_BHRD, gold_k, gold_v, own_k, own_v, scale) -> list[Tensor]:
    """Rollout attention, chunk by chunk: each output [B, H, queries of the chunk, D]."""
    batch, heads, _, dim = q_BHRD.shape
    outputs = []
    for chunk in chunks:
        q_BJQD = q_BHRD[:, :, chunk.queries].reshape(batch, gold_k.shape[1], -1, dim)
        k_BJCD = torch.cat([gold_k[:, :, : chunk.gold], own_k[:, :, chunk.keys]], 2)
        v_BJCD = torch.cat([gold_v[:, :, : chunk.gold], own_v[:, :, chunk.keys]], 2)
        out = scaled_dot_product_attention(q_BJQD, k_BJCD, v_BJCD, attn_mask=chunk.mask_B1QC, scale=scale)
        outputs.append(out.reshape(batch, heads, -1, dim))
    done = chunks[-1].queries.stop if chunks else 0
    if done < q_BHRD.shape[2]:  # padding
        outputs.append(torch.zeros_like(q_BHRD[:, :, done:]))
    return outputs


@dataclass
class StridedPattern:
    """A packed row: causal gold tokens, and rollouts that see their block's gold prefix and themselves."""

    row: RowLayout
    document_BT: Tensor | None = None
    _gold: CausalPattern = field(init=False)
    _chunk_cache: list[_Chunk] | None = None

    def __post_init__(self):
        self._gold = CausalPattern(self.document_BT)

    def attend(self, layer_number: int, q_BHSD, k_BJSD, v_BJSD, scale) -> Tensor:
        gold = self.row.layout.seq_length
        if self._chunk_cache is None:
            starts = None if self.document_BT is None else document_starts(self.document_BT)
            self._chunk_cache = _chunks(self.row, range(self.row.steps), starts, q_BHSD.shape[1] // k_BJSD.shape[1],
                                        q_BHSD)
        gold_q, rollout_q = q_BHSD[:, :, :gold], q_BHSD[:, :, gold:]
        gold_k, own_k = k_BJSD[:, :, :gold], k_BJSD[:, :, gold:]
        gold_v, own_v = v_BJSD[:, :, :gold], v_BJSD[:, :, gold:]
        out = [_causal(gold_q, gold_k, gold_v, self._gold.mask(q_BHSD), scale)]
        out += _attend_chunks(self._chunk_cache, rollout_q, gold_k, gold_v, own_k, own_v, scale)
        return torch.cat(out, dim=2)


@dataclass
class RolloutCache:
    """Keys and values of one group of rows during sampling, by layer number.

    Gold ones are computed once and shared by all blocks and samples; a rollout's own ones are written step by step.
    """

    row: RowLayout
    """All blocks, with the G − 1 steps whose keys are ever looked at."""
    document_BT: Tensor | None = None
    gold: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """[B, J, T, D] keys and values."""
    own: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """[B, J, K·N, steps, D] keys and values, zero where not yet written."""


@dataclass
class PrefillPattern:
    """Causal attention over the gold rows that leaves their keys and values in the cache."""

    cache: RolloutCache

    def __post_init__(self):
        self._causal = CausalPattern(self.cache.document_BT)

    def attend(self, layer_number: int, q_BHSD, k_BJSD, v_BJSD, scale) -> Tensor:
        row = self.cache.row
        batch, groups, _, dim = k_BJSD.shape
        self.cache.gold[layer_number] = (k_BJSD.contiguous(), v_BJSD.contiguous())
        shape = (batch, groups, row.size * row.layout.num_samples, row.steps, dim)
        self.cache.own[layer_number] = (k_BJSD.new_zeros(shape), v_BJSD.new_zeros(shape))
        return self._causal.attend(layer_number, q_BHSD, k_BJSD, v_BJSD, scale)


@dataclass
class DecodePattern:
    """One decoding step: the queries are step `step` of every rollout, [B, K·N] of them."""

    cache: RolloutCache
    step: int
    _chunk_cache: list[_Chunk] | None = None

    def attend(self, layer_number: int, q_BHSD, k_BJSD, v_BJSD, scale) -> Tensor:
        cache = self.cache
        if self._chunk_cache is None:
            starts = None if cache.document_BT is None else document_starts(cache.document_BT)
            self._chunk_cache = _chunks(cache.row, range(self.step, self.step + 1), starts,
                                        q_BHSD.shape[1] // k_BJSD.shape[1], q_BHSD)
        own_k, own_v = cache.own[layer_number]
        own_k[:, :, :, self.step] = k_BJSD[:, :, : own_k.shape[2]]  # without padding
        own_v[:, :, :, self.step] = v_BJSD[:, :, : own_v.shape[2]]
        gold_k, gold_v = cache.gold[layer_number]
        return torch.cat(_attend_chunks(self._chunk_cache, q_BHSD, gold_k, gold_v, own_k.flatten(2, 3),
                                        own_v.flatten(2, 3), scale), dim=2)
