"""Evaluation by questions in a run (--ebft-eval-questions), from its flags."""

import argparse
from dataclasses import dataclass

from megatron_ebft.data.questions import Question
from megatron_ebft.data.tokenizer import Tokenizer
from megatron_ebft.method.answers import Answered, AnswersConfig
from megatron_ebft.rollout.generation import GenerationConfig
from megatron_ebft.run.configs import row_multiple, stop_strings
from megatron_ebft.run.flags.precision import COMPLETIONS
from megatron_ebft.run.verification import Verification, build_questions, build_verification

SHOWN = 4
"""Questions whose answers TensorBoard shows."""


@dataclass(kw_only=True)
class EvalQuestions:
    """Questions that evaluation answers, and how."""

    questions: list[Question]
    config: AnswersConfig
    verification: Verification


def build_eval_questions(args: argparse.Namespace, tokenizer: Tokenizer, end_ids: tuple[int, ...],
                         longest: int) -> EvalQuestions | None:
    """None without the flag, or without evaluation.

    Args:
        end_ids: tokens that end a completion.
        longest: tokens of a sequence that the model supports.

    Raises:
        ValueError: on every rank; names the flag, and the line of a wrong question.
    """
    if not args.ebft_eval_questions or not args.eval_interval:
        return None
    generation = GenerationConfig(
        max_new_tokens=args.ebft_max_new_tokens, temperature=args.ebft_eval_temperature,
        top_p=args.ebft_eval_top_p, top_k=args.ebft_eval_top_k, seed=args.seed,
        num_samples=max(1, args.ebft_eval_samples), end_ids=end_ids, rows=args.ebft_rollout_rows or COMPLETIONS,
        pad_to=row_multiple(args), stops=stop_strings(args, tokenizer))
    verification = build_verification(args, args.ebft_verifier, generation, tokenizer)
    questions = build_questions(args.ebft_eval_questions, "--ebft-eval-questions", tokenizer, args.seed, verification,
                                longest - args.ebft_max_new_tokens,
                                "--max-position-embeddings less --ebft-max-new-tokens")
    pass_at = (args.ebft_pass_at or sorted({1, args.ebft_eval_samples})) if args.ebft_eval_samples else ()
    return EvalQuestions(questions=questions.in_order(), config=AnswersConfig(
        generation=generation, pass_at=tuple(pass_at)), verification=verification)


def metrics_of(answered: Answered) -> dict[str, float]:
    """The means of an evaluation by questions, as the log names them."""
    return {f"answers/{name}": mean.value for name, mean in answered.means.items()} | {
        f"answers/{name}": value for name, value in answered.corpus.items()}


def text_of(answered: Answered, evaluated: EvalQuestions, tokenizer: Tokenizer) -> str:
    """Markdown of the answers to a few questions, with verdicts."""
    sections = []
    for question, answers in list(zip(evaluated.questions, answered.answers))[:SHOWN]:
        sections.append(f"**question**\n```\n{question.fields['prompt']}\n```")
        for answer in answers[:SHOWN]:
            verdict = "right" if answer.verdict.is_right else f"wrong: {answer.verdict.reason}"
            text = evaluated.config.generation.text(answer.completion.tokens, tokenizer)
            sections.append(f"**{verdict}**\n```\n{text}\n```")
    return "\n\n".join(sections)
