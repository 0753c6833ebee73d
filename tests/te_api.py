"""What is called of Transformer Engine against the real one, of any version, on a machine without a GPU:

    pip download --no-deps transformer_engine && unzip -q -d te transformer_engine-*.whl
    python tests/te_api.py te

FOLDER holds an unpacked wheel or an installation: its Python is imported, its kernels are not. Layers of every kind are
built, by Megatron-Core as on a GPU; what is read and set on them must be there; the recipe and number format asked for
must be in force, in rollouts and in training; and with the three kernels of a layer in full precision written in torch,
the golden steps must come out. Passes in FP8 need its kernels: tests/gpu.
"""

import dataclasses
import enum
import importlib.abc
import importlib.machinery
import inspect
import os
import re
import sys
import types
from pathlib import Path
from unittest.mock import MagicMock

import torch

TESTS = Path(__file__).resolve().parent
KERNELS, OPTIONAL = "transformer_engine_torch", ("onnx", "onnxscript", "triton", "einops")
CACHING = {"self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"}


class Enumeration(type):
    """A class of the kernels' library: any member it is asked for is a number of its own."""

    count = 0

    def __getattr__(cls, name):
        if name.startswith("_"):
            raise AttributeError(name)
        Enumeration.count += 1
        setattr(cls, name, Enumeration.count)
        return Enumeration.count


class StandIn(types.ModuleType):
    __version__ = "99.0"
    __path__ = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        made = Enumeration(name, (), {"__init__": lambda *a, **k: None}) if name[0].isupper() else MagicMock(name=name)
        setattr(self, name, made)
        return made


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in (KERNELS, *OPTIONAL):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return StandIn(spec.name)

    def exec_module(self, module):
        pass


def mirror_enumerations(folder: Path, kernels) -> None:
    """Those that Transformer Engine compares with copies of its own."""
    for file, name, mirror, prefix in (("constants.py", "DType", "DType", ""), (
            "cpp_extensions/fused_attn.py", "NVTE_Fused_Attn_Backend", "FusedAttnBackend", "NVTE_")):
        source = (folder / "transformer_engine/pytorch" / file).read_text()
        body = re.search(rf"^class {mirror}\(.*\n((?:    .*\n|\n)*)", source, re.MULTILINE)
        if body:
            members = re.findall(r"^    (\w+) =", body[1], re.MULTILINE)
            setattr(kernels, name, enum.IntEnum(name, [prefix + x for x in members], start=0))


# ---------------------------------------------------------------- the kernels that a layer in full precision launches


def generic_gemm(A, transa, B, transb, out, quantizer, out_dtype, bias, bias_dtype, gelu, gelu_in, grad, workspace,
                 workspace_size, accumulate, use_split_accumulator, **of_overlap):
    assert quantizer is None and not gelu and of_overlap["comm_overlap"] is None
    a, b = A.flatten(0, -2), B.flatten(0, -2)
    product = (b.t() if transb else b) @ (a.t() if transa else a)
    bias_gradient = None
    if bias is not None:
        if grad:
            bias_gradient = b.sum(0)
        else:
            product = product + bias
    if out is None:
        return product.unflatten(0, B.shape[:-1]) if not transb else product, bias_gradient, None, None
    out.copy_(out + product if accumulate else product)
    return out, bias_gradient, None, None


def rmsnorm_fwd(x, weight, eps, out, quantizer, dtype, sm_margin, zero_centered_gamma):
    assert quantizer is None and not zero_centered_gamma
    scale = (x.float().square().mean(-1) + eps).rsqrt()
    return (x * scale[..., None] * weight).to(x.dtype), None, scale


def rmsnorm_bwd(gradient, x, scale, weight, sm_margin, zero_centered_gamma):
    normed, scaled = x * scale[..., None], gradient.view_as(x) * weight
    back = (scaled - normed * (scaled * normed).mean(-1, keepdim=True)) * scale[..., None]
    return back.to(x.dtype), (gradient.view_as(x) * normed).flatten(0, -2).sum(0).to(weight.dtype)


class TorchWithCuda:
    """torch, where it is asked whether there is CUDA, and for memory there."""

    cuda = types.SimpleNamespace(**{**vars(torch.cuda), "is_available": lambda: True})

    def empty(self, *shape, device=None, **options):
        return torch.empty(*shape, **options)

    def __getattr__(self, name):
        return getattr(torch, name)


