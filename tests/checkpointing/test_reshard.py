"""A checkpoint saved at one tensor × pipeline × data-parallel layout is the same run at another.

One start of four ranks goes from layout to layout in the same processes: at each it loads what another one saved, and
holds every weight and every moment of the optimizer against those first saved, element by element; then it takes one
step and holds loss, gradient norm and the new state against those of the run that was never interrupted. One start of
two ranks does so from the first checkpoint. The padding of the vocabulary changes with the layout.
"""

import dataclasses
import gc
import itertools

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import is_main_replica
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from ranks import enter_world, run_ranks
from small_run import ARGS, META, SmallRun

from megatron_ebft.checkpointing.fingerprint import weights_fingerprint
from megatron_ebft.checkpointing.loader import load_checkpoint, load_weights
from megatron_ebft.checkpointing.record import TrainState
from megatron_ebft.checkpointing.saver import Saver
from megatron_ebft.checkpointing.sharded_state import sharded_state
from megatron_ebft.checkpointing.sharded_weights import sharded_tensors
from megatron_ebft.common.device import device
from megatron_ebft.model.attention import CausalPattern, as_mask
from megatron_ebft.model.decoder import build_encoder, build_frozen
from megatron_ebft.parallel import groups

ROWS, T, VOCAB, STEPS = 4, 12, 50, 3
FIRST, VIRTUAL = "TP 2 × PP 2", "PP 2 × VP 2 × DP 2"
LAYOUTS = {  # tensor-parallel size, pipeline-parallel size, virtual stages; where the checkpoint to load was saved
    FIRST: (2, 2, None, None), VIRTUAL: (1, 2, 2, FIRST), "TP 4": (4, 1, None, FIRST), "PP 4": (1, 4, None, VIRTUAL),
    "DP 4": (1, 1, None, VIRTUAL), "TP 2 × PP 2 again": (2, 2, None, VIRTUAL),
    "DP 2": (1, 1, None, FIRST)}  # the last of two ranks, the others of four
MODELS = {"untied": {}, "tied": {}, "bf16": {"bf16": True, "params_dtype": torch.bfloat16}}


# ---------------------------------------------------------------- what the ranks do


def padded_vocabulary(tp: int) -> int:
    return VOCAB + -VOCAB % (10 * tp)


class StepRun(SmallRun):
    """A run at the present layout; its data depend on the step alone."""

    def __init__(self, name: str):
        tp, pp = (f() for f in (parallel_state.get_tensor_model_parallel_world_size,
                                parallel_state.get_pipeline_model_parallel_world_size))
        self.args = dataclasses.replace(ARGS, vocab_size=VOCAB, padded_vocab_size=padded_vocabulary(tp),
                                        untie_embeddings_and_output_weights=not name.startswith("tied"))
        self.config = dict(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp,
                           pipeline_dtype=torch.bfloat16 if "bf16" in name else torch.float32, **MODELS[name])
        virtual = parallel_state.get_virtual_pipeline_model_parallel_world_size()
        super().__init__(args=self.args, virtual_pipeline_model_parallel_size=virtual, **self.config)

    def step(self, number: int) -> dict[str, float]:
        """One next-token step; loss and gradient norm of the global batch."""
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

            return chunk(row, positions, as_mask(CausalPattern()), labels=readout), loss_func

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
        """Every tensor of a checkpoint, put together from all ranks."""
        mine = [(tensor.key, tensor.global_shape, tensor.global_offset, tensor.data.detach().cpu())
                for tensor in sharded_tensors(sharded_state(*self.parts, with_random_states=False))
                if is_main_replica(tensor.replica_id)]
        whole = {}
        for key, shape, offset, data in itertools.chain(*gather(mine)):
            place = tuple(slice(first, first + size) for first, size in zip(offset, data.shape, strict=True))
            whole.setdefault(key, torch.full(shape, torch.nan, dtype=data.dtype))[place] = data
        assert not any(x.isnan().any() for x in whole.values())
        return whole


def gather(value) -> list:
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def enter(layout: str) -> None:
    if dist.is_initialized():
        groups.shut_down()
    tp, pp, virtual, _ = LAYOUTS[layout]
    enter_world(2 if layout == "DP 2" else 4)
    groups.init_parallel(tp, pp, seed=1, virtual_pipeline_model_parallel_size=virtual)


def is_vocabulary(key: str) -> bool:
    return key.endswith(("word_embeddings.weight", "output_layer.weight"))


def differences(found: dict, expected: dict) -> dict[str, float]:
    """By kind of tensor: largest difference over largest element, of any tensor; vocabularies unpadded.

    Second moments by their roots, which are as large as gradients: squares have twice their relative error.
    """
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    worst = {}
    for key, wanted in expected.items():
        kind = key.split(".")[2] if key.startswith("optimizer") else "weights"
        rows = VOCAB if is_vocabulary(key) else len(wanted)
        a, b = found[key][:rows].float(), wanted[:rows].float()
        if kind == "exp_avg_sq":
            a, b = a.sqrt(), b.sqrt()
        worst[kind] = max(worst.get(kind, 0.0), ((a - b).abs().max() / b.abs().max()).item())
    return worst


