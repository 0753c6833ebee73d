"""What RLVR needs besides models, from its flags: questions, and the verifier of their answers."""

import argparse
from dataclasses import dataclass

from megatron_ebft.data.questions import Questions
from megatron_ebft.data.tokenizer import Tokenizer
from megatron_ebft.method.config import RLVRConfig
from megatron_ebft.run.configs import rlvr_config
from megatron_ebft.run.verification import Verification, build_questions, build_verification


@dataclass(kw_only=True)
class RLVR:
    """What an RLVR run works on besides its models."""

    config: RLVRConfig
    questions: Questions
    verification: Verification


def build_rlvr(args: argparse.Namespace, tokenizer: Tokenizer, end_ids: tuple[int, ...]) -> RLVR:
    """Questions, each checked by one of the ranks, and their verifier. A completion ends with one of `end_ids`.

    Raises:
        ValueError: on every rank; names the flag, and the line of a wrong question.
    """
    config = rlvr_config(args, tokenizer, end_ids)
    verification = build_verification(args, args.ebft_verifier, config.generation, tokenizer)
    questions = build_questions(args.ebft_questions, "--ebft-questions", tokenizer, args.seed, verification,
                                args.seq_length - args.ebft_max_new_tokens, "--seq-length less --ebft-max-new-tokens")
    return RLVR(config=config, questions=questions, verification=verification)
