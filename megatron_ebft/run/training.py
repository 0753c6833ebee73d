"""The training loop, for both modes; read `train_step` for Algorithm 1."""

import math
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from torch import Tensor

from megatron_ebft.checkpointing.checkpoint import Saver, TrainState
from megatron_ebft.common.device import upload
from megatron_ebft.common.timer import PhaseTimer
from megatron_ebft.data.micro_batches import GoldBatch
from megatron_ebft.data.rows import document_ids, rows_for_step
from megatron_ebft.method import ebft, energy
from megatron_ebft.method.ebft import EBFTConfig, Rewards, Scores
from megatron_ebft.method.evaluation import evaluate
from megatron_ebft.method.means import Means
from megatron_ebft.method.sft import cross_entropy_pass
from megatron_ebft.model.fp8 import FP8
from megatron_ebft.parallel.groups import document_rank, document_size
from megatron_ebft.rollout.sampler import Rollouts, sample_rollouts
from megatron_ebft.run.flags.checks import fp8_recipes
from megatron_ebft.run.step_dump import StepDump, replayed_step
from megatron_ebft.run.stopping import StepFailed, StopAsked, Stopper
from megatron_ebft.run.watchdog import PATIENCE, Watchdog

SELF_CHECK_FLOAT32, SELF_CHECK_BF16 = 1e-3, 5e-2
"""Mean |Δ log-probability| per token above which sampler and trainer, or trainer and start, are not the same model."""
SELF_CHECK_FP8 = 0.3
"""The same for what FP8 may add to it."""
HEALTHY_MISMATCH = 1.05
"""mean exp |Δ log-probability| between sampler and trainer up to which training is reported to go well."""


@dataclass
class Run:
    """Everything the loop works on."""

    mode: str
    """`ebft` or `sft`."""
    policy: list
    encoder: object | None
    reference: object | None
    """Frozen starting policy, or None when nothing asks for KL."""
    optimizer: object
    scheduler: object
    config: EBFTConfig | None
    """The method; None without an encoder."""
    train_data: object
    valid_data: object | None
    tokenizer: object
    args: object
    """Flags of the loop itself: intervals, batch sizes, folders, masks."""
    metadata: dict
    """Recorded in every checkpoint."""
    state: TrainState
    companions: dict[str, bytes] = field(default_factory=dict)
    """Small files to keep in every checkpoint (hf/files.py)."""
    stopper: Stopper = field(default_factory=Stopper)
    watchdog: Watchdog = field(default_factory=Watchdog)


def gold_batch(run: Run, dataset, consumed_samples: int) -> GoldBatch:
    """This rank's rows of the global batch that follows `consumed_samples`."""
    rows = rows_for_step(dataset, consumed_samples, run.args.global_batch_size, document_rank(), document_size())
    tokens = upload(rows.tokens)
    return GoldBatch(
        tokens, upload(rows.index),
        document_ids(tokens, run.tokenizer.eod) if run.args.ebft_document_mask else None,
        upload(rows.answer_mask) if run.args.ebft_answer_only else None)


def next_rows(run: Run) -> tuple[GoldBatch, Rollouts | None]:
    """This rank's rows of the next step; with their rollouts where a dumped step is replayed."""
    if run.args.ebft_replay_steps:
        return replayed_step(run.args, run.state.iteration + 1, run.tokenizer.vocab_size).mine()
    return gold_batch(run, run.train_data, run.state.consumed_samples), None


def train(run: Run, log) -> bool:
    """Train from run.state to --train-iters, evaluating, logging and saving on the way.

    Returns:
        whether it came so far, last evaluation included; else it was asked to stop (stopping.py), and what was done is
        saved.
    """
    args, state = run.args, run.state
    batches = [gold_batch(run, run.valid_data, i * args.global_batch_size)
               for i in range(args.eval_iters)] if run.valid_data is not None else []
    saves = Saves(run, log) if args.save else None
    if state.iteration:
        state.restarts += 1
        state.lost_to_restarts += time.time() - state.reached
    try:
        if batches and state.evaluated < state.iteration and is_due(state.iteration, args.eval_interval, args):
            run_evaluation(run, batches, log)
            if saves is not None and state.iteration:  # or it would be there twice after another restart
                saves.save()
        first = is_healthy = True
        while state.iteration < args.train_iters:
            run.stopper.check()
            start = time.perf_counter()
            timer = PhaseTimer(lambda phase: run.watchdog.enter(f"{phase} of step {state.iteration + 1}"))
            with timer("data"):
                gold, rollouts = next_rows(run)
            metrics = train_step(run, gold, timer, check=first, rollouts=rollouts)
            first = False
            state.iteration += 1
            state.consumed_samples += args.global_batch_size
            state.reached, duration = time.time(), time.perf_counter() - start
            run.stopper.longest_step = max(run.stopper.longest_step, duration)
            if is_due(state.iteration, args.log_interval, args):
                log.step(state.iteration, metrics, timer.seconds, duration, {
                    "restarts": state.restarts, "lost_to_restarts": state.lost_to_restarts,
                    "lost_to_saves": state.lost_to_saves})
            is_healthy = warn_of_mismatch(metrics.get("mismatch_ratio", 1.0), is_healthy, state.iteration, log)
            if batches and is_due(state.iteration, args.eval_interval, args):
                run_evaluation(run, batches, log)
            if saves is not None:
                saves.poll()
                if is_due(state.iteration, args.save_interval, args):
                    saves.save()
    except StopAsked as reason:
        log.print(f"stopping after step {state.iteration}/{args.train_iters}: {reason}")
    if saves is not None:
        saves.finish()
    return state.iteration == args.train_iters and (not batches or state.evaluated == state.iteration)


