"""Which callbacks a run has."""

import argparse

from megatron_ebft.run.callbacks.callback import Callbacks
from megatron_ebft.run.callbacks.console import Console
from megatron_ebft.run.callbacks.health import Health
from megatron_ebft.run.callbacks.watch import Watch


def build_callbacks(args: argparse.Namespace) -> Callbacks:
    """The callbacks that the flags ask for, in the order of their calls."""
    return Callbacks((Watch(), Console(), Health()))
