"""A fused step that draws given tokens."""

import torch

from megatron_ebft.rollout import sampler
from megatron_ebft.rollout.scored_draws import ScoredDraws
from megatron_ebft.rollout.token_sampling import Draws


def force_tokens(monkeypatch, tokens_BKNG: torch.Tensor) -> None:
    """From now on the rollouts of row b, as GoldBatch.index_B numbers rows, are tokens_BKNG[b]."""

    def draws(group, rows, step: int) -> ScoredDraws:
        tokens = tokens_BKNG[group.gold.index_B]
        drawn = group.row.of_rollouts(tokens)[..., step, None] if step else tokens[..., 0]
        forced = _Forced(rows, drawn, group.config.temperature, 1.0, 0)
        return ScoredDraws(forced, None if step else group.gold.tokens_BT)

    monkeypatch.setattr(sampler._Group, "_draws", draws)


class _Forced(Draws):
    """Its numbers are the tokens."""

    def from_logits(self, logits_SBV, model):
        tokens_BPM = self.numbers_BPM
        x_PBV = logits_SBV.detach()[self.rows][..., : model.num_real_ids] / self.temperature
        return tokens_BPM, None, torch.zeros(tokens_BPM.shape[:2]).to(tokens_BPM.device), x_PBV.logsumexp(-1).t()
