"""Runs that stop early and go on, ranks that hang, saves and steps that fail."""

import itertools
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import kills
import pytest
import torch
from ranks import Process, free_port, start_script
from safetensors import safe_open
from small_run import MODEL, SMALL, scalars
from small_run import start as start_run
from torch.utils.tensorboard import SummaryWriter

from megatron_ebft.checkpointing.folders import latest_iteration
from megatron_ebft.checkpointing.saver import Saver
from megatron_ebft.common import signals
from megatron_ebft.common.errors import StepFailed
from megatron_ebft.method import fused
from megatron_ebft.method import step as method_step
from megatron_ebft.model.weights import unwrap
from megatron_ebft.parallel import groups
from megatron_ebft.run import loop, stopping
from megatron_ebft.run.flags import parse_args
from megatron_ebft.run.stopping import StopAsked, Stopper
from megatron_ebft.run.watchdog import Report, Watchdog, diagnose

FLAGS = ["--train-iters", "6", "--save-interval", "4", "--eval-interval", "3"]


def start(args) -> tuple:
    """A run and its logger, from the same initial weights every time."""
    groups.set_seed(args.seed)
    return start_run(args)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory, one_rank) -> Path:
    """The folder of a run that nothing stops."""
    folder = tmp_path_factory.mktemp("whole")
    run, log = start(parse_args([*data, *MODEL, *SMALL, *FLAGS, "--save", str(folder)]))
    assert loop.train(run, log)
    log.close(0.0)
    return folder


@pytest.fixture(autouse=True)
def no_requests(monkeypatch):
    monkeypatch.setattr(signals, "received", [])


# ---------------------------------------------------------------- requests


def ask_at(patch, target, name: str, call: int) -> None:
    """A signal arrives during the call of that number."""
    original, calls = getattr(target, name), []

    def asked(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            signals.received.append("SIGUSR1")
        return original(*args, **kwargs)

    patch.setattr(target, name, asked)


STOPS = {  # where the signal arrives; the step that is the last, and the evaluation that is
    "in a step": (method_step, "update", 2, 2, 0),
    "in a rollout": (fused, "sample_and_score", 5, 2, 0),  # of two micro-batches
    "in an evaluation": (loop, "evaluate", 2, 3, 0),
    "in a save": (Saver, "save", 1, 4, 3),
    "in the first evaluation": (loop, "evaluate", 1, 0, -1),
    "in the last evaluation": (loop, "evaluate", 3, 6, 3),
}


@pytest.mark.parametrize("place", STOPS)
def test_a_request_stops_and_the_run_goes_on(arguments, whole, tmp_path, monkeypatch, place, capsys):
    *where, step, evaluated = STOPS[place]
    args = arguments(*FLAGS, "--save", str(tmp_path), "--load", str(tmp_path))
    run, log = start(args)
    with monkeypatch.context() as patch:
        ask_at(patch, *where)
        assert not loop.train(run, log)
    log.close(0.0, is_done=False)
    assert (run.state.iteration, run.state.evaluated) == (step, evaluated)
    assert f"stopping after step {step}/6: SIGUSR1" in capsys.readouterr().out
    assert latest_iteration(str(tmp_path)) == (step or None)
    signals.received.clear()
    run, log = start(args)
    assert loop.train(run, log) and run.state.restarts == (step > 0)
    log.close(0.0)
    assert kills.compare(whole, tmp_path) > 100


def test_a_stop_file_and_a_deadline(one_rank, tmp_path, monkeypatch):
    file = tmp_path / "stop"
    Stopper(None, str(file)).check()
    file.write_text("")
    with pytest.raises(StopAsked, match=f"--ebft-stop-file {file}"):
        Stopper(None, str(file)).check()
    monkeypatch.setattr(time, "monotonic", lambda: stopping._process_start + 100)
    stopper = Stopper(minutes=2.0)  # 20 seconds are left
    stopper.check()
    stopper.longest_step, stopper.longest_save = 8.0, 4.0
    stopper.check()
    stopper.longest_save = 6.0  # 1.5 × (8 + 6) = 21
    stopper.check(steps=0)
    with pytest.raises(StopAsked, match="--exit-duration-in-mins 2, 20 s before its end"):
        stopper.check()


def test_a_slice_shorter_than_the_save_interval_makes_progress(arguments, tmp_path, one_rank, monkeypatch):
    flags = [*FLAGS, "--save-interval", "1000", "--eval-interval", "0", "--save", str(tmp_path), "--load",
             str(tmp_path)]
    for done in (2, 4):
        run, log = start(arguments(*flags))
        with monkeypatch.context() as patch:
            ask_at(patch, method_step, "update", 2)
            assert not loop.train(run, log)
        signals.received.clear()
        assert latest_iteration(str(tmp_path)) == run.state.iteration == done


# ---------------------------------------------------------------- what fails


def test_a_failed_save_costs_a_warning_but_at_the_end(arguments, tmp_path, one_rank, monkeypatch, capsys):
    save, calls = Saver.save, []

    def fails(self, *args):
        calls.append(1)
        if len(calls) in failing:
            raise ValueError("--save x: cannot write the checkpoint (disk full)")
        save(self, *args)

    monkeypatch.setattr(Saver, "save", fails)
    failing = [2]
    run, log = start(arguments(*FLAGS, "--save-interval", "2", "--save", str(tmp_path / "a"), "--async-save"))
    assert loop.train(run, log) and latest_iteration(str(tmp_path / "a")) == 6
    assert "warning: --save x: cannot write the checkpoint (disk full). Training goes on" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path / "a")) == ["iter_0000002", "iter_0000006", "latest_checkpointed_iteration.txt",
                                                  "tensorboard"]
    calls.clear()
    failing = [3, 4]
    run, log = start(arguments(*FLAGS, "--save-interval", "2", "--save", str(tmp_path / "b")))
    with pytest.raises(RuntimeError, match="the run's end, step 6, could not be saved; make room"):
        loop.train(run, log)
    assert latest_iteration(str(tmp_path / "b")) == 4


