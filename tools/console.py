"""Prompts that a person types, and their completions as they grow (generate.py)."""

import argparse
import contextlib
import math
from datetime import timedelta


class Stream:
    """Shows a text while it grows, but not what may still change: a character or a stop string that is not whole."""

    def __init__(self, stops: list[str]):
        self.stops, self.shown = stops, 0

    def show(self, text: str, is_whole: bool) -> None:
        """Print what is new of a text that has no stop string."""
        if not is_whole:
            held = max((size for stop in self.stops for size in range(1, len(stop) + 1)
                        if text.endswith(stop[:size])), default=0)
            text = text[: len(text) - held].rstrip("\ufffd")
        print(text[self.shown :], end="", flush=True)
        self.shown = max(self.shown, len(text))


def converse(args: argparse.Namespace, trained) -> None:
    """Read prompts from the console, one a line, and answer them. Ends with the input. A backslash and n stand for a
    new line."""
    import torch.distributed as dist
    from generate import generation_config, ids_of

    from megatron_ebft.rollout.generation import generate

    config, is_first, number = generation_config(args, trained), dist.get_rank() == 0, 0
    is_stream = config.num_samples == 1
    while (line := typed(number, is_first)) is not None:
        number += 1
        trained.watchdog.enter(f"prompt {number}")
        try:
            ids = [ids_of(trained, line, f"prompt {number}", config.max_new_tokens)]
        except ValueError as error:
            if is_first:
                print(f"error: {error}")
            continue
        stream = Stream(args.stop or [])

        def watch(prompt, sample, completion, stream=stream) -> None:
            if is_first and is_stream:
                stream.show(config.text(completion.tokens, trained.tokenizer), is_whole=False)

        completions = generate([trained.model], ids, config, watch=watch)[0]
        texts = [config.text(completion.tokens, trained.tokenizer) for completion in completions]
        if is_first and is_stream:
            stream.show(texts[0], is_whole=True)
        if is_first:
            print("" if is_stream else "\n---\n".join(texts))
        trained.watchdog.enter("a pause", math.inf)


def typed(number: int, is_first: bool) -> str | None:
    """The next prompt, on every rank; None at the end of the input. The other ranks wait for as long as a person
    thinks, in no collective, which would time out."""
    import torch.distributed as dist

    store, key = dist.distributed_c10d._get_default_store(), f"ebft/prompt/{number}"
    if is_first:
        line = None
        with contextlib.suppress(EOFError):
            line = input("> ").replace("\\n", "\n")
        store.set(key, "" if line is None else f"+{line}")
        return line
    while True:
        try:
            store.wait([key], timedelta(seconds=60))
        except (RuntimeError, dist.DistError) as error:
            if "imeout" not in str(error) and "imed out" not in str(error):
                raise
            continue
        value = store.get(key).decode()
        return value[1:] if value else None