def warn_of_mismatch(ratio: float, was_healthy: bool, iteration: int, log) -> bool:
    """Whether the sampler is near enough to the training pass; says so when it ceases to be."""
    is_healthy = ratio <= HEALTHY_MISMATCH
    if was_healthy and not is_healthy:
        log.print(f"warning: step {iteration}: sampler and training pass differ by a factor of {ratio:.3f} a token "
                  f"(mean exp|Δ log p|; healthy up to {HEALTHY_MISMATCH}): look at train/mismatch_kl and "
                  "train/importance_truncated, and at --ebft-rollout-fp8 and --fp8-format")
    return is_healthy


def is_due(iteration: int, interval: int, args) -> bool:
    """Whether something that is done every `interval` steps, and at both ends, is to be done."""
    return iteration % interval == 0 or iteration == args.train_iters


class Saves:
    """The checkpoints of a run with --save: one that fails costs a warning, unless it is the last."""

    def __init__(self, run: Run, log):
        args = run.args
        self.run, self.log = run, log
        self.saver = Saver(args.save, is_async=args.async_save, keep=args.ebft_keep_checkpoints,
                           retain_interval=args.save_retain_interval)
        self.last: tuple[int, int] | None = self._place()
        """Progress at the last save that has not failed, or that was loaded."""
        self.begun = 0.0
        """When the save under way was begun, by time.perf_counter()."""
        run.stopper.longest_save = run.state.longest_save

    def _place(self) -> tuple[int, int]:
        return self.run.state.iteration, self.run.state.evaluated

    def save(self) -> None:
        """Begin a checkpoint of the run as it is."""
        run = self.run
        self.log.flush()
        self.poll(wait=True)
        self.begun = time.perf_counter()
        with self._attempt():
            self.saver.save(run.state, run.policy, run.optimizer, run.scheduler, run.metadata, run.companions)
            self.last = self._place()
        self.poll()

    def poll(self, wait: bool = False) -> None:
        """Say when a checkpoint has become whole."""
        with self._attempt():
            folder = self.saver.finished(wait)
            self.log.saved(folder)
            if folder is not None:  # of a save in the background, the writing included
                longest = max(self.run.state.longest_save, time.perf_counter() - self.begun)
                self.run.state.longest_save = self.run.stopper.longest_save = longest

    def finish(self) -> None:
        """A checkpoint of the end, unless there is one; raises RuntimeError where it cannot be written."""
        self.poll(wait=True)
        if self.last != self._place():
            self.save()
            self.poll(wait=True)
        if self.last != self._place():
            raise RuntimeError(f"--save {self.run.args.save}: the run's end, step {self.run.state.iteration}, could "
                               "not be saved; make room there and start the same command again")

    @contextmanager
    def _attempt(self):
        start, state = time.perf_counter(), self.run.state
        self.run.watchdog.enter(f"saving after step {state.iteration}", PATIENCE)
        try:
            yield
        except ValueError as error:
            self.log.print(f"warning: {error}. Training goes on")
            self.last = None
        state.lost_to_saves += time.perf_counter() - start


def run_evaluation(run: Run, batches: list[GoldBatch], log) -> None:
    """Evaluate and log; raises StopAsked between batches."""
    start, iteration = time.perf_counter(), run.state.iteration
    run.watchdog.enter(f"evaluation after step {iteration}")

    def checked():
        for batch in log.progress("evaluation", batches):
            run.stopper.check()
            yield batch

    found = evaluate(run.policy, run.encoder, run.reference, checked(), run.config, run.args.ebft_eval_length,
                     run.args.micro_batch_size)
    run.state.evaluated = iteration
    log.evaluation(iteration, *found, time.perf_counter() - start)


