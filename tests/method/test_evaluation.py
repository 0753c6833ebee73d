"""Evaluation: CFM and alignment of every completion length, against one sequence at a time."""

from dataclasses import replace

import brute_force as bf
import equations
import models
import plain_llama
import pytest
import torch

from megatron_ebft.data.micro_batches import MicroBatches
from megatron_ebft.method import evaluation
from megatron_ebft.method.batches import encoder_rows
from megatron_ebft.method.evaluation import EVALUATION_ITERATION, evaluate, evaluation_config
from megatron_ebft.rollout import sampler
from megatron_ebft.rollout.sampler import sample_rollouts

pytestmark = pytest.mark.usefixtures("one_rank", "float64")


def test_every_completion_length_is_brute_force():
    config, weights = plain_llama.random_llama(0, layers=4, hidden=32, ffn=48, heads=4, kv_heads=2, vocab=23,
                                      dtype=torch.float64)
    docs = torch.randint(0, 23, (2, 29), generator=torch.Generator().manual_seed(1))
    settings = bf.Settings(bf.Geometry(context=3, stride=2, rollout_length=3, num_samples=3), temperature=0.7)
    method = models.ebft_config(settings, docs.shape[1], 4, micro_batch_size=2)
    policy, encoder = models.build_policy(config, weights), models.build_encoder(config, weights)
    gold = models.gold_batch(docs)
    metrics, shown = evaluate(policy, encoder, models.build_start(config, weights), [gold], method, 8, 2)

    rolled, lengths = evaluation_config(method, 8, 2)
    layout = rolled.layout
    assert lengths == [1, 2, 3, 4, 8] and layout.rollout_length == layout.stride == 8
    assert rolled.sampling.temperature == 1
    rollouts = sample_rollouts(policy, gold, layout, rolled.sampling, EVALUATION_ITERATION).tokens_BKNG
    assert torch.equal(rollouts, shown.rollouts.tokens_BKNG)
    for length in lengths:
        cut = docs[:, : layout.context_length + (layout.num_blocks - 1) * layout.stride + length]
        geometry = bf.Geometry(layout.context_length, layout.stride, length, layout.num_samples)
        features = bf.features(weights, config, cut, rollouts.cpu()[..., :length], geometry)
        blocks = list(zip(*(x.flatten(0, 1) for x in features), strict=True))
        alignment = [equations.rewards(X, y, 1.0, "none")[0].mean() for X, y in blocks]
        for name, values in (("cfm", [equations.cfm_unbiased(X, y) for X, y in blocks]), ("alignment", alignment),
                             ("cfm_biased", [equations.cfm_biased(X, y) for X, y in blocks])):
            assert metrics[f"{name}_length/{length:02d}"] == pytest.approx(torch.stack(values).mean().item(), abs=1e-6)
        if length == settings.geometry.rollout_length:
            cfm_BK = torch.stack([equations.cfm_unbiased(X, y) for X, y in blocks]).unflatten(0, (2, -1))
            positions = {f"cfm_position/{anchor * 8 // 29 + 1}": cfm_BK[:, k].mean().item()
                         for k, anchor in enumerate((3, 11, 19))}
            measured = {name: value for name, value in metrics.items() if name.startswith("cfm_position/")}
            assert measured == pytest.approx(positions, abs=1e-6)
            rewards = torch.stack([equations.rewards(X, y, settings.alpha)[2] for X, y in blocks])
            assert torch.allclose(shown.reward_BKN.flatten(0, 1), rewards, atol=1e-6)
    gold_log_probs = bf.gold_log_probs(weights, config, docs)
    assert metrics["ce_loss"] == pytest.approx(-gold_log_probs.mean().item(), abs=1e-6)
    assert metrics["perplexity"] == pytest.approx((-gold_log_probs.mean()).exp().item())
    assert abs(metrics["kl_to_start"]) < 1e-9


@pytest.mark.parametrize("stride, blocks", [(2, 4), (8, 0)])
def test_memory_is_that_of_training(stride, blocks, monkeypatch):
    """Rows of an evaluation are as long as --ebft-blocks-per-microbatch makes them in training, also where blocks are
    far apart; the measures are the same."""
    config, weights = plain_llama.random_llama(0, layers=4, hidden=32, ffn=48, heads=4, kv_heads=2, vocab=23,
                                               dtype=torch.float64)
    docs = torch.randint(0, 23, (4, 43), generator=torch.Generator().manual_seed(1))
    settings = bf.Settings(bf.Geometry(context=3, stride=stride, rollout_length=2, num_samples=3), temperature=0.7)
    policy, encoder = models.build_policy(config, weights), models.build_encoder(config, weights)
    start, gold = models.build_start(config, weights), models.gold_batch(docs)
    method = models.ebft_config(settings, 43, 4, blocks_per_microbatch=blocks)

    def measured() -> tuple[dict, list[int], list[int]]:
        """Metrics of an evaluation; row lengths, and tokens cached together, of the evaluation and last of training."""
        lengths, cached = [], []
        with monkeypatch.context() as patch:
            make, hold = MicroBatches.__post_init__, sampler._Group.__init__
            patch.setattr(MicroBatches, "__post_init__", lambda self: (make(self), lengths.append(self.row_length))[0])
            patch.setattr(sampler._Group, "__init__", lambda self, *args: (
                hold(self, *args), cached.append(len(self.gold.tokens_BT) * self.row.length))[0])
            metrics = evaluate(policy, encoder, start, [gold], method, 8, 1)[0]
            encoder_rows(gold, sample_rollouts(policy, gold, method.layout, method.sampling, 0), method)
        return metrics, lengths, cached

    metrics, lengths, cached = measured()
    assert max(lengths[:-1]) <= lengths[-1] and max(cached[:-1]) <= cached[-1]
    monkeypatch.setattr(evaluation, "evaluation_config", lambda *args: (
        replace((rolled := evaluation_config(*args))[0], blocks_per_microbatch=0, rollout_rows=0), rolled[1]))
    assert metrics == pytest.approx(evaluate(policy, encoder, start, [gold], method, 8, 1)[0], abs=1e-9)
