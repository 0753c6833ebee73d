"""What this machine has, and what models are built from: the one file that decides.

1. Layers are Transformer Engine's (--transformer-impl) with CUDA and --bf16, else Megatron-Core's own on torch. Not in
   float32: Transformer Engine multiplies float32 matrices in TF32, and then a sampler and a trainer of other shapes
   differ by more than the first-step check allows.
2. Attention is FlexAttention (--ebft-attention) on GPUs, else torch's SDPA in chunks (attention.py).
3. Compiled element-wise kernels (SwiGLU; bias, dropout and residual) on GPUs. GELU is left alone: Megatron-Core's fused
   one is the tanh approximation, another model. Rotary embedding is ours (rotary.py): Megatron-Core's fused ones take
   no positions that vary over a batch.
   Masked softmax and persistent layer norm belong to modules that are not used here.
4. A Transformer Engine that does not import, and everything written for GPUs where there is none, is hidden from
   Megatron-Core before that is imported (`settle_accelerators`): it would fail with them, or hand CPU tensors to CUDA
   kernels.
5. Weight gradients are added to the float32 buffer inside the matrix product by Transformer Engine's layers, and in
   Megatron-Core's own (the output head, always) where apex has its kernel for it. Megatron-Core's optimizer takes
   apex's Adam where Transformer Engine's is missing; nothing else of apex is used.

Imports nothing of Megatron-Core, so that `python -m megatron_ebft.environment` can say why that does not import.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import sys
import warnings
from dataclasses import dataclass, field

import torch

from megatron_ebft.common.device import have_gpu

OLDEST_TE, OLDEST_FLEX = (2, 9), (2, 11)
"""The first Transformer Engine with te.autocast and te.is_fp8_available; the first torch whose FlexAttention this was
written against."""
RAGGED_TE = (2, 20)
"""A Transformer Engine that gathers at full precision, over tensor ranks, what is not in whole blocks of FP8; 2.11
asserts that there is no such thing."""
FLEX_HEAD_DIMS = range(16, 257)
"""Head dimensions of FlexAttention's kernels: the least is torch's, the most what it has settings for."""
NO_GPU = "no CUDA device"
FOR_GPUS = ("transformer_engine", "transformer_engine_torch", "apex", "amp_C", "fused_weight_gradient_mlp_cuda")
"""Optional packages whose kernels Megatron-Core takes wherever they import."""


@dataclass(frozen=True)
class Found:
    """What there is. A reason is "" where nothing is missing."""

    gpu: str | None = None
    """Name and compute capability of this rank's GPU."""
    transformer_engine: str | None = None
    """Version, where it imports."""
    no_transformer_engine: str = NO_GPU
    """Why its layers cannot be used."""
    apex: bool = False
    """NVIDIA's, not the project of that name on PyPI."""
    weight_gradients: bool = False
    """Apex's kernel that adds weight gradients to the buffer."""
    no_compiler: str = NO_GPU
    """Why torch.compile cannot make GPU kernels."""
    no_fp8: dict[str, str] = field(default_factory=lambda: {"tensorwise": NO_GPU, "blockwise": NO_GPU})
    """By recipe, why it cannot be used."""


@dataclass(frozen=True)
class Choice:
    """What a model is built from."""

    transformer_impl: str
    """`transformer_engine` or `local`."""
    attention_kernel: str
    """`flex` or `sdpa`."""
    fused_elementwise: bool
    fused_weight_gradients: bool
    """In Megatron-Core's own layers."""


@functools.cache
def found() -> Found:
    """What this process has; looked up once."""
    if not have_gpu():
        return Found()
    major, minor = torch.cuda.get_device_capability()
    version, missing = _transformer_engine()
    return Found(
        gpu=f"{torch.cuda.get_device_name()} (compute capability {major}.{minor})", transformer_engine=version,
        no_transformer_engine=missing, apex=importlib.util.find_spec("amp_C") is not None,
        weight_gradients=importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None,
        no_compiler=_no_compiler(), no_fp8=_no_fp8(missing))


def settle_accelerators() -> None:
    """Hide from Megatron-Core the optional packages that cannot be used here; runs before it is imported."""
    if not have_gpu():
        for name in FOR_GPUS:
            _hide(name)
    elif _import_error():
        for name in FOR_GPUS[:2]:
            _hide(name)


def _hide(package: str) -> None:
    """Make every later import of a package fail as if it were not installed, unless it was imported already."""
    if package not in sys.modules:
        sys.modules[package] = None


@functools.cache
def _import_error() -> str:
    """Why Transformer Engine does not import, or ""."""
    if importlib.util.find_spec("transformer_engine") is None:
        return "Transformer Engine is not installed"
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # its parts are loaded from several packages, each with errors of its own
        for name in [name for name in sys.modules if name.split(".")[0] in FOR_GPUS[:2]]:
            del sys.modules[name]
        reason = (str(error).splitlines() or [""])[0]
        return f"Transformer Engine does not import ({type(error).__name__}: {reason})"
    return ""


