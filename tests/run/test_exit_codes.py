"""Exit codes of the training command."""

import errno
import os
import runpy

import pytest

from megatron_ebft.common import signals
from megatron_ebft.run import flags


@pytest.mark.parametrize("error, code", [(OSError(errno.ESTALE, "--load x: stale"), 74), (ValueError("wrong"), 64)])
def test_a_filesystem_that_does_not_answer(monkeypatch, capfd, error, code):
    """It has a code of its own: SLURM starts the job again."""
    def fails(argv):
        raise error

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(flags, "parse_args", fails)
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(signals, "install_handlers", lambda: None)
    with pytest.raises(SystemExit) as left:
        runpy.run_module("megatron_ebft.train", run_name="__main__")
    assert left.value.code == code and str(error.args[-1]) in capfd.readouterr().err
