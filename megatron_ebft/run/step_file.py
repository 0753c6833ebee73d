"""One EBFT step in a file: its documents, its rollouts, and what became of them.

1. A safetensors file of the global batch, in the order of rows; layout/step_major.py knows the order. B documents, n
   samples, NB blocks of G tokens, D = feature dimension; what is in brackets need not be there:

       docs [B, T]                                 sequences, [position_ids] [B·n, T + NB·G]
       [index] [B]                                 global sample numbers
       [document_ids], [answer_mask] [B, T]        with --ebft-document-mask, --ebft-answer-only
       [sampler_log_probs], [entropy] [B·n, NB·G]  of the rollout tokens, from the sampler
       features_gold [B, NB, D], features_rollout [B, n, NB, D]        only tools/replay.py makes these
       alignment, diversity, reward, advantage [B·n, NB]
       log_probs [B·n, T + NB·G − 1]               of the training pass: gold tokens at τ = 1, rollout tokens at τ; in
                                                   a failed step NaN for rollouts that the pass left out (ebft.py)
       rl_loss, ce_loss, kl_loss                   kl_loss with a KL coefficient; not multiplied by coefficients
       grad.<Hugging Face name>                    of the whole loss; only tools/replay.py makes these

   Integers are int64, numbers float32. The metadata say with which flags (step_metadata.py).
2. A file appears whole or not at all, and is checked before it is believed.
"""

import argparse
import os
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_ebft.common.device import device
from megatron_ebft.data.micro_batches import GoldBatch
from megatron_ebft.hf.files import SafetensorsWriter
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
from megatron_ebft.run.step_metadata import read_flags, step_layout, write_flags

INPUTS = ("docs", "sequences", "position_ids", "index", "document_ids", "answer_mask", "sampler_log_probs", "entropy")


@dataclass
class Step:
    """What goes into a step, of the global batch."""

    args: argparse.Namespace
    """Flags of training; those of the method, the batch size and the masks are the step's."""
    iteration: int | None
    """Its number, counted from 1; None: not of a training run."""
    gold: GoldBatch
    rollouts: Rollouts

    @property
    def layout(self) -> StridedLayout:
        return step_layout(self.args)

    def mine(self) -> tuple[GoldBatch, Rollouts]:
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


def _fields(rollouts: Rollouts) -> tuple[Tensor | None, ...]:
    return rollouts.tokens_BKNG, rollouts.log_probs_BKNG, rollouts.entropy_BKNG


def _map(function, value: Tensor | None) -> Tensor | None:
    """The function of what may not be there."""
    return None if value is None else function(value)


def gather_results(step: Step, rewards: Rewards, advantage_BKN: Tensor, scores: Scores,
                   losses: dict[str, float]) -> dict[str, Tensor]:
    """What became of a step, from every rank's part, in the file's order: all but features and gradients."""
    args, layout = step.args, step.layout
    alignment, diversity = rewards.alignment_BKn.float(), rewards.diversity_BKn.float()
    reward = args.ebft_alignment_coef * alignment - args.ebft_diversity_coef * diversity
    of_samples = {"alignment": alignment, "diversity": diversity, "reward": reward,
                  "advantage": all_samples(advantage_BKN)}
    results = {key: to_step_major(layout, all_documents(x)[..., None]) for key, x in of_samples.items()}
    rollout_BKNG, gold_BT = all_documents(all_samples(scores.rollout_BKNG)), all_documents(scores.gold_BT)
    results["log_probs"] = to_step_major(layout, rollout_BKNG, gold_BT)
    names = ["rl_loss", "ce_loss", *(["kl_loss"] if args.ebft_kl_coef else [])]
    return results | {key: torch.tensor(losses.get(key, 0.0)) for key in names}  # 0: no token counts


@contextmanager
def step_writer(path: str, flag: str, step: Step, results: dict[str, Tensor],
                gradients: dict[str, tuple[int, ...]]):
    """Writes a step's file up to the gradients, of which names and shapes are given: the block writes them, in this
    order, with the SafetensorsWriter it gets.

    Raises:
        ValueError: naming `flag`: the file cannot be written.
    """
    tensors = {**_inputs(step), **results}
    header = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    header |= {name: (torch.float32, shape) for name, shape in gradients.items()}
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        with SafetensorsWriter(path, header, write_flags(step.args, step.iteration)) as writer:
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


def read_step(path: str, flag: str, vocab_size: int) -> Step:
    """A step's file, checked.

    Args:
        vocab_size: ids that the model knows.

    Raises:
        ValueError: naming `flag`, the file and what is wrong with it.
    """
    where = f"{flag} {path}"
    if not os.path.isfile(path):
        raise ValueError(f"{where}: no such file")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys() if key in INPUTS}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{where}: no whole safetensors file ({error}); copy it again") from error
    args, iteration = read_flags(metadata, tensors, where)
    _check_tensors(tensors, args, vocab_size, where)
    layout, documents = step_layout(args), tensors.get("document_ids")
    gold = GoldBatch(tensors["docs"], tensors.get("index", torch.arange(args.global_batch_size)), documents,
                     _map(Tensor.bool, tensors.get("answer_mask")))
    drawn = (tensors["sequences"][:, args.seq_length:], tensors.get("sampler_log_probs"), tensors.get("entropy"))
    return Step(args, iteration, gold, Rollouts(*(_map(partial(from_step_major, layout), x) for x in drawn)))


def _check_tensors(tensors: dict[str, Tensor], args: argparse.Namespace, vocab_size: int, where: str) -> None:
    layout, rows, length = step_layout(args), args.global_batch_size, args.seq_length
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
