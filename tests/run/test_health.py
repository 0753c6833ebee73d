"""Health: each rule on made-up curves, episodes, settings that make a rule meaningless, and a run that stops."""

import math
import random
from types import SimpleNamespace

import pytest
from small_run import start

from megatron_ebft.checkpointing.folders import latest_iteration
from megatron_ebft.parallel import groups
from megatron_ebft.run.callbacks import health
from megatron_ebft.run.callbacks.health import CALM, CHECKS, LONG, SHORT, Health, History, copies, meaningless
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


def listen(curves: dict, noise: float = 0.02, stop_on: tuple[str, ...] = (), seed: int = 0) -> list[str]:
    """What health says of a run with these curves, each value with a noise of that share, evaluated every 100 steps."""
    numbers, log, watched = random.Random(seed), Listener(), Health(stop_on)
    watched.history, watched.checks = History(), set(CHECKS)
    run = SimpleNamespace(rlvr=None, eval_questions=None, mode="made up")

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


def test_copies_are_those_of_blocks_that_count():
    """Half of the blocks count; of their 4 rollouts, 2 are computed."""
    layout = SimpleNamespace(num_blocks=6, num_samples=4, rollout_length=5, seq_length=40)
    whole = 40 + 6 * 4 * 5
    saved = {"encoder_tokens_saved": (3 * 4 * 5 + 3 * 2 * 5) / whole, "valid_blocks": 0.5}
    assert copies(saved, layout) == pytest.approx(2 / 3)
    assert copies(saved | {"encoder_tokens_saved": (3 * 4 * 5 + 3 * 3 * 5) / whole}, layout) == pytest.approx(1)
    assert copies({"valid_blocks": 0.0, "encoder_tokens_saved": 0.9}, layout) is None


def test_settings_make_rules_meaningless():
    def rules(mode="ebft", coef=1.0, replay=None, samples=4):
        return meaningless(SimpleNamespace(mode=mode, args=SimpleNamespace(ebft_rl_coef=coef, ebft_replay_steps=replay),
                                           config=SimpleNamespace(num_samples=samples)))

    assert rules() == rules("rlvr") == set()
    assert rules("sft") == rules(coef=0.0) == {"reward-flat", "overoptimised"}
    assert rules(samples=1) == {"zero-spread", "duplicates"}
    assert rules(replay="there") >= {"entropy", "duplicates", "reward-flat"}


def test_a_warning_stops_the_run_after_a_save(arguments, tmp_path, one_rank, monkeypatch, capsys):
    monkeypatch.setattr(health, "HEALTHY_MISMATCH", 0.5)
    flags = ["--save", str(tmp_path), "--load", str(tmp_path), "--ebft-stop-on-warning", "mismatch", "--eval-interval",
             "0"]
    groups.set_seed(1234)  # weights of the encoder
    run, log = start(arguments(*flags))
    with pytest.raises(CannotGoOn, match="^--ebft-stop-on-warning mismatch: step 1: sampler and training pass differ"):
        train(run, log)
    assert latest_iteration(str(tmp_path)) == 1 and "stopping after step 1/4: --ebft" in capsys.readouterr().out
    monkeypatch.undo()
    groups.set_seed(1234)  # weights of the encoder
    run, log = start(arguments(*flags))
    assert train(run, log) and run.state.iteration == 4
