"""The benchmark's tables and the plan it is held against; a tiny step of its own for the rest."""

import json

import benchmark
import benchmark_report
import cost_growth
import plan
import pytest
import torch

from megatron_ebft.common.device import peak_tflops
from megatron_ebft.run.flags.parser import as_argv


def result(gpu: dict) -> dict:
    seconds = {"sft": {"train": 0.1, "optimizer": 0.1, "step": 0.2},
               "ebft": {"rollout": 0.25, "features": 0.25, "train": 0.4, "optimizer": 0.1, "step": 1.0}}
    gflops = {"sft": {"train": 40000.0, "optimizer": 0.0},
              "ebft": {"rollout": 1e5, "features": 5e4, "train": 1.5e5, "optimizer": 0.0}}
    return {"device": "NVIDIA H200", "torch": "2.14", "matmul_gflops_per_second": 8e5, "gold_tokens": 4096,
            "rollout_tokens": 16256, "seconds": seconds, "gflops": gflops,
            "ratio": {"ebft": 5.0}, "ratio_of_each_repeat": {"ebft": [5.0]}, "flops_ratio": {"ebft": 7.5},
            "tokens_saved": {"features": 0.1, "train": 0.2}, "gpu": gpu}


def test_table_of_a_gpu():
    gpu = {"peak_tflops": peak_tflops("NVIDIA H200", "bf16"), "layers": "local", "attention": "flex",
           "attention_share": {"sft": 0.02, "ebft": 0.09}, "peak_bytes": {"sft": 2**35, "ebft": 3 * 2**34},
           "planned_peak_bytes": {"sft": 2**35, "ebft": 2**35}, "kernels": {"ebft": {
               "train": [("nvjet_tst_128x256", 200.0, 400), ("triton_tem_fused_flex", 100.5, 8)]}}}
    lines = benchmark_report.table(result(gpu)).splitlines()
    assert "| ebft | train | 400.0 | 40% | 150.0 | 375 | 47% | 20.0% | 37.9% |" in lines
    assert "| ebft | step | 1000.0 | 100% | 300.0 | 300 | 38% |  | 30.3% |" in lines
    assert "| ebft | 9.0% | 48.0 | 32.0 |" in lines
    assert "| train | 400.0 | 300.5 | 408 | 100.5 | 200.0 | 0.0 | 0.0 | 0.0 | 0.0 | 0.0 | 0.0 |" in lines
    assert "| train | 100.50 | 8 | `triton_tem_fused_flex` |" in lines
    lines = benchmark_report.table(result({})).splitlines()
    assert "| sft | train | 0.100 | 50% | 40000.0 | 400000 | 50% |  |" in lines


def test_peaks_and_kernels_by_name():
    names = ("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA H200", "NVIDIA GB200", "NVIDIA A100-SXM4-80GB",
             "Some GPU")
    assert [peak_tflops(name, "bf16") for name in names] == [989.0, 756.0, 989.0, 2500.0, 312.0, None]
    kernels = [("triton_tem_fused_flex_attention_0", 2.0), ("nvjet_tst_128x256_64x4_TNT", 5.0), (
        "void pytorch_flash::flash_fwd_kernel<...>", 1.0), ("triton_poi_fused_silu_mul_1", 2.0)]
    assert benchmark_report.attention_share({"train": [(*kernel, 1) for kernel in kernels]}) == pytest.approx(0.3)
    assert benchmark_report.time_of(benchmark_report.MATRIX_PRODUCT, kernels) == 5.0


def test_fp8_beside_none(capsys, monkeypatch, tmp_path):
    """Emulated on a CPU: an EBFT step with and without in one run."""
    monkeypatch.setattr(benchmark, "matmul_rate", lambda *_: 1e9)
    benchmark.main(["--num-layers", "4", "--hidden-size", "64", "--seq-length", "64", "--repeats", "1", "--json",
                    str(tmp_path / "results.json"), "--ebft-rollout-fp8", "blockwise", "--ebft-encoder-fp8",
                    "blockwise", "--ebft-fp8-emulate"])
    seconds = json.loads((tmp_path / "results.json").read_text())["seconds"]
    ratio = seconds[benchmark_report.NO_FP8]["rollout"] / seconds["ebft"]["rollout"]
    assert f"With FP8 rollout {ratio:.2f} ×, features" in capsys.readouterr().out


