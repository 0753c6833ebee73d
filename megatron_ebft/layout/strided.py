"""The owner of token order: where every gold and rollout token stands, and what it sees.

Strided blocks (METHOD: "Strided blocks"). A row holds T gold tokens. Block k has its anchor at a_k = c + k·s; its gold
completion is gold[a_k : a_k+G]; its n rollouts continue gold[0:a_k].

1. Rollout token (k, j, t) has position a_k + t. It sees gold[0:a_k] and (k, j, 0..t), and nothing else. Gold is causal.
2. The predictor of a token is the token whose logits give its log-probability: gold position a_k − 1 for t = 0, rollout
   token (k, j, t−1) otherwise. So the last token of a rollout predicts nothing, and no other token sees it: a training
   row needs G − 1 steps of each rollout, an encoder row all G.
3. With a document mask, a gold token sees its own document only, positions restart at each document, and a block counts
   only if the token before its anchor and its whole completion are in one document.

packed_row.py packs rows; visible_keys.py describes to attention kernels what each token sees.

Suffixes of tensor names: B rows, T gold tokens, K blocks, N samples, G steps.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

ROW_SIZES = 16
"""How many numbers of rollouts a row may have room for, so that kernels and the allocator see few lengths."""


@dataclass(frozen=True)
class StridedLayout:
    """Geometry of the blocks of one row. At least one block fits."""

    seq_length: int
    """T, gold tokens in a row."""
    context_length: int
    """c, the first anchor; at least 1, since the first rollout token needs a predictor."""
    stride: int
    """s, gold tokens between anchors."""
    rollout_length: int
    """G, tokens of a rollout and of a completion."""
    num_samples: int
    """n, rollouts of a block; with sample parallelism, of a block on this rank."""
    pad_to: int = 1
    """The lengths of rows and decoding steps are multiples of it."""
    row_sizes: int = ROW_SIZES
    """A row has room for a multiple of a `row_sizes`-th of its rollouts."""

    def __post_init__(self):
        # The flags were checked (run/flags).
        assert min(self.context_length, self.stride, self.rollout_length, self.num_samples) >= 1, self
        assert self.seq_length >= self.context_length + self.rollout_length, self
        assert self.seq_length % self.pad_to == 0, self

    @property
    def num_blocks(self) -> int:
        """NB = (T − G − c) // s + 1."""
        return (self.seq_length - self.rollout_length - self.context_length) // self.stride + 1

    def anchors(self, device=None) -> Tensor:
        """a_k = c + k·s, int64 [K]."""
        return self.context_length + self.stride * torch.arange(self.num_blocks, device=device)

    def completion_index(self, device=None) -> Tensor:
        """Gold positions a_k .. a_k+G−1 of every block's gold completion, int64 [K, G]."""
        return self.anchors(device)[:, None] + torch.arange(self.rollout_length, device=device)

    def valid_blocks(self, document_BT: Tensor | None, answer_BT: Tensor | None) -> Tensor | bool:
        """Blocks that count: bool [B, K], or True when neither mask is given.

        Args:
            document_BT: document number of each gold token, never decreasing along a row; None: no document mask.
            answer_BT: True on answer tokens; None: no answer mask.
        """
        valid = True
        if document_BT is not None:
            anchors = self.anchors(document_BT.device)
            valid = document_BT[:, anchors - 1] == document_BT[:, anchors + self.rollout_length - 1]
        if answer_BT is not None:
            valid = answer_BT[:, self.completion_index(answer_BT.device)].all(-1) & valid
        return valid


def document_starts(document_BT: Tensor) -> Tensor:
    """First gold position of each token's document, int64 [B, T]."""
    index = torch.arange(document_BT.shape[1], device=document_BT.device).expand_as(document_BT)
    is_first = torch.ones_like(document_BT, dtype=torch.bool)
    is_first[:, 1:] = document_BT[:, 1:] != document_BT[:, :-1]
    return (index * is_first).cummax(1).values


def pad(tokens_BS: Tensor, length: int) -> Tensor:
    """Tokens or positions, padded with zeros to this length."""
    return torch.nn.functional.pad(tokens_BS, (0, length - tokens_BS.shape[1]))


def gold_positions(gold_BT: Tensor, starts_BT: Tensor | None) -> Tensor:
    """Position ids of gold tokens, int64 [B, T]; they restart at each document of `document_starts`, if given."""
    positions = torch.arange(gold_BT.shape[1], device=gold_BT.device).expand_as(gold_BT)
    return positions if starts_BT is None else positions - starts_BT


def first_alike(rollout_BKNG: Tensor) -> Tensor:
    """For each rollout, the first sample of its block with the same tokens (maybe itself), int64 [B, K, N]."""
    alike = True
    for token_BKN in rollout_BKNG.unbind(-1):
        alike = (token_BKN[..., :, None] == token_BKN[..., None, :]) & alike
    return alike.byte().argmax(-1)


def computed_rollouts(needed_BKN: Tensor, first_BKN: Tensor) -> Tensor:
    """Rollouts to compute, bool [B, K, N]: where one of several identical rollouts is needed, the first of them.

    Args:
        needed_BKN: bool.
        first_BKN: `first_alike`.
    """
    return torch.zeros_like(first_BKN).scatter_add_(-1, first_BKN, needed_BKN.long()) > 0
