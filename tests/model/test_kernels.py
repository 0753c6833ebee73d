"""Which kernels are chosen, and that layers of Transformer Engine are the same model under the same names.

Transformer Engine needs a GPU; a stand-in (fake_te.py), in a process of its own, takes its place behind Megatron-Core's
own wrappers and layer spec.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_ebft import environment
from megatron_ebft.model import kernels
from megatron_ebft.model.kernels import Found
from megatron_ebft.run.configs import model_args, row_multiple
from megatron_ebft.run.flags import parse_args

TESTS = Path(__file__).parents[1]
HOPPER = dict(gpu="NVIDIA H200 (compute capability 9.0)", no_compiler="", no_fp8={"tensorwise": "", "blockwise": ""})
WITH_TE = Found(transformer_engine="2.11.0", no_transformer_engine="", **HOPPER)
WITHOUT_TE = Found(no_transformer_engine="Transformer Engine is not installed", **HOPPER)
BF16, FLOAT32 = torch.bfloat16, torch.float32


@pytest.fixture
def here(monkeypatch):
    def has(found):
        monkeypatch.setattr(kernels, "found", lambda: found)
        kernels._warn_once.cache_clear()

    return has


@pytest.mark.parametrize("found, dtype, head_dim, layers, attention", [
    (Found(), BF16, 128, "local", "sdpa"), (WITH_TE, BF16, 128, "transformer_engine", "flex"),
    (WITH_TE, FLOAT32, 128, "local", "flex"), (WITHOUT_TE, BF16, 128, "local", "flex"),
    (WITH_TE, BF16, 8, "transformer_engine", "sdpa")])
@pytest.mark.filterwarnings("ignore:attention falls back")
def test_what_is_chosen(here, found, dtype, head_dim, layers, attention):
    here(found)
    choice = kernels.choose(dtype=dtype, head_dim=head_dim)
    assert (choice.transformer_impl, choice.attention_kernel) == (layers, attention)
    assert choice.fused_elementwise == bool(found.gpu)
    choice = kernels.choose("local", "sdpa", dtype=dtype, head_dim=head_dim)
    assert (choice.transformer_impl, choice.attention_kernel) == ("local", "sdpa")


@pytest.mark.parametrize("found, asked, message", [
    (Found(), dict(transformer_impl="transformer_engine"), "--transformer-impl transformer_engine: no CUDA device"),
    (Found(), dict(attention="flex"), "--ebft-attention flex: no CUDA device"),
    (WITHOUT_TE, dict(transformer_impl="transformer_engine"), "--transformer-impl.*is not installed"),
    (WITH_TE, dict(transformer_impl="transformer_engine", dtype=FLOAT32), "--transformer-impl.*--bf16.*TF32"),
    (WITH_TE, dict(attention="flex", head_dim=8), "--ebft-attention flex.*heads of 8")])
def test_what_cannot_be_is_named(here, found, asked, message):
    here(found)
    with pytest.raises(ValueError, match=message):
        kernels.choose(**{"dtype": BF16, "head_dim": 128, **asked})


def test_one_warning_where_flex_attention_cannot_run(here, recwarn, monkeypatch):
    here(WITH_TE)
    monkeypatch.setattr(torch, "__version__", "2.7.1")
    for _ in range(3):
        assert kernels.choose(dtype=BF16, head_dim=128).attention_kernel == "sdpa"
    assert [str(w.message) for w in recwarn] == [
        "attention falls back to torch's SDPA in chunks, which is slower: torch 2.7.1 is older than 2.11"]
    here(Found())
    kernels.choose(dtype=BF16, head_dim=128)
    assert len(recwarn) == 1  # without a GPU nobody expects it


@pytest.mark.parametrize("found, lines", [
    (Found(), ["GPU  no CUDA device", "layers, --bf16  local (no CUDA device)"]),
    (WITH_TE, ["Transformer Engine  2.11.0", "FP8 blockwise  yes", "layers, --bf16  transformer_engine",
               "attention, --bf16  FlexAttention", "layers, float32  local (for --bf16 alone"]),
    (Found(weight_gradients=True, apex=True, no_transformer_engine="it is broken", **HOPPER),
     ["Transformer Engine  it is broken", "apex  yes, with its kernel for weight gradients",
      "weight gradients  added in the matrix product in layers (--bf16), in the matrix product in the head"])])
def test_report(here, found, lines):
    here(found)
    said = [" ".join(line.split()) for line in environment.report().splitlines()]
    for line in lines:
        assert any(x.startswith(" ".join(line.split())) for x in said), (line, said)


@pytest.mark.parametrize("version, flags, multiple", [
    (None, [], 8), ("2.11.0", [], 8), (None, ["--ebft-encoder-fp8", "blockwise"], 128),
    ("2.20.2", ["--ebft-encoder-fp8", "blockwise"], 128), ("2.11.0", ["--ebft-encoder-fp8", "tensorwise"], 128),
    ("2.11.0", ["--ebft-encoder-fp8", "blockwise"], 1024), ("2.20.2", ["--fp8-format", "e4m3"], 1024),
    ("2.20.2", ["--fp8-format", "e4m3", "--fp8-recipe", "tensorwise"], 128)])
def test_multiples_of_tokens(here, version, flags, multiple):
    """What 8 tensor ranks that share rows make of them: 16 each in FP8, whole blocks where those are gathered."""
    here(Found(transformer_engine=version))
    shared = ["--tensor-model-parallel-size", "8", "--sequence-parallel", "--seq-length", "1024", "--train-iters", "1"]
    args = parse_args([*shared, *flags, "--data-path", "x", "--tokenizer-model", "x"])
    assert row_multiple(args) == multiple


@pytest.mark.parametrize("flags, message", [
    (["--hidden-size", "120", "--num-attention-heads", "4"], "--hidden-size 120: with --ebft-rollout-fp8 .* of 16"),
    (["--ffn-hidden-size", "88"], "--ffn-hidden-size 88: .* a multiple of 32"),
    (["--num-query-groups", "2", "--kv-channels", "8"], "--num-query-groups × --kv-channels 16: .* a multiple of 32"),
    (["--fp8-format", "e4m3", "--first-last-layers-bf16", "--num-layers-at-end-in-bf16", "3",
      "--pipeline-model-parallel-size", "2"], "--num-layers-at-end-in-bf16 3: must be from 0 .* stage, 2"),
    (["--ebft-fp8-emulate", "--ffn-hidden-size", "88"], None), (["--ebft-rollout-fp8", "off"], None),
    (["--training-mode", "sft", "--ffn-hidden-size", "88"], None)])
def test_sizes_that_fp8_does_not_take(here, flags, message):
    here(WITH_TE)
    args = parse_args([
        "--num-layers", "4", "--hidden-size", "128", "--num-attention-heads", "8", "--ffn-hidden-size", "256",
        "--tensor-model-parallel-size", "2", "--seq-length", "1024", "--train-iters", "1", "--data-path", "x",
        "--tokenizer-model", "x", "--ebft-rollout-fp8", "blockwise", *flags])
    if message is None:
        model_args(args, 64)
    else:
        with pytest.raises(ValueError, match=message):
            model_args(args, 64)


TE_THAT_LOADS = "import sys\nsys.modules['transformer_engine.loaded'] = True\n"


def megatron_core_with(tmp_path, te: str, has_gpu: bool, then: str) -> str:
    """What `then` prints in a process that imports Megatron-Core beside a Transformer Engine whose `pytorch` part has
    these lines."""
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "pytorch.py").write_text(te)
    command = f"""
