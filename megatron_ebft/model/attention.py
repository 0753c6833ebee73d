"""Attention for strided blocks: the core attention of every layer, and the patterns it can follow.

1. A forward pass chooses a pattern (causal, strided row, cached decoding) and passes it to the model in the
   `attention_mask` argument, which Megatron-Core hands to the core attention untouched. `as_mask` wraps the pattern in
   a tensor, because activation recomputation stores its arguments as tensors. The model adds the rotary angles of the
   pass (decoder.py), and every core attention rotates q and k itself.
2. `VisibleKeys` (visible_keys.py) says what each query sees. On GPUs FlexAttention computes a packed row in one call
   (flex_attention.py). Plain causal rows go to torch's SDPA, whose fused kernel needs no mask.
3. Without FlexAttention, or with --ebft-attention sdpa, rollout queries are taken a few blocks at a time. Such a chunk
   attends to gold[0 : last anchor of the chunk] and to its own rollout tokens, with one additive mask for both, so that
   little is computed and then masked.
4. In decoding, and always in chunks, the query heads that share a key head become more query rows of that head. So keys
   are never expanded, and the tiles of a GPU stay full.
5. In sampling, the keys and values of a layer are one buffer, [gold | own tokens of every rollout], written step by
   step.

Suffixes: B rows, S row length, T gold tokens, R rollout tokens, H query heads, J key heads, D head dimension,
Q queries of a chunk, C keys of a chunk.
"""

import math
from dataclasses import dataclass, field

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_ebft.layout import visible_keys
from megatron_ebft.layout.packed_row import RowLayout
from megatron_ebft.layout.strided import document_starts
from megatron_ebft.layout.visible_keys import VisibleKeys
from megatron_ebft.model import flex_attention
from megatron_ebft.model.flex_attention import TILE, TileMask, tile_mask
from megatron_ebft.model.rotary import Angles, rotate

CHUNK_ROWS = 128
"""Approximate number of rollout tokens in a chunk. Smaller chunks need more kernel launches; larger ones compute more
pairs that the mask hides."""


class StridedAttention(MegatronModule):
    """Core attention that follows the pattern in its `attention_mask` (see `as_mask`).

    query [S, B, H, D], key and value [S, B, J, D], before rotary embedding → [S, B, H·D].
    `config.attention_kernel` is `flex` or `sdpa` (kernels.py).

    Raises:
        ValueError: attention dropout (a rollout must see the same network in sampling and in training), or context
            parallelism.
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
        if attention_mask.angles is not None:
            query, key = rotate(query, key, attention_mask.angles)
        q_BHSD, k_BJSD, v_BJSD = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out_BHSD = attention_mask.pattern.attend(self.layer_number, q_BHSD, k_BJSD, v_BJSD, self.scale,
                                                 self.config.attention_kernel == "flex")
        return out_BHSD.permute(2, 0, 1, 3).flatten(2)


class _PatternMask(torch.Tensor):
    """An empty tensor that carries a pattern and rotary angles through Megatron's activation recomputation."""

    def detach(self):
        return self


def as_mask(pattern, angles: Angles | None = None) -> Tensor:
    """The `attention_mask` argument that makes every StridedAttention follow `pattern`.

    Args:
        angles: rotary angles of the pass. The model adds them; its callers do not.
    """
    mask = torch.Tensor._make_subclass(_PatternMask, torch.empty(0, dtype=torch.bool))  # floats are cast under bf16
    mask.pattern, mask.angles = pattern, angles
    return mask


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask for torch's SDPA: 0 where visible, −inf elsewhere."""
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, -torch.inf)


def _starts(document_BT: Tensor | None) -> Tensor | None:
    return None if document_BT is None else document_starts(document_BT)


def _pack_heads(q_BHQD: Tensor, key_heads: int) -> Tensor:
    """Queries as rows of their key heads, the H/J heads of one query next to each other: [B, J, Q·H/J, D]."""
    return q_BHQD.unflatten(1, (key_heads, -1)).transpose(2, 3).flatten(2, 3)


