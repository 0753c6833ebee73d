"""One EBFT step, done the slow and obvious way: the oracle the real implementation is tested against.

1. Every rollout is a sequence of its own, gold prefix + rollout tokens, through a plain Llama (plain_llama.py).
   No strided mask, no cache, no shared prefix; sequences are batched only with others of their own length.
2. A document of a packed row is a sequence of its own as well: attention and positions restart because nothing else
   is there.
3. Rewards, advantages, losses and metrics are loops over contexts and samples (equations.py).
4. Nothing here imports the package under test. Clarity before speed throughout.

Shape suffixes: B rows, T gold tokens, K blocks, N samples, G rollout steps, D features, H hidden, V vocabulary,
P positions of whatever sequences a pass is given. Weights are dictionaries under Hugging Face names.
"""

import math
from dataclasses import dataclass

import equations
import torch
from equations import unit
from plain_llama import at_least_float32, forward_sequences


@dataclass(frozen=True)
class Geometry:
    context: int
    """Offset c of the first anchor; not a window: block k sees the whole gold prefix before its anchor."""
    stride: int
    """Distance s between anchors."""
    rollout_length: int
    """Tokens G generated for each block."""
    num_samples: int
    """Rollouts n of each block."""

    def anchors(self, T: int) -> list[int]:
        """a_k = c + k*s for every block whose completion gold[a_k : a_k+G] ends inside the row."""
        num_blocks = (T - self.rollout_length - self.context) // self.stride + 1
        return [self.context + k * self.stride for k in range(num_blocks)]


@dataclass(frozen=True)
class Settings:
    geometry: Geometry
    temperature: float = 1.0
    """tau the rollouts were sampled at; their log-probabilities are those of logits / tau."""
    alpha: float = 1.0
    """Weight of the diversity term; 1 is the true gradient of the feature-matching loss."""
    whitening: str = "none"
    """none | paper | released."""
    advantage: str = "rloo"
    """rloo | reinforce | group_norm."""
    norm: str = "joint"
    """joint: one L2 norm of the concatenated layers. layer: one per layer, then concatenated."""
    pooling: str = "last_token"
    """last_token | mean, over a block's G tokens, after normalisation."""
    fractions: tuple[float, ...] = (0.25, 0.5, 0.75)
    """Depths f: features are the residual stream after decoder layer floor(f*L), counted from 1."""
    rl_coef: float = 1.0
    ce_coef: float = 0.0
    kl_coef: float = 0.0
    kl_estimator: str = "exact"
    """exact | k1 | k2 | k3."""
    importance_cap: float | None = None
    """C: where given, each token's term is multiplied by min(p_train / p_sampler, C), detached."""
    eod: int | None = None
    """End-of-document token: where given, attention and positions restart after it."""
    ce_document_starts: bool = True
    """Count a document's first token, predicted from the eod before it, in the cross-entropy."""


# ---------------------------------------------------------------- rows, documents, blocks


def document_ids(row_T, eod):
    """Document number of each token. An eod token belongs to the document it ends; without eod: one document."""
    ids, current = [], 0
    for token in row_T.tolist():
        ids.append(current)
        if token == eod:
            current += 1
    return ids


def valid_blocks(tokens_BT, geometry, eod=None, answer_mask=None):
    """Which blocks count, bool [B, K].

    With eod: those whose completion gold[a_k : a_k+G] is of one document, the document of gold[a_k - 1] (so the context
    is at least one token, and may be shorter than c). With an answer mask [B, T]: those whose completion is all answer
    tokens.
    """
    B, T = tokens_BT.shape
    anchors = geometry.anchors(T)
    valid_BK = torch.ones(B, len(anchors), dtype=torch.bool)
    for b in range(B):
        ids = document_ids(tokens_BT[b], eod)
        for k, anchor in enumerate(anchors):
            completion = range(anchor, anchor + geometry.rollout_length)
            if any(ids[position] != ids[anchor - 1] for position in completion):
                valid_BK[b, k] = False
            if answer_mask is not None and not all(answer_mask[b, position] for position in completion):
                valid_BK[b, k] = False
    return valid_BK


def context_tokens(row_T, anchor, eod=None):
    """What a rollout at this anchor sees of the gold: the tokens before it in the document of gold[anchor - 1]."""
    ids = document_ids(row_T, eod)
    return row_T[ids.index(ids[anchor - 1]) : anchor]


def sequences_to_rollouts(sequences, T, n, G):
    """Rows [B*n, T + K*G] of gold, then rollouts step-major (token (k, t) at T + t*K + k), as rollouts [B, K, n, G]."""
    B, K = sequences.shape[0] // n, (sequences.shape[1] - T) // G
    rollouts = sequences.new_empty(B, K, n, G)
    for b in range(B):
        for k in range(K):
            for j in range(n):
                for t in range(G):
                    rollouts[b, k, j, t] = sequences[b * n + j, T + t * K + k]
    return rollouts


