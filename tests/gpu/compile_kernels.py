"""Compiles FlexAttention's kernels for an H100 on a machine without a GPU: python tests/gpu/compile_kernels.py

1. A child process runs the shapes of tests/gpu and of tools/benchmark.py (1b, 8b) through the real layout and attention
   code on a CPU, and records what the kernel is called with.
2. Each call that torch would compile anew is lowered to Triton by torch's own code, forward and backward.
3. triton compiles each kernel to sm_90. What it takes of shared memory must fit.

torch traces on the CPU, autograd included; only its lowering takes the tensors for CUDA's (`move_to_gpu`).

Prints a Markdown table; exit code 1 if a call fails, with the error. Needs torch's CUDA build with its libraries (no
driver), its triton, and megatron-core. `pretend_h100` replaces private parts of torch and is all that is tied to its
version: written for 2.11 and 2.14.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import multiprocessing
import os
import re
import sys
import tempfile
import time
import traceback
import types
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = map(str, (ROOT, ROOT / "tests/support", ROOT / "tools"))
os.environ.update(TORCHINDUCTOR_COMPILE_THREADS="1", TORCHINDUCTOR_FORCE_DISABLE_CACHES="1",
                  TRITON_ALWAYS_COMPILE="1")

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

SHARED_MEMORY = 232448
"""Bytes that a kernel may have on an H100."""


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of the kernel, which torch compiles for each: size, stride and dtype of queries and keys, and whether
    gradients are wanted, and the log-sum-exp of scores."""

    queries: tuple
    keys: tuple
    dtype: torch.dtype
    has_gradient: bool
    with_lse: bool


# ---------------------------------------------------------------------------------------------- 1. the calls of a run


def recorded_calls() -> dict[Call, list[str]]:
    """Every call that tests/gpu and the benchmark's shapes make, and who makes it."""
    import pytest

    from megatron_ebft.model import flex_attention, kernels
    from megatron_ebft.parallel import groups

    calls, label = collections.defaultdict(list), []

    def record(function, q, k, v, intervals, by_query, by_key, scale):
        with_lse = function is flex_attention._attend_with_lse
        call = Call((tuple(q.shape), q.stride()), (tuple(k.shape), k.stride()), q.dtype, by_key[0] is not None,
                    with_lse)
        if label[-1] not in calls[call]:
            calls[call].append(label[-1])
        return (q * 1, q.float().sum(-1)) if with_lse else q * 1  # of the output's shape, with a gradient

    groups.init_parallel(1, 1, seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex_attention, "_kernel", lambda function: functools.partial(record, function))
        patch.setattr(kernels, "available", lambda: kernels.Available(no_compiler=""))
        for name, run in _passes():
            label.append(name)
            run()
    groups.shut_down()
    return dict(calls)


