"""What is missing before ranks are started, all of it at once: run by the job scripts of slurm/.

    python tools/preflight.py --world-size 32 --ranks-per-node 8 --gpus-per-node 8 <the training flags of the run>

1. The checks are those of training itself (run/build.py, run/resume.py). One process makes them, as rank 0 of ranks
   that do not exist (simulate.py); where one fails, the others still run. Each line names the flag and the remedy.
2. Checkpoints are opened, and their files must have the sizes of the manifest, the small ones also their checksums;
   those of the tensors are left to the ranks, which share the reading. Dataset indices are built where there are none,
   and found by the ranks later.
3. --save must hold as many more checkpoints as --ebft-keep-checkpoints lets there be (and at least one): the oldest
   goes when the next is whole. A checkpoint has the weights, and 12 bytes a parameter of the optimizer (float32 weight
   and two moments).
4. With --node-only, the GPUs of this machine alone are checked.

Exits with 0, or with 64 where something is missing.
"""

import argparse
import contextlib
import os
import shutil
import socket
import sys
import tempfile
import warnings

EXIT_WRONG = 64
OPTIMIZER_BYTES = 12
NVIDIA = "/dev/nvidiactl"
"""There wherever the driver is loaded."""


class Problems(list):
    """Messages of the checks that failed."""

    @contextlib.contextmanager
    def collected(self):
        """Within, a ValueError is noted, and ends the block alone."""
        try:
            yield
        except ValueError as error:
            if str(error) not in self:
                self.append(str(error))


def check_gpus(args) -> str:
    """ValueError unless each of this machine's ranks has a GPU, where the job has any; else what there is."""
    if args.gpus_per_node == 0 and not os.path.exists(NVIDIA):
        return "no GPUs, CPUs compute"
    import torch

    found = torch.cuda.device_count()
    if found < args.ranks_per_node:
        raise ValueError(f"--ntasks-per-node {args.ranks_per_node}: torch {torch.__version__} sees {found} GPUs on "
                         f"this node, of {args.gpus_per_node} asked for with --gpus-per-node: compare nvidia-smi "
                         "there, exclude the node (sbatch --exclude), or install torch for its driver; without GPUs: "
                         "--gpus-per-node=0")
    return f"{found} GPUs"


def check_data(args, tokenizer, problems: Problems) -> None:
    """Each dataset by itself, and then all of them as training builds them."""
    from megatron_ebft.data.dataset_files import check_dataset
    from megatron_ebft.data.datasets import Blend
    from megatron_ebft.run.build import build_data

    before = len(problems)
    for flag, values in (("--data-path", args.data_path), ("--train-data-path", args.train_data_path),
                         ("--valid-data-path", args.valid_data_path)):
        with problems.collected():
            for prefix in Blend.parse(flag, values).prefixes if values else ():
                with problems.collected():
                    check_dataset(prefix, flag)
    if tokenizer is not None and len(problems) == before:
        with problems.collected():
            build_data(args, tokenizer)


def check_checkpoints(args, is_resumed: bool, problems: Problems) -> dict:
    """Every checkpoint that will be read; its reader by flag."""
    from megatron_ebft.checkpointing.folders import newest_first, resolve

    readers = {}
    for flag, folder in (("--load", args.load if is_resumed else None), ("--ebft-encoder-load", args.ebft_encoder_load),
                         ("--pretrained-checkpoint", args.pretrained_checkpoint)):
        with problems.collected():
            if folder:
                candidates = newest_first(folder, flag) if flag == "--load" else [resolve(folder, flag)]
                readers[flag] = first_to_open(candidates, flag)
    return readers


def first_to_open(folders: list[str], flag: str):
    """A reader of the first whose files are all there, in their sizes, and of whose small files none is damaged.

    Raises:
        ValueError: about the first, where none is.
    """
    from megatron_ebft.checkpointing.manifest import check_sizes, check_whole
    from megatron_ebft.checkpointing.reader import CheckpointReader

    problems = []
    for folder in folders:
        try:
            check_sizes(folder, flag)
            check_whole(folder, flag, is_chosen=lambda name: not name.endswith(".distcp"))
            return CheckpointReader(folder, flag, is_whole=True)
        except ValueError as error:
            problems.append(error)
    raise problems[0]


@contextlib.contextmanager
def rank_zero(world_size: int, sizes: dict):
    """Within: process groups as rank 0 of a world has them.

    sizes: arguments of init_parallel, which may refuse them by a ValueError.
    """
    from simulate import simulated_rank

    from megatron_ebft.parallel.groups import init_parallel, shut_down

    with simulated_rank(0, world_size):
        try:
            init_parallel(**sizes)
            yield
        finally:
            shut_down()


