"""From flags to a `Run`: tokenizer and data first (cheap to refuse), then models, optimizer and checkpoints.

Starting points. The policy starts from --pretrained-checkpoint (or from the seed; a --load that holds weights alone, as
a conversion makes them, is such a start, too). The encoder is --ebft-encoder-load, else that same start. The reference
is the start. A checkpoint in --load then takes the policy further; the encoder and the start it was trained with are
recorded in it by content hash, and must be the ones at hand.
"""

import argparse
import dataclasses
import itertools
import os

import megatron.core
import torch
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_ebft import __version__
from megatron_ebft.checkpointing.checkpoint import TrainState, load_checkpoint, load_weights, newest_whole
from megatron_ebft.checkpointing.files import (
    POINTER,
    RECORD,
    complete_iterations,
    first_readable,
    read_metadata,
    read_record,
    resolve,
)
from megatron_ebft.checkpointing.fingerprint import weights_fingerprint
from megatron_ebft.common.device import have_gpu
from megatron_ebft.data.rows import build_datasets
from megatron_ebft.data.tokenizer import build_tokenizer
from megatron_ebft.hf.files import COMPANIONS, SENTENCEPIECE, TOKENIZER_FILES, read_companions
from megatron_ebft.method.ebft import EBFTConfig
from megatron_ebft.method.features import ExchangeBytes, exchange_bytes
from megatron_ebft.model.decoder import (
    balanced_split,
    build_encoder,
    build_frozen,
    build_policy,
    copy_weights,
    free_fields,
)
from megatron_ebft.parallel.groups import document_size, dp_size
from megatron_ebft.rollout.schedule import idle_fraction, row_groups
from megatron_ebft.run.configs import (
    ddp_config,
    ebft_config,
    model_args,
    optimizer_config,
    policy_overrides,
    transformer_overrides,
    virtual_stages,
)
from megatron_ebft.run.step_dump import check_replay
from megatron_ebft.run.stopping import Stopper
from megatron_ebft.run.training import Run


def build_run(args: argparse.Namespace) -> Run:
    """Everything the training loop works on.

    Raises:
        ValueError: naming the flag that is wrong or the file that is missing or damaged.
    """
    check_batch(args)
    args.tensorboard_dir = args.tensorboard_dir or os.path.join(args.save or ".", "tensorboard")
    resume = newest_whole(args.load) if find_resume(args) else None
    origin = ("--load", resume) if resume else ("--pretrained-checkpoint", args.pretrained_checkpoint)
    if args.use_checkpoint_args:
        restore_architecture(args, *origin)
    tokenizer = build_tokenizer(args.tokenizer_type, args.tokenizer_model, args.vocab_size)
    for flag, folder in (("--load", resume), ("--ebft-encoder-load", args.ebft_encoder_load),
                         ("--pretrained-checkpoint", args.pretrained_checkpoint)):
        if folder:
            check_tokenizer(read_metadata(folder, flag=flag), tokenizer, flag)
    architecture = model_args(args, tokenizer.vocab_size)
    if args.seq_length > architecture.max_position_embeddings:
        raise ValueError(f"--seq-length {args.seq_length}: longer than --max-position-embeddings "
                         f"{architecture.max_position_embeddings}")
    wants_encoder = args.training_mode == "ebft" or args.ebft_encoder_load is not None
    config = ebft_config(args, architecture.num_layers) if wants_encoder else None
    overrides, of_policy = transformer_overrides(args), policy_overrides(args)
    train_data, valid_data = build_data(args, tokenizer)
    if args.ebft_replay_steps:
        done = read_record(resume, "--load")["train_state"]["iteration"] if resume else 0
        check_replay(args, done, tokenizer.vocab_size)

    fields = dataclasses.asdict(architecture)
    fixed = {name: value for name, value in fields.items() if name not in free_fields(fields)}
    policy = build_policy(architecture, ddp_config(args), **of_policy)
    if args.pretrained_checkpoint:
        load_weights(args.pretrained_checkpoint, policy, architecture=fixed)
    encoder = None
    if wants_encoder:
        encoder = build_encoder(architecture, max(config.feature_map.layers), **overrides)
        if args.ebft_encoder_load:
            load_weights(args.ebft_encoder_load, encoder, architecture=fixed, flag="--ebft-encoder-load")
        else:
            copy_weights(policy, encoder)
    reference = None
    if args.training_mode == "ebft" and (args.ebft_kl_coef or args.ebft_track_kl):
        reference = build_frozen(architecture, **overrides)
        copy_weights(policy, reference)
    optimizer = get_megatron_optimizer(optimizer_config(args), policy)
    scheduler = build_scheduler(args, optimizer)
    companions = _companions(args, *origin)
    metadata = {
        "architecture": fields, "arguments": vars(args),
        "tokenizer": {"type": args.tokenizer_type, "fingerprint": tokenizer.fingerprint},
        "start": {"origin": args.pretrained_checkpoint or f"--seed {args.seed}",
                  "fingerprint": weights_fingerprint(policy)},
        "encoder": {"origin": args.ebft_encoder_load or args.pretrained_checkpoint or f"--seed {args.seed}",
                    "fingerprint": weights_fingerprint(encoder)} if encoder is not None else None}
    state = TrainState()
    if resume:
        saved = read_metadata(resume)
        _check_origins(saved, metadata, args)
        state, _ = load_checkpoint(resume, policy, optimizer, scheduler, architecture=fixed, is_whole=True)
        metadata["changed"] = _changed(saved["arguments"], vars(args))
        if state.iteration > args.train_iters:
            raise ValueError(f"--train-iters {args.train_iters}: --load {args.load} is at step {state.iteration} "
                             "already")
    return Run(args.training_mode, policy, encoder, reference, optimizer, scheduler, config, train_data, valid_data,
               tokenizer, args, metadata, state, companions, Stopper(args.exit_duration_in_mins, args.ebft_stop_file))


