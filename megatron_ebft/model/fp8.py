"""FP8 in rollouts of the policy, in the frozen encoder and, by Megatron's flags, in the training pass.

1. The linear layers of a decoder layer run in FP8 (e4m3). Attention, norms, embedding, output head and sampling do not.
   The first and last layers may be excluded.
2. blockwise: activations in blocks of 1 × 128, weights in blocks of 128 × 128, scales that are powers of two. The
   quantisation of a token does not depend on the rest of its batch. tensorwise: one scale for each tensor. It is faster
   and coarser, and depends on how rows are cut into micro-batches and on which rollouts are left out.
3. Weights are quantised once, when `quantised` is entered, and forgotten when it is left, so that none survive an
   optimizer step (Megatron-Core up to 0.18 does not refresh them by itself).
4. On Hopper, Transformer Engine's autocast runs around each layer. Elsewhere, `emulate` computes the same numbers in
   Megatron-Core's own layers: weights and inputs are rounded to values of FP8, and multiplied as usual.
5. FP8 in training is Megatron-Core's (--fp8-format, --fp8-recipe), in Transformer Engine's layers only. It is switched
   on for the training pass alone: evaluation measures the model at full precision, and rollouts have their own recipe.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from megatron_ebft.model import kernels
from megatron_ebft.model.fp8_sizes import BLOCK
from megatron_ebft.model.weights import local_layers, unwrap
from megatron_ebft.parallel.groups import tp_group

LARGEST = torch.finfo(torch.float8_e4m3fn).max


@dataclass(frozen=True)
class FP8:
    """Which layers of a model run in FP8, and how."""

    recipe: str = "off"
    """`off`, `blockwise` or `tensorwise`."""
    emulate: bool = False
    at_start: int = 0
    """Number of layers kept out of FP8 at the start of the whole model."""
    at_end: int = 0
    """The same at its end."""
    flag: str = "--ebft-rollout-fp8"
    """The flag that chose the recipe, for error messages."""

    def check(self, no_transformer_engine: str) -> None:
        """Check that it can run on this machine.

        Args:
            no_transformer_engine: why layers are not Transformer Engine's, or "".

        Raises:
            ValueError: naming the flag and what is missing.
        """
        if self.recipe == "off":
            return
        missing = no_transformer_engine or kernels.available().no_fp8[self.recipe]
        if missing and not self.emulate:
            raise ValueError(f"{self.flag} {self.recipe}: {missing}. --ebft-fp8-emulate computes the same numbers "
                             "without it, slowly; off turns FP8 off")
        if self.emulate and not no_transformer_engine:
            raise ValueError("--ebft-fp8-emulate: needs Megatron-Core's own layers; add --transformer-impl local")


@contextlib.contextmanager
def quantised(chunks: list, fp8: FP8) -> Iterator[None]:
    """Context in which forward passes of one model, given as its stages, run in FP8; without gradients."""
    with contextlib.ExitStack() as stack:
        if fp8.recipe != "off":
            assert not torch.is_grad_enabled()
            run_in_fp8 = _emulated if fp8.emulate else _by_transformer_engine
            for layer in _layers(chunks, fp8):
                stack.enter_context(run_in_fp8(layer, fp8.recipe))
        yield


@contextlib.contextmanager
def training(policy: list) -> Iterator[None]:
    """Context in which forward and backward passes of the policy run in FP8, if --fp8-format is set.

    The first micro-batch of a schedule quantises the weights anew.
    """
    configs = [unwrap(chunk).config for chunk in policy]
    for config in configs:
        config.fp8 = config.training_fp8
    try:
        yield
    finally:
        for config in configs:
            config.fp8 = None


def _layers(chunks: list, fp8: FP8) -> list[torch.nn.Module]:
    """The decoder layers on this rank that run in FP8."""
    return [layer for chunk in chunks for number, layer in local_layers(chunk).items()
            if fp8.at_start < number <= unwrap(chunk).config.num_layers - fp8.at_end]


# ---------------------------------------------------------------- Transformer Engine


@contextlib.contextmanager
def _by_transformer_engine(layer: torch.nn.Module, recipe: str) -> Iterator[None]:
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import Float8BlockScaling, Float8CurrentScaling, Format

    scaling = Float8BlockScaling() if recipe == "blockwise" else Float8CurrentScaling(fp8_format=Format.E4M3)
    forward = layer.forward

    def in_fp8(*args, **kwargs):
        with te.autocast(enabled=True, recipe=scaling, amax_reduction_group=tp_group()):
            return forward(*args, **kwargs)

    layer.forward = in_fp8
    _forget_weights(layer)
    try:
        yield
    finally:
        del layer.forward
        _forget_weights(layer)


def _forget_weights(layer: torch.nn.Module) -> None:
    """Make the next forward pass quantise the weights anew; later ones reuse them."""
    for module in layer.modules():
        if hasattr(module, "is_first_microbatch"):
            module.is_first_microbatch = True
        workspaces = getattr(module, "_fp8_workspaces", None)
        if workspaces:
            workspaces.clear()


# ---------------------------------------------------------------- emulation


@contextlib.contextmanager
def _emulated(layer: torch.nn.Module, recipe: str) -> Iterator[None]:
    linears = [module for module in layer.modules() if isinstance(module, ColumnParallelLinear | RowParallelLinear)]
    weights = [linear.weight.data for linear in linears]
    hooks = [linear.register_forward_pre_hook(
        lambda _, inputs: (round_activations(inputs[0], recipe), *inputs[1:])) for linear in linears]
    try:
        for linear, weight in zip(linears, weights):
            linear.weight.data = round_weights(weight, recipe)
        yield
    finally:
        for linear, weight, hook in zip(linears, weights, hooks):
            linear.weight.data = weight
            hook.remove()


def round_activations(x: Tensor, recipe: str) -> Tensor:
    """x [..., H] rounded to FP8 values: with a scale for each block of 128 along H, or one scale."""
    if recipe == "tensorwise":
        return _round(x, x.abs().amax(), False)
    blocks = torch.nn.functional.pad(x, (0, -x.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    rounded = _round(blocks, blocks.abs().amax(-1, keepdim=True), True)
    return rounded.flatten(-2)[..., : x.shape[-1]]


def round_weights(weight: Tensor, recipe: str) -> Tensor:
    """A matrix rounded to FP8 values: with a scale for each block of 128 × 128, or one scale."""
    if recipe == "tensorwise":
        return _round(weight, weight.abs().amax(), False)
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
    rounded = _round(blocks, blocks.abs().amax((1, 3), keepdim=True), True)
    return rounded.flatten(2).flatten(0, 1)[:rows, :columns].contiguous()


def _round(x: Tensor, largest: Tensor, is_power_of_two: bool) -> Tensor:
    """x rounded to e4m3 and back, scaled so that `largest` (broadcast to x) is the largest value of e4m3."""
    scale = largest.float().clamp(min=1e-30) / LARGEST
    if is_power_of_two:
        scale = scale.log2().ceil().exp2()
    scaled = (x.float() / scale).clamp(-LARGEST, LARGEST)
    return (scaled.to(torch.float8_e4m3fn).float() * scale).to(x.dtype)