def train_step(run: Run, gold: GoldBatch, timer: PhaseTimer, check: bool,
               rollouts: Rollouts | None = None) -> dict[str, float]:
    """One optimizer step on the global batch; returns its metrics, the same on every rank.

    Args:
        check: compare sampler, trainer and start before the optimizer moves anything (first step of a process).
        rollouts: of these rows, instead of sampling them.

    Raises:
        StepFailed: a failed self-check, or a loss or gradient that is not finite; the weights are as they were.
    """
    means = Means()
    for chunk in run.policy:
        chunk.zero_grad_buffer()
    run.optimizer.zero_grad()
    with StepDump(run.args, run.state.iteration + 1) as dump:
        if run.mode == "sft":
            with timer("train"):
                cross_entropy_pass(run.policy, gold, run.args.micro_batch_size, means, forward_only=False)
            coefficients = {"ce_loss": 1.0}
        else:
            dump.hold(gold, *ebft_gradient(run, gold, rollouts, timer, means, check), means)
            if check:
                self_check(run, means, gold)
            config = run.config
            coefficients = {"rl_loss": config.rl_coef, "ce_loss": config.ce_coef, "kl_loss": config.kl_coef}
        metrics = means.reduce()
        metrics["loss"] = sum(c * metrics[name] for name, c in coefficients.items() if name in metrics)
        with timer("optimizer"):
            metrics["grad_norm"] = optimizer_step(run, metrics["loss"])
    metrics["lr"] = run.optimizer.param_groups[0]["lr"]
    run.scheduler.step(increment=run.args.global_batch_size)
    return metrics


def ebft_gradient(run: Run, gold: GoldBatch, rollouts: Rollouts | None, timer: PhaseTimer, means: Means,
                  check: bool) -> tuple[Rollouts, Rewards, Scores]:
    """Algorithm 1 up to the optimizer: rollouts → features → rewards → advantages → gradient of the loss."""
    config = run.config
    with timer("rollout"):
        rollouts = rollouts or sample_rollouts(run.policy, gold, config.layout, config.sampling, run.state.iteration,
                                               config.rollout_rows)
    run.stopper.check(steps=0)
    with timer("features"):
        rewards = ebft.compute_rewards(run.encoder, gold, rollouts, config, means)
    valid_BK, start = gold.valid_blocks(config.layout), None
    if run.reference is not None and (config.kl_coef or check):
        with timer("reference"):
            needed_BKN = valid_BK[..., None].expand_as(rewards.advantage)
            start = ebft.score(run.reference, gold, rollouts, config, needed_BKN).rollout_BKNG
    with timer("train"):
        scores = ebft.policy_gradient(run.policy, gold, rollouts, rewards.advantage, config, means,
                                      start if config.kl_coef else None)
    measure_rewards(rewards, valid_BK, config, means)
    measure_mismatch(rollouts, scores, start, valid_BK, config.importance_cap, means)
    return rollouts, rewards, scores


def measure_rewards(rewards: Rewards, valid_BK: Tensor, config: EBFTConfig, means: Means) -> None:
    """Reward and its parts, its spread within groups, and CFM of un-whitened features."""
    reward = config.alignment_coef * rewards.alignment - config.diversity_coef * rewards.diversity
    valid_BK1 = valid_BK[..., None]
    spread = reward.std(-1, unbiased=False)
    biased, unbiased = energy.cfm(rewards.gram)
    means.add_masked("reward", reward, valid_BK1)
    means.add_masked("alignment", rewards.alignment, valid_BK1)
    means.add_masked("diversity", rewards.diversity, valid_BK1)
    means.add_masked("reward_std", spread, valid_BK)
    means.add_masked("zero_spread", (spread < 1e-6).float(), valid_BK)
    means.add_masked("cfm_biased", biased, valid_BK)
    if config.num_samples > 1:
        means.add_masked("cfm", unbiased, valid_BK)
    means.add_masked("valid_blocks", valid_BK.float(), torch.ones_like(valid_BK))


