"""python -m megatron_ebft.hf.export CHECKPOINT OUTPUT PARENT: a checkpoint as a Hugging Face model, beside a run.

The process takes what the run leaves of the CPU, and ends with the process PARENT.
"""

import os
import sys

from megatron_ebft.common.signals import end_with_parent


def main(checkpoint: str, output: str, parent: str) -> None:
    end_with_parent(parent=int(parent))
    os.nice(19)
    from megatron_ebft.common.device import import_megatron

    import_megatron()
    from megatron_ebft.hf.convert import megatron_to_hf

    megatron_to_hf(checkpoint, output, say=lambda line: None)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
