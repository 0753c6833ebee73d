"""The verifier of a run and the questions it is for, from the flags."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist

from megatron_ebft.data.questions import Question, Questions
from megatron_ebft.data.tokenizer import Tokenizer
from megatron_ebft.method.verdicts import Failures, Verify, verifies
from megatron_ebft.parallel.errors import collective_errors
from megatron_ebft.rollout.generation import Completion, GenerationConfig
from megatron_ebft.run.stopping import CannotGoOn
from megatron_ebft.verifiers.build import build_verifier


@dataclass(kw_only=True)
class Verification:
    """A verifier of completions."""

    name: str
    """With the flag that names it, for errors."""
    verify: Verify
    corpus_score: Callable[[list[tuple[Question, Completion]]], dict[str, float]]
    """BLEU or chrF of all completions together; {} with other verifiers."""
    check: Callable[[dict], None]
    """Raises ValueError for a question that lacks what the verifier reads."""
    close: Callable[[], None]
    """Ends the verifier's processes."""
    signature: Callable[[], str]
    """sacrebleu's, of the last corpus score; "" with other verifiers."""
    failures: Failures = Failures(0, 0, "")
    """Of the last answers of all ranks."""
    is_warned: bool = False
    """Whether the console has told of failures."""

    def judged(self, failures: Failures) -> None:
        """Take note of the answers that the verifier could not judge.

        Raises:
            CannotGoOn: it could judge none. Rewards and accuracies of 0 would say nothing of the model.
        """
        self.failures = failures
        if failures.count and failures.count == failures.total:
            raise CannotGoOn(f"{self.name}: could judge none of {failures.total} answers. The first reason: "
                             f"{failures.reason}. Mend the verifier, or raise its time with --ebft-verifier-timeout")


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

    def texts(answers: list[tuple[Question, Completion]]) -> list[tuple[dict, str]]:
        return [(question.fields, generation.text(completion.tokens, tokenizer)) for question, completion in answers]

    return Verification(name=f"{flag} {name}", verify=lambda answers: verifier.verify(texts(answers)),
                        corpus_score=lambda answers: verifier.corpus_score(texts(answers)),
                        check=verifier.check_question, close=verifier.close, signature=lambda: verifier.signature)


def build_questions(path: str, flag: str, tokenizer: Tokenizer, seed: int, verification: Verification, longest: int,
                    room: str) -> Questions:
    """The questions of a file, each checked by one of the ranks. Ends the verifier's processes on ranks that need none.

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
    if not verifies():
        verification.close()
    return questions
