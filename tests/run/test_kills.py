"""A run on two ranks that is killed and stopped again and again."""

import signal

import kills


def test_kills(data, tmp_path):
    """SIGKILL twice, USR1 and TERM once: see kills.py, which kills twenty times by hand."""
    kinds = [signal.SIGKILL, signal.SIGUSR1, signal.SIGKILL, signal.SIGTERM]
    steps = kills.STEPS_BETWEEN * (len(kinds) + 1)
    kills.interrupted_run(tmp_path / "broken", data, steps, kinds, seed=0)
    kills.interrupted_run(tmp_path / "whole", data, steps, [], seed=0)
    assert kills.compare(tmp_path / "whole", tmp_path / "broken") > 300
