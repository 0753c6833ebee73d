"""Energy-Based Fine-Tuning of language models on Megatron-Core."""

import importlib.abc
import sys

__version__ = "0.1.0"


class _BeforeMegatronCore(importlib.abc.MetaPathFinder):
    """Runs `kernels.settle_accelerators` when Megatron-Core is first imported, which is too late to change its mind.

    A hook, because this package must import fast: --help and wrong flags answer at once.
    """

    def find_spec(self, name, path=None, target=None):
        if name == "megatron.core":
            sys.meta_path = [finder for finder in sys.meta_path if finder is not self]  # being iterated: not in place
            from megatron_ebft.model import kernels

            kernels.settle_accelerators()
        return None


if "megatron.core" not in sys.modules:
    sys.meta_path.insert(0, _BeforeMegatronCore())
