"""Block features in the frozen encoder (METHOD: "Features"), and from them one Gram matrix per block.

1. Hidden states are the residual stream after the feature layers, caught by forward hooks.
2. Only the tokens that are pooled are normalised: the last of each rollout and completion, or all G of them.
3. Rows go through the encoder in micro-batches, and long rows in parts; what is kept of each is (n+1)×(n+1) numbers a
   block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ebft import energy
from megatron_ebft.attention import StridedPattern, as_mask
from megatron_ebft.batch import MicroBatch, MicroBatches, run_schedule
from megatron_ebft.model import unwrap

FEATURE_NORMS = ("joint", "layer")
POOLINGS = ("last_token", "mean")


@dataclass
class FeatureMap:
    """φ: which hidden states make up a feature, and how."""

    layers: list[int]
    """Decoder layers, counted from 1."""
    norm: str
    """`joint`: one L2 norm of the concatenated layers; `layer`: one per layer."""
    pooling: str
    """`last_token` of the G, or their `mean`, after normalisation."""

    def __post_init__(self):
        if self.norm not in FEATURE_NORMS:
            raise ValueError(f"--ebft-feature-norm {self.norm}: must be one of {', '.join(FEATURE_NORMS)}")
        if self.pooling not in POOLINGS:
            raise ValueError(f"--ebft-feature-pooling {self.pooling}: must be one of {', '.join(POOLINGS)}")

    def steps(self, length: int) -> range:
        """Which tokens of a completion of this length are pooled."""
        return range(length - 1 if self.pooling == "last_token" else 0, length)

    def pool(self, hidden: list[Tensor]) -> Tensor:
        """Feature of a completion: layers' hidden states [..., P, H], P pooled tokens, → float32 [..., L·H]."""
        states = [h.to(torch.promote_types(h.dtype, torch.float32)) for h in hidden]
        if self.norm == "layer":
            states = [torch.nn.functional.normalize(h, dim=-1) for h in states]
        joined = torch.cat(states, dim=-1)
        if self.norm == "joint":
            joined = torch.nn.functional.normalize(joined, dim=-1)
        return joined.mean(-2)


class _Catch:
    """Catches the outputs of decoder layers while in its context."""

    def __init__(self, model, layers: list[int]):
        self.modules = [unwrap(model).decoder.layers[layer - 1] for layer in layers]
        self.caught: list[Tensor] = []

    def __enter__(self):
        self.handles = [m.register_forward_hook(lambda _m, _i, out: self.caught.append(out[0])) for m in self.modules]
        return self

    def __exit__(self, *exc):
        for handle in self.handles:
            handle.remove()


def block_features(encoder, feature_map: FeatureMap, micro_batch: MicroBatch,
                   lengths: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Features of one micro-batch's blocks, of completions cut to each length.

    Returns:
        for each length, rollouts [b, size, N, D] and reference completions [b, size, D], float32.
    """
    row = micro_batch.row
    with _Catch(encoder, feature_map.layers) as catch:
        encoder(micro_batch.tokens, micro_batch.positions, as_mask(StridedPattern(row, micro_batch.document_BT)))
    hidden_BSH = [h.transpose(0, 1) for h in catch.caught]
    features = []
    for length in lengths:
        steps = feature_map.steps(length)
        indices = row.rollout_index(steps), row.completion_index(steps)
        features.append(tuple(feature_map.pool([h[:, i.to(h.device)] for h in hidden_BSH]) for i in indices))
    return features


@torch.no_grad()
def block_grams(encoder, feature_map: FeatureMap, micro_batches: MicroBatches, lengths: list[int]) -> Tensor:
    """Gram matrices of every block's rollout features and reference feature, float64 [B, K, len(lengths), n+1, n+1].

    Args:
        micro_batches: rows packed with all G steps of each rollout.
        lengths: completions are cut to these many tokens, each at most G; training uses [G].
    """
    grams = []

    def forward_step(iterator, model):
        features = block_features(model, feature_map, next(iterator), lengths)
        grams.append(torch.stack([energy.gram(*pair) for pair in features], dim=2))
        return grams[-1], None

    run_schedule(forward_step, micro_batches, encoder, forward_only=True)
    return micro_batches.join_blocks(grams)
