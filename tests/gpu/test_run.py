"""The training command on one GPU: it learns, and with --deterministic-mode it continues a killed run bit for bit."""

import ctypes
import signal
import subprocess
import sys

import pytest
import torch
from small_run import dataset, scalars, weights

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("one_rank")]
MODEL = ("--num-layers 4 --hidden-size 256 --ffn-hidden-size 512 --num-attention-heads 4 --num-query-groups 2 --bf16 "
         "--seq-length 128 --global-batch-size 4 --lr 3e-3 --eval-iters 1 --ebft-eval-length 8 --tokenizer-type "
         "NullTokenizer --vocab-size 64").split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return dataset(tmp_path_factory.mktemp("data"))


def start(data, folder, steps: int, *flags: str) -> subprocess.Popen:
    boot = ("import importlib, os, runpy, sys\n"
            "if os.environ.get('BOOT'): importlib.import_module(os.environ['BOOT']).boot()\n")
    command = boot + "sys.argv[0] = 'train'; runpy.run_module('megatron_ebft.train', run_name='__main__')"
    return subprocess.Popen(
        [sys.executable, "-c", command, *data, *MODEL, "--train-iters", str(steps), "--save-interval", str(steps // 2),
         "--eval-interval", str(steps // 2), "--save", str(folder), "--load", str(folder), *flags], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=die_with_parent)


def die_with_parent() -> None:
    """For a test that runs out of time."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def finish(process) -> None:
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output[-3000:]


@pytest.mark.parametrize("flags", [[], ["--training-mode", "sft"], ["--ebft-attention", "sdpa"]], ids=" ".join)
def test_killed_run(data, tmp_path, flags):
    flags = [*flags, "--deterministic-mode"]
    whole, killed = start(data, tmp_path / "whole", 6, *flags), start(data, tmp_path / "killed", 6, *flags)
    for line in killed.stdout:
        if line.startswith("saved"):
            killed.kill()
            break
    killed.communicate()
    finish(whole)
    finish(start(data, tmp_path / "killed", 6, *flags))
    expected, actual = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert expected and all(torch.equal(actual[name], expected[name]) for name in expected)


def test_it_learns(data, tmp_path):
    """Documents count in steps of 3: cross entropy and the distance of features fall."""
    finish(start(data, tmp_path / "run", 40, "--ebft-ce-coef", "0.1"))
    values = scalars(tmp_path / "run" / "tensorboard")
    for tag in ("eval/ce_loss", "eval/cfm"):
        before, after = (values[tag][i][1] for i in (0, -1))
        print(f"{tag} {before:.4f} -> {after:.4f}")
        assert after < 0.8 * before, tag
