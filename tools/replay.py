"""Recompute one step from its rows and rollouts, with any weights, on any layout of ranks.

    torchrun --nproc-per-node 4 tools/replay.py --hf-model DIR --batch STEP.safetensors --output OUT.safetensors \\
        --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2

1. STEP is a file of tests/golden, or one that training wrote with --ebft-dump-steps (step_file.py has the format). OUT
   has the same format, with features and gradients under Hugging Face names. Results that STEP holds are compared; if a
   difference is above --tolerance, the exit status is 1. Use it to check a cluster, a conversion or a layout before a
   long run, and to look into a strange step.
2. The method comes from the file. Parallelism, precision, memory and FP8 come from training's flags, or from the run's
   --config file.
3. To replay step i of a run, --load the checkpoint saved after step i − 1, and give the run's --ebft-encoder-load and
   --pretrained-checkpoint. No checkpoint precedes the first step: --load what the run started from.
"""

import dataclasses
import os
import sys
import time
import warnings
from contextlib import contextmanager

import torch
from safetensors import safe_open

from megatron_ebft.run.flags.flag import Flag, Group, at_least
from megatron_ebft.run.flags.fp8 import FP8
from megatron_ebft.run.flags.parallelism import PARALLELISM
from megatron_ebft.run.flags.parser import Parser
from megatron_ebft.run.flags.precision import PRECISION

TOLERANCES = {"float32": 1e-4, "bfloat16": 1e-1}
REPLAY = Group("replay", (
    Flag("--hf-model", str, "Hugging Face folder with the policy's weights", metavar="DIR"),
    Flag("--load", str, "checkpoint with the policy's weights, instead of --hf-model", metavar="DIR"),
    Flag("--pretrained-checkpoint", str, "checkpoint that the run started from. It gives the start of a KL term and, "
         "unless --ebft-encoder-load is given, the encoder", metavar="DIR", default_text="the policy's weights"),
    Flag("--ebft-encoder-load", str, "checkpoint with the encoder's weights, if they differ", metavar="DIR"),
    Flag("--batch", str, "file of the step: rows, rollouts and, in its metadata, the method", metavar="FILE",
         required=True),
    Flag("--output", str, "file for the step with all that was computed", metavar="FILE", required=True),
    Flag("--tolerance", float, "largest difference from the results in --batch, absolute; of gradients relative to "
         "their norm", default_text=f"{TOLERANCES['float32']}, with --bf16 {TOLERANCES['bfloat16']}",
         valid=at_least(0))))
READS = frozenset({"micro_batch_size", *PARALLELISM.dests, *PRECISION.dests, *FP8.dests}
                  - {"ebft_skip_duplicates", "ebft_step"})


def parse(argv: list[str]):
    """Training's flags for this step, the step, the model's Hugging Face tensors and, with --hf-model, their files.

    Raises:
        ValueError: naming the flag or the file.
    """
    from megatron_ebft.checkpointing.record import architecture_of, read_metadata
    from megatron_ebft.hf.config import describe, read_model
    from megatron_ebft.hf.weights import HFWeights
    from megatron_ebft.model.architecture import read_architecture
    from megatron_ebft.run.flags.checks import check_args
    from megatron_ebft.run.step_file import read_step

    parser = Parser("torchrun --nproc-per-node N tools/replay.py", __doc__, own=(REPLAY,), reads=READS)
    mine = parser.parse_args(argv)
    if bool(mine.hf_model) == bool(mine.load):
        raise ValueError("--hf-model, --load: give one of the two, with the policy's weights")
    if os.path.abspath(mine.batch) == os.path.abspath(mine.output):
        raise ValueError(f"--output {mine.output}: is the --batch, name another file")
    folder = os.path.dirname(os.path.abspath(mine.output))
    if not (os.path.isdir(folder) and os.access(folder, os.W_OK)):
        raise ValueError(f"--output {mine.output}: {folder} is no folder that can be written to")
    if mine.hf_model:
        hf, weights = read_model(mine.hf_model, "--hf-model"), HFWeights(mine.hf_model, "--hf-model")
        weights.check(hf)
    else:
        weights = None
        architecture = read_architecture(read_metadata(mine.load)["architecture"], architecture_of(mine.load, "--load"))
        hf = describe(architecture, f"--load {mine.load}")
    step = read_step(mine.batch, "--batch", hf.architecture.vocab_size)
    if step.args.seq_length > hf.architecture.max_position_embeddings:
        raise ValueError(f"--batch {mine.batch}: has rows of {step.args.seq_length} tokens, and the model is for "
                         f"{hf.architecture.max_position_embeddings}")
    if step.args.global_batch_size % max(1, mine.micro_batch_size):
        raise ValueError(f"--micro-batch-size {mine.micro_batch_size}: does not divide the "
                         f"{step.args.global_batch_size} documents of --batch {mine.batch}")
    args, architecture = step.args, dataclasses.asdict(hf.architecture)
    vars(args).update({name: value for name, value in architecture.items() if name in vars(args)})
    vars(args).update({name: vars(mine)[name] for name in (*READS, *REPLAY.dests)})
    if args.tolerance is None:
        args.tolerance = TOLERANCES["bfloat16" if args.bf16 else "float32"]
    return check_args(args), step, hf, weights


