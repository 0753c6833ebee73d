"""One EBFT step, done the slow and obvious way: the oracle the real implementation is tested against.

1. Every rollout is a sequence of its own, gold prefix + rollout tokens, through a plain Llama with ordinary causal
   attention. No strided mask, no cache, no shared prefix; sequences are batched only with others of their own length.
2. A document of a packed row is a sequence of its own as well: attention and positions restart because nothing else
   is there.
3. Rewards, advantages, losses and metrics are loops over contexts and samples, straight from the paper's equations
   (Jelassi et al. 2026, arXiv 2603.12248). D x D and n x n matrices are formed where the paper writes them.
4. Nothing here imports the package under test. Clarity before speed throughout.

Shape suffixes: B rows, T gold tokens, K blocks, N samples, G rollout steps, D features, H hidden, V vocabulary,
P positions of whatever sequences a pass is given. Weights are dictionaries under Hugging Face names.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

SINGULAR_VALUE_CUTOFF = 1e-5  # of the matrix inverted (the second moment or the Gram matrix), relative to its largest
NORM_FLOOR = 1e-12  # a feature vector shorter than this is divided by this instead of by its norm
GROUP_STD_FLOOR = 1e-6


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


# ---------------------------------------------------------------- the model


def load_llama(folder) -> tuple[dict, dict]:
    """A Hugging Face Llama folder (config.json, model.safetensors) as (config, weights)."""
    folder = Path(folder)
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def random_llama(
    seed,
    *,
    layers,
    hidden,
    ffn,
    heads,
    kv_heads,
    vocab,
    rope_scaling=None,
    tied=False,
    dtype=torch.float32,
    qkv_bias=False,
) -> tuple[dict, dict]:
    """A random model as (config, weights): matrices N(0, 1/fan_in), norms about 1 but not 1, biases N(0, 0.1^2).

    `qkv_bias` adds the biases Qwen2 has. Drawn in float64, so one seed is one model whatever the dtype.
    """
    config = dict(
        architectures=["Qwen2ForCausalLM" if qkv_bias else "LlamaForCausalLM"],
        model_type="qwen2" if qkv_bias else "llama",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        hidden_act="silu",
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        rope_scaling=rope_scaling,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        dtype=str(dtype).removeprefix("torch."),
    )
    if not qkv_bias:
        config.update(attention_bias=False, mlp_bias=False)
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def matrix(rows, columns):
        return normal(rows, columns) / math.sqrt(columns)

    weights = {"model.embed_tokens.weight": matrix(vocab, hidden), "model.norm.weight": 1 + 0.1 * normal(hidden)}
    if not tied:
        weights["lm_head.weight"] = matrix(vocab, hidden)
    query_width, key_width = hidden, kv_heads * (hidden // heads)
    for i in range(layers):
        layer = f"model.layers.{i}."
        weights[layer + "input_layernorm.weight"] = 1 + 0.1 * normal(hidden)
        weights[layer + "post_attention_layernorm.weight"] = 1 + 0.1 * normal(hidden)
        for name, width in (("q", query_width), ("k", key_width), ("v", key_width)):
            weights[layer + f"self_attn.{name}_proj.weight"] = matrix(width, hidden)
            if qkv_bias:
                weights[layer + f"self_attn.{name}_proj.bias"] = 0.1 * normal(width)
        weights[layer + "self_attn.o_proj.weight"] = matrix(hidden, query_width)
        weights[layer + "mlp.gate_proj.weight"] = matrix(ffn, hidden)
        weights[layer + "mlp.up_proj.weight"] = matrix(ffn, hidden)
        weights[layer + "mlp.down_proj.weight"] = matrix(hidden, ffn)
    return config, {name: weight.to(dtype) for name, weight in weights.items()}


def at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def linear(weights, name, x):
    return F.linear(x, weights[name + ".weight"], weights.get(name + ".bias"))


def rms_norm(x, weight, eps):
    wide = at_least_float32(x)
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def rope_frequencies(config):
    """Angle per position of head_dim/2 planes, float32 as in transformers; rescaled as in Llama 3 if so configured."""
    frequencies = 1.0 / config["rope_theta"] ** (torch.arange(0, config["head_dim"], 2).float() / config["head_dim"])
    scaling = config.get("rope_scaling")
    if scaling is None:
        return frequencies
    if scaling["rope_type"] != "llama3":
        raise ValueError(f"rope_type {scaling['rope_type']!r}: only llama3 is known here")
    rescaled = []
    for frequency in frequencies:
        turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)  # within the original context
        if turns < scaling["low_freq_factor"]:
            rescaled.append(frequency / scaling["factor"])
        elif turns > scaling["high_freq_factor"]:
            rescaled.append(frequency)
        else:
            kept = (turns - scaling["low_freq_factor"]) / (scaling["high_freq_factor"] - scaling["low_freq_factor"])
            rescaled.append((1 - kept) * frequency / scaling["factor"] + kept * frequency)
    return torch.stack(rescaled)


def rotate(x, cos, sin):
    """Plane i of a head is made of its elements i and i + head_dim/2."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attention(weights, name, config, x, cos, sin):
    """Causal grouped-query attention on x [B, P, H]; query head h reads key head h // (heads / kv_heads)."""
    B, P, _ = x.shape

    def split(projection):
        heads = linear(weights, f"{name}.{projection}", x).view(B, P, -1, config["head_dim"])
        return heads.transpose(1, 2)  # [B, heads, P, head_dim]

    group = config["num_attention_heads"] // config["num_key_value_heads"]
    query = rotate(split("q_proj"), cos, sin)
    key = rotate(split("k_proj"), cos, sin).repeat_interleave(group, dim=1)
    value = split("v_proj").repeat_interleave(group, dim=1)
    scores = query @ key.transpose(-1, -2) / math.sqrt(config["head_dim"])
    future = torch.ones(P, P, dtype=torch.bool).triu(1)
    attended = at_least_float32(scores.masked_fill(future, -math.inf)).softmax(-1).to(x.dtype) @ value
    return linear(weights, f"{name}.o_proj", attended.transpose(1, 2).reshape(B, P, -1))


