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
3. A beginning-of-text id goes before prompts if the tokenizer adds one.
"""

import argparse
import contextlib
import json
import os
import sys
import time
import warnings

import trained_model

from megatron_ebft.data.json_lines import read_objects
from megatron_ebft.run.ending import fail
from megatron_ebft.run.flags.flag import Flag, Group, above, at_least

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
    Flag("--rows", int, "completions that a rank decodes together; fewer need less memory, the result is the same",
         default=64, valid=at_least(1))))


def read_prompts(path: str, flag: str = "--prompts") -> list[dict]:
    """The lines of a file.

    Raises:
        ValueError: there is none, or one has no prompt; names the file and the line.
    """
    lines = read_objects(path, flag)
    for place, fields in lines:
        if not isinstance(fields.get("prompt"), str):
            raise ValueError(f"{flag} {place}: has no text `prompt`")
    return [fields for _, fields in lines]


def prompt_ids(trained, prompts: list[str], max_new_tokens: int) -> list[list[int]]:
    """The ids of the prompts.

    Raises:
        ValueError: one is empty, or too long for the model.
    """
    longest, ids = trained.architecture.max_position_embeddings, []
    for number, prompt in enumerate(prompts, 1):
        ids.append(trained.tokenizer.prompt_ids(prompt))
        if not ids[-1]:
            raise ValueError(f"prompt {number}: is empty, and {trained.origin} has no token that begins a text")
        if len(ids[-1]) + max_new_tokens > longest:
            raise ValueError(f"--max-new-tokens {max_new_tokens}: prompt {number} has {len(ids[-1])} tokens, and "
                             f"{trained.origin} is for {longest} in all")
    return ids


def generation_config(args: argparse.Namespace, trained):
    """The typed configuration of the flags."""
    from megatron_ebft.rollout.generation import GenerationConfig
    from megatron_ebft.rollout.stop_strings import StopStrings
    from megatron_ebft.run.configs import row_multiple

    return GenerationConfig(max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_p=args.top_p,
                            top_k=args.top_k, seed=args.seed, num_samples=max(1, args.num_samples),
                            end_ids=trained.end_ids, rows=args.rows, pad_to=row_multiple(args),
                            stops=StopStrings(args.stop, trained.tokenizer) if args.stop else None)


def completed(args: argparse.Namespace, trained, prompts: list[str], say) -> list[list[dict]]:
    """What the output says of the completions of each prompt, on every rank. Data-parallel ranks share the prompts."""
    from megatron_ebft.common.progress import Progress
    from megatron_ebft.parallel.groups import collected, dealt
    from megatron_ebft.rollout.generation import generate

    config, ids = generation_config(args, trained), dealt(prompt_ids(trained, prompts, args.max_new_tokens))
    progress = Progress("completed", len(ids) * args.num_samples, say)
    start, tokens = time.perf_counter(), 0

    def watch(number, sample, completion) -> None:
        nonlocal tokens
        tokens += 1
        if completion.finished or len(completion.tokens) == args.max_new_tokens:
            progress.add(1)

    completions = generate([trained.model], ids, config, watch=watch)
    progress.close()
    say(f"{tokens / (time.perf_counter() - start):.1f} tokens/s on a model's ranks")
    return collected([[describe(completion, config, trained) for completion in of_prompt] for of_prompt in completions])


def describe(completion, config, trained) -> dict:
    """A completion as the output has it."""
    return {"text": config.text(completion.tokens, trained.tokenizer), "tokens": completion.tokens,
            "log_prob": sum(completion.log_probs), "finished": completion.finished}


def write_lines(lines: list[dict], path: str | None, flag: str = "--output") -> None:
    """Write JSON Lines to a file that appears whole, or to the console."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    if path is None:
        sys.stdout.write(text)
        return
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError as error:
        raise ValueError(f"{flag} {path}: cannot be written ({error.strerror})") from error
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


class Stream:
    """Shows a text while it grows, but not what may still change: a character or a stop string that is not whole."""

    def __init__(self, stops: list[str]):
        self.stops, self.shown = stops, 0

    def show(self, text: str, is_whole: bool) -> None:
        if not is_whole:
            held = max((size for stop in self.stops for size in range(1, len(stop) + 1)
                        if text.endswith(stop[:size])), default=0)
            text = text[: len(text) - held].rstrip("\ufffd")
        print(text[self.shown :], end="", flush=True)
        self.shown = max(self.shown, len(text))


def converse(args: argparse.Namespace, trained) -> None:
    """Read prompts from the console, one a line, and show their completions as they grow. Ends with the input."""
    import torch.distributed as dist

    from megatron_ebft.rollout.generation import generate

    config, is_first = generation_config(args, trained), dist.get_rank() == 0
    is_stream = config.num_samples == 1
    while True:
        line = [None]
        if is_first:
            with contextlib.suppress(EOFError):
                line = [input("> ").replace("\\n", "\n")]
        dist.broadcast_object_list(line)
        if line[0] is None:
            return
        try:
            ids = prompt_ids(trained, line, config.max_new_tokens)
        except ValueError as error:
            if is_first:
                print(f"error: {error}")
            continue
        stream = Stream(args.stop or [])

        def watch(number, sample, completion, stream=stream) -> None:
            if is_first and is_stream:
                stream.show(trained.tokenizer.completion_text(completion.tokens), is_whole=False)

        completions = generate([trained.model], ids, config, watch=watch)[0]
        texts = [config.text(completion.tokens, trained.tokenizer) for completion in completions]
        if is_first and is_stream:
            stream.show(texts[0], is_whole=True)
        if is_first:
            print("" if is_stream else "\n---\n".join(texts))


def main(argv: list[str]) -> None:
    """Parse, load, generate, write."""
    warnings.filterwarnings("ignore")
    args = trained_model.parser("generate", __doc__, (GENERATION,)).parse_args(argv)
    trained_model.check_model(args)
    lines = read_prompts(args.prompts) if args.prompts else None
    if args.output:
        folder = os.path.dirname(os.path.abspath(args.output))
        if not (os.path.isdir(folder) and os.access(folder, os.W_OK)):
            raise ValueError(f"--output {args.output}: {folder} is no folder that can be written to")
    import torch.distributed as dist

    from megatron_ebft.parallel.groups import init_parallel, shut_down
    from megatron_ebft.run.configs import parallel_sizes

    init_parallel(**parallel_sizes(args))

    def say(text: str) -> None:
        if dist.get_rank() == 0:
            print(text, file=sys.stderr, flush=True)

    trained = trained_model.load(args)
    if lines is None:
        converse(args, trained)
    else:
        completions = completed(args, trained, [line["prompt"] for line in lines], say)
        if dist.get_rank() == 0:
            write_lines([line | {"completions": x} for line, x in zip(lines, completions, strict=True)], args.output)
    shut_down()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, KeyboardInterrupt) as error:
        fail(error)
