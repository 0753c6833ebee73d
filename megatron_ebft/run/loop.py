"""The training loop, for all modes: data, step, log, evaluation, checkpoint."""

import time

from megatron_ebft.common.device import upload
from megatron_ebft.common.errors import NotFinite, StepFailed
from megatron_ebft.common.timer import PhaseTimer
from megatron_ebft.data.micro_batches import GoldBatch
from megatron_ebft.data.questions import Question
from megatron_ebft.data.rows import rows_for_step
from megatron_ebft.method.answers import evaluate_answers
from megatron_ebft.method.computed import Computed
from megatron_ebft.method.evaluation import evaluate
from megatron_ebft.method.means import Means
from megatron_ebft.method.rlvr import rlvr_step
from megatron_ebft.method.sft import sft_step
from megatron_ebft.method.step import ebft_step
from megatron_ebft.parallel.errors import collective_errors
from megatron_ebft.parallel.groups import document_rank, document_size
from megatron_ebft.rollout.sampler import Rollouts
from megatron_ebft.run.answers import metrics_of, text_of
from megatron_ebft.run.callbacks.callback import StepEnd
from megatron_ebft.run.saves import RunCheckpoints
from megatron_ebft.run.self_check import check_completions, self_check
from megatron_ebft.run.state import Run
from megatron_ebft.run.step_dump import StepDump, replayed_step
from megatron_ebft.run.stopping import CannotGoOn, StopAsked
from megatron_ebft.run.watchdog import PATIENCE


def train(run: Run, log) -> bool:
    """Train from run.state to --train-iters, evaluating, logging and saving on the way.

    Returns:
        whether the run is complete, with its last evaluation; False: it was asked to stop (stopping.py) and has saved
        what it did.
    """
    args, state, callbacks = run.args, run.state, run.callbacks
    batches = eval_batches(run)
    evaluates = bool(batches) or run.eval_questions is not None
    saves, stopped_by = RunCheckpoints(run, log) if args.save else None, None
    if state.iteration:
        state.restarts += 1
        state.lost_to_restarts += time.time() - state.reached
    callbacks.train_start(run, log)
    try:
        if evaluates and state.evaluated < state.iteration and is_due(state.iteration, args.eval_interval, args):
            run_evaluation(run, batches, log)
            if saves is not None and state.iteration:  # another restart must not evaluate this step again
                saves.save()
        unchecked = True
        while state.iteration < args.train_iters:
            start = time.perf_counter()
            callbacks.step_start(run, log, state.iteration + 1)
            timer = PhaseTimer(callbacks.phase)
            with timer("data"):
                batch, rollouts = next_batch(run)
            try:
                metrics = train_step(run, batch, timer, check=unchecked, rollouts=rollouts)
            except NotFinite as failure:
                raise failure if saves is None else saves.explain(failure) from failure
            unchecked = unchecked and run.mode != "sft" and "mismatch" not in metrics
            state.iteration += 1
            state.consumed_samples += args.global_batch_size
            state.reached, duration = time.time(), time.perf_counter() - start
            run.stopper.longest_step = max(run.stopper.longest_step, duration)
            callbacks.step_end(run, log, StepEnd(
                iteration=state.iteration, metrics=metrics, seconds=timer.seconds, duration=duration,
                is_logged=is_due(state.iteration, args.log_interval, args)))
            if evaluates and is_due(state.iteration, args.eval_interval, args):
                run_evaluation(run, batches, log)
            if saves is not None:
                saves.poll()
                if is_due(state.iteration, args.save_interval, args):
                    saves.save()
    except (StopAsked, CannotGoOn) as reason:
        log.print(f"stopping after step {state.iteration}/{args.train_iters}: {reason}")
        stopped_by = reason
    except StepFailed:
        if saves is not None:
            saves.poll(wait=True)  # every rank is here, and can complete a save under way
        raise
    if saves is not None:
        saves.finish()
    is_done = state.iteration == args.train_iters and (not evaluates or state.evaluated == state.iteration)
    callbacks.train_end(run, log, is_done)
    if isinstance(stopped_by, CannotGoOn):
        raise stopped_by
    return is_done


