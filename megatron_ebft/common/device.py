"""The device ranks compute on, and the one place where a CPU stands in for CUDA.

Megatron-Core names "cuda" in many places. On a machine without a GPU, and only there, `init_device` replaces
those entry points by their CPU counterparts, so that every other module is written for CUDA alone:

1. `torch.cuda` functions that name a device, a random state or a stream answer for the CPU.
2. `device="cuda"` keywords, `Tensor.cuda()` and `Module.cuda()` mean the CPU.
3. `Tensor.type()` answers "torch.cuda.FloatTensor" (Megatron's distributed optimizer compares that string).
4. Gloo groups of the same ranks are one group. Megatron-Core makes about 20, most of them equal, and each has a thread
   that wakes up a hundred times a second.

`init_device` runs before the process groups start (parallel/groups.py calls it).
"""

import functools
import importlib
import os
import re
import resource
import sys
import time
import weakref

import torch
import torch.distributed as dist
from torch import Tensor

CPU = torch.device("cpu")
MAKERS = ("arange", "as_tensor", "empty", "empty_like", "eye", "full", "full_like", "linspace", "ones", "ones_like",
          "rand", "rand_like", "randint", "randn", "randn_like", "randperm", "tensor", "zeros", "zeros_like")
"""Functions of torch that take a device and make a tensor there."""

PEAKS = {name: dict(zip(("bf16", "fp32", "fp8"), peaks)) for name, peaks in {
    "GB200": (2500.0, 80.0, 5000.0), "B200": (2250.0, 75.0, 4500.0), "GH200": (989.0, 67.0, 1979.0),
    "H200 NVL": (835.0, 60.0, 1671.0), "H200": (989.0, 67.0, 1979.0), "H100 PCIe": (756.0, 51.0, 1513.0),
    "H100 NVL": (835.0, 60.0, 1671.0), "H100": (989.0, 67.0, 1979.0),
    "H800": (989.0, 67.0, 1979.0), "A100": (312.0, 19.5, None), "A800": (312.0, 19.5, None),
    "L40S": (362.0, 91.6, 733.0)}.items()}
"""TFLOP/s without sparsity by words of the GPU's name, from NVIDIA's data sheets. The first match counts."""


def import_megatron() -> None:
    """Import Megatron-Core without what this machine and run do not need: 2 to 3 s of a start on a CPU.

    On a CPU nothing is compiled, so torch's compiler stays away. Megatron-Core also imports wandb, for inference and
    timers that are not used here.
    """
    def as_it_is(function=None, **_):
        return function or as_it_is

    compiler, wandb = torch.compile, sys.modules.get("wandb")
    try:
        torch.compile = compiler if have_gpu() else as_it_is
        sys.modules["wandb"] = wandb  # None: as if it were not installed
        importlib.import_module("megatron.core.timers")
    finally:
        torch.compile = compiler
        if wandb is None:
            del sys.modules["wandb"]


def have_gpu() -> bool:
    """Whether ranks compute on CUDA devices."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """The device of this rank."""
    return torch.device("cuda", torch.cuda.current_device()) if have_gpu() else CPU


def backend() -> str:
    """The torch.distributed backend: NCCL for GPUs, gloo for CPUs."""
    return "nccl" if have_gpu() else "gloo"


def memory_bytes() -> int:
    """All memory of this rank's GPU, or of this machine without one."""
    if have_gpu():
        return torch.cuda.get_device_properties(device()).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def peak_memory() -> tuple[int, int]:
    """Largest number of bytes that this process had in use, and that it held, since the last call. Without a GPU, both
    are its largest resident set since it began."""
    if not have_gpu():
        resident = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return resident, resident
    peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    return peaks


def peak_tflops(name: str, precision: str) -> float | None:
    """Dense TFLOP/s of a GPU in `bf16`, `fp32` (without TF32) or `fp8`; None where unknown."""
    return next((peaks[precision] for part, peaks in PEAKS.items() if re.search(rf"\b{part}\b", name)), None)


def matmul_rate(dtype: torch.dtype, size: int, repeats: int = 5) -> float:
    """FLOP/s of the best of a few size³ matrix products: what this device reaches on large ones."""
    generator = torch.Generator(device()).manual_seed(0)  # the run's random state stays as it is
    a, b = (torch.randn(size, size, device=device(), generator=generator).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats + 1):
        synchronize()
        start = time.perf_counter()
        a @ b
        synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def temporary_elements() -> int:
    """Largest size of a temporary tensor over the vocabulary: about a CPU's cache, or 0.5 GB in float32 on a GPU."""
    return 1 << 27 if have_gpu() else 1 << 19


def synchronize() -> None:
    """Wait until the device is idle. Read the clock only afterwards."""
    if have_gpu():
        torch.cuda.synchronize()


def upload(tensor: Tensor, to: torch.device | None = None) -> Tensor:
    """Copy a host tensor to a device (default: this rank's) without waiting for the device."""
    to = to or device()
    return tensor if tensor.device.type == to.type else tensor.contiguous().pin_memory().to(to, non_blocking=True)


