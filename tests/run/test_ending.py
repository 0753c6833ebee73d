"""How a process of training ends: whatever happens, it leaves nothing open and nothing undone that it could do."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from paced import Pace
from ranks import ENVIRONMENT
from small_run import MODEL, SMALL, TrainingRank, scalars
from torch.utils.tensorboard import SummaryWriter

from megatron_ebft import train
from megatron_ebft.checkpointing.folders import latest_iteration
from megatron_ebft.checkpointing.lock import NAME
from megatron_ebft.common.errors import StepFailed
from megatron_ebft.method import step as method_step
from megatron_ebft.parallel import groups

FAILS = """
from megatron_ebft.run.ending import fail
fail({error})
"""


@pytest.fixture
def run(data, tmp_path, monkeypatch):
    """Train four steps with --save, and call a function of the number of the step before each update."""
    update, calls = method_step.update, []

    def run(before_update) -> None:
        def hooked(optimizer, loss):
            calls.append(1)
            return update(optimizer, loss * before_update(len(calls)))

        monkeypatch.setattr(method_step, "update", hooked)
        train.main([*data, *MODEL, *SMALL, "--train-iters", "4", "--eval-interval", "0", "--save", str(tmp_path)])

    yield run
    if torch.distributed.is_initialized():
        groups.shut_down()


def test_a_failed_step_loses_nothing(run, tmp_path, monkeypatch):
    """TensorBoard has every step before, and the folder is free for the next run."""
    written = []
    for name in ("add_scalar", "flush"):
        call = getattr(SummaryWriter, name)
        monkeypatch.setattr(SummaryWriter, name, lambda self, *args, name=name, call=call: (
            written.append(name), call(self, *args)))
    with pytest.raises(StepFailed):
        run(lambda step: torch.nan if step == 3 else 1)
    assert written[-1] == "flush"  # values wait in a thread, which the end of the process kills
    assert [step for step, _ in scalars(tmp_path / "tensorboard")["train/tokens_per_second"]] == [1, 2]
    assert not (tmp_path / NAME).exists()


def test_a_run_that_has_lost_its_folder_writes_no_checkpoint(run, tmp_path):
    def lose(step):
        owner = json.loads((tmp_path / NAME).read_text())
        (tmp_path / NAME).write_text(json.dumps(owner | {"host": "node7", "process": 1}))
        return 1

    with pytest.raises(ValueError, match="process .* on node7 has taken this folder over"):
        run(lose)
    assert latest_iteration(str(tmp_path)) is None and (tmp_path / NAME).exists()


def test_a_rank_saves_when_torchrun_is_killed(data, tmp_path):
    """By USR1, for which torchrun has no handler. Besides, the rank's standard output is on a full disk."""
    folder, pace = tmp_path / "run", Pace(tmp_path / "pace")
    pace.allow(3)
    launcher = TrainingRank([*data, *MODEL, *SMALL, "--train-iters", "9", "--eval-interval", "0", "--save-interval",
                             "2", "--save", str(folder)], ENVIRONMENT, pace, stdout="/dev/full", has_launcher=True)
    while latest_iteration(str(folder)) is None:  # it saves after step 2, and waits before step 4
        assert launcher.is_running(), launcher.output.read()
        time.sleep(0.05)
    os.kill(launcher.pid, signal.SIGUSR1)
    assert launcher.wait() == -signal.SIGUSR1
    pace.free()
    said = launcher.output.read()  # until the rank has ended
    assert "Traceback" not in said, said
    assert said.count("stdout cannot be written (No space left on device)") == 1, said
    assert latest_iteration(str(folder)) in (2, 3) and not (folder / NAME).exists()


@pytest.mark.parametrize(("error", "code", "said"), [
    ("ValueError('--lr -1: wrong')", 64, "error: --lr -1: wrong\n"),
    ("KeyboardInterrupt()", 130, "error: interrupted\n")])
def test_last_words(error, code, said, tmp_path):
    """An error of the user's has no traceback. Under torchrun one rank of a machine prints it, also into torchrun's
    report."""
    variables = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    report = tmp_path / "error.json"
    under_torchrun = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_ERROR_FILE": str(report)}
    for more, expected in (({}, said), (under_torchrun | {"LOCAL_RANK": "1"}, ""),
                           (under_torchrun | {"LOCAL_RANK": "0"}, said)):
        ended = subprocess.run([sys.executable, "-c", FAILS.format(error=error)], env=variables | more, text=True,
                               stderr=subprocess.PIPE)
        assert (ended.returncode, ended.stderr) == (code, expected)
        assert report.exists() == (more.get("LOCAL_RANK") == "0")
    assert json.loads(report.read_text())["message"]["message"] == said.strip()
