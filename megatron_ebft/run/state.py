"""Everything a training run works on."""

import argparse
from dataclasses import dataclass, field

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.module import Float16Module
from torch.utils.data import Dataset

from megatron_ebft.checkpointing.lock import FolderLock
from megatron_ebft.checkpointing.record import TrainState
from megatron_ebft.data.tokenizer import Tokenizer
from megatron_ebft.method.config import EBFTConfig
from megatron_ebft.model.decoder import Decoder
from megatron_ebft.run.answers import EvalQuestions
from megatron_ebft.run.callbacks.callback import Callbacks
from megatron_ebft.run.counts import Shares
from megatron_ebft.run.learning_rate import Schedule
from megatron_ebft.run.rlvr import RLVR
from megatron_ebft.run.stopping import Stopper
from megatron_ebft.run.watchdog import Watchdog


@dataclass(kw_only=True)
class Run:
    """Everything the loop works on."""

    mode: str
    """`ebft`, `sft` or `rlvr`."""
    policy: list[DistributedDataParallel]
    """One for each virtual pipeline stage of this rank."""
    encoder: Decoder | Float16Module | None = None
    """Frozen feature network; None in other modes without one."""
    start: Decoder | Float16Module | None = None
    """Frozen starting policy; None when nothing asks for KL."""
    optimizer: MegatronOptimizer
    scheduler: Schedule
    config: EBFTConfig | None = None
    """EBFT, or how it evaluates; None without an encoder."""
    rlvr: RLVR | None = None
    """None in other modes."""
    eval_questions: EvalQuestions | None = None
    """None if evaluation answers none."""
    train_data: Dataset | None = None
    valid_data: Dataset | None = None
    counted: Shares | None = None
    """What counts of the training data; None if all does."""
    tokenizer: Tokenizer | None = None
    args: argparse.Namespace
    """Flags of the loop itself: intervals, batch sizes, folders, masks."""
    metadata: dict = field(default_factory=dict)
    """Recorded in every checkpoint."""
    state: TrainState = field(default_factory=TrainState)
    companions: dict[str, bytes] = field(default_factory=dict)
    """Small files to keep in every checkpoint, by name."""
    stopper: Stopper = field(default_factory=Stopper)
    watchdog: Watchdog = field(default_factory=Watchdog)
    callbacks: Callbacks = field(default_factory=Callbacks)
    in_use: set[int] = field(default_factory=set)
    """Iterations of checkpoints that something reads, on rank 0. They are not removed meanwhile."""
    lock: FolderLock | None = None
    """Of --save, on rank 0."""
