"""NCCL's flight recorder: the last collectives of this rank, with sizes, groups and states, written when a rank hangs.

`torchfrtrace FOLDER --prefix nccl_trace_rank_` compares the files of all ranks and names the collective that one of
them has not joined.
"""

import os

import torch.distributed as dist

from megatron_ebft.common.disk import aside

COLLECTIVES = 2000


def keep() -> None:
    """Have NCCL keep records. Call before the process groups start."""
    if "TORCH_NCCL_TRACE_BUFFER_SIZE" not in os.environ:  # its old name, of which torch warns
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(COLLECTIVES))


def records() -> bytes | None:
    """What NCCL has recorded on this rank; None without NCCL."""
    if not (dist.is_nccl_available() and dist.get_backend() == "nccl"):
        return None
    from torch._C._distributed_c10d import _dump_nccl_trace  # a torch without CUDA lacks it

    return _dump_nccl_trace()


def write(folder: str) -> None:
    """Write this rank's records to `nccl_trace_rank_N`, if there are any. Errors of the disk are nobody's concern now.
    """
    recorded = records()
    if recorded is None:
        return
    path = os.path.join(folder, f"nccl_trace_rank_{dist.get_rank()}")
    try:
        os.makedirs(folder, exist_ok=True)
        with aside(path) as file:
            file.write_bytes(recorded)
    except OSError:
        return
