"""The metadata of a step's file: with which flags it was made (step_file.py has the tensors).

Two kinds of strings. The entries of GOLDEN, and `blocks`, are in the files of other programs as well, and mean the same
there. `flags` (JSON) has all flags of the method and the iteration; a file without it has training's defaults for
whatever the entries do not say, which are the released code's choices. The two may not contradict each other.
"""

import argparse
import json

from megatron_ebft.layout.strided import StridedLayout
from megatron_ebft.run.flags import build_parser, check_args, method_flags
from megatron_ebft.run.flags.parser import as_argv

GOLDEN = {"prompt_len": "seq_length", "docs": "global_batch_size", "samples": "ebft_num_samples",
          "stride": "ebft_stride", "context": "ebft_context_length", "gen_len": "ebft_rollout_length",
          "temperature": "ebft_temperature", "whitening": "ebft_whitening", "embed_method": "ebft_feature_pooling",
          "diversity_coef": "ebft_diversity_coef", "ce_coef": "ebft_ce_coef", "seed": "seed"}
"""Entries and the flags they stand for; `seed` may be missing. `blocks`, NB, follows from them."""
SPELLING = {"whitening": {"False": "none", "True": "released", "paper": "paper"},
            "embed_method": {"last_token": "last_token", "mean_pooling": "mean"}}
"""Values of entries that are not spelled as the flag's; the released code knows no `paper`."""
MASKS = {"document_ids": "--ebft-document-mask", "answer_mask": "--ebft-answer-only"}
"""Tensors that are there if these flags were given."""


def step_layout(args: argparse.Namespace) -> StridedLayout:
    """The layout of all n samples, without padding."""
    return StridedLayout(args.seq_length, args.ebft_context_length, args.ebft_stride, args.ebft_rollout_length,
                         args.ebft_num_samples)


def write_flags(args: argparse.Namespace, iteration: int | None) -> dict[str, str]:
    """The metadata of a step made with these flags."""
    entries = {key: vars(args)[name] for key, name in GOLDEN.items()}
    for key, spelling in SPELLING.items():
        entries[key] = next(word for word, value in spelling.items() if value == entries[key])
    return {**{key: str(value) for key, value in entries.items()}, "blocks": str(step_layout(args).num_blocks),
            "flags": json.dumps({"iteration": iteration, **method_flags(args)})}


def read_flags(metadata: dict[str, str], tensors: dict, where: str) -> tuple[argparse.Namespace, int | None]:
    """Flags of training, of which those of the method, the batch size and the masks are the file's, and the iteration.

    Args:
        tensors: by name; which are there says which masks there are.

    Raises:
        ValueError: beginning with `where`: an entry is missing, is no value of its flag, or contradicts another one.
    """
    missing = [key for key in (*GOLDEN, "blocks") if key not in metadata and key != "seed"]
    if missing:
        raise ValueError(f"{where}: the metadata have no {', '.join(missing)}; is it a step's file?")
    for key, spelling in SPELLING.items():
        if metadata[key] not in spelling:
            raise ValueError(f"{where}: the metadata say {key} = {metadata[key]}; it must be one of "
                             f"{', '.join(spelling)}")
    entries = as_argv({name: SPELLING.get(key, {}).get(metadata[key], metadata[key])
                     for key, name in GOLDEN.items() if key in metadata})
    masks = [flag for key, flag in MASKS.items() if key in tensors]
    try:
        flags = json.loads(metadata.get("flags", "{}"))
        iteration = flags.pop("iteration", None)
        short = build_parser().parse_args(["--train-iters=1", *entries])
        args = check_args(build_parser().parse_args(["--train-iters=1", *entries, *as_argv(flags), *masks]))
    except (ValueError, AttributeError, TypeError) as error:  # the last two: JSON, but no object
        raise ValueError(f"{where}: its metadata cannot be right: {error}") from error
    for key, name in GOLDEN.items():
        if vars(short)[name] != vars(args)[name]:
            raise ValueError(f"{where}: the metadata contradict themselves: {key} is {metadata[key]}, and flags say "
                             f"{_flag(name)} {vars(args)[name]}")
    blocks = step_layout(args).num_blocks
    if metadata["blocks"] != str(blocks):
        raise ValueError(f"{where}: the metadata contradict themselves: blocks is {metadata['blocks']}, but there are "
                         f"{blocks} blocks of this stride and context in {args.seq_length} tokens")
    return args, iteration


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
