"""Fixtures shared by all tests, their markers, and which of them share a worker of pytest-xdist."""

import gc
from pathlib import Path

import plain_llama
import pytest
import torch

from megatron_ebft.common.device import have_gpu, init_device

init_device()

import small_run  # noqa: E402

from megatron_ebft.parallel import groups  # noqa: E402
from megatron_ebft.run.flags import parse_args  # noqa: E402

TESTS = Path(__file__).parent
OLDEST = {
    "test_step_agrees_with_the_released_code", "test_rewards_losses_and_gradient", "test_a_step_is_brute_force",
    "test_golden_steps_at_tp2_pp2", "test_a_request_stops_and_the_run_goes_on",
    "test_killed_run_continues_bit_for_bit", "test_every_kind_of_model_and_method_trains", "test_bad_flags_are_named",
    "test_training_continues_bit_for_bit", "test_two_ranks", "test_round_trip",
    "test_training_needs_nothing_but_the_checkpoint", "test_another_optimizer_or_schedule",
    "test_a_checkpoint_of_gpt_model_loads", "test_a_checkpoint_of_format_3", "test_the_gpt_family_may_go"}
"""Tests that also run on the oldest supported versions: golden steps, brute force, tensor and pipeline ranks, saving
and resuming, conversion, flags, and what reads Megatron-Core differently in different versions."""


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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.originalname in OLDEST:
            item.add_marker("oldest")
        if item.get_closest_marker("gpu") and not have_gpu():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    missing = OLDEST - {item.originalname for item in items}
    if config.option.markexpr == "oldest" and missing and config.args == config.getini("testpaths"):
        raise pytest.UsageError(f"conftest.py's OLDEST names tests that do not exist: {', '.join(sorted(missing))}")


def pytest_collection_finish():
    gc.collect()
    gc.freeze()  # modules and tests: as ranks.spare_the_collector


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A worker of pytest-xdist takes whole files, whose fixtures are then made once.

    All files with ranks go to the same worker, so that there is one pool of ranks. (They could say so with the marker
    xdist_group; pytest-xdist 3.8 overlooks it with pytest 9.2.)
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return "ranks" if "run_ranks(" in (TESTS.parent / file).read_text() else file

    return ByFile(config, log)
