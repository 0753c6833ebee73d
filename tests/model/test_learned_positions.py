"""Learned positions restart at every document: a document in a row is the same as a row of its own.

Rotary embedding cannot tell: it sees distances alone, and a document mask leaves only those within a document.
"""

import math

import brute_force as bf
import models
import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig

from megatron_ebft.common.device import device
from megatron_ebft.data.micro_batches import MicroBatches
from megatron_ebft.method import gradient, sft
from megatron_ebft.method.means import Means
from megatron_ebft.model.architecture import ModelArgs
from megatron_ebft.model.attention import CausalPattern, as_mask
from megatron_ebft.model.build import build_encoder, build_policy
from megatron_ebft.model.weights import copy_weights
from megatron_ebft.rollout.sampler import sample_rollouts

pytestmark = pytest.mark.usefixtures("one_rank", "float64")

EOD, T = 0, 20
ARGS = ModelArgs(num_layers=4, hidden_size=16, ffn_hidden_size=24, num_attention_heads=4, num_query_groups=2,
                 kv_channels=4, vocab_size=13, padded_vocab_size=13, max_position_embeddings=T, init_method_std=0.5,
                 position_embedding_type="learned_absolute")
DOCUMENTS = ([(0, 7), (7, 13), (13, 20)], [(0, 3), (3, 14), (14, 20)])
"""Of each row, the first token and the one after the last."""
SETTINGS = bf.Settings(bf.Geometry(context=3, stride=2, rollout_length=3, num_samples=2), temperature=0.7, eod=EOD)


class Case:
    """Two rows of three documents, a policy, its encoder, and rollouts from it."""

    def __init__(self):
        ddp = DistributedDataParallelConfig(use_distributed_optimizer=True)
        torch.manual_seed(5)
        self.policy = build_policy(ARGS, ddp, params_dtype=torch.float64)
        self.encoder = build_encoder(ARGS, 3, params_dtype=torch.float64)
        copy_weights(self.policy, self.encoder)
        tokens_BT = torch.randint(1, ARGS.vocab_size, (len(DOCUMENTS), T))
        for row, documents in zip(tokens_BT, DOCUMENTS):
            row[[end - 1 for _, end in documents]] = EOD
        self.gold = models.gold_batch(tokens_BT, EOD)
        self.method = models.ebft_config(SETTINGS, T, ARGS.num_layers)
        self.rollouts = sample_rollouts(self.policy, self.gold, self.method.layout, self.method.sampling, iteration=1)

    def completions(self):
        """Of every block that counts: row, block, sample, and its document up to the anchor as a row of its own."""
        layout = self.method.layout
        for b, k in self.gold.valid_blocks(layout).nonzero().tolist():
            anchor = layout.anchors()[k].item()
            start = max(first for first, _ in DOCUMENTS[b] if first < anchor)
            for j in range(layout.num_samples):
                yield b, k, j, self.gold.tokens_BT[b, start:anchor]


@pytest.fixture(scope="module")
def case(one_rank, float64):
    return Case()


@torch.no_grad()
def alone(model, tokens_T, **options):
    """A pass over one row without a document mask, its positions 0, 1, 2, …"""
    positions_BT = torch.arange(len(tokens_T), device=device())[None]
    return model(tokens_T[None], positions_BT, as_mask(CausalPattern()), **options)


def log_probs_alone(model, tokens_T, temperature: float):
    """log p of tokens 1, 2, …"""
    logits_TBV = alone(model, tokens_T, readout=lambda hidden, model: model.head(hidden))
    log_probs_TV = (logits_TBV[:-1, 0] / temperature).log_softmax(-1)
    return log_probs_TV.gather(1, tokens_T[1:, None])[:, 0]


def test_log_probabilities_of_rollouts(case):
    """The sampler's, step by step from its cache, and those of one pass over the packed row."""
    scores = gradient.score(case.policy[0], case.gold, case.rollouts, case.method)
    completions = list(case.completions())
    assert len({start for documents in DOCUMENTS for start, _ in documents}) > 3 and len(completions) > 10
    for b, k, j, context in completions:
        rollout = case.rollouts.tokens_BKNG[b, k, j]
        expected = log_probs_alone(case.policy[0], torch.cat([context, rollout]), SETTINGS.temperature)[-3:]
        torch.testing.assert_close(scores.rollout_BKNG[b, k, j].double(), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(case.rollouts.log_probs_BKNG[b, k, j].double(), expected, rtol=0, atol=1e-6)


def test_log_probabilities_of_gold(case):
    """Those of the packed row, and the mean of plain next-token training."""
    gold_BT = gradient.score(case.policy[0], case.gold, case.rollouts, case.method).gold_BT
    losses = []
    for b, documents in enumerate(DOCUMENTS):
        for start, end in documents:
            expected = log_probs_alone(case.policy[0], case.gold.tokens_BT[b, start:end], 1.0)
            torch.testing.assert_close(gold_BT[b, start : end - 1].double(), expected, rtol=0, atol=1e-6)
            losses += (-expected).tolist()
    means = Means()
    sft.cross_entropy_pass(case.policy, case.gold, 1, means, forward_only=True)
    assert means.reduce()["ce_loss"] == pytest.approx(math.fsum(losses) / len(losses), abs=1e-6)


def test_features(case):
    """Rollouts' and references', from one encoder pass over the packed row."""
    layout, feature_map = case.method.layout, case.method.feature_map
    rows = MicroBatches(case.gold, case.rollouts.tokens_BKNG, layout, layout.rollout_length, 2, 0)
    with torch.no_grad():
        rollouts_BKND, gold_BKD = models.block_features(case.encoder, feature_map, next(iter(rows)), [3])[0]
    for b, k, j, context in case.completions():
        anchor = layout.anchors()[k].item()
        for tokens, feature in ((case.rollouts.tokens_BKNG[b, k, j], rollouts_BKND[b, k, j]),
                                (case.gold.tokens_BT[b, anchor : anchor + 3], gold_BKD[b, k])):
            torch.testing.assert_close(feature, feature_alone(case, torch.cat([context, tokens])), rtol=0, atol=1e-9)


def feature_alone(case, tokens_T):
    """The feature of the last token."""
    with models.Catch(case.encoder, case.method.feature_map.layers) as catch:
        alone(case.encoder, tokens_T)
    return torch.nn.functional.normalize(torch.cat([hidden[-1, 0] for hidden in catch.caught]), dim=-1)