def train_step(run: Run, batch: GoldBatch | list[Question], phase, check: bool,
               rollouts: Rollouts | None = None) -> dict[str, float]:
    """One optimizer step on the global batch; returns its metrics, the same on every rank.

    Args:
        batch: this rank's rows; in rlvr, its questions.
        phase: makes the context of each phase, from its name.
        check: run the self-check before the weights change (first step of a process that has something to compare).
        rollouts: of these rows, instead of sampling them.

    Raises:
        StepFailed: a failed self-check, or a loss or gradient that is not finite; the weights are as they were.
        StopAsked: after the rollouts, on every rank; the weights have not changed.
    """
    first, last = run.state.consumed_samples, run.state.consumed_samples + run.args.global_batch_size - 1
    try:
        with StepDump(run.args, run.state.iteration + 1) as dump:
            if run.mode == "sft":
                metrics = sft_step(policy=run.policy, optimizer=run.optimizer, gold=batch,
                                   micro_batch_size=run.args.micro_batch_size, phase=phase)
            elif run.mode == "rlvr":
                metrics = rlvr_step(
                    policy=run.policy, start=run.start if run.args.ebft_kl_coef or check else None,
                    optimizer=run.optimizer, questions=batch, verify=run.rlvr.verification.verify,
                    config=run.rlvr.config, iteration=run.state.iteration, phase=phase,
                    after_rollouts=lambda: run.stopper.check(steps=0), judged=run.rlvr.verification.judged,
                    inspect=lambda means: check and check_completions(run, batch, means))
            else:
                def inspect(computed: Computed, means: Means) -> None:
                    dump.hold(batch, computed, means)
                    if check:
                        self_check(run, batch, computed, means)
                    run.callbacks.computed(run, batch, computed)

                metrics = ebft_step(
                    policy=run.policy, encoder=run.encoder, start=run.start if run.config.kl_coef or check else None,
                    optimizer=run.optimizer, gold=batch, config=run.config, iteration=run.state.iteration,
                    rollouts=rollouts, phase=phase, after_rollouts=lambda: run.stopper.check(steps=0), inspect=inspect)
    except StepFailed as failure:
        raise type(failure)(f"step {run.state.iteration + 1} (samples {first} to {last}): {failure}") from failure
    metrics["lr"] = run.optimizer.param_groups[0]["lr"]
    run.scheduler.step(increment=run.args.global_batch_size)  # the schedule counts rows, or questions
    return metrics


def gold_batch(run: Run, dataset, consumed_samples: int) -> GoldBatch:
    """This rank's rows of the global batch that follows `consumed_samples`."""
    rows = rows_for_step(dataset, consumed_samples, run.args.global_batch_size, document_rank(), document_size())
    return GoldBatch(upload(rows.tokens), upload(rows.index),
                     upload(rows.documents) if run.args.ebft_document_mask else None,
                     upload(rows.answer_mask) if run.args.ebft_answer_only else None)


def eval_batches(run: Run) -> list[GoldBatch]:
    """This rank's rows of every evaluation."""
    with collective_errors():
        return [gold_batch(run, run.valid_data, i * run.args.global_batch_size)
                for i in range(run.args.eval_iters)] if run.valid_data is not None else []


def next_batch(run: Run) -> tuple[GoldBatch | list[Question], Rollouts | None]:
    """This rank's rows (in rlvr, questions) of the next step, with their rollouts where a dumped step is replayed.

    Raises:
        StopAsked, CannotGoOn: on every rank, if one has been asked to stop or cannot read its rows.
    """
    batch = problem = None
    try:
        if run.args.ebft_replay_steps:
            batch = replayed_step(run.args, run.state.iteration + 1, run.tokenizer.vocab_size).local_part()
        elif run.mode == "rlvr":
            batch = run.rlvr.questions.of_step(run.state.consumed_samples, run.args.global_batch_size, document_rank(),
                                               document_size()), None
        else:
            batch = gold_batch(run, run.train_data, run.state.consumed_samples), None
    except ValueError as error:
        problem = error
    run.stopper.check(problem=problem)
    return batch


def is_due(iteration: int, interval: int, args) -> bool:
    """Whether it is time for something that happens every `interval` steps and at both ends."""
    return iteration % interval == 0 or iteration == args.train_iters


def run_evaluation(run: Run, batches: list[GoldBatch], log) -> None:
    """Evaluate and log; raises StopAsked between batches."""
    start, iteration = time.perf_counter(), run.state.iteration
    run.watchdog.enter(f"evaluation after step {iteration}", PATIENCE if run.eval_questions else 1)

    def checked():
        for batch in log.progress("evaluation", batches):
            run.stopper.check()
            yield batch

    metrics, shown = evaluate(run.policy, run.encoder, run.start, checked(), run.config, run.args.ebft_eval_length,
                              run.args.micro_batch_size)
    for name in ("cfm", "cfm_biased", "alignment"):
        at_length = f"{name}_length/{run.args.ebft_rollout_length:02d}"
        if at_length in metrics:
            metrics[name] = metrics[at_length]
    answers = None
    if run.eval_questions is not None:
        asked, verification = run.eval_questions, run.eval_questions.verification
        answered = evaluate_answers(run.policy, asked.questions, verification.verify, asked.config,
                                    verification.corpus_score, between=run.stopper.check)
        verification.judged(answered.failures)
        metrics |= metrics_of(answered)
        answers = text_of(answered, asked, run.tokenizer)
    run.state.evaluated, seconds = iteration, time.perf_counter() - start
    run.state.lost_to_evaluation += seconds
    log.evaluation(iteration, metrics, shown, seconds, answers)
    run.callbacks.evaluated(run, log, iteration, metrics, seconds)
