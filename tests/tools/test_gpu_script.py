"""tests/gpu/run.sh on a machine without a GPU: its commands are right, and a part that fails does not stop the next."""

import os
import subprocess
from pathlib import Path

from forked_python import forked_python

SCRIPT = Path(__file__).parents[1] / "gpu" / "run.sh"


def test_dry_run(tmp_path):
    out = tmp_path / "out"
    environment = os.environ | {"DRY": "1", "OUT": str(out), "SHAPES": "none small", "REPEATS": "1",
                                "CUDA_VISIBLE_DEVICES": ""}
    with forked_python(tmp_path) as variables:
        done = subprocess.run(["bash", str(SCRIPT), "report", "nonsense", "plan", "benchmark"],
                              env=environment | variables, text=True, capture_output=True, timeout=1800)
    summary = {line.split()[0]: line.split()[1] for line in (out / "summary.txt").read_text().splitlines()}
    assert done.returncode == 1 and "no stage 'nonsense'" in done.stderr, done.stderr
    assert summary == {
        "report": "ok", "plan_none": "FAILED", "plan_small": "ok", "benchmark_none": "FAILED",
        "benchmark_none_fp8": "FAILED", "benchmark_small": "ok", "benchmark_small_fp8": "ok",
    }, (out / "log.txt").read_text()
    assert {path.name for path in out.iterdir()} == {
        "summary.txt", "log.txt", "small.json", "benchmark_small.json", "benchmark_small_fp8.json"}
