"""Which part of the data can count in the loss. A run is refused before it starts if nothing of it can."""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from megatron_ebft.common.device import device
from megatron_ebft.data.micro_batches import GoldBatch
from megatron_ebft.layout.strided import StridedLayout
from megatron_ebft.method.config import EBFTConfig
from megatron_ebft.parallel.errors import collective_errors
from megatron_ebft.parallel.groups import document_rank, document_size, dp_sum

ROWS = 1024
"""Largest number of rows that are looked at. Rows are shuffled, so the first ones are a sample of all."""


@dataclass(frozen=True)
class Shares:
    """Shares of the data that count, of the first `rows` rows."""

    rows: int
    tokens: float
    """Of the gold tokens in the cross entropy."""
    blocks: float | None
    """Of the blocks; None in a run that has none."""

    @classmethod
    def of(cls, rows: int, counts: Tensor) -> "Shares":
        """From the sum of `count` over the rows."""
        tokens, all_tokens, blocks, all_blocks = counts.tolist()
        return cls(rows, tokens / max(all_tokens, 1), blocks / all_blocks if all_blocks else None)


def count(rows: Iterable[dict], layout: StridedLayout | None, document_mask: bool, answer_only: bool) -> Tensor:
    """Gold tokens that count, all gold tokens, blocks that count, all blocks: int64 [4].

    Args:
        rows: of a `RowDataset`.
        layout: None: there are no blocks.
    """
    counts = torch.zeros(4, dtype=torch.int64)
    for row in rows:
        gold = GoldBatch(row["tokens"][None], torch.tensor([row["index"]]),
                         row["documents"][None] if document_mask else None,
                         row["answer_mask"][None] if answer_only else None)
        for place, valid in enumerate((gold.gold_valid(), layout and gold.valid_blocks(layout))):
            if valid is not None:
                counts[2 * place:2 * place + 2] += torch.tensor([valid.sum(), valid.numel()])
    return counts


def shares(args: argparse.Namespace, dataset: Dataset, rows: int, layout: StridedLayout | None) -> Shares:
    """Shares over the first `rows` rows of a dataset, the same on every rank. All ranks must call, and share the rows.

    Raises:
        ValueError: a row has an id that the tokenizer does not know.
    """
    with collective_errors():
        mine = (dataset[index] for index in range(document_rank(), rows, document_size()))
        counts = count(mine, layout, args.ebft_document_mask, args.ebft_answer_only)
    return Shares.of(rows, dp_sum(counts.to(device())))


def check_counts(args: argparse.Namespace, config: EBFTConfig | None, train_data: Dataset | None,
                 valid_data: Dataset | None) -> Shares | None:
    """Look at rows of the data; None if the flags make all of them count, or where no rows are trained on.

    Raises:
        ValueError: on every rank, if nothing in those rows counts, in training or in evaluation; names the flag.
    """
    masks = ", ".join(flag for flag, is_given in (("--ebft-answer-only", args.ebft_answer_only),
                                                  ("--ebft-document-mask", args.ebft_document_mask)) if is_given)
    if not masks or args.ebft_replay_steps:
        return None
    counted = None if train_data is None else _training_shares(args, config, train_data, masks)
    if valid_data is not None:
        rows = min(ROWS, args.eval_iters * args.global_batch_size)
        if not shares(args, valid_data, rows, None).tokens:
            raise ValueError(f"{masks}: no token counts in the {rows} rows of an evaluation; give other rows "
                             "(--valid-data-path, --split, --eval-iters) or --eval-interval 0")
    return counted


def _training_shares(args, config: EBFTConfig | None, train_data: Dataset, masks: str) -> Shares:
    has_blocks = args.training_mode == "ebft"
    rows = min(ROWS, args.train_iters * args.global_batch_size)
    counted = shares(args, train_data, rows, config.layout if has_blocks else None)
    if has_blocks and (args.ebft_rl_coef or args.ebft_kl_coef) and not counted.blocks:
        g = args.ebft_rollout_length
        raise ValueError(f"{masks}: no block of the data counts, in {rows} rows. With --ebft-answer-only the {g} "
                         "tokens of its completion must be answer; with --ebft-document-mask they and the token before "
                         "must be of one document. Lower --ebft-rollout-length or "
                         "--ebft-stride, or leave the mask out")
    if not counted.tokens:
        raise ValueError(f"{masks}: no token of the data counts, in {rows} rows; use other data or leave the mask out")
    return counted
