"""Completions of prompts by a trained model, on any layout of ranks.

    python tools/generate.py --load checkpoints/ebft                                         # type prompts, see tokens
    torchrun --nproc-per-node 8 tools/generate.py --hf-model DIR --prompts prompts.jsonl --output completions.jsonl \\
        --max-new-tokens 512 --num-samples 4 --temperature 0.8 --tensor-model-parallel-size 2

1. A line of --prompts is a JSON object with a text `prompt`. Its line of the output has all its fields and
   `completions`: for each sample `text`, `tokens`, `log_prob` (sum over the tokens, before top-p and top-k, at the
   sampling temperature, or at 1 for --temperature 0) and `finished` (by an end token or a stop string, not by
   --max-new-tokens). `tokens` has the end token and the stop string, `text` does not.
2. A completion depends on the seed, its prompt, its number and the sampling flags. It does not depend on the other
   prompts or on the ranks, except where rounding decides between tokens.
3. A beginning-of-text id goes before a prompt that does not begin with it, if the tokenizer adds one.
"""

import argparse
import contextlib
import sys
import time
import warnings

import trained_model
from console import converse
from lines_file import LinesFile, check_output

from megatron_ebft.data.json_lines import read_objects
from megatron_ebft.run.ending import fail
from megatron_ebft.run.flags.flag import Flag, Group, above, at_least

WAVES = 16
"""Prompts are completed and written in parts of so many times --rows completions a rank."""
GENERATION = Group("generation", (
    Flag("--prompts", str, "JSON Lines with a `prompt` each, plain or compressed", metavar="FILE",
         default_text="prompts are typed"),
    Flag("--output", str, "file for the completions", metavar="FILE", default_text="the console"),
    Flag("--max-new-tokens", int, "longest completion", default=256, valid=at_least(1)),
    Flag("--temperature", float, "of sampling. 0: the most likely token each time", default=1.0, valid=at_least(0)),
    Flag("--top-p", float, "sample from the most likely tokens with this mass", default=1.0, valid=above(0, at_most=1)),
    Flag("--top-k", int, "sample from so many most likely tokens (0: all)", default=0, valid=at_least(0)),
    Flag("--num-samples", int, "completions of each prompt", default=1, valid=at_least(1)),
    Flag("--stop", str, "texts that end a completion", many=True, metavar="TEXT"),
    Flag("--seed", int, "seed of the samples", default=1234, valid=at_least(0)),
    Flag("--rows", int, "completions that a rank decodes together; fewer need less memory, and the result is the same "
         "up to rounding", default=64, valid=at_least(1))))


def read_prompts(path: str, flag: str = "--prompts") -> list[tuple[str, dict]]:
    """The lines of a file, each behind its place (`file:line`).

    Raises:
        ValueError: there is none, or one has no prompt; names the file and the line.
    """
    lines = read_objects(path, flag)
    for place, fields in lines:
        if not isinstance(fields.get("prompt"), str):
            raise ValueError(f"{flag} {place}: has no text `prompt`")
        if "completions" in fields:
            raise ValueError(f"{flag} {place}: has a field `completions`, which the output would replace; rename it")
    return lines


def ids_of(trained, prompt: str, place: str, max_new_tokens: int) -> list[int]:
    """The ids of a prompt.

    Raises:
        ValueError: it is empty, too long for the model, or no text; names the place.
    """
    longest = trained.architecture.max_position_embeddings
    try:
        ids = trained.tokenizer.prompt_ids(prompt)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    if not ids:
        raise ValueError(f"{place}: is empty, and {trained.origin} has no token that begins a text")
    if len(ids) + max_new_tokens > longest:
        raise ValueError(f"{place}: has {len(ids)} tokens; with --max-new-tokens {max_new_tokens} that is more than"
                         f" the {longest} that {trained.origin} is for")
    return ids


def generation_config(args: argparse.Namespace, trained):
    """The typed configuration of the flags. At temperature 0 one sample stands for all."""
    from megatron_ebft.rollout.generation import GenerationConfig
    from megatron_ebft.rollout.stop_strings import StopStrings
    from megatron_ebft.run.configs import row_multiple

    return GenerationConfig(max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_p=args.top_p,
                            top_k=args.top_k, seed=args.seed,
                            num_samples=max(1, args.num_samples) if args.temperature else 1,
                            end_ids=trained.end_ids, rows=args.rows, pad_to=row_multiple(args),
                            stops=StopStrings(args.stop, trained.tokenizer) if args.stop else None)


def complete(args: argparse.Namespace, trained, lines: list[tuple[str, dict]], say) -> None:
    """Complete all prompts, some after the others, and write each part when it is done. Data-parallel ranks share the
    prompts."""
    from megatron_ebft.common.progress import Progress
    from megatron_ebft.parallel.groups import collected, dealt, dp_size
    from megatron_ebft.rollout.generation import generate
    from megatron_ebft.run.watchdog import PATIENCE

    ids = [ids_of(trained, fields["prompt"], f"--prompts {place}", args.max_new_tokens) for place, fields in lines]
    trained.build()
    config, count = generation_config(args, trained), len(lines)
    size = max(dp_size(), WAVES * args.rows * dp_size() // config.num_samples)
    progress, begun, tokens = Progress("completed", count, say), time.perf_counter(), 0
    with LinesFile(args.output, "--output") if is_first() else contextlib.nullcontext() as file:
        for first in range(0, count, size):
            trained.watchdog.enter(f"prompts from {lines[first][0]} on", PATIENCE)
            part = slice(first, first + size)
            mine = generate([trained.model], dealt(ids[part]), config)
            described = collected([[describe(completion, config, trained) for completion in of_prompt]
                                   for of_prompt in mine])
            tokens += sum(len(completion["tokens"]) for of_prompt in described for completion in of_prompt)
            if file is not None:
                for (_, fields), completions in zip(lines[part], described, strict=True):
                    file.write(fields | {"completions": completions * (args.num_samples // len(completions))})
            progress.add(len(lines[part]))
    progress.close()
    say(f"{tokens / (time.perf_counter() - begun):.1f} tokens/s")


def is_first() -> bool:
    """Whether this is the rank that prints and writes."""
    import torch.distributed as dist

    return dist.get_rank() == 0


def say(text: str) -> None:
    """Print a line about the work, by the first rank."""
    if is_first():
        print(text, file=sys.stderr, flush=True)


def describe(completion, config, trained) -> dict:
    """A completion as the output has it."""
    return {"text": config.text(completion.tokens, trained.tokenizer), "tokens": completion.tokens,
            "log_prob": sum(completion.log_probs), "finished": completion.finished}


def main(argv: list[str]) -> None:
    """Parse, load, generate, write."""
    warnings.filterwarnings("ignore")
    args = trained_model.parser("generate", __doc__, (GENERATION,)).parse_args(argv)
    trained_model.check_model(args)
    check_stops(args.stop)
    check_output(args.output, "--output")
    if args.output and not args.prompts:
        raise ValueError(f"--output {args.output}: needs --prompts; completions of typed prompts are on the console")
    lines = read_prompts(args.prompts) if args.prompts else None
    with trained_model.on_ranks(args) as trained:
        if lines is None:
            trained.build()
            converse(args, trained)
        else:
            complete(args, trained, lines, say)


def check_stops(stops: list[str] | None) -> None:
    """Raise ValueError for an empty text, which would end every completion."""
    if stops and not all(stops):
        raise ValueError("--stop: an empty text ends every completion; leave it out")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (Exception, KeyboardInterrupt) as error:
        fail(error)
