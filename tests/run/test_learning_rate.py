"""The learning rate of every step, as logged, against its formula; also of runs that go on with other flags."""

import math

import pytest
from small_run import scalars, start

from megatron_ebft.run.describe import describe
from megatron_ebft.run.loop import train
from megatron_ebft.run.stopping import StopAsked

STEPS, BATCH, WARM_UP = 10, 2, 0.3
HIGHEST, LOWEST = 1e-2, 1e-3
SHAPES = {"constant": lambda x: 1.0, "linear": lambda x: 1 - x, "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2}
"""What is left of the rate above the lowest one, by the share of the decay that is over."""
FLAGS = ["--training-mode", "sft", "--lr", str(HIGHEST), "--min-lr", str(LOWEST), "--lr-warmup-fraction", str(WARM_UP),
         "--eval-interval", "0"]


def rate(style: str, consumed: int, warm_up: float, rows: int):
    """The rate of the step after `consumed` of `rows` rows."""
    if consumed <= warm_up:
        return pytest.approx(HIGHEST * consumed / warm_up, rel=1e-5)
    return pytest.approx(LOWEST + (HIGHEST - LOWEST) * SHAPES[style]((consumed - warm_up) / (rows - warm_up)), rel=1e-5)


@pytest.fixture
def trained(arguments, tmp_path, one_rank):
    """Flags → what they train: the description of the run, and its rates by step. Saves in one folder.

    Args of the function:
        stop: the step after which the run is asked to stop.
    """

    def run_to(*flags: str, stop: int | None = None) -> tuple[str, list[float]]:
        folder = str(tmp_path / f"logs{len(list(tmp_path.iterdir()))}")
        run, log = start(arguments(*FLAGS, "--save", str(tmp_path / "run"), "--load", str(tmp_path / "run"),
                                   "--tensorboard-dir", folder, *flags))

        def check(steps: int = 1, problem=None) -> None:
            if run.state.iteration == stop:
                raise StopAsked("by the test")

        run.stopper.check = check
        said = describe(run)
        assert train(run, log) == (stop is None)
        log.close(0.0)
        return said, [value for _, value in scalars(folder)["train/lr"]]

    return run_to


@pytest.mark.parametrize("style", SHAPES)
def test_warm_up_and_decay(trained, style):
    """Megatron counts both in rows: those of all steps before this one, a global batch each."""
    rates = trained("--train-iters", str(STEPS), "--lr-decay-style", style)[1]
    rows = STEPS * BATCH
    assert rates == [rate(style, done, WARM_UP * rows, rows) for done in range(0, rows, BATCH)]


@pytest.mark.parametrize("batch", [1, 8])
def test_the_decay_ends_at_the_last_step_whatever_the_batch(trained, batch):
    """Rows to come are steps left × batch, also where the same flags resume once more."""
    flags = ["--train-iters", str(STEPS), "--lr-decay-style", "linear"]
    first = trained(*flags, stop=5)[1]
    more = [*flags, "--global-batch-size", str(batch)]
    rates = first + trained(*more, stop=7)[1] + trained(*more)[1]
    consumed = [*range(0, 5 * BATCH, BATCH), *range(5 * BATCH, 5 * BATCH + 5 * batch, batch)]
    warm_up, rows = WARM_UP * STEPS * BATCH, 5 * BATCH + 5 * batch
    assert rates == [*(rate("linear", done, warm_up, STEPS * BATCH) for done in consumed[:5]),
                     *(rate("linear", done, warm_up, rows) for done in consumed[5:])]


@pytest.mark.parametrize("style", ["constant", "linear"])
def test_a_finished_run_is_extended_by_a_larger_train_iters(trained, style):
    """A constant rate stays, without another warm-up. A decay ends at the new last step, and the log says so."""
    flags = ["--lr-decay-style", style, "--train-iters"]
    trained(*flags, "4")
    said, rates = trained(*flags, "16", stop=6)
    said_again, more = trained(*flags, "16")
    assert "--train-iters 4 → 16" in said and "--train-iters 4" not in said_again
    for text in (said, said_again):
        assert ("linear decay to --min-lr 0.001 at step 16" in text) == (style == "linear"), text
    warm_up = int(WARM_UP * 4 * BATCH)
    assert rates + more == [rate(style, done, warm_up, 16 * BATCH) for done in range(4 * BATCH, 16 * BATCH, BATCH)]


def test_another_schedule_needs_a_word(trained):
    flags = ["--train-iters", "4", "--lr-decay-style", "linear"]
    trained(*flags, stop=1)
    flags = ["--train-iters", "4", "--lr-decay-style", "cosine", "--min-lr", "2e-3"]
    with pytest.raises(ValueError, match="^--min-lr 0.002, --lr-decay-style cosine: --load .* was trained with "
                                         "--min-lr 0.001, --lr-decay-style linear: .*--override-opt-param-scheduler"):
        trained(*flags)
    flags += ["--use-checkpoint-opt-param-scheduler"]
    rates = trained(*flags, stop=2)[1]
    said, more = trained(*flags)
    assert "--min-lr 0.001 →" not in said
    assert rates + more == [rate("linear", done, int(WARM_UP * 8), 8) for done in (2, 4, 6)]