def _transformer_engine() -> tuple[str | None, str]:
    """Version and why its layers cannot be used."""
    if _import_error():
        return None, _import_error()
    try:
        version = importlib.metadata.version("transformer_engine")
    except importlib.metadata.PackageNotFoundError:
        return None, "Transformer Engine has no version, its installation is incomplete"
    if numbers(version) < OLDEST_TE:
        return version, f"Transformer Engine {version} is older than {'.'.join(map(str, OLDEST_TE))}"
    return version, ""


def _no_fp8(missing: str) -> dict[str, str]:
    """Transformer Engine's own word on its FP8 recipes."""
    if missing:
        return {"tensorwise": missing, "blockwise": missing}
    import transformer_engine.pytorch as te

    return {"tensorwise": te.is_fp8_available(return_reason=True)[1],
            "blockwise": te.is_fp8_block_scaling_available(return_reason=True)[1]}


def _no_compiler() -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not any(map(shutil.which, filter(None, (os.environ.get("CC"), "cc", "gcc", "clang")))):
        return "no C compiler (set CC), which triton needs"
    return ""


COMPILATIONS = 64
"""Variants of a function that may be compiled; torch gives up after 8 by default."""


def compiled(function):
    """`function` as compiled kernels on a GPU, one for any number of rows; as it is where torch cannot compile.

    Rows are the first dimension of its tensors. Other sizes and plain numbers are constants to the compiler: indices
    divided by unknown sizes made a rotary kernel take nine times as long on an H100.
    """

    @functools.wraps(function)
    def call(*args):
        if found().no_compiler:
            return function(*args)
        for x in args:
            if isinstance(x, torch.Tensor):
                torch._dynamo.maybe_mark_dynamic(x, 0)
        return _compiled(function)(*args)

    return call


@functools.cache
def _compiled(function):
    return compile_kernels(function, COMPILATIONS)


def compile_kernels(function, most: int):
    """torch.compile for every shape anew, for up to `most` shapes."""
    config = torch._dynamo.config
    config.recompile_limit = max(most, config.recompile_limit)
    return torch.compile(function, dynamic=False, fullgraph=True)


def numbers(version: str) -> tuple[int, int]:
    """Major and minor of a version."""
    return tuple(int(x) for x in re.findall(r"\d+", version)[:2])


def choose(transformer_impl: str = "auto", attention: str = "auto", *, dtype: torch.dtype, head_dim: int) -> Choice:
    """What a model of `dtype` parameters and heads of `head_dim` is built from, here.

    Raises:
        ValueError: naming the flag and the missing part, where what is asked for cannot be.
    """
    here = found()
    no_te, no_flex = no_transformer_engine(dtype), no_flex_attention(dtype, head_dim)
    for flag, asked, name, missing in (("--transformer-impl", transformer_impl, "transformer_engine", no_te),
                                       ("--ebft-attention", attention, "flex", no_flex)):
        if asked == name and missing:
            raise ValueError(f"{flag} {name}: {missing}")
    if here.gpu and attention == "auto" and no_flex:
        _warn_once(f"attention falls back to torch's SDPA in chunks, which is slower: {no_flex}")
    return Choice("local" if transformer_impl == "local" or no_te else "transformer_engine",
                  "sdpa" if attention == "sdpa" or no_flex else "flex",
                  fused_elementwise=not here.no_compiler, fused_weight_gradients=here.weight_gradients)


def no_transformer_engine(dtype: torch.dtype) -> str:
    """Why Transformer Engine's layers are not for models of this dtype here, or ""."""
    wrong = "" if dtype == torch.bfloat16 else "for --bf16 alone: it multiplies float32 matrices in TF32"
    return found().no_transformer_engine or wrong


def gathers_whole_blocks() -> bool:
    """Whether blockwise FP8 over tensor ranks that share a sequence needs whole blocks, 128 tokens, on each of them."""
    version = found().transformer_engine
    return version is not None and numbers(version) < RAGGED_TE


def no_flex_attention(dtype: torch.dtype, head_dim: int) -> str:
    """Why FlexAttention cannot run here, or ""."""
    if found().no_compiler:
        return found().no_compiler
    if numbers(torch.__version__) < OLDEST_FLEX:
        return f"torch {torch.__version__} is older than {'.'.join(map(str, OLDEST_FLEX))}"
    if dtype not in (torch.bfloat16, torch.float32):
        return f"FlexAttention has no kernels for {str(dtype).removeprefix('torch.')}"
    if head_dim not in FLEX_HEAD_DIMS:
        return f"FlexAttention has no kernels for heads of {head_dim}"
    return ""


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)
