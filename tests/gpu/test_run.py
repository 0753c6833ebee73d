"""The training command on one GPU: it learns, and with --deterministic-mode it continues a killed run bit for bit."""

import os
import signal
import subprocess
import sys

import kills
import pytest
import torch
from test_training import scalars, weights

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("one_rank")]
MODEL = ("--num-layers 4 --hidden-size 256 --ffn-hidden-size 512 --num-attention-heads 4 --num-query-groups 2 --bf16 "
         "--seq-length 128 --global-batch-size 4 --lr 3e-3 --eval-iters 1 --ebft-eval-length 8 --tokenizer-type "
         "NullTokenizer --vocab-size 64").split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return kills.dataset(tmp_path_factory.mktemp("data"))


def start(data, folder, steps: int, *flags: str) -> subprocess.Popen:
    boot = "import importlib.util as u, sys, runpy\nif u.find_spec('te_boot'): import te_boot; te_boot.boot()\n"
    command = boot + "sys.argv[0] = 'train'; runpy.run_module('megatron_ebft.train', run_name='__main__')"
    return subprocess.Popen(
        [sys.executable, "-c", command, *data, *MODEL, "--train-iters", str(steps), "--save-interval", str(steps // 2),
         "--eval-interval", str(steps // 2), "--save", str(folder), "--load", str(folder), *flags], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)


def finish(process) -> None:
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output[-3000:]


@pytest.mark.parametrize("flags", [["--deterministic-mode"], []], ids=["deterministic", "default"])
def test_killed_run(data, tmp_path, flags):
    whole, killed = start(data, tmp_path / "whole", 6, *flags), start(data, tmp_path / "killed", 6, *flags)
    for line in killed.stdout:
        if line.startswith("saved"):
            os.killpg(killed.pid, signal.SIGKILL)
            break
    killed.communicate()
    finish(whole)
    finish(start(data, tmp_path / "killed", 6, *flags))
    expected, actual = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    equal = sum(torch.equal(actual[name], expected[name]) for name in expected)
    print(f"{equal} of {len(expected)} tensors are equal bit for bit")
    assert equal == len(expected) or not flags


def test_it_learns(data, tmp_path):
    """Documents count in steps of 3: cross entropy and the distance of features fall."""
    finish(start(data, tmp_path / "run", 40, "--ebft-ce-coef", "0.1"))
    found = scalars(tmp_path / "run" / "tensorboard")
    for tag in ("eval/ce_loss", "eval/cfm"):
        before, after = (found[tag][i][1] for i in (0, -1))
        print(f"{tag} {before:.4f} -> {after:.4f}")
        assert after < 0.8 * before, tag
