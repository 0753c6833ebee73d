"""Checkpoints as Hugging Face models beside a run: what tools/convert writes, to the last bit."""

import filecmp
import os
import subprocess
import sys

import megatron_to_hf
import pytest
from small_run import start

from megatron_ebft.checkpointing.folders import complete_iterations
from megatron_ebft.run.callbacks import save_hf
from megatron_ebft.run.callbacks.callback import Callback, Callbacks
from megatron_ebft.run.loop import train
from megatron_ebft.run.stopping import StopAsked


def test_the_folder_is_that_of_the_tool(arguments, tmp_path, one_rank, capsys):
    flags = ["--training-mode", "sft", "--eval-interval", "0", "--save", str(tmp_path / "run"), "--save-interval", "2",
             "--ebft-save-hf-interval", "4"]
    run, log = start(arguments(*flags, "--train-iters", "4"))
    assert train(run, log)
    log.close(0.0)
    made = tmp_path / "run/hf/iter_0000004"
    assert f"converted {made} in " in capsys.readouterr().out
    assert os.listdir(made.parent) == [made.name] and not run.in_use
    megatron_to_hf.main(["--load", str(tmp_path / "run"), "--output", str(tmp_path / "tool")])
    files = sorted(os.listdir(tmp_path / "tool"))
    assert "model.safetensors" in files and sorted(os.listdir(made)) == files
    assert filecmp.cmpfiles(made, tmp_path / "tool", files, shallow=False) == (files, [], [])


@pytest.fixture
def held(monkeypatch, tmp_path):
    """Conversions that wait for a file, and then end with the exit code in it; those that have begun, by their step."""
    begun = []
    code = ("import os, sys, time\nwhile not os.path.exists(sys.argv[1]): time.sleep(0.01)\n"
            "os.makedirs(sys.argv[2])\nsys.exit('error: as told' if open(sys.argv[1]).read() else 0)")

    class Popen(subprocess.Popen):
        def __init__(self, command, **options):
            *_, output, _ = command
            begun.append(int(output[-7:]))
            super().__init__([sys.executable, "-c", code, str(tmp_path / f"end{begun[-1]}"), output], **options)

    monkeypatch.setattr(save_hf.subprocess, "Popen", Popen)
    return begun


def test_a_checkpoint_stays_until_it_is_converted(arguments, tmp_path, one_rank, held, monkeypatch, capsys):
    folder = tmp_path / "run"
    flags = ["--training-mode", "sft", "--eval-interval", "0", "--save", str(folder), "--save-interval", "1",
             "--ebft-save-hf-interval", "2", "--ebft-keep-checkpoints", "1", "--train-iters", "8"]
    there = {}

    def look(self, run, log, step):
        there[step.iteration] = (complete_iterations(str(folder)), list(self.waiting))
        if step.iteration in (5, 6):  # the first fails, the second does not
            (tmp_path / f"end{2 * step.iteration - 8}").write_text("x" if step.iteration == 5 else "")
            self.process.wait()
        original(self, run, log, step)

    original = save_hf.SaveHF.step_end
    monkeypatch.setattr(save_hf.SaveHF, "step_end", look)
    run, log = start(arguments(*flags))
    run.callbacks.callbacks[-1].longest_wait = 0.5
    assert train(run, log)
    said = capsys.readouterr().out
    assert there[5] == ([2, 3, 4], [2, 4]), there  # 3 goes after step 5, and then 4 would
    assert there[6] == ([4, 5], [4]) and there[7] == ([5, 6], [6]), there
    assert complete_iterations(str(folder)) == [6, 7, 8]
    assert "warning: --ebft-save-hf-interval 2: step 2 could not be converted (error: as told). Training" in said
    assert f"converted {folder}/hf/iter_0000004 in " in said
    assert "--ebft-save-hf-interval 2: not converted: steps 6, 8. tools/convert" in said
    assert held == [2, 4, 6]


class StopAfter(Callback):
    """Stops the run after a step."""

    def __init__(self, iteration: int):
        self.iteration = iteration

    def step_end(self, run, log, step):
        if step.iteration == self.iteration:
            raise StopAsked("a test")


def test_a_stopped_run_converts_when_it_goes_on(arguments, tmp_path, one_rank, held, capsys):
    folder = tmp_path / "run"
    flags = ["--eval-interval", "2", "--save", str(folder), "--load", str(folder), "--save-interval", "2",
             "--ebft-save-hf-interval", "2", "--training-mode", "sft"]
    run, log = start(arguments(*flags))
    run.callbacks = Callbacks((*run.callbacks.callbacks, StopAfter(2)))
    assert not train(run, log) and "not converted: steps 2" in capsys.readouterr().out
    (folder / "hf" / "iter_0000002.tmp.dead").mkdir(parents=True)  # as a process leaves it that is killed
    (tmp_path / "end2").write_text("")
    (tmp_path / "end4").write_text("")
    run, log = start(arguments(*flags))
    assert train(run, log)  # its first evaluation is that of step 2, after which it saves again
    assert sorted(os.listdir(folder / "hf")) == ["iter_0000002", "iter_0000004"] and held[0] == 2 and held[-1] == 4
    assert run.state.evaluated == 4 and "not converted" not in capsys.readouterr().out
