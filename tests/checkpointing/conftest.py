"""Checkpoints that the tests of this folder load and damage."""

import shutil
from pathlib import Path

import pytest
from checkpoint_runs import SmallRun


@pytest.fixture(scope="module")
def saved(tmp_path_factory, one_rank):
    """A directory with iterations 2 and 3, and the run that wrote them."""
    directory = tmp_path_factory.mktemp("saved")
    run = SmallRun().train(2)
    run.save(directory, 2)
    run.train(1).save(directory, 3)
    return directory, run


@pytest.fixture
def copy(saved, tmp_path):
    """A copy of `saved` to damage."""
    return Path(shutil.copytree(saved[0], tmp_path / "copy"))
