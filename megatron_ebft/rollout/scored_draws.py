"""The readout that draws tokens and gives their log-probabilities with gradient, from the same logits."""

from dataclasses import dataclass

from torch import Tensor

from megatron_ebft.model.log_probabilities import Section, gold_section, log_probs
from megatron_ebft.rollout.token_sampling import Draws


@dataclass
class ScoredDraws:
    """Returns tokens [B, P, M], their log-probabilities [B, P, M] (differentiable) and entropies [B, P], as `Draws`
    does; then, given gold tokens, log-probabilities of those after the first, [B, T−1] (differentiable)."""

    draws: Draws
    gold_BT: Tensor | None = None

    def __call__(self, hidden_SBH: Tensor, model) -> tuple[Tensor, ...]:
        logits_SBV = model.head(hidden_SBH)
        tokens_BPM, _, entropy_BP, log_sum_BP = self.draws.from_logits(logits_SBV, model)
        drawn = Section(self.draws.rows, tokens_BPM.transpose(0, 1), self.draws.temperature, log_sum_BP.t())
        gold = [] if self.gold_BT is None else [gold_section(self.gold_BT)]
        *gold_TB1, drawn_PBM = log_probs(logits_SBV, [*gold, drawn], model)
        return tokens_BPM, drawn_PBM.transpose(0, 1), entropy_BP, *(x.squeeze(-1).t() for x in gold_TB1)