def _passes():
    """Named functions that run the attention of one pass."""
    import benchmark
    import brute_force as bf
    import gpu_cases
    import models
    from golden import STEPS, Case

    from megatron_ebft.layout.packed_row import split_blocks
    from megatron_ebft.method import gradient
    from megatron_ebft.method.evaluation import evaluation_config
    from megatron_ebft.model.flex_attention import ROW_SIZES
    from megatron_ebft.run.configs import ebft_config, model_args
    from megatron_ebft.run.flags import parse_args
    from megatron_ebft.run.flags.parser import as_argv

    cpu = dict(transformer_impl="local", attention_kernel="flex", bias_activation_fusion=False,
               bias_dropout_fusion=False)
    for dtype, precision in ((torch.float32, gpu_cases.FLOAT32), (torch.bfloat16, gpu_cases.BF16)):
        for step in STEPS:
            case = Case(step, 1, 3, **precision, **cpu)
            yield f"golden {step}, encoder", case.rewards
            yield f"golden {step}, training", case.gradient
        policy, gold, layout, draw = gpu_cases.small_sampler({**precision, **cpu})
        yield "test_step, sampling", draw
        config = models.ebft_config(bf.Settings(bf.Geometry(8, 8, 8, 4), temperature=0.6), layout.seq_length, 4)
        yield "test_step, score", lambda: gradient.score(policy[0], gold, draw(), config)  # noqa: B023
        for has_documents in (False, True):
            row, document_BT = gpu_cases.row_and_documents(has_documents)
            for shape in gpu_cases.SHAPES.values():
                yield "test_attention, rows", lambda: _row(row, 2, shape, dtype, True, document_BT)  # noqa: B023
            yield "test_attention, decoding", lambda: _decoding(row, 2, (8, 2, 64), dtype, document_BT)  # noqa: B023
            yield "test_attention, decoding with gradient", lambda: _decoding(  # noqa: B023
                row, 2, (8, 2, 64), dtype, document_BT, has_gradient=True)  # noqa: B023
    for name in ("1b", "8b"):
        args = parse_args(["--train-iters", "1", *as_argv(benchmark.SHAPES[name])])
        model = model_args(args, args.vocab_size)
        heads, config = (model.num_attention_heads, model.num_query_groups, model.kv_channels), ebft_config(
            args, model.num_layers)
        batch, longest = args.micro_batch_size, args.ebft_eval_length
        training, encoder = (split_blocks(config.layout, 0, config.layout.rollout_length - less)[0] for less in (1, 0))
        held_out = evaluation_config(config, longest, 1)[0].layout
        yield f"{name}, training", lambda: _row(training, batch, heads, torch.bfloat16, True)  # noqa: B023
        for label, row in (("encoder", encoder), ("evaluation", split_blocks(held_out, 0, held_out.rollout_length)[0])):
            yield f"{name}, {label}", lambda: _row(row, batch, heads, torch.bfloat16, False)  # noqa: B023
        yield f"{name}, sampling", lambda: _decoding(training, args.global_batch_size, heads,  # noqa: B023
                                                     torch.bfloat16)
        is_first = (torch.arange(training.num_rollouts) % ROW_SIZES == 0).view(1, training.size, -1)
        is_first = is_first.expand(batch, -1, -1)
        shared = training.keep(is_first, torch.zeros_like(is_first, dtype=torch.int64), training.room(is_first))
        for label, row in (("fused step", training), ("fused step, few nodes", shared)):
            yield f"{name}, {label}", lambda: _decoding(row, batch, heads, torch.bfloat16,  # noqa: B023
                                                        has_gradient=True)


def _qkv(length, batch, heads, dtype) -> list[Tensor]:
    """As Megatron-Core lays them out."""
    return [torch.empty(length, batch, h, heads[2], dtype=dtype).permute(1, 2, 0, 3) for h in (*heads[:1], heads[1],
                                                                                              heads[1])]


def _row(row, batch, heads, dtype, has_gradient, document_BT=None):
    from megatron_ebft.model.attention import StridedPattern

    with torch.set_grad_enabled(has_gradient):
        StridedPattern(row, document_BT).attend(1, *_qkv(row.length, batch, heads, dtype), 0.1, True)


def _decoding(row, batch, heads, dtype, document_BT=None, has_gradient=False):
    from megatron_ebft.layout import visible_keys
    from megatron_ebft.layout.strided import document_starts
    from megatron_ebft.model.decoding import DecodePattern, PrefillPattern, RolloutCache

    starts = None if document_BT is None else document_starts(document_BT)
    cache = RolloutCache(row, visible_keys.decoding(row, starts, batch), document_BT)
    with torch.set_grad_enabled(has_gradient):
        PrefillPattern(cache).attend(1, *_qkv(row.layout.seq_length, batch, heads, dtype), 0.1, True)
        DecodePattern(cache, 0).attend(1, *_qkv(row.decode_length, batch, heads, dtype), 0.1, True)


# -------------------------------------------------------------------------------- 2. a machine that seems to have a GPU


