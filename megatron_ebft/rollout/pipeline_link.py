"""What pipeline stages hand each other while they decode.

Hidden states go to the next stage; from the last, drawn tokens (or hidden states, between virtual stages) go back to
the first. Sends do not block. Unbatched sends and receives have a communicator for each pair of ranks and group.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ebft.common.device import device
from megatron_ebft.parallel.groups import is_first_stage, is_last_stage, pp_group, wrap_group


class PipelineLink:
    """This rank's ends of the links to its neighbours in the pipeline, and of the one from the last stage to all."""

    def __init__(self):
        group = pp_group()
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        ranks = dist.get_process_group_ranks(group)
        self.previous, self.next = ranks[rank - 1], ranks[(rank + 1) % size]
        self.last, self.others = ranks[-1], ranks[:-1]
        self.incoming = wrap_group() if is_first_stage() else group
        self.outgoing = wrap_group() if is_last_stage() else group
        self._sent: list[tuple] = []

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """What the previous stage (of the first: the last) sent next."""
        buffer = torch.empty(shape, dtype=dtype, device=device())
        dist.irecv(buffer, self.previous, group=self.incoming).wait()
        return buffer

    def send(self, values: Tensor) -> None:
        """Hand to the next stage (of the last: the first)."""
        self._sent = [(work, kept) for work, kept in self._sent if not work.is_completed()]
        values = values.contiguous()
        self._sent.append((dist.isend(values, self.next, group=self.outgoing), values))

    def announce(self, values: Tensor) -> None:
        """From the last stage: hand to every other stage."""
        values = values.contiguous()
        for rank in self.others:
            group = self.outgoing if rank == self.next else pp_group()
            self._sent.append((dist.isend(values, rank, group=group), values))

    def hear(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """On every other stage: what the last one announced next."""
        buffer = torch.empty(shape, dtype=dtype, device=device())
        dist.irecv(buffer, self.last, group=self.incoming if is_first_stage() else pp_group()).wait()
        return buffer

    def finish(self) -> None:
        """Wait until all that was sent has arrived."""
        for work, _ in self._sent:
            work.wait()
        self._sent = []
