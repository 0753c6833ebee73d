"""Verdicts on completions: one of the ranks that share a model verifies, for all of them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist

from megatron_ebft.data.questions import Question
from megatron_ebft.parallel.errors import collective_errors
from megatron_ebft.parallel.groups import collected, is_last_stage, pp_group, tp_group
from megatron_ebft.rollout.generation import Completion
from megatron_ebft.verifiers.verdict import Verdict

Verify = Callable[[list[tuple[Question, Completion]]], list[Verdict]]
"""Verdicts on completions, in their order."""


@dataclass(frozen=True)
class Failures:
    """Answers that the verifier could not judge."""

    count: int
    total: int
    """Answers that it was given."""
    reason: str
    """Of the first; "" if there is none."""

    @property
    def share(self) -> float:
        return self.count / max(self.total, 1)


def failures(verdicts_QN: list[list[Verdict]]) -> Failures:
    """Failures among the verdicts of all data-parallel ranks, the same on every rank. All ranks must call."""
    given = [verdict for group in verdicts_QN for verdict in group]
    reasons = [verdict.reason for verdict in given if verdict.failed]
    counts, totals, firsts = zip(*collected([(len(reasons), len(given), reasons[:1])]), strict=True)
    return Failures(sum(counts), sum(totals), next((reason for first in firsts for reason in first), ""))


def verifies() -> bool:
    """Whether this rank verifies, for all that share its model."""
    return is_last_stage() and dist.get_rank(tp_group()) == 0


def verdicts(questions: list[Question], completions_QN: list[list[Completion]], verify: Verify) -> list[list[Verdict]]:
    """Verdicts on the completions of each question, `[question][sample]`, the same on every rank that shares the model.

    Raises:
        ValueError: what a verifier raised, on every rank.
    """
    answers = [(question, completion) for question, group in zip(questions, completions_QN, strict=True)
               for completion in group]
    box: list = [None]
    with collective_errors():
        if verifies():
            box = [verify(answers)]
    dist.broadcast_object_list(box, group=tp_group(), group_src=0)
    dist.broadcast_object_list(box, group=pp_group(), group_src=dist.get_world_size(pp_group()) - 1)
    given = iter(box[0])
    return [[next(given) for _ in group] for group in completions_QN]
