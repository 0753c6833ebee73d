"""Steps that ruin the weights: what is not finite is not saved, and good checkpoints outlive finite ruins."""

import pytest
import torch
from small_run import start

from megatron_ebft.checkpointing.folders import complete_iterations
from megatron_ebft.common.errors import NotFinite, StepFailed
from megatron_ebft.run import loop

pytestmark = pytest.mark.usefixtures("one_rank")
FLAGS = ["--training-mode", "sft", "--eval-interval", "0", "--save-interval", "1", "--ebft-keep-checkpoints", "1",
         "--override-opt-param-scheduler"]


@pytest.fixture
def train(arguments, tmp_path):
    """Flags → train one run in one folder. `values` are set unchecked."""
    def train(*flags: str, **values):
        args = arguments(*FLAGS, "--save", str(tmp_path), "--load", str(tmp_path), *flags)
        vars(args).update(values)
        run, log = start(args)
        loop.train(run, log)
        log.close(0.0)
        return run
    return train


def test_weights_that_are_not_finite_are_not_saved(train, tmp_path):
    """Without epsilon, embeddings of ids that do not occur become 0/0; here in the last step of a run."""
    with pytest.raises(NotFinite, match="after step 1 weights .*word_embeddings.* lower --lr.* There is no check"):
        train("--train-iters", "1", adam_eps=0.0)
    assert complete_iterations(str(tmp_path)) == []


def test_moments_that_are_not_finite_are_not_saved(train, tmp_path, monkeypatch):
    train("--train-iters", "1")
    step = loop.train_step

    def ruining(run, *args, **kwargs):
        metrics = step(run, *args, **kwargs)
        moments = run.optimizer.chained_optimizers[0].optimizer.state
        next(iter(moments.values()))["exp_avg_sq"].view(-1)[-1] = torch.inf
        return metrics

    monkeypatch.setattr(loop, "train_step", ruining)
    with pytest.raises(StepFailed, match="after step 2 .*exp_avg_sq.*The last checkpoint, of step 1, is good"):
        train("--train-iters", "4")
    assert complete_iterations(str(tmp_path)) == [1]


def test_good_checkpoints_outlive_finite_ruins(train, tmp_path):
    """A rate of 10⁶ leaves finite weights, whose gradient is not: the older checkpoint stays, and is named."""
    train("--train-iters", "1")
    with pytest.raises(NotFinite, match=r"step 3 .*gradient norm nan.*checkpoint of step 2 is not proven good.*"
                                        r"\(there: 1\)"):
        train("--train-iters", "4", "--lr", "1e6")
    assert complete_iterations(str(tmp_path)) == [1, 2]
    with pytest.raises(NotFinite, match="checkpoint of step 2 is not proven good"):
        train("--train-iters", "4")  # the same after a restart: nothing is removed before a finite step
    assert complete_iterations(str(tmp_path)) == [1, 2]


def test_older_checkpoints_go_after_a_finite_step(train, tmp_path):
    assert train("--train-iters", "3").state.iteration == 3
    assert complete_iterations(str(tmp_path)) == [2, 3]
    train("--train-iters", "4", "--save-interval", "9")
    assert complete_iterations(str(tmp_path)) == [3, 4]
