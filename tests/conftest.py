"""Fixtures shared by all tests, the `gpu` marker, and which tests share a worker of pytest-xdist."""

import plain_llama
import pytest
import torch

from megatron_ebft.common.device import have_gpu, init_device

init_device()

import small_run  # noqa: E402

from megatron_ebft.parallel import groups  # noqa: E402
from megatron_ebft.run.flags import parse_args  # noqa: E402


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
    frequencies = plain_llama.rope_frequencies
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain_llama, "rope_frequencies", lambda config: frequencies(config).double())
        torch.set_default_dtype(torch.float64)
        yield
        torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Flags of the dataset of a small run."""
    return small_run.dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture
def arguments(data):
    """Flags → parsed arguments of a small run."""
    return lambda *more: parse_args([*data, *small_run.MODEL, *small_run.SMALL, "--train-iters", "4", *more])


def pytest_collection_modifyitems(items):
    if have_gpu():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
