"""The training loop, for both modes; read `train_step` for Algorithm 1."""

import math
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_ebft import ebft, energy
from megatron_ebft.batch import GoldBatch
from megatron_ebft.checkpoint import Saver, TrainState
from megatron_ebft.dataset import document_ids, rows_for_step
from megatron_ebft.device import device
from megatron_ebft.ebft import EBFTConfig, Rewards, Scores
from megatron_ebft.evaluation import evaluate
from megatron_ebft.metrics import Means, PhaseTimer
from megatron_ebft.parallel import document_rank, document_size
from megatron_ebft.rollout import Rollouts, sample_rollouts
from megatron_ebft.sft import cross_entropy_pass
from megatron_ebft.step_dump import StepDump, StepFailed, replayed_step

SELF_CHECK_FLOAT32, SELF_CHECK_BF16 = 1e-3, 5e-2
"""Mean |Δ log-probability| per token above which sampler and trainer, or trainer and start, are not the same model."""


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
    """Small files to keep in every checkpoint (hf_files.py)."""


def gold_batch(run: Run, dataset, consumed_samples: int) -> GoldBatch:
    """This rank's rows of the global batch that follows `consumed_samples`."""
    rows = rows_for_step(dataset, consumed_samples, run.args.global_batch_size, document_rank(), document_size())
    tokens = rows.tokens.to(device())
    return GoldBatch(
        tokens, rows.index.to(device()),
        document_ids(tokens, run.tokenizer.eod) if run.args.ebft_document_mask else None,
        rows.answer_mask.to(device()) if run.args.ebft_answer_only else None)


def next_rows(run: Run) -> tuple[GoldBatch, Rollouts | None]:
    """This rank's rows of the next step; with their rollouts where a dumped step is replayed."""
    if run.args.ebft_replay_steps:
        return replayed_step(run.args, run.state.iteration + 1, run.tokenizer.vocab_size).mine()
    return gold_batch(run, run.train_data, run.state.consumed_samples), None


def train(run: Run, log) -> None:
    """Train from run.state to --train-iters, evaluating, logging and saving on the way."""
    args, state = run.args, run.state
    batches = [gold_batch(run, run.valid_data, i * args.global_batch_size)
               for i in range(args.eval_iters)] if run.valid_data is not None else []
    if batches and state.iteration == 0:
        log.evaluation(0, *run_evaluation(run, batches, log))
    first = True
    while state.iteration < args.train_iters:
        start, timer = time.perf_counter(), PhaseTimer()
        with timer("data"):
            gold, rollouts = next_rows(run)
        metrics = train_step(run, gold, timer, check=first, rollouts=rollouts)
        first = False
        state.iteration += 1
        state.consumed_samples += args.global_batch_size
        is_last = state.iteration == args.train_iters
        if state.iteration % args.log_interval == 0 or is_last:
            log.step(state.iteration, metrics, timer.seconds, time.perf_counter() - start)
        if batches and (state.iteration % args.eval_interval == 0 or is_last):
            log.evaluation(state.iteration, *run_evaluation(run, batches, log))
        if args.save and (state.iteration % args.save_interval == 0 or is_last):
            saver = Saver(args.save)
            saver.save(state, run.policy, run.optimizer, run.scheduler, run.metadata, run.companions)
            log.saved(saver.finished())


def run_evaluation(run: Run, batches: list[GoldBatch], log):
    """Metrics, rollouts to show, and seconds."""
    start = time.perf_counter()
    metrics, shown = evaluate(run.policy, run.encoder, run.reference, log.progress("evaluation", batches), run.config,
                              run.args.ebft_eval_length, run.args.micro_batch_size)
    return metrics, shown, time.perf_counter() - start


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
                self_check(run, means)
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
    with timer("features"):
        rewards = ebft.compute_rewards(run.encoder, gold, rollouts, config)
    start = None
    if run.reference is not None and (config.kl_coef or check):
        with timer("reference"):
            start = ebft.score(run.reference, gold, rollouts, config).rollout_BKNG
    with timer("train"):
        scores = ebft.policy_gradient(run.policy, gold, rollouts, rewards.advantage, config, means,
                                      start if config.kl_coef else None)
    valid_BK = gold.valid_blocks(config.layout)
    measure_rewards(rewards, valid_BK, config, means)
    measure_mismatch(rollouts, scores, start, valid_BK, means)
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


def measure_mismatch(rollouts: Rollouts, scores: Scores, start_BKNG: Tensor | None, valid_BK: Tensor,
                     means: Means) -> None:
    """How far the training pass is from the sampler, and the policy from its start."""
    valid = valid_BK[..., None, None]
    mismatch = (scores.rollout_BKNG - rollouts.log_probs_BKNG).abs()
    means.add_masked("entropy", rollouts.entropy_BKNG, valid)
    means.add_masked("mismatch", mismatch, valid)
    means.add_masked("mismatch_ratio", mismatch.exp(), valid)
    if start_BKNG is not None:
        means.add_masked("distance_to_start", (scores.rollout_BKNG - start_BKNG).abs(), valid)


def self_check(run: Run, means: Means) -> None:
    """First step of a process: sampler = trainer; before any training trainer = start; rewards finite."""
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
    elif not found["mismatch"] <= limit:
        problems.append(f"the sampler's log-probabilities differ from the training pass's by {found['mismatch']:.2e} a "
                        f"token on average (limit {limit:.0e}): rollouts are not on-policy")
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
    run.optimizer.prepare_grads()
    norm = float(run.optimizer.get_grad_norm())
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise StepFailed(
            f"step {run.state.iteration + 1}: loss {loss}, gradient norm {norm}: not finite, stopped before the "
            f"optimizer step (samples {run.state.consumed_samples} to "
            f"{run.state.consumed_samples + run.args.global_batch_size - 1}). The last checkpoint is good; lower --lr "
            "or --clip-grad, or look at these samples")
    successful, _, _ = run.optimizer.step()
    assert successful, "only fp16 loss scaling skips steps"
    return norm
