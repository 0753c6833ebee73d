"""How good a trained model is: answers to questions, cross entropy and CFM of held-out text.

    python tools/evaluate.py --load checkpoints/ebft --questions questions.jsonl --verifier math \\
        --num-samples 16 --pass-at 1 4 16 --json results.json
    torchrun --nproc-per-node 8 tools/evaluate.py --hf-model DIR --text-data data/held_out_text_document \\
        --ebft-encoder-load checkpoints/base --seq-length 1024 --ebft-document-mask

1. Questions: the greedy answer of each gives the accuracy (and BLEU or chrF), --num-samples samples give pass@k. In
   brackets: the 95 % interval of a bootstrap over questions. megatron_ebft/verifiers/README.md has the verifiers.
2. --text-data: cross entropy and perplexity of its rows of --seq-length tokens and, with --ebft-encoder-load, CFM by
   completion length, as evaluation in training measures them.
3. Every evaluation draws the same random numbers, so that two models differ by their weights alone.
"""

import argparse
import sys
import warnings
from collections.abc import Callable

import trained_model
from generate import GENERATION, check_stops, generation_config, is_first, say
from lines_file import LinesFile, check_output

from megatron_ebft.run.ending import fail
from megatron_ebft.run.flags.flag import Flag, Group, at_least
from megatron_ebft.run.flags.method import METHOD
from megatron_ebft.run.flags.verifiers import VERIFIERS

QUESTIONS = Group("questions", (
    Flag("--questions", str, "JSON Lines with a `prompt` each, and the fields that the verifier reads", metavar="FILE"),
    Flag("--verifier", str, "how answers are verified: exact, regex, math, code, bleu, chrf, or module:function",
         metavar="NAME"),
    Flag("--pass-at", int, "values of k for pass@k, at most --num-samples", many=True, valid=at_least(1),
         default_text="1 and --num-samples"),
    Flag("--samples-output", str, "file for all answers with their verdicts", metavar="FILE"),
    *(flag for flag in GENERATION.flags if flag.name not in ("--prompts", "--output", "--num-samples")),
    Flag("--num-samples", int, "samples of each question (0: greedy answers alone)", default=0, valid=at_least(0)),
    *(flag for flag in VERIFIERS.flags if flag.name != "--ebft-verifier")))
TEXT = Group("held-out text", (
    Flag("--text-data", str, "dataset made by tools/preprocess_data.py", metavar="PREFIX"),
    Flag("--text-rows", int, "rows that are read", valid=at_least(1), default_text="all")))
RESULTS = Group("results", (Flag("--json", str, "write all figures to this file", metavar="FILE"),))
READS = frozenset({"seq_length", "micro_batch_size", "ebft_document_mask", "ebft_answer_only", "ebft_encoder_load",
                   "ebft_eval_length", "data_cache_path", *METHOD.dests})


def check(args: argparse.Namespace) -> None:
    """Check flags against each other; fills in --pass-at.

    Raises:
        ValueError: naming the flag.
    """
    trained_model.check_model(args)
    if not (args.questions or args.text_data):
        raise ValueError("--questions, --text-data: give at least one of the two to evaluate on")
    if bool(args.questions) != bool(args.verifier):
        raise ValueError("--questions and --verifier: give both or neither")
    if args.ebft_encoder_load and not args.text_data:
        raise ValueError("--ebft-encoder-load: CFM needs rows of text; give --text-data")
    if args.pass_at is None:
        args.pass_at = sorted({1, args.num_samples}) if args.num_samples else []
    if args.pass_at and max(args.pass_at) > args.num_samples:
        raise ValueError(f"--pass-at {max(args.pass_at)}: needs as many samples; --num-samples is {args.num_samples}")
    if args.num_samples and args.temperature == 0:
        raise ValueError(f"--num-samples {args.num_samples} with --temperature 0: all would be the greedy answer, "
                         "which is counted anyway; give a temperature, or leave the samples out")
    check_stops(args.stop)
    check_output(args.json, "--json")
    check_output(args.samples_output, "--samples-output")


def on_questions(args: argparse.Namespace, trained) -> Callable[[], dict]:
    """Check the questions; returns what answers them: means with their intervals, and scores of all greedy answers
    together; on the first rank."""
    from megatron_ebft.common.progress import Progress
    from megatron_ebft.method.answers import AnswersConfig, evaluate_answers
    from megatron_ebft.run.verification import build_questions, build_verification
    from megatron_ebft.run.watchdog import PATIENCE

    config = AnswersConfig(generation=generation_config(args, trained), pass_at=tuple(args.pass_at))
    verification = build_verification(args, args.verifier, config.generation, trained.tokenizer, "--verifier")
    questions = build_questions(args.questions, "--questions", trained.tokenizer, args.seed, verification,
                                trained.architecture.max_position_embeddings - args.max_new_tokens,
                                f"{trained.origin}, less --max-new-tokens,").in_order()

    def evaluate() -> dict:
        trained.watchdog.enter("answers", PATIENCE)
        progress = Progress("answers", len(questions) * config.num_answers, say)
        answered = evaluate_answers([trained.model], questions, verification.verify, config, verification.corpus_score,
                                    done=lambda answers: progress.add(answers - progress.done))
        verification.close()
        if args.samples_output and is_first():
            write_answers(args.samples_output, questions, answered, config.generation, trained.tokenizer)
        verification.judged(answered.failures)
        means = {name: dict(zip(("value", "low", "high"), (mean.value, *mean.interval())))
                 for name, mean in answered.means.items()} if is_first() else {}
        return {"questions": len(questions), "means": means, "corpus": answered.corpus,
                "signature": verification.signature()}

    return evaluate


