"""The readout that draws tokens and gives their log-probabilities with gradient, from the same logits."""

from dataclasses import dataclass

from torch import Tensor

from megatron_ebft.layout.tree import Shared
from megatron_ebft.model.log_probabilities import Section, gold_section, log_probs
from megatron_ebft.rollout.token_sampling import Draws


@dataclass
class ScoredDraws:
    """Returns tokens [B, P, M], their log-probabilities [B, P, M] (differentiable) and entropies [B, P], as `Draws`
    does; then, given gold tokens, log-probabilities of those after the first, [B, T−1] (differentiable)."""

    draws: Draws
    gold_BT: Tensor | None = None
    shared: Shared | None = None
    """Where rollouts share nodes: there is a row of logits for each node, and a draw for each rollout; M is 1."""

    def __call__(self, hidden_SBH: Tensor, model) -> tuple[Tensor, ...]:
        logits_SBV = model.head(hidden_SBH)
        source_BP = None if self.shared is None else self.shared.node_BU
        tokens_BPM, _, entropy_BP, log_sum_BP = self.draws.from_logits(logits_SBV, model, source_BP)
        gold = [] if self.gold_BT is None else [gold_section(self.gold_BT)]
        *gold_TB1, drawn_PBM = log_probs(logits_SBV, [*gold, self._section(tokens_BPM, log_sum_BP)], model)
        drawn_BPM = drawn_PBM.transpose(0, 1)
        if self.shared is not None:
            samples = drawn_BPM.shape[2]
            drawn_BPM = drawn_BPM.flatten(1).gather(1, self.shared.node_BU * samples + self.shared.sample_BU)[..., None]
        return tokens_BPM, drawn_BPM, entropy_BP, *(x.squeeze(-1).t() for x in gold_TB1)

    def _section(self, tokens_BPM: Tensor, log_sum_BP: Tensor) -> Section:
        """What was drawn after each row of logits. For a node, what all rollouts of its block have drawn: nobody reads
        the log-probabilities of those that belong to other nodes."""
        if self.shared is not None:
            tokens_BWU = tokens_BPM.squeeze(-1)[:, None].expand(-1, self.shared.block_BWN.shape[1], -1)
            tokens_BPM = tokens_BWU.gather(2, self.shared.block_BWN)
            log_sum_BP = log_sum_BP.gather(1, self.shared.first_BW)
        return Section(self.draws.rows, tokens_BPM.transpose(0, 1), self.draws.temperature, log_sum_BP.t())
