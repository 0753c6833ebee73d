"""The golden steps of the released code (golden/README.md), and the package's models with their weights."""

from contextlib import nullcontext
from pathlib import Path

import brute_force as bf
import models
import plain_llama
import torch
from forced import force_tokens
from models import relative_error
from safetensors import safe_open
from safetensors.torch import load_file

from megatron_ebft.method import gradient
from megatron_ebft.method.fused import fused_gradient
from megatron_ebft.method.means import Means
from megatron_ebft.rollout.sampler import Rollouts

GOLDEN = Path(__file__).parents[1] / "golden"
STEPS = ("step", "step_whitened", "step_translation")


def load_golden(name):
    """(tensors, settings, docs, rollouts) of a golden step."""
    path = GOLDEN / f"{name}.safetensors"
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        meta = file.metadata()
    geometry = bf.Geometry(int(meta["context"]), int(meta["stride"]), int(meta["gen_len"]), int(meta["samples"]))
    settings = bf.Settings(
        geometry,
        temperature=float(meta["temperature"]),
        alpha=float(meta["diversity_coef"]),
        whitening="released" if meta["whitening"] == "True" else "none",
        pooling={"last_token": "last_token", "mean_pooling": "mean"}[meta["embed_method"]],
        ce_coef=float(meta["ce_coef"]),
    )
    return tensors, settings, tensors["docs"], by_rollout(tensors["sequences"], settings, tensors["docs"])


def by_rollout(sequences, settings, docs):
    geometry = settings.geometry
    return bf.sequences_to_rollouts(sequences, docs.shape[1], geometry.num_samples, geometry.rollout_length)


def by_sample(golden, docs):
    """[B*n, K] of the golden files as [B, K, n]."""
    return golden.unflatten(0, (docs.shape[0], -1)).transpose(1, 2)


class Case:
    """A golden step and our models with its weights."""

    def __init__(self, name: str, micro_batch_size: int = 1, blocks_per_microbatch: int = 0, **overrides):
        self.golden, settings, self.docs, self.tokens = load_golden(name)
        self.model, weights = plain_llama.load_llama(GOLDEN / "llama")
        self.policy = models.build_policy(self.model, weights, **overrides)
        self.encoder = models.build_encoder(self.model, weights, **overrides)
        self.config = models.ebft_config(settings, self.docs.shape[1], self.model["num_hidden_layers"],
                                         micro_batch_size=micro_batch_size, blocks_per_microbatch=blocks_per_microbatch)
        self.gold = models.gold_batch(self.docs)
        tokens = self.tokens.to(self.gold.tokens_BT.device)
        self.rollouts = Rollouts(tokens, torch.zeros_like(tokens, dtype=torch.float32), None)
        self.means = Means()

    def rewards(self) -> models.Rewarded:
        return models.rewarded(self.encoder, self.gold, self.rollouts, self.config)

    def gradient(self) -> gradient.Scores:
        return gradient.policy_gradient(self.policy, self.gold, self.rollouts, self.rewards().advantage, self.config,
                                    self.means)

    def fused_gradient(self, monkeypatch):
        """The same by a fused step, which draws the golden tokens."""
        force_tokens(monkeypatch, self.rollouts.tokens_BKNG)
        return fused_gradient(self.policy, self.encoder, None, self.gold, self.config, 0, self.means,
                              lambda phase: nullcontext(), lambda: None)

    def check_gradient(self, tolerance: float) -> None:
        gradients = models.gradients(self.policy, self.model)
        assert {"grad." + name for name in gradients} == {key for key in self.golden if key.startswith("grad.")}
        for name, grad in gradients.items():
            assert relative_error(grad, self.golden["grad." + name]) <= tolerance, name
