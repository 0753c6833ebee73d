"""Folders that cannot be written are found when a run starts, on every rank."""

import os

import pytest
import torch.distributed as dist
from ranks import enter_world, run_ranks
from small_run import MODEL, SMALL

from megatron_ebft.checkpointing.lock import FolderLock
from megatron_ebft.common.device import init_device
from megatron_ebft.run.build import build_run
from megatron_ebft.run.ending import is_first_to_say
from megatron_ebft.run.flags import parse_args
from megatron_ebft.run.folders import claim_folders


def refused(flags: list[str], blind: bool = False) -> tuple[str, bool]:
    """What a rank says of the folders, and whether it is the one to say it. A blind rank 1 has a disk of its own."""
    args, isdir = parse_args(flags), os.path.isdir
    if blind and dist.get_rank() == 1:
        os.path.isdir = lambda path: isdir(path) and "probe" not in path
    try:
        lock = claim_folders(args)
    except ValueError as error:
        return f"{error}", is_first_to_say(f"{error}")
    finally:
        os.path.isdir = isdir
    if lock is not None:
        lock.release()
    return "", False


def refused_on_two_ranks(data: list[str], folder: str) -> list:
    """For each folder that cannot be written, one that another run has, and one that ranks do not share."""
    init_device()
    enter_world(2)
    os.environ["TORCHELASTIC_RUN_ID"] = "test"
    flags = [*data, *MODEL, *SMALL, "--train-iters", "4"]
    said = [refused([*flags, flag, f"{folder}/file/new"])
            for flag in ("--save", "--tensorboard-dir", "--ebft-dump-steps")]
    said += [refused([*flags, "--save", f"{folder}/held"])]
    said += [refused([*flags, "--save", f"{folder}/new"], blind) for blind in (True, False)]
    del os.environ["TORCHELASTIC_RUN_ID"]
    dist.destroy_process_group()
    return said


def test_every_rank_refuses_and_one_says_so(data, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "held").mkdir()
    lock = FolderLock(str(tmp_path / "held"))
    lock.acquire()
    first, second = run_ranks(2, "test_folders:refused_on_two_ranks", data, str(tmp_path))
    lock.release()
    for (text, is_first), (same, is_second), flag in zip(
            first, second, ("--save", "--tensorboard-dir", "--ebft-dump-steps", "--save", "--save", "")):
        assert text == same and is_first + is_second == bool(text)
        assert text.startswith(f"{flag} {tmp_path}") if flag else not text
        assert "file/new" not in text or f"{tmp_path}/file cannot be written (Not a directory)" in text
    assert f"held: process {os.getpid()} on " in first[3][0]
    assert "rank 1 on" in first[4][0] and "does not see what rank 0 wrote there" in first[4][0]
    assert os.listdir(tmp_path / "new") == []


@pytest.mark.parametrize("is_given", [True, False])
def test_indices_that_cannot_be_written(arguments, data, tmp_path, one_rank, is_given):
    """Where the flag names the folder, and where it is beside data that cannot be written."""
    (tmp_path / "file").write_text("")
    args = arguments()
    if is_given:
        args.data_cache_path = str(tmp_path / "file")
    else:
        for suffix in (".bin", ".idx"):
            os.link(args.data_path[0] + suffix, tmp_path / f"text{suffix}")
        args.data_path = [str(tmp_path / "text")]
        (tmp_path / "text").write_text("")  # the indices would go to text/cache
    with pytest.raises(ValueError, match="--data-cache-path .*cannot be written"):
        build_run(args)
