"""The CPU that stands in for CUDA."""

import pytest
import torch

from megatron_ebft.common.device import have_gpu


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
