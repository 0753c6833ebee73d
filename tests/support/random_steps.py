"""Steps of random geometry, model and masks, in float64, set up for the package and for brute_force.py."""

from dataclasses import dataclass
from random import Random

import brute_force as bf
import models
import plain_llama
import torch
from models import largest_difference
from plain_llama import LLAMA3_ROPE

from megatron_ebft.data.micro_batches import MicroBatches
from megatron_ebft.rollout.sampler import sample_rollouts

TOLERANCE = 1e-6
VOCAB, EOD = 13, 0


@dataclass(frozen=True)
class Case:
    """Geometry, model, masks and split of one step."""

    T: int = 14
    c: int = 3
    s: int = 2
    G: int = 3
    n: int = 2
    rows: int = 2
    micro_batch_size: int = 1
    blocks_per_microbatch: int = 0
    kv_heads: int = 2
    qkv_bias: bool = False
    tied: bool = False
    llama3_rope: bool = False
    eods: tuple[int, ...] | None = None
    """Positions of eod tokens, in row b moved by b; None: no document mask."""
    answers: tuple[int, int] | None = None
    """Answer tokens [first, last) of every row, in row b moved by b; None: no answer mask."""
    whitening: str = "none"
    norm: str = "joint"
    pooling: str = "last_token"
    advantage: str = "rloo"
    temperature: float = 0.8
    has_duplicates: bool = False
    """Sample 1 is sample 0 again, and in every second block all samples are."""
    skip_duplicates: bool = True
    seed: int = 0


def random_case(seed: int) -> Case:
    """A case with every field drawn at random (evenly, unlike hypothesis, which likes small and repeated numbers)."""
    random = Random(seed)
    pick, number = random.choice, random.randint
    c, G, n, rows = number(1, 5), number(1, 5), pick((1, 2, 2, 3)), number(1, 4)
    T = c + G + number(0, 12)
    return Case(
        T, c, number(1, 4), G, n, rows, micro_batch_size=pick([x for x in (1, 2, 3, 4) if rows % x == 0]),
        blocks_per_microbatch=number(0, 4), kv_heads=pick((1, 2, 4)), qkv_bias=pick((False, True)),
        tied=pick((False, True)), llama3_rope=pick((False, True)),
        eods=pick((None, tuple(number(0, T - 1) for _ in range(number(0, 3))))),
        answers=pick((None, (number(0, T // 2), T))), whitening=pick(("none", "paper", "released")),
        norm=pick(("joint", "layer")), pooling=pick(("last_token", "mean")),
        advantage=pick(("rloo", "reinforce", "group_norm")) if n > 1 else "reinforce",
        temperature=pick((0.6, 1.0)), has_duplicates=pick((False, True)),
        skip_duplicates=pick((False, True)), seed=number(0, 1000))


class Step:
    """One case, set up for both sides."""

    def __init__(self, case: Case, **options):
        self.case = case
        self.config, self.weights = self.random_llama(case.seed)
        self.encoder_weights = self.random_llama(case.seed + 1)[1]
        self.reference_weights = self.random_llama(case.seed + 2)[1]
        generator = torch.Generator().manual_seed(case.seed)
        self.docs = torch.randint(1, VOCAB, (case.rows, case.T), generator=generator)
        self.answers = None if case.answers is None else torch.zeros_like(self.docs, dtype=torch.bool)
        for b in range(case.rows):
            for position in case.eods or ():
                self.docs[b, (position + b) % case.T] = EOD
            if case.answers is not None:
                self.answers[b, case.answers[0] + b : case.answers[1] + b] = True
        self.settings = bf.Settings(
            bf.Geometry(case.c, case.s, case.G, case.n), temperature=case.temperature, whitening=case.whitening,
            advantage=case.advantage, norm=case.norm, pooling=case.pooling, ce_coef=0.3, alpha=0.7,
            eod=None if case.eods is None else EOD, ce_document_starts=case.eods is None, **options)
        self.method = models.ebft_config(self.settings, case.T, self.config["num_hidden_layers"],
                                         micro_batch_size=case.micro_batch_size,
                                         blocks_per_microbatch=case.blocks_per_microbatch, seed=case.seed,
                                         skip_duplicates=case.skip_duplicates)
        self.gold = models.gold_batch(self.docs, self.settings.eod, self.answers)
        self.policy = models.build_policy(self.config, self.weights)
        self.rollouts = sample_rollouts(self.policy, self.gold, self.method.layout, self.method.sampling,
                                        iteration=7)
        if case.has_duplicates:
            for values_BKNG in (self.rollouts.tokens_BKNG, self.rollouts.log_probs_BKNG):
                values_BKNG[:, :, :2] = values_BKNG[:, :, :1].clone()
                values_BKNG[:, ::2] = values_BKNG[:, ::2, :1].clone()

    def random_llama(self, seed: int):
        case = self.case
        return plain_llama.random_llama(seed, layers=4, hidden=16, ffn=24, heads=4, kv_heads=case.kv_heads, vocab=VOCAB,
                               qkv_bias=case.qkv_bias, tied=case.tied, dtype=torch.float64,
                               rope_scaling=LLAMA3_ROPE if case.llama3_rope else None)

    def brute_force(self, settings=None) -> dict:
        return bf.step(self.weights, self.config, self.docs, self.rollouts.tokens_BKNG.cpu(), settings or self.settings,
                       encoder=self.encoder_weights, start=self.reference_weights, answer_mask=self.answers)

    def features(self, encoder):
        case, G = self.case, self.case.G
        rows = MicroBatches(self.gold, self.rollouts.tokens_BKNG, self.method.layout, G, case.micro_batch_size,
                            case.blocks_per_microbatch)
        with torch.no_grad():
            pairs = [models.block_features(encoder, self.method.feature_map, mb, [G])[0] for mb in rows]
        return tuple(rows.join_blocks(list(x)) for x in zip(*pairs))


def check_gradient(step: Step, expected: dict) -> None:
    total = sum(grad.norm() ** 2 for grad in expected.values()) ** 0.5
    gradients = models.gradients(step.policy, step.config)
    assert gradients.keys() == expected.keys()
    for name, grad in gradients.items():
        assert (grad - expected[name]).norm() <= TOLERANCE * (expected[name].norm() + 0.01 * total), name


def assert_close(actual, expected):
    if actual.numel():
        assert largest_difference(actual, expected.cpu()) <= TOLERANCE