def pretend_h100():
    """torch and triton lower for an H100. Nothing can run."""
    import torch._dynamo.device_interface
    import torch._inductor.fx_passes.joint_graph
    import torch._inductor.fx_passes.post_grad
    import torch._subclasses.fake_tensor
    import torch.cuda.random
    import triton
    from triton.backends.compiler import GPUTarget

    properties = types.SimpleNamespace(
        name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30,
        regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024, warp_size=32,
        shared_memory_per_block=49152, shared_memory_per_block_optin=SHARED_MEMORY,
        shared_memory_per_multiprocessor=233472, L2_cache_size=50 << 20, gcnArchName="", clock_rate=1980000,
        memory_clock_rate=2619000, memory_bus_width=5120)
    no_device = type("NoDevice", (contextlib.nullcontext,), {"__init__": lambda self, *a, **k: None,
                                                             "__exit__": lambda self, *a: None})
    answers = dict(is_available=True, device_count=1, current_device=0, get_device_capability=(9, 0),
                   get_device_properties=properties, get_device_name=properties.name, synchronize=None,
                   _lazy_init=None, is_initialized=False, is_current_stream_capturing=False)
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *a, answer=answer, **k: answer)
    interface = torch._dynamo.device_interface.CudaInterface
    answers |= dict(get_compute_capability=90, is_bf16_supported=True, is_triton_capable=True, get_raw_stream=0,
                    raise_if_triton_unavailable=None)
    for name, answer in answers.items():
        setattr(interface, name, staticmethod(lambda *a, answer=answer, **k: answer))
    for name in ("get_device_properties", "current_device"):
        setattr(interface.Worker, name, staticmethod(lambda *a, answer=answers[name], **k: answer))
    torch.cuda.device = interface.device = torch.cuda._DeviceGuard = no_device
    torch._C._cuda_getCurrentRawStream = lambda index: 0
    torch.accelerator.is_available = lambda: False
    torch.accelerator.current_accelerator = lambda *a, **k: None
    for module in (torch.cuda, torch.cuda.random):
        module.get_rng_state = lambda *a: torch.zeros(16, dtype=torch.uint8)
        module.set_rng_state = lambda *a: None
    torch.cuda.random._lazy_init = lambda: None
    torch._subclasses.fake_tensor.init_gpu_context = lambda *a: None
    # Pattern matchers trace examples on the device, and FlexAttention has none to match.
    torch._inductor.config.pattern_matcher = False
    for module in (torch._inductor.fx_passes.joint_graph, torch._inductor.fx_passes.post_grad):
        module.lazy_init = lambda *a, **k: None

    class Driver:
        launcher_cls = staticmethod(lambda *a, **k: None)
        utils = types.SimpleNamespace(get_device_properties=lambda *a: dict(
            max_shared_mem=SHARED_MEMORY, multiprocessor_count=132, max_num_regs=65536, warpSize=32))
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
        get_current_device = get_current_stream = staticmethod(lambda *a: 0)
        get_device_interface = staticmethod(lambda: torch.cuda)
        get_active_torch_device = staticmethod(lambda: torch.device("cuda", 0))
        get_device_capability = staticmethod(lambda *a: (9, 0))
        is_active = staticmethod(lambda: True)

    triton.runtime.driver.set_active(Driver())


class _Lowered(BaseException):
    """A pass has been lowered; what would follow needs a GPU. (torch wraps whatever is an Exception.)"""


def move_to_gpu(graph_module, inputs) -> None:
    """Declare all tensors of a traced graph CUDA's. Tracing is a CPU's: autograd on a CUDA device needs a driver."""
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.utils._pytree import tree_leaves

    gpu, graphs = torch.device("cuda", 0), [x for x in graph_module.modules() if isinstance(x, torch.fx.GraphModule)]
    nodes = [node for x in graphs for node in x.graph.nodes]
    for x in tree_leaves((inputs, [node.meta.get("val") for node in nodes])):
        if isinstance(x, FakeTensor):
            x.fake_device = gpu
    for node in nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": gpu}


def lower(call: Call) -> list[str]:
    """What torch writes for the call: Python source with Triton kernels, of the forward pass and of the backward."""
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner
    from torch._inductor.graph import GraphLowering
    from torch.nn.attention import flex_attention as flex

    from megatron_ebft.model import flex_attention

    sources, expected, run = [], 1 + call.has_gradient, GraphLowering.run

    def run_on_gpu(graph, *inputs):
        move_to_gpu(graph.module, inputs)
        run(graph, *inputs)
        sources.append(graph.codegen()[0].value)
        raise _Lowered

    def lower_pass(graph_module, inputs, **options):
        with contextlib.suppress(_Lowered):
            compile_fx_inner(graph_module, inputs, **options)
        if len(sources) == expected:
            raise _Lowered
        return lambda *inputs: None

    def lower_all(graph_module, inputs, **options):
        return compile_fx(graph_module, inputs, inner_compile=lower_pass)

    queries, keys = call.queries[0], call.keys[0]
    qkv = [torch.empty_strided(*x, dtype=call.dtype, requires_grad=call.has_gradient)
           for x in (call.queries, call.keys, call.keys)]
    batch, M, N = queries[0], queries[2] // flex_attention.TILE, keys[2] // flex_attention.TILE
    intervals = tuple(torch.zeros(batch, queries[2], dtype=torch.int32) for _ in range(4))
    mask = flex_attention.TileMask(intervals, flex_attention.Tiles(*torch.zeros(2, batch, 1, M, N, dtype=torch.bool)))
    GraphLowering.run = run_on_gpu
    torch._dynamo.reset()
    function = flex_attention._attend_with_lse if call.with_lse else flex_attention._attend
    compiled = torch.compile(function, backend=lower_all, dynamic=False, fullgraph=True)
    flex_attention._kernel, flex._validate_device = lambda function: compiled, lambda *inputs: None
    try:
        with torch.set_grad_enabled(call.has_gradient), torch._functorch.config.patch(
                force_non_lazy_backward_lowering=True):
            (flex_attention.attend_with_lse if call.with_lse else flex_attention.attend)(*qkv, mask, 0.1)
    except _Lowered:
        assert len(sources) == expected
    finally:
        GraphLowering.run = run
    return sources


