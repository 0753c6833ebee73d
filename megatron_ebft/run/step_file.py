"""One EBFT step in a safetensors file: its rows, its rollouts, and the results computed from them.

1. The file holds the global batch in the order of its rows. layout/step_major.py defines the order of the tokens.
   B rows, n samples, NB blocks of G tokens, D feature dimension. Tensors in brackets are optional:

       docs [B, T]                                 gold tokens
       sequences, [position_ids] [B·n, T + NB·G]   gold tokens, then rollout tokens
       [index] [B]                                 global sample numbers
       [document_ids], [answer_mask] [B, T]        with --ebft-document-mask, --ebft-answer-only
       [sampler_log_probs], [entropy] [B·n, NB·G]  of the rollout tokens, from the sampler
       features_gold [B, NB, D], features_rollout [B, n, NB, D]        written by tools/replay.py only
       alignment, diversity, reward, advantage [B·n, NB]
       log_probs [B·n, T + NB·G − 1]               of the training pass: gold tokens at τ = 1, rollout tokens at τ; in
                                                   a failed step NaN for rollouts that the pass skipped
       rl_loss, ce_loss, kl_loss                   not multiplied by coefficients; kl_loss with a KL coefficient only
       grad.<Hugging Face name>                    of the whole loss; written by tools/replay.py only

   Integers are int64, other numbers float32.
2. The metadata are strings of two kinds. The keys of GOLDEN and `blocks` are also in the files of other programs
   (tests/golden) and mean the same there. `flags` (JSON) has all flags of the method, and the iteration. A file without
   `flags` has training's defaults for everything that the other keys do not say; these are the released code's choices.
   The two kinds must not contradict each other.
3. A file appears whole or not at all. `read_step` checks every tensor.
"""

import argparse
import json
import os
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_ebft.common.device import device
from megatron_ebft.common.disk import is_regular, parse_json, unreadable
from megatron_ebft.common.safetensors_writer import SafetensorsWriter
from megatron_ebft.data.micro_batches import GoldBatch
from megatron_ebft.layout.step_major import from_step_major, step_major_positions, to_step_major
from megatron_ebft.layout.strided import StridedLayout, document_starts
from megatron_ebft.method.gradient import Scores
from megatron_ebft.method.rewards import Rewards
from megatron_ebft.parallel.groups import (
    all_documents,
    all_samples,
    document_rank,
    document_size,
    sample_rank,
    sample_size,
)
from megatron_ebft.rollout.sampler import Rollouts
from megatron_ebft.run.flags import build_parser, method_flags
from megatron_ebft.run.flags.checks import check_args
from megatron_ebft.run.flags.config_file import flag_value
from megatron_ebft.run.flags.flag import spelled
from megatron_ebft.run.flags.method import METHOD
from megatron_ebft.run.flags.parser import as_argv

INPUTS = ("docs", "sequences", "position_ids", "index", "document_ids", "answer_mask", "sampler_log_probs", "entropy")
"""Tensors that `read_step` reads. The others are results."""
GOLDEN = {"prompt_len": "seq_length", "docs": "global_batch_size", "samples": "ebft_num_samples",
          "stride": "ebft_stride", "context": "ebft_context_length", "gen_len": "ebft_rollout_length",
          "temperature": "ebft_temperature", "whitening": "ebft_whitening", "embed_method": "ebft_feature_pooling",
          "diversity_coef": "ebft_diversity_coef", "ce_coef": "ebft_ce_coef", "seed": "seed"}
"""Keys of the metadata and the flags they stand for. `seed` is optional. `blocks`, NB, follows from the others."""
SPELLING = {"whitening": {"False": "none", "True": "released", "paper": "paper"},
            "embed_method": {"last_token": "last_token", "mean_pooling": "mean"}}
"""Values of these keys, and those of the flags. The released code has no `paper`."""
MASKS = {"document_ids": "--ebft-document-mask", "answer_mask": "--ebft-answer-only"}
"""Tensors that exist if the flags were given."""


