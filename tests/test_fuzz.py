"""A few trials of fuzz.py, the same every time."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_random_flags_and_damaged_files_end_well_or_are_named():
    """In a process of its own, whose trials fork from it before torch has any thread."""
    command = [sys.executable, "tests/fuzz.py", "--flags", "20", "--files", "20"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "40 trials" in done.stdout
