"""Warnings about a run that does not go well, each with the mend. One is printed at the first step of an episode; the
episode ends with CALM steps (or one evaluation) that are well.

A rule reads the metrics of steps and evaluations, which are the same on every rank, since this process began. It waits
until it has seen enough of them. Rules whose metric a run does not have stay silent: SFT has no reward.
"""

import math
from collections import deque
from collections.abc import Callable
from statistics import fmean, median

from megatron_ebft.layout.packed_row import split_blocks
from megatron_ebft.method.config import EBFTConfig
from megatron_ebft.run.callbacks.callback import Callback
from megatron_ebft.run.flags.observing import RULES
from megatron_ebft.run.verification import Verification

HEALTHY_MISMATCH = 1.05
"""mean exp |Δ log-probability| between sampler and trainer up to which training is reported to go well."""
CALM = 20
SHORT, LONG = 20, 500
"""Steps that a level is the mean of, and steps in which a reward should rise."""
NEARLY_ALL = 0.95
"""A toy model that has almost learnt its task has no spread in 0.88 of the blocks, and still gets better."""


class History:
    """Metrics of this process, the newest last. A step in which nothing counts lacks some of them."""

    def __init__(self, is_rlvr: bool = False):
        self.is_rlvr = is_rlvr
        self.latest: dict[str, float] = {}
        self.highest: dict[str, float] = {}
        self.evaluations: list[tuple[dict[str, float], float | None]] = []
        """Metrics of each, and the level of the reward before it."""
        self._values: dict[str, deque[float]] = {}
        self._first: dict[str, list[float]] = {}

    def add(self, metrics: dict[str, float]) -> None:
        """Note the metrics of a step."""
        self.latest = metrics
        for name, value in metrics.items():
            self.highest[name] = max(value, self.highest.get(name, value))
            self._values.setdefault(name, deque(maxlen=LONG)).append(value)
            first = self._first.setdefault(name, [])
            if len(first) < SHORT:
                first.append(value)

    def last(self, name: str, count: int) -> list[float]:
        """So many newest values; [] while there are not as many."""
        values = list(self._values.get(name, ()))
        return values[-count:] if len(values) >= count else []

    def level(self, name: str) -> float | None:
        """Mean of the last SHORT values; None while there are not as many."""
        values = self.last(name, SHORT)
        return fmean(values) if values else None

    def beginning(self, name: str) -> float:
        """Mean of the first SHORT values of this process."""
        return fmean(self._first[name])


def mismatch(history: History) -> str | None:
    ratio = history.latest.get("mismatch_ratio", 1.0)
    if ratio > HEALTHY_MISMATCH:
        return (f"sampler and training pass differ by a factor of {ratio:.3f} a token (mean exp|Δ log p|; healthy up "
                f"to {HEALTHY_MISMATCH}): look at train/mismatch_kl and train/importance_truncated, and at "
                "--ebft-rollout-fp8 and --fp8-format")


def nothing(history: History) -> str | None:
    """No block counts; in SFT no token, in RLVR no completion."""
    metrics = history.latest
    if metrics.get("valid_blocks", ("mismatch" if history.is_rlvr else "loss") in metrics):
        return None
    if history.is_rlvr:
        return ("the completions of each question have equal rewards, so nothing is learnt; "
                f"{metrics['success']:.0%} are right: look at --ebft-questions (too hard, too easy, or in another form "
                "than --ebft-verifier reads), --ebft-rlvr-num-samples and --global-batch-size")
    what = "block" if "valid_blocks" in metrics else "token"
    return (f"no {what} of its rows counts, so nothing is learnt from {'rollouts' if what == 'block' else 'them'}: "
            "look at the share that counts, in the first lines, at --global-batch-size, --ebft-answer-only and "
            "--ebft-document-mask")


