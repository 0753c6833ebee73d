"""One RLVR step: policy gradient with a verifier's reward on whole generations (METHOD: "RLVR").

    completions   ŷ_1..ŷ_n ~ p_θ(·|q)                  of every question, until they end
    rewards       R_j                                  by the verifier, from the text
    advantages    leave-one-out, or divided by the group's deviation
    gradient      of rl_coef·L_RL + β·KL
    update        clip, AdamW

Suffixes: Q questions of this rank, N completions of each.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from megatron_ebft.common.device import upload
from megatron_ebft.data.questions import Question
from megatron_ebft.method import energy
from megatron_ebft.method.completions import completion_batch, completion_gradient, completion_scores
from megatron_ebft.method.config import RLVRConfig
from megatron_ebft.method.means import Means
from megatron_ebft.method.update import clear_gradients, update
from megatron_ebft.method.verdicts import Failures, Verify, failures, verdicts
from megatron_ebft.parallel.groups import dp_sum
from megatron_ebft.rollout.generation import Completion, generate


def rlvr_step(*, policy: list, start, optimizer, questions: list[Question], verify: Verify, config: RLVRConfig,
              iteration: int, phase: Callable[[str], AbstractContextManager],
              after_rollouts: Callable[[], None] = lambda: None,
              judged: Callable[[Failures], None] = lambda failures: None,
              inspect: Callable[[Means], None] = lambda means: None) -> dict[str, float]:
    """One optimizer step on the questions of the global batch; returns its metrics, the same on every rank.

    Args:
        start: frozen starting policy; None: no KL term, and no distance to the start is measured.
        questions: this rank's questions of the global batch.
        iteration: steps done so far; names the step in the random numbers.
        phase: makes the context of each phase, from its name.
        after_rollouts: is called after the completions are drawn; may end the step by an exception.
        judged: is called with the answers that the verifier could not judge; may end the step by an exception.
        inspect: is called before the weights change, with what the step has measured; may raise StepFailed.

    Raises:
        StepFailed: a loss or gradient that is not finite; the weights are as they were.
        ValueError: what a verifier raised, on every rank.
    """
    means = Means()
    clear_gradients(policy, optimizer)
    with phase("rollout"):
        completions_QN = generate(policy, [question.prompt for question in questions], config.generation,
                                  iteration=iteration, occurrence=[question.occurrence for question in questions])
    after_rollouts()
    with phase("verify"):
        verdicts_QN = verdicts(questions, completions_QN, verify)
    failed = failures(verdicts_QN)
    judged(failed)
    reward_QN = upload(torch.tensor([[verdict.score for verdict in group] for group in verdicts_QN],
                                    dtype=torch.float64))
    is_right_QN = upload(torch.tensor([[verdict.is_right for verdict in group] for group in verdicts_QN]))
    advantage_QN = energy.advantages(reward_QN, torch.zeros_like(reward_QN), config.advantage, 1.0, 0.0)
    num_tokens = measure_completions(completions_QN, reward_QN, is_right_QN, means)
    needed_QN = torch.ones_like(is_right_QN) if config.kl_coef else advantage_QN != 0
    batch, start_C = completion_batch(questions, completions_QN, advantage_QN, needed_QN, config), None
    measure_savings(questions, completions_QN, needed_QN, means)
    if start is not None:
        with phase("start_scores"):
            start_C = completion_scores(start, batch, config)
    with phase("train"):
        completion_gradient(policy, batch, start_C, num_tokens, config, means)
    inspect(means)
    metrics = means.reduce()
    metrics["loss"] = config.rl_coef * metrics["rl_loss"] + config.kl_coef * metrics.get("kl_loss", 0.0)
    metrics["tokens"], metrics["verifier_failed"] = float(num_tokens), failed.share
    with phase("optimizer"):
        metrics["grad_norm"] = update(optimizer, metrics["loss"])
    return metrics


def measure_completions(completions_QN: list[list[Completion]], reward_QN: Tensor, is_right_QN: Tensor,
                        means: Means) -> Tensor:
    """Measure rewards, their spread within groups, and the completions; returns the tokens of the global batch."""
    completions = [completion for group in completions_QN for completion in group]
    tokens = sum(len(completion.tokens) for completion in completions)
    everywhere = torch.ones((), dtype=torch.bool, device=reward_QN.device)
    means.add_masked("reward", reward_QN, everywhere)
    means.add_masked("reward_std", reward_QN.std(-1, unbiased=False), everywhere)
    means.add_masked("zero_spread", (reward_QN == reward_QN[:, :1]).all(-1), everywhere)
    means.add_masked("success", is_right_QN, everywhere)
    means.add("length", tokens, len(completions))
    means.add("finished", sum(completion.finished for completion in completions), len(completions))
    means.add("entropy", -sum(sum(completion.log_probs) for completion in completions), tokens)
    means.add("rl_loss", 0.0, tokens)  # its terms follow (completion_gradient)
    return dp_sum(torch.full((), tokens, dtype=torch.float64, device=reward_QN.device))


def measure_savings(questions: list[Question], completions_QN: list[list[Completion]], needed_QN: Tensor,
                    means: Means) -> None:
    """The share of tokens that the training pass leaves out, prompts included."""
    length_QN = [[len(question.prompt) + len(completion.tokens) for completion in group]
                 for question, group in zip(questions, completions_QN, strict=True)]
    saved = torch.tensor(length_QN, device=needed_QN.device)
    means.add("training_tokens_saved", saved[~needed_QN].sum(), saved.sum())
