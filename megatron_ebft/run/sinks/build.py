"""Which sinks the flags ask for."""

import torch.distributed as dist

from megatron_ebft.parallel.errors import collective_errors
from megatron_ebft.run.flags.table import COMPARED
from megatron_ebft.run.folders import tensorboard_folder, wandb_folder
from megatron_ebft.run.sinks.json_lines import JsonLines
from megatron_ebft.run.sinks.page import page_of, results_of
from megatron_ebft.run.sinks.sink import Sink
from megatron_ebft.run.sinks.tensorboard import TensorBoard
from megatron_ebft.run.sinks.weights_and_biases import WeightsAndBiases


def build_sinks(args, iteration: int) -> list[Sink]:
    """The sinks of a run that goes on after this step; none on other ranks than 0. All ranks call.

    Raises:
        ValueError: on every rank, Weights & Biases does not start.
    """
    sinks: list[Sink] = []
    with collective_errors():
        if dist.get_rank() == 0:
            folder = tensorboard_folder(args)
            sinks.append(TensorBoard(folder, iteration, page_of(args), compared_flags(args), results_of(args)))
            if args.ebft_json_lines:
                sinks.append(JsonLines(folder, iteration))
            if args.wandb_project:
                sinks.append(WeightsAndBiases(args.wandb_project, args.wandb_exp_name, wandb_folder(args), iteration,
                                              vars(args)))
    return sinks


def compared_flags(args) -> dict:
    """Values of the flags that tell runs apart, as the HParams tab takes them."""
    values = {name: vars(args)[name] for name in COMPARED}
    return {name: value if isinstance(value, bool | int | float | str) else " ".join(map(str, value))
            for name, value in values.items() if value is not None}