def checkpoint_bytes(args, vocab_size: int) -> tuple[int, int]:
    """Parameters of the model, and bytes of a checkpoint with its optimizer."""
    from megatron_ebft.model.build import build_skeleton
    from megatron_ebft.run.arguments import model_args

    with rank_zero(1, dict(tensor_model_parallel_size=1, pipeline_model_parallel_size=1, seed=1)):
        parameters = sum(p.numel() for p in build_skeleton(model_args(args, vocab_size)).parameters())
    return parameters, parameters * ((2 if args.bf16 else 4) + OPTIMIZER_BYTES)


def check_save(args, size: int) -> str:
    """ValueError unless --save can be written and has room; else a line on the room there is."""
    from megatron_ebft.checkpointing.folders import complete_iterations, leftover_bytes

    if not args.save:
        raise ValueError("--save: name a folder, or the run ends without a checkpoint")
    folder = os.path.abspath(args.save)
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"--save {args.save}: {folder} cannot be written ({error.strerror}); name another "
                         "folder") from error
    free, wanted = shutil.disk_usage(folder).free + leftover_bytes(args.save), 1
    if args.ebft_keep_checkpoints:
        wanted = max(1, args.ebft_keep_checkpoints + 1 - len(complete_iterations(args.save)))
    if free < wanted * size:
        raise ValueError(f"--save {args.save}: {free / 1e9:.1f} GB are free, and {wanted} more checkpoint"
                         f"{'s' * (wanted > 1)} of {size / 1e9:.1f} GB must fit; remove what is not needed there, or "
                         "name a folder on another disk")
    return f"a checkpoint takes {size / 1e9:.3g} GB, {free / 1e9:.0f} GB are free at --save"


def check_run(args, problems: Problems) -> list[str]:
    """Everything but GPUs; what the run is, in words."""
    from megatron_ebft.checkpointing.record import read_metadata
    from megatron_ebft.data.tokenizer import build_tokenizer
    from megatron_ebft.run import arguments, build, resume

    is_resumed, tokenizer, words = False, None, []
    with problems.collected():
        arguments.check_args(args)
    with problems.collected(), rank_zero(args.world_size, arguments.parallel_sizes(args)):
        build.check_batch(args)
    with problems.collected():
        is_resumed = resume.find_resume(args)
    readers = check_checkpoints(args, is_resumed, problems)
    origin = "--load" if is_resumed else "--pretrained-checkpoint"
    if args.use_checkpoint_args and origin in readers:
        with problems.collected():
            resume.restore_architecture(args, origin, readers[origin].folder)
    if not args.use_checkpoint_args or origin in readers or args.tokenizer_model:
        with problems.collected():
            tokenizer = build_tokenizer(args.tokenizer_type, args.tokenizer_model, args.vocab_size)
    check_data(args, tokenizer, problems)
    size = 0
    if tokenizer is not None:
        for flag, reader in readers.items():
            with problems.collected():
                resume.check_tokenizer(read_metadata(reader.folder, flag=flag), tokenizer, flag)
        with problems.collected():
            parameters, size = checkpoint_bytes(args, tokenizer.vocab_size)
            words.append(f"{parameters / 1e6:.4g} M parameters")
            arguments.ebft_config(args, arguments.model_args(args, tokenizer.vocab_size).num_layers)
    with problems.collected():
        words.append(check_save(args, size))
    words.append(f"goes on from {readers[origin].folder}" if is_resumed and origin in readers else "starts afresh")
    return words


def add_job(add) -> None:
    """The flags of the job itself; add: a parser's or group's add_argument."""
    add("--world-size", type=int, required=True, help="ranks in all")
    add("--ranks-per-node", type=int, required=True, help="ranks on this machine")
    add("--gpus-per-node", type=int, default=0, help="GPUs the job asked for on each node; 0: CPUs compute")
    add("--node-only", action="store_true", help="check this machine's GPUs and nothing else")


def parse_all(argv: list[str]) -> argparse.Namespace:
    """Training flags, unchecked, with those of the job."""
    from megatron_ebft.run.arguments import build_parser

    parser = build_parser()
    parser.prog, parser.description = "tools/preflight.py", __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_job(parser.add_argument_group("job").add_argument)
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    warnings.filterwarnings("ignore")
    problems, words = Problems(), []
    job = argparse.ArgumentParser(prog="tools/preflight.py", add_help=False, allow_abbrev=False)
    add_job(job.add_argument)
    with problems.collected():
        if "--node-only" not in argv:
            args = parse_all(argv)
            words += check_run(args, problems)
    with problems.collected():
        words.append(check_gpus(job.parse_known_args(argv)[0]))
    where = f"preflight on {socket.gethostname()}"
    if problems:
        lines = [f"{where}: {len(problems)} problem{'s' * (len(problems) > 1)}", *(f"  {text}" for text in problems)]
        print("\n".join(lines), flush=True)
        return EXIT_WRONG
    print(f"{where}: all well: {', '.join(words)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
