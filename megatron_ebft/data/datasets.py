"""Builds the training, validation and test datasets that the data flags ask for.

All flags and files are checked on every rank before anything is built: a rank that raised alone would leave the others
waiting.
"""

import contextlib
import glob
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.core.datasets.utils import Split

from megatron_ebft.common.disk import check_writable
from megatron_ebft.data.dataset_files import (
    check_answers,
    check_cached,
    check_dataset,
    check_ids,
    check_tokenizer,
    content_hash,
)
from megatron_ebft.data.rows import RowDataset
from megatron_ebft.data.tokenizer import Tokenizer
from megatron_ebft.parallel.errors import collective_errors

DEFAULT_SPLIT = "969,30,1"


class _Builder(BlendedMegatronDatasetBuilder):
    """Megatron-Core's builder, which also works without process groups."""

    @staticmethod
    def build_generic_dataset(cls, is_built_on_rank, synchronize_ranks, *args):
        if cls is BlendedDataset and not torch.distributed.is_initialized():
            # With a cache megatron-core 0.16 asks for the rank here.
            args = (*args[:-1], replace(args[-1], path_to_cache=None))
        return BlendedMegatronDatasetBuilder.build_generic_dataset(cls, is_built_on_rank, synchronize_ranks, *args)


@dataclass(frozen=True)
class Blend:
    """The datasets of one data path flag, and how to mix them."""

    flag: str
    """The flag, for messages."""
    prefixes: list[str]
    """Paths without .bin and .idx."""
    weights: list[float] | None
    """Shares of the rows, not normalised. None: each dataset once, in proportion to its rows."""

    @classmethod
    def parse(cls, flag: str, values: Sequence[str]) -> "Blend":
        """Parse `prefix`, `prefix prefix ...` or `weight prefix weight prefix ...`.

        Raises:
            ValueError: no dataset, weights for some of the datasets only, or a weight that is not above 0.
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


def build_datasets(*, seq_length: int, seed: int, sizes: Sequence[int | None], tokenizer: Tokenizer,
                   data_path: Sequence[str] | None = None, split: str | None = None,
                   train_data_path: Sequence[str] | None = None, valid_data_path: Sequence[str] | None = None,
                   test_data_path: Sequence[str] | None = None, data_cache_path: str | None = None,
                   need_answers: bool = False) -> list[RowDataset | BlendedDataset | None]:
    """The training, validation and test datasets, the same on every rank.

    If torch.distributed is initialised, all ranks must call this. Rank 0 builds the indices; the others wait and read
    them from a file system that all ranks share.

    Args:
        seq_length: T.
        seed: of the shuffles.
        sizes: rows of each split; its documents are repeated as often as needed. 0: do not build the split. None: one
            epoch.
        tokenizer: must be the one that the data were made with.
        data_path: --data-path, divided among the splits by `split`.
        split: --split, weights of the three splits, by documents. None: "969,30,1".
        train_data_path, valid_data_path, test_data_path: a blend for each split, instead of data_path.
        data_cache_path: folder for the indices, written by rank 0 unless they are there. None: a folder
            `<prefix>/cache` beside each dataset.
        need_answers: refuse datasets without an answer mask.

    Returns:
        For each split a dataset (see RowDataset) with at least that number of rows, or None for 0 rows.

    Raises:
        ValueError: contradictory flags; files that are missing, damaged, empty or made with another tokenizer; or too
            little data for a split; indices that cannot be written. Names the flag.
    """
    blends, source = _blends(data_path, split, (train_data_path, valid_data_path, test_data_path), sizes)
    lengths = _check_files(blends, tokenizer, need_answers)
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
            raise ValueError(f"--{kind.name}-data-path: {size or 'all'} rows of it are needed; give it")
        bounds = (0.0, 1.0) if data_path is None else config.split_matrix[kind.value]
        _check_split(kind, blend, size, bounds, lengths, seq_length)

    datasets = _build(config, sizes, lengths)
    for kind, blend, size, dataset in zip(Split, blends, sizes, datasets, strict=True):
        if size and len(dataset) < size:
            raise ValueError(f"{blend.flag}: {size} rows of the {kind.name} split are needed; without weights its "
                             f"datasets are read once and give {len(dataset)}: put a weight before every prefix")
    return datasets


def content_hashes(*data_paths: Sequence[str] | None) -> dict[str, str]:
    """`content_hash` of every dataset that data path flags name, by prefix."""
    return {prefix: content_hash(prefix) for values in data_paths if values
            for prefix in Blend.parse("--data-path", values).prefixes}


def _blends(data_path: Sequence[str] | None, split: str | None, split_paths: Sequence[Sequence[str] | None],
            sizes: Sequence[int | None]) -> tuple[list[Blend | None], dict]:
    """The blend of each split, and the arguments of GPTDatasetConfig that say the same."""
    if data_path is not None:
        if any(paths is not None for paths in split_paths):
            raise ValueError("--data-path: give either this or --train-data-path and --valid-data-path")
        blend = Blend.parse("--data-path", data_path)
        return [blend] * len(Split), dict(blend=(blend.prefixes, blend.weights),
                                          split=_checked_split(split or DEFAULT_SPLIT))
    if split is not None:
        raise ValueError("--split: divides --data-path, which is not given; leave it out")
    blends = [None if paths is None or size == 0 else Blend.parse(f"--{kind.name}-data-path", paths)
              for kind, paths, size in zip(Split, split_paths, sizes, strict=True)]
    if not any(blends):
        raise ValueError("--data-path: no data; give it, or --train-data-path and its companions")
    return blends, dict(blend_per_split=[blend and (blend.prefixes, blend.weights) for blend in blends])


def _check_files(blends: list[Blend | None], tokenizer: Tokenizer, need_answers: bool) -> dict[str, numpy.ndarray]:
    """Check the files of every dataset; returns the lengths of its documents, in tokens, by prefix."""
    flags = {prefix: blend.flag for blend in filter(None, blends) for prefix in blend.prefixes}
    lengths = {}
    for prefix, flag in flags.items():
        lengths[prefix] = check_dataset(prefix, flag)
        if need_answers:
            check_answers(prefix, flag)
    check_tokenizer(list(flags), tokenizer)
    for prefix, flag in flags.items():
        check_ids(prefix, flag, lengths[prefix], tokenizer)
    return lengths


def _build(config: GPTDatasetConfig, sizes: Sequence[int | None], prefixes: Iterable[str]) -> list:
    """The datasets by Megatron-Core's builder; ValueError if their indices cannot be written."""
    folder = config.path_to_cache
    _check_cache(folder, prefixes)
    try:
        return _Builder(RowDataset, list(sizes), lambda: True, config).build()
    except Exception as error:
        cause = error.__cause__ or error  # Megatron-Core's advice is about its own configuration
        if not isinstance(cause, OSError):
            raise
        raise ValueError(f"--data-cache-path {folder or '(default: beside the data)'}: the indices there cannot be "
                         f"written or read ({cause}); name another folder") from error


