"""The folders that a run writes into are checked at its start, not at its first checkpoint."""

import os
import secrets
import socket

import torch.distributed as dist

from megatron_ebft.checkpointing.errors import writing
from megatron_ebft.checkpointing.lock import FolderLock
from megatron_ebft.common.disk import check_writable
from megatron_ebft.parallel.errors import collective_errors
from megatron_ebft.run.sinks.weights_and_biases import import_wandb


def tensorboard_folder(args) -> str:
    """The folder of --tensorboard-dir, or its default."""
    return args.tensorboard_dir or os.path.join(args.save or ".", "tensorboard")


def wandb_folder(args) -> str:
    """The folder of --wandb-save-dir, or its default."""
    return args.wandb_save_dir or os.path.join(args.save or ".", "wandb")


def check_folders(args) -> None:
    """ValueError, naming the flag, unless the folders that rank 0 writes into can be written, and the package of
    --wandb-project is there."""
    if args.save:
        check_writable(args.save, "--save")
    if args.tensorboard_dir or not args.save:
        check_writable(tensorboard_folder(args), "--tensorboard-dir")
    if args.ebft_dump_steps:
        check_writable(args.ebft_dump_steps, "--ebft-dump-steps")
    if args.wandb_project:
        import_wandb(args.wandb_project)
        check_writable(wandb_folder(args), "--wandb-save-dir")


def claim_folders(args) -> FolderLock | None:
    """Check all folders, and lock --save for this run. All ranks call; rank 0 of a run with --save gets the lock.

    Raises:
        ValueError: on every rank. A folder cannot be written, --save is not the same folder on every rank, or another
            run has it.
    """
    with collective_errors():
        if dist.get_rank() == 0:
            check_folders(args)
    if not args.save:
        return None
    lock = FolderLock(args.save) if dist.get_rank() == 0 else None
    with collective_errors(), writing(args.save, "--save"):
        if lock is not None:
            os.makedirs(args.save, exist_ok=True)
            lock.acquire()
    try:
        _check_shared(args.save)
    except BaseException:
        if lock is not None:
            lock.release()
        raise
    return lock


def _check_shared(folder: str) -> None:
    """Every rank must see what rank 0 writes into a folder, and be able to write there."""
    is_main, name = dist.get_rank() == 0, [f"probe.{secrets.token_hex(4)}"]
    dist.broadcast_object_list(name)
    probe = os.path.join(folder, name[0])
    with collective_errors(), writing(folder, "--save"):
        if is_main:
            os.mkdir(probe)
    try:
        with collective_errors():
            if not os.path.isdir(probe):
                raise ValueError(f"--save {folder}: rank {dist.get_rank()} on {socket.gethostname()} does not see what "
                                 "rank 0 wrote there; name a folder on a file system that all ranks share")
            check_writable(probe, "--save")
    finally:
        if is_main:
            os.rmdir(probe)
