"""A checkpoint of format 3 that an earlier version saved still loads bit for bit, with its optimizer.

`format_3/` was saved on two data-parallel ranks by megatron-core 0.16.1. `format_3/expected.json` holds the fingerprint
of its weights, a hash of every tensor, and loss and gradient norm of the step that followed.
"""

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
import torch
from checkpoint_runs import ARGS, StepRun
from ranks import run_ranks

from megatron_ebft.checkpointing.fingerprint import weights_fingerprint
from megatron_ebft.checkpointing.loader import load_checkpoint
from megatron_ebft.parallel import groups

FOLDER = Path(__file__).parent / "format_3"


def load_and_step() -> dict:
    """Load the checkpoint and take the next step, at the present layout; the fields of expected.json."""
    run = StepRun("untied", dataclasses.replace(ARGS, num_layers=1, hidden_size=16, ffn_hidden_size=24,
                                                num_attention_heads=2, num_query_groups=1, kv_channels=8))
    state, _ = load_checkpoint(str(FOLDER), *run.parts, architecture={"num_layers": 1})
    assert (state.iteration, state.consumed_samples) == (3, 12)
    tensors = {key: hashlib.sha256(x.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
               for key, x in run.state().items()}
    return {"fingerprint": weights_fingerprint(run.model), "tensors": tensors, "step": run.step(3)}


def two_ranks() -> dict:
    groups.init_parallel(1, 1, seed=1)
    loaded = load_and_step()
    groups.shut_down()
    return loaded


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_checkpoint_of_format_3(one_rank, ranks):
    loaded = load_and_step() if ranks == 1 else run_ranks(2, "test_format:two_ranks")[0]
    expected = json.loads((FOLDER / "expected.json").read_text())
    assert len(expected["tensors"]) > 30
    assert loaded["tensors"] == expected["tensors"] and loaded["fingerprint"] == expected["fingerprint"]
    assert loaded["step"] == pytest.approx(expected["step"], rel=1e-5)