def forward(weights, config, tokens_BT, positions_BT=None):
    """(hidden_states, logits_BTV) of a plain causal Llama, in the weights' dtype, differentiable.

    hidden_states[i] [B, T, H] is the residual stream after decoder layer i (0: the embeddings). None is passed through
    the final norm, the last one included (transformers' last hidden state is). positions default to 0..T-1.
    """
    if positions_BT is None:
        positions_BT = torch.arange(tokens_BT.shape[1]).expand_as(tokens_BT)
    eps = config["rms_norm_eps"]
    x = weights["model.embed_tokens.weight"][tokens_BT]
    angles = positions_BT[:, None, :, None].float() * rope_frequencies(config)  # [B, 1, T, head_dim/2]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    hidden_states = [x]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        normed = rms_norm(x, weights[layer + "input_layernorm.weight"], eps)
        x = x + attention(weights, layer + "self_attn", config, normed, cos, sin)
        normed = rms_norm(x, weights[layer + "post_attention_layernorm.weight"], eps)
        gate, up = linear(weights, layer + "mlp.gate_proj", normed), linear(weights, layer + "mlp.up_proj", normed)
        x = x + linear(weights, layer + "mlp.down_proj", F.silu(gate) * up)
        hidden_states.append(x)
    head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    return hidden_states, F.linear(rms_norm(x, weights["model.norm.weight"], eps), weights[head])


def forward_sequences(weights, config, sequences):
    """Each 1-D token sequence by itself: a list of (hidden_states, logits) with the batch dimension taken off."""
    by_length = {}
    for index, sequence in enumerate(sequences):
        by_length.setdefault(len(sequence), []).append(index)
    outputs = [None] * len(sequences)
    for indices in by_length.values():
        hidden_states, logits = forward(weights, config, torch.stack([sequences[i] for i in indices]))
        for row, index in enumerate(indices):
            outputs[index] = [h[row] for h in hidden_states], logits[row]
    return outputs


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


