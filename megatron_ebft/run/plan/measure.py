"""One step of one rank, measured: what it computes, holds and sends. The rank needs neither a GPU nor other ranks.

`measure_rank` runs the real code: one `train_step` on tensors without data (simulate.py), counted by meter.py and
collectives.py. No rollouts are skipped, and nothing is in FP8. tools/plan.py makes its report of these figures, and a
run takes its operations from here (of_run.py).
"""

import argparse
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from unittest import mock

import torch

from megatron_ebft.common.device import device
from megatron_ebft.data.micro_batches import GoldBatch
from megatron_ebft.method.batches import training_rows
from megatron_ebft.model.decoding import PrefillPattern
from megatron_ebft.parallel.groups import document_size, init_parallel, shut_down
from megatron_ebft.rollout.sampler import Rollouts
from megatron_ebft.rollout.schedule import idle_fraction, row_groups
from megatron_ebft.run.build import check_batch
from megatron_ebft.run.configs import ebft_config, model_args, parallel_sizes
from megatron_ebft.run.loop import train_step
from megatron_ebft.run.models import build_models, build_optimizer
from megatron_ebft.run.plan.exchange import feature_exchange
from megatron_ebft.run.plan.meter import Meter
from megatron_ebft.run.plan.simulate import fake_tensors, gpu_operations, simulated_rank
from megatron_ebft.run.state import Run


def build(args: argparse.Namespace, meter: Meter) -> tuple[Run, GoldBatch]:
    """The parts of a run on random weights, each under its kind, and this rank's rows of a global batch."""

    def unchanged(model) -> None:
        """Weights have no values to copy."""

    is_ebft = args.training_mode == "ebft"
    config = ebft_config(args, args.num_layers) if is_ebft else None
    kinds = {"policy": "weights", "encoder": "encoder", "start": "start"}
    models = build_models(args, model_args(args, args.vocab_size), config, encoder_from=unchanged,
                          start_from=unchanged, has_start=is_ebft and bool(args.ebft_kl_coef or args.ebft_track_kl),
                          part=lambda name: meter.kind(kinds[name]))
    for chunk in models.policy:
        for buffer in chunk.buffers:
            meter.label(buffer.grad_data, "gradients")
    with meter.kind("optimizer"):
        optimizer, scheduler = build_optimizer(args, models.policy)
        optimizer.prepare_grads()
        optimizer.step()  # makes its moments
    run = Run(mode=args.training_mode, policy=models.policy, encoder=models.encoder, start=models.start,
              optimizer=optimizer, scheduler=scheduler, config=config, args=args)
    with meter.kind("data"):
        shape = (args.global_batch_size // document_size(), args.seq_length)
        gold = GoldBatch(torch.zeros(shape, dtype=torch.int64, device=device()), torch.arange(shape[0]).to(device()),
                         torch.zeros(shape, dtype=torch.int64, device=device()) if args.ebft_document_mask else None,
                         torch.ones(shape, dtype=torch.bool, device=device()) if args.ebft_answer_only else None)
    return run, gold


def measure(args: argparse.Namespace, cost: Callable[[int, int], float]) -> dict:
    """Figures of one step of this rank, JSON-able. Works on real and on fake tensors.

    Args:
        cost: (floating-point operations, bytes) → seconds of an operation.
    """
    meter = Meter(model_args(args, args.vocab_size).padded_vocab_size // args.tensor_model_parallel_size, cost)
    attend = PrefillPattern.attend

    def attend_and_label(self, layer_number, *args):
        out = attend(self, layer_number, *args)
        kept = self.cache.buffers or self.cache.gold
        for tensor in kept[layer_number] if not torch.is_grad_enabled() else ():
            meter.label(tensor, "caches")  # with gradient they are activations
        return out

    with meter, mock.patch.object(PrefillPattern, "attend", attend_and_label):
        run, gold = build(args, meter)
        held = dict(meter.bytes)
        with meter("between phases"):
            train_step(run, gold, meter, check=False)
    phases = {}
    for name, phase in meter.phases.items():
        flows = [[*key, flow.calls, flow.bytes, phase.traffic.ranks[key[1]]]
                 for key, flow in sorted(phase.traffic.flows.items())]
        phases[name] = {"flops": phase.flops, "seconds": phase.seconds, "peak": phase.peak, "flows": flows}
    return {"parameters": sum(p.numel() for chunk in run.policy for p in chunk.parameters()), "held": held,
            "phases": phases, "idle": idle(args, run, gold),
            "rewards": asdict(feature_exchange(args, run.config, args.hidden_size)) if run.config else {}}


def idle(args: argparse.Namespace, run: Run, gold: GoldBatch) -> dict[str, float]:
    """Fraction of each phase in which this stage waits for others."""
    stages, virtual = args.pipeline_model_parallel_size, args.num_virtual_stages_per_pipeline_rank
    rows, shares = len(gold.tokens_BT), {}
    micro_batches = rows // args.micro_batch_size
    if run.config is not None:
        micro_batches = len(training_rows(gold, Rollouts(gold.tokens_BT, None, None), run.config))
        groups = len(row_groups(rows, stages, args.ebft_rollout_rows))
        shares["rollout"] = idle_fraction(groups, stages, run.config.layout.rollout_length, virtual)
        shares["features"] = shares["start_scores"] = (stages - 1) / (micro_batches + stages - 1)
    shares["train"] = (stages - 1) / (micro_batches * virtual + stages - 1)
    return shares


def measure_rank(args: argparse.Namespace, rank: int, world_size: int,
                 cost: Callable[[int, int], float] = lambda flops, size: 0.0, like_gpu: bool = True) -> dict:
    """`measure` for a rank that does not exist. This process must be in no process group.

    Args:
        like_gpu: count the memory of a GPU's kernels.

    Raises:
        ValueError: naming the flag that such a rank refuses.
    """
    start = time.perf_counter()
    with simulated_rank(rank, world_size), warnings.catch_warnings(action="ignore"):
        init_parallel(**parallel_sizes(args))
        check_batch(args)
        with gpu_operations() if like_gpu else nullcontext(), fake_tensors():
            figures = measure(args, cost)
        shut_down()
    return {**figures, "rank": rank, "took": time.perf_counter() - start}


def stage_ranks(world_size: int, stages: int) -> dict[str, int]:
    """A rank of each kind of pipeline stage, by the stage's name: the first rank of each."""
    if stages == 1:
        return {"every rank": 0}
    per_stage = world_size // stages
    middle = {"middle stages": per_stage} if stages > 2 else {}
    return {"first stage": 0, **middle, "last stage": (stages - 1) * per_stage}
