"""From flags to a `Run`: tokenizer and data first (cheap to refuse), then models, optimizer and checkpoints."""

import argparse
import dataclasses

from megatron_ebft.checkpointing.companions import end_ids
from megatron_ebft.checkpointing.fingerprint import weights_fingerprint
from megatron_ebft.checkpointing.loader import load_checkpoint, newest_whole
from megatron_ebft.checkpointing.record import TrainState, read_metadata
from megatron_ebft.data.datasets import build_datasets, content_hashes
from megatron_ebft.data.tokenizer import build_tokenizer
from megatron_ebft.method.config import EBFTConfig
from megatron_ebft.model.architecture import ModelArgs
from megatron_ebft.parallel.groups import document_size
from megatron_ebft.run.answers import build_eval_questions
from megatron_ebft.run.callbacks.build import build_callbacks
from megatron_ebft.run.configs import (
    check_memory,
    check_rollouts,
    ebft_config,
    model_args,
    policy_overrides,
    virtual_stages,
)
from megatron_ebft.run.counts import check_counts
from megatron_ebft.run.flags.checks import reads_rows
from megatron_ebft.run.folders import tensorboard_folder
from megatron_ebft.run.learning_rate import rows_of_run
from megatron_ebft.run.models import Models, Source, build_models, build_optimizer, fixed_fields
from megatron_ebft.run.resume import (
    beginning,
    changed_data,
    changed_flags,
    check_flags,
    check_origins,
    check_tokenizer,
    find_resume,
    gather_companions,
    progress,
    restore_architecture,
)
from megatron_ebft.run.rlvr import RLVR, build_rlvr
from megatron_ebft.run.state import Run
from megatron_ebft.run.step_dump import check_replay
from megatron_ebft.run.stopping import Stopper


def build_run(args: argparse.Namespace) -> Run:
    """Everything the training loop works on.

    Raises:
        ValueError: naming the flag that is wrong or the file that is missing or damaged.
    """
    check_batch(args)
    callbacks = build_callbacks(args)  # refuses flags that do not suit the ranks, before data are read
    args.tensorboard_dir = tensorboard_folder(args)
    began = beginning(args)
    resume = newest_whole(args.load) if find_resume(args) else None
    origin = ("--load", resume) if resume else ("--pretrained-checkpoint", args.pretrained_checkpoint)
    if args.use_checkpoint_args:
        restore_architecture(args, *origin)
    tokenizer, architecture = _tokenizer_and_architecture(args, resume)
    saved, state = progress(args, resume)
    if saved is not None:
        check_flags(saved, args, architecture)
    wants_encoder = args.training_mode == "ebft" or args.ebft_encoder_load is not None
    config = ebft_config(args, architecture.num_layers) if wants_encoder else None
    if args.training_mode == "ebft":
        check_rollouts(args, architecture, config.layout)
    policy_overrides(args)  # refuses FP8 that cannot run, before data are read
    companions = gather_companions(args, *origin)
    rlvr = None
    if args.training_mode == "rlvr":
        rlvr = build_rlvr(args, tokenizer, end_ids(companions, tokenizer.eod))
    eval_questions = build_eval_questions(args, tokenizer, end_ids(companions, tokenizer.eod),
                                          architecture.max_position_embeddings)
    train_data, valid_data = build_data(args, tokenizer, state)
    data = data_hashes(args, rlvr)
    changed = [] if saved is None else changed_data(saved, data, args)
    counted = check_counts(args, config, train_data, valid_data)
    if args.ebft_replay_steps:
        check_replay(args, state.iteration, tokenizer.vocab_size)

    pretrained, encoder = args.pretrained_checkpoint, args.ebft_encoder_load
    models = build_models(
        args, architecture, config,
        policy_from=Source("--pretrained-checkpoint", pretrained) if pretrained else None,
        encoder_from=Source("--ebft-encoder-load", encoder) if encoder else None,
        has_start=has_start(args, config))
    optimizer, scheduler = build_optimizer(args, models.policy, state)
    metadata = _metadata(args, architecture, tokenizer, models) | {"beginning": began, "data": data}
    if resume:
        check_origins(saved, metadata, args)
        state, _ = load_checkpoint(resume, models.policy, optimizer, scheduler, architecture=fixed_fields(architecture),
                                   is_whole=True)
        metadata["changed"] = changed_flags(saved["arguments"], vars(args)) + changed
    return Run(mode=args.training_mode, policy=models.policy, encoder=models.encoder, start=models.start,
               optimizer=optimizer, scheduler=scheduler, config=config, rlvr=rlvr, eval_questions=eval_questions,
               train_data=train_data, valid_data=valid_data, counted=counted, tokenizer=tokenizer, args=args,
               metadata=metadata, state=state, companions=companions,
               stopper=Stopper(args.exit_duration_in_mins, args.ebft_stop_file), callbacks=callbacks)


