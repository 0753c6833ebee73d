"""Health: each rule on made-up curves, episodes, settings that make a rule meaningless, and a run that stops."""

import math
import random
from types import SimpleNamespace

import pytest
from small_run import start

from megatron_ebft.checkpointing.folders import latest_iteration
from megatron_ebft.parallel import groups
from megatron_ebft.run.callbacks import health
from megatron_ebft.run.callbacks.callback import Callback, Callbacks
from megatron_ebft.run.callbacks.health import CALM, CHECKS, LONG, SHORT, Health, copies, meaningless
from megatron_ebft.run.loop import train
from megatron_ebft.run.stopping import CannotGoOn

STEPS = 2 * LONG
WELL = {"reward": lambda x: 0.5 * x, "lr": lambda x: 1e-4, "entropy": lambda x: 3 - x, "zero_spread": lambda x: 0.3,
        "grad_norm": lambda x: 1.0, "mismatch_ratio": lambda x: 1.01, "copies": lambda x: 0.4, "loss": lambda x: 1.0,
        "valid_blocks": lambda x: 0.8, "cfm": lambda x: 1 - 0.5 * x}
"""Curves of a run that goes well, over its whole length (x from 0 to 1). `cfm` is held-out."""
SICK = {  # what differs, and the first step at which its rule must have spoken
    "mismatch": ({"mismatch_ratio": lambda x: 1.01 + 0.1 * (x > 0.5)}, 502),
    "nothing-counts": ({"valid_blocks": lambda x: float(x < 0.2)}, 201),
    "reward-flat": ({"reward": lambda x: 0.1 * min(x, 0.3)}, 900),
    "entropy": ({"entropy": lambda x: 3 * 0.01**x}, 340),
    "zero-spread": ({"zero_spread": lambda x: min(1, 0.3 + x)}, 720),
    "gradient-spikes": ({"grad_norm": lambda x: 50.0 if 0.4 < x < 0.42 and round(x * STEPS) % 5 == 0 else 1.0}, 420),
    "overoptimised": ({"cfm": lambda x: 1 - 0.5 * math.sin(math.pi * x)}, 800),
    "duplicates": ({"copies": lambda x: min(1, 0.5 + x)}, 490)}


class Listener:
    """A log that keeps its lines."""

    def __init__(self):
        self.lines: list[str] = []

    def print(self, line: str) -> None:
        self.lines.append(line)


def flags(**changed) -> SimpleNamespace:
    """What health reads of a run's flags."""
    usual = dict(training_mode="ebft", ebft_rl_coef=1.0, ebft_replay_steps=None, ebft_num_samples=4,
                 ebft_skip_duplicates=True, ebft_stop_on_warning=None)
    return SimpleNamespace(**usual | changed)


def agree(steps: int, problem: ValueError | None) -> None:
    """Stopper.check of one rank."""
    if problem:
        raise CannotGoOn(f"{problem}")


def listen(curves: dict, noise: float = 0.02, stop_on: tuple[str, ...] = (), seed: int = 0) -> list[str]:
    """What health says of a run with these curves, each value with a noise of that share, evaluated every 100 steps."""
    numbers, log, watched = random.Random(seed), Listener(), Health(flags(ebft_stop_on_warning=stop_on))
    run = SimpleNamespace(rlvr=None, eval_questions=None, mode="made up", stopper=SimpleNamespace(check=agree))

    def value(name: str, x: float) -> float:
        size = 0.05 if name == "reward" else noise * curves[name](x)
        return curves[name](x) + (numbers.gauss(0, size) if name not in ("valid_blocks", "mismatch_ratio") else 0)

    for step in range(1, STEPS + 1):
        metrics = {name: value(name, step / STEPS) for name in curves if name != "cfm"}
        watched.step_end(run, log, SimpleNamespace(iteration=step, metrics=metrics))
        if step % 100 == 0 and "cfm" in curves:
            watched.evaluated(run, log, step, {"cfm": value("cfm", step / STEPS)}, 1.0)
    return log.lines


@pytest.mark.parametrize("seed", range(3))
def test_a_run_that_goes_well_hears_nothing(seed):
    assert listen(WELL, seed=seed) == []
    sft = {name: WELL[name] for name in ("loss", "lr", "grad_norm")}
    assert listen(sft, seed=seed) == []