# ------------------------------------------------------------------------------------------------------ 3. machine code


@dataclasses.dataclass
class Kernel:
    """A compiled kernel."""

    name: str
    blocks: str
    is_divisible: str
    shared: int
    seconds: float


def compile_source(source: str, folder: str) -> tuple[list[Kernel], int]:
    """FlexAttention's kernels among those of a lowered pass, compiled to sm_90, and how many others there are."""
    import triton
    from torch._inductor.runtime import triton_heuristics
    from triton.compiler import ASTSource

    kernels, others = [], 0
    for name, code in re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str='cuda'\)", source, re.S):
        if "triton_heuristics.template" not in code:
            others += 1
            continue
        made = {}

        def template(num_stages, num_warps, triton_meta, made=made, **unused):
            made.update(meta=triton_meta, options=dict(num_warps=num_warps, num_stages=num_stages))
            return lambda function: made.update(function=function) or function

        path = Path(folder) / f"{name}.py"
        path.write_text(code)
        unpatched, triton_heuristics.template = triton_heuristics.template, template
        try:
            exec(compile(code, path, "exec"), {"__file__": str(path), "__name__": name})
        finally:
            triton_heuristics.template = unpatched
        begun, meta = time.time(), made["meta"]
        compiled = triton.compile(
            ASTSource(made["function"], meta["signature"], meta.get("constants", {}), meta["configs"][0]),
            target=triton.runtime.driver.active.get_current_target(), options=made["options"])
        constants = dict(re.findall(r"(\w+)\s*:\s*tl\.constexpr\s*=\s*(\S+)", code))
        blocks = " ".join(f"{key[6:]}={value}" for key, value in constants.items() if re.match(r"BLOCK_[MN]\d?$", key))
        kernels.append(Kernel(name, f"{blocks}, {made['options']['num_warps']} warps, "
                                    f"{made['options']['num_stages']} stages", constants.get("IS_DIVISIBLE", "?"),
                              compiled.metadata.shared, time.time() - begun))
        if compiled.metadata.shared > SHARED_MEMORY:
            raise RuntimeError(f"{name} needs {compiled.metadata.shared} bytes of shared memory")
    if not kernels:
        raise RuntimeError("no kernel of FlexAttention's among what was lowered")
    return kernels, others


def describe(call: Call) -> str:
    (B, H, Q, D), (_, J, C, _) = call.queries[0], call.keys[0]
    lse = ", with log-sum-exp" * call.with_lse
    return f"{B} × {H}/{J} heads of {D}, {str(call.dtype)[6:]}, {Q // 128} × {C // 128} tiles{lse}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="calls whose label contains this")
    parser.add_argument("--keep", metavar="FOLDER", help="leave lowered sources there")
    options = parser.parse_args()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        calls = pool.apply(recorded_calls)
    pretend_h100()
    failures = 0
    print(f"torch {torch.__version__}, {len(calls)} shapes\n")
    print("| call | made by | pass | blocks | divisible | shared memory, KB | other kernels | lowering, s | triton, s |"
          "\n|---|---|---|---|---|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as folder:
        for call, labels in calls.items():
            if not any(options.only in label for label in labels):
                continue
            begun, head = time.time(), f"| {describe(call)} | {'; '.join(labels)} |"
            try:
                sources = lower(call)
                lowering = time.time() - begun
                for name, source in zip(("forward", "backward"), sources):
                    if options.keep:
                        Path(options.keep, f"{labels[0]} {call.dtype} {name}.py".replace(" ", "_")).write_text(source)
                    kernels, others = compile_source(source, folder)
                    for kernel in kernels:
                        print(f"{head} {name} | {kernel.blocks} | {kernel.is_divisible} | {kernel.shared / 1024:.0f} | "
                              f"{others} | {lowering:.1f} | {kernel.seconds:.1f} |", flush=True)
            except Exception as error:
                failures += 1
                print(f"{head} **{type(error).__name__}: {str(error).splitlines()[0]}** | | | | | | |", flush=True)
                traceback.print_exc()
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
