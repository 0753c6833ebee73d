"""Rows of tokens out of Megatron's indexed datasets, packed and shuffled by Megatron-Core.

1. A row is exactly T consecutive tokens of the shuffled documents laid end to end, so a long document may continue in
   another row. There is no extra token, as nothing is shifted. The tokens after the last whole row are left out:
   no row is ever padded.
2. Which rows a step gets is a function of the consumed samples alone, whatever the number of ranks or of steps to come:
   documents are packed once, in Megatron's order, and every further epoch shuffles the rows anew by (seed, epoch).
3. An answer mask is a second indexed dataset, `<prefix>_answer_mask`, of the same shape as the first. Both are read by
   the same document numbers and offsets.
4. What is wrong with the files is found on every rank before anything is built, since a rank that raised by itself
   would leave the others waiting.
"""

import hashlib
import json
import logging
import math
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset
from megatron.core.datasets.utils import Split
from megatron.core.utils import log_single_rank
from torch import Tensor

from megatron_ebft.data.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

DEFAULT_SPLIT = "969,30,1"
ANSWER_MASK_SUFFIX = "_answer_mask"

# The head of an .idx file: magic, version, dtype code, number of sequences, number of document bounds.
_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"


class RowDataset(GPTDataset):
    """Rows of T tokens with their answer masks.

    `dataset[i]` is a dict of tokens, int64 [T]; answer_mask, bool [T], all True where the dataset has none; and
    index, the row's number in this dataset. The constructor is Megatron-Core's.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        mask_path = self.dataset_path + ANSWER_MASK_SUFFIX
        self.answer_mask = IndexedDataset(mask_path) if IndexedDataset.exists(mask_path) else None
        self._epoch, self._order = 0, None

    def __len__(self) -> int:
        """Rows of one epoch, or as many as were asked for, if these are more."""
        return max(super().__len__(), self.num_samples or 0)

    def __getitem__(self, idx: int) -> dict[str, Tensor | int]:
        epoch, position = divmod(int(idx), super().__len__())
        spans = list(self._spans(position if epoch == 0 else int(self._shuffled(epoch)[position])))
        tokens_T = numpy.concatenate([self.dataset.get(*span) for span in spans], dtype=numpy.int64)
        assert len(tokens_T) == self.config.sequence_length
        if self.answer_mask is None:
            answer_T = numpy.ones(len(tokens_T), dtype=bool)
        else:
            answer_T = numpy.concatenate([self.answer_mask.get(*span) for span in spans]) != 0
        return dict(tokens=torch.from_numpy(tokens_T), answer_mask=torch.from_numpy(answer_T), index=int(idx))

    def _shuffled(self, epoch: int) -> numpy.ndarray:
        """Order of an epoch's rows; kept until another epoch is asked for."""
        if epoch != self._epoch:
            generator = numpy.random.default_rng((self.config.random_seed, epoch))
            self._epoch, self._order = epoch, generator.permutation(super().__len__())
        return self._order

    def _get_num_epochs(self, num_tokens_per_epoch: int) -> int:
        # Megatron-Core packs and shuffles all epochs together, so that their number, which follows --train-iters,
        # decides what the first step gets.
        return 1

    def _spans(self, idx: int) -> Iterator[tuple[int, int, int]]:
        """(document, offset, length) of the pieces of a row, in order."""
        sample = int(self.shuffle_index[idx])
        first, start = map(int, self.sample_index[sample])
        last, stop = map(int, self.sample_index[sample + 1])
        for i in range(first, last + 1):
            document = int(self.document_index[i])
            offset = start if i == first else 0
            end = stop if i == last else int(self.dataset.sequence_lengths[document])
            yield document, offset, end - offset

    def _build_document_sample_shuffle_indices(self):
        # Megatron-Core names the cached indices after the dataset's path: a dataset made anew at the same path would
        # be read by the old one's indices. They depend on the documents' lengths, so these go into the name.
        self.unique_identifiers["sequence_lengths"] = hashlib.sha256(self.dataset.sequence_lengths).hexdigest()
        self.unique_description = json.dumps(
            self.unique_identifiers, indent=4, default=lambda tokenizer: tokenizer.unique_identifiers)
        self.unique_description_hash = hashlib.md5(
            self.unique_description.encode(), usedforsecurity=False).hexdigest()
        return super()._build_document_sample_shuffle_indices()


