"""Rows of T tokens, packed and shuffled from the documents of Megatron's indexed datasets.

1. A row is exactly T consecutive tokens of the shuffled documents laid end to end. A long document may continue in
   another row. There is no extra token, since nothing is shifted. The tokens after the last whole row are left out, so
   that no row is padded.
2. The rows of a step depend on the consumed samples alone, not on the number of ranks or of steps to come. Documents
   are packed once, in Megatron's order. Every further epoch shuffles the rows again by (seed, epoch).
3. An answer mask is a second indexed dataset, `<prefix>_answer_mask`, of the same shape as the first. Both are read at
   the same document numbers and offsets.
4. The index says where a document ends. Its tokens do not: the end token of a chat model ends each turn, texts spell
   end tokens, and data may have none.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.indexed_dataset import IndexedDataset
from torch import Tensor

from megatron_ebft.data.tokenizer import Tokenizer

ANSWER_MASK_SUFFIX = "_answer_mask"


def first_unknown(tokens: numpy.ndarray, vocab_size: int) -> int | None:
    """Place of the first id that is not below `vocab_size`, or is negative; None if there is none."""
    if len(tokens) == 0 or 0 <= tokens.min() and tokens.max() < vocab_size:
        return None
    return int(numpy.argmax((tokens < 0) | (tokens >= vocab_size)))


def unknown_id(prefix: str, document: int, token: int, tokenizer: Tokenizer) -> str:
    """What is wrong with a dataset that has such an id."""
    return (f"{prefix}: document {document} (counted from 0) has the id {token}, and this {tokenizer.name} has "
            f"{tokenizer.vocab_size} ids: the data were made with another tokenizer; give that one as "
            "--tokenizer-model, or make the dataset again with this one")


class RowDataset(GPTDataset):
    """Rows of T tokens with their answer masks.

    `dataset[i]` is a dict of `tokens`, int64 [T]; `documents`, int32 [T], the number of each token's document within
    the row; `answer_mask`, bool [T], all True without an answer mask; and `index`, the number of the row in this
    dataset. The constructor is Megatron-Core's.

    Raises:
        ValueError: a row has an id that the tokenizer does not know; names the dataset, the document and the id.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        mask_path = self.dataset_path + ANSWER_MASK_SUFFIX
        self.answer_mask = IndexedDataset(mask_path) if IndexedDataset.exists(mask_path) else None
        self._epoch, self._order = 0, None

    def __len__(self) -> int:
        """Number of rows of one epoch, or the number that was asked for if it is larger."""
        return max(super().__len__(), self.num_samples or 0)

    def __getitem__(self, idx: int) -> dict[str, Tensor | int]:
        epoch, position = divmod(int(idx), super().__len__())
        spans = list(self._spans(position if epoch == 0 else int(self._shuffled(epoch)[position])))
        tokens_T = numpy.concatenate([self.dataset.get(*span) for span in spans], dtype=numpy.int64)
        assert len(tokens_T) == self.config.sequence_length
        self._check_ids(tokens_T, spans)
        if self.answer_mask is None:
            answer_T = numpy.ones(len(tokens_T), dtype=bool)
        else:
            answer_T = numpy.concatenate([self.answer_mask.get(*span) for span in spans]) != 0
        lengths = numpy.array([length for _, _, length in spans])
        documents_T = numpy.arange(len(lengths), dtype=numpy.int32).repeat(lengths)
        return dict(tokens=torch.from_numpy(tokens_T), documents=torch.from_numpy(documents_T),
                    answer_mask=torch.from_numpy(answer_T), index=int(idx))

    def _check_ids(self, tokens_T: numpy.ndarray, spans: list[tuple[int, int, int]]) -> None:
        place = first_unknown(tokens_T, self.config.tokenizer.vocab_size)
        if place is not None:
            ends = numpy.cumsum([length for _, _, length in spans])
            document = spans[int(numpy.searchsorted(ends, place, side="right"))][0]
            raise ValueError(unknown_id(self.dataset_path, document, tokens_T[place], self.config.tokenizer))

    def _shuffled(self, epoch: int) -> numpy.ndarray:
        """Order of the rows in an epoch, cached until another epoch is asked for."""
        if epoch != self._epoch:
            generator = numpy.random.default_rng((self.config.random_seed, epoch))
            self._epoch, self._order = epoch, generator.permutation(super().__len__())
        return self._order

    def _get_num_epochs(self, num_tokens_per_epoch: int) -> int:
        # Megatron-Core would pack and shuffle all epochs together. Then --train-iters, which decides how many there
        # are, would change the rows of the first step.
        return 1

    def _spans(self, idx: int) -> Iterator[tuple[int, int, int]]:
        """(document, offset, length) of the pieces of a row, in order. None is empty."""
        sample = int(self.shuffle_index[idx])
        first, start = map(int, self.sample_index[sample])
        last, stop = map(int, self.sample_index[sample + 1])
        for i in range(first, last + 1):
            document = int(self.document_index[i])
            offset = start if i == first else 0
            end = stop if i == last else int(self.dataset.sequence_lengths[document])
            if end > offset:
                yield document, offset, end - offset

    def _build_document_sample_shuffle_indices(self):
        # Megatron-Core names cached indices after the path of the dataset. A new dataset at an old path would be read
        # with the old indices. Indices depend on the lengths of the documents, so a hash of these goes into the name.
        self.unique_identifiers["sequence_lengths"] = hashlib.sha256(self.dataset.sequence_lengths).hexdigest()
        self.unique_description = json.dumps(
            self.unique_identifiers, indent=4, default=lambda tokenizer: tokenizer.unique_identifiers)
        self.unique_description_hash = hashlib.md5(
            self.unique_description.encode(), usedforsecurity=False).hexdigest()
        return super()._build_document_sample_shuffle_indices()


@dataclass
class RowBatch:
    """Rows of one rank for one step. B rows, T tokens."""

    tokens: Tensor
    """int64 [B, T]."""
    documents: Tensor
    """int32 [B, T], number of each token's document within its row."""
    answer_mask: Tensor
    """bool [B, T], True on answer tokens."""
    index: Tensor
    """int64 [B], global sample number: samples consumed before the step + position in the global batch."""


def rows_for_step(dataset: RowDataset | BlendedDataset, consumed_samples: int, global_batch_size: int, dp_rank: int,
                  dp_size: int) -> RowBatch:
    """One rank's contiguous part of the global batch that follows `consumed_samples` rows.

    Raises:
        ValueError: the global batch does not divide by the ranks, or the dataset is used up; names the flag.
    """
    if global_batch_size % dp_size != 0:
        raise ValueError(f"--global-batch-size {global_batch_size}: must be a multiple of the {dp_size} data-parallel "
                         "ranks")
    if consumed_samples + global_batch_size > len(dataset):
        raise ValueError(f"--train-iters: the dataset has {len(dataset)} rows, but {global_batch_size} are needed "
                         f"after {consumed_samples}: lower it, or build the dataset with more rows")
    rows = global_batch_size // dp_size
    first = consumed_samples + dp_rank * rows
    samples = [dataset[i] for i in range(first, first + rows)]
    return RowBatch(**{name: torch.stack([sample[name] for sample in samples])
                       for name in ("tokens", "documents", "answer_mask")}, index=torch.arange(first, first + rows))