def check_batch(args) -> None:
    """ValueError, naming the flag, unless the global batch can be shared out over the ranks there are."""
    ranks = document_size()
    if args.global_batch_size % (args.micro_batch_size * ranks):
        raise ValueError(f"--global-batch-size {args.global_batch_size}: must be a multiple of --micro-batch-size "
                         f"{args.micro_batch_size} × {ranks} ranks that take different rows (data-parallel size over "
                         "--ebft-sample-parallel-size)")
    micro_batches = args.global_batch_size // (args.micro_batch_size * ranks)
    if virtual_stages(args) and micro_batches % args.pipeline_model_parallel_size:
        raise ValueError(f"--num-virtual-stages-per-pipeline-rank {args.num_virtual_stages_per_pipeline_rank}: needs "
                         f"a multiple of --pipeline-model-parallel-size {args.pipeline_model_parallel_size} "
                         f"micro-batches of rows on a rank (evaluation has no others); --global-batch-size "
                         f"{args.global_batch_size} makes {micro_batches}")


def mixed_precision(args) -> str:
    """A warning that only one of rollouts and training runs in FP8."""
    sides = "--ebft-rollout-fp8 and --fp8-format set the two sides"
    if args.fp8_format:
        return ("note: the training pass runs in FP8 and rollouts do not. Published runs had FP8 in both or in "
                f"rollouts alone; {sides}")
    return ("note: rollouts run in FP8 and the training pass does not. In published runs this mix lost accuracy, with "
            f"and without importance weights, and FP8 in both did not; {sides}")


