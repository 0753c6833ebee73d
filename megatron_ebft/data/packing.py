"""Packs whole sequences, each a prompt and its completion, into rows of T tokens.

1. Sequences are placed longest first, each into the first row that has room. None is cut.
2. Each sequence is a document of its row: positions and attention begin anew. The rest of a row is a document of
   padding.
3. Data-parallel ranks pack the same number of rows, as they have the same number of micro-batches in every other pass.
   Some rows may be padding alone.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from megatron_ebft.common.device import upload
from megatron_ebft.data.micro_batches import GoldBatch
from megatron_ebft.parallel.groups import dp_max


@dataclass(frozen=True)
class Sequence:
    """A prompt, which is only read, and the completion that follows it."""

    prompt: list[int]
    """At least one token: it predicts the completion's first."""
    completion: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


@dataclass
class PackedSequences:
    """Rows of T tokens, and where the completions are in them.

    Completion tokens are numbered in the order of the sequences, over all of this rank.
    """

    rows: GoldBatch
    """With document numbers. On this rank's device."""
    number_BT: Tensor
    """int64 [B, T−1], on the host: which completion token each of tokens 1..T−1 is; −1 where it is none."""
    num_tokens: int
    """Completion tokens of this rank."""

    def completion_tokens(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Completion tokens of some rows, int64 [tokens] each: places in the flat [b, T−1], and numbers."""
        number = self.number_BT[rows].flatten()
        places = (number >= 0).nonzero().squeeze(1)
        return upload(places), upload(number[places])


def pack(sequences: list[Sequence], row_length: int, multiple: int) -> PackedSequences:
    """Pack this rank's sequences into rows. All data-parallel ranks must call.

    Args:
        sequences: none longer than a row. May be empty: one row of padding, at least, remains.
        row_length: T.
        multiple: the number of rows is a multiple of it.
    """
    assert max(map(len, sequences), default=0) <= row_length
    packed = first_fit([len(sequence) for sequence in sequences], row_length)
    count = dp_max(max(1, -(-len(packed) // multiple))) * multiple
    first = [0, *accumulate(len(sequence.completion) for sequence in sequences)]
    tokens_BT, document_BT = torch.zeros(2, count, row_length, dtype=torch.int64)
    number_BT = torch.full((count, row_length - 1), -1)
    for row, members in enumerate(packed):
        start = 0
        for document, member in enumerate(members):
            sequence = sequences[member]
            end, answer = start + len(sequence), start + len(sequence.prompt)
            tokens_BT[row, start:end] = torch.tensor(sequence.prompt + sequence.completion)
            number_BT[row, answer - 1 : end - 1] = torch.arange(first[member], first[member + 1])
            document_BT[row, end:] = document + 1
            start = end
    rows = GoldBatch(upload(tokens_BT), upload(torch.arange(count)), upload(document_BT))
    return PackedSequences(rows, number_BT, first[-1])


def first_fit(lengths: list[int], room: int) -> list[list[int]]:
    """Which sequences each row holds, by number: longest first, each into the first row that has room for it.

    A tree finds this row in O(log n): its leaves are rows, one for each sequence, and a node knows the most room of its
    leaves. Node i has the children 2i and 2i + 1.
    """
    leaves = 1 << max(0, len(lengths) - 1).bit_length()
    left, rows = [room] * (2 * leaves), [[] for _ in lengths]
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        node = 1
        while node < leaves:
            node = 2 * node + (left[2 * node] < lengths[number])
        rows[node - leaves].append(number)
        left[node] -= lengths[number]
        while node := node // 2:
            left[node] = max(left[2 * node], left[2 * node + 1])
    return [row for row in rows if row]
