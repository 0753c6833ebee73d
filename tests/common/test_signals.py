"""Requests to stop, and processes that end with their parent; without torch, in processes of their own."""

import os
import signal
import subprocess
import sys
from pathlib import Path

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
ASKED = """
import signal
from megatron_ebft.common import signals
signal.signal(signal.SIGHUP, signal.{hangup})  # SIG_IGN: under nohup
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests may run in the background, where it is ignored
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # by a job script, until there is a handler
signals.install_handlers()
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.raise_signal(number)
print(*signals.received, flush=True)
signal.raise_signal(signal.SIGINT)
"""
PARENT = """
import os, signal, time
from megatron_ebft.common import signals
parent = os.getpid()
if os.fork() == 0:
    signals.install_handlers()
    signals.end_with_parent(signal.SIGTERM, parent)
    print("ready", flush=True)
    while not signals.received:
        time.sleep(0.01)
    print(*signals.received, flush=True)
else:
    signal.pause()
"""


def test_signals_that_ask_a_run_to_stop():
    """Those that whoever started the run wants ignored stay ignored. A second Ctrl-C ends it at once."""
    for hangup, expected in (("SIG_DFL", "SIGHUP SIGINT SIGTERM SIGUSR1"), ("SIG_IGN", "SIGINT SIGTERM SIGUSR1")):
        asked = subprocess.run([sys.executable, "-c", ASKED.format(hangup=hangup)], env=ENVIRONMENT, text=True,
                               capture_output=True)
        assert asked.stdout.strip() == expected and "KeyboardInterrupt" in asked.stderr


def test_a_process_hears_of_its_parents_end():
    """Of USR1, which kills torchrun."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT], env=ENVIRONMENT, text=True, stdout=subprocess.PIPE)
    assert parent.stdout.readline() == "ready\n"
    parent.send_signal(signal.SIGUSR1)
    assert parent.communicate(timeout=60)[0] == "SIGTERM\n"
