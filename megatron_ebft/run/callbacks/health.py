"""Warnings about a run that does not go well, each with the mend. They are printed at the first step of an episode."""

from megatron_ebft.run.callbacks.callback import Callback
from megatron_ebft.run.verification import Verification

HEALTHY_MISMATCH = 1.05
"""mean exp |Δ log-probability| between sampler and trainer up to which training is reported to go well."""


class Health(Callback):
    """Watches the metrics of steps and evaluations."""

    def __init__(self):
        self.is_healthy = self.has_counted = True

    def step_end(self, run, log, step):
        warn_of_failures(run.rlvr and run.rlvr.verification, f"step {step.iteration}", log)
        self.is_healthy = warn_of_mismatch(step.metrics.get("mismatch_ratio", 1.0), self.is_healthy, step.iteration,
                                           log)
        self.has_counted = warn_of_nothing(step.metrics, self.has_counted, step.iteration, log)

    def evaluated(self, run, log, iteration, metrics, seconds):
        warn_of_failures(run.eval_questions and run.eval_questions.verification, f"evaluation after step {iteration}",
                         log)


def warn_of_failures(verification: Verification | None, where: str, log) -> None:
    """Warn, once, of answers that the verifier could not judge."""
    if verification is None or verification.is_warned or not verification.failures.count:
        return
    failures, verification.is_warned = verification.failures, True
    log.print(f"warning: {where}: {verification.name} could not judge {failures.count} of {failures.total} answers, "
              f"which count as wrong. The first reason: {failures.reason}")


def warn_of_mismatch(ratio: float, was_healthy: bool, iteration: int, log) -> bool:
    """Whether the sampler is near enough to the training pass; warns when it ceases to be."""
    is_healthy = ratio <= HEALTHY_MISMATCH
    if was_healthy and not is_healthy:
        log.print(f"warning: step {iteration}: sampler and training pass differ by a factor of {ratio:.3f} a token "
                  f"(mean exp|Δ log p|; healthy up to {HEALTHY_MISMATCH}): look at train/mismatch_kl and "
                  "train/importance_truncated, and at --ebft-rollout-fp8 and --fp8-format")
    return is_healthy


def warn_of_nothing(metrics: dict[str, float], had_counted: bool, iteration: int, log) -> bool:
    """Whether a block of the step counts; in SFT a token, in RLVR a completion. Warns at the first step of those where
    none does."""
    is_rlvr = "success" in metrics
    has_counted = bool(metrics.get("valid_blocks", ("mismatch" if is_rlvr else "loss") in metrics))
    if had_counted and not has_counted and is_rlvr:
        log.print(f"warning: step {iteration}: the completions of each question have equal rewards, so nothing is "
                  f"learnt; {metrics['success']:.0%} are right: look at --ebft-questions (too hard, too easy, or in "
                  "another form than --ebft-verifier reads), --ebft-rlvr-num-samples and --global-batch-size")
    elif had_counted and not has_counted:
        what = "block" if "valid_blocks" in metrics else "token"
        log.print(f"warning: step {iteration}: no {what} of its rows counts, so nothing is learnt from "
                  f"{'rollouts' if what == 'block' else 'them'}: look at the share that counts, in the first lines, at "
                  "--global-batch-size, --ebft-answer-only and --ebft-document-mask")
    return has_counted