@pytest.mark.parametrize("name", SICK)
def test_each_rule_speaks_once_in_time(name):
    changed, latest = SICK[name]
    said, = listen(WELL | changed)
    first = int(said.split("step ")[1].split(":")[0])
    assert SHORT < first <= latest and ": " in said.split("step ", 1)[1]
    assert said.count("--") or "checkpoint" in said  # it names the mend
    with pytest.raises(CannotGoOn, match=f"^--ebft-stop-on-warning {name}: .*step {first}: "):
        listen(WELL | changed, stop_on=(name,))
    assert listen(WELL | changed, stop_on=tuple(CHECKS.keys() - {name})) == [said]


def test_an_episode_ends_when_all_is_well_for_a_while():
    def ill_at(*steps):
        return listen(WELL | {"mismatch_ratio": lambda x: 1.2 if round(x * STEPS) in steps else 1.0})

    assert len(ill_at(30, 31, 32, 30 + CALM)) == 1
    assert len(ill_at(30, 31 + CALM)) == 2


def test_a_decayed_learning_rate_explains_a_flat_reward():
    flat = WELL | {"reward": lambda x: 0.1}
    assert len(listen(flat)) == 1
    assert listen(flat | {"lr": lambda x: 1e-4 * (1 - x) ** 2 + 1e-6}) == []


class Repetitions(Callback):
    """By step, the share of rollouts that repeat one of their block: counted, and as health reads it from metrics."""

    def __init__(self):
        self.counted, self.read = [], []

    def computed(self, run, gold, computed):
        valid = gold.valid_blocks(run.config.layout)
        kinds = [len(set(map(tuple, block))) for block in computed.rollouts.tokens_BKNG[valid].tolist()]
        self.counted.append(sum(4 - kind for kind in kinds) / (3 * len(kinds)))

    def step_end(self, run, log, step):
        self.read.append(copies(step.metrics, run.config))


@pytest.mark.parametrize("step", ["fused", "separate"])
@pytest.mark.parametrize("parts", [0, 2])
def test_repetitions_of_blocks_that_count(parts, step, arguments, tmp_path, one_rank):
    """The encoder's rows have room for a few rollouts more than they need."""
    run, log = start(arguments(
        "--tensorboard-dir", str(tmp_path), "--ebft-document-mask", "--ebft-top-k", "2", "--ebft-rollout-length", "2",
        "--ebft-context-length", "3", "--seed", "5", "--eval-interval", "0", "--ebft-step", step,
        "--ebft-blocks-per-microbatch", str(parts)))
    run.callbacks = Callbacks((repetitions := Repetitions(),))
    assert train(run, log)
    for counted, read in zip(repetitions.counted, repetitions.read, strict=True):
        assert counted - 0.25 <= read <= counted + 1e-6
    assert sum(repetitions.read) > 0.8 and len({round(share, 3) for share in repetitions.counted}) > 1
    assert copies({"valid_blocks": 0.0, "encoder_tokens_saved": 0.9}, run.config) is None


def test_settings_make_rules_meaningless():
    def rules(**changed):
        return meaningless(flags(**changed))

    assert rules() == set()
    assert rules(training_mode="rlvr") == rules(ebft_skip_duplicates=False) == {"duplicates"}
    assert CHECKS.keys() - rules(training_mode="sft") == {"nothing-counts", "gradient-spikes"}
    assert rules(ebft_rl_coef=0.0) == {"reward-flat", "overoptimised"}
    assert rules(ebft_num_samples=1) == {"zero-spread", "duplicates"}
    assert rules(ebft_replay_steps="there") >= {"entropy", "duplicates", "reward-flat"}
    with pytest.raises(ValueError, match="^--ebft-stop-on-warning entropy: this run never hears this warning"):
        Health(flags(training_mode="sft", ebft_stop_on_warning=["gradient-spikes", "entropy"]))


def test_a_warning_stops_the_run_after_a_save(arguments, tmp_path, one_rank, monkeypatch, capsys):
    monkeypatch.setattr(health, "HEALTHY_MISMATCH", 0.5)
    given = ["--save", str(tmp_path), "--load", str(tmp_path), "--ebft-stop-on-warning", "mismatch", "--eval-interval",
             "0"]
    groups.set_seed(1234)  # weights of the encoder
    run, log = start(arguments(*given))
    with pytest.raises(CannotGoOn, match="^--ebft-stop-on-warning mismatch: step 1: sampler and training pass differ"):
        train(run, log)
    assert latest_iteration(str(tmp_path)) == 1 and "stopping after step 1/4: --ebft" in capsys.readouterr().out
    monkeypatch.undo()
    groups.set_seed(1234)  # weights of the encoder
    run, log = start(arguments(*given))
    assert train(run, log) and run.state.iteration == 4