def _unpack_heads(out_BJQD: Tensor, heads: int) -> Tensor:
    """The inverse of `_pack_heads`: [B, H, Q, D]."""
    return out_BJQD.unflatten(2, (-1, heads // out_BJQD.shape[1])).transpose(2, 3).flatten(1, 2)


def _masked(q_BHQD, k_BJCD, v_BJCD, mask_BQC: Tensor, scale) -> Tensor:
    """torch's SDPA of packed heads; the mask has one row for each row of `_pack_heads`."""
    q_BJQD = _pack_heads(q_BHQD, k_BJCD.shape[1])
    out = scaled_dot_product_attention(q_BJQD, k_BJCD, v_BJCD, attn_mask=mask_BQC[:, None], scale=scale)
    return _unpack_heads(out, q_BHQD.shape[1])


@dataclass
class CausalPattern:
    """Plain causal attention, within documents when `document_BT` is given."""

    document_BT: Tensor | None = None
    _mask: TileMask | Tensor | None = None
    """Made by the first layer, used by all."""

    def attend(self, layer_number: int, q_BHSD, k_BJSD, v_BJSD, scale, flex: bool) -> Tensor:
        heads_per_group = q_BHSD.shape[1] // k_BJSD.shape[1]
        if self.document_BT is None:
            return scaled_dot_product_attention(q_BHSD, k_BJSD, v_BJSD, is_causal=True, scale=scale,
                                                enable_gqa=heads_per_group != 1)
        if self._mask is None:
            visible = visible_keys.causal(*self.document_BT.shape, _starts(self.document_BT))
            keys = torch.arange(visible.num_keys, device=q_BHSD.device)
            self._mask = tile_mask(visible) if flex else _additive(visible.repeat(heads_per_group).sees(keys),
                                                                   q_BHSD.dtype)
        if flex:
            return flex_attention.attend(q_BHSD, k_BJSD, v_BJSD, self._mask, scale)
        return _masked(q_BHSD, k_BJSD, v_BJSD, self._mask, scale)


@dataclass
class _Chunk:
    """Blocks whose attention is computed together."""

    queries: slice
    """Of the rollout queries."""
    keys: slice
    """Of the rollout keys."""
    gold: int
    """Gold keys [0, gold)."""
    mask_BQC: Tensor
    """Additive; C is gold keys, then rollout keys."""


def _chunks(row: RowLayout, visible: VisibleKeys, query_steps: int, heads_per_group: int, like: Tensor) -> list[_Chunk]:
    """Chunks of the rollout queries in `visible`, `query_steps` of each rollout, against all keys of the row."""
    if row.steps == 0:  # with rollouts of one token, a training row is gold alone
        return []
    blocks_per_chunk = max(1, CHUNK_ROWS // (row.layout.num_samples * row.steps))
    chunks, own = [], torch.arange(row.layout.seq_length, visible.num_keys, device=like.device)
    for chunk in row.chunks(blocks_per_chunk):
        queries, keys = chunk.tokens(query_steps), chunk.tokens(row.steps)
        key_numbers = torch.cat([torch.arange(chunk.gold, device=like.device), own[keys]])
        is_visible = visible.queries(queries).repeat(heads_per_group).sees(key_numbers)
        chunks.append(_Chunk(queries, keys, chunk.gold, _additive(is_visible, like.dtype)))
    return chunks


def _attend_chunks(chunks, q_BHRD, gold_k, gold_v, own_k, own_v, scale) -> list[Tensor]:
    """Rollout attention, chunk by chunk: outputs [B, H, queries of a chunk, D], then zeros for padding."""
    outputs = []
    for chunk in chunks:
        k_BJCD = torch.cat([gold_k[:, :, : chunk.gold], own_k[:, :, chunk.keys]], 2)
        v_BJCD = torch.cat([gold_v[:, :, : chunk.gold], own_v[:, :, chunk.keys]], 2)
        outputs.append(_masked(q_BHRD[:, :, chunk.queries], k_BJCD, v_BJCD, chunk.mask_BQC, scale))
    done = chunks[-1].queries.stop if chunks else 0
    if done < q_BHRD.shape[2]:
        outputs.append(torch.zeros_like(q_BHRD[:, :, done:]))
    return outputs


@dataclass
class StridedPattern:
    """A packed row: gold tokens are causal, rollouts see the gold prefix of their block and themselves."""

    row: RowLayout
    document_BT: Tensor | None = None
    _gold: CausalPattern = field(init=False)
    _mask: TileMask | list[_Chunk] | None = None
    """Made by the first layer, used by all."""

    def __post_init__(self):
        self._gold = CausalPattern(self.document_BT)

    def attend(self, layer_number: int, q_BHSD, k_BJSD, v_BJSD, scale, flex: bool) -> Tensor:
        gold = self.row.layout.seq_length
        if self._mask is None:
            visible = visible_keys.strided(self.row, _starts(self.document_BT), len(q_BHSD))
            self._mask = tile_mask(visible) if flex else _chunks(
                self.row, visible.queries(slice(gold, None)), self.row.steps, q_BHSD.shape[1] // k_BJSD.shape[1],
                q_BHSD)
        if flex:
            return flex_attention.attend(q_BHSD, k_BJSD, v_BJSD, self._mask, scale)
        (gold_q, rollout_q), (gold_k, own_k), (gold_v, own_v) = (
            (x[:, :, :gold], x[:, :, gold:]) for x in (q_BHSD, k_BJSD, v_BJSD))
        out = [self._gold.attend(layer_number, gold_q, gold_k, gold_v, scale, flex)]
        out += _attend_chunks(self._mask, rollout_q, gold_k, gold_v, own_k, own_v, scale)
        return torch.cat(out, dim=2)


@dataclass
class RolloutCache:
    """Keys and values of one group of rows during sampling, by layer number.

    Those of gold tokens are computed once, and all blocks and samples share them. Those of rollout tokens are written
    step by step.
    """

    row: RowLayout
    """All blocks, and G − 1 steps: no query sees the key of the last one."""
    visible: VisibleKeys
    """What the first decoded tokens see (`visible_keys.decoding`)."""
    document_BT: Tensor | None = None
    keys: dict[int, Tensor] = field(default_factory=dict)
    """[B, J, T + K·N·steps, D], for FlexAttention padded to whole tiles; zero where not yet written."""
    values: dict[int, Tensor] = field(default_factory=dict)
    _tiles: TileMask | None = None

    def tile_mask(self, step: int, heads_per_group: int) -> TileMask:
        """FlexAttention's mask of one step. All steps use the same lists of tiles, which the first call makes."""
        def visible(step):
            return self.visible.at_step(step).repeat(heads_per_group)

        if self._tiles is None:
            self._tiles = tile_mask(visible(0), widest=visible(self.row.steps - 1))
        return self._tiles.with_intervals(visible(step))

    def split(self, buffer: Tensor) -> tuple[Tensor, Tensor]:
        """Views of a layer's keys (or values): gold tokens' [B, J, T, D] and rollout tokens' [B, J, K·N, steps, D]."""
        gold, end = self.row.layout.seq_length, self.row.end
        return buffer[:, :, :gold], buffer[:, :, gold:end].unflatten(2, (-1, self.row.steps))


@dataclass
class PrefillPattern:
    """Causal attention over gold rows, which also writes their keys and values into the cache."""

    cache: RolloutCache

    def __post_init__(self):
        self._causal = CausalPattern(self.cache.document_BT)

    def attend(self, layer_number: int, q_BHSD, k_BJSD, v_BJSD, scale, flex: bool) -> Tensor:
        row = self.cache.row
        own = row.num_rollout_tokens + (-row.end % TILE if flex else 0)
        for kept, new in ((self.cache.keys, k_BJSD), (self.cache.values, v_BJSD)):
            kept[layer_number] = torch.cat([new, new.new_zeros((*new.shape[:2], own, new.shape[3]))], 2).contiguous()
        return self._causal.attend(layer_number, q_BHSD, k_BJSD, v_BJSD, scale, flex)


@dataclass
class DecodePattern:
    """One decoding step: the queries are tokens `step` of all rollouts, [B, K·N], and padding."""

    cache: RolloutCache
    step: int
    _mask: TileMask | list[_Chunk] | None = None
    """Made by the first layer, used by all."""

    def attend(self, layer_number: int, q_BHSD, k_BJSD, v_BJSD, scale, flex: bool) -> Tensor:
        cache, heads, groups = self.cache, q_BHSD.shape[1], k_BJSD.shape[1]
        keys, values = cache.keys[layer_number], cache.values[layer_number]
        (gold_k, own_k), (gold_v, own_v) = cache.split(keys), cache.split(values)
        own_k[:, :, :, self.step] = k_BJSD[:, :, : own_k.shape[2]]  # without padding
        own_v[:, :, :, self.step] = v_BJSD[:, :, : own_v.shape[2]]
        if self._mask is None:
            self._mask = cache.tile_mask(self.step, heads // groups) if flex else _chunks(
                cache.row, cache.visible.at_step(self.step), 1, heads // groups, q_BHSD)
        if flex:
            packed = flex_attention.attend(_pack_heads(q_BHSD, groups), keys, values, self._mask, scale)
            return _unpack_heads(packed, heads)
        return torch.cat(_attend_chunks(self._mask, q_BHSD, gold_k, gold_v, own_k.flatten(2, 3), own_v.flatten(2, 3),
                                        scale), dim=2)
