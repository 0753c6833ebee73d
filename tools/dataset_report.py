"""What a new dataset holds, what was left out of it, and how much of it a run will train on."""

import argparse
import tempfile

from dataset_writer import DatasetWriter

from megatron_ebft.common.disk import aside, write_json
from megatron_ebft.data.datasets import build_datasets
from megatron_ebft.data.tokenizer import Tokenizer
from megatron_ebft.layout.strided import StridedLayout
from megatron_ebft.run.counts import ROWS, Shares, count

READS = frozenset({"seq_length", "ebft_rollout_length", "ebft_stride", "ebft_context_length", "seed"})
"""Training flags on which the report depends."""


def counted(options: argparse.Namespace, writer: DatasetWriter, tokenizer: Tokenizer) -> tuple[Shares, int] | None:
    """Shares of a finished dataset that count with both masks, and its number of rows; None if it fills no row.

    Rows are packed as in training. Up to ROWS are looked at: they are shuffled, so the first are a sample of all.
    """
    if writer.tokens < options.seq_length:
        return None
    with tempfile.TemporaryDirectory() as cache:
        rows, *_ = build_datasets(seq_length=options.seq_length, seed=options.seed, sizes=[None, 0, 0], split="1",
                                  tokenizer=tokenizer, data_path=[writer.prefix], data_cache_path=cache)
        layout = StridedLayout(options.seq_length, options.ebft_context_length, options.ebft_stride,
                               options.ebft_rollout_length, num_samples=1)
        seen = min(len(rows), ROWS)
        counts = count((rows[i] for i in range(seen)), layout, document_mask=True, answer_only=writer.with_answers)
        return Shares.of(seen, counts), len(rows)


def report(options: argparse.Namespace, writers: list[DatasetWriter], tokenizer: Tokenizer) -> None:
    """Print what there is to say of finished datasets, and write it to --report."""
    content = {}
    for writer in writers:
        shares = counted(options, writer, tokenizer)
        for line in (*described(writer, tokenizer), blocks_line(options, writer, shares)):
            print(line)
        content[writer.prefix] = writer.counts() | {"notes": dict(writer.notes)}
        if shares is not None:
            content[writer.prefix] |= dict(
                rows=shares[1], rows_seen=shares[0].rows, share_of_blocks=shares[0].blocks,
                share_of_tokens=shares[0].tokens, **{name: vars(options)[name] for name in sorted(READS)})
    if options.report is not None:
        with aside(options.report) as file:
            write_json(file, content)


def described(writer: DatasetWriter, tokenizer: Tokenizer) -> list[str]:
    """What a dataset holds, and what was left out of it."""
    answers = f", {writer.answer_tokens / writer.tokens:.2%} of them answer" if writer.with_answers else ""
    lines = [f"{writer.prefix}: {writer.documents} documents, {writer.tokens} tokens{answers}; the longest document "
             f"has {writer.longest}"]
    lines += [f"{number} {reason} left out" for reason, number in sorted(writer.left_out.items())]
    lines += [f"{number} {note}" for note, number in sorted(writer.notes.items())]
    if writer.changed:
        lines.append(f"warning: {writer.changed} of {writer.documents} documents do not decode to their text. The "
                     f"first is {writer.first_change}. This {tokenizer.name} normalises texts or lacks characters")
    return lines


def blocks_line(options: argparse.Namespace, writer: DatasetWriter, shares: tuple[Shares, int] | None) -> str:
    """How much of a dataset counts in training."""
    if shares is None:
        return f"it fills no row of --seq-length {options.seq_length}"
    counts, rows = shares
    masks = "--ebft-document-mask" + (" --ebft-answer-only" if writer.with_answers else "")
    seen = f"{rows} rows" if counts.rows == rows else f"the first {counts.rows} of {rows} rows"
    return (f"with {masks}, {counts.blocks:.2%} of the blocks (G = {options.ebft_rollout_length}, s = "
            f"{options.ebft_stride}, c = {options.ebft_context_length}) and {counts.tokens:.2%} of the gold tokens "
            f"count, in {seen} of {options.seq_length} tokens")
