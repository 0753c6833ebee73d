"""Flags of throughput, health and profiling."""

from megatron_ebft.run.flags.flag import Flag, Group, above, at_least

RULES = ("mismatch", "nothing-counts", "reward-flat", "entropy", "zero-spread", "gradient-spikes", "overoptimised",
         "duplicates")
"""What callbacks/health.py warns of."""
OBSERVING = Group("throughput, health and profiling", (
    Flag("--log-throughput", bool, "log TFLOP/s and MFU, tokens a second of a GPU, messages, memory, and the slowest "
         "rank by name. Operations are planned in a process of its own on rank 0's node; in rlvr they are not",
         default=False),
    Flag("--ebft-peak-tflops", float, "what MFU is relative to, in TFLOP/s of a GPU", valid=above(0),
         default_text="the GPU's dense peak in the precision of the training pass; on a CPU, and on a GPU that is not "
         "known, the measured rate of a matrix product"),
    Flag("--ebft-stop-on-warning", str, "health warnings that end the run: it saves and ends with exit code 64. Start "
         "it again without the rule to go on regardless", choices=RULES, many=True, default_text="none"),
    Flag("--profile", bool, "profile the steps after --profile-step-start, up to --profile-step-end, with Nsight "
         "Systems: start each rank under `nsys profile --capture-range=cudaProfilerApi --capture-range-end=stop`",
         default=False),
    Flag("--profile-step-start", int, "steps before the first that is profiled", default=10, valid=at_least(0)),
    Flag("--profile-step-end", int, "the last step that is profiled", default=12, valid=at_least(1)),
    Flag("--profile-ranks", int, "ranks that are profiled", default=[0], many=True, valid=at_least(0)),
    Flag("--use-pytorch-profiler", bool, "with --profile, write Chrome traces instead, to `profiles` in --save or in "
         "the working folder. Open them at ui.perfetto.dev", default=False),
    Flag("--record-memory-history", bool, "with --profile, record every allocation on the GPU, and write a snapshot "
         "after the last profiled step and where memory runs out. Open it at pytorch.org/memory_viz", default=False),
))
