"""What is available on this machine, and which kernels models are built from. All such choices are made here.

1. Layers are Transformer Engine's with CUDA and --bf16, else Megatron-Core's own (--transformer-impl). In float32 they
   are Megatron-Core's: Transformer Engine multiplies float32 matrices in TF32, so that the log-probabilities of sampler
   and training pass would differ by more than the first-step check allows.
2. Attention is FlexAttention on GPUs, else torch's SDPA in chunks (--ebft-attention, attention.py).
3. On GPUs, element-wise operations (SwiGLU; bias, dropout and residual) are compiled kernels. GELU is not fused:
   Megatron-Core's fused GELU is the tanh approximation, which is another function. Rotary embedding is ours
   (rotary.py), because Megatron-Core's fused ones take no positions that vary over a batch. Masked softmax and
   persistent layer norm belong to modules that are not used.
4. Optional packages that cannot be used are hidden from Megatron-Core before its import (`settle_accelerators`): a
   Transformer Engine that does not import, and all GPU packages where there is no GPU. Megatron-Core would fail with
   them, or pass CPU tensors to CUDA kernels.
5. Transformer Engine's layers add weight gradients to the float32 buffer inside the matrix product. Megatron-Core's own
   layers, which always include the output head, do so where apex has its kernel for it. Megatron-Core's optimizer takes
   apex's Adam where Transformer Engine's is missing. Nothing else of apex is used.

This module imports nothing of Megatron-Core, so that `python -m megatron_ebft.environment` works where that does not
import.
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
"""The first Transformer Engine with te.autocast and te.is_fp8_available; the oldest torch whose FlexAttention
flex_attention.py was written against."""
RAGGED_TE = (2, 20)
"""A Transformer Engine that gathers an incomplete FP8 block over tensor ranks, at full precision; 2.11 asserts that all
blocks are whole."""
FLEX_HEAD_DIMS = range(16, 257)
"""Head dimensions of FlexAttention's kernels: from torch's minimum to the largest one that it has settings for."""
NO_GPU = "no CUDA device"
FOR_GPUS = ("transformer_engine", "transformer_engine_torch", "apex", "amp_C", "fused_weight_gradient_mlp_cuda")
"""Optional packages whose kernels Megatron-Core uses wherever they import."""


@dataclass(frozen=True)
class Available:
    """What this machine has. The fields `no_…` are the reason why something cannot be used, "" where it can."""

    gpu: str | None = None
    """Name and compute capability of this rank's GPU; None without one."""
    transformer_engine: str | None = None
    """Version; None where it does not import."""
    no_transformer_engine: str = NO_GPU
    """Of its layers."""
    apex: bool = False
    """NVIDIA's apex, not the project of that name on PyPI."""
    weight_gradients: bool = False
    """Apex's kernel that adds weight gradients to the buffer."""
    no_compiler: str = NO_GPU
    """Of torch.compile for GPU kernels."""
    no_fp8: dict[str, str] = field(default_factory=lambda: {"tensorwise": NO_GPU, "blockwise": NO_GPU})
    """Of each FP8 recipe."""


@dataclass(frozen=True)
class Choice:
    """The kernels that a model is built from."""

    transformer_impl: str
    """`transformer_engine` or `local`."""
    attention_kernel: str
    """`flex` or `sdpa`."""
    fused_elementwise: bool
    fused_weight_gradients: bool
    """In Megatron-Core's own layers; Transformer Engine's always do it."""


@functools.cache
def available() -> Available:
    """What this process can use; looked up once."""
    if not have_gpu():
        return Available()
    major, minor = torch.cuda.get_device_capability()
    version, missing = _transformer_engine()
    return Available(
        gpu=f"{torch.cuda.get_device_name()} (compute capability {major}.{minor})", transformer_engine=version,
        no_transformer_engine=missing, apex=importlib.util.find_spec("amp_C") is not None,
        weight_gradients=importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None,
        no_compiler=_no_compiler(), no_fp8=_no_fp8(missing))


def settle_accelerators() -> None:
    """Hide optional packages that cannot be used from Megatron-Core; must run before its import."""
    if not have_gpu():
        for name in FOR_GPUS:
            _hide(name)
    elif _import_error():
        for name in FOR_GPUS[:2]:
            _hide(name)


def _hide(package: str) -> None:
    """Make later imports of a package fail as if it were not installed, unless it is imported already."""
    if package not in sys.modules:
        sys.modules[package] = None


@functools.cache
def _import_error() -> str:
    """Why Transformer Engine does not import; "" if it does."""
    if importlib.util.find_spec("transformer_engine") is None:
        return "Transformer Engine is not installed"
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # it loads parts of several packages, which raise errors of many kinds
        for name in [name for name in sys.modules if name.split(".")[0] in FOR_GPUS[:2]]:
            del sys.modules[name]
        reason = (str(error).splitlines() or [""])[0]
        return f"Transformer Engine does not import ({type(error).__name__}: {reason})"
    return ""


def _transformer_engine() -> tuple[str | None, str]:
    """Its version, and why its layers cannot be used."""
    if _import_error():
        return None, _import_error()
    try:
        version = importlib.metadata.version("transformer_engine")
    except importlib.metadata.PackageNotFoundError:
        return None, "Transformer Engine has no version: its installation is incomplete"
    if numbers(version) < OLDEST_TE:
        return version, f"Transformer Engine {version} is older than {'.'.join(map(str, OLDEST_TE))}"
    return version, ""


def _no_fp8(missing: str) -> dict[str, str]:
    """Why Transformer Engine says it cannot run each FP8 recipe.

    Args:
        missing: why Transformer Engine itself cannot be used, or "".
    """
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
"""How many variants of a function may be compiled; torch's default is 8."""


def compiled(function):
    """Decorator: run `function` as a compiled kernel on a GPU, and as it is where torch cannot compile.

    One kernel serves any number of rows (the first dimension of its tensors). Other sizes, and numbers, are constants
    of a kernel: a rotary kernel that divided indices by unknown sizes took nine times as long on an H100.
    """

    @functools.wraps(function)
    def call(*args):
        if available().no_compiler:
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
    """torch.compile with one kernel for each shape, for up to `most` shapes."""
    config = torch._dynamo.config
    config.recompile_limit = max(most, config.recompile_limit)
    return torch.compile(function, dynamic=False, fullgraph=True)


def numbers(version: str) -> tuple[int, int]:
    """Major and minor number of a version."""
    return tuple(int(x) for x in re.findall(r"\d+", version)[:2])


def choose(transformer_impl: str = "auto", attention: str = "auto", *, dtype: torch.dtype, head_dim: int) -> Choice:
    """The kernels for a model with parameters of `dtype` and heads of `head_dim` dimensions on this machine.

    Args:
        transformer_impl: --transformer-impl.
        attention: --ebft-attention.

    Raises:
        ValueError: naming the flag and what is missing, if a choice that was asked for cannot run.
    """
    here = available()
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
    """Why models of this dtype cannot have Transformer Engine's layers; "" if they can."""
    wrong = "" if dtype == torch.bfloat16 else "only with --bf16: it multiplies float32 matrices in TF32"
    return available().no_transformer_engine or wrong


def gathers_whole_blocks() -> bool:
    """Whether blockwise FP8 with sequence parallelism needs whole blocks of 128 tokens on each tensor rank."""
    version = available().transformer_engine
    return version is not None and numbers(version) < RAGGED_TE


def no_flex_attention(dtype: torch.dtype, head_dim: int) -> str:
    """Why FlexAttention cannot run; "" if it can."""
    if available().no_compiler:
        return available().no_compiler
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
