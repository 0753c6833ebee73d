#!/usr/bin/env python3
"""Stands in for python in a job, and plays what ENDINGS says: its n-th word is what the ranks do at their n-th start.

0, 64, 65, 75, 1   end with this exit code
save-1             leave a newer checkpoint, then end so
signal-75          wait for SIGUSR1 or SIGTERM (if it came too early: 3 seconds after the stop file), then end so
kill               rank 3 kills itself, the others wait for ever
The checks before take PREFLIGHT_SECONDS and pass.
"""

import os
import signal
import sys
import time
from pathlib import Path

if "tools/preflight.py" in sys.argv:
    time.sleep(float(os.environ.get("PREFLIGHT_SECONDS", "0")))
    sys.exit(0)

received = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, _: received.append(signal.Signals(number).name))
value = dict(zip(sys.argv, sys.argv[1:]))
save, rank, logs = Path(value["--save"]), int(os.environ["RANK"]), Path(os.environ["LOGS"])
starts = len(list(save.glob(f"logs/{logs.name.split('.')[0]}.*.*")))
*acts, ending = os.environ["ENDINGS"].split()[starts - 1].split("-")
print(f"rank {rank} of {os.environ['WORLD_SIZE']}: {starts}: {acts} {ending}", flush=True)
for act in acts:
    if act == "save":
        (save / "latest_checkpointed_iteration.txt").write_text(str(starts))
    left = 60
    while act == "signal" and not received and left:
        left -= os.path.exists(value["--ebft-stop-file"])
        time.sleep(0.05)
    print(f"rank {rank} got {received}", flush=True)
if ending == "kill" and rank == 3:
    os.kill(os.getpid(), signal.SIGKILL)
while ending == "kill":
    time.sleep(1)
os._exit(int(ending))
