"""Construction of a run's models and of its optimizer, for training and for every tool that runs a step."""

import argparse
import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import get_megatron_optimizer

from megatron_ebft.checkpointing.loader import load_weights
from megatron_ebft.checkpointing.record import TrainState
from megatron_ebft.method.config import EBFTConfig
from megatron_ebft.model.architecture import ModelArgs, free_fields
from megatron_ebft.model.build import build_encoder, build_policy, build_start
from megatron_ebft.model.weights import copy_weights
from megatron_ebft.run.configs import ddp_config, optimizer_config, policy_overrides, transformer_overrides
from megatron_ebft.run.learning_rate import Schedule


@dataclass(kw_only=True)
class Models:
    """The models of a run."""

    policy: list[DistributedDataParallel]
    """One for each virtual pipeline stage of this rank."""
    encoder: object | None = None
    start: object | None = None


@dataclass(frozen=True)
class Source:
    """A checkpoint that weights come from."""

    flag: str
    """The flag that named it, for errors."""
    folder: str


Weights = Source | Callable[[object], None] | None
"""Where the weights of a model come from: a checkpoint, or a function that sets them."""


def fixed_fields(architecture: ModelArgs) -> dict:
    """Fields in which a model must equal the checkpoint whose weights it takes."""
    fields = dataclasses.asdict(architecture)
    return {name: value for name, value in fields.items() if name not in free_fields(fields)}


def build_models(args: argparse.Namespace, architecture: ModelArgs, config: EBFTConfig | None, *,
                 policy_from: Weights = None, encoder_from: Weights = None, start_from: Weights = None,
                 has_start: bool = False, use_distributed_optimizer: bool = True,
                 part: Callable[[str], AbstractContextManager] = nullcontext) -> Models:
    """Policy, encoder (with a `config`) and start (with `has_start`), on this rank.

    Args:
        policy_from: a checkpoint, or a function that sets the weights; None: they stay as the seed made them.
        encoder_from, start_from: the same; None: the policy's weights.
        part: makes the context in which `policy`, `encoder` and `start` are built.

    Raises:
        ValueError: a checkpoint is missing, damaged or of another architecture; names the flag.
    """
    ddp = dataclasses.replace(ddp_config(args), use_distributed_optimizer=use_distributed_optimizer)

    def fill(model, weights: Weights) -> None:
        if callable(weights):
            weights(model)
        elif weights is not None:
            load_weights(weights.folder, model, architecture=fixed_fields(architecture), flag=weights.flag)
        elif model is not models.policy:
            copy_weights(models.policy, model)

    with part("policy"):
        models = Models(policy=build_policy(architecture, ddp, **policy_overrides(args)))
        fill(models.policy, policy_from)
    if config is not None:
        with part("encoder"):
            models.encoder = build_encoder(architecture, max(config.feature_map.layers), **transformer_overrides(args))
            fill(models.encoder, encoder_from)
    if has_start:
        with part("start"):
            models.start = build_start(architecture, **transformer_overrides(args))
            fill(models.start, start_from)
    return models


def build_optimizer(args: argparse.Namespace, policy: list, done: TrainState = TrainState()) -> tuple:
    """AdamW and its learning rate, for a run that has come to `done`."""
    optimizer = get_megatron_optimizer(optimizer_config(args), policy)
    return optimizer, Schedule(optimizer, args, done)
