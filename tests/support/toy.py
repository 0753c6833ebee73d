"""A toy vocabulary whose rollouts can all be enumerated, in float64."""

from contextlib import nullcontext
from itertools import product

import brute_force as bf
import models
import plain_llama
import torch
from forced import force_tokens

from megatron_ebft.common.device import device
from megatron_ebft.layout.strided import first_alike
from megatron_ebft.method import energy, gradient
from megatron_ebft.method import fused as fused_step
from megatron_ebft.method.means import Means
from megatron_ebft.rollout.sampler import Rollouts

V, G, T, TEMPERATURE = 3, 2, 7, 0.7
"""Vocabulary, rollout length, tokens of the row, temperature of sampling."""


class Toy:
    """A policy and another model as encoder, one document, and every rollout's probability and feature."""

    def __init__(self, n: int, length: int = G):
        self.n, self.length = n, length
        self.outcomes_OG = torch.tensor(list(product(range(V), repeat=length)))
        options = dict(layers=4, hidden=16, ffn=24, heads=4, kv_heads=2, vocab=V, dtype=torch.float64)
        self.config, self.weights = plain_llama.random_llama(3, **options)
        self.encoder_weights = plain_llama.random_llama(4, **options)[1]
        self.doc = torch.randint(V, (1, T), generator=torch.Generator().manual_seed(0))
        self.geometry = bf.Geometry(context=2, stride=2, rollout_length=length, num_samples=len(self.outcomes_OG))
        self.blocks = len(self.geometry.anchors(T))
        self.outcomes = self.outcomes_OG.expand(1, self.blocks, -1, -1)  # every outcome as a rollout of every block
        features, reference = bf.features(self.encoder_weights, self.config, self.doc, self.outcomes, self.geometry)
        self.features_KOD, self.reference_KD = features[0], reference[0]

    def log_probs(self, weights) -> torch.Tensor:
        """log p of every outcome in every block, [K, O]."""
        log_probs = bf.rollout_log_probs(weights, self.config, self.doc, self.outcomes, self.geometry, TEMPERATURE)
        return log_probs[0].sum(-1)

    def feature_matching_gradient(self) -> dict[str, torch.Tensor]:
        """∇ Σ_k ‖E φ − φ_y‖², the expectation written out."""
        leaves = {name: x.clone().requires_grad_() for name, x in self.weights.items()}
        mean_KD = (self.log_probs(leaves).exp()[..., None] * self.features_KOD).sum(1)
        loss = (mean_KD - self.reference_KD).square().sum()
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()))))

    def expected_policy_gradient(self, advantage: str, alpha: float, fused=None) -> dict[str, torch.Tensor]:
        """R · ∇L_RL over all tuples of n outcomes, by the package.

        Args:
            fused: pytest's monkeypatch, for a fused step that draws these tuples; None: separate passes.
        """
        tuples_RN = torch.tensor(list(product(range(len(self.outcomes_OG)), repeat=self.n)))
        R, K = len(tuples_RN), self.blocks
        settings = bf.Settings(bf.Geometry(2, 2, self.length, self.n), TEMPERATURE, alpha=alpha, advantage=advantage)
        method = models.ebft_config(settings, T, self.config["num_hidden_layers"], micro_batch_size=R)
        tokens = self.outcomes_OG[tuples_RN][:, None].expand(R, K, self.n, self.length).to(device())
        gold, rollouts = models.gold_batch(self.doc.expand(R, T)), Rollouts(tokens, None, None)
        policy = models.build_policy(self.config, self.weights)
        encoder = models.build_encoder(self.config, self.encoder_weights)
        rewards = models.rewarded(encoder, gold, rollouts, method)
        first = first_alike(tokens)  # identical rollouts have identical rewards, whatever rounding says
        exact = energy.advantages(*(x.gather(-1, first) for x in energy.rewards(rewards.gram, "none")), advantage, 1.0,
                                  alpha)
        assert torch.equal(rewards.advantage, exact.float())  # float32 is all the package keeps of them
        probability_RK = self.log_probs(self.weights)[:, tuples_RN].sum(-1).t().exp().to(device())
        assert (probability_RK.sum(0) - 1).abs().max() < 1e-12
        weighted = exact * probability_RK[..., None]
        if fused is None:
            gradient.policy_gradient(policy, gold, rollouts, weighted, method, Means())
        else:
            force_tokens(fused, tokens)
            fused.setattr(fused_step, "compute_advantages", lambda rewards, config: weighted)
            fused_step.fused_gradient(policy, encoder, None, gold, method, 0, Means(), lambda phase: nullcontext(),
                                      lambda: None)
        return {name: R * grad for name, grad in models.gradients(policy, self.config).items()}
