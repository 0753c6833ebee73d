"""python -m megatron_ebft.environment: what was found on this machine, and what training will use."""

import importlib
import importlib.metadata
import platform
import sys
import warnings

import torch

from megatron_ebft import __version__
from megatron_ebft.common.device import init_device
from megatron_ebft.model import kernels


def report() -> str:
    """Versions, GPU, Transformer Engine, apex, FP8 recipes and kernels, line by line."""
    available = kernels.available()
    mixed = torch.bfloat16
    lines = [("megatron_ebft", __version__), ("python", platform.python_version()),
             ("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'not in this build'}"),
             ("megatron-core", _megatron_core()), ("GPU", available.gpu or kernels.NO_GPU),
             ("Transformer Engine", available.transformer_engine or available.no_transformer_engine),
             ("apex", _apex(available)), ("kernels by torch.compile", available.no_compiler or "yes")]
    lines += [(f"FP8 {recipe}", missing or "yes") for recipe, missing in available.no_fp8.items()]
    used = []
    for name, dtype in (("--bf16", mixed), ("float32", torch.float32)):
        choice = kernels.choose(dtype=dtype, head_dim=128)
        used += [(f"layers, {name}", _because(choice.transformer_impl, kernels.no_transformer_engine(dtype))),
                 (f"attention, {name}", _because({"flex": "FlexAttention", "sdpa": "torch's SDPA, in chunks"}[
                     choice.attention_kernel], kernels.no_flex_attention(dtype, 128)))]
    used += [("SwiGLU and residual", "compiled" if choice.fused_elementwise else "torch, one operation at a time"),
             ("weight gradients", _weight_gradients(available, choice))]
    return "\n".join(["found", *map(_line, lines), "", "used, unless flags say otherwise", *map(_line, used)])


def _line(entry: tuple[str, str]) -> str:
    return f"  {entry[0]:26}{entry[1]}"


def _because(what: str, why: str) -> str:
    return f"{what} ({why})" if why else what


def _megatron_core() -> str:
    try:
        importlib.import_module("megatron.core")
    except Exception as error:  # a broken Transformer Engine breaks it in many ways
        return f"does not import ({type(error).__name__}: {error})"
    return importlib.metadata.version("megatron-core")


def _apex(available: kernels.Available) -> str:
    if not available.apex:
        return "not installed; not required"
    return "yes, with" + ("" if available.weight_gradients else "out") + " its kernel for weight gradients"


def _weight_gradients(available: kernels.Available, choice: kernels.Choice) -> str:
    has_fused_layers = not available.no_transformer_engine or choice.fused_weight_gradients
    layers = "in the matrix product" if has_fused_layers else "apart"
    head = "in the matrix product" if choice.fused_weight_gradients else "apart (needs apex)"
    return f"added {layers} in layers (--bf16), {head} in the head"


def main() -> None:
    warnings.filterwarnings("ignore", module=r"megatron\.|torch")
    init_device()
    print(report())


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
