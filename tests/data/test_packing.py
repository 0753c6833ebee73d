"""Sequences in rows: whole, each by itself, and wherever PackedSequences says."""

import random
import time

import pytest
import torch

from megatron_ebft.data.packing import Sequence, first_fit, pack
from megatron_ebft.layout.strided import document_starts

pytestmark = pytest.mark.usefixtures("one_rank")


def test_longest_first_into_the_first_row_with_room():
    assert first_fit([3, 9, 4, 6, 1, 7], 10) == [[1, 4], [5, 0], [3, 2]]
    assert first_fit([], 10) == [] and first_fit([10, 10], 10) == [[0], [1]]


@pytest.mark.parametrize("count", [1, 2, 7, 64, 65, 300])
def test_rows_are_those_of_a_search_from_the_first(count):
    draw = random.Random(count)
    lengths, rows = [draw.randint(1, 50) for _ in range(count)], []
    for number in sorted(range(count), key=lambda number: -lengths[number]):
        for row in rows:
            if sum(lengths[member] for member in row) + lengths[number] <= 50:
                row.append(number)
                break
        else:
            rows.append([number])
    assert first_fit(lengths, 50) == rows


def test_many_sequences_are_packed_at_once():
    """A search from the first row takes ten times as long."""
    start = time.process_time()
    assert len(first_fit([600] * 20_000, 1000)) == 20_000
    assert time.process_time() - start < 2


@pytest.mark.parametrize("seed, multiple", [(0, 1), (1, 4), (2, 3)])
def test_every_completion_token_is_found_after_its_prompt(seed, multiple):
    draw, length = random.Random(seed), 20
    sequences = [Sequence([draw.randrange(1, 99) for _ in range(draw.randint(1, 8))],
                          [draw.randrange(1, 99) for _ in range(draw.randint(1, 12))]) for _ in range(25)]
    packed = pack(sequences, length, multiple)
    rows, tokens = packed.rows, packed.rows.tokens_BT.cpu()
    assert len(tokens) % multiple == 0 and len(tokens) < 25
    starts = document_starts(rows.document_BT).cpu()
    places, numbers = (x.cpu() for x in packed.completion_tokens(slice(0, len(tokens))))
    assert numbers.sort().values.tolist() == list(range(packed.num_tokens))
    found = {}
    for place, number in zip(places.tolist(), numbers.tolist()):
        row, target = divmod(place, length - 1)
        found[number] = tokens[row, starts[row, target + 1] : target + 2].tolist()
    expected = [sequence.prompt + sequence.completion[: end + 1] for sequence in sequences
                for end in range(len(sequence.completion))]
    assert [found[number] for number in range(packed.num_tokens)] == expected
    parts = [packed.completion_tokens(slice(row, row + 1))[1] for row in range(len(tokens))]
    assert torch.cat(parts).equal(packed.completion_tokens(slice(0, len(tokens)))[1])


def test_without_sequences_one_row_of_padding_remains():
    packed = pack([], 6, 2)
    assert packed.rows.tokens_BT.shape == (2, 6) and packed.num_tokens == len(packed.completion_tokens(slice(0, 2))[0])
