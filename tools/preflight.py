"""Names everything that a run lacks before its ranks start. The job scripts of slurm/ run it.

    python tools/preflight.py --world-size 32 --ranks-per-node 8 --gpus-per-node 8 <the training flags of the run>

1. The checks are those of training itself (run/build.py, run/resume.py). One process makes them, as rank 0 of ranks
   that do not exist (simulate.py). If one fails, the others still run. Each line names the flag and the remedy.
2. Checkpoints are opened. Their files must have the sizes of the manifest, and the small files also its checksums; the
   ranks check the tensors' files, sharing the reading. Missing dataset indices are built, so that ranks find them.
3. --save must have room for the checkpoints that --ebft-keep-checkpoints still allows, and for at least one: the oldest
   is removed when the next is whole. A checkpoint has the weights, and 12 bytes of optimizer state per parameter
   (float32 weight and two moments).
4. --node-only checks the GPUs of this machine and nothing else.

It takes all training flags, which `python -m megatron_ebft.train --help` lists. The exit code is 0, 64 if something is
missing, or 74 if a filesystem does not answer.
"""

import contextlib
import os
import shutil
import socket
import sys
import warnings

from megatron_ebft.common.disk import is_passing
from megatron_ebft.run.flags.checks import check_args
from megatron_ebft.run.flags.flag import Flag, Group, at_least
from megatron_ebft.run.flags.parallelism import PARALLELISM
from megatron_ebft.run.flags.parser import Parser
from megatron_ebft.run.flags.table import FLAGS

EXIT_WRONG, EXIT_UNREACHABLE = 64, 74
OPTIMIZER_BYTES = 12
ONE_RANK = dict(tensor_model_parallel_size=1, pipeline_model_parallel_size=1, seed=1)
NVIDIA = "/dev/nvidiactl"
"""Exists wherever the driver is loaded."""
JOB = Group("job", (
    Flag("--world-size", int, "total number of ranks", valid=at_least(1), required=True),
    Flag("--ranks-per-node", int, "number of ranks on this machine", valid=at_least(1), required=True),
    Flag("--gpus-per-node", int, "GPUs that the job requested on each node (0: run on CPUs)", default=0,
         valid=at_least(0)),
    Flag("--node-only", bool, "check the GPUs of this machine and nothing else", default=False)))


class Problems(list):
    """Messages of the checks that failed."""

    @contextlib.contextmanager
    def collected(self):
        """A ValueError inside is recorded, and ends only the block."""
        try:
            yield
        except ValueError as error:
            if str(error) not in self:
                self.append(str(error))


def check_gpus(args) -> str:
    """A line on this machine's GPUs. ValueError, if the job has GPUs and a rank has none."""
    if args.gpus_per_node == 0 and not os.path.exists(NVIDIA):
        return "no GPUs, CPUs compute"
    import torch

    gpus = torch.cuda.device_count()
    if gpus < args.ranks_per_node:
        raise ValueError(f"--ntasks-per-node {args.ranks_per_node}: torch {torch.__version__} sees {gpus} GPUs on "
                         f"this node, of {args.gpus_per_node} that --gpus-per-node requests. Compare nvidia-smi there, "
                         "exclude the node (sbatch --exclude), or install torch for its driver; to run without GPUs: "
                         "--gpus-per-node=0")
    return f"{gpus} GPUs"


def check_data(args, tokenizer, done, problems: Problems) -> tuple | None:
    """Check each dataset by itself, then build all of them as training does from `done` on. Returns the training and
    validation data."""
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
            return build_data(args, tokenizer, done)
    return None


def check_questions(args, tokenizer, problems: Problems):
    """Check the questions of RLVR and of evaluation, and whether their verifier works here. Returns what RLVR needs;
    None in other modes."""
    from megatron_ebft.run.answers import build_eval_questions
    from megatron_ebft.run.configs import model_args
    from megatron_ebft.run.rlvr import build_rlvr

    if tokenizer is None or len(problems):
        return None
    rlvr = asked = None
    with problems.collected(), rank_zero(1, ONE_RANK):
        if args.training_mode == "rlvr":
            rlvr = build_rlvr(args, tokenizer, (tokenizer.eod,))
            rlvr.verification.close()
    with problems.collected(), rank_zero(1, ONE_RANK):
        if args.ebft_eval_questions:
            longest = model_args(args, tokenizer.vocab_size).max_position_embeddings
            asked = build_eval_questions(args, tokenizer, (tokenizer.eod,), longest)
        if asked is not None:
            asked.verification.close()
    return rlvr