def unit(x):
    return x / x.norm(dim=-1, keepdim=True).clamp_min(NORM_FLOOR)


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


# ---------------------------------------------------------------- rewards and advantages of one context


def inverse_root(matrix):
    """(M†)^{1/2} of a symmetric positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    result = torch.zeros_like(matrix)
    for value, vector in zip(values, vectors.T):
        if value > SINGULAR_VALUE_CUTOFF * values.max():
            result += torch.outer(vector, vector) / value.sqrt()
    return result


def whiten(X_ND, y_D, kind="none"):
    """Rollout features and the reference each rollout is compared with, whitened: both [N, D]."""
    n = X_ND.shape[0]
    Y_ND = torch.stack([y_D] * n)
    if kind == "none":
        return X_ND, Y_ND
    if kind == "paper":  # Eq. 8: over features, by the uncentred second moment
        W_DD = inverse_root(X_ND.T @ X_ND / n)
        return X_ND @ W_DD, Y_ND @ W_DD
    if kind == "released":  # over rollouts
        W_NN = inverse_root(X_ND @ X_ND.T)
        return W_NN @ X_ND, W_NN @ Y_ND
    raise ValueError(f"whitening {kind!r}: none, paper or released")


def rewards(X_ND, y_D, alpha=1.0, whitening="none"):
    """(alignment, diversity, reward) of one context's rollouts, [N] each; factors of 2 included.

    alignment_j = 2 cos(x_j, y_j);  diversity_j = 2/(n-1) sum_{i != j} x_j . x_i (0 for n = 1);
    reward_j = alignment_j - alpha diversity_j.
    """
    X_ND, Y_ND = whiten(X_ND, y_D, whitening)
    n = X_ND.shape[0]
    alignment, diversity = X_ND.new_zeros(n), X_ND.new_zeros(n)
    for j in range(n):
        alignment[j] = 2 * torch.dot(unit(X_ND[j]), unit(Y_ND[j]))
        for i in range(n):
            if i != j:
                diversity[j] += 2 / (n - 1) * torch.dot(X_ND[j], X_ND[i])
    return alignment, diversity, alignment - alpha * diversity


def advantages(alignment_N, diversity_N, alpha=1.0, kind="rloo"):
    """Advantages of one context's rollouts, [N].

    rloo: reward minus the others' mean reward, their diversity counted as if j were not there (n >= 2; for n = 2 a lone
    other has no diversity). reinforce: the reward. group_norm: (r - mean) / (std + 1e-6), the population standard
    deviation of the n samples (unbiased=False).
    """
    n = alignment_N.shape[0]
    reward_N = alignment_N - alpha * diversity_N
    if kind == "reinforce":
        return reward_N
    if kind == "group_norm":
        return (reward_N - reward_N.mean()) / (reward_N.std(unbiased=False) + GROUP_STD_FLOOR)
    if kind != "rloo":
        raise ValueError(f"advantage {kind!r}: rloo, reinforce or group_norm")
    if n < 2:
        raise ValueError("rloo needs at least two samples")
    result = torch.zeros_like(reward_N)
    for j in range(n):
        alignment_baseline = (alignment_N.sum() - alignment_N[j]) / (n - 1)
        diversity_baseline = (diversity_N.sum() - 2 * diversity_N[j]) / (n - 2) if n > 2 else 0.0
        result[j] = reward_N[j] - (alignment_baseline - alpha * diversity_baseline)
    return result


def cfm_biased(X_ND, y_D):
    """|| mean_j x_j - y ||^2 of one context, on features as they are (not whitened)."""
    return (X_ND.mean(0) - y_D).pow(2).sum()


def cfm_unbiased(X_ND, y_D):
    """sum_{i != j} x_i . x_j / (n(n-1)) - (2/n) sum_i x_i . y + ||y||^2 of one context; needs n >= 2."""
    n = X_ND.shape[0]
    pairs = sum(torch.dot(X_ND[i], X_ND[j]) for i in range(n) for j in range(n) if i != j)
    return pairs / (n * (n - 1)) - 2 / n * sum(torch.dot(x, y_D) for x in X_ND) + torch.dot(y_D, y_D)


# ---------------------------------------------------------------- losses


def rl_loss(log_probs_BKNG, advantages_BKN, valid_BK, importance_BKNG=None):
    """-mean over valid blocks' rollout tokens of A * exp(logp - stopgrad(logp)) (* importance); 0 if no block is valid.

    Its value is -mean A, its gradient -mean A grad logp.
    """
    total, count = log_probs_BKNG.sum() * 0, 0
    B, K, N, G = log_probs_BKNG.shape
    for b in range(B):
        for k in range(K):
            if not valid_BK[b, k]:
                continue
            for j in range(N):
                log_probs_G = log_probs_BKNG[b, k, j]
                terms_G = advantages_BKN[b, k, j].detach() * (log_probs_G - log_probs_G.detach()).exp()
                if importance_BKNG is not None:
                    terms_G = terms_G * importance_BKNG[b, k, j].detach()
                total, count = total + terms_G.sum(), count + G
    return -total / max(count, 1)


def truncated_importance(log_probs, sampler_log_probs, cap):
    """min(p_train / p_sampler, C), detached."""
    return (log_probs.detach() - sampler_log_probs).exp().clamp_max(cap)


def ce_loss(gold_log_probs_BT, counted_BT):
    """-mean of the gold log-probabilities [B, T-1] (of tokens 1..T-1) that count; 0 if none does."""
    counted = gold_log_probs_BT[counted_BT]
    return -counted.sum() / max(counted.numel(), 1)


def ce_mask(docs_BT, eod=None, answer_mask=None, document_starts=True):
    """Which of the tokens 1..T-1 the cross-entropy counts, bool [B, T-1]."""
    counted_BT = torch.ones_like(docs_BT, dtype=torch.bool) if answer_mask is None else answer_mask.bool().clone()
    if not document_starts:
        for b, row_T in enumerate(docs_BT):
            ids = document_ids(row_T, eod)
            for t in range(1, len(ids)):
                counted_BT[b, t] &= ids[t] == ids[t - 1]
    return counted_BT[:, 1:]


def kl(policy_log_dist, reference_log_dist, rollouts_BKNG, valid_BK, estimator="exact"):
    """KL(policy || reference), mean over valid blocks' rollout tokens; log-distributions [B, K, N, G, V], both at tau.

    exact: summed over the vocabulary at every rollout token's prefix. Of the sampled tokens only, d = log p/p_ref:
    k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d. In value all but k2 are unbiased. As losses, k1's gradient is zero in
    expectation, k3's is that of KL(reference || policy); only k2's and exact's are that of KL(policy || reference).
    """
    difference = policy_log_dist - reference_log_dist.detach()
    if estimator == "exact":
        kl_BKNG = (policy_log_dist.exp() * difference).sum(-1)
    else:
        d = difference.gather(-1, rollouts_BKNG[..., None]).squeeze(-1)
        estimators = {"k1": d, "k2": d.pow(2) / 2, "k3": (-d).exp() - 1 + d}
        if estimator not in estimators:
            raise ValueError(f"kl_estimator {estimator!r}: exact, k1, k2 or k3")
        kl_BKNG = estimators[estimator]
    counted = kl_BKNG[valid_BK]
    return counted.sum() / max(counted.numel(), 1)


# ---------------------------------------------------------------- the step


def step(
    weights,
    config,
    docs_BT,
    rollouts_BKNG,
    settings,
    *,
    encoder,
    reference=None,
    answer_mask=None,
    sampler_log_probs=None,
):
    """Everything one EBFT step computes on the given rollouts, up to and including the gradient of its loss.

    Args:
        weights: the policy. `encoder` and `reference` are weights of the same config; reference (p_ref of the KL) is
            needed only with kl_coef, and is the policy's start, which need not be the encoder.
        docs_BT: gold tokens, the whole global batch. answer_mask: bool [B, T] or None.
        sampler_log_probs: [B, K, N, G], needed only with importance_cap.

    Returns a dict of detached tensors:
        valid [B, K]; features_rollout [B, K, N, D]; features_gold [B, K, D];
        alignment, diversity, reward, advantage [B, K, N]; cfm_biased, cfm_unbiased [B, K] (unbiased: nan for n = 1);
        log_probs [B, K, N, G] at tau; gold_log_probs [B, T-1] at 1;
        rl_loss, ce_loss, kl (0 without kl_coef), loss; grads: name -> tensor.
        Blocks that are not valid have all of these too; only the losses leave them out.
    """
    geometry, eod = settings.geometry, settings.eod
    valid_BK = valid_blocks(docs_BT, geometry, eod, answer_mask)

    with torch.no_grad():
        features_BKND, features_BKD = features(
            encoder,
            config,
            docs_BT,
            rollouts_BKNG,
            geometry,
            fractions=settings.fractions,
            norm=settings.norm,
            pooling=settings.pooling,
            eod=eod,
        )
        names = ("alignment", "diversity", "reward", "advantage", "cfm_biased", "cfm_unbiased")
        per_block = {name: [] for name in names}
        for X_ND, y_D in zip(features_BKND.flatten(0, 1), features_BKD.flatten(0, 1)):
            alignment_N, diversity_N, reward_N = rewards(X_ND, y_D, settings.alpha, settings.whitening)
            per_block["alignment"].append(alignment_N)
            per_block["diversity"].append(diversity_N)
            per_block["reward"].append(reward_N)
            per_block["advantage"].append(advantages(alignment_N, diversity_N, settings.alpha, settings.advantage))
            per_block["cfm_biased"].append(cfm_biased(X_ND, y_D))
            per_block["cfm_unbiased"].append(cfm_unbiased(X_ND, y_D) if len(X_ND) > 1 else y_D.new_tensor(math.nan))
        per_block = {name: torch.stack(values).unflatten(0, valid_BK.shape) for name, values in per_block.items()}

    policy = {name: weight.detach().clone().requires_grad_() for name, weight in weights.items()}
    _, logits = rollout_pass(policy, config, docs_BT, rollouts_BKNG, geometry, eod)
    log_dist = log_distribution(logits, settings.temperature)
    log_probs_BKNG = log_dist.gather(-1, rollouts_BKNG[..., None]).squeeze(-1)
    gold_log_probs_BT = gold_log_probs(policy, config, docs_BT, eod)

    importance = None
    if settings.importance_cap is not None:
        importance = truncated_importance(log_probs_BKNG, sampler_log_probs, settings.importance_cap)
    rl = rl_loss(log_probs_BKNG, per_block["advantage"], valid_BK, importance)
    ce = ce_loss(gold_log_probs_BT, ce_mask(docs_BT, eod, answer_mask, settings.ce_document_starts))
    divergence = torch.zeros_like(rl)
    if settings.kl_coef:
        with torch.no_grad():
            _, reference_logits = rollout_pass(reference, config, docs_BT, rollouts_BKNG, geometry, eod)
            reference_log_dist = log_distribution(reference_logits, settings.temperature)
        divergence = kl(log_dist, reference_log_dist, rollouts_BKNG, valid_BK, settings.kl_estimator)
    loss = settings.rl_coef * rl + settings.ce_coef * ce + settings.kl_coef * divergence
    grads = torch.autograd.grad(loss, list(policy.values()))

    return dict(
        per_block,
        valid=valid_BK,
        features_rollout=features_BKND,
        features_gold=features_BKD,
        log_probs=log_probs_BKNG.detach(),
        gold_log_probs=gold_log_probs_BT.detach(),
        rl_loss=rl.detach(),
        ce_loss=ce.detach(),
        kl=divergence.detach(),
        loss=loss.detach(),
        grads=dict(zip(policy, grads)),
    )