class _Builder(BlendedMegatronDatasetBuilder):
    """Megatron-Core's builder, also without process groups."""

    @staticmethod
    def build_generic_dataset(cls, is_built_on_rank, synchronize_ranks, *args):
        if cls is BlendedDataset and not torch.distributed.is_initialized():
            # megatron-core 0.16 asks for the rank here whenever there is a cache. Without one it does not.
            args = (*args[:-1], replace(args[-1], path_to_cache=None))
        return BlendedMegatronDatasetBuilder.build_generic_dataset(cls, is_built_on_rank, synchronize_ranks, *args)


@dataclass(frozen=True)
class Blend:
    """Datasets to mix, as one of the data path flags gave them."""

    flag: str
    """The flag, for messages."""
    prefixes: list[str]
    """Paths without .bin and .idx."""
    weights: list[float] | None
    """Shares of the rows, to be normalised; None: each dataset once, in proportion to its rows."""

    @classmethod
    def parse(cls, flag: str, values: Sequence[str]) -> "Blend":
        """From `prefix`, `prefix prefix ...` or `weight prefix weight prefix ...`.

        Raises:
            ValueError: nothing given, weights for some of the datasets only, or a weight that is not above 0.
        """
        numbers = [_number(value) for value in values]
        if not values:
            raise ValueError(f"{flag}: give at least one dataset's prefix")
        if all(number is None for number in numbers):
            return cls(flag, list(values), None)
        weights, prefixes = numbers[0::2], list(values[1::2])
        if None in weights or any(number is not None for number in numbers[1::2]) or len(weights) != len(prefixes):
            raise ValueError(f"{flag} {' '.join(values)}: give either prefixes alone or a weight before every prefix")
        if not all(math.isfinite(weight) and weight > 0 for weight in weights):
            raise ValueError(f"{flag} {' '.join(values)}: every weight must be above 0; leave the dataset out instead")
        return cls(flag, prefixes, weights if len(prefixes) > 1 else None)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def build_datasets(*, seq_length: int, seed: int, sizes: Sequence[int | None], tokenizer: Tokenizer,
                   data_path: Sequence[str] | None = None, split: str | None = None,
                   train_data_path: Sequence[str] | None = None, valid_data_path: Sequence[str] | None = None,
                   test_data_path: Sequence[str] | None = None, data_cache_path: str | None = None,
                   need_answers: bool = False, need_documents: bool = False
                   ) -> list[RowDataset | BlendedDataset | None]:
    """The training, validation and test datasets, the same on every rank.

    To be called on all ranks where torch.distributed is initialised: rank 0 builds the indices and the others wait to
    read them, from a file system they share.

    Args:
        seq_length: T.
        seed: of the shuffles.
        sizes: rows wanted of each split, its documents repeated as often as that takes; 0: do not build the split;
            None: one epoch.
        tokenizer: the one the data must have been made with.
        data_path: --data-path, shared out among the splits by `split`.
        split: --split, weights of the three splits by documents; None: "969,30,1".
        train_data_path, valid_data_path, test_data_path: instead of data_path, a blend for each split.
        data_cache_path: folder for the indices; None: a folder `<prefix>/cache` beside each dataset.
        need_answers: refuse datasets without an answer mask.
        need_documents: refuse datasets without an eod after each document.

    Returns:
        For each split a dataset of at least the wanted number of rows (see RowDataset), or None where 0 are wanted.

    Raises:
        ValueError: naming the flag: contradictory flags, files that are missing, damaged, empty or made with another
            tokenizer, or too little data for a split.
    """
    split_paths = (train_data_path, valid_data_path, test_data_path)
    if data_path is not None:
        if any(paths is not None for paths in split_paths):
            raise ValueError("--data-path: give either this or --train-data-path and --valid-data-path")
        blend = Blend.parse("--data-path", data_path)
        blends = [blend] * len(Split)
        source = dict(blend=(blend.prefixes, blend.weights), split=_checked_split(split or DEFAULT_SPLIT))
    else:
        if split is not None:
            raise ValueError("--split: shares out --data-path, which is not given; leave it out")
        blends = [None if paths is None or size == 0 else Blend.parse(f"--{kind.name}-data-path", paths)
                  for kind, paths, size in zip(Split, split_paths, sizes, strict=True)]
        if not any(blends):
            raise ValueError("--data-path: no data; give it, or --train-data-path and its companions")
        source = dict(blend_per_split=[blend and (blend.prefixes, blend.weights) for blend in blends])

    lengths = {}  # of each dataset's documents, in tokens
    for blend in filter(None, blends):
        for prefix in blend.prefixes:
            if prefix not in lengths:
                lengths[prefix] = check_dataset(prefix, blend.flag)
                _check_masks(prefix, blend.flag, need_answers, need_documents)
    check_tokenizer(list(lengths), tokenizer)

    config = GPTDatasetConfig(
        random_seed=seed, sequence_length=seq_length, tokenizer=tokenizer, path_to_cache=data_cache_path,
        reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
        add_extra_token_to_sequence=False, drop_last_partial_validation_sequence=True, **source)
    for kind, blend, size in zip(Split, blends, sizes, strict=True):
        if size == 0:
            if data_path is not None:
                config.split_matrix[kind.value] = None
            continue
        if blend is None:
            raise ValueError(f"--{kind.name}-data-path: {size or 'all'} rows of it are wanted; give it")
        bounds = (0.0, 1.0) if data_path is None else config.split_matrix[kind.value]
        _check_split(kind, blend, size, bounds, lengths, seq_length)

    datasets = _Builder(RowDataset, list(sizes), lambda: True, config).build()
    for kind, blend, size, dataset in zip(Split, blends, sizes, datasets, strict=True):
        if size and len(dataset) < size:
            raise ValueError(f"{blend.flag}: {size} rows of the {kind.name} split are wanted; without weights its "
                             f"datasets are read once and give {len(dataset)}: put a weight before every prefix")
    return datasets


