"""Which kernels are chosen, and that layers of Transformer Engine are the same model under the same names.

Transformer Engine needs a GPU; a stand-in (fake_te.py), in a process of its own, takes its place behind Megatron-Core's
own wrappers and layer spec.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_ebft import environment
from megatron_ebft.model import kernels
from megatron_ebft.model.kernels import Available
from megatron_ebft.run.configs import model_args, row_multiple
from megatron_ebft.run.flags import parse_args

TESTS = Path(__file__).parents[1]
HOPPER = dict(gpu="NVIDIA H200 (compute capability 9.0)", no_compiler="", no_fp8={"tensorwise": "", "blockwise": ""})
WITH_TE = Available(transformer_engine="2.11.0", no_transformer_engine="", **HOPPER)
WITHOUT_TE = Available(no_transformer_engine="Transformer Engine is not installed", **HOPPER)
BF16, FLOAT32 = torch.bfloat16, torch.float32


@pytest.fixture
def here(monkeypatch):
    def has(found):
        monkeypatch.setattr(kernels, "available", lambda: found)
        kernels._warn_once.cache_clear()

    return has


@pytest.mark.parametrize("found, dtype, head_dim, layers, attention", [
    (Available(), BF16, 128, "local", "sdpa"), (WITH_TE, BF16, 128, "transformer_engine", "flex"),
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
    (Available(), dict(transformer_impl="transformer_engine"), "--transformer-impl transformer_engine: no CUDA device"),
    (Available(), dict(attention="flex"), "--ebft-attention flex: no CUDA device"),
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
    here(Available())
    kernels.choose(dtype=BF16, head_dim=128)
    assert len(recwarn) == 1  # without a GPU nobody expects it


@pytest.mark.parametrize("found, lines", [
    (Available(), ["GPU  no CUDA device", "layers, --bf16  local (no CUDA device)"]),
    (WITH_TE, ["Transformer Engine  2.11.0", "FP8 blockwise  yes", "layers, --bf16  transformer_engine",
               "attention, --bf16  FlexAttention", "layers, float32  local (only with --bf16"]),
    (Available(weight_gradients=True, apex=True, no_transformer_engine="it is broken", **HOPPER),
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
    here(Available(transformer_engine=version))
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
from megatron_ebft.model import kernels
{then}"""
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{TESTS.parent}", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def test_broken_transformer_engine_leaves_megatron_core_alone(tmp_path):
    """The reason is kept. Megatron-Core itself knows ImportError alone."""
    said = megatron_core_with(tmp_path, "raise OSError('libcudnn.so.9: cannot open')", True,
                              "print(kernels._transformer_engine()[1])")
    assert said == "Transformer Engine does not import (OSError: libcudnn.so.9: cannot open)"


def test_whatever_a_broken_transformer_engine_raises(monkeypatch):
    def broken(name):
        raise RuntimeError("undefined symbol: nvte\nand more")

    monkeypatch.setattr(kernels, "sys", SimpleNamespace(modules={}))
    monkeypatch.setattr(kernels, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=id), import_module=broken))
    said = kernels._import_error.__wrapped__()
    assert said == "Transformer Engine does not import (RuntimeError: undefined symbol: nvte)"


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
               "from megatron_ebft.model import kernels; kernels.settle_accelerators()\n"
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
    monkeypatch.setattr(kernels, "available", lambda: Available(no_compiler=""))
    for rows in (5, 7, 300):
        assert torch.equal(doubled(torch.ones(rows, 4), 3.0), torch.full((rows, 4), 3.0))
    assert len(made) == 1


@pytest.fixture(scope="module")
def with_te(tmp_path_factory):
    """What te_layers.compare measured with the stand-in."""
    folder = tmp_path_factory.mktemp("te")
    command = f"import fake_te; fake_te.install(); import te_layers; te_layers.compare({str(folder)!r})"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("name", ["llama", "other"])
def test_checkpoints_do_not_know_the_kind_of_layers(with_te, name):
    """Same keys and shapes; saved with Megatron-Core's layers and trained on with Transformer Engine's; same hash."""
    results = with_te[name]
    shapes = results["shapes"]
    assert shapes["local"] == shapes["transformer_engine"]
    assert any(key.endswith("linear_fc1.layer_norm_weight") for key in shapes["local"])
    assert len(set(results["fingerprints"])) == 1
    assert results["difference"] < 1e-6 < results["moved"]


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
