"""Shapes that tests/gpu runs, and that tests/gpu/compile_kernels.py compiles kernels for."""

import models
import plain_llama
import torch
from golden import GOLDEN

from megatron_ebft.layout.packed_row import split_blocks
from megatron_ebft.layout.strided import StridedLayout
from megatron_ebft.rollout.sampler import SamplingConfig, sample_rollouts

FLOAT32, BF16 = dict(params_dtype=torch.float32), dict(params_dtype=torch.bfloat16, bf16=True)
SHAPES = {"4 to a key head": (8, 2, 64), "7 to a key head": (14, 2, 128)}
"""Query heads, key heads, head dimension."""


def row_and_documents(has_documents: bool, pad_to: int = 8):
    row = split_blocks(StridedLayout(256, 8, 8, 8, 4, pad_to), 0, 7)[0]
    index = torch.arange(256, device="cuda")
    return row, torch.stack([(index > 100).long(), (index > 37).long() + (index > 200)]) if has_documents else None


def small_sampler(path, seq_length=128):
    """A policy, rows with documents, and what samples from it."""
    model, weights = plain_llama.load_llama(GOLDEN / "llama")
    policy = models.build_policy(model, weights, **path)
    tokens = torch.randint(1, model["vocab_size"], (2, seq_length), generator=torch.Generator().manual_seed(0))
    tokens[0, 50] = tokens[1, 90] = 0
    gold, layout = models.gold_batch(tokens, eod=0), StridedLayout(seq_length, 8, 8, 8, 4)
    return policy, gold, layout, lambda: sample_rollouts(policy, gold, layout, SamplingConfig(0.6, 1.0, 0, 1), 3)