def test_a_disk_without_room_for_tensorboard_costs_a_warning(arguments, tmp_path, one_rank, monkeypatch,
                                                             capsys):
    run, log = start(arguments(*FLAGS, "--tensorboard-dir", str(tmp_path)))
    add_scalar = SummaryWriter.add_scalar

    def full(self, name, value, iteration):
        if iteration in (2, 3):
            raise OSError(28, "No space left on device")
        add_scalar(self, name, value, iteration)

    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    assert loop.train(run, log)
    log.close(0.0)
    said = capsys.readouterr().out
    assert said.count("warning: --tensorboard-dir") == 1 and "No space left on device" in said
    assert [step for step, _ in scalars(tmp_path)["train/loss"]] == [1, 4, 5, 6]


def test_the_deadline_knows_saves_of_earlier_processes(arguments, tmp_path, one_rank, monkeypatch):
    """Of a save in the background, until it is whole; a finished run cannot be asked for fewer steps.

    A clock that ticks when it is read makes a save that lasts two steps longer than any one step.
    """
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))
    flags = [*FLAGS, "--async-save", "--save", str(tmp_path), "--load", str(tmp_path)]
    finished = Saver.finished

    def late(self, wait=False):
        return finished(self, wait) if wait else None  # not whole before the run waits for it, two steps later

    monkeypatch.setattr(Saver, "finished", late)
    run, log = start(arguments(*flags))
    assert loop.train(run, log)
    assert run.stopper.longest_save == run.state.longest_save > run.stopper.longest_step
    run, log = start(arguments(*flags, "--train-iters", "8", "--override-opt-param-scheduler"))
    assert run.state.longest_save > 0 and loop.train(run, log) and run.stopper.longest_save > 0
    with pytest.raises(ValueError, match="--train-iters 7: --load .* is at step 8 already"):
        start(arguments(*flags, "--train-iters", "7", "--override-opt-param-scheduler"))


def test_a_step_that_is_not_finite_is_dumped_and_the_checkpoint_stays(arguments, tmp_path, one_rank, monkeypatch):
    """Even a checkpoint that was not whole when the step failed."""
    run, log = start(arguments(*FLAGS, "--train-iters", "3", "--save-interval", "2", "--save", str(tmp_path),
                               "--async-save"))
    original, finished = method_step.update, Saver.finished
    monkeypatch.setattr(Saver, "finished", lambda self, wait=False: finished(self, wait) if wait else None)

    def broken(optimizer, loss):
        if run.state.iteration == 2:
            next(unwrap(run.policy[0]).parameters()).main_grad.fill_(torch.nan)
        return original(optimizer, loss)

    monkeypatch.setattr(method_step, "update", broken)
    with pytest.raises(StepFailed, match="step 3 .*: loss .*gradient norm nan.*of step 2 is not proven good"):
        loop.train(run, log)
    assert latest_iteration(str(tmp_path)) == 2
    with safe_open(tmp_path / "failed_steps/step_0000003.safetensors", "pt") as file:
        assert {"docs", "sequences", "log_probs", "advantage"} <= set(file.keys())