def test_growth(capsys, monkeypatch):
    """A line of a table, for a row in parts: fused steps take fewer operations than separate passes."""
    monkeypatch.setattr(benchmark, "matmul_rate", lambda *_: 1e9)
    monkeypatch.setattr(cost_growth, "BASE", [*cost_growth.BASE, "--num-layers", "4", "--hidden-size", "64",
                                              "--seq-length", "64"])
    monkeypatch.setattr(cost_growth, "CASES", {"parts": ("parts", [("3", ["--ebft-blocks-per-microbatch", "2"])])})
    cost_growth.main(["--only", "parts", "--repeats", "1"])
    head, _, cells = ([cell.strip() for cell in line.split("|")[1:-1]]
                      for line in capsys.readouterr().out.splitlines() if line.startswith("|"))
    assert len(head) == len(cells) == 10 and cells[0] == "3"
    assert 1 < float(cells[5]) < float(cells[9])


def test_fp8_on_a_gpu():
    gpu = {"peak_tflops": None, "layers": "te", "attention": "flex", "attention_share": {"sft": 0, "ebft": 0},
           "peak_bytes": {"sft": 1, "ebft": 1}, "planned_peak_bytes": {"sft": 1, "ebft": 1}, "kernels": {},
           "rollout_products_ms": {"ebft": 80.0, benchmark_report.NO_FP8: 120.0}}
    results = result(gpu)
    results["seconds"][benchmark_report.NO_FP8] = {**results["seconds"]["ebft"], "rollout": 0.35, "step": 1.1}
    results["gflops"][benchmark_report.NO_FP8] = results["gflops"]["ebft"]
    assert ("With FP8 rollout 1.40 ×, features 1.00 ×, step 1.10 × as fast; matrix products of rollouts 1.50 × (80.0 "
            "and 120.0 ms)") in benchmark_report.table(results)


@pytest.mark.parametrize("name", benchmark.SHAPES)
def test_shapes_are_flags_of_training_and_of_the_plan(name):
    flags = ["--train-iters", "1", *as_argv(benchmark.SHAPES[name])]
    args, _ = plan.parse([*flags, "--world-size", "1"])
    assert {key: vars(args)[key] for key in benchmark.SHAPES[name]} == benchmark.SHAPES[name]


def test_plan_counts_what_a_gpu_cannot():
    flags = ("--train-iters 9 --num-layers 4 --hidden-size 64 --num-attention-heads 4 --bf16 --seq-length 32 "
             "--vocab-size 1000 --global-batch-size 2 --ebft-kl-coef 0.1 --ebft-rollout-length 4").split()
    rank = benchmark.planned([*flags, "--world-size", "1"])
    assert rank["flops"]["train"] > rank["flops"]["features"] > 0 < rank["peak"]
    assert isinstance(torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType)  # as the profiler names kernels


def test_plan_made_ahead(tmp_path, monkeypatch):
    """Written on one machine, read on another for the same flags; FP8, which plans leave out, may differ."""
    file = tmp_path / "plan.json"
    monkeypatch.setattr(benchmark, "planned", lambda flags: {"flops": {"train": 1.0}, "peak": len(flags)})
    benchmark.main(["--num-layers", "4", "--write-plan", str(file)])

    def read(*flags):
        return benchmark.read_plan(file, benchmark.flags_of_plan(benchmark.parse([*flags]), 1))

    for same in (["--num-layers", "4"], ["--ebft-rollout-fp8", "blockwise", "--num-layers=4", "--repeats", "9"]):
        assert read(*same)["sft"]["flops"] == {"train": 1.0}
    for others in (["--num-layers", "4", "--seq-length=64"], ["--num-layers", "8", "--num-attention-heads", "4"]):
        with pytest.raises(ValueError, match="other flags, .*--num-layers=4"):
            read(*others)
    with pytest.raises(ValueError, match="cannot be read"):
        benchmark.read_plan(tmp_path / "none.json", [])
