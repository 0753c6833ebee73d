"""Runs one rank of any cluster on one CPU: the real code, on tensors without data, among ranks that do not exist.

1. torch's "fake" process group has any number of ranks and moves nothing.
2. Tensors are fake (shape and type only), except small tensors of integers and booleans. These hold the layout's
   indices, whose values decide shapes. Reading a number from a fake tensor gives a plausible one (SCALARS).
3. Parts that a lone rank cannot run are replaced during the simulation: gloo groups beside the fake ones, and
   collectives of Python objects. The package itself knows nothing of the simulation.
"""

from contextlib import ExitStack, contextmanager
from functools import partial
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SCALARS = {torch.bool: False, torch.int64: 1, torch.int32: 1}
"""Numbers read from fake tensors. A float is 2.0, which makes sense as a gradient norm (clipped), a sum and a count."""
REAL_ELEMENTS = 1 << 20
"""Tensors of integers with more elements are fake, too."""


class Simulated(TorchDispatchMode):
    """Runs on top of FakeTensorMode and handles the operations that need values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            return _collective(func, args)
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return SCALARS.get(args[0].dtype, 2.0)
        if any(type(x) is FakeTensor for x in args):
            return func(*args, **kwargs)
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if any(isinstance(x, FakeTensor) or x.is_floating_point() for x in inputs):
            return func(*args, **kwargs)
        if inputs and not (kwargs.get("dtype") or torch.int64).is_floating_point:
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        out = func(*args, **kwargs)
        if not isinstance(out, torch.Tensor) or out.is_floating_point() or out.numel() > REAL_ELEMENTS:
            return out
        with unset_fake_temporarily():
            return func(*args, **kwargs)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # nothing is compiled here, and the guard costs time
        return False


def _convert(module: torch.nn.Module, convert, recurse: bool = True) -> torch.nn.Module:
    """Module._apply for fake parameters. torch refuses to swap them, so parameters that change are replaced."""
    for child in module.children():
        _convert(child, convert)
    with torch.no_grad():
        for name, parameter in module._parameters.items():
            if parameter is not None and (converted := convert(parameter)) is not parameter:
                module._parameters[name] = torch.nn.Parameter(converted, parameter.requires_grad)
                vars(module._parameters[name]).update(vars(parameter))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = convert(buffer)
    return module


class _FusedRMSNorm(torch.autograd.Function):
    """Allocates and saves what a GPU's fused kernel does. On a CPU, RMSNorm is a dozen operations."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def _tensor(plain, data, *args, **kwargs) -> torch.Tensor:
    """torch.tensor that also takes lists of fake scalars, which it flattens."""
    if isinstance(data, list) and any(isinstance(x, FakeTensor) for x in tree_leaves(data)):
        return torch.stack(tree_leaves(data))
    return plain(data, *args, **kwargs)


def _collective(func, args):
    """The result of a collective: its first argument and a finished Work, or the Work alone."""
    group = next(x for x in args if isinstance(x, torch.ScriptObject))
    with unset_fake_temporarily():
        _, work = torch.ops.c10d.broadcast_([torch.empty(0)], group, 0, 0, True)
    return (args[0], work) if len(func._schema.returns) == 2 else work


def _all_the_same(gathered: list, own, group=None) -> None:
    """all_gather_object, as if every rank had this rank's object."""
    gathered[:] = [own] * len(gathered)


@contextmanager
def simulated_rank(rank: int, world_size: int):
    """Inside, torch.distributed runs as this rank of a world of this size."""
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_ebft.model import kernels
    from megatron_ebft.run import models

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    with _replaced((kernels, "available", kernels.Available),  # kernels of a GPU take no fake tensors
                   (parallel_state, "initialize_model_parallel",
                    partial(parallel_state.initialize_model_parallel, create_gloo_process_groups=False)),
                   (models, "get_megatron_optimizer",
                    partial(models.get_megatron_optimizer, use_gloo_process_groups=False)),
                   (dist, "all_gather_object", _all_the_same),
                   (dist, "broadcast_object_list", lambda *args, **kwargs: None)):
        yield


@contextmanager
def fake_tensors():
    """Inside, tensors are made without data."""
    with _replaced((torch.nn.Module, "_apply", _convert), (torch, "tensor", partial(_tensor, torch.tensor))), \
         FakeTensorMode(allow_non_fake_inputs=True), Simulated():
        yield


@contextmanager
def gpu_operations():
    """Inside, fake tensors use as much memory as a GPU where a GPU's kernels differ from a CPU's."""
    from megatron_ebft.model import log_probabilities
    from megatron_ebft.rollout import token_sampling

    with _replaced((log_probabilities, "temporary_elements", lambda: 1 << 27),
                   (token_sampling, "temporary_elements", lambda: 1 << 27),
                   (torch.nn.RMSNorm, "forward", lambda self, x: _FusedRMSNorm.apply(x, self.weight))):
        yield


@contextmanager
def _replaced(*patches):
    with ExitStack() as stack:
        for owner, name, replacement in patches:
            stack.enter_context(mock.patch.object(owner, name, replacement))
        yield