def build(args, hf, weights):
    """Policy, encoder and, with a KL term, the start, with their weights; and the configuration of the method."""
    from megatron_ebft.hf.load import load_hf_weights
    from megatron_ebft.run.configs import ebft_config, model_args
    from megatron_ebft.run.models import Source, build_models

    def from_hf(policy: list) -> None:
        load_hf_weights(policy, hf, weights)

    config = dataclasses.replace(ebft_config(args, hf.architecture.num_layers), skip_duplicates=False)
    encoder, pretrained = (Source(f"--{flag}", folder) if (folder := vars(args)[flag.replace("-", "_")]) else None
                           for flag in ("ebft-encoder-load", "pretrained-checkpoint"))
    models = build_models(args, model_args(args, hf.architecture.vocab_size), config,
                          policy_from=Source("--load", args.load) if weights is None else from_hf,
                          encoder_from=encoder or pretrained, start_from=pretrained, has_start=bool(args.ebft_kl_coef),
                          use_distributed_optimizer=False)
    return models, config


@contextmanager
def phase(name: str, models: list, passes: int, say):
    """Says how long the block took, and while it runs how long it will: it takes `passes` forward passes of a rank."""
    from megatron_ebft.common.progress import Progress, clock

    progress = Progress(name, passes, say)
    hooks = [model.register_forward_hook(progress.tick) for model in models]
    yield
    for hook in hooks:
        hook.remove()
    say(f"{name} {clock(time.perf_counter() - progress.start)}")


def compute(step, models, config, say) -> dict[str, torch.Tensor]:
    """Every result but the gradients, which are left in the policy's buffers; the same on every rank."""
    from gather import gather_features

    from megatron_ebft.method.batches import encoder_rows
    from megatron_ebft.method.gradient import policy_gradient, score
    from megatron_ebft.method.means import Means
    from megatron_ebft.method.rewards import compute_advantages, compute_rewards, feature_grams
    from megatron_ebft.model.fp8 import quantised
    from megatron_ebft.parallel.groups import all_documents, all_samples
    from megatron_ebft.run.step_file import gather_results

    policy, encoder = models.policy, models.encoder
    gold, rollouts = step.local_part()
    rows = encoder_rows(gold, rollouts, config)
    with phase("features", [encoder], len(rows), say), torch.no_grad(), quantised([encoder], config.encoder_fp8):
        features_BKND, features_BKD = gather_features(encoder, config.feature_map, rows)
    with phase("rewards", [encoder], len(rows), say):
        rewards = compute_rewards(feature_grams(encoder, gold, rollouts, config), rollouts, config)
        advantage_BKN = compute_advantages(rewards, config)
    start_BKNG, means = None, Means()
    if models.start is not None:
        with phase("start scores", [models.start], len(rows), say):
            start_BKNG = score(models.start, gold, rollouts, config).rollout_BKNG
    for chunk in policy:
        chunk.zero_grad_buffer()
    with phase("gradient", policy, len(rows) * len(policy), say):
        scores = policy_gradient(policy, gold, rollouts, advantage_BKN, config, means, start_BKNG)
    return {"features_gold": all_documents(features_BKD),
            "features_rollout": all_documents(all_samples(features_BKND)).transpose(1, 2),
            **gather_results(step, rewards, advantage_BKN, scores, means.reduce())}


