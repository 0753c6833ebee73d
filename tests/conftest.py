"""Fixtures shared by all tests, their markers, and which of them share a worker of pytest-xdist.

The package is imported where it is needed: pytest-xdist's main process, for which the workers wait, needs none of it.
"""

import functools
import gc
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
OLDEST = {
    "test_step_agrees_with_the_released_code", "test_rewards_losses_and_gradient", "test_a_step_is_brute_force",
    "test_a_fused_step", "test_gram_matrices", "test_gradient", "test_the_policy_gradient_is_unbiased",
    "test_the_sampler_draws_each_outcome_with_its_probability", "test_killed_run_continues_bit_for_bit",
    "test_every_kind_of_model_and_method_trains", "test_bad_flags_are_named", "test_training_continues_bit_for_bit",
    "test_two_ranks", "test_round_trip", "test_training_needs_nothing_but_the_checkpoint",
    "test_another_optimizer_or_schedule", "test_a_checkpoint_of_gpt_model_loads", "test_a_checkpoint_of_format_3",
    "test_the_gpt_family_may_go", "test_metadata_runs_no_code", "test_objects_run_no_code",
    "test_nothing_outside_can_be_reached", "test_right_and_wrong_answers"}
"""Tests that also run on the oldest supported versions: golden steps, brute force, tensor and pipeline ranks, saving
and resuming, conversion, flags, the code sandbox, and what reads Megatron-Core differently in different versions."""
LONGEST = ["run/test_kills.py", "run/test_stopping.py", "run/test_training.py", "model/test_flex_attention.py",
           "tools/test_gpu_script.py", "hf/test_conversion_resources.py", "model/test_kernels.py",
           "model/test_strided_attention.py", "tools/test_benchmark.py", "checkpointing/test_saving.py",
           "rollout/test_sampling.py", "model/test_decoder.py"]
"""Files that start first, after those with ranks, so that no worker is left alone with a long one at the end."""


@pytest.fixture(scope="module")
def one_rank():
    """torch.distributed and Megatron's process groups for this process alone.

    One start per test module (a few milliseconds), so that modules that start groups of their own can run in between.
    """
    from megatron_ebft.parallel import groups

    groups.init_parallel(1, 1, seed=1)
    yield
    groups.shut_down()


@pytest.fixture(scope="module")
def float64():
    """Models of models.py, and brute force, in float64 throughout, rotary angles included."""
    import plain_llama
    import torch

    frequencies = plain_llama.rope_frequencies
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain_llama, "rope_frequencies", lambda config: frequencies(config).double())
        torch.set_default_dtype(torch.float64)
        yield
        torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Flags of the dataset of a small run."""
    import small_run

    return small_run.dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture
def arguments(data):
    """Flags → parsed arguments of a small run."""
    import small_run

    from megatron_ebft.run.flags import parse_args

    return lambda *more: parse_args([*data, *small_run.MODEL, *small_run.SMALL, "--train-iters", "4", *more])


def pytest_collectstart():
    """Before any test module is imported."""
    from megatron_ebft.common.device import init_device

    init_device()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    from megatron_ebft.common.device import have_gpu

    for item in items:
        if item.originalname in OLDEST:
            item.add_marker("oldest")
        if item.get_closest_marker("gpu") and not have_gpu():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    missing = OLDEST - {item.originalname for item in items}
    if config.option.markexpr == "oldest" and missing and config.args == config.getini("testpaths"):
        raise pytest.UsageError(f"conftest.py's OLDEST names tests that do not exist: {', '.join(sorted(missing))}")
    items.sort(key=lambda item: place(item.path))


def has_ranks(file: Path) -> bool:
    return "run_ranks(" in file.read_text()


@functools.cache
def place(file: Path) -> int:
    """Files with a lower place start earlier."""
    names = [TESTS / name for name in LONGEST]
    assert all(name.exists() for name in names), "LONGEST names files that do not exist"
    return -1 if has_ranks(file) else names.index(file) if file in names else len(names)


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
            return "ranks" if has_ranks(TESTS.parent / file) else file

        def schedule(self) -> None:
            self.config.option.loadscopereorder = False  # keeps the order above; else by number of tests
            super().schedule()

    return ByFile(config, log)
