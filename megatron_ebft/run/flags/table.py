"""Every flag of training, and which of them tools read that run single steps."""

from megatron_ebft.run.flags.basics import RUN
from megatron_ebft.run.flags.checkpoints import CHECKPOINTS
from megatron_ebft.run.flags.data import DATA
from megatron_ebft.run.flags.dumped_steps import DUMPED_STEPS
from megatron_ebft.run.flags.evaluation import EVALUATION
from megatron_ebft.run.flags.flag import Flag, Group
from megatron_ebft.run.flags.fp8 import FP8
from megatron_ebft.run.flags.logging import LOGGING
from megatron_ebft.run.flags.method import METHOD
from megatron_ebft.run.flags.model import MODEL
from megatron_ebft.run.flags.observing import OBSERVING
from megatron_ebft.run.flags.optimizer import OPTIMIZER
from megatron_ebft.run.flags.parallelism import PARALLELISM
from megatron_ebft.run.flags.precision import PRECISION
from megatron_ebft.run.flags.rlvr import RLVR
from megatron_ebft.run.flags.verifiers import VERIFIERS

GROUPS = (RUN, MODEL, DATA, METHOD, RLVR, VERIFIERS, OPTIMIZER, PARALLELISM, PRECISION, FP8, CHECKPOINTS, EVALUATION,
          LOGGING, OBSERVING, DUMPED_STEPS)
FLAGS: dict[str, Flag] = {flag.dest: flag for group in GROUPS for flag in group.flags}
"""By attribute name."""
ESSENTIALS = Group("the flags to start with", tuple(FLAGS[dest] for dest in (
    "training_mode", "train_iters", "pretrained_checkpoint", "use_checkpoint_args", "data_path", "seq_length",
    "global_batch_size", "lr", "ebft_rollout_length", "ebft_stride", "ebft_num_samples", "ebft_temperature",
    "ebft_ce_coef", "bf16", "tensor_model_parallel_size", "save", "load")))
STEP = frozenset(dest for group in (MODEL, METHOD, OPTIMIZER, PARALLELISM, PRECISION, FP8) for dest in group.dests) | {
    "train_iters", "micro_batch_size", "global_batch_size", "seed", "seq_length", "vocab_size"}
"""Attributes that one EBFT step on random weights and random rows reads."""
COMPARED = ("training_mode", "train_iters", "global_batch_size", "seq_length", "seed", "lr", "lr_decay_style",
            "weight_decay", "pretrained_checkpoint", "ebft_encoder_load", *METHOD.dests, *RLVR.dests)
"""Attributes that tell runs apart, for comparisons."""
