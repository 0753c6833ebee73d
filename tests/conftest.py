"""Fixtures shared by all tests: process groups of one rank, and the `gpu` marker."""

import brute_force
import pytest
import torch

from megatron_ebft.common.device import have_gpu, init_device

init_device()

from megatron_ebft.parallel import groups  # noqa: E402


@pytest.fixture(scope="module")
def one_rank():
    """torch.distributed and Megatron's process groups for this process alone.

    One start per test module (a few milliseconds), so that modules that start groups of their own can run in between.
    """
    groups.init_parallel(1, 1, seed=1)
    yield
    groups.shut_down()


@pytest.fixture(scope="module")
def float64():
    """Models of models.py, and brute force, in float64 throughout, rotary angles included."""
    frequencies = brute_force.rope_frequencies
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(brute_force, "rope_frequencies", lambda config: frequencies(config).double())
        torch.set_default_dtype(torch.float64)
        yield
        torch.set_default_dtype(torch.float32)


def pytest_collection_modifyitems(items):
    if have_gpu():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
