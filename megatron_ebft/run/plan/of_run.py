"""Operations and messages of a run's steps, planned in a process of its own while training goes on.

`Planning` starts it. Here it reads a request from standard input and writes its answer, both JSON. A model of 8B takes
a minute on one core, one of 70B three.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass

from megatron_ebft.common.signals import end_with_parent, shielded

LIKE_ANY = {"ebft_skip_duplicates": False, "ebft_rollout_fp8": "off", "ebft_encoder_fp8": "off", "fp8_format": None,
            "transformer_impl": "auto", "ebft_attention": "auto", "ebft_blocks_per_microbatch": 0,
            "ebft_dump_steps": None, "ebft_replay_steps": None, "recompute_granularity": None}
"""Flags of what changes no operation, of what cannot be planned, and of operations that are done twice to save memory:
recomputed forward passes, and the gold tokens that each part of a row repeats. These are no part of MFU."""


@dataclass
class Planned:
    """Figures of one step, means over all ranks."""

    flops: dict[str, float]
    """Floating-point operations of matrix products and attention, by phase."""
    sent: dict[str, float]
    """Bytes of the messages of collectives, by phase."""


class Planning:
    """Plans the steps of a run, with the lowest priority.

    Args:
        args: the run's flags. vocab_size: of its tokenizer.
        is_fused: whether its steps are.
    """

    def __init__(self, args: argparse.Namespace, vocab_size: int, world_size: int, is_fused: bool):
        flags = vars(args) | LIKE_ANY | {"vocab_size": vocab_size, "ebft_step": "fused" if is_fused else "separate"}
        self._files = [tempfile.TemporaryFile("w+") for _ in range(3)]
        given, self._answer, self._errors = self._files
        json.dump({"flags": flags, "world_size": world_size, "parent": os.getpid()}, given)
        given.seek(0)
        variables = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        with shielded():
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__], stdin=given, stdout=self._answer, stderr=self._errors,
                env=variables | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "LOCAL_RANK": "0", "PYTHONPATH":
                                 os.pathsep.join(filter(None, sys.path))})

    def is_over(self) -> bool:
        return self._process.poll() is not None

    def result(self) -> Planned:
        """The plan, once it is over.

        Raises:
            ValueError: there is none; says why.
        """
        code = self._process.wait()
        for file in self._files:
            file.seek(0)
        answer, errors = self._answer.read(), self._errors.read().strip().splitlines()
        if code:
            raise ValueError(errors[-1] if errors else f"exit code {code}")
        return Planned(**json.loads(answer.splitlines()[-1]))

    def close(self) -> None:
        """End the process if it still runs."""
        self._process.kill()
        self._process.wait()
        for file in self._files:
            file.close()


def mean_of_ranks(stages: dict[str, dict], number: int) -> Planned:
    """From what `measure_rank` says of a rank of each kind of pipeline stage, where there are `number` stages."""
    weights = {name: number - 2 if name == "middle stages" else 1 for name in stages}

    def mean(value) -> dict[str, float]:
        phases = next(iter(stages.values()))["phases"]
        return {phase: sum(weights[name] * value(stage["phases"][phase]) for name, stage in stages.items())
                / sum(weights.values()) for phase in phases}

    return Planned(flops=mean(lambda phase: phase["flops"]), sent=mean(lambda phase: sum(x[3] for x in phase["flows"])))


def main() -> None:
    """Answer the request."""
    request = json.load(sys.stdin)
    end_with_parent(parent=request["parent"])
    os.nice(19)
    from megatron_ebft.common.device import import_megatron

    import_megatron()
    from megatron_ebft.run.plan.measure import measure_rank, stage_ranks

    args, world_size = argparse.Namespace(**request["flags"]), request["world_size"]
    ranks = stage_ranks(world_size, args.pipeline_model_parallel_size)
    stages = {name: measure_rank(args, rank, world_size) for name, rank in ranks.items()}
    print(json.dumps(asdict(mean_of_ranks(stages, args.pipeline_model_parallel_size))))


if __name__ == "__main__":
    main()
