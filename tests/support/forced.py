"""A fused step that draws given tokens."""

from dataclasses import replace

import torch

from megatron_ebft.model.log_probabilities import log_sum_exp
from megatron_ebft.rollout import sampler
from megatron_ebft.rollout.token_sampling import Draws


def force_tokens(monkeypatch, tokens_BKNG: torch.Tensor) -> None:
    """From now on the rollouts of row b, as GoldBatch.index_B numbers rows, are tokens_BKNG[b]."""
    by_numbers = sampler._Group._draws

    def draws(group, rows, step: int):
        tokens = tokens_BKNG[group.gold.index_B]
        drawn = group.row.of_rollouts(tokens)[..., step, None] if step else tokens[..., 0]
        readout = by_numbers(group, rows, step)
        return replace(readout, draws=_Forced(rows, drawn, group.config.temperature, 1.0, 0))

    monkeypatch.setattr(sampler._Group, "_draws", draws)


class _Forced(Draws):
    """Its numbers are the tokens."""

    def from_logits(self, logits_SBV, model, source_BP=None):
        tokens_BPM = self.numbers_BPM
        log_sum_BP = log_sum_exp(logits_SBV.detach()[self.rows], model.num_real_ids, self.temperature,
                                 model.pg_collection.tp).t()
        if source_BP is not None:
            log_sum_BP = log_sum_BP.gather(1, source_BP)
        return tokens_BPM, None, torch.zeros(tokens_BPM.shape[:2]).to(tokens_BPM.device), log_sum_BP