@dataclass
class Step:
    """The inputs of a step, of the global batch."""

    args: argparse.Namespace
    """Flags of training. Those of the method, the batch size and the masks are the step's."""
    iteration: int | None
    """Its number, counted from 1. None: it does not belong to a training run."""
    gold: GoldBatch
    rollouts: Rollouts

    @property
    def layout(self) -> StridedLayout:
        return _layout(self.args)

    def local_part(self) -> tuple[GoldBatch, Rollouts]:
        """This rank's rows, and its samples of them, on its device."""
        count = len(self.gold.tokens_BT) // document_size()
        rows = slice(document_rank() * count, (document_rank() + 1) * count)
        gold = self.gold.rows(rows)

        def samples(values_BKNG: Tensor) -> Tensor:
            return values_BKNG[rows].chunk(sample_size(), dim=2)[sample_rank()].contiguous().to(device())

        masks = [_map(lambda x: x.to(device()), x) for x in (gold.document_BT, gold.answer_BT)]
        return (GoldBatch(gold.tokens_BT.to(device()), gold.index_B.to(device()), *masks),
                Rollouts(*(_map(samples, x) for x in _fields(self.rollouts))))


def gather_step(args: argparse.Namespace, iteration: int | None, gold: GoldBatch, rollouts: Rollouts) -> Step:
    """The inverse of `Step.mine`, on every rank."""
    masks = [_map(lambda x: all_documents(x.long()), x) for x in (gold.document_BT, gold.answer_BT)]
    return Step(args, iteration, GoldBatch(all_documents(gold.tokens_BT), all_documents(gold.index_B), *masks),
                Rollouts(*(_map(lambda x: all_documents(all_samples(x)), x) for x in _fields(rollouts))))


def gather_results(step: Step, rewards: Rewards, advantage_BKN: Tensor, scores: Scores,
                   losses: dict[str, float]) -> dict[str, Tensor]:
    """The results of a step except features and gradients, from the parts of every rank, in the file's order.

    Args:
        losses: reduced means by name. A loss without valid tokens is missing there and 0 in the file.
    """
    args, layout = step.args, step.layout
    alignment, diversity = rewards.alignment_BKn.float(), rewards.diversity_BKn.float()
    reward = args.ebft_alignment_coef * alignment - args.ebft_diversity_coef * diversity
    of_samples = {"alignment": alignment, "diversity": diversity, "reward": reward,
                  "advantage": all_samples(advantage_BKN)}
    results = {key: to_step_major(layout, all_documents(x)[..., None]) for key, x in of_samples.items()}
    rollout_BKNG, gold_BT = all_documents(all_samples(scores.rollout_BKNG)), all_documents(scores.gold_BT)
    results["log_probs"] = to_step_major(layout, rollout_BKNG, gold_BT)
    names = ["rl_loss", "ce_loss", *(["kl_loss"] if args.ebft_kl_coef else [])]
    return results | {key: torch.tensor(losses.get(key, 0.0)) for key in names}


# ---------------------------------------------------------------- writing


@contextmanager
def step_writer(path: str, flag: str, step: Step, results: dict[str, Tensor],
                gradients: dict[str, tuple[int, ...]]):
    """Write a step's inputs and results; the block then writes the gradients with the SafetensorsWriter it gets.

    Args:
        gradients: shapes by name, in the order in which the block writes them.

    Raises:
        ValueError: the file cannot be written; names `flag`.
    """
    tensors = {**_inputs(step), **results}
    header = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    header |= {name: (torch.float32, shape) for name, shape in gradients.items()}
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        with SafetensorsWriter(path, header, _metadata(step.args, step.iteration)) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor)
            yield writer
    except OSError as error:
        raise ValueError(f"{flag} {path}: cannot be written ({error}); free space or name another place") from error


