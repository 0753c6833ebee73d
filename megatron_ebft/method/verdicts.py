"""Verdicts on completions: one of the ranks that share a model verifies, for all of them."""

from collections.abc import Callable

import torch.distributed as dist

from megatron_ebft.data.questions import Question
from megatron_ebft.parallel.errors import collective_errors
from megatron_ebft.parallel.groups import is_last_stage, pp_group, tp_group
from megatron_ebft.rollout.generation import Completion
from megatron_ebft.verifiers.verdict import Verdict

Verify = Callable[[list[tuple[Question, Completion]]], list[Verdict]]
"""Verdicts on completions, in their order."""


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
