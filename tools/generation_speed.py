"""Tokens per second of generation beside transformers' `generate`: same weights, prompts and tokens, one run.

    python tools/generation_speed.py                      # a random Llama with 8 layers of width 512
    python tools/generation_speed.py --hf-model DIR       # a real model

Both generate greedily from prompts of unequal lengths, --max-new-tokens each, in float32 (or bfloat16 with --bf16).
Each repeat runs one after the other; the tool prints the medians and their ratio, and how many completions are equal.
"Stopping" repeats this with end tokens that completions come to at different places. Other prompts then take the places
that become free, where transformers computes a batch until its last completion ends.
"""

import argparse
import statistics
import sys
import tempfile
import time
import warnings

import trained_model

from megatron_ebft.run.flags.flag import Flag, Group, at_least

SPEED = Group("measurement", (
    Flag("--prompts", int, "number of prompts", default=32, valid=at_least(1)),
    Flag("--prompt-length", int, "tokens of the longest prompt; the shortest has a quarter", default=128,
         valid=at_least(4)),
    Flag("--max-new-tokens", int, "tokens of each completion", default=64, valid=at_least(1)),
    Flag("--rows", int, "completions that decode together, in both", default=16, valid=at_least(1)),
    Flag("--repeats", int, "timed repeats", default=3, valid=at_least(1))))


def random_llama(folder: str) -> None:
    """Write a Llama with random weights."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=8192, hidden_size=512, intermediate_size=1536, num_hidden_layers=8,
                                      num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=4096,
                                      initializer_range=0.05)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def random_prompts(count: int, longest: int, vocab_size: int) -> list[list[int]]:
    """Ids of prompts of unequal lengths."""
    import torch

    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(longest // 4, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths]


def of_transformers(reference, prompts: list[list[int]], args: argparse.Namespace,
                    ends: tuple[int, ...]) -> list[list[int]]:
    """Completions by transformers, in batches of --rows, sorted by length as ours are."""
    import torch

    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    completions: list = [None] * len(prompts)
    for first in range(0, len(order), args.rows):
        batch = order[first : first + args.rows]
        longest = max(len(prompts[i]) for i in batch)
        tokens = torch.tensor([[0] * (longest - len(prompts[i])) + prompts[i] for i in batch])
        mask = torch.tensor([[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in batch])
        out = reference.generate(tokens.to(reference.device), attention_mask=mask.to(reference.device),
                                 max_new_tokens=args.max_new_tokens, do_sample=False, eos_token_id=list(ends),
                                 pad_token_id=0)[:, longest:].tolist()
        for i, row in zip(batch, out):
            completions[i] = row[: next((k + 1 for k, token in enumerate(row) if token in ends), len(row))]
    return completions


def compare(trained, reference, prompts: list[list[int]], args: argparse.Namespace, ends: tuple[int, ...],
            name: str) -> None:
    """Time both, and print a line."""
    from megatron_ebft.rollout.generation import GenerationConfig, generate

    config = GenerationConfig(max_new_tokens=args.max_new_tokens, temperature=0.0, rows=args.rows,
                              end_ids=ends)
    ours = theirs = []
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(args.repeats + 1):
        start = time.perf_counter()
        ours = [completion.tokens for completion, in generate([trained.model], prompts, config)]
        middle = time.perf_counter()
        theirs = of_transformers(reference, prompts, args, ends)
        seconds["ours"].append(middle - start)
        seconds["theirs"].append(time.perf_counter() - middle)
    tokens = sum(map(len, ours))
    here, there = (statistics.median(seconds[who][1:]) for who in ("ours", "theirs"))  # the first repeat warms up
    equal = sum(a == b for a, b in zip(ours, theirs))
    print(f"{name}: {tokens} tokens, {tokens / here:.0f} tokens/s; transformers {sum(map(len, theirs)) / there:.0f}; "
          f"ratio {there / here:.2f} | {equal} of {len(prompts)} completions equal", flush=True)


def main(argv: list[str]) -> None:
    """Build both, compare them without and with an end token."""
    warnings.filterwarnings("ignore")
    args = trained_model.parser("generation_speed", __doc__, (SPEED,)).parse_args(argv)
    import torch
    import transformers

    from megatron_ebft.common.device import device

    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        if args.hf_model is None:
            random_llama(folder)
            args.hf_model, args.tokenizer_type, args.vocab_size = folder, "NullTokenizer", 8192
        trained_model.check_model(args)
        with trained_model.on_ranks(args) as trained:
            trained.build()
            reference = transformers.AutoModelForCausalLM.from_pretrained(
                args.hf_model, torch_dtype=torch.bfloat16 if args.bf16 else torch.float32).to(device()).eval()
            prompts = random_prompts(args.prompts, args.prompt_length, trained.architecture.vocab_size)
            compare(trained, reference, prompts, args, (), "full length")
            whole = of_transformers(reference, prompts, args, ())
            ends = tuple(row[len(row) * (i + 1) // (len(whole) + 1)] for i, row in enumerate(whole))
            compare(trained, reference, prompts, args, ends, "stopping")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