def _checked_split(split: str) -> str:
    numbers = [_number(part) for part in split.split(",")]
    if None in numbers or len(numbers) > len(Split) or min(numbers) < 0 or not 0 < sum(numbers) < math.inf:
        raise ValueError(f"--split {split}: give up to three weights, such as {DEFAULT_SPLIT}")
    return split


def _check_split(kind: Split, blend: Blend, size: int | None, bounds: tuple[float, float] | None,
                 lengths: dict[str, numpy.ndarray], seq_length: int) -> None:
    """ValueError unless every dataset of the blend can give rows to the split."""
    if size is None and blend.weights is not None:
        raise ValueError(f"{blend.flag}: weights need a number of {kind.name} rows; leave the weights out")
    if bounds is None:
        raise ValueError(f"--split gives the {kind.name} split no share of the data, and {size or 'all'} rows of it "
                         "are wanted: give it one")
    for prefix in blend.prefixes:
        begin, end = (round(bound * len(lengths[prefix])) for bound in bounds)  # as Megatron-Core rounds
        tokens = int(lengths[prefix][begin:end].sum(dtype=numpy.int64))
        if tokens < seq_length:
            raise ValueError(
                f"{blend.flag} {prefix}: its {kind.name} split has {end - begin} of {len(lengths[prefix])} documents "
                f"and {tokens} tokens, where at least {seq_length} are needed: add documents, give the split a larger "
                "share (--split), or ask for none of its rows")


def check_dataset(prefix: str, flag: str = "--data-path") -> numpy.ndarray:
    """The lengths of a dataset's documents, int32 [documents], after checking its files' sizes.

    Raises:
        ValueError: naming the flag: a file is missing, of the wrong kind, cut off or empty, or the answer mask does
            not fit the text.
    """
    lengths = _checked_lengths(prefix, flag)
    mask = prefix + ANSWER_MASK_SUFFIX
    if os.path.exists(mask + ".idx") or os.path.exists(mask + ".bin"):
        if not numpy.array_equal(_checked_lengths(mask, flag), lengths):
            raise ValueError(f"{flag} {prefix}: its answer mask {mask} has documents of other lengths; make both anew "
                             "with tools/preprocess_data.py")
    return lengths


def _checked_lengths(prefix: str, flag: str) -> numpy.ndarray:
    idx, binary = Path(prefix + ".idx"), Path(prefix + ".bin")
    for path in (idx, binary):
        if not path.is_file():
            raise ValueError(f"{flag} {prefix}: {path} does not exist; give the path without its ending, as "
                             "tools/preprocess_data.py wrote it")
    with open(idx, "rb") as file:
        head = file.read(_HEADER.size)
    magic, version, code, sequences, bounds = _HEADER.unpack(head) if len(head) == _HEADER.size else (b"", 0, 0, 0, 0)
    if magic != _MAGIC or version != 1 or code not in [dtype.value for dtype in DType]:
        raise ValueError(f"{flag} {prefix}: {idx} is cut off or no Megatron index; make the dataset anew")
    expected = _HEADER.size + sequences * (4 + 8) + bounds * 8  # lengths int32, pointers int64, bounds int64
    if idx.stat().st_size != expected:
        raise ValueError(f"{flag} {prefix}: {idx} has {idx.stat().st_size} bytes and should have {expected}: it is "
                         "cut off; copy it again or make the dataset anew")
    lengths = numpy.fromfile(idx, dtype=numpy.int32, count=sequences, offset=_HEADER.size)
    tokens = int(lengths.sum(dtype=numpy.int64))
    expected = tokens * DType.size(code)
    if binary.stat().st_size != expected:
        raise ValueError(f"{flag} {prefix}: {binary} has {binary.stat().st_size} bytes and its index counts "
                         f"{expected}: it is cut off or belongs to another index; copy both again or make them anew")
    if tokens == 0:
        raise ValueError(f"{flag} {prefix}: the dataset is empty; leave it out")
    return lengths