def check_checkpoints(args, is_resumed: bool, problems: Problems) -> dict:
    """Check every checkpoint that the run will read. Returns its reader by flag."""
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
    """A reader of the first checkpoint whose files have the right sizes and whose small files are undamaged.

    Raises:
        ValueError: about the first checkpoint, if there is none.
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
    """Inside, this process has the process groups of rank 0.

    Args:
        sizes: arguments of init_parallel, which may refuse them with a ValueError.
    """
    from megatron_ebft.parallel.groups import init_parallel, shut_down
    from megatron_ebft.run.plan.simulate import simulated_rank

    with simulated_rank(0, world_size):
        try:
            init_parallel(**sizes)
            yield
        finally:
            shut_down()


def checkpoint_bytes(args, vocab_size: int) -> tuple[int, int]:
    """Number of parameters, and bytes of a checkpoint with its optimizer."""
    from megatron_ebft.model.build import build_skeleton
    from megatron_ebft.run.configs import model_args

    with rank_zero(1, ONE_RANK):
        parameters = sum(p.numel() for p in build_skeleton(model_args(args, vocab_size)).parameters())
    return parameters, parameters * ((2 if args.bf16 else 4) + OPTIMIZER_BYTES)


def check_save(args, size: int) -> str:
    """A line on the room at --save. ValueError if it cannot be written or has too little room."""
    from megatron_ebft.checkpointing.folders import complete_iterations, leftover_bytes
    from megatron_ebft.common.disk import check_writable

    if not args.save:
        raise ValueError("--save: name a folder, or the run ends without a checkpoint")
    folder = check_writable(args.save, "--save")
    free, wanted = shutil.disk_usage(folder).free + leftover_bytes(args.save), 1
    if args.ebft_keep_checkpoints:
        wanted = max(1, args.ebft_keep_checkpoints + 1 - len(complete_iterations(args.save)))
    if free < wanted * size:
        raise ValueError(f"--save {args.save}: {free / 1e9:.1f} GB are free, and {wanted} more checkpoint"
                         f"{'s' * (wanted > 1)} of {size / 1e9:.1f} GB must fit; free some space there, or name "
                         "a folder on another disk")
    return f"a checkpoint takes {size / 1e9:.3g} GB, {free / 1e9:.0f} GB are free at --save"


def check_run(args, problems: Problems) -> list[str]:
    """Check everything but GPUs. Returns phrases that describe the run."""
    from megatron_ebft.checkpointing.record import TrainState, read_metadata
    from megatron_ebft.data.tokenizer import build_tokenizer
    from megatron_ebft.run import build, configs, folders, resume
    from megatron_ebft.run.counts import check_counts

    is_resumed, tokenizer, words = False, None, []
    for flag in FLAGS.values():
        with problems.collected():
            flag.check(vars(args)[flag.dest])
    wrong = {flag.dest for flag in FLAGS.values() if flag.out_of_range(vars(args)[flag.dest])}
    with problems.collected():
        check_args(args)
    if not wrong & {*PARALLELISM.dests, "seed", "micro_batch_size", "global_batch_size"}:
        with problems.collected(), rank_zero(args.world_size, configs.parallel_sizes(args)):
            build.check_batch(args)
    with problems.collected():
        folders.check_folders(args)
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
    saved, done = None, TrainState()
    with problems.collected():
        saved, done = resume.progress(args, readers["--load"].folder if "--load" in readers else None)
    data = check_data(args, None if wrong else tokenizer, done, problems)
    rlvr = check_questions(args, None if wrong else tokenizer, problems)
    if saved is not None and data is not None:
        with problems.collected():
            resume.changed_data(saved, build.data_hashes(args, rlvr), args)
    size = 0
    if tokenizer is not None:
        for flag, reader in readers.items():
            with problems.collected():
                resume.check_tokenizer(read_metadata(reader.folder, flag=flag), tokenizer, flag)
    if tokenizer is not None and not wrong:
        with problems.collected():
            parameters, size = checkpoint_bytes(args, tokenizer.vocab_size)
            words.append(f"{parameters / 1e6:.4g} M parameters")
        with problems.collected():
            if saved is not None:
                resume.check_flags(saved, args, configs.model_args(args, tokenizer.vocab_size))
        with problems.collected():
            config = None
            if args.training_mode == "ebft" or args.ebft_encoder_load:
                config = configs.ebft_config(args, configs.model_args(args, tokenizer.vocab_size).num_layers)
            if data is not None:
                with rank_zero(1, ONE_RANK):
                    check_counts(args, config, *data)
    with problems.collected():
        words.append(check_save(args, size))
    words.append(f"goes on from {readers[origin].folder}" if is_resumed and origin in readers else "starts afresh")
    return words


def main(argv: list[str]) -> int:
    warnings.filterwarnings("ignore")
    problems, words = Problems(), []
    parser = Parser("tools/preflight.py", __doc__, own=(JOB,), reads=frozenset(FLAGS), shows_training=False)
    with problems.collected():
        if "--node-only" not in argv:
            args = parser.parse_args(argv)
            from megatron_ebft.common.device import import_megatron

            import_megatron()
            words += check_run(args, problems)
    with problems.collected():
        words.append(check_gpus(parser.parse_own(argv)))
    where = f"preflight on {socket.gethostname()}"
    if problems:
        lines = [f"{where}: {len(problems)} problem{'s' * (len(problems) > 1)}", *(f"  {text}" for text in problems)]
        print("\n".join(lines), flush=True)
        return EXIT_WRONG
    print(f"{where}: all well: {', '.join(words)}", flush=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except OSError as problem:
        if not is_passing(problem):
            raise
        print(f"preflight on {socket.gethostname()}: {problem}", flush=True)
        sys.exit(EXIT_UNREACHABLE)