# ---------------------------------------------------------------- ranks that hang

HANGS = """
import os, signal, sys, time
import torch, torch.distributed as dist
from megatron_ebft.common.signals import end_with_parent
from megatron_ebft.run.watchdog import Watchdog
end_with_parent()
dist.init_process_group("gloo")
timeout, patience, seconds = map(float, sys.argv[3:])
watchdog = Watchdog(timeout)
watchdog.watch()
for phase in ("rollout of step 7", "features of step 7", "train of step 7"):
    watchdog.enter(phase, patience)
    if phase.startswith(sys.argv[1]) and dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGSTOP) if sys.argv[2] == "stopped" else time.sleep(seconds)
    dist.all_reduce(torch.ones(1))
watchdog.stop()
"""


@pytest.mark.parametrize("how, says", [("stopped", "does not answer"), ("asleep", "does not come to meet the others")])
def test_a_rank_that_hangs_is_named(tmp_path, how, says):
    """Rank 1 hangs in `features`; rank 0, which waits for it, says so and ends with code 70."""
    ranks = start_hanging(tmp_path, how, timeout=6, patience=1, seconds=600)
    try:
        ranks[0].process.join(300)
        code, said = ranks[0].process.exitcode, ranks[0].output()
    finally:
        for rank in ranks:
            rank.kill()
    assert code == 70, said
    assert "error: no progress for 6 s: rank 1 on " in said and says in said and "in features of step 7" in said


def test_a_long_save_is_no_hang(tmp_path):
    """Phases that may take longer do."""
    ranks = start_hanging(tmp_path, "asleep", timeout=1, patience=20, seconds=3)
    for rank in ranks:
        rank.process.join(300)
    assert [rank.process.exitcode for rank in ranks] == [0, 0], ranks[0].output()


def start_hanging(folder: Path, how: str, timeout: int, patience: int, seconds: int) -> list[Process]:
    script, port = folder / "hangs.py", str(free_port())
    script.write_text(HANGS)
    flags = ["features", how, str(timeout), str(patience), str(seconds)]
    worlds = [{"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
              for rank in (0, 1)]
    return [start_script(script, *flags, before=f"import os; os.environ.update({world})") for world in worlds]


def test_who_is_to_blame():
    def reports(count, **changes):
        usual = {rank: Report(5, "train of step 2", f"node{rank}", "x.py:1 f", True, 10.0 - rank, count)
                 for rank in range(4)}
        for name, change in changes.items():
            usual[int(name[1:])] = replace(usual[int(name[1:])], **change)
        return usual

    before = reports(7)
    cases = [
        (reports(9), "rank 0 on node0 was the first to stand still", 0),
        (reports(9, _3=dict(is_waiting=False)), "rank 3 on node3 does not come to meet the others: in train of step 2, "
         "at x.py:1 f, not moving for 7 s. The others wait in train of step 2", 0),
        (reports(9, _2=dict(number=4, phase="features of step 2")), "rank 2 on node2 is behind the others: in fea", 0),
        (reports(9, _0=dict(count=7)), "rank 0 on node0 does not answer", 1)]
    for after, text, speaker in cases:
        said, by = diagnose(before, after)
        assert text in said and by == speaker, said


def test_a_clock_that_is_set_is_no_hang(monkeypatch):
    """An hour forward: neither a rank's own patience nor what it reports depends on the wall clock."""
    watchdog, written = Watchdog(timeout=10), {}
    watchdog.rank, watchdog.store = 0, SimpleNamespace(set=written.__setitem__)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3600)
    monkeypatch.setattr(Watchdog, "_give_up", lambda self: pytest.fail("gave up"))
    over = iter([False, True])
    monkeypatch.setattr(watchdog, "_is_over", SimpleNamespace(wait=lambda _: next(over)))
    watchdog.run()
    assert json.loads(written["ebft/0"])["still"] < 60


def test_a_job_that_was_suspended_goes_on(monkeypatch):
    """Its ranks stood still for longer than the limit, and move again while one of them looks who is to blame."""
    watchdog, written = Watchdog(timeout=10), {}
    watchdog.rank, watchdog.world_size = 0, 1
    watchdog.store = SimpleNamespace(set=written.__setitem__, get=written.__getitem__)
    watchdog._report()
    monkeypatch.setattr(time, "sleep", watchdog.move)
    monkeypatch.setattr(os, "_exit", lambda code: pytest.fail("gave up"))
    watchdog._give_up()
