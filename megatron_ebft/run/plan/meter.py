"""Measures one rank's step: live bytes by kind, operations and collectives by phase. Works on fake and real tensors.

1. A tensor's memory counts from the operation that returns its storage until the storage is freed. Temporaries inside
   an operation do not count.
2. A storage's kind is that of the `kind` block it was made in, unless `label` changes it. Tensors made outside such a
   block are activations, or logits if their last dimension is a vocabulary shard.
3. Operations are those of matrix products and attention, by torch's formulas (torch.utils.flop_counter).
4. The time of an operation is its `cost`: the longer of computing and of moving what it reads and writes. Operations
   run one after the other; views are free.
"""

import weakref
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from megatron_ebft.run.plan import attention_flops  # noqa: F401 (registers formulas)
from megatron_ebft.run.plan.collectives import Traffic


@dataclass
class Phase:
    """What was measured in one phase of a step."""

    flops: int = 0
    seconds: float = 0.0
    """Time of operations, by `cost`."""
    peak: dict[str, int] = field(default_factory=dict)
    """Live bytes by kind when their sum was largest."""
    traffic: Traffic = field(default_factory=Traffic)


@dataclass
class _Storage:
    bytes: int
    kind: str
    reference: weakref.ref


class Meter(TorchDispatchMode):
    """Measures while it is entered. Called with a phase's name it is the `phase` of loop.train_step.

    Args:
        vocab_shard: last dimension of logits.
        cost: (floating-point operations, bytes) → seconds of an operation.
    """

    def __init__(self, vocab_shard: int, cost: Callable[[int, int], float] = lambda flops, size: 0.0):
        super().__init__()
        self.vocab_shard, self.cost = vocab_shard, cost
        self.phases: dict[str, Phase] = {}
        self.bytes: dict[str, int] = defaultdict(int)
        """Live bytes by kind."""
        self._total = self._peak = 0
        self._storages: dict[int, _Storage] = {}
        self._kind = "activations"
        self._phase = Phase()

    @contextmanager
    def __call__(self, name: str):
        """Inside, everything counts for this phase. Phases of the same name add up."""
        before, self._phase = self._phase, self.phases.setdefault(name, Phase())
        self._peak = sum(self._phase.peak.values())
        self._note_peak()
        with self._phase.traffic.without_objects():
            yield
        self._phase, self._peak = before, sum(before.peak.values())

    @contextmanager
    def kind(self, name: str):
        """Tensors made inside are of this kind."""
        before, self._kind = self._kind, name
        yield
        self._kind = before

    def label(self, tensor: torch.Tensor, kind: str) -> None:
        """Set the kind of a tensor's storage."""
        self._see(tensor)
        storage = self._storages[tensor.untyped_storage()._cdata]
        self.bytes[storage.kind] -= storage.bytes
        self.bytes[kind] += storage.bytes
        storage.kind = kind

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # called very often
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace == "c10d":
            self._phase.traffic.count(func, args)
        elif not func.is_view:
            made = [out] if isinstance(out, torch.Tensor) else [x for x in tree_leaves(out)
                                                                if isinstance(x, torch.Tensor)]
            for x in made:
                self._see(x)
            formula = flop_registry.get(func._overloadpacket)
            flops = 0 if formula is None else formula(*args, **kwargs, out_val=out)
            size = sum(x.nbytes for x in made) + sum(x.nbytes for x in args if isinstance(x, torch.Tensor))
            self._phase.flops += flops
            self._phase.seconds += self.cost(flops, size)
        return out

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # nothing is compiled here, and torch's guard against it costs time
        return False

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        kind = self._kind
        if kind == "activations" and tensor.dim() > 1 and tensor.shape[-1] == self.vocab_shard:
            kind = "logits"
        size = storage.nbytes()
        self._storages[key] = _Storage(size, kind, weakref.ref(storage, lambda _: self._freed(key)))
        self.bytes[kind] += size
        self._total += size
        self._note_peak()

    def _note_peak(self) -> None:
        if self._total > self._peak:
            self._peak, self._phase.peak = self._total, dict(self.bytes)

    def _freed(self, key: int) -> None:
        storage = self._storages.pop(key)
        self.bytes[storage.kind] -= storage.bytes
        self._total -= storage.bytes
