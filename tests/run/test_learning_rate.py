"""The learning rate of every step, as logged, against its formula."""

import math

import pytest
from small_run import scalars, start

from megatron_ebft.run.loop import train

STEPS, BATCH, WARM_UP = 10, 2, 0.3
HIGHEST, LOWEST = 1e-2, 1e-3
SHAPES = {"constant": lambda x: 1.0, "linear": lambda x: 1 - x, "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2}
"""What is left of the rate above the lowest one, by the share of the decay that is over."""


@pytest.mark.parametrize("style", SHAPES)
def test_warm_up_and_decay(arguments, tmp_path, one_rank, style):
    """Megatron counts both in rows: those of all steps before this one, a global batch each."""
    run, log = start(arguments(
        "--training-mode", "sft", "--train-iters", str(STEPS), "--lr", str(HIGHEST), "--min-lr", str(LOWEST),
        "--lr-decay-style", style, "--lr-warmup-fraction", str(WARM_UP), "--eval-interval", "0", "--tensorboard-dir",
        str(tmp_path)))
    assert train(run, log)
    log.close(0.0)
    rows, warm_up = STEPS * BATCH, WARM_UP * STEPS * BATCH
    expected = []
    for done in range(0, rows, BATCH):
        if done <= warm_up:
            rate = HIGHEST * done / warm_up
        else:
            rate = LOWEST + (HIGHEST - LOWEST) * SHAPES[style]((done - warm_up) / (rows - warm_up))
        expected.append(pytest.approx(rate, rel=1e-5))
    logged = scalars(tmp_path)["train/lr"]
    assert [step for step, _ in logged] == list(range(1, STEPS + 1))
    assert [rate for _, rate in logged] == expected