def fingerprints(run: StepRun, folder: str) -> list[str]:
    """Of the policy, and of a frozen model and an encoder that load its checkpoint."""
    others = build_frozen(run.args, **run.config), build_encoder(run.args, 3, **run.config)
    for model in others:
        load_weights(folder, model)
    return [weights_fingerprint(model) for model in (run.model, *others)]


def begin(folder: str, name: str) -> dict:
    """Train, save, and train one step more at the first layout."""
    run, place = StepRun(name), f"{folder}/{FIRST}, {name}"
    for number in range(STEPS):
        run.step(number)
    Saver(place).save(TrainState(iteration=STEPS), *run.parts, META)
    found = {"saved": run.state(), "fingerprints": fingerprints(run, place)}
    return found | run.step(STEPS) | {"next": run.state()}


def move(folder: str, layout: str, name: str, expected: dict, save: bool) -> dict:
    """Load at another layout, and take the next step; what came of it."""
    run, place = StepRun(name), f"{folder}/{LAYOUTS[layout][-1]}, {name}"
    state, _ = load_checkpoint(place, *run.parts)
    assert state.iteration == STEPS
    loaded, saved_rows = run.state(), padded_vocabulary(LAYOUTS[LAYOUTS[layout][-1]][0])
    found = {"loaded": differences(loaded, expected["saved"]), "fingerprints": fingerprints(run, place),
             "padding": [x[saved_rows:].abs().sum().item() for key, x in loaded.items() if is_vocabulary(key)]}
    steps = {float(x["step"]) for x in run.optimizer.chained_optimizers[0].optimizer.state.values()}
    assert steps == {STEPS}
    if save:
        Saver(f"{folder}/{layout}, {name}").save(TrainState(iteration=STEPS), *run.parts, META)
    return found | run.step(STEPS) | {"next": differences(run.state(), expected["next"])}


def four_ranks(folder: str) -> dict:
    gc.freeze()  # Megatron-Core collects garbage for each sharded state dict
    enter(FIRST)
    expected = {name: begin(folder, name) for name in MODELS}
    if dist.get_rank() == 0:
        torch.save(expected, f"{folder}/expected.pt")
    sources = {source for *_, source in LAYOUTS.values()}
    results = {}
    for layout in [x for x in LAYOUTS if x not in (FIRST, "DP 2")]:
        enter(layout)
        for name in ("untied", "tied"):
            results[f"{layout}, {name}"] = move(folder, layout, name, expected[name], save=layout in sources)
    groups.shut_down()
    return results


def two_ranks(folder: str) -> dict:
    enter("DP 2")
    expected = torch.load(f"{folder}/expected.pt")
    results = {f"DP 2, {name}": move(folder, "DP 2", name, expected[name], save=False) for name in MODELS}
    groups.shut_down()
    return results


# ---------------------------------------------------------------- what comes of it


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """By layout and model, and under "expected" what the uninterrupted run did."""
    folder = str(tmp_path_factory.mktemp("layouts"))
    found = run_ranks(4, "test_reshard:four_ranks", folder)[0] | run_ranks(2, "test_reshard:two_ranks", folder)[0]
    return found | {"expected": torch.load(f"{folder}/expected.pt")}


CASES = [f"{layout}, {name}" for layout in LAYOUTS if layout != FIRST for name in MODELS
         if layout == "DP 2" or name != "bf16"]


@pytest.mark.parametrize("case", CASES)
def test_the_run_is_the_same(results, case):
    found, expected = results[case], results["expected"][case.split(", ")[1]]
    assert found["loaded"] == dict.fromkeys(("weights", "param", "exp_avg", "exp_avg_sq"), 0.0)
    assert set(found["padding"]) == {0.0}  # TP 4 and the last TP 2 have rows that were not saved
    assert found["fingerprints"] == expected["fingerprints"]
    tolerance = 0.02 if "bf16" in case else 1e-5
    assert found["loss"] == pytest.approx(expected["loss"], rel=tolerance)
    assert found["norm"] == pytest.approx(expected["norm"], rel=tolerance)
    assert max(found["next"].values()) <= (0 if "again" in case else tolerance)


def test_the_runs_can_tell(results):
    """Policy and frozen model have one fingerprint, the encoder another; a step changes every kind of tensor."""
    for expected in (results["expected"][name] for name in MODELS):
        policy, frozen, encoder = expected["fingerprints"]
        assert policy == frozen != encoder
        changes = differences(expected["next"], expected["saved"])
        assert len(changes) == 4 and min(changes.values()) > 0.003