def reward_flat(history: History) -> str | None:
    """The reward of the newer half of LONG steps is not above that of the older half by two standard errors. A learning
    rate that has decayed explains it."""
    rewards = history.last("reward", LONG)
    if not rewards or history.latest["lr"] < history.highest["lr"] / 2:
        return None
    older, newer = rewards[:LONG // 2], rewards[LONG // 2:]
    before, now = fmean(older), fmean(newer)
    squares = [(value - before)**2 for value in older] + [(value - now)**2 for value in newer]
    if now - before < 2 * math.sqrt(sum(squares)) / len(newer):
        return (f"the reward has not risen in {LONG} steps ({before:+.4f} → {now:+.4f}): it has "
                "converged, or learns too slowly: raise --lr or --global-batch-size, and compare eval/cfm with that of "
                "earlier checkpoints")


def entropy_collapse(history: History) -> str | None:
    entropy = history.level("entropy")
    if entropy is not None and entropy < history.beginning("entropy") / 4:
        return (f"the entropy of rollouts has fallen from {history.beginning('entropy'):.2f} to {entropy:.2f} nats: "
                "they become alike: go back to an earlier checkpoint with a lower --lr, raise --ebft-diversity-coef or "
                "--ebft-kl-coef, or sample at a higher temperature")


def zero_spread(history: History) -> str | None:
    share = history.level("zero_spread")
    if share is not None and share > NEARLY_ALL:
        mend = ("look at --ebft-questions (too easy, too hard) and --ebft-rlvr-num-samples" if history.is_rlvr else
                "raise the sampling temperature, --ebft-rollout-length or --ebft-num-samples")
        return (f"in {share:.0%} of the {'questions' if history.is_rlvr else 'blocks'} all rewards are equal, and "
                f"nothing is learnt from them: {mend}")


def gradient_spikes(history: History) -> str | None:
    """Three of the last 50 gradients are ten times as large as their median."""
    norms = history.last("grad_norm", 50)
    usual = median(norms) if norms else 0.0
    spikes = [norm for norm in norms if norm > 10 * usual]
    if len(spikes) >= 3:
        return (f"{len(spikes)} of the last 50 gradients are more than ten times as large as usual (up to "
                f"{max(spikes):.3g}, usually {usual:.3g}): lower --lr or --clip-grad, raise "
                "--global-batch-size, and look for damaged rows with --ebft-dump-steps")


def overoptimised(history: History) -> str | None:
    """In the last two evaluations, held-out CFM is above its best by a tenth of where it began, and the reward has
    risen since that best."""
    seen = [(metrics["cfm"], reward) for metrics, reward in history.evaluations
            if "cfm" in metrics and reward is not None]
    if len(seen) < 3:
        return None
    best, reward_then = min(seen[:-2])
    limit = best + 0.1 * abs(seen[0][0])
    if min(seen[-1][0], seen[-2][0]) > limit and seen[-1][1] > reward_then:
        return (f"held-out CFM has risen from {best:.4f} to {seen[-1][0]:.4f} while the reward has risen from "
                f"{reward_then:+.4f} to {seen[-1][1]:+.4f}: the policy learns what the rows of training reward and not "
                "the text: take the checkpoint of the best eval/cfm, and use more data, a lower --lr, a higher "
                "--ebft-ce-coef or --ebft-kl-coef")


def duplicates(history: History) -> str | None:
    share = history.level("copies")
    if share is not None and share > NEARLY_ALL:
        return (f"{share:.0%} of the rollouts repeat another one of their block: raise "
                "--ebft-temperature, --ebft-top-p or --ebft-rollout-length, or lower --ebft-num-samples")


CHECKS: dict[str, Callable[[History], str | None]] = dict(zip(RULES, (
    mismatch, nothing, reward_flat, entropy_collapse, zero_spread, gradient_spikes, overoptimised, duplicates),
    strict=True))
"""By the names of --ebft-stop-on-warning: what is wrong and the mend; None where all is well."""


def meaningless(args) -> set[str]:
    """Rules that can say nothing of a run with these flags."""
    mode, several = args.training_mode, args.ebft_num_samples > 1
    if mode == "sft":
        return CHECKS.keys() - {"nothing-counts", "gradient-spikes"}
    rules: set[str] = set()
    if not args.ebft_rl_coef:
        rules |= {"reward-flat", "overoptimised"}
    if args.ebft_replay_steps:  # rollouts do not follow the policy
        rules |= {"reward-flat", "entropy", "zero-spread", "overoptimised", "duplicates"}
    if mode == "ebft" and not several:
        rules.add("zero-spread")
    if mode != "ebft" or not several or not args.ebft_skip_duplicates:
        rules.add("duplicates")
    return rules


def copies(metrics: dict[str, float], config: EBFTConfig) -> float | None:
    """How many rollouts of the blocks that count repeat an earlier one of their block: 0, where all differ, to 1.

    --ebft-skip-duplicates leaves out the copies, and the blocks that do not count. The encoder's rows are those of
    --ebft-blocks-per-microbatch.
    """
    saved, valid, layout = metrics.get("encoder_tokens_saved"), metrics.get("valid_blocks"), config.layout
    if saved is None or not valid or layout.num_samples < 2:
        return None
    rows = split_blocks(layout, config.blocks_per_microbatch, layout.rollout_length)
    drawn = layout.num_blocks * layout.num_samples * layout.rollout_length
    surplus = sum(row.num_rollouts * row.steps for row in rows) - drawn  # of blocks that fill up the last row
    share = (saved * sum(row.length for row in rows) - surplus) / drawn  # of the rollouts' tokens
    return (share - (1 - valid)) / valid * layout.num_samples / (layout.num_samples - 1)


class Health(Callback):
    """Checks every rule of `CHECKS`.

    Raises:
        ValueError: --ebft-stop-on-warning names a rule that can say nothing of this run.
    """

    def __init__(self, args):
        self.stop_on = args.ebft_stop_on_warning or ()
        self.history, self.checks = History(args.training_mode == "rlvr"), CHECKS.keys() - meaningless(args)
        for name in set(self.stop_on) - self.checks:
            raise ValueError(f"--ebft-stop-on-warning {name}: this run never hears this warning "
                             "(megatron_ebft/run/README.md, Health); leave it out")
        self.calm = dict.fromkeys(CHECKS, CALM)
        """By rule, the steps in a row that were well."""

    def step_end(self, run, log, step):
        warn_of_failures(run.rlvr and run.rlvr.verification, f"step {step.iteration}", log)
        metrics = dict(step.metrics)
        if run.mode == "ebft" and run.config.skip_duplicates:
            share = copies(metrics, run.config)
            metrics |= {} if share is None else {"copies": share}
        self.history.add(metrics)
        self._check(CHECKS.keys() - {"overoptimised"}, f"step {step.iteration}", 1, run, log)

    def evaluated(self, run, log, iteration, metrics, seconds):
        where = f"evaluation after step {iteration}"
        warn_of_failures(run.eval_questions and run.eval_questions.verification, where, log)
        self.history.evaluations.append((metrics, self.history.level("reward")))
        self._check({"overoptimised"}, where, CALM, run, log)

    def _check(self, rules: set[str], where: str, calm: int, run, log) -> None:
        """Warn of what is wrong now and was not before. A check that is well counts for `calm` steps."""
        problem = None
        for name in [name for name in CHECKS if name in rules & self.checks]:
            wrong = CHECKS[name](self.history)
            if wrong is None:
                self.calm[name] += calm
                continue
            was_well, self.calm[name] = self.calm[name] >= CALM, 0
            if was_well:
                log.print(f"warning: {where}: {wrong}")
                if name in self.stop_on:
                    problem = problem or ValueError(f"--ebft-stop-on-warning {name}: {where}: {wrong}")
        if self.stop_on:
            run.stopper.check(steps=0, problem=problem)  # on all ranks or on none


def warn_of_failures(verification: Verification | None, where: str, log) -> None:
    """Warn, once, of answers that the verifier could not judge."""
    if verification is None or verification.is_warned or not verification.failures.count:
        return
    failures, verification.is_warned = verification.failures, True
    log.print(f"warning: {where}: {verification.name} could not judge {failures.count} of {failures.total} answers, "
              f"which count as wrong. The first reason: {failures.reason}")
