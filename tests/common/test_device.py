"""The CPU that stands in for CUDA."""

import importlib
import sys

import pytest
import torch

from megatron_ebft.common import device
from megatron_ebft.common.device import have_gpu, import_megatron


@pytest.mark.parametrize("is_cpu", [True, False])
def test_megatron_is_imported_without_compiler_and_wandb(is_cpu, monkeypatch):
    seen = []
    monkeypatch.setattr(device, "have_gpu", lambda: not is_cpu)
    monkeypatch.setattr(importlib, "import_module",
                        lambda name: seen.append((name, sys.modules["wandb"], torch.compile)))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    compiler = torch.compile
    import_megatron()
    (name, wandb, compile_then), = seen
    assert name.startswith("megatron.core") and wandb is None and "wandb" not in sys.modules
    assert torch.compile is compiler and (compile_then is not compiler) == is_cpu
    if is_cpu:  # with and without arguments
        assert compile_then(len) is compile_then(dynamic=True)(len) is len


@pytest.mark.skipif(have_gpu(), reason="nothing stands in for a GPU")
def test_cuda_means_the_cpu():
    """Where Megatron-Core names it, and only there; operations take no detour through Python for it."""
    tensor = torch.zeros(2, device="cuda:0")
    assert tensor.device.type == torch.tensor([1.0], device=torch.device("cuda")).device.type == "cpu"
    assert tensor.to(device="cuda", dtype=torch.float64).cuda().type() == "torch.cuda.DoubleTensor"
    assert tensor.type(torch.int32).dtype == torch.int32
    with torch.device("meta"):
        assert torch.empty(1).is_meta and torch.tensor([1.0]).is_meta
    assert torch.overrides._len_torch_function_stack() == 0
