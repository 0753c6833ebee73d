"""A standard output that cannot be written does not end a process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PRINTS = """
import sys
from megatron_ebft.common.console import keep_going
keep_going()
for line in range(3):
    print("line", line, flush=True)
print("trained", file=sys.stderr)
"""


@pytest.mark.parametrize("sink", ["full", "closed"])
def test_lines_are_lost_with_one_warning(sink):
    reader, writer = os.pipe()
    os.close(reader)
    with open("/dev/full" if sink == "full" else writer, "w") as stdout:
        run = subprocess.run([sys.executable, "-c", PRINTS], stdout=stdout, stderr=subprocess.PIPE, text=True,
                             env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])})
    why = "No space left on device" if sink == "full" else "Broken pipe"
    assert run.returncode == 0
    assert run.stderr == f"warning: stdout cannot be written ({why}); lines are lost. The run goes on\ntrained\n"
