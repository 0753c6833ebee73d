"""A tiny training run with Megatron's optimizer and schedule, for tests of checkpoints."""

import os
import random
from pathlib import Path

import numpy
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_ebft.checkpointing.record import TrainState
from megatron_ebft.checkpointing.saver import Saver
from megatron_ebft.common.device import device
from megatron_ebft.model.attention import CausalPattern, as_mask
from megatron_ebft.model.decoder import ModelArgs, build_policy, unwrap
from megatron_ebft.parallel import groups

ARGS = ModelArgs(num_layers=4, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2,
                 kv_channels=8, vocab_size=60, padded_vocab_size=64, max_position_embeddings=64)
META = {"architecture": {"num_layers": 4, "hidden_size": 32}, "tokenizer": "fingerprint ü"}


def seed_all(seed: int) -> None:
    groups.set_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed)


class SmallRun:
    """A policy with Megatron's optimizer and schedule. The data of its loop come from all random generators."""

    def __init__(self, distributed: bool = True, lr: float = 1e-2, overlap: bool = False, args: ModelArgs = ARGS,
                 **config):
        seed_all(1)
        ddp = DistributedDataParallelConfig(use_distributed_optimizer=distributed, overlap_param_gather=overlap,
                                            overlap_grad_reduce=overlap, bucket_size=2000)  # overlap: many buckets
        self.model = build_policy(args, ddp, **config)
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(optimizer="adam", lr=lr, min_lr=1e-4, weight_decay=0.1, clip_grad=1.0,
                            bf16=config.get("bf16", False), use_distributed_optimizer=distributed,
                            overlap_param_gather=overlap), self.model)
        self.scheduler = OptimizerParamScheduler(
            self.optimizer, init_lr=0.0, max_lr=lr, min_lr=1e-4, lr_warmup_steps=2, lr_decay_steps=20,
            lr_decay_style="cosine", start_wd=0.1, end_wd=0.1, wd_incr_steps=20, wd_incr_style="constant",
            use_checkpoint_opt_param_scheduler=False)
        self.parts = (self.model, self.optimizer, self.scheduler)

    def train(self, steps: int) -> "SmallRun":
        """Take some next-token steps; returns the run."""
        ddp = self.model[0]
        for _ in range(steps):
            shift = random.randrange(8) + int(numpy.random.randint(8))
            token_BT = ((torch.randint(0, 64, (2, 16)) + shift) % 64).to(device())
            ddp.zero_grad_buffer()
            self.optimizer.zero_grad()
            positions = torch.arange(16, device=device()).expand(2, 16)
            logits_TBV = unwrap(ddp)(token_BT, positions, as_mask(CausalPattern()),
                                     labels=lambda hidden, model: model.head(hidden))
            loss = torch.nn.functional.cross_entropy(logits_TBV.float().flatten(0, 1), token_BT.t().flatten())
            (loss / groups.dp_size()).backward()
            ddp.finish_grad_sync()
            self.optimizer.step()
            self.scheduler.step(1)
        return self

    def weights(self) -> dict[str, torch.Tensor]:
        """Copies of the weights by name."""
        return {name: p.detach().clone() for name, p in unwrap(self.model[0]).named_parameters()}

    def save(self, directory, iteration: int) -> str:
        """Save a checkpoint; returns its folder."""
        saver = Saver(str(directory))
        saver.save(TrainState(iteration, 2 * iteration), *self.parts, META)
        return saver.finished()


def equal_tensors(a: dict, b: dict) -> bool:
    """Whether two dicts hold the same tensors, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def truncate(path: Path) -> None:
    """Cut a file to half of its size."""
    os.truncate(path, path.stat().st_size // 2)
