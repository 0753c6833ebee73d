"""Fixtures shared by all tests: process groups of one rank, and the `gpu` marker."""

import pytest

from megatron_ebft.device import have_gpu, init_device

init_device()  # before Megatron-Core is imported

from megatron_ebft import parallel  # noqa: E402
from ranks import free_port  # noqa: E402


@pytest.fixture(scope="module")
def one_rank():
    """torch.distributed and Megatron's process groups for this process alone.

    One start per test module (a few milliseconds), so that modules that start groups of their own can run in between.
    """
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("MASTER_PORT", str(free_port()))
        parallel.init_parallel(1, 1, seed=1)
        yield
        parallel.shut_down()


def pytest_collection_modifyitems(items):
    if have_gpu():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
