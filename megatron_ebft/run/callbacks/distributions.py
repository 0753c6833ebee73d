"""Histograms of a step: advantages, and CFM by block."""

import torch.distributed as dist

from megatron_ebft.method import energy
from megatron_ebft.run.callbacks.callback import Callback


class Distributions(Callback):
    """Histograms of every `interval`-th step of EBFT, over the blocks of rank 0's rows that count."""

    def __init__(self, interval: int):
        self.interval, self.histograms = interval, {}

    def computed(self, run, gold, computed):
        if dist.get_rank() or (run.state.iteration + 1) % self.interval:
            return
        biased, unbiased = energy.cfm(computed.gram)
        cfm_BK, valid_BK = unbiased if run.config.num_samples > 1 else biased, gold.valid_blocks(run.config.layout)
        self.histograms = {"train/advantages": computed.advantage_BKN[valid_BK].flatten(),
                           "train/cfm_of_blocks": cfm_BK[valid_BK]}

    def step_end(self, run, log, step):
        histograms, self.histograms = self.histograms, {}
        log.record(step.iteration, histograms={name: tensor for name, tensor in histograms.items() if len(tensor)})
