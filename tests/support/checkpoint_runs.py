"""Tiny training runs with Megatron's optimizer and schedule, for tests of checkpoints."""

import dataclasses
import itertools
import os
import random
from pathlib import Path

import numpy
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import is_main_replica
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

from megatron_ebft.checkpointing.record import TrainState
from megatron_ebft.checkpointing.saver import Saver
from megatron_ebft.checkpointing.sharded_state import sharded_state
from megatron_ebft.checkpointing.sharded_weights import sharded_tensors
from megatron_ebft.common.device import device
from megatron_ebft.model.architecture import ModelArgs
from megatron_ebft.model.attention import CausalPattern, as_mask
from megatron_ebft.model.build import build_policy
from megatron_ebft.model.weights import unwrap
from megatron_ebft.parallel import groups

ARGS = ModelArgs(num_layers=4, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2,
                 kv_channels=8, vocab_size=60, padded_vocab_size=64, max_position_embeddings=64)
META = {"architecture": {"num_layers": 4, "hidden_size": 32}, "tokenizer": {"type": "x", "fingerprint": "ü"}}
ROWS, T, VOCAB = 4, 12, 50
MODELS = {"untied": {}, "tied": {}, "bf16": {"bf16": True, "params_dtype": torch.bfloat16}}
"""Models of StepRun, and their configuration."""


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
                                     readout=lambda hidden, model: model.head(hidden))
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


def padded_vocabulary(tp: int) -> int:
    """Rows of an embedding of VOCAB ids at a tensor-parallel size."""
    return VOCAB + -VOCAB % (10 * tp)


class StepRun(SmallRun):
    """A run at the present layout, whose data depend on the number of the step alone.

    Args:
        name: one of MODELS.
        args: its architecture but for the vocabulary.
    """

    def __init__(self, name: str, args: ModelArgs = ARGS):
        tp, pp = (f() for f in (parallel_state.get_tensor_model_parallel_world_size,
                                parallel_state.get_pipeline_model_parallel_world_size))
        self.args = dataclasses.replace(args, vocab_size=VOCAB, padded_vocab_size=padded_vocabulary(tp),
                                        untie_embeddings_and_output_weights=not name.startswith("tied"))
        self.config = dict(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp,
                           pipeline_dtype=torch.bfloat16 if "bf16" in name else torch.float32, **MODELS[name])
        virtual = parallel_state.get_virtual_pipeline_model_parallel_world_size()
        super().__init__(args=self.args, virtual_pipeline_model_parallel_size=virtual, **self.config)

    def step(self, number: int) -> dict[str, float]:
        """Take one next-token step; returns loss and gradient norm of the global batch."""
        tokens = torch.randint(VOCAB, (ROWS, T), generator=torch.Generator().manual_seed(number)).to(device())
        tokens = tokens.chunk(groups.dp_size())[parallel_state.get_data_parallel_rank()]
        loss = torch.zeros((), device=device())

        def forward_step(iterator, chunk):
            row = next(iterator)

            def loss_func(losses):
                mean = losses.sum() / (ROWS * (T - 1))
                loss.add_(mean.detach())
                return mean, torch.zeros((), dtype=torch.int), {}

            positions = torch.arange(T, device=device()).expand(1, T)

            def readout(hidden, model):
                logits = model.head(hidden)[:-1].float()
                is_padding = torch.arange(logits.shape[-1], device=logits.device) >= model.num_real_ids
                return vocab_parallel_cross_entropy(logits.masked_fill(is_padding, -torch.inf), row.t()[1:])

            return chunk(row, positions, as_mask(CausalPattern()), readout=readout), loss_func

        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=forward_step, data_iterator=[iter(tokens.split(1)) for _ in self.model],
            model=self.model, num_microbatches=len(tokens), seq_length=T, micro_batch_size=1, forward_only=False)
        _, norm, _ = self.optimizer.step()
        self.scheduler.step(1)
        dist.all_reduce(loss)  # the tensor ranks of the last stage have it each
        return {"loss": loss.item() / parallel_state.get_tensor_model_parallel_world_size(), "norm": float(norm)}

    def state(self) -> dict[str, torch.Tensor]:
        """Every tensor of a checkpoint, unsplit, from all ranks."""
        own = [(tensor.key, tensor.global_shape, tensor.global_offset, tensor.data.detach().cpu())
                for tensor in sharded_tensors(sharded_state(*self.parts))
                if is_main_replica(tensor.replica_id)]
        whole = {}
        for key, shape, offset, data in itertools.chain(*gather(own)):
            place = tuple(slice(first, first + size) for first, size in zip(offset, data.shape, strict=True))
            whole.setdefault(key, torch.full(shape, torch.nan, dtype=data.dtype))[place] = data
        assert not any(x.isnan().any() for x in whole.values())
        return whole


def gather(value) -> list:
    """The objects of all ranks."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def equal_tensors(a: dict, b: dict) -> bool:
    """Whether two dicts hold the same tensors, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def truncate(path: Path) -> None:
    """Cut a file to half of its size."""
    os.truncate(path, path.stat().st_size // 2)
