"""What RLVR needs besides models, from its flags: questions, and the verifier of their answers."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist

from megatron_ebft.data.questions import Question, Questions
from megatron_ebft.data.tokenizer import Tokenizer
from megatron_ebft.method.config import RLVRConfig
from megatron_ebft.method.rlvr import Verify, verifies
from megatron_ebft.parallel.errors import collective_errors
from megatron_ebft.rollout.generation import Completion
from megatron_ebft.run.configs import rlvr_config
from megatron_ebft.verifiers.build import build_verifier
from megatron_ebft.verifiers.verdict import Verdict


@dataclass(kw_only=True)
class RLVR:
    """What an RLVR run works on besides its models."""

    config: RLVRConfig
    questions: Questions
    verify: Verify
    close: Callable[[], None] = lambda: None
    """Ends the verifier's processes."""


def build_rlvr(args: argparse.Namespace, tokenizer: Tokenizer, end_ids: tuple[int, ...]) -> RLVR:
    """Questions, each checked by one of the ranks, and their verifier. A completion ends with one of `end_ids`.

    Raises:
        ValueError: on every rank; names the flag, and the line of a wrong question.
    """
    config = rlvr_config(args, end_ids)
    with collective_errors():
        verifier = build_verifier(args.ebft_verifier, timeout=args.ebft_verifier_timeout,
                                  workers=args.ebft_verifier_workers, unsafe_code=args.ebft_unsafe_code)
        questions = Questions(args.ebft_questions, tokenizer, args.seed)
        questions.check(range(dist.get_rank(), len(questions), dist.get_world_size()), verifier.check_question,
                        args.seq_length - args.ebft_max_new_tokens)

    def verify(answers: list[tuple[Question, Completion]]) -> list[Verdict]:
        return verifier.verify([(question.fields, answer_text(completion, tokenizer))
                                for question, completion in answers])

    if not verifies():
        verifier.close()
    return RLVR(config=config, questions=questions, verify=verify, close=verifier.close)


def answer_text(completion: Completion, tokenizer: Tokenizer) -> str:
    """The text of a completion, without the token that ended it."""
    return tokenizer.completion_text(completion.tokens[:-1] if completion.finished else completion.tokens)
