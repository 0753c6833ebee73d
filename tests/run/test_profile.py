"""Profiles: a Chrome trace that names steps, phases and layers; the same ranges for Nsight Systems; what NCCL recorded.
"""

import gzip
import json
import os
import threading
from types import SimpleNamespace

import pytest
import torch
from small_run import start

from megatron_ebft.run import flight_recorder
from megatron_ebft.run.callbacks import profile
from megatron_ebft.run.loop import train
from megatron_ebft.run.watchdog import Watchdog

STEPS = ["--profile", "--profile-step-start", "1", "--profile-step-end", "3", "--eval-interval", "0"]
PHASES = {"data", "rollout", "features", "train", "optimizer"}


def test_a_trace_names_steps_phases_and_layers(arguments, tmp_path, one_rank, capsys):
    run, log = start(arguments(*STEPS, "--use-pytorch-profiler", "--save", str(tmp_path)))
    assert train(run, log)
    path = tmp_path / "profiles" / "steps-2-3-rank-0.trace.json.gz"
    assert f"profile: {path}" in capsys.readouterr().out and os.listdir(path.parent) == [path.name]
    events = json.loads(gzip.open(path).read())["traceEvents"]
    ranges = [(x["name"], x["ts"], x["ts"] + x["dur"]) for x in events if x.get("cat") == "user_annotation"]
    steps = {name: (begin, end) for name, begin, end in ranges if name.startswith("step ")}
    assert steps.keys() == {"step 2", "step 3"}
    for begin, end in steps.values():
        inside = [(name, first, last) for name, first, last in ranges if begin <= first and last <= end]
        assert PHASES <= {name for name, *_ in inside}
        rollouts = [(first, last) for name, first, last in inside if name == "rollout"]
        for layer in range(1, 5):
            assert any(begun <= first and last <= ended for name, first, last in inside
                       for begun, ended in rollouts if name == f"policy layer {layer}")
        assert "encoder layer 1" in {name for name, *_ in inside}
    assert any(x["name"] == "aten::mm" for x in events)
    assert not any(layer._forward_hooks for layer in profile.local_layers(run.policy[0]).values())


def test_ranges_for_nsight_systems_and_a_memory_snapshot(arguments, tmp_path, one_rank, monkeypatch):
    """On a GPU that this machine may lack: what would be called."""
    calls: list[str] = []
    monkeypatch.setattr(profile, "have_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", calls.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: calls.append("end"))
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: calls.append("captured"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: calls.append("captured no more"))
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda max_entries: None)
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: open(path, "w").close())
    monkeypatch.setattr(torch._C, "_cuda_attach_out_of_memory_observer", lambda observe: None, raising=False)
    run, log = start(arguments(*STEPS, "--record-memory-history", "--save", str(tmp_path)))
    assert train(run, log)
    assert calls[:2] == ["captured", "step 2"] and calls[-2:] == ["end", "captured no more"]
    depth = [1 if name not in ("end", "captured", "captured no more") else -(name == "end") for name in calls]
    assert sum(depth) == 0 and {*PHASES, "step 3", "policy layer 4"} <= set(calls)
    assert os.listdir(tmp_path / "profiles") == ["memory-rank-0.pickle"]


def test_a_disk_without_room_costs_a_warning(arguments, tmp_path, one_rank, capsys):
    (tmp_path / "profiles").write_text("no folder")
    run, log = start(arguments(*STEPS, "--use-pytorch-profiler", "--save", str(tmp_path)))
    assert train(run, log) and "could not be written" in capsys.readouterr().out


def test_a_profile_of_no_step_or_rank(arguments, tmp_path, one_rank, capsys):
    flags = ["--profile", "--use-pytorch-profiler", "--eval-interval", "0", "--tensorboard-dir", str(tmp_path)]
    run, log = start(arguments(*flags))
    assert train(run, log)
    assert "note: --profile-step-start 10 --profile-step-end 12: this run has steps 1 to 4" in capsys.readouterr().out
    with pytest.raises(ValueError, match="^--profile-ranks 1: there are 1 ranks"):
        start(arguments(*flags, "--profile-ranks", "0", "1"))


@pytest.mark.parametrize("flags, message", [
    (["--use-pytorch-profiler"], "--use-pytorch-profiler: needs --profile"),
    (["--record-memory-history"], "--record-memory-history: needs --profile"),
    (["--ebft-peak-tflops", "989"], "--ebft-peak-tflops 989: needs --log-throughput"),
    (["--profile", "--profile-step-end", "3"], "--profile-step-end 3: must be above --profile-step-start 10")])
def test_flags_that_do_nothing_are_refused(arguments, flags, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        arguments(*flags)


def test_the_watchdog_writes_what_nccl_has_recorded(tmp_path, one_rank, monkeypatch, capsys):
    watchdog, written, codes = Watchdog(timeout=0.1, folder=str(tmp_path / "hang")), {}, []
    watchdog.rank, watchdog.world_size = 0, 1
    watchdog.store = SimpleNamespace(set=written.__setitem__, get=written.__getitem__)
    watchdog._report()
    monkeypatch.setattr(os, "_exit", codes.append)
    watchdog._give_up()
    assert codes == [70] and not (tmp_path / "hang").exists()  # gloo records nothing
    monkeypatch.setattr(flight_recorder, "records", lambda: b"records")
    threads, thread = [], threading.Thread

    def kept(*args, **options):
        threads.append(thread(*args, **options))
        return threads[-1]

    monkeypatch.setattr(threading, "Thread", kept)
    watchdog._give_up()
    for each in threads:
        each.join()
    assert (tmp_path / "hang" / "nccl_trace_rank_0").read_bytes() == b"records"
