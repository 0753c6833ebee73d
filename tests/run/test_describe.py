"""What a run says of the fused step on a GPU, from measured times of launches and of products."""

import pytest
from small_run import MODEL, SMALL

from megatron_ebft.run.describe import launch_estimate, rows_to_hide_launches
from megatron_ebft.run.flags import parse_args

ROLLOUTS = 127 * 4


def test_rows_that_hide_launches():
    """On the H100, rollouts of 4 rows of a quarter of 8B waited for launches, and those of 1B waited longer."""
    quarter = rows_to_hide_launches(2_800_000_000, 8, ROLLOUTS, peak=989)
    small = rows_to_hide_launches(1_240_000_000, 16, ROLLOUTS, peak=989)
    assert 4 < quarter < 7 and small > 3 * quarter
    assert rows_to_hide_launches(2_800_000_000, 8, 2 * ROLLOUTS, peak=989) == pytest.approx(quarter / 2)


@pytest.mark.parametrize("gpu, flags, rows", [
    ("NVIDIA H100 80GB HBM3", ["--ebft-step", "auto", "--bf16"], 10),
    ("NVIDIA H100 80GB HBM3", ["--ebft-step", "fused"], 1),
    ("NVIDIA H100 80GB HBM3", ["--ebft-step", "separate"], None),
    ("NVIDIA H100 80GB HBM3", ["--recompute-granularity", "full"], None),
    ("CPU", ["--ebft-step", "auto"], None)])
def test_a_gpu_is_told_how_many_rows_pay(gpu, flags, rows):
    args = parse_args([*MODEL, *SMALL, "--train-iters", "1", "--data-path", "rows", *flags])
    said = launch_estimate(args, 700_000_000, ROLLOUTS, gpu)
    assert len(said) == (rows is not None)
    assert not said or said[0].endswith(f"--micro-batch-size, here 1, is below {rows}")