def write(args, step, results: dict, policy: list, hf, say) -> None:
    """The output file, by rank 0; gradients come to it one at a time."""
    from gather import gather_gradients

    from megatron_ebft.common.progress import Progress
    from megatron_ebft.run.step_file import step_writer

    shapes = {f"grad.{name}": shape for entry in hf.entries.values() for name, shape in zip(entry.names, entry.shapes)}
    gradients, progress = gather_gradients(policy, hf), Progress("written", len(shapes), say)
    if torch.distributed.get_rank() > 0:
        nothing = list(gradients)
        assert not nothing
        return
    with step_writer(args.output, "--output", step, results, shapes) as writer:
        for name, gradient in gradients:
            writer.write(f"grad.{name}", gradient)
            progress.tick()


def compare(batch: str, output: str, tolerance: float, say) -> list[str]:
    """Print how far the output is from every result in the batch file.

    Two values that are NaN in the same place agree. A log-probability that is NaN in the batch file was skipped there.

    Returns:
        Names of the results that differ by more than the tolerance or are missing.
    """
    from megatron_ebft.run.step_file import INPUTS

    with safe_open(batch, "pt") as given, safe_open(output, "pt") as computed:
        names, wrong = [key for key in given.keys() if key not in INPUTS], []
        for key in names:
            expected = given.get_tensor(key)
            if key not in computed.keys() or tuple(computed.get_slice(key).get_shape()) != tuple(expected.shape):
                say(f"{key}: not in the output, or in another shape than {tuple(expected.shape)}")
                wrong.append(key)
                continue
            result = computed.get_tensor(key)
            is_missing = expected.isnan() & (result.isnan() | (key == "log_probs"))
            difference = (result - expected).where((result != expected) & ~is_missing, 0.0)
            is_gradient = key.startswith("grad.")
            size = difference.norm() / expected.norm().clamp(min=1e-30) if is_gradient else difference.abs().max()
            say(f"{key}: {size:.1e}{' of its norm' if is_gradient else ''}")
            if not size <= tolerance:
                wrong.append(key)
    say(f"{len(names) - len(wrong)} of {len(names)} results of {batch} are within {tolerance:.0e}")
    return wrong


def main(argv: list[str]) -> None:
    """Parse, build, compute, write, compare."""
    warnings.filterwarnings("ignore")
    from megatron_ebft.common.device import import_megatron

    import_megatron()
    from megatron_ebft.parallel.groups import init_parallel, shut_down
    from megatron_ebft.run.build import check_batch
    from megatron_ebft.run.configs import parallel_sizes

    args, step, hf, weights = parse(argv)
    init_parallel(**parallel_sizes(args))

    def say(line: str) -> None:
        if torch.distributed.get_rank() == 0:
            print(line, flush=True)

    try:
        check_batch(args)
    except ValueError as error:
        raise ValueError(f"--batch {args.batch}, whose {args.global_batch_size} documents are the global batch: {error}"
                         ) from error
    say(f"step {step.iteration or '(without a number)'} of {args.batch}: {args.global_batch_size} documents of "
        f"{args.seq_length} tokens, {step.layout.num_blocks} blocks × {args.ebft_num_samples} rollouts × "
        f"{args.ebft_rollout_length} tokens")
    models, config = build(args, hf, weights)
    results = compute(step, models, config, say)
    write(args, step, results, models.policy, hf, say)
    wrong = compare(args.batch, args.output, args.tolerance, say) if torch.distributed.get_rank() == 0 else []
    shut_down()
    if wrong:
        raise ValueError(f"--batch {args.batch}: {len(wrong)} of its results differ by more than --tolerance "
                         f"{args.tolerance:.0e}: {', '.join(wrong)}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
