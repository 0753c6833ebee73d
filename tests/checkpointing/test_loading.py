"""Loading: training continues bit for bit, layouts may change, what does not fit is named."""

import resource

import pytest
import torch
from checkpoint_runs import ARGS, META, SmallRun, equal_tensors, seed_all
from megatron.core import parallel_state
from ranks import run_ranks

from megatron_ebft.checkpointing.fingerprint import weights_fingerprint
from megatron_ebft.checkpointing.loader import load_checkpoint, load_weights
from megatron_ebft.checkpointing.record import TrainState
from megatron_ebft.checkpointing.saver import Saver
from megatron_ebft.model.architecture import ModelArgs
from megatron_ebft.model.build import build_encoder, build_start
from megatron_ebft.model.weights import unwrap
from megatron_ebft.parallel import groups
from megatron_ebft.parallel.errors import collective_errors

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.mark.parametrize("options", [dict(), dict(bf16=True), dict(distributed=False),
                                     dict(distributed=False, bf16=True), dict(overlap=True)], ids=str)
def test_training_continues_bit_for_bit(tmp_path, options):
    first = SmallRun(**options).train(2)
    first.save(tmp_path, 2)
    expected = first.train(3).weights()
    second = SmallRun(**options)
    state, metadata = load_checkpoint(str(tmp_path), *second.parts, architecture=META["architecture"])
    assert (state, metadata) == (TrainState(iteration=2, consumed_samples=4), META)
    assert equal_tensors(second.train(3).weights(), expected)


@pytest.mark.parametrize("distributed", [True, False])
def test_a_save_before_the_first_step_changes_nothing(tmp_path, distributed):
    expected = SmallRun(distributed).train(2).weights()
    first = SmallRun(distributed)
    first.save(tmp_path, 0)
    assert equal_tensors(first.train(2).weights(), expected)
    second = SmallRun(distributed)
    load_checkpoint(str(tmp_path), *second.parts)
    assert equal_tensors(second.train(2).weights(), expected)


def two_ranks(one: str, two: str) -> dict:
    """On two ranks: continue at DP 2, save there, and fingerprint a one-rank checkpoint in three layouts."""
    groups.init_parallel(1, 1, seed=1)
    run = SmallRun().train(2)
    run.save(two, 2)
    saved_print = weights_fingerprint(run.model[0])
    expected = run.train(2).weights()
    again = SmallRun()
    load_checkpoint(two, *again.parts)
    result = {"continues": equal_tensors(again.train(2).weights(), expected), "saved": saved_print,
              "trained": weights_fingerprint(run.model[0]), "prints": [], "agreed": ""}
    from_one = SmallRun()
    load_checkpoint(one, *from_one.parts)
    result["prints"].append(weights_fingerprint(from_one.model[0]))
    try:
        with collective_errors():
            if torch.distributed.get_rank() == 1:
                raise ValueError("only rank 1")
    except ValueError as error:
        result["agreed"] = str(error)
    result["full"] = [full_disk_on_rank_1(again, f"{two}/full", is_async) for is_async in (False, True)]
    for tensor_parallel, pipeline_parallel in ((2, 1), (1, 2)):
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(tensor_parallel, pipeline_parallel)
        groups.set_seed(1)
        module = build_start(ARGS, tensor_model_parallel_size=tensor_parallel, pipeline_dtype=torch.float32,
                              pipeline_model_parallel_size=pipeline_parallel)
        load_weights(one, module)
        result["prints"].append(weights_fingerprint(module))
    groups.shut_down()
    return result


def full_disk_on_rank_1(run, directory: str, is_async: bool) -> list[str]:
    """What a save says that rank 1 has no room for, and the one after it, with room again."""
    saver, said = Saver(directory, is_async=is_async), []
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (10_000, unlimited[0]):
        if torch.distributed.get_rank() == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
        try:
            saver.save(TrainState(2), *run.parts, META)
            said.append(saver.finished(wait=True))
        except ValueError as error:
            said.append(str(error))
    return said


def test_two_ranks(saved, tmp_path, capsys):
    one, run = saved
    ranks = run_ranks(2, "test_loading:two_ranks", str(one), str(tmp_path))
    for result in ranks:
        assert result["continues"]
        assert result["agreed"] == "only rank 1"
        for failed, done in result["full"]:
            assert "cannot write there" in failed and "Earlier checkpoints are untouched" in failed, failed
            assert done == str(tmp_path / "full/iter_0000002")
        assert result["prints"] == [weights_fingerprint(run.model[0])] * 3  # DP 2, TP 2, PP 2
    single = SmallRun()
    load_checkpoint(str(tmp_path), *single.parts)  # DP 2 → DP 1
    assert "saved with world_size 2, now 1, data_parallel_size 2, now 1; random states" in capsys.readouterr().out
    assert weights_fingerprint(single.model[0]) == ranks[0]["saved"]
    seed_all(5)
    expected = single.train(2).weights()
    moved = SmallRun()
    load_checkpoint(str(tmp_path), *moved.parts)
    single_state, moved_state = (r.optimizer.chained_optimizers[0].optimizer.state for r in (single, moved))
    assert all(float(s["step"]) == 4 for s in single_state.values())
    assert all(float(s["step"]) == 2 and float(s["exp_avg"].abs().max()) > 0 for s in moved_state.values())
    seed_all(5)
    assert equal_tensors(moved.train(2).weights(), expected)


@pytest.mark.parametrize("bf16", [False, True])
def test_truncated_encoder_takes_the_lower_layers(saved, bf16):
    directory, run = saved
    encoder = build_encoder(ARGS, 2, bf16=bf16)
    assert load_weights(str(directory / "iter_0000003"), encoder, architecture={"hidden_size": 32}) == META
    policy, kept = run.weights(), dict(unwrap(encoder).named_parameters())
    assert {name.split(".")[2] for name in kept if "layers" in name} == {"0", "1"}
    assert not any("final" in name or "output" in name for name in kept)
    assert all(torch.equal(p, policy[name].to(p.dtype)) for name, p in kept.items())


def test_tensors_that_do_not_fit_are_named(saved):
    directory = str(saved[0])
    with pytest.raises(ValueError, match="--ebft-encoder-load .*decoder.layers.4.*missing, needs"):
        load_weights(directory, build_encoder(ARGS, 5), flag="--ebft-encoder-load")
    wide = ModelArgs(**{**vars(ARGS), "vocab_size": 65, "padded_vocab_size": 128})
    with pytest.raises(ValueError, match=r"word_embeddings.weight: shape \(64, 32\), needs \(128, 32\)"):
        load_weights(directory, build_start(wide))


def test_another_optimizer_or_schedule(saved):
    with pytest.raises(ValueError, match="--load .*the optimizer was another one .*Distributed.*FP32Optimizer"):
        load_checkpoint(str(saved[0]), *SmallRun(distributed=False).parts)
    with pytest.raises(ValueError, match="--load .*learning rate do not match.*--override-opt-param-scheduler"):
        load_checkpoint(str(saved[0]), *SmallRun(lr=2e-2).parts)
    for choice, lr in (("override_opt_param_scheduler", 2e-2), ("use_checkpoint_opt_param_scheduler", 1e-2)):
        run = SmallRun(lr=2e-2)
        setattr(run.scheduler, choice, True)
        load_checkpoint(str(saved[0]), *run.parts)
        run.train(1)
        assert [group["max_lr"] for group in run.optimizer.param_groups] == [lr] * len(run.optimizer.param_groups)