def import_without_kernels(folder: Path):
    """transformer_engine.pytorch, as if there were a GPU."""
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # does not load the core library
    sys.path.insert(0, str(folder))
    sys.meta_path.append(Finder())
    kernels = importlib.import_module(KERNELS)
    mirror_enumerations(folder, kernels)
    vars(kernels).update(layernorm_fwd=None, layernorm_bwd=None, generic_gemm=generic_gemm, rmsnorm_fwd=rmsnorm_fwd,
                         rmsnorm_bwd=rmsnorm_bwd)
    importlib.import_module("transformer_engine.common").load_framework_extension = lambda framework: None
    te = importlib.import_module("transformer_engine.pytorch")
    base, gemm, support = (importlib.import_module(f"transformer_engine.pytorch.{name}")
                           for name in ("module.base", "cpp_extensions.gemm", "quantization"))
    base.torch, gemm.get_cublas_workspace = TorchWithCuda(), lambda *device: torch.empty(0)
    support.check_fp8_support = support.check_fp8_block_scaling_support = lambda: (True, "")
    torch.Tensor.is_cuda = property(lambda self: True)
    hopper = types.SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    torch.cuda.get_device_properties = lambda *device: hopper
    return te


# ---------------------------------------------------------------- checks


def check(folder: Path) -> None:
    te = import_without_kernels(folder)
    sys.path[:0] = [str(TESTS.parent), str(TESTS / "support")]
    from megatron_ebft.common.device import init_device
    from megatron_ebft.model import kernels
    from megatron_ebft.parallel import groups

    init_device()
    groups.init_parallel(1, 1, seed=1)
    kernels.found = lambda: kernels.Found(no_transformer_engine="")
    kernels.no_transformer_engine = lambda dtype: ""  # these kernels do not round float32 to TF32
    for available in (te.is_fp8_available, te.is_fp8_block_scaling_available):
        inspect.signature(available).bind(return_reason=True)
    check_constructors()
    check_fp8()
    check_golden_steps()


def check_constructors() -> None:
    """Of all kinds of layers, as Megatron-Core calls them."""
    import models
    import plain_llama
    from golden import GOLDEN

    from megatron_ebft.model.decoder import build_frozen

    architecture = models.architecture(plain_llama.load_llama(GOLDEN / "llama")[0])
    for changes in (dict(), dict(normalization="LayerNorm", add_bias_linear=True), dict(qk_layernorm=True),
                    dict(add_qkv_bias=True)):
        args = dataclasses.replace(architecture, **changes)
        build_frozen(args, transformer_impl="transformer_engine", bf16=True, params_dtype=torch.bfloat16)


def check_fp8() -> None:
    """The recipe and the number format that are in force in a layer, in rollouts and in training."""
    import models
    import plain_llama
    from golden import GOLDEN
    from megatron.core.fp8_utils import get_fp8_context
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    from megatron_ebft.model import fp8
    from megatron_ebft.model.decoder import local_layers, unwrap

    def note(*args, **kwargs):
        recipe = FP8GlobalStateManager.get_fp8_recipe()
        seen.append((FP8GlobalStateManager.is_fp8_enabled(), type(recipe).__name__, recipe.fp8_format.name))

    for recipe, name in (("blockwise", "Float8BlockScaling"), ("tensorwise", "Float8CurrentScaling")):
        seen = []
        policy = models.build_policy(*plain_llama.load_llama(GOLDEN / "llama"), transformer_impl="transformer_engine",
                                     fp8="hybrid", fp8_recipe=recipe)
        layer = local_layers(policy[0])[1]
        caching = {part: module for part, module in layer.named_modules() if hasattr(module, "_fp8_workspaces")}
        assert caching.keys() == CACHING, caching.keys()
        for module in caching.values():
            assert module.is_first_microbatch and module._fp8_workspaces == {} and module.fuse_wgrad_accumulation
        layer.forward = note
        with torch.no_grad(), fp8.quantised(policy, fp8.FP8(recipe)):
            layer.forward()
        with fp8.training(policy), get_fp8_context(unwrap(policy[0]).config, 0):
            note()
        assert seen == [(True, name, "E4M3"), (True, name, "HYBRID")], seen


def check_golden_steps() -> None:
    """Forward and backward, weight gradients added in place: twice, since layers of a first micro-batch write over what
    is in the buffer, and a rollout in FP8 makes the next pass one."""
    from golden import STEPS, Case

    from megatron_ebft.model import fp8
    from megatron_ebft.model.decoder import local_layers

    for name in STEPS:
        case = Case(name, 1, 3, transformer_impl="transformer_engine")
        for _ in range(2):
            case.policy[0].zero_grad_buffer()
            for layer in local_layers(case.policy[0]).values():
                fp8._forget_weights(layer)
            case.gradient()
            case.check_gradient(1e-5)


if __name__ == "__main__":
    check(Path(sys.argv[1]))
    import megatron.core

    version = re.search(r"transformer_engine-([\d.]+)\.dist-info", " ".join(os.listdir(sys.argv[1])))
    print(f"Transformer Engine {version[1] if version else ''} with megatron-core {megatron.core.__version__}: well")
