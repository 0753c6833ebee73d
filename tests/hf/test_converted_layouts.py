"""Logits of converted models at four layouts of TP × PP, against transformers, and the way back from TP 2 × PP 2.

Positions go past the original range of the rotary scaling. All layouts share one start of 4 ranks.
"""

from dataclasses import asdict

import pytest
import torch
from checkpoint_runs import SmallRun
from hf_models import (
    LENGTH,
    MODELS,
    VOCAB,
    equal_tensors,
    random_model,
    read_tensors,
    to_hf,
    to_megatron,
)
from megatron.core import parallel_state
from ranks import enter_world, run_ranks

from megatron_ebft.checkpointing.loader import load_weights
from megatron_ebft.checkpointing.record import TrainState, read_metadata
from megatron_ebft.checkpointing.saver import Saver
from megatron_ebft.common.device import device, init_device
from megatron_ebft.data.micro_batches import GoldBatch, GoldMicroBatches
from megatron_ebft.method.passes import run_schedule
from megatron_ebft.model.architecture import ModelArgs
from megatron_ebft.model.attention import CausalPattern, as_mask
from megatron_ebft.parallel import groups


def logits(policy: list, tokens: torch.Tensor) -> torch.Tensor | None:
    """[B, S, V] of the whole vocabulary; on the last stage."""
    outputs = []

    def forward_step(iterator, model):
        mb = next(iterator)

        def collect(out_SBV):
            shards = [torch.empty_like(out_SBV) for _ in range(parallel_state.get_tensor_model_parallel_world_size())]
            torch.distributed.all_gather(shards, out_SBV.contiguous(), group=groups.tp_group())
            outputs.append(torch.cat(shards, -1)[..., :VOCAB].transpose(0, 1))
            return out_SBV.sum(), {}

        mask, readout = as_mask(CausalPattern(None)), lambda hidden, model: model.head(hidden)
        return model(mb.tokens, mb.positions, mask, readout=readout), collect

    rows = GoldBatch(tokens.to(device()), torch.arange(len(tokens)))
    with torch.no_grad():
        run_schedule(forward_step, GoldMicroBatches(rows, 1), policy, forward_only=True)
    return torch.cat(outputs).cpu() if outputs else None


def four_ranks(folder: str) -> dict:
    """Largest difference of a logit by model and layout; None where this rank is no last stage."""
    init_device()
    tokens, differences = torch.load(f"{folder}/tokens.pt"), {}
    for tp, pp in ((1, 1), (2, 1), (1, 2), (2, 2)):
        enter_world(4)
        groups.init_parallel(tp, pp, seed=1)
        for kind in MODELS:
            checkpoint = f"{folder}/{kind}.checkpoint"
            args = ModelArgs(**read_metadata(checkpoint)["architecture"])
            args.padded_vocab_size = 2 * VOCAB
            sizes = dict(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, pipeline_dtype=torch.float32)
            run = SmallRun(args=args, **sizes)
            load_weights(checkpoint, run.model)
            out, expected = logits(run.model, tokens), torch.load(f"{folder}/{kind}.logits")
            differences[f"{kind} {tp} {pp}"] = None if out is None else (out - expected).abs().max().item()
            if (tp, pp) == (2, 2):
                Saver(f"{checkpoint} 2 2").save(TrainState(3, 6), *run.parts,
                                {"architecture": asdict(args), "tokenizer": None})
        del run
        groups.shut_down()
    return differences


@pytest.fixture(scope="module")
def by_layout(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    tokens = torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    torch.save(tokens, folder / "tokens.pt")
    for kind in MODELS:
        model = random_model(kind)
        model.save_pretrained(folder / kind)
        to_megatron(folder / kind, folder / f"{kind}.checkpoint")
        torch.save(model(tokens).logits.detach(), folder / f"{kind}.logits")
    ranks = run_ranks(4, "test_converted_layouts:four_ranks", str(folder))
    return folder, {name: [rank[name] for rank in ranks if rank[name] is not None] for name in ranks[0]}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("layout", ["1 1", "2 1", "1 2", "2 2"])
def test_logits_are_those_of_transformers(by_layout, kind, layout):
    folder, differences = by_layout
    tp, pp = map(int, layout.split())
    largest = differences[f"{kind} {layout}"]
    assert len(largest) == 4 // pp and max(largest) <= 1e-4  # on every rank of a last stage
    assert tp == 1 or max(largest) > 0  # unsplit sums may round as theirs do, split ones do not
    assert torch.load(folder / f"{kind}.logits").std() > 0.5


@pytest.mark.parametrize("kind", MODELS)
def test_back_from_tp2_pp2(by_layout, tmp_path, kind):
    folder, _ = by_layout
    converted = to_hf(folder / f"{kind}.checkpoint 2 2", tmp_path / "converted")
    assert equal_tensors(read_tensors(converted), read_tensors(folder / kind))