def _inputs(step: Step) -> dict[str, Tensor]:
    gold, rollouts, layout = step.gold, step.rollouts, step.layout
    tensors = {
        "docs": gold.tokens_BT, "sequences": to_step_major(layout, rollouts.tokens_BKNG, gold.tokens_BT),
        "position_ids": step_major_positions(layout, _map(document_starts, gold.document_BT), len(gold.tokens_BT)),
        "index": gold.index_B, "document_ids": gold.document_BT, "answer_mask": _map(Tensor.long, gold.answer_BT),
        "sampler_log_probs": _map(partial(to_step_major, layout), rollouts.log_probs_BKNG),
        "entropy": _map(partial(to_step_major, layout), rollouts.entropy_BKNG)}
    return {key: tensor for key, tensor in tensors.items() if tensor is not None}


def _metadata(args: argparse.Namespace, iteration: int | None) -> dict[str, str]:
    """The metadata of a step that was made with these flags."""
    entries = {key: vars(args)[name] for key, name in GOLDEN.items()}
    for key, spelling in SPELLING.items():
        entries[key] = next(word for word, value in spelling.items() if value == entries[key])
    return {**{key: str(value) for key, value in entries.items()}, "blocks": str(_layout(args).num_blocks),
            "flags": json.dumps({"iteration": iteration, **method_flags(args)})}


# ---------------------------------------------------------------- reading


def read_step(path: str, flag: str, vocab_size: int) -> Step:
    """Read the inputs of a step and check them.

    Args:
        vocab_size: number of ids that the model knows.

    Raises:
        ValueError: the file is missing, damaged or contradicts itself; names `flag` and the file.
    """
    where = f"{flag} {path}"
    if not is_regular(path):
        raise ValueError(f"{where}: no such file, or no regular one")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys() if key in INPUTS}
    except (SafetensorError, OSError) as error:
        raise unreadable(error, f"{where}: this", "is no whole safetensors file") from error
    args, iteration = _flags(metadata, tensors, where)
    _check_tensors(tensors, args, vocab_size, where)
    layout, documents = _layout(args), tensors.get("document_ids")
    gold = GoldBatch(tensors["docs"], tensors.get("index", torch.arange(args.global_batch_size)), documents,
                     _map(Tensor.bool, tensors.get("answer_mask")))
    drawn = (tensors["sequences"][:, args.seq_length:], tensors.get("sampler_log_probs"), tensors.get("entropy"))
    return Step(args, iteration, gold, Rollouts(*(_map(partial(from_step_major, layout), x) for x in drawn)))


def _flags(metadata: dict[str, str], tensors: dict, where: str) -> tuple[argparse.Namespace, int | None]:
    """Training's flags, with those of the method, the batch size and the masks taken from the file; the iteration.

    Args:
        tensors: by name; their presence tells which masks there are.

    Raises:
        ValueError: beginning with `where`: a key is missing, has no valid value, or contradicts another.
    """
    missing = [key for key in (*GOLDEN, "blocks") if key not in metadata and key != "seed"]
    if missing:
        raise ValueError(f"{where}: the metadata have no {', '.join(missing)}; is it a step's file?")
    for key, spelling in SPELLING.items():
        if metadata[key] not in spelling:
            raise ValueError(f"{where}: the metadata say {key} = {metadata[key]}; it must be one of "
                             f"{', '.join(spelling)}")
    entries = as_argv({name: SPELLING.get(key, {}).get(metadata[key], metadata[key])
                     for key, name in GOLDEN.items() if key in metadata})
    masks = [flag for key, flag in MASKS.items() if key in tensors]
    try:
        flags = parse_json(metadata.get("flags", "{}"), "flags")
        iteration = flags.pop("iteration", None)
        if iteration is not None and (type(iteration) is not int or iteration < 1):
            raise ValueError(f"the iteration is {iteration!r}")
        flags = {name: _method_flag(name, value) for name, value in flags.items() if value is not None}
        from_entries = build_parser().parse_args(["--train-iters=1", *entries])
        args = check_args(build_parser().parse_args(["--train-iters=1", *entries, *as_argv(flags), *masks]))
    except ValueError as error:
        raise ValueError(f"{where}: its metadata cannot be right: {error}") from error
    for key, name in GOLDEN.items():
        if vars(from_entries)[name] != vars(args)[name]:
            raise ValueError(f"{where}: the metadata contradict themselves: {key} is {metadata[key]}, and flags say "
                             f"{spelled(name)} {vars(args)[name]}")
    blocks = _layout(args).num_blocks
    if metadata["blocks"] != str(blocks):
        raise ValueError(f"{where}: the metadata contradict themselves: blocks is {metadata['blocks']}, but there are "
                         f"{blocks} blocks of this stride and context in {args.seq_length} tokens")
    return args, iteration