def _sidecar(prefix: str) -> dict:
    """What `<prefix>.json` says of the dataset; empty where it is missing (data made by Megatron's own tool)."""
    path = Path(prefix + ".json")
    if not path.is_file():
        return {}
    try:
        said = json.loads(path.read_bytes())
        said["tokenizer_fingerprint"], said["tokenizer_type"], said["append_eod"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not what tools/preprocess_data.py writes ({error!r}); make the dataset anew, or "
                         "remove the file if --tokenizer-model is known to be right") from error
    return said


def _check_masks(prefix: str, flag: str, need_answers: bool, need_documents: bool) -> None:
    if need_answers and not IndexedDataset.exists(prefix + ANSWER_MASK_SUFFIX):
        raise ValueError(f"--ebft-answer-only: {flag} {prefix} has no answer mask; make it with "
                         "tools/preprocess_data.py --question-key and --answer-key, or leave the flag out")
    if need_documents and not _sidecar(prefix).get("append_eod", True):
        raise ValueError(f"--ebft-document-mask: {flag} {prefix} was made with --no-append-eod, so documents cannot be "
                         "told apart; make it anew without that flag")


def check_tokenizer(prefixes: Sequence[str], tokenizer: Tokenizer) -> None:
    """Compare the tokenizer with the one each dataset was made with, as its `<prefix>.json` says.

    Without that file (data made by Megatron's own tool) there is a warning.

    Raises:
        ValueError: naming --tokenizer-model, where the fingerprints differ or the file cannot be read.
    """
    for prefix in prefixes:
        made_with = _sidecar(prefix)
        if not made_with:
            log_single_rank(logger, logging.WARNING, f"{prefix}.json does not exist: cannot tell whether the data were "
                                                     f"made with this {tokenizer.name}")
            continue
        fingerprint = made_with["tokenizer_fingerprint"]
        if fingerprint != tokenizer.fingerprint:
            raise ValueError(f"--tokenizer-model: {prefix} was made with another tokenizer ({prefix}.json says "
                             f"{made_with['tokenizer_type']} {fingerprint[:12]}, this is {tokenizer.name} "
                             f"{tokenizer.fingerprint[:12]}); give that one, or make the dataset anew with this one")


@dataclass
class RowBatch:
    """Rows of one rank for one step. B rows, T tokens."""

    tokens: Tensor
    """int64 [B, T]."""
    answer_mask: Tensor
    """bool [B, T], True on answer tokens."""
    index: Tensor
    """int64 [B], global sample number: consumed samples before the step + position in the global batch."""


def rows_for_step(dataset: RowDataset | BlendedDataset, consumed_samples: int, global_batch_size: int, dp_rank: int,
                  dp_size: int) -> RowBatch:
    """Slice dp_rank of dp_size, contiguous, of the global batch that follows `consumed_samples` rows.

    Raises:
        ValueError: naming the flag: the global batch cannot be shared out evenly, or the dataset is used up.
    """
    if global_batch_size % dp_size != 0:
        raise ValueError(f"--global-batch-size {global_batch_size}: must be a multiple of the {dp_size} data-parallel "
                         "ranks")
    if consumed_samples + global_batch_size > len(dataset):
        raise ValueError(f"--train-iters: the dataset has {len(dataset)} rows, and {global_batch_size} are wanted "
                         f"after {consumed_samples}: lower it, or build the dataset with more rows")
    rows = global_batch_size // dp_size
    first = consumed_samples + dp_rank * rows
    samples = [dataset[i] for i in range(first, first + rows)]
    return RowBatch(tokens=torch.stack([sample["tokens"] for sample in samples]),
                    answer_mask=torch.stack([sample["answer_mask"] for sample in samples]),
                    index=torch.arange(first, first + rows))


def document_ids(tokens_BT: Tensor, eod: int) -> Tensor:
    """Number of each token's document within its row, int32 [B, T]; an eod belongs to the document it ends."""
    ends = (tokens_BT == eod).int()
    return (ends.cumsum(dim=1) - ends).int()