def write_answers(path: str, questions: list, answered, generation, tokenizer) -> None:
    """Each question with its answers and their verdicts, the greedy answer first, as JSON Lines."""
    with LinesFile(path, "--samples-output") as file:
        for question, answers in zip(questions, answered.answers, strict=True):
            file.write(question.fields | {"completions": [
                {"text": generation.text(answer.completion.tokens, tokenizer), "score": answer.verdict.score,
                 "is_right": answer.verdict.is_right, "reason": answer.verdict.reason} for answer in answers]})


def on_text(args: argparse.Namespace, trained) -> Callable[[], dict]:
    """Open --text-data and load the encoder; returns what computes the cross entropy and, with an encoder, CFM of the
    rows, the same on every rank."""
    from megatron_ebft.common.progress import Progress
    from megatron_ebft.data.datasets import build_datasets
    from megatron_ebft.method.evaluation import evaluate
    from megatron_ebft.parallel.groups import document_size
    from megatron_ebft.run.configs import ebft_config

    if args.seq_length > trained.architecture.max_position_embeddings:
        raise ValueError(f"--seq-length {args.seq_length}: {trained.origin} is for "
                         f"{trained.architecture.max_position_embeddings} tokens")
    try:
        _, dataset, _ = build_datasets(
            seq_length=args.seq_length, seed=args.seed, sizes=(0, None, 0), tokenizer=trained.tokenizer,
            valid_data_path=[args.text_data], data_cache_path=args.data_cache_path, need_answers=args.ebft_answer_only)
    except ValueError as error:
        raise ValueError(f"{error}".replace("--valid-data-path", "--text-data")) from error
    rows = min(args.text_rows or len(dataset), len(dataset))
    config = ebft_config(args, trained.architecture.num_layers) if args.ebft_encoder_load else None
    features = encoder(args, trained, config)

    def measure() -> dict:
        trained.watchdog.enter("text")
        together = args.micro_batch_size * document_size()
        progress = Progress("rows read", rows, say)

        def batches():
            for first in range(0, rows, together):
                yield gold_batch(args, dataset, first, rows)
                progress.add(together)

        metrics, _ = evaluate([trained.model], features, None, batches(), config, args.ebft_eval_length,
                              args.micro_batch_size)
        return {"rows": rows} | metrics

    return measure


def encoder(args: argparse.Namespace, trained, config):
    """The frozen encoder of --ebft-encoder-load; None without it."""
    from megatron_ebft.checkpointing.loader import load_weights
    from megatron_ebft.model.build import build_encoder
    from megatron_ebft.run.configs import transformer_overrides
    from megatron_ebft.run.models import fixed_fields

    if config is None:
        return None
    model = build_encoder(trained.architecture, max(config.feature_map.layers), **transformer_overrides(args))
    load_weights(args.ebft_encoder_load, model, architecture=fixed_fields(trained.architecture),
                 flag="--ebft-encoder-load")
    return model


def gold_batch(args: argparse.Namespace, dataset, first: int, rows: int):
    """This rank's micro-batch of the rows from `first` on. Where there are no more, a row is repeated and does not
    count."""
    import torch

    from megatron_ebft.common.device import upload
    from megatron_ebft.data.micro_batches import GoldBatch
    from megatron_ebft.parallel.groups import document_rank

    first += document_rank() * args.micro_batch_size
    mine = range(first, first + args.micro_batch_size)
    read = [dataset[min(index, rows - 1)] for index in mine]
    answer_BT = torch.stack([row["answer_mask"] if args.ebft_answer_only else torch.ones_like(row["answer_mask"])
                             for row in read])
    answer_BT &= torch.tensor([index < rows for index in mine])[:, None]
    documents_BT = torch.stack([row["documents"] for row in read]) if args.ebft_document_mask else None
    return GoldBatch(upload(torch.stack([row["tokens"] for row in read])), upload(torch.tensor(mine)),
                     None if documents_BT is None else upload(documents_BT), upload(answer_BT))


def table(results: dict) -> str:
    """All figures as text."""
    lines = []
    for name, value in results.get("answers", {}).get("means", {}).items():
        lines.append(f"{name:>24}  {value['value']:.4f}  [{value['low']:.4f}, {value['high']:.4f}]")
    for name, value in (results.get("answers", {}).get("corpus", {}) | results.get("text", {})).items():
        lines.append(f"{name:>24}  {value:.4f}" if isinstance(value, float) else f"{name:>24}  {value}")
    if signature := results.get("answers", {}).get("signature"):
        lines.append(f"{'signature':>24}  {signature}")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Parse, check all inputs, load, evaluate, print and write."""
    warnings.filterwarnings("ignore")
    args = trained_model.parser("evaluate", __doc__, (QUESTIONS, TEXT, RESULTS), READS).parse_args(argv)
    check(args)
    with trained_model.on_ranks(args) as trained:
        parts = {}
        if args.questions:
            parts["answers"] = on_questions(args, trained)
        if args.text_data:
            parts["text"] = on_text(args, trained)
        trained.build()
        results: dict = {}
        for name, measure in parts.items():
            results[name] = measure()
            if is_first():
                print(table({name: results[name]}), flush=True)
        if is_first() and args.json:
            with LinesFile(args.json, "--json") as file:
                file.write({"model": trained.origin, "flags": vars(args)} | results)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (Exception, KeyboardInterrupt) as error:
        fail(error)