def work_clock() -> float:
    """A clock of this rank's own work, in seconds: wall clock of an idle GPU, or CPU time of this thread."""
    synchronize()
    return time.perf_counter() if have_gpu() else time.thread_time()


class _InertStream:
    """Stands in for torch.cuda.Stream and Event: a CPU has one queue, so waiting is a no-op."""

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        return False

    def record(self, *args):
        return self

    def query(self):
        return True

    wait = wait_stream = wait_event = record_event = synchronize = record


def _cuda_means_cpu(function):
    """The function, which takes device="cuda" for the CPU.

    A TorchFunctionMode would need no list of functions, but it made training steps on a CPU a third slower.
    """
    @functools.wraps(function)
    def on_cpu(*args, **kwargs):
        name = kwargs.get("device")
        if name is not None and str(name).startswith("cuda"):
            kwargs["device"] = CPU
        return function(*args, **kwargs)

    return on_cpu


def _one_group_for_the_same_ranks(new_group):
    """dist.new_group, which makes one gloo group for all calls with the same ranks, for as long as the world exists.

    All ranks must make the same calls, and use a group in the same order whatever they got it for. Calls with other
    options get groups of their own.
    """
    worlds = weakref.WeakKeyDictionary()

    @functools.wraps(new_group)
    def shared(ranks=None, timeout=None, backend=None, *args, **kwargs):
        special = args or kwargs.get("use_local_synchronization") or not kwargs.get("sort_ranks", True)
        if special or dist.get_backend() != "gloo" or backend not in (None, "gloo"):
            return new_group(ranks, timeout, backend, *args, **kwargs)
        made = worlds.setdefault(dist.group.WORLD, {})
        key = tuple(sorted(range(dist.get_world_size()) if ranks is None else ranks))
        if key not in made:
            made[key] = new_group(ranks, timeout, backend, **kwargs)
        return made[key]

    return shared


def _only_whole_worlds(destroy):
    """dist.destroy_process_group, which leaves single groups to the end of their world: others may use them."""
    @functools.wraps(destroy)
    def destroyed(group=None):
        if group is None or group is dist.group.WORLD:
            destroy(group)

    return destroyed


_type = torch.Tensor.type


def _cuda_type(self, *args, **kwargs):
    """Tensor.type, which names a CPU's type as if it were CUDA's."""
    answer = _type(self, *args, **kwargs)
    return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer


def be_deterministic() -> None:
    """Choose kernels that add up in a fixed order (--deterministic-mode). Call before the first product on the GPU.

    torch warns where it has no such kernel. The warning about running sums along rows (cumsum) is a false alarm. The
    backward passes of flash and memory-efficient attention do add up in any order and are switched off.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "^NVLS")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)


_installed = False


def init_device() -> None:
    """Select this rank's device (LOCAL_RANK) and the kernels of SDPA. Without a GPU, install the stand-in. Idempotent.

    Raises:
        ValueError: there are fewer GPUs than ranks on this machine.
    """
    global _installed
    if have_gpu():
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if local_rank >= torch.cuda.device_count():
            raise ValueError(f"--nproc-per-node: rank {local_rank} of this machine has no GPU of its own, since "
                             f"there are {torch.cuda.device_count()}; start at most one rank per GPU")
        torch.cuda.set_device(local_rank)
        # torch prefers cuDNN on Hopper. cuDNN needs 23 to 37 ms to plan for every new shape, and its backward pass adds
        # up in any order.
        torch.backends.cuda.enable_cudnn_sdp(False)
        return
    if _installed:
        return
    _installed = True
    cuda, stream = torch.cuda, _InertStream()
    cuda.current_device = lambda: CPU
    cuda.set_device = lambda *_: None
    cuda.synchronize = cuda.empty_cache = lambda *_, **__: None
    cuda.is_current_stream_capturing = lambda: False
    cuda.current_stream = cuda.default_stream = lambda *_, **__: stream
    cuda.stream = lambda *_: stream
    cuda.Stream = cuda.Event = _InertStream
    for module in (cuda, cuda.random):
        module.get_rng_state = lambda *_, **__: torch.get_rng_state()
        module.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
        module.manual_seed = module.manual_seed_all = lambda seed: torch.random.default_generator.manual_seed(seed)
    dist.new_group = _one_group_for_the_same_ranks(dist.new_group)
    dist.destroy_process_group = _only_whole_worlds(dist.destroy_process_group)
    torch.nn.Module.cuda = torch.Tensor.cuda = lambda self, *_, **__: self
    with CPU:
        torch.empty(0)  # `with device` notes which functions make tensors when it is first used: not those below
    for name in MAKERS:
        setattr(torch, name, _cuda_means_cpu(getattr(torch, name)))
    torch.Tensor.to, torch.Tensor.type = _cuda_means_cpu(torch.Tensor.to), _cuda_type
