"""The optimizer's part of a checkpoint, with what Megatron-Core 0.16.1 … 0.19.2 gets wrong about it."""

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_ebft.checkpointing.sharded_weights import SHARDING
from megatron_ebft.common.device import device
from megatron_ebft.common.errors import NotFinite
from megatron_ebft.model.weights import unwrap


def optimizer_kind(optimizer) -> dict:
    """What decides whether a saved optimizer state fits this optimizer; a part of the record."""
    return {"class": type(_inner(optimizer)[0]).__name__, "sharding": SHARDING["distrib_optim_sharding_type"]}


def check_finite(model: list, optimizer) -> None:
    """Look at every weight and moment of this rank, on the device and without a copy. All ranks must call.

    Raises:
        NotFinite: on every rank, if a weight or moment of any rank is not finite; names some of them.
    """
    tensors = dict(_floats(model, optimizer))
    largest = [torch.linalg.vector_norm(tensor, float("inf")).float() for tensor in tensors.values()]
    is_bad = ~torch.stack(largest).isfinite() if largest else torch.zeros(1, dtype=torch.bool, device=device())
    count = is_bad.sum()
    dist.all_reduce(count)
    if count.item():
        names = [None] * dist.get_world_size()
        dist.all_gather_object(names, [name for name, bad in zip(tensors, is_bad.tolist()) if bad][:3])
        named = ", ".join(sorted({name for some in names for name in some})[:3])
        raise NotFinite(f"weights or moments are not finite ({named}); lower --lr, raise --adam-eps or lower "
                        "--clip-grad")


def _floats(model: list, optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    """This rank's weights, and the float32 weights and moments of its share of the optimizer, by name."""
    for i, chunk in enumerate(model):
        for name, parameter in unwrap(chunk).named_parameters():
            yield f"{name}{f' of chunk {i}' * (i > 0)}", parameter.detach()
    inner = _inner(optimizer)[0].optimizer
    for i, parameter in enumerate(x for group in inner.param_groups for x in group["params"]):
        yield f"the optimizer's weight {i}", parameter.detach()
        for key, value in inner.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel() > 1:
                yield f"{key} of the optimizer's weight {i}", value


def sharded_optimizer_state(optimizer, weights: dict, is_loading: bool = False) -> dict:
    """Megatron-Core's sharded state dict of the optimizer.

    Args:
        weights: sharded weights of the model that it optimizes (sharded_weights.py).
        is_loading: make the template of a load instead of the data of a save.
    """
    _begin_adam_state(optimizer)
    with torch.no_grad(), _aligned_buckets(_inner(optimizer)[0]):
        state = optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=dict(SHARDING))
    if state.get("param_state", state) is None:  # only the first data-parallel rank has gathered it
        del state["param_state"]  # otherwise Megatron-Core warns about ranks that differ
    return state


def load_optimizer_state(optimizer, loaded: dict, keep_lr: bool) -> None:
    """optimizer.load_state_dict, with three things mended.

    1. The step count of torch's Adam. Megatron-Core drops a count of 0 (plain optimizers). For the distributed
       optimizer it takes the count from the groups, one tensor for all parameters, and then misses it among the
       parameters' tensors; torch would add to the shared tensor once per parameter.
    2. The learning-rate bounds of the groups. 0.16 always lets the saved ones win, 0.19 fails.
    3. β and ε. torch lets the saved ones win, whatever the flags of this run say.

    Args:
        keep_lr: the present bounds win (--override-opt-param-scheduler), not the saved ones.

    Raises:
        AssertionError, KeyError: the saved state belongs to other parameter groups.
    """
    inner, is_torch = _inner(optimizer)
    saved = loaded.get("optimizer", loaded)
    if is_torch and "state" in saved:
        saved["state"].setdefault("common_step", torch.tensor(0.0))
    kind = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")
    groups = {tuple(map(group.get, kind)): group for group in inner.optimizer.param_groups}
    for group in saved["param_groups"]:
        own = groups[tuple(map(group.get, kind))]
        winner, loser = (own, group) if keep_lr else (group, own)
        loser.update({bound: winner[bound] for bound in ("max_lr", "min_lr")})
        group.update({name: own[name] for name in ("betas", "eps")})
    parameter_state = loaded.pop("param_state", None)
    optimizer.load_state_dict(loaded)
    states = [(inner.optimizer.state[parameter], group)
              for group in inner.optimizer.param_groups for parameter in group["params"]] if is_torch else []
    steps = [float(group.get("step", state.pop("step"))) for state, group in states]
    if parameter_state is not None:
        inner.load_parameter_state_from_fully_reshardable(parameter_state)
    for (state, _), step in zip(states, steps):
        state["step"] = torch.tensor(step)


@contextlib.contextmanager
def _aligned_buckets(inner):
    """Correct the distributed optimizer's sharded_state_dict for several buckets.

    Megatron-Core gathers the buckets without the padding at their ends, and then looks for parameters at their padded
    places. Whatever follows a padded bucket (overlapped gradient reduction, tied embeddings over a pipeline) would be
    saved at the wrong place.
    """
    if not isinstance(inner, DistributedOptimizer):
        yield
        return
    gather_buffers = inner.get_parameter_state_dp_zero

    def gather(**kwargs):
        gathered = gather_buffers(**kwargs)  # None except on the first data-parallel rank
        for number, buffer in enumerate(inner.buffers if gathered else ()):
            for tensors in gathered[number].values():
                tensors.update({key: _align(tensor, buffer) for key, tensor in tensors.items()
                                if key != "numel_unpadded"})
        return gathered

    inner.get_parameter_state_dp_zero = gather
    try:
        yield
    finally:
        del inner.get_parameter_state_dp_zero


def _align(gathered: torch.Tensor, buffer) -> torch.Tensor:
    """A gathered buffer with the padding of its buckets put back, float32 [buffer.numel]."""
    if len(buffer.buckets) == 1:
        return gathered
    aligned = torch.zeros(buffer.numel)
    for bucket, part in zip(buffer.buckets, gathered.split([bucket.numel_unpadded for bucket in buffer.buckets])):
        aligned[bucket.offset:bucket.offset + len(part)] = part
    return aligned


def _inner(optimizer):
    """Megatron's optimizer inside the chain (there is one: no experts), and whether it steps torch's Adam."""
    if isinstance(optimizer, ChainedOptimizer):
        optimizer, = optimizer.chained_optimizers
    return optimizer, isinstance(optimizer.optimizer, torch.optim.Adam | torch.optim.AdamW)


def _begin_adam_state(optimizer) -> None:
    """Give Adam the state of step 0 if it has none: Megatron-Core reads it even before the first step."""
    inner, is_torch = _inner(optimizer)
    if not inner.optimizer.state:
        inner.init_state_fn(inner.optimizer, inner.config)
        if is_torch:
            for state in inner.optimizer.state.values():
                state["step"] = torch.tensor(0.0)
