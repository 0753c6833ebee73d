"""Saving: what a folder holds, saves that are killed, in the background or on a full disk, and old checkpoints."""

import contextlib
import functools
import json
import multiprocessing
import os
import resource
import select
import signal
from dataclasses import asdict
from unittest import mock

import pytest
from checkpoint_runs import META, SmallRun, equal_tensors

from megatron_ebft.checkpointing import saver as saver_module
from megatron_ebft.checkpointing.folders import MANIFEST, POINTER, complete_iterations, latest_iteration
from megatron_ebft.checkpointing.loader import load_checkpoint
from megatron_ebft.checkpointing.record import TrainState, read_metadata
from megatron_ebft.checkpointing.saver import Saver

pytestmark = pytest.mark.usefixtures("one_rank")
FORK = multiprocessing.get_context("fork")


def test_folder_layout(saved):
    directory, _ = saved
    assert sorted(os.listdir(directory)) == ["iter_0000002", "iter_0000003", "latest_checkpointed_iteration.txt"]
    assert (directory / POINTER).read_text() == "3" and latest_iteration(str(directory)) == 3
    record = json.loads((directory / "iter_0000003/ebft.json").read_text())
    assert record["metadata"] == META == read_metadata(str(directory))
    assert record["train_state"] == asdict(TrainState(3, 6))
    assert record["optimizer"] == {"class": "DistributedOptimizer", "sharding": "fully_reshardable"}
    assert set(record["layout"].values()) == {1}


def killed_save(run, folder, iteration) -> None:
    """A save that is killed just before its folder gets its name."""
    rename = os.rename

    def killed_before(source, target):
        if os.path.basename(source).startswith(f"iter_{iteration:07d}.tmp"):
            raise KeyboardInterrupt
        rename(source, target)

    with mock.patch("os.rename", killed_before), pytest.raises(KeyboardInterrupt):
        run.save(folder, iteration)


def test_a_killed_save_leaves_the_older_checkpoint(copy, saved):
    run = saved[1]
    killed_save(run, copy, 4)
    assert len(list(copy.glob("iter_0000004.tmp.*"))) == 1 and latest_iteration(str(copy)) == 3
    load_checkpoint(str(copy), *SmallRun().parts)
    run.save(copy, 5)
    assert not list(copy.glob("*.tmp*")) and latest_iteration(str(copy)) == 5


def test_a_save_over_an_iteration_is_safe(copy, saved):
    run = saved[1]
    killed_save(run, copy, 3)
    assert not (copy / "iter_0000003").exists() and latest_iteration(str(copy)) == 3
    assert load_checkpoint(str(copy), *SmallRun().parts)[0].iteration == 3  # from iter_0000003.old
    os.rename(copy / "iter_0000002", copy / "iter_0000009")
    run.save(copy, 3)
    assert sorted(os.listdir(copy)) == ["iter_0000003", "iter_0000009", "latest_checkpointed_iteration.txt"]
    load_checkpoint(str(copy), *SmallRun().parts)


def test_a_lost_pointer_means_the_newest(copy, tmp_path):
    os.remove(copy / POINTER)
    os.remove(copy / "iter_0000003" / MANIFEST)
    assert latest_iteration(str(copy)) == 2
    assert latest_iteration(str(tmp_path / "nothing")) is None


def test_a_directory_that_cannot_be_written(tmp_path, saved):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--save .*file: cannot write there"):
        saved[1].save(tmp_path / "file", 1)


def test_old_checkpoints_are_removed(saved, tmp_path):
    run = saved[1]
    saver = Saver(str(tmp_path), keep=2, retain_interval=4)
    for iteration in range(1, 8):
        saver.save(TrainState(iteration), *run.parts, META)
        saver.drop_old()
    assert complete_iterations(str(tmp_path)) == [4, 6, 7] and latest_iteration(str(tmp_path)) == 7
    assert sorted(os.listdir(tmp_path)) == [*(f"iter_000000{i}" for i in (4, 6, 7)), POINTER]


def test_a_save_leaves_no_process(saved):
    """Such as the server of Megatron-Core's queue: it would outlive a killed run and keep its output open."""
    assert not [process for process in multiprocessing.active_children() if "Manager" in process.name]


def _write_for_ever(output: int) -> None:
    """As Megatron-Core's writing process does, in one more process."""
    FORK.Process(target=signal.pause).start()
    os.write(output, b"writing")
    signal.pause()


def _rank(output: int) -> None:
    os.setsid()
    write = functools.partial(_write_for_ever, output)
    FORK.Process(target=saver_module._write_and_sum, args=(write, "", 0, os.getpid())).start()
    signal.pause()


def test_processes_that_write_end_with_a_killed_rank():
    reader, output = os.pipe()
    rank = FORK.Process(target=_rank, args=(output,))
    rank.start()
    os.close(output)
    assert os.read(reader, 7) == b"writing"
    rank.kill()
    rank.join()
    is_closed = select.select([reader], [], [], 20)[0] and os.read(reader, 1) == b""
    os.close(reader)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(rank.pid, signal.SIGKILL)
    assert is_closed


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path):
    run, saver = SmallRun().train(2), Saver(str(tmp_path), is_async=True)
    weights = run.weights()
    saver.save(TrainState(2), *run.parts, META)
    assert latest_iteration(str(tmp_path)) is None
    run.train(2)
    saver.save(TrainState(4), *run.parts, META)  # waits for the first
    assert latest_iteration(str(tmp_path)) == 2 and saver.finished() is not None
    while (folder := saver.finished()) is None:
        run.train(1)
    assert folder == str(tmp_path / "iter_0000004") and saver.finished() is None
    (tmp_path / POINTER).write_text("2")
    loaded = SmallRun()
    load_checkpoint(str(tmp_path), *loaded.parts)
    assert equal_tensors(loaded.weights(), weights) and not equal_tensors(run.weights(), weights)


@pytest.mark.parametrize("is_async", [False, True])
def test_a_full_disk_leaves_the_older_checkpoint(copy, saved, is_async, monkeypatch):
    run, saver = saved[1], Saver(str(copy), is_async=is_async)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save():
        saver.save(TrainState(4), *run.parts, META)
        return saver.finished(wait=True)

    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000_000, unlimited[1]))
        assert save() is not None
        os.rename(copy / "iter_0000004", copy / "iter_0000001")
        (copy / POINTER).write_text("3")
        for bytes_left, spare in ((10_000, 1000), (1000, 1 << 25)):  # tensors do not fit; nor does the room kept free
            monkeypatch.setattr(saver_module, "SPARE_BYTES", spare)
            resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, unlimited[1]))
            with pytest.raises(ValueError, match="--save .*: cannot write there .*Earlier checkpoints are untouched"):
                save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert latest_iteration(str(copy)) == 3 and load_checkpoint(str(copy), *SmallRun().parts)[0].iteration == 3
    assert save() == str(copy / "iter_0000004") and not list(copy.glob("*.tmp*"))
