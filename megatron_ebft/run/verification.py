"""The verifier of a run and the questions it is for, from the flags."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist

from megatron_ebft.data.questions import Question, Questions
from megatron_ebft.data.tokenizer import Tokenizer
from megatron_ebft.method.verdicts import Verify, verifies
from megatron_ebft.parallel.errors import collective_errors
from megatron_ebft.rollout.generation import Completion, GenerationConfig
from megatron_ebft.verifiers.build import build_verifier


@dataclass(kw_only=True)
class Verification:
    """A verifier of completions."""

    verify: Verify
    corpus_score: Callable[[list[tuple[Question, Completion]]], dict[str, float]]
    """BLEU or chrF of all completions together; {} with other verifiers."""
    check: Callable[[dict], None]
    """Raises ValueError for a question that lacks what the verifier reads."""
    close: Callable[[], None]
    """Ends the verifier's processes."""


def build_verification(args: argparse.Namespace, name: str, generation: GenerationConfig, tokenizer: Tokenizer,
                       flag: str = "--ebft-verifier") -> Verification:
    """A verifier of completions that are made as `generation` says.

    Args:
        name: of the verifier.
        flag: what names it in errors.

    Raises:
        ValueError: on every rank; names the flag.
    """
    with collective_errors():
        verifier = build_verifier(name, timeout=args.ebft_verifier_timeout, workers=args.ebft_verifier_workers,
                                  unsafe_code=args.ebft_unsafe_code, flag=flag)
    if not verifies():
        verifier.close()

    def texts(answers: list[tuple[Question, Completion]]) -> list[tuple[dict, str]]:
        return [(question.fields, generation.text(completion.tokens, tokenizer)) for question, completion in answers]

    return Verification(verify=lambda answers: verifier.verify(texts(answers)),
                        corpus_score=lambda answers: verifier.corpus_score(texts(answers)),
                        check=verifier.check_question, close=verifier.close)


def build_questions(path: str, flag: str, tokenizer: Tokenizer, seed: int, verification: Verification, longest: int,
                    room: str) -> Questions:
    """The questions of a file, each checked by one of the ranks.

    Args:
        flag: that named the file.
        longest: tokens that a prompt may have.
        room: the flags that leave so many, for the error.

    Raises:
        ValueError: on every rank; names the flag, and the line of a wrong question.
    """
    with collective_errors():
        questions = Questions(path, tokenizer, seed, flag)
        questions.check(range(dist.get_rank(), len(questions), dist.get_world_size()), verification.check, longest,
                        room)
    return questions