def ce_mask(docs_BT, eod=None, answer_mask=None, document_starts=True):
    """Which of the tokens 1..T-1 the cross-entropy counts, bool [B, T-1]."""
    counted_BT = torch.ones_like(docs_BT, dtype=torch.bool) if answer_mask is None else answer_mask.bool().clone()
    if not document_starts:
        for b, row_T in enumerate(docs_BT):
            ids = document_ids(row_T, eod)
            for t in range(1, len(ids)):
                counted_BT[b, t] &= ids[t] == ids[t - 1]
    return counted_BT[:, 1:]


def gold_pass(weights, config, docs_BT, eod=None):
    """(hidden_states list of [B, T, H], logits_BTV) of the gold rows, each document by itself."""
    documents = []
    for row_T in docs_BT:
        ids = torch.tensor(document_ids(row_T, eod))
        documents += [row_T[ids == document] for document in range(ids[-1] + 1)]
    outputs = forward_sequences(weights, config, documents)
    B, T = docs_BT.shape
    hidden_states = [torch.cat(layer).view(B, T, -1) for layer in zip(*(hidden for hidden, _ in outputs))]
    return hidden_states, torch.cat([logits for _, logits in outputs]).view(B, T, -1)


def rollout_pass(weights, config, docs_BT, rollouts_BKNG, geometry, eod=None):
    """Each rollout by itself after its context: (hidden_states list of [B, K, N, G, H], logits [B, K, N, G, V]).

    Hidden states are those AT the rollout tokens; logits are those that PREDICT them (one position earlier).
    """
    B, T = docs_BT.shape
    N, G = geometry.num_samples, geometry.rollout_length
    anchors = geometry.anchors(T)
    sequences = []
    for b in range(B):
        for k, anchor in enumerate(anchors):
            for j in range(N):
                sequences.append(torch.cat([context_tokens(docs_BT[b], anchor, eod), rollouts_BKNG[b, k, j]]))
    outputs = forward_sequences(weights, config, sequences)
    shape = (B, len(anchors), N, G, -1)
    by_layer = zip(*(hidden for hidden, _ in outputs))
    hidden_states = [torch.stack([h[-G:] for h in layer]).view(shape) for layer in by_layer]
    return hidden_states, torch.stack([logits[-G - 1 : -1] for _, logits in outputs]).view(shape)


def log_distribution(logits, temperature):
    return (at_least_float32(logits) / temperature).log_softmax(-1)


def rollout_log_probs(weights, config, docs_BT, rollouts_BKNG, geometry, temperature=1.0, eod=None):
    """log p(rollout token | its context and the rollout so far) at temperature tau, [B, K, N, G].

    Defined for invalid blocks too: there the rollout continues the document of gold[a_k - 1].
    """
    _, logits = rollout_pass(weights, config, docs_BT, rollouts_BKNG, geometry, eod)
    return log_distribution(logits, temperature).gather(-1, rollouts_BKNG[..., None]).squeeze(-1)


def gold_log_probs(weights, config, docs_BT, eod=None):
    """log p(gold[t] | before), t = 1..T-1, at temperature 1, [B, T-1]."""
    _, logits_BTV = gold_pass(weights, config, docs_BT, eod)
    return log_distribution(logits_BTV[:, :-1], 1.0).gather(-1, docs_BT[:, 1:, None]).squeeze(-1)


# ---------------------------------------------------------------- features


def feature_layers(config, fractions=(0.25, 0.5, 0.75)):
    return [math.floor(f * config["num_hidden_layers"]) for f in fractions]


def token_features(hidden_states, layers, norm="joint"):
    """Features of single tokens: the given layers, [..., H] each, normalised and concatenated to [..., D]."""
    chosen = [at_least_float32(hidden_states[i]) for i in layers]
    if norm == "layer":
        return torch.cat([unit(h) for h in chosen], dim=-1)
    if norm == "joint":
        return unit(torch.cat(chosen, dim=-1))
    raise ValueError(f"norm {norm!r}: joint or layer")


def pool(features, pooling):
    """[..., G, D] to [..., D]."""
    if pooling == "last_token":
        return features[..., -1, :]
    if pooling == "mean":
        return features.mean(-2)
    raise ValueError(f"pooling {pooling!r}: last_token or mean")


def features(
    weights,
    config,
    docs_BT,
    rollouts_BKNG,
    geometry,
    *,
    fractions=(0.25, 0.5, 0.75),
    norm="joint",
    pooling="last_token",
    eod=None,
):
    """Pooled features of the rollouts [B, K, N, D] and of the gold completions [B, K, D]."""
    layers = feature_layers(config, fractions)
    rollout_hidden, _ = rollout_pass(weights, config, docs_BT, rollouts_BKNG, geometry, eod)
    gold_hidden, _ = gold_pass(weights, config, docs_BT, eod)
    gold_BTD = token_features(gold_hidden, layers, norm)
    anchors = geometry.anchors(docs_BT.shape[1])
    completions_BKGD = torch.stack([gold_BTD[:, a : a + geometry.rollout_length] for a in anchors], dim=1)
    return pool(token_features(rollout_hidden, layers, norm), pooling), pool(completions_BKGD, pooling)