def describe(run: Run) -> str:
    """What is about to run, in two or three lines."""
    parameters = sum(p.numel() for chunk in run.policy for p in chunk.parameters())
    where = torch.cuda.get_device_name() if have_gpu() else "CPU"
    args = run.args
    stages, virtual = args.pipeline_model_parallel_size, args.num_virtual_stages_per_pipeline_rank
    kernels = run.policy[0].config
    lines = [f"megatron_ebft {__version__} | {run.mode} | tensor {args.tensor_model_parallel_size}"
             f"{' with sequence' if args.sequence_parallel else ''} × pipeline {stages}"
             f"{f' × {virtual} virtual' if virtual > 1 else ''} × data {dp_size()} ranks on {where} | torch "
             f"{torch.__version__}, megatron-core {megatron.core.__version__}, {kernels.transformer_impl} layers, "
             f"{kernels.attention_kernel} attention | {parameters / 1e6:.3g} M parameters on a rank"]
    if run.mode == "ebft":
        layout, encoder = run.config.layout, run.metadata["encoder"]
        lines.append(f"rows of {layout.seq_length} tokens: {layout.num_blocks} blocks × {run.config.num_samples} "
                     f"rollouts × {layout.rollout_length} tokens | features of layers "
                     f"{run.config.feature_map.layers} of {encoder['origin']} ({encoder['fingerprint']})")
        moved = feature_exchange(args, run.config, run.metadata["architecture"]["hidden_size"])
        if moved.gram or moved.features:
            lines.append(f"a step's rewards: a rank receives up to {moved.gram / 1e6:.3g} MB of Gram matrices and "
                         f"slices (features would be {moved.features / 1e6:.3g} MB)")
        if stages > 1:
            groups = len(row_groups(args.global_batch_size // document_size(), stages, args.ebft_rollout_rows))
            idle = idle_fraction(groups, stages, layout.rollout_length, virtual)
            lines.append(f"rollouts: {groups} groups of rows over {stages} stages, which idle {idle:.1%} of the time "
                         "if all steps take equally long")
        if (run.config.sampling.fp8.recipe != "off") != bool(args.fp8_format):
            lines.append(mixed_precision(args))
    if args.ebft_replay_steps:
        lines.append(f"documents and rollouts are those of the steps in {args.ebft_replay_steps}")
    if run.state.iteration:
        changed = f", with other flags: {', '.join(run.metadata['changed'])}" if run.metadata["changed"] else ""
        lines.append(f"continues {run.args.load} after step {run.state.iteration}{changed}")
    return "\n".join(lines)


def feature_exchange(args, config: EBFTConfig, hidden_size: int) -> ExchangeBytes:
    """What a rank receives in a step for the rewards, on the stage that has most feature layers."""
    layers, stages = config.feature_map.layers, args.pipeline_model_parallel_size
    ends = list(itertools.accumulate(balanced_split(max(layers), stages), initial=0))
    layers_here = max(sum(first < layer <= last for layer in layers) for first, last in zip(ends, ends[1:]))
    return exchange_bytes(
        config.feature_map, config.layout, args.global_batch_size // document_size(), config.blocks_per_microbatch,
        hidden_size, 2 if args.bf16 else 4, layers_here, tensor=args.tensor_model_parallel_size,
        is_sequence_parallel=args.sequence_parallel, pipeline=stages, samples=args.ebft_sample_parallel_size)


def find_resume(args) -> bool:
    """Whether --load holds a checkpoint. None is fine where the run itself will save there."""
    if not args.load:
        return False
    is_own = bool(args.save) and os.path.abspath(args.load) == os.path.abspath(args.save)
    if complete_iterations(args.load) or any(os.path.exists(os.path.join(args.load, x)) for x in (RECORD, POINTER)):
        if first_readable(args.load, "--load")[1]["optimizer"] is not None:
            return True
        if args.pretrained_checkpoint or is_own:
            other = "--save" if is_own else "--pretrained-checkpoint"
            raise ValueError(f"--load {args.load}: holds weights alone, to start from, so it does not go with {other}; "
                             "give it as --pretrained-checkpoint, and a folder of the run's own for --save and --load")
        args.pretrained_checkpoint = args.load
        return False
    if is_own:
        return False
    raise ValueError(f"--load {args.load}: no checkpoint there; name a folder that --save wrote, or that of --save "
                     "to start afresh and continue from it later")


def restore_architecture(args, flag: str, folder: str) -> None:
    """Set the flags of the architecture, and of the tokenizer if none was named, to what a checkpoint says."""
    metadata = read_metadata(folder, flag=flag)
    fields, tokenizer = metadata["architecture"], metadata["tokenizer"]
    for name, value in fields.items():
        if name in vars(args) and name not in free_fields(fields):
            setattr(args, name, value)
    args.vocab_size = fields["vocab_size"]
    if tokenizer is None or args.tokenizer_model or args.tokenizer_type == "NullTokenizer":
        return
    path = os.path.join(resolve(folder, flag), COMPANIONS)
    files = {"HuggingFaceTokenizer": path, "SentencePieceTokenizer": os.path.join(path, SENTENCEPIECE)}
    args.tokenizer_type, args.tokenizer_model = tokenizer["type"], files.get(tokenizer["type"])


def _companions(args, flag: str, folder: str | None) -> dict[str, bytes]:
    """Small files that every checkpoint of the run will carry: those of the one it comes from, and the tokenizer's."""
    found = read_companions(os.path.join(resolve(folder, flag), COMPANIONS)) if folder else {}
    if args.tokenizer_type == "SentencePieceTokenizer":
        with open(args.tokenizer_model, "rb") as file:
            found[SENTENCEPIECE] = file.read()
    elif args.tokenizer_type == "HuggingFaceTokenizer":
        found |= read_companions(args.tokenizer_model, TOKENIZER_FILES)
    return found


def _changed(saved: dict, now: dict) -> list[str]:
    """Flags that are not what they were when a checkpoint was saved, as `--flag old → new`."""
    return [f"--{name.replace('_', '-')} {saved[name]} → {value}" for name, value in now.items()
            if name in saved and saved[name] != value]


def build_data(args, tokenizer):
    """The training and validation datasets the flags ask for; ValueError as build_datasets."""
    eval_rows = args.eval_iters * args.global_batch_size if args.eval_interval else 0
    train_data, valid_data, _ = build_datasets(
        seq_length=args.seq_length, seed=args.seed, sizes=[args.train_iters * args.global_batch_size, eval_rows, 0],
        tokenizer=tokenizer, data_path=args.data_path, split=args.split, train_data_path=args.train_data_path,
        valid_data_path=args.valid_data_path if eval_rows else None, test_data_path=None,
        data_cache_path=args.data_cache_path, need_answers=args.ebft_answer_only,
        need_documents=args.ebft_document_mask)
    return train_data, valid_data


def build_scheduler(args, optimizer) -> OptimizerParamScheduler:
    """Warm-up and decay, counted in rows as Megatron does."""
    rows = args.train_iters * args.global_batch_size
    return OptimizerParamScheduler(
        optimizer, init_lr=0.0, max_lr=args.lr, min_lr=min(args.min_lr, args.lr),
        lr_warmup_steps=int(args.lr_warmup_fraction * rows), lr_decay_steps=rows, lr_decay_style=args.lr_decay_style,
        start_wd=args.weight_decay, end_wd=args.weight_decay, wd_incr_steps=rows, wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=args.use_checkpoint_opt_param_scheduler,
        override_opt_param_scheduler=args.override_opt_param_scheduler)


def check_tokenizer(metadata: dict, tokenizer, flag: str) -> None:
    """ValueError unless a checkpoint's tokenizer, where its metadata has one, is this one."""
    saved = metadata["tokenizer"]
    if saved is not None and saved["fingerprint"] != tokenizer.fingerprint:
        raise ValueError(f"--tokenizer-model: {flag} was trained with another tokenizer ({saved['type']} "
                         f"{saved['fingerprint'][:12]}, this is {tokenizer.name} {tokenizer.fingerprint[:12]})")


def _check_origins(saved: dict, now: dict, args) -> None:
    """The encoder, and with a KL term the start, must be those the checkpoint was trained with."""
    if args.training_mode != saved["arguments"]["training_mode"]:
        raise ValueError(f"--load {args.load}: was saved by --training-mode {saved['arguments']['training_mode']}; to "
                         f"start {args.training_mode} from its weights, give it as --pretrained-checkpoint")
    if args.training_mode != "ebft":
        return
    sizes = [f"--{name} {saved['arguments'][name.replace('-', '_')]}" for name in (
        "tensor-model-parallel-size", "pipeline-model-parallel-size", "num-virtual-stages-per-pipeline-rank")]
    for part, flag in (("encoder", "--ebft-encoder-load"), ("start", "--pretrained-checkpoint")):
        if saved[part]["fingerprint"] != now[part]["fingerprint"]:
            if saved[part]["origin"] == now[part]["origin"] == f"--seed {args.seed}":
                raise ValueError(f"--seed {args.seed}: the initial weights depend on how they are split, too; "
                                 f"{args.load} began with {' '.join(sizes)}: continue so. Runs that start from "
                                 "--pretrained-checkpoint continue at any split")
            raise ValueError(f"{flag}: the {part}'s weights are not those {args.load} was trained with "
                             f"(hash {now[part]['fingerprint']} from {now[part]['origin']}, recorded "
                             f"{saved[part]['fingerprint']} from {saved[part]['origin']}); give the recorded one, in "
                             "the recorded precision (--bf16)")