def data_hashes(args, rlvr: RLVR | None) -> dict[str, str]:
    """Content hashes of what a run trains and evaluates on, by path."""
    hashes = content_hashes(args.data_path, args.train_data_path, args.valid_data_path)
    return hashes if rlvr is None else hashes | {args.ebft_questions: rlvr.questions.content_hash}


def has_start(args, config: EBFTConfig | None) -> bool:
    """Whether the run keeps a frozen copy of its start: for a KL term, or to measure KL at evaluation."""
    tracks = args.ebft_track_kl and config is not None
    return args.training_mode != "sft" and bool(args.ebft_kl_coef or tracks)


def _tokenizer_and_architecture(args, resume: str | None) -> tuple:
    """The tokenizer, which must be that of every checkpoint named, and the model it makes."""
    tokenizer = build_tokenizer(args.tokenizer_type, args.tokenizer_model, args.vocab_size)
    for flag, folder in (("--load", resume), ("--ebft-encoder-load", args.ebft_encoder_load),
                         ("--pretrained-checkpoint", args.pretrained_checkpoint)):
        if folder:
            check_tokenizer(read_metadata(folder, flag=flag), tokenizer, flag)
    architecture = model_args(args, tokenizer.vocab_size)
    check_memory(args, architecture)
    if args.seq_length > architecture.max_position_embeddings:
        raise ValueError(f"--seq-length {args.seq_length}: longer than --max-position-embeddings "
                         f"{architecture.max_position_embeddings}; raise it to learn longer rows")
    return tokenizer, architecture


def _metadata(args, architecture: ModelArgs, tokenizer, models: Models) -> dict:
    """What every checkpoint of the run records."""
    start = args.pretrained_checkpoint or f"--seed {args.seed}"
    encoder = models.encoder and {"origin": args.ebft_encoder_load or start,
                                 "fingerprint": weights_fingerprint(models.encoder)}
    return {"architecture": dataclasses.asdict(architecture), "arguments": vars(args),
            "tokenizer": {"type": args.tokenizer_type, "fingerprint": tokenizer.fingerprint},
            "start": {"origin": start, "fingerprint": weights_fingerprint(models.policy)}, "encoder": encoder}


def check_batch(args) -> None:
    """ValueError, naming the flag, unless the global batch can be shared out over the ranks there are."""
    ranks = document_size()
    if not reads_rows(args):
        if args.global_batch_size % ranks:
            raise ValueError(f"--global-batch-size {args.global_batch_size}: must be a multiple of the {ranks} "
                             "data-parallel ranks, which take different questions")
        return
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


def build_data(args, tokenizer, done: TrainState):
    """The training and validation datasets of a run that has come to `done`; ValueError as build_datasets.

    Where a run reads no rows, there are none.
    """
    if not reads_rows(args):
        return None, None
    train_rows = 0 if args.training_mode == "rlvr" else rows_of_run(args, done)
    eval_rows = args.eval_iters * args.global_batch_size if args.eval_interval else 0
    train_data, valid_data, _ = build_datasets(
        seq_length=args.seq_length, seed=args.seed, sizes=[train_rows, eval_rows, 0],
        tokenizer=tokenizer, data_path=args.data_path, split=args.split, train_data_path=args.train_data_path,
        valid_data_path=args.valid_data_path if eval_rows else None, test_data_path=None,
        data_cache_path=args.data_cache_path, need_answers=args.ebft_answer_only)
    return train_data, valid_data