# ---------------------------------------------------------------- the step


def energies(features_BKND, features_BKD, settings):
    """alignment, diversity, reward, advantage [B, K, N]; cfm_biased, cfm_unbiased [B, K] (nan for n = 1)."""
    names = ("alignment", "diversity", "reward", "advantage", "cfm_biased", "cfm_unbiased")
    by_name = {name: [] for name in names}
    for X_ND, y_D in zip(features_BKND.flatten(0, 1), features_BKD.flatten(0, 1)):
        alignment_N, diversity_N, reward_N = equations.rewards(X_ND, y_D, settings.alpha, settings.whitening)
        advantage_N = equations.advantages(alignment_N, diversity_N, settings.alpha, settings.advantage)
        unbiased = equations.cfm_unbiased(X_ND, y_D) if len(X_ND) > 1 else y_D.new_tensor(math.nan)
        block = (alignment_N, diversity_N, reward_N, advantage_N, equations.cfm_biased(X_ND, y_D), unbiased)
        for name, value in zip(names, block):
            by_name[name].append(value)
    return {name: torch.stack(values).unflatten(0, features_BKD.shape[:2]) for name, values in by_name.items()}


def losses(weights, config, docs_BT, rollouts_BKNG, settings, advantages_BKN, valid_BK, *, start, answer_mask,
           sampler_log_probs):
    """log_probs [B, K, N, G] at tau, gold_log_probs [B, T-1] at 1, rl_loss, ce_loss, kl (0 without kl_coef), loss."""
    geometry, eod = settings.geometry, settings.eod
    _, logits = rollout_pass(weights, config, docs_BT, rollouts_BKNG, geometry, eod)
    log_dist = log_distribution(logits, settings.temperature)
    log_probs_BKNG = log_dist.gather(-1, rollouts_BKNG[..., None]).squeeze(-1)
    gold_log_probs_BT = gold_log_probs(weights, config, docs_BT, eod)

    importance = None
    if settings.importance_cap is not None:
        importance = equations.truncated_importance(log_probs_BKNG, sampler_log_probs, settings.importance_cap)
    rl = equations.rl_loss(log_probs_BKNG, advantages_BKN, valid_BK, importance)
    ce = equations.ce_loss(gold_log_probs_BT, ce_mask(docs_BT, eod, answer_mask, settings.ce_document_starts))
    divergence = torch.zeros_like(rl)
    if settings.kl_coef:
        with torch.no_grad():
            _, start_logits = rollout_pass(start, config, docs_BT, rollouts_BKNG, geometry, eod)
            start_log_dist = log_distribution(start_logits, settings.temperature)
        divergence = equations.kl(log_dist, start_log_dist, rollouts_BKNG, valid_BK, settings.kl_estimator)
    loss = settings.rl_coef * rl + settings.ce_coef * ce + settings.kl_coef * divergence
    return dict(log_probs=log_probs_BKNG, gold_log_probs=gold_log_probs_BT, rl_loss=rl, ce_loss=ce, kl=divergence,
                loss=loss)


def step(weights, config, docs_BT, rollouts_BKNG, settings, *, encoder, start=None, answer_mask=None,
         sampler_log_probs=None):
    """Everything one EBFT step computes on the given rollouts, up to and including the gradient of its loss.

    Args:
        weights: the policy's. `encoder` and `start` are weights of the same config. Only kl_coef needs `start`, the
            frozen policy p_ref of the KL term, which need not be the encoder.
        docs_BT: gold tokens, the whole global batch. answer_mask: bool [B, T] or None.
        sampler_log_probs: [B, K, N, G]; only importance_cap needs them.

    Returns a dict of detached tensors:
        valid [B, K]; features_rollout [B, K, N, D]; features_gold [B, K, D]; all of `energies` and of `losses`;
        grads: name -> tensor. Blocks that are not valid have all of these too; only the losses leave them out.
    """
    valid_BK = valid_blocks(docs_BT, settings.geometry, settings.eod, answer_mask)
    with torch.no_grad():
        features_BKND, features_BKD = features(
            encoder, config, docs_BT, rollouts_BKNG, settings.geometry, fractions=settings.fractions,
            norm=settings.norm, pooling=settings.pooling, eod=settings.eod)
        by_block = energies(features_BKND, features_BKD, settings)
    policy = {name: weight.detach().clone().requires_grad_() for name, weight in weights.items()}
    computed = losses(policy, config, docs_BT, rollouts_BKNG, settings, by_block["advantage"], valid_BK, start=start,
                      answer_mask=answer_mask, sampler_log_probs=sampler_log_probs)
    grads = torch.autograd.grad(computed["loss"], list(policy.values()))
    return dict(by_block, valid=valid_BK, features_rollout=features_BKND, features_gold=features_BKD,
                grads=dict(zip(policy, grads)), **{name: value.detach() for name, value in computed.items()})
