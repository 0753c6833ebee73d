"""A checkpoint saved at one tensor × pipeline × data-parallel layout is the same run at another.

One start of four ranks goes from layout to layout in the same processes: at each it loads what another one saved, and
holds every weight and every moment of the optimizer against those first saved, element by element; then it takes one
step and holds loss, gradient norm and the new state against those of the run that was never interrupted. One start of
two ranks does so from the first checkpoint. The padding of the vocabulary changes with the layout.
"""

import pytest
import torch
import torch.distributed as dist
from checkpoint_runs import META, MODELS, VOCAB, StepRun, padded_vocabulary
from ranks import enter_world, run_ranks

from megatron_ebft.checkpointing.fingerprint import weights_fingerprint
from megatron_ebft.checkpointing.loader import load_checkpoint, load_weights
from megatron_ebft.checkpointing.record import TrainState
from megatron_ebft.checkpointing.saver import Saver
from megatron_ebft.model.build import build_encoder, build_start
from megatron_ebft.parallel import groups

STEPS = 3
FIRST, VIRTUAL = "TP 2 × PP 2", "PP 2 × VP 2 × DP 2"
LAYOUTS = {  # tensor-parallel size, pipeline-parallel size, virtual stages; where the checkpoint to load was saved
    FIRST: (2, 2, None, None), VIRTUAL: (1, 2, 2, FIRST), "TP 4": (4, 1, None, FIRST), "PP 4": (1, 4, None, VIRTUAL),
    "DP 4": (1, 1, None, VIRTUAL), "TP 2 × PP 2 again": (2, 2, None, VIRTUAL),
    "DP 2": (1, 1, None, FIRST)}  # the last of two ranks, the others of four


# ---------------------------------------------------------------- what the ranks do


def enter(layout: str) -> None:
    if dist.is_initialized():
        groups.shut_down()
    tp, pp, virtual, _ = LAYOUTS[layout]
    enter_world(2 if layout == "DP 2" else 4)
    groups.init_parallel(tp, pp, seed=1, virtual_pipeline_model_parallel_size=virtual)


def is_vocabulary(key: str) -> bool:
    return key.endswith(("word_embeddings.weight", "output_layer.weight"))


def differences(actual: dict, expected: dict) -> dict[str, float]:
    """By kind of tensor: largest difference over largest element, of any tensor; vocabularies unpadded.

    Second moments by their roots, which are as large as gradients: squares have twice their relative error.
    """
    assert actual.keys() == expected.keys(), actual.keys() ^ expected.keys()
    worst = {}
    for key, wanted in expected.items():
        kind = key.split(".")[2] if key.startswith("optimizer") else "weights"
        rows = VOCAB if is_vocabulary(key) else len(wanted)
        a, b = actual[key][:rows].float(), wanted[:rows].float()
        if kind == "exp_avg_sq":
            a, b = a.sqrt(), b.sqrt()
        worst[kind] = max(worst.get(kind, 0.0), ((a - b).abs().max() / b.abs().max()).item())
    return worst


def fingerprints(run: StepRun, folder: str) -> list[str]:
    """Of the policy, and of a frozen model and an encoder that load its checkpoint."""
    others = build_start(run.args, **run.config), build_encoder(run.args, 3, **run.config)
    for model in others:
        load_weights(folder, model)
    return [weights_fingerprint(model) for model in (run.model, *others)]


def begin(folder: str, name: str) -> dict:
    """Train, save, and train one step more at the first layout."""
    run, place = StepRun(name), f"{folder}/{FIRST}, {name}"
    for number in range(STEPS):
        run.step(number)
    Saver(place).save(TrainState(iteration=STEPS), *run.parts, META)
    results = {"saved": run.state(), "fingerprints": fingerprints(run, place)}
    return results | run.step(STEPS) | {"next": run.state()}


def move(folder: str, layout: str, name: str, expected: dict, save: bool) -> dict:
    """Load at another layout, and take the next step; what came of it."""
    run, place = StepRun(name), f"{folder}/{LAYOUTS[layout][-1]}, {name}"
    state, _ = load_checkpoint(place, *run.parts)
    assert state.iteration == STEPS
    loaded, saved_rows = run.state(), padded_vocabulary(LAYOUTS[LAYOUTS[layout][-1]][0])
    results = {"loaded": differences(loaded, expected["saved"]), "fingerprints": fingerprints(run, place),
               "padding": [x[saved_rows:].abs().sum().item() for key, x in loaded.items() if is_vocabulary(key)]}
    steps = {float(x["step"]) for x in run.optimizer.chained_optimizers[0].optimizer.state.values()}
    assert steps == {STEPS}
    if save:
        Saver(f"{folder}/{layout}, {name}").save(TrainState(iteration=STEPS), *run.parts, META)
    return results | run.step(STEPS) | {"next": differences(run.state(), expected["next"])}


def four_ranks(folder: str) -> dict:
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
    by_case = run_ranks(4, "test_reshard:four_ranks", folder)[0] | run_ranks(2, "test_reshard:two_ranks", folder)[0]
    return by_case | {"expected": torch.load(f"{folder}/expected.pt")}


CASES = [f"{layout}, {name}" for layout in LAYOUTS if layout != FIRST for name in MODELS
         if layout == "DP 2" or name != "bf16"]


@pytest.mark.parametrize("case", CASES)
def test_the_run_is_the_same(results, case):
    run, expected = results[case], results["expected"][case.split(", ")[1]]
    assert run["loaded"] == dict.fromkeys(("weights", "param", "exp_avg", "exp_avg_sq"), 0.0)
    assert set(run["padding"]) == {0.0}  # TP 4 and the last TP 2 have rows that were not saved
    assert run["fingerprints"] == expected["fingerprints"]
    tolerance = 0.02 if "bf16" in case else 1e-5
    assert run["loss"] == pytest.approx(expected["loss"], rel=tolerance)
    assert run["norm"] == pytest.approx(expected["norm"], rel=tolerance)
    assert max(run["next"].values()) <= (0 if "again" in case else tolerance)


def test_the_runs_can_tell(results):
    """Policy and frozen model have one fingerprint, the encoder another; a step changes every kind of tensor."""
    for expected in (results["expected"][name] for name in MODELS):
        policy, frozen, encoder = expected["fingerprints"]
        assert policy == frozen != encoder
        changes = differences(expected["next"], expected["saved"])
        assert len(changes) == 4 and min(changes.values()) > 0.003
