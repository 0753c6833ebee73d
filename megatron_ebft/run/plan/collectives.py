"""Counts the collectives of a block of code: calls and bytes by operation and process group.

1. Counting happens where torch.distributed hands an operation to its backend (the c10d operators). It sees every call
   through any function, for NCCL, gloo and torch's fake backend.
2. Bytes are those of one rank's message: the tensor for all-reduce, broadcast, send and receive; the output for
   all-gather; the input for reduce-scatter and all-to-all.
3. Groups of one rank, barriers and collectives of Python objects are not counted.
"""

from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_ebft.parallel import groups

MESSAGES = {
    "allreduce_": ("all-reduce", 0), "allreduce_coalesced_": ("all-reduce", 0), "broadcast_": ("broadcast", 0),
    "allgather_": ("all-gather", 0), "_allgather_base_": ("all-gather", 0),
    "allgather_into_tensor_coalesced_": ("all-gather", 0), "allgather_coalesced_": ("all-gather", 0),
    "reduce_scatter_": ("reduce-scatter", 1), "_reduce_scatter_base_": ("reduce-scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce-scatter", 1),
    "alltoall_": ("all-to-all", 1), "alltoall_base_": ("all-to-all", 1),
    "send": ("send", 0), "recv_": ("receive", 0)}
"""c10d operators: name of the operation, and position of the message among the arguments."""
OBJECT_COLLECTIVES = ("all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list")


@dataclass
class Flow:
    """Collectives of one kind in one group."""

    calls: int = 0
    bytes: int = 0


class Traffic(TorchDispatchMode):
    """Counts the collectives that are called inside its context.

    Attributes:
        flows: by (operation, group), for example ("all-reduce", "tensor").
        ranks: ranks of each group that occurs.
    """

    def __init__(self):
        super().__init__()
        self.flows: dict[tuple[str, str], Flow] = defaultdict(Flow)
        self.ranks: dict[str, list[int]] = {}
        self._objects = 0  # depth of nested collectives of objects
        self._quiet = None

    def __enter__(self):
        self._quiet = self.without_objects()
        self._quiet.__enter__()
        return super().__enter__()

    def __exit__(self, *exc):
        self._quiet.__exit__(*exc)
        return super().__exit__(*exc)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.count(func, args)
        return func(*args, **(kwargs or {}))

    def count(self, func, args) -> None:
        """Count one call of a c10d operator.

        Raises:
            NotImplementedError: the operator is not in MESSAGES.
        """
        name = func._opname
        if self._objects or "barrier" in name:
            return
        if name not in MESSAGES:
            raise NotImplementedError(f"no rule to count the bytes of c10d.{name}")
        group = next(dist.ProcessGroup.unbox(x) for x in args if _is_group(x))
        if group.size() == 1:
            return
        operation, place = MESSAGES[name]
        role = group_role(group)
        self.ranks[role] = dist.get_process_group_ranks(group)
        flow = self.flows[operation, role]
        flow.calls += 1
        flow.bytes += sum(x.nbytes for x in tree_leaves(args[place]) if isinstance(x, torch.Tensor))

    @contextmanager
    def without_objects(self):
        """Collectives of Python objects, which send tensors too, are not counted inside."""
        with mock.patch.multiple(dist, **{name: self._uncounted(vars(dist)[name]) for name in OBJECT_COLLECTIVES}):
            yield

    def _uncounted(self, function):
        def call(*args, **kwargs):
            self._objects += 1
            try:
                return function(*args, **kwargs)
            finally:
                self._objects -= 1
        return call


def _is_group(value) -> bool:
    return isinstance(value, torch.ScriptObject) and value._type().name() == "ProcessGroup"


def group_role(group: dist.ProcessGroup) -> str:
    """The role of one of this rank's groups. An unknown group gets the role of a known one with the same ranks."""
    state, dp = parallel_state, parallel_state.get_data_parallel_group
    roles = {
        "tensor": state.get_tensor_model_parallel_group(), "pipeline": state.get_pipeline_model_parallel_group(),
        "data": dp(), "sample": groups.sample_group(), "wrap": groups.wrap_group(),
        "embedding": state.get_embedding_group(check_initialized=False),
        "position embedding": state.get_position_embedding_group(check_initialized=False),
        "model": state.get_model_parallel_group(), "world": dist.group.WORLD}
    roles = {role: known for role, known in roles.items() if isinstance(known, dist.ProcessGroup)}
    for role, known in roles.items():
        if known.group_name == group.group_name:
            return role
    ranks = dist.get_process_group_ranks(group)
    return next((role for role in ("data", "model", "world", "tensor", "pipeline")
                 if dist.get_process_group_ranks(roles[role]) == ranks), f"ranks {ranks[0]}-{ranks[-1]}")