import sys, torch
torch.cuda.is_available = lambda: {has_gpu}
import megatron_ebft
import megatron.core
from megatron.core import optimizer
from megatron_ebft import backend
{then}"""
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{TESTS.parent}", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


@pytest.mark.parametrize("error", ["OSError('libcudnn.so.9: cannot open')", "RuntimeError('undefined symbol: nvte')"])
def test_broken_transformer_engine_leaves_megatron_core_alone(tmp_path, error):
    """Whatever it raises; the reason is kept. Megatron-Core itself knows ImportError alone."""
    said = megatron_core_with(tmp_path, f"raise {error}", True, "print(kernels._transformer_engine()[1])")
    assert said == f"Transformer Engine does not import ({error.split('(')[0]}: {error.split(chr(39))[1]})"


def test_transformer_engine_is_hidden_where_there_is_no_gpu(tmp_path):
    """Its Adam and norms would get CPU tensors, or fake ones in tools/plan.py and the benchmark's plan."""
    then = "print('transformer_engine.loaded' in sys.modules, optimizer.Adam.__module__)"
    said = megatron_core_with(tmp_path, TE_THAT_LOADS, False, then)
    assert said == "False torch.optim.adamw"


def test_what_works_on_a_gpu_is_not_hidden(tmp_path):
    for name in ("transformer_engine", "apex"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    (tmp_path / "transformer_engine/pytorch.py").write_text(TE_THAT_LOADS)
    command = ("import sys, torch; torch.cuda.is_available = lambda: True\n"
               "from megatron_ebft import backend; kernels.settle_accelerators()\n"
               "import apex, transformer_engine.pytorch\n"
               "print([x for x in kernels.FOR_GPUS if sys.modules.get(x, 1) is None])")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{TESTS.parent}"}
    done = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "[]", done.stderr


def test_one_compilation_for_any_number_of_rows(monkeypatch):
    made = []

    def counted(graph, inputs):
        made.append(graph)
        return graph.forward

    @kernels.compiled
    def doubled(x, factor):
        return x * factor

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiler(function, backend=counted, **options))
    monkeypatch.setattr(kernels, "found", lambda: Found(no_compiler=""))
    for rows in (5, 7, 300):
        assert torch.equal(doubled(torch.ones(rows, 4), 3.0), torch.full((rows, 4), 3.0))
    assert len(made) == 1


