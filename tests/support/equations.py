"""Rewards, advantages, losses and metrics as the paper writes them: loops over contexts and samples.

The equations are those of Jelassi et al. 2026 (arXiv 2603.12248). D x D and n x n matrices are formed where the paper
writes them. Part of the brute-force oracle: nothing here imports the package under test.

Shape suffixes: B rows, T gold tokens, K blocks, N samples, G rollout steps, D features, V vocabulary.
"""

import torch

SINGULAR_VALUE_CUTOFF = 1e-5  # of the matrix inverted (the second moment or the Gram matrix), relative to its largest
NORM_FLOOR = 1e-12  # a feature vector shorter than this is divided by this instead of by its norm
GROUP_STD_FLOOR = 1e-6


def unit(x):
    return x / x.norm(dim=-1, keepdim=True).clamp_min(NORM_FLOOR)


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
    """Rollout features and the gold feature each rollout is compared with, whitened: both [N, D]."""
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


def kl(policy_log_dist, start_log_dist, rollouts_BKNG, valid_BK, estimator="exact"):
    """KL(policy || start), mean over valid blocks' rollout tokens; log-distributions [B, K, N, G, V], both at tau.

    exact: summed over the vocabulary at every rollout token's prefix. Of the sampled tokens only, d = log p/p_ref:
    k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d. In value all but k2 are unbiased. As losses, k1's gradient is zero in
    expectation, k3's is that of KL(start || policy); only k2's and exact's are that of KL(policy || start).
    """
    difference = policy_log_dist - start_log_dist.detach()
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
