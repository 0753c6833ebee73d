"""Means over the global batch, from which all metrics of a step come."""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ebft.common.device import device
from megatron_ebft.parallel.groups import dp_sum, is_last_stage, pp_group


class Means:
    """Weighted means over micro-batches and data-parallel ranks, reduced in one call."""

    def __init__(self):
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, total: Tensor, count: Tensor | float) -> None:
        """Add a sum and the number of its terms.

        Every data-parallel rank must add the same names in the same order. Only what the last pipeline stage adds
        counts, since it alone sees the loss.
        """
        pair = torch.stack([x.double() if isinstance(x, Tensor) else torch.full(
            (), x, dtype=torch.float64, device=device()) for x in (total, count)])  # a copy would wait for the GPU
        self._sums[name] = self._sums.get(name, 0) + pair

    def add_masked(self, name: str, values: Tensor, valid: Tensor) -> None:
        """Add values where `valid` (broadcast to them)."""
        valid = valid.expand_as(values)
        self.add(name, values.detach().double().where(valid, 0.0).sum(), valid.sum())

    def reduce(self) -> dict[str, float]:
        """The means over all ranks, the same on every rank. A mean without any terms is absent."""
        means = [None]
        if self._sums and is_last_stage():
            totals, counts = dp_sum(torch.stack(list(self._sums.values()))).unbind(1)
            values = zip(self._sums, totals.tolist(), counts.tolist(), strict=True)
            means = [{name: total / count for name, total, count in values if count}]
        if dist.get_world_size(pp_group()) > 1:
            dist.broadcast_object_list(means, group=pp_group(), group_src=dist.get_world_size(pp_group()) - 1)
        return means[0] or {}