@pytest.fixture(scope="module")
def with_te(tmp_path_factory):
    """What `compare` found with the stand-in."""
    folder = tmp_path_factory.mktemp("te")
    command = f"import fake_te; fake_te.install(); import test_backend; test_backend.compare({str(folder)!r})"
    environment = os.environ | {"PYTHONPATH": f"{TESTS / 'support'}:{TESTS.parent}", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "found.json").read_text())


def compare(folder: str) -> None:
    """Policies of both kinds of layers, and what checkpoints of one are to the other; where the stand-in is."""
    import models
    from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear
    from test_checkpoint import ARGS, META, Run, seed_all
    from test_golden import Case

    from megatron_ebft.checkpointing.checkpoint import load_checkpoint
    from megatron_ebft.checkpointing.fingerprint import sharded_tensors, sharded_weights, weights_fingerprint
    from megatron_ebft.common.device import init_device
    from megatron_ebft.model.decoder import build_frozen, copy_weights, unwrap
    from megatron_ebft.parallel import groups

    init_device()
    groups.init_parallel(1, 1, seed=1)
    kernels.found = lambda: Found(no_transformer_engine="")
    kernels.no_transformer_engine = lambda dtype: ""  # the stand-in computes in float32
    found, kinds = {}, ("local", "transformer_engine")
    for name, changes in {"llama": {}, "other": dict(
            qk_layernorm=True, add_bias_linear=True, add_qkv_bias=True, swiglu=False, normalization="LayerNorm",
            position_embedding_type="learned_absolute", untie_embeddings_and_output_weights=False)}.items():
        args = ARGS.__class__(**{**vars(ARGS), **changes})
        local, te = (Run(args=args, transformer_impl=kind) for kind in kinds)
        layer = unwrap(te.model[0]).decoder.layers[0]
        assert isinstance(layer.self_attention.linear_qkv, TELayerNormColumnParallelLinear)
        assert all(x.fuse_wgrad_accumulation for x in te.model[0].modules() if hasattr(x, "fuse_wgrad_accumulation"))
        found[name] = {kind: {x.key: list(x.global_shape) for x in sharded_tensors(sharded_weights(run.model))}
                       for kind, run in zip(kinds, (local, te))}
        local.train(2).save(f"{folder}/{name}", 2)
        load_checkpoint(f"{folder}/{name}", *te.parts, architecture=META["architecture"])
        frozen = build_frozen(args, transformer_impl="transformer_engine")
        copy_weights(te.model, frozen)
        found[name]["fingerprints"] = [weights_fingerprint(x) for x in (local.model, te.model, frozen)]
        for module in te.model[0].modules():  # which the stand-in cannot do
            if hasattr(module, "fuse_wgrad_accumulation"):
                module.fuse_wgrad_accumulation = False
        for run in (local, te):
            seed_all(2)
            run.train(2)
        a, b, start = (models.whole_tensors(x, of_gradients=False) for x in (local.model, te.model, [frozen]))
        found[name]["difference"] = max(models.largest_difference(a[key], b[key]) for key in a)
        found[name]["moved"] = min(models.largest_difference(a[key], start[key]) for key in a)
    case = Case("step", 2, 3, transformer_impl="transformer_engine")
    case.gradient()
    case.check_gradient(1e-5)
    found["fp8"] = rollouts_in_fp8() | training_in_fp8()
    with open(f"{folder}/found.json", "w") as file:
        json.dump(found, file)