def measure_mismatch(rollouts: Rollouts, scores: Scores, start_BKNG: Tensor | None, valid_BK: Tensor, cap: float,
                     means: Means) -> None:
    """How far the training pass is from the sampler, and the policy from its start: where the pass has scored."""
    valid = valid_BK[..., None, None]
    scored = valid & scores.is_scored_BKNG
    change = scores.rollout_BKNG - rollouts.log_probs_BKNG
    mismatch = change.abs()
    means.add_masked("entropy", rollouts.entropy_BKNG, valid)
    means.add_masked("mismatch", mismatch, scored)
    means.add_masked("mismatch_ratio", mismatch.exp(), scored)
    means.add_masked("mismatch_kl", torch.expm1(change) - change, scored)  # KL(sampler ‖ training pass), k3
    means.add_masked("importance_truncated", (change > math.log(cap or math.inf)).float(), scored)
    if start_BKNG is not None:
        means.add_masked("distance_to_start", (scores.rollout_BKNG - start_BKNG).abs(), scored)


def mismatch_without_fp8(run: Run, gold: GoldBatch) -> float:
    """Mean |Δ log-probability| a token between training pass and sampler, for rollouts drawn without FP8."""
    config, means = run.config, Means()
    sampling = replace(config.sampling, fp8=FP8())
    rollouts = sample_rollouts(run.policy, gold, config.layout, sampling, run.state.iteration, config.rollout_rows)
    scores = ebft.score(run.policy, gold, rollouts, config)
    valid = gold.valid_blocks(config.layout)[..., None, None]
    means.add_masked("mismatch", (scores.rollout_BKNG - rollouts.log_probs_BKNG).abs(), valid)
    return means.reduce().get("mismatch", 0.0)


def self_check(run: Run, means: Means, gold: GoldBatch) -> None:
    """First step of a process: sampler = trainer; before any training trainer = start; rewards finite.

    With FP8 in either, whose rounding would hide a mistake, they are compared without it, and what it adds must be
    within SELF_CHECK_FP8.
    """
    limit = SELF_CHECK_BF16 if run.args.bf16 else SELF_CHECK_FLOAT32
    found = means.reduce()
    problems = []
    found = {"reward": 0.0, "mismatch": 0.0, **found}  # a batch without a valid block has neither
    if not math.isfinite(found["reward"]):
        problems.append(f"the mean reward is {found['reward']}, not finite: check the weights of --ebft-encoder-load "
                        "or --pretrained-checkpoint")
    if not math.isfinite(found["mismatch"]):
        problems.append("the policy's log-probabilities are not finite: check the weights of --pretrained-checkpoint "
                        "or --load")
    else:
        recipes = {flag: x for flag, x in fp8_recipes(run.args).items() if flag != "--ebft-encoder-fp8"}
        has_fp8 = bool(recipes)
        sampler = mismatch_without_fp8(run, gold) if has_fp8 else found["mismatch"]
        if not sampler <= limit:
            problems.append(f"the sampler's log-probabilities differ from the training pass's by {sampler:.2e} a token "
                            f"on average{' without FP8' * has_fp8} (limit {limit:.0e}): rollouts are not on-policy")
        elif has_fp8 and found["mismatch"] > SELF_CHECK_FP8:
            problems.append(f"{' and '.join(map(' '.join, recipes.items()))}: changes log-probabilities by "
                            f"{found['mismatch']:.2e} a token on average (limit {SELF_CHECK_FP8:g}), more than the "
                            "correction can take back: use another recipe, or --first-last-layers-bf16")
    if run.args.fp8_format:
        limit = SELF_CHECK_FP8
    if run.state.iteration == 0 and found.get("distance_to_start", 0.0) > limit:
        problems.append(f"the policy's log-probabilities differ from the starting policy's by "
                        f"{found['distance_to_start']:.2e} a token before the first step (limit {limit:.0e})")
    if problems:
        raise StepFailed("first-step self-check failed; nothing was trained. " + "; ".join(problems))


def optimizer_step(run: Run, loss: float) -> float:
    """Clip and apply the gradients; returns their norm before clipping.

    Raises:
        StepFailed: the loss or the norm is not finite; nothing was changed.
    """
    optimizer = run.optimizer
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise StepFailed(
            f"step {run.state.iteration + 1}: loss {loss}, gradient norm {norm}: not finite, stopped before the "
            f"optimizer step (samples {run.state.consumed_samples} to "
            f"{run.state.consumed_samples + run.args.global_batch_size - 1}). The last checkpoint is good; lower --lr "
            "or --clip-grad, or look at these samples")
    parameters = optimizer.get_parameters()  # none in a rank's share of a small model
    if parameters and optimizer.config.clip_grad > 0:  # as Megatron's step(), which would take the norm once more
        clip_grad_by_total_norm_fp32(parameters, optimizer.config.clip_grad, norm)
    successful = optimizer.step_with_ready_grads()
    assert successful, "only fp16 loss scaling skips steps"
    return norm
