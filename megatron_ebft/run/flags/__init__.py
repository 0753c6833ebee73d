"""The command line of training. Nothing here imports torch, so that --help and wrong flags answer at once.

flag.py says what a flag is. basics.py, model.py, data.py, … declare each flag once, and table.py puts them together.
refused.py has Megatron's flags that are refused. checks.py checks flags against each other. config_file.py reads
--config. run/configs.py makes the typed configurations that the rest of the code takes.
"""

import argparse

from megatron_ebft.run.flags.checks import check_args
from megatron_ebft.run.flags.method import METHOD
from megatron_ebft.run.flags.parser import Parser
from megatron_ebft.run.flags.table import ESSENTIALS, FLAGS


def build_parser() -> Parser:
    """The parser of `python -m megatron_ebft.train`."""
    return Parser("torchrun --nproc-per-node N -m megatron_ebft.train",
                  "Energy-Based Fine-Tuning (and plain next-token training) of language models on Megatron-Core.",
                  reads=frozenset(FLAGS), first=ESSENTIALS)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the flags.

    Raises:
        ValueError: naming the flag that is wrong.
    """
    return check_args(build_parser().parse_args(argv))


def method_flags(args: argparse.Namespace) -> dict:
    """Values of the flags that say what an EBFT step computes, by attribute name."""
    return {name: vars(args)[name] for name in ("seq_length", *METHOD.dests)}
