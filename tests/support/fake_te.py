"""A stand-in for Transformer Engine on a CPU: what Megatron-Core's wrappers call, computed by torch.

Parameters, their names, the argument names of the constructors and the empty `_extra_state` are those of Transformer
Engine 2.11 and 2.20, and so is what they remember of their weights in FP8, which is emulated; parallel layers and speed
are not. `install` must run before Megatron-Core is imported.
"""

import contextlib
import functools
import importlib
import importlib.abc
import importlib.machinery
import sys
import types

import torch
from torch.nn.functional import layer_norm, linear, rms_norm

VERSION = "2.11.0"


class _Module(torch.nn.Module):
    def get_extra_state(self):
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state):
        assert state is None or state.numel() == 0


class Recipe:
    """A recipe of FP8, or its number format."""

    def __init__(self, kind):
        self.kind = kind

    def __call__(self, fp8_format=None, fp8_dpa=False):
        return self


class autocast:
    recipe: Recipe | None = None
    """Of the innermost that is entered."""

    def __init__(self, enabled=True, calibrating=False, recipe=None, amax_reduction_group=None):
        self.inner = recipe if enabled else None

    def __enter__(self):
        self.outer, autocast.recipe = autocast.recipe, self.inner

    def __exit__(self, *error):
        autocast.recipe = self.outer


def fp8_autocast(enabled=True, calibrating=False, fp8_recipe=None, fp8_group=None):
    return autocast(enabled, calibrating, fp8_recipe, fp8_group)


class Linear(_Module):
    passes: list[tuple["Linear", str, bool]] = []
    """Of all forward passes of all layers: the layer, its recipe, whether it had to quantise its weight."""

    def __init__(self, in_features, out_features, sequence_parallel=False, fuse_wgrad_accumulation=False, tp_group=None,
                 tp_size=1, get_rng_state_tracker=None, rng_tracker_name=None, init_method=None, bias=True,
                 return_bias=False, params_dtype=None, parallel_mode=None, device="cuda", ub_name=None):
        super().__init__()
        assert tp_size == 1 and not (return_bias and not bias)
        self.in_features, self.out_features = in_features, out_features
        self.use_bias, self.return_bias = bias, return_bias
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
        self.weight = torch.nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))
        init_method(self.weight)
        self.bias = torch.nn.Parameter(torch.zeros(out_features, dtype=params_dtype, device=device)) if bias else \
            torch.empty(0)
        self._fp8_workspaces, self.save_original_input = {}, False

    def forward(self, inp, is_first_microbatch=None):
        from megatron_ebft.model import fp8

        weight, recipe = self.weight, autocast.recipe and autocast.recipe.kind
        is_new = recipe and (is_first_microbatch in (None, True) or not self._fp8_workspaces)
        Linear.passes.append((self, recipe or "off", bool(is_new)))
        if recipe:
            inp = inp + (fp8.round_activations(inp.detach(), recipe) - inp).detach()
            if is_new:
                self._fp8_workspaces["weight"] = fp8.round_weights(weight.detach(), recipe)
            weight = weight + (self._fp8_workspaces["weight"] - weight).detach()
        out = linear(inp, weight, self.bias if self.use_bias and not self.return_bias else None)
        return (out, self.bias) if self.return_bias else out


class LayerNormLinear(Linear):
    def __init__(self, in_features, out_features, eps=1e-5, normalization="LayerNorm", return_layernorm_output=False,
                 zero_centered_gamma=False, params_dtype=None, device="cuda", **options):
        super().__init__(in_features, out_features, params_dtype=params_dtype, device=device, **options)
        assert not (return_layernorm_output or zero_centered_gamma)
        self.eps, self.normalization = eps, normalization
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(in_features, dtype=params_dtype, device=device))
        if normalization == "LayerNorm":
            self.layer_norm_bias = torch.nn.Parameter(torch.zeros(in_features, dtype=params_dtype, device=device))

    def forward(self, inp, is_first_microbatch=None):
        shape = (self.in_features,)
        normed = rms_norm(inp, shape, self.layer_norm_weight, self.eps) if self.normalization == "RMSNorm" else \
            layer_norm(inp, shape, self.layer_norm_weight, self.layer_norm_bias, self.eps)
        return super().forward(normed, is_first_microbatch)


class _Norm(_Module):
    def __init__(self, normalized_shape=None, eps=1e-5, sequence_parallel=None, params_dtype=None,
                 zero_centered_gamma=False, hidden_size=None, device="cuda"):
        super().__init__()
        self.shape, self.eps = (normalized_shape or hidden_size,), eps
        self.weight = torch.nn.Parameter(torch.ones(self.shape, dtype=params_dtype, device=device))
        self.weight.sequence_parallel = sequence_parallel


class RMSNorm(_Norm):
    def forward(self, x):
        return rms_norm(x, self.shape, self.weight, self.eps)


class LayerNorm(_Norm):
    def __init__(self, *args, device="cuda", **options):
        super().__init__(*args, device=device, **options)
        self.bias = torch.nn.Parameter(torch.zeros_like(self.weight))

    def forward(self, x):
        return layer_norm(x, self.shape, self.weight, self.bias, self.eps)


class _Unused(_Module):
    """What Megatron-Core imports or derives from, and nothing here makes."""

    def __init__(self, *args, **kwargs):
        raise AssertionError(type(self))


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds transformer_engine and any module of it, but for its optimizers, which run on GPUs only."""

    contents = {"transformer_engine": dict(__version__=VERSION), "transformer_engine.pytorch": dict(
        Linear=Linear, LayerNormLinear=LayerNormLinear, RMSNorm=RMSNorm, LayerNorm=LayerNorm, autocast=autocast,
        fp8_autocast=fp8_autocast),
        "transformer_engine.common.recipe": dict(
            Float8BlockScaling=Recipe("blockwise"), Float8CurrentScaling=Recipe("tensorwise"),
            Format=types.SimpleNamespace(E4M3="e4m3", HYBRID="hybrid")),
        "transformer_engine.pytorch.cpu_offload": dict(
            get_cpu_offload_context=lambda *args, **kwargs: (contextlib.nullcontext(), None))}

    def find_spec(self, name, path=None, target=None):
        package, last = name.split(".")[0], name.split(".")[-1]
        if package == "transformer_engine" and last != "optimizers" and not last.startswith("_"):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return types.ModuleType(spec.name)

    def exec_module(self, module):
        def missing(name):
            if name.startswith("_"):
                raise AttributeError(name)
            with contextlib.suppress(ModuleNotFoundError):
                return importlib.import_module(f"{module.__name__}.{name}") if name.islower() else _unused(name)
            raise AttributeError(name)

        vars(module).update(self.contents.get(module.__name__, {}), __getattr__=missing)


@functools.cache
def _unused(name: str) -> type:
    return type(name, (_Unused,), {})


def install() -> None:
    """Make `import transformer_engine` find this."""
    sys.meta_path.insert(0, _Finder())
    importlib.import_module("transformer_engine")  # without a GPU what is not yet imported is hidden
