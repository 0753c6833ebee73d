"""What a resumed run says about flags that differ from its checkpoint's: each is named, before anything is built."""

import pytest
from small_run import MODEL, SMALL, save

from megatron_ebft.parallel.groups import set_seed
from megatron_ebft.run import build
from megatron_ebft.run.build import build_run
from megatron_ebft.run.describe import describe
from megatron_ebft.run.flags import parse_args


def built(data, folder, *flags: str):
    """A run of the seed, as a process builds it."""
    args = parse_args([*data, *MODEL, *SMALL, "--train-iters", "4", "--tensorboard-dir", str(folder), *flags])
    set_seed(args.seed)
    return build_run(args)


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory, one_rank):
    """A checkpoint after step 1."""
    folder = tmp_path_factory.mktemp("run")
    run = built(data, folder)
    run.state.iteration, run.state.consumed_samples = 1, 2
    run.scheduler.step(2)
    save(run, folder)
    return folder


@pytest.fixture
def resumed(data, folder):
    """Flags → a run that goes on from the checkpoint."""
    return lambda *flags: built(data, folder, "--load", str(folder), *flags)


@pytest.mark.parametrize(("flags", "message"), [
    (["--num-layers", "6"], "--num-layers 6: --load .* was trained with --num-layers 4: its model differs"),
    (["--hidden-size", "64"], "--hidden-size 64, --ffn-hidden-size 192, --kv-channels 16: --load .* was trained with "
                              "--hidden-size 32, --ffn-hidden-size 128, --kv-channels 8"),
    (["--bf16"], "--bf16: --load .* was trained with --no-bf16: the encoder then differs"),
    (["--ebft-feature-layers", "0.25", "0.5"], "--ebft-feature-layers 0.25 0.5: --load .* was trained with "
                                               "--ebft-feature-layers 0.25 0.5 0.75: the encoder then differs"),
    (["--lr", "1"], "--lr 1.0: --load .* was trained with --lr 0.01: .*--override-opt-param-scheduler"),
    (["--training-mode", "sft"], "--load .*: was saved by --training-mode ebft"),
])
def test_changed_flags_are_refused_by_name(resumed, monkeypatch, flags, message):
    monkeypatch.setattr(build, "build_data", lambda *_: pytest.fail("data were read"))
    with pytest.raises(ValueError, match=f"^{message}"):
        resumed(*flags)


@pytest.mark.parametrize(("flags", "message"), [
    (["--seed", "2"], "--seed 2: --load .* was trained with --seed 1234: the initial weights depend on it"),
    (["--init-method-std", "0.1"], "--init-method-std 0.1: --load .* --init-method-std 0.02: the initial weights"),
])
def test_other_initial_weights_are_refused_by_name(resumed, flags, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        resumed(*flags)


def test_only_changes_of_the_user_are_reported(resumed):
    """Not a stop file and a deadline, which a job script gives anew at every start."""
    said = describe(resumed("--ebft-stop-file", "elsewhere", "--exit-duration-in-mins", "7", "--ebft-top-k", "3"))
    assert said.split("with other flags: ")[1].split("\n")[0] == "--ebft-top-k 0 → 3"


def test_changed_flags_of_adam_are_used(resumed):
    """torch would keep those of the checkpoint, while the log reports the change."""
    run = resumed("--adam-beta1", "0.5", "--adam-eps", "1e-5")
    assert {(*group["betas"], group["eps"]) for group in run.optimizer.param_groups} == {(0.5, 0.95, 1e-5)}
