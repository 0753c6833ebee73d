"""Which callbacks a run has."""

import argparse

from megatron_ebft.run.callbacks.callback import Callbacks
from megatron_ebft.run.callbacks.console import Console
from megatron_ebft.run.callbacks.distributions import Distributions
from megatron_ebft.run.callbacks.health import Health
from megatron_ebft.run.callbacks.overview import Overview
from megatron_ebft.run.callbacks.profile import Profile, profile_folder
from megatron_ebft.run.callbacks.save_hf import SaveHF
from megatron_ebft.run.callbacks.throughput import Throughput
from megatron_ebft.run.callbacks.watch import Watch


def build_callbacks(args: argparse.Namespace) -> Callbacks:
    """The callbacks that the flags ask for, in the order of their calls."""
    callbacks = [Watch(), Overview(), Console(), Health(args)]
    if args.log_throughput:
        callbacks.append(Throughput())
    if args.profile:
        callbacks.append(Profile(args, profile_folder(args)))
    if args.ebft_histogram_interval and args.training_mode == "ebft":
        callbacks.append(Distributions(args.ebft_histogram_interval))
    if args.ebft_save_hf_interval:
        callbacks.append(SaveHF(args))
    return Callbacks(tuple(callbacks))
