"""Which checkpoint a command continues from."""

import json
import os
import shutil

import pytest
from small_run import MODEL, SMALL, save

from megatron_ebft.checkpointing.folders import MANIFEST, RECORD
from megatron_ebft.checkpointing.manifest import seal
from megatron_ebft.run.build import build_run
from megatron_ebft.run.flags import parse_args

pytestmark = pytest.mark.usefixtures("one_rank")


def rewrite_record(folder, change) -> None:
    """Change the record of a checkpoint, as another version could have written it."""
    record = json.loads((folder / RECORD).read_text())
    change(record)
    (folder / RECORD).write_text(json.dumps(record))
    os.remove(folder / MANIFEST)
    seal(str(folder))


@pytest.fixture(scope="module")
def starts(data, tmp_path_factory, one_rank):
    """What a run may begin with: a checkpoint of another run at step 1, or its weights alone."""
    folder = tmp_path_factory.mktemp("starts")
    args = parse_args([*data, *MODEL, *SMALL, "--train-iters", "4", "--training-mode", "sft", "--seed", "9"])
    run = build_run(args)
    run.state.iteration = 1
    save(run, folder / "checkpoint")
    shutil.copytree(folder / "checkpoint", folder / "weights")
    rewrite_record(folder / "weights/iter_0000001", lambda record: record.update(optimizer=None))
    return folder


@pytest.mark.parametrize("flags", [
    [], ["--pretrained-checkpoint", "weights"], ["--load", "weights"], ["--load", "checkpoint"]], ids=" ".join)
def test_the_same_command_continues_from_its_own_checkpoint(arguments, starts, tmp_path, flags):
    """Not from what it began with: that would drop the checkpoints in --save."""
    others = [] if flags else ["--pretrained-checkpoint", str(starts / "weights")]
    common = ["--training-mode", "sft", "--save", str(tmp_path / "run")]
    flags = [*common, *(str(starts / flag) if flag in ("weights", "checkpoint") else flag for flag in flags)]
    run = build_run(arguments(*flags))
    assert run.state.iteration == flags[-1].endswith("checkpoint")
    for iteration in (2, 3):
        run.state.iteration = iteration
        save(run, tmp_path / "run")
        if iteration == 2:  # earlier versions did not record it
            rewrite_record(tmp_path / "run/iter_0000002", lambda record: record["metadata"].pop("beginning"))
        run = build_run(arguments(*flags))
        assert run.state.iteration == iteration
    with pytest.raises(ValueError, match="iter_0000003 there is of a run that began with .*add --load .*/run; for"):
        build_run(arguments(*common, *others))
