"""The random states of the ranks, as tensors of a checkpoint: whoever reads them unpickles nothing.

Each kind of state is a tensor with one row per rank. They fit the same layout and the same kind of device only.
"""

import math
import random

import numpy
import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor
from torch import Tensor

from megatron_ebft.common.device import have_gpu

KEY = "rng_state"


def random_states() -> dict[str, ShardedTensor]:
    """The states of this rank: the data of a save, and the template of a load."""
    rank, size = dist.get_rank(), dist.get_world_size()
    return {name: ShardedTensor.from_rank_offsets(f"{KEY}.{name}", state[None].contiguous(), (0, rank, size))
            for name, state in _current().items()}


def random_states_template(stored: dict[str, tuple[int, ...]], objects: set[str]) -> dict | ShardedObject | None:
    """What to load from a checkpoint of the same layout; None if its ranks computed on another kind of device.

    Args:
        stored: shapes of its tensors by key.
        objects: keys of its objects. Format 3 kept the states in one object per rank.
    """
    legacy = ShardedObject(KEY, {}, (dist.get_world_size(),), (dist.get_rank(),))
    if legacy.unique_key in objects:
        return legacy
    template = random_states()
    return template if all(stored.get(x.key) == tuple(x.global_shape) for x in template.values()) else None


def restore_random_states(loaded: dict) -> None:
    """Set every random generator of this rank to the states that were loaded.

    Raises:
        ValueError, KeyError, TypeError, RuntimeError: these are no states.
    """
    if "python" in loaded and not isinstance(loaded["python"], Tensor):
        python, (kind, *keys), tracked = loaded["python"], loaded["numpy"], loaded["tracker"]
        cpu, gpu = loaded["torch"], loaded["cuda"]
    else:
        version, *internal, gauss = loaded["python"].flatten().tolist()
        python = int(version), tuple(map(int, internal)), None if math.isnan(gauss) else gauss
        *words, position, has_gauss, cached = loaded["numpy"].flatten().tolist()
        kind, keys = "MT19937", (list(map(int, words)), int(position), int(has_gauss), cached)
        cpu, gpu = loaded["torch"].flatten(), loaded["cuda"].flatten() if have_gpu() else None
        tracked = {name.removeprefix("tracker."): state.flatten() for name, state in loaded.items()
                   if name.startswith("tracker.")}
    random.setstate(python)
    numpy.random.set_state((kind, *keys))
    torch.set_rng_state(cpu)
    if have_gpu():
        torch.cuda.set_rng_state(gpu)
    tensor_parallel.get_cuda_rng_tracker().set_states(tracked)


def _current() -> dict[str, Tensor]:
    """The states of this rank by name: float64 for Python's and numpy's (32-bit words fit), uint8 for the others."""
    version, internal, gauss = random.getstate()
    kind, keys, *rest = numpy.random.get_state()
    assert kind == "MT19937", kind
    tracked = tensor_parallel.get_cuda_rng_tracker().get_states()
    return {"python": torch.tensor([version, *internal, math.nan if gauss is None else gauss], dtype=torch.float64),
            "numpy": torch.tensor([*keys.tolist(), *rest], dtype=torch.float64), "torch": torch.get_rng_state(),
            **({"cuda": torch.cuda.get_rng_state()} if have_gpu() else {}),
            **{f"tracker.{name}": state for name, state in tracked.items()}}
