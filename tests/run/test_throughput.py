"""Throughput: the slow one of four ranks is named; MFU is operations over time and peak; the plan counts as they do."""

import contextlib
import os
import time
from types import SimpleNamespace
from unittest import mock

import pytest
import torch.distributed as dist
from benchmark import count_flops
from ranks import enter_world, run_ranks
from small_run import MODEL, SMALL, start

from megatron_ebft.common.device import init_device
from megatron_ebft.parallel import groups
from megatron_ebft.run.build import build_run
from megatron_ebft.run.callbacks import throughput
from megatron_ebft.run.callbacks.throughput import slowest_rank
from megatron_ebft.run.flags import parse_args
from megatron_ebft.run.loop import gold_batch, train
from megatron_ebft.run.plan.of_run import Planned, Planning, mean_of_ranks

SLOW, NAP = 2, 0.3
"""Seconds that a machine full of other work does not lose by chance."""
LAYOUTS = {"data": [], "tensor": ["--tensor-model-parallel-size", "2", "--sequence-parallel"],
           "pipeline": ["--pipeline-model-parallel-size", "2"]}


class Planless:
    """Stands in for Planning: never over."""

    def __init__(self, *_):
        pass

    def is_over(self) -> bool:
        return False

    def close(self) -> None:
        pass


def runs_with_a_straggler(flags: list[str], folder: str) -> list[dict]:
    """On every rank: for each layout, what rank 0 logs and prints of 4 steps in which rank SLOW sleeps in each pass of
    its policy."""
    init_device()
    results = []
    for name, more in LAYOUTS.items():
        enter_world(4)
        args = parse_args([*flags, *more, "--train-iters", "4", "--log-throughput", "--eval-interval", "0",
                           "--ebft-peak-tflops", "1", "--tensorboard-dir", f"{folder}/{name}"])
        groups.init_parallel(args.tensor_model_parallel_size, args.pipeline_model_parallel_size, seed=1)
        with mock.patch.multiple(throughput, Planning=Planless, IN_A_ROW=3):
            run, log = start(args)
            if dist.get_rank() == SLOW:
                run.policy[0].register_forward_pre_hook(lambda *_: time.sleep(NAP))
            logged, lines, record = [], [], log.record
            log.record = lambda iteration=0, scalars=None, *rest, **more: (
                logged.append(scalars), record(iteration, scalars, *rest, **more))
            log.print = lines.append
            assert train(run, log)
        log.flush()
        events = [name for name in os.listdir(args.tensorboard_dir) if name.startswith("events")]
        assert len(events) == 1, "ranks other than the first write, too"
        results.append({"logged": [x for x in logged if x and "ranks/slowest" in x], "lines": lines})
        groups.shut_down()
    return results


def test_the_straggler_is_named(data, tmp_path):
    """Also where it holds up its tensor and pipeline peers in every layer and pass."""
    flags = [*data, *MODEL, *SMALL, "--global-batch-size", "4"]
    by_layout = run_ranks(4, "test_throughput:runs_with_a_straggler", flags, str(tmp_path))[0]
    for name, result in zip(LAYOUTS, by_layout, strict=True):
        for values in result["logged"][1:]:  # the first step has more to do
            assert values["ranks/slowest"] == SLOW, name
            assert values["ranks/own_seconds_max"] > NAP + values["ranks/own_seconds_min"], name
        warning, = (line for line in result["lines"] if line.startswith("warning"))
        assert f"rank {SLOW} on " in warning and "times as long as the other ranks" in warning, name


def test_mfu_is_operations_over_time_and_peak(arguments, tmp_path, one_rank, monkeypatch):
    """Operations as the benchmark counts them in a real step; the plan comes from a process of its own."""
    args = arguments("--log-throughput", "--ebft-peak-tflops", "2.5e-3", "--no-ebft-skip-duplicates", "--log-interval",
                     "2", "--tensorboard-dir", str(tmp_path))
    run = build_run(args)
    counted = count_flops(run, gold_batch(run, run.train_data, 0))
    run, log = start(args)
    planning = Planning(args, run.tokenizer.vocab_size, 1, run.config.fused)
    plan = planning.result()
    assert {phase: flops for phase, flops in plan.flops.items() if flops} == {
        phase: flops for phase, flops in counted.items() if flops}
    monkeypatch.setattr(throughput, "Planning", lambda *_: planning)
    recorded = {}
    monkeypatch.setattr(log, "record", lambda iteration=0, scalars=None, *_, **__: recorded.setdefault(
        iteration, {}).update(scalars or {}))
    assert train(run, log)
    assert {step for step, values in recorded.items() if "throughput/mfu" in values} == {2, 4}
    for values in (recorded[2], recorded[4]):
        seconds = values["seconds/step"]
        assert values["throughput/mfu"] == pytest.approx(sum(counted.values()) / seconds / 2.5e9)
        assert values["throughput/gold_tokens_per_second_per_gpu"] == pytest.approx(48 / seconds)
        assert values["throughput/tokens_per_second_per_gpu"] == pytest.approx(
            (48 + 2 * run.config.layout.num_blocks * run.config.num_samples * 4) / seconds)
        assert values["memory/allocated_gib"] > 0.1


def test_ranks_are_compared_within_their_stage():
    def rank(rollout, train):
        return {"rollout": rollout, "train": train}

    own = [rank(1, 1), rank(1, 1.2), rank(1, 1), rank(3, 3), rank(3, 3), rank(3.5, 3)]
    slowest = slowest_rank(own, 2)
    assert (slowest.rank, slowest.phase, slowest.ratio) == (1, "train", pytest.approx(1.1))
    assert slowest_rank(own, 1).rank == 5 and slowest_rank(own[:2], 2).ratio == 1


def test_savings_and_stages_count():
    planned = mean_of_ranks({name: {"phases": {"rollout": {"flops": flops, "flows": [["send", "x", 1, flops, []]] * 2},
                                               "train": {"flops": 8, "flows": []}}}
                             for name, flops in (("first stage", 1), ("middle stages", 2), ("last stage", 7))}, 4)
    assert planned == Planned({"rollout": 3.0, "train": 8.0}, {"rollout": 6.0, "train": 0.0})
    saved = {"training_tokens_saved": 0.25, "encoder_tokens_saved": 0.5}
    assert throughput.computed_flops(planned, saved, is_fused=False) == 3 + 6
    assert throughput.computed_flops(planned, saved, is_fused=True) == 2.25 + 6
    planned.flops["start_scores"] = 10.0
    assert throughput.computed_flops(planned, saved, is_fused=True) == 2.25 + 6 + 5


def test_a_plan_that_fails_costs_a_warning(arguments, tmp_path, one_rank, capsys, monkeypatch):
    def fails():
        raise ValueError("--no-such-flag")

    failing = SimpleNamespace(is_over=lambda: True, result=fails, close=contextlib.nullcontext)
    monkeypatch.setattr(throughput, "Planning", lambda *_: failing)
    run, log = start(arguments("--log-throughput", "--training-mode", "sft", "--tensorboard-dir", str(tmp_path)))
    assert train(run, log)
    assert capsys.readouterr().out.count("could not be planned, so there are no TFLOP/s (--no-such-flag)") == 1
