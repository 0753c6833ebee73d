"""What a run is, at the start of its TensorBoard: the first lines of its log, sizes, versions, flags, and the mask."""

import contextlib
import importlib.metadata
import platform
import shlex

import torch
import torch.distributed as dist

from megatron_ebft import __version__
from megatron_ebft.layout.picture import picture
from megatron_ebft.run.callbacks.callback import Callback
from megatron_ebft.run.describe import describe
from megatron_ebft.run.flags.parser import as_argv
from megatron_ebft.run.flags.table import FLAGS, GROUPS
from megatron_ebft.run.state import Run

PACKAGES = ("torch", "megatron-core", "transformer-engine", "triton", "numpy", "tensorboard")


class Overview(Callback):
    """Records Markdown as `run` and `flags`, and the picture as `mask`, when training starts or goes on."""

    def train_start(self, run, log):
        if log.is_main:
            is_drawn = run.mode == "ebft" and run.state.iteration == 0
            mask = picture(run.config.layout) if is_drawn else None
            log.record(run.state.iteration, texts={"run": overview(run), "flags": flags(run)},
                       images={} if mask is None else {"mask": mask})


def overview(run: Run) -> str:
    """The first lines of the log, and tables of sizes and versions."""
    lines = "\n".join(f"- {line}" for line in describe(run).splitlines())
    return "\n\n".join([lines, table(["size", ""], sizes(run)), table(["version", ""], versions())])


def sizes(run: Run) -> list[tuple[str, str]]:
    """What a step consists of."""
    args, rows = run.args, run.args.global_batch_size
    sizes = [("optimizer steps", args.train_iters), ("questions of a step" if run.mode == "rlvr" else "rows of a step",
                                                     rows), ("tokens of a row (T)", args.seq_length)]
    if run.mode == "ebft":
        layout, samples = run.config.layout, run.config.num_samples
        rollouts = layout.num_blocks * samples
        sizes += [("blocks of a row", layout.num_blocks), ("first anchor (c), stride (s), rollout length (G)",
                                                           f"{layout.context_length}, {layout.stride}, "
                                                           f"{layout.rollout_length}"),
                  ("rollouts of a block (n)", samples), ("rollouts of a step", rows * rollouts),
                  ("tokens of an encoder row", layout.seq_length + rollouts * layout.rollout_length),
                  ("tokens of a training row", layout.seq_length + rollouts * (layout.rollout_length - 1))]
    if run.mode == "rlvr":
        generation = run.rlvr.config.generation
        sizes += [("completions of a question", generation.num_samples),
                  ("tokens of the longest completion", generation.max_new_tokens)]
    architecture = run.metadata["architecture"]
    sizes += [(name.replace("_", " "), architecture[name]) for name in (
        "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups",
        "padded_vocab_size")]
    return [(name, f"{value:,}" if isinstance(value, int) else value) for name, value in sizes]


def versions() -> list[tuple[str, str]]:
    """Of everything that computes, as far as it is installed."""
    installed = []
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed.append((package, importlib.metadata.version(package)))
    return [("megatron_ebft", __version__), ("python", platform.python_version()), *installed,
            ("CUDA of torch", torch.version.cuda or "none"), ("host of rank 0", platform.node()),
            ("ranks", str(dist.get_world_size()))]


def flags(run: Run) -> str:
    """The flags that are not their defaults, as a command line, and all flags by group."""
    values = vars(run.args)
    changed = {name: values[name] for name, flag in FLAGS.items()
               if values[name] is not None and values[name] != flag.default}
    command = " \\\n".join(shlex.join(as_argv({name: value})) for name, value in changed.items())
    tables = [f"### {group.title}\n\n" + table(["flag", "value"], [
        (flag.name, "" if values[flag.dest] is None else f"{values[flag.dest]}") for flag in group.flags])
        for group in GROUPS]
    return "\n\n".join([f"What differs from the defaults:\n\n```\n{command}\n```", *tables])


def table(head: list[str], rows: list[tuple[str, str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(cell.replace('|', '∣') for cell in row)} |" for row in (head, ["---"] * len(head),
                                                                                             *rows))
