"""The plan of tools/plan.py against the step it plans, measured by other means: operations by torch's FlopCounterMode,
bytes held by summing up what the run consists of, the peak by the profiler's record of every allocation, messages by
counting those of real ranks over gloo."""

import contextlib
import itertools
import math
from unittest import mock

import plan
import pytest
import torch
from ranks import enter_world, run_ranks
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

SHAPE = ("--train-iters 9 --num-layers 4 --hidden-size 64 --ffn-hidden-size 176 --num-attention-heads 4 --bf16 "
         "--num-query-groups 2 --seq-length 96 --vocab-size 1000 --global-batch-size 2 --ebft-kl-coef 0.1 "
         "--ebft-rollout-length 4").split()
LAYOUTS = {
    "one rank": (1, "--global-batch-size 4 --micro-batch-size 2 --ebft-blocks-per-microbatch 6"),
    "fused": (1, "--ebft-step fused --global-batch-size 4 --micro-batch-size 2"),
    "tp2 pp2": (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"),
    "tp2 sp pp2 recompute": (4, "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2 "
                                "--untie-embeddings-and-output-weights --recompute-granularity full"),
    "interleaved, samples": (4, "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 "
                                "--ebft-sample-parallel-size 2 --ebft-rollout-rows 1 --ebft-document-mask "
                                "--global-batch-size 4"),
    "sft": (2, "--training-mode sft --global-batch-size 4")}


def flags(layout: str) -> list[str]:
    world_size, more = LAYOUTS[layout]
    return [*SHAPE, "--world-size", str(world_size), *more.split()]


# ---------------------------------------------------------------- a real step


class Counters:
    """The `timer` of a step: operations and messages by phase. What a phase inside another one does is its own."""

    def __init__(self):
        self.flops, self.flows = {}, {}

    @contextlib.contextmanager
    def __call__(self, phase: str):
        from megatron_ebft.run.plan.collectives import Traffic

        inside = sum(self.flops.values())
        with FlopCounterMode(display=False) as flops, Traffic() as traffic:
            yield
        inside = sum(self.flops.values()) - inside
        self.flops[phase] = self.flops.get(phase, 0) + flops.get_total_flops() - inside
        self.flows[phase] = [[*key, flow.calls, flow.bytes] for key, flow in sorted(traffic.flows.items())]


def storage_bytes(*things) -> int:
    """Of all tensors in them, each storage once."""
    storages = [x.untyped_storage() for x in tree_leaves(things) if isinstance(x, torch.Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def optimizer_tensors(optimizer) -> list:
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [list(x.optimizer.state.values()) for x in chained] + [
        [group["params"] for group in x.optimizer.param_groups] for x in chained]


def real_steps(layouts: list[str]) -> list[dict]:
    """On every rank: what a step holds and does in each of the layouts."""
    from megatron_ebft.common.device import init_device

    init_device()
    by_layout = []
    for layout in layouts:
        enter_world(LAYOUTS[layout][0])
        # As on GPUs, where groups of the same ranks stay apart, so that messages have the names of their groups.
        with mock.patch.object(torch.distributed, "new_group", torch.distributed.new_group.__wrapped__):
            by_layout.append(real_step(flags(layout)))
    return by_layout


def real_step(argv: list[str]) -> dict:
    from megatron_ebft.common.timer import PhaseTimer
    from megatron_ebft.parallel.groups import init_parallel, shut_down
    from megatron_ebft.run.configs import parallel_sizes
    from megatron_ebft.run.loop import train_step
    from megatron_ebft.run.plan.measure import build
    from megatron_ebft.run.plan.meter import Meter

    args, _ = plan.parse(argv)
    init_parallel(**parallel_sizes(args))
    run, gold = build(args, Meter(0))
    models = [[[*module.parameters(), *vars(module).values()] for module in model.modules()]
              for model in (*run.policy, run.encoder, run.start) if model is not None]
    buffers = [[buffer.grad_data, buffer.param_data] for chunk in run.policy for buffer in chunk.buffers]
    state = optimizer_tensors(run.optimizer)
    held = {"parameters": storage_bytes(models), "optimizer": storage_bytes(models, buffers, state)
             - storage_bytes(models, buffers), "gradients": storage_bytes([grads for grads, _ in buffers])}
    counters = Counters()
    train_step(run, gold, counters, check=False)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        train_step(run, gold, PhaseTimer(), check=False)
    is_compared = torch.distributed.get_rank() in compared_ranks(torch.distributed.get_world_size())
    peak = allocator_peak(profile, storage_bytes(models, buffers, state, vars(gold))) if is_compared else None
    shut_down()
    return {**held, "flops": counters.flops, "flows": counters.flows, "peak": peak}


def compared_ranks(world_size: int) -> set[int]:
    """The first and the last."""
    return {0, world_size - 1}


def allocator_peak(profile, held: int) -> int:
    """Largest sum of `held` and of what operators of the step allocated and left behind, by the profiler's record of
    every allocation. Not for the plan to know: what an operator frees before it ends, what gloo copies, and the CPU's
    random states that recomputation saves (outside any operator)."""
    records = []  # time, bytes (negative: freed), address, end of the outermost operator

    def walk(event, end):
        if event.name.startswith("c10d::"):
            return
        if event.name == "[memory]":
            allocation = event.extra_fields
            records.append((event.start_time_ns, allocation.alloc_size, allocation.ptr, end))
        if end is None and event.name.startswith("aten::"):
            end = event.end_time_ns
        for child in event.children:
            walk(child, end)

    for event in profile.profiler.kineto_results.experimental_event_tree():
        walk(event, None)
    freed, lasting = {}, []  # by address, when it is freed next; what stays, and when it goes
    for start, size, address, end in sorted(records, reverse=True):
        if size < 0:
            freed[address] = start
        elif end is not None and (gone := freed.pop(address, math.inf)) > end:
            lasting += [(start, size), (gone, -size)]
    return held + max(itertools.accumulate(size for _, size in sorted(lasting)))


@pytest.fixture(scope="module")
def real():
    """By layout, what each of its ranks measured."""
    by_layout = {}
    for world_size in sorted({size for size, _ in LAYOUTS.values()}):
        layouts = [layout for layout in LAYOUTS if LAYOUTS[layout][0] == world_size]
        by_rank = run_ranks(world_size, "test_plan:real_steps", layouts)
        by_layout |= dict(zip(layouts, zip(*by_rank, strict=True), strict=True))
    return by_layout


@pytest.mark.parametrize("layout", LAYOUTS)
def test_plan_is_what_happens(real, layout):
    for rank in compared_ranks(len(real[layout])):
        measured = real[layout][rank]
        planned = plan.measure_rank(flags(layout), rank, like_gpu=False)
        held = planned["held"]
        assert sum(held.get(kind, 0) for kind in ("weights", "encoder", "start")) == measured["parameters"]
        assert held["gradients"] == measured["gradients"]
        assert held["optimizer"] == measured["optimizer"]
        for phase, flops in measured["flops"].items():
            assert planned["phases"][phase]["flops"] == flops > 0 or phase == "optimizer"
            assert [flow[:-1] for flow in planned["phases"][phase]["flows"]] == measured["flows"][phase]
        assert plan.peak_gib(planned) * plan.GIB == pytest.approx(measured["peak"], rel=0.15)


def test_rlvr_is_not_planned():
    with pytest.raises(ValueError, match="^--training-mode rlvr: its cost depends on how long completions become"):
        plan.parse(["--training-mode", "rlvr", "--world-size", "8"])