def _method_flag(name: str, value):
    """The value of a flag of the method. Other flags are not taken from a file: it says what a step computes, not what
    this program does."""
    if name not in ("seq_length", *METHOD.dests):
        raise ValueError(f"{name} is no flag of the method")
    try:
        return flag_value(name, value)
    except ValueError as error:
        raise ValueError(f"{spelled(name)}: {error}") from error


def _check_tensors(tensors: dict[str, Tensor], args: argparse.Namespace, vocab_size: int, where: str) -> None:
    layout, rows, length = _layout(args), args.global_batch_size, args.seq_length
    samples, tokens = rows * layout.num_samples, layout.num_blocks * layout.rollout_length
    shapes = {"docs": (rows, length), "sequences": (samples, length + tokens),
              "position_ids": (samples, length + tokens), "index": (rows,), "document_ids": (rows, length),
              "answer_mask": (rows, length), "sampler_log_probs": (samples, tokens), "entropy": (samples, tokens)}
    for key in ("docs", "sequences"):
        if key not in tensors:
            raise ValueError(f"{where}: the tensor {key} is missing")
    for key, tensor in tensors.items():
        dtype = torch.float32 if key in ("sampler_log_probs", "entropy") else torch.int64
        if (tensor.dtype, tuple(tensor.shape)) != (dtype, shapes[key]):
            raise ValueError(f"{where}: {key} is {tensor.dtype} {tuple(tensor.shape)}; by the metadata it must be "
                             f"{dtype} {shapes[key]}")
    for key in ("docs", "sequences"):
        low, high = tensors[key].min().item(), tensors[key].max().item()
        if low < 0 or high >= vocab_size:
            raise ValueError(f"{where}: {key} has token ids from {low} to {high}, and the model knows 0 to "
                             f"{vocab_size - 1}: is it the step of another model, or of one whose logits were not "
                             "finite?")
    if not torch.equal(tensors["sequences"][:, :length], tensors["docs"].repeat_interleave(layout.num_samples, dim=0)):
        raise ValueError(f"{where}: sequences do not begin with docs")
    documents = tensors.get("document_ids")
    if documents is not None and (documents.diff(dim=1) < 0).any():
        raise ValueError(f"{where}: document_ids decrease along a row")
    positions = step_major_positions(layout, _map(document_starts, documents), rows)
    if not torch.equal(tensors.get("position_ids", positions), positions):
        raise ValueError(f"{where}: position_ids are not those of {layout.num_blocks} blocks of this stride and context"
                         f"{'' if documents is None else ' that restart at documents'}")


def _layout(args: argparse.Namespace) -> StridedLayout:
    """The layout of all n samples, without padding."""
    return StridedLayout(args.seq_length, args.ebft_context_length, args.ebft_stride, args.ebft_rollout_length,
                         args.ebft_num_samples)


def _fields(rollouts: Rollouts) -> tuple[Tensor | None, ...]:
    return rollouts.tokens_BKNG, rollouts.log_probs_BKNG, rollouts.entropy_BKNG


def _map(function, value: Tensor | None) -> Tensor | None:
    """Apply a function to an optional tensor."""
    return None if value is None else function(value)