def rollouts_in_fp8() -> dict:
    """Log-probabilities by Transformer Engine's autocast and by emulation, before and after an optimizer step whose
    training pass, in FP8 as well, remembers the weights before it; and whether a rollout leaves weights behind."""
    import brute_force
    import models
    from test_golden import GOLDEN, Case

    def draw(case, fp8):
        sampling = dataclasses.replace(case.config.sampling, fp8=fp8)
        return sample_rollouts(case.policy, case.gold, case.config.layout, sampling, 0).log_probs_BKNG

    from megatron_ebft.model.fp8 import FP8
    from megatron_ebft.rollout.sampler import sample_rollouts

    te, local = (Case("step", 1, 3, transformer_impl=kind) for kind in ("transformer_engine", "local"))
    te.policy = models.build_policy(*brute_force.load_llama(GOLDEN / "llama"), transformer_impl="transformer_engine",
                                    fp8="e4m3", fp8_recipe="blockwise")
    differences = []
    for step in range(2):
        for recipe in ("blockwise", "tensorwise"):
            emulated = draw(local, FP8(recipe, emulate=True, at_end=1))
            differences.append(float((draw(te, FP8(recipe, at_end=1)) - emulated).abs().max()))
        if step == 0:
            left = any(getattr(module, "_fp8_workspaces", None) for module in te.policy[0].modules())
        te.gradient()
        for case in (te, local):
            scale_weights(case.policy)
    return {"difference": max(differences), "moved": float((emulated - draw(local, FP8())).abs().max()), "left": left}


def training_in_fp8() -> dict:
    """Of two steps: recipes outside the training pass; layer, recipe and quantising in it; error of the gradient."""
    import brute_force
    import fake_te
    import models
    from test_golden import GOLDEN, Case

    from megatron_ebft.method import ebft
    from megatron_ebft.method.means import Means
    from megatron_ebft.method.sft import cross_entropy_pass
    from megatron_ebft.model.decoder import local_layers
    from megatron_ebft.rollout.sampler import sample_rollouts

    passes = fake_te.Linear.passes
    te = dict(transformer_impl="transformer_engine")
    case = Case("step", 1, 3, **te)
    case.policy = models.build_policy(*brute_force.load_llama(GOLDEN / "llama"), **te, fp8="e4m3",
                                      fp8_recipe="blockwise", first_last_layers_bf16=True,
                                      num_layers_at_start_in_bf16=1, num_layers_at_end_in_bf16=0)
    numbers = {part: number for number, layer in local_layers(case.policy[0]).items() for part in layer.modules()}
    training = []
    passes.clear()
    for step in range(2):
        rewards = case.rewards()
        sample_rollouts(case.policy, case.gold, case.config.layout, case.config.sampling, 0)
        cross_entropy_pass(case.policy, case.gold, 1, Means(), forward_only=True)
        ebft.score(case.policy, case.gold, case.rollouts, case.config)
        others, _ = {recipe for _, recipe, _ in passes}, passes.clear()
        case.policy[0].zero_grad_buffer()
        ebft.policy_gradient(case.policy, case.gold, case.rollouts, rewards.advantage, case.config, Means())
        training.append([(numbers[layer], recipe, is_new) for layer, recipe, is_new in passes])
        passes.clear()
        if step == 0:
            error = max(models.relative_error(grad, case.golden["grad." + name])
                        for name, grad in models.gradients(case.policy, case.model).items())
        scale_weights(case.policy)
    return {"others": sorted(others), "training": training, "error": error}


def scale_weights(policy: list) -> None:
    """As an optimizer step: in place."""
    with torch.no_grad():
        for p in policy[0].parameters():
            p.mul_(1.25)


@pytest.mark.parametrize("name", ["llama", "other"])
def test_checkpoints_do_not_know_the_kind_of_layers(with_te, name):
    """Same keys and shapes; saved with Megatron-Core's layers and trained on with Transformer Engine's; same hash."""
    found = with_te[name]
    assert found["local"] == found["transformer_engine"]
    assert any(key.endswith("linear_fc1.layer_norm_weight") for key in found["local"])
    assert len(set(found["fingerprints"])) == 1
    assert found["difference"] < 1e-6 < found["moved"]


def test_rollouts_in_fp8_are_those_of_the_emulation(with_te):
    """By Transformer Engine's autocast and Megatron-Core's wrappers, to the last bits, also after a step."""
    found = with_te["fp8"]
    assert found["difference"] < 1e-6 and found["moved"] > 1e-3 and not found["left"]


def test_training_in_fp8(with_te):
    """In the training pass alone, in the layers it is for; weights are quantised by a step's first micro-batch."""
    found = with_te["fp8"]
    assert found["others"] == ["off"]
    for step in found["training"]:
        assert {(layer, recipe) for layer, recipe, _ in step} == {(1, "off"), *((x, "blockwise") for x in (2, 3, 4))}
        new = [is_new for layer, _, is_new in step if layer > 1]
        linears = 4 * 3
        assert len(new) > 2 * linears and all(new[:linears]) and not any(new[linears:])
    assert 1e-3 < found["error"] < 0.5