def _check_cache(folder: str | None, prefixes: Iterable[str]) -> None:
    """ValueError on every rank unless rank 0 can write the indices, or finds some where it cannot write; or where a
    cached file is no array."""
    has_ranks = torch.distributed.is_initialized()
    with collective_errors() if has_ranks else contextlib.nullcontext():
        if not has_ranks or torch.distributed.get_rank() == 0:
            for cache in [folder] if folder else [os.path.join(prefix, "cache") for prefix in prefixes]:
                if not glob.glob(os.path.join(glob.escape(cache), "**", "*_index.npy"), recursive=True):
                    check_writable(cache, "--data-cache-path" if folder else "--data-cache-path (default)")
                check_cached(cache)


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
        raise ValueError(f"--split gives the {kind.name} split no share of the data, but {size or 'all'} rows of it "
                         "are needed: give it one")
    for prefix in blend.prefixes:
        begin, end = (round(bound * len(lengths[prefix])) for bound in bounds)  # as Megatron-Core rounds
        tokens = int(lengths[prefix][begin:end].sum(dtype=numpy.int64))
        if tokens < seq_length:
            raise ValueError(
                f"{blend.flag} {prefix}: its {kind.name} split has {end - begin} of {len(lengths[prefix])} documents "
                f"and {tokens} tokens, where at least {seq_length} are needed: add documents, give the split a larger "
                "share (--split), or ask for none of its rows")


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
