"""Attention for strided blocks: the core attention of every layer, and the patterns it can follow.

1. A forward pass chooses a pattern (causal, strided row, cached decoding) and passes it to the model in the
   `attention_mask` argument, which Megatron-Core hands to the core attention untouched. `as_mask` wraps the pattern in
   a tensor, because activation recomputation stores its arguments as tensors. The model adds the rotary angles of the
   pass (decoder.py), and every core attention rotates q and k itself.
2. `VisibleKeys` (visible_keys.py) says what each query sees. On GPUs FlexAttention computes a packed row in one call
   (flex_attention.py). Plain causal rows go to torch's SDPA, whose fused kernel needs no mask.
3. Without FlexAttention, or with --ebft-attention sdpa, rollout tokens attend to the gold prefix of their block and to
   their own rollout apart, and the two parts are merged (prefix_attention.py).
4. The patterns of decoding are in decoding.py.

Suffixes: B rows, S row length, T gold tokens, H query heads, J key heads, D head dimension, Q queries, C keys.
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
from megatron_ebft.model import flex_attention, prefix_attention
from megatron_ebft.model.flex_attention import TileMask, tile_mask
from megatron_ebft.model.prefix_attention import Prefixes, additive, pack_heads, prefixes, unpack_heads
from megatron_ebft.model.rotary import Angles, rotate


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


def _starts(document_BT: Tensor | None) -> Tensor | None:
    return None if document_BT is None else document_starts(document_BT)


def _masked(q_BHQD, k_BJCD, v_BJCD, mask_BQC: Tensor, scale) -> Tensor:
    """torch's SDPA of packed heads; the mask has one row for each row of `pack_heads`."""
    q_BJQD = pack_heads(q_BHQD, k_BJCD.shape[1])
    out = scaled_dot_product_attention(q_BJQD, k_BJCD, v_BJCD, attn_mask=mask_BQC[:, None], scale=scale)
    return unpack_heads(out, q_BHQD.shape[1])


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
            self._mask = tile_mask(visible) if flex else additive(visible.repeat(heads_per_group).sees(keys),
                                                                   q_BHSD.dtype)
        if flex:
            return flex_attention.attend(q_BHSD, k_BJSD, v_BJSD, self._mask, scale)
        return _masked(q_BHSD, k_BJSD, v_BJSD, self._mask, scale)


@dataclass
class StridedPattern:
    """A packed row: gold tokens are causal, rollouts see the gold prefix of their block and themselves."""

    row: RowLayout
    document_BT: Tensor | None = None
    _gold: CausalPattern = field(init=False)
    _mask: TileMask | Prefixes | None = None
    """Made by the first layer, used by all."""

    def __post_init__(self):
        self._gold = CausalPattern(self.document_BT)

    def attend(self, layer_number: int, q_BHSD, k_BJSD, v_BJSD, scale, flex: bool) -> Tensor:
        row, gold = self.row, self.row.layout.seq_length
        if self._mask is None:
            visible = visible_keys.strided(row, _starts(self.document_BT), len(q_BHSD))
            self._mask = tile_mask(visible) if flex else prefixes(
                row, visible.queries(slice(gold, None)), row.steps, q_BHSD.shape[1] // k_BJSD.shape[1], q_BHSD.dtype)
        if flex:
            return flex_attention.attend(q_BHSD, k_BJSD, v_BJSD, self._mask, scale)
        gold_k, gold_v = k_BJSD[:, :, :gold], v_BJSD[:, :, :gold]
        out = [self._gold.attend(layer_number, q_BHSD[:, :, :gold], gold_k, gold_v, scale, flex)]
        if row.num_rollout_tokens:
            own = slice(gold, row.end)
            of_rollouts = tuple(x[:, :, own].unflatten(2, (-1, row.steps)) for x in (k_BJSD, v_BJSD))
            out.append(prefix_attention.attend(q_BHSD[:, :, own], (gold_k, gold_v), of_rollouts, self._mask, scale))
        out.append(torch.zeros_like(q_BHSD[:, :, row.end :]))
        return torch.cat(out, dim=2)
