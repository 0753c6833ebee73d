"""Flags of the method: what an EBFT step computes. Files of dumped steps record all of them.

Defaults are the paper's coding settings, with the released code's choices where the two differ (joint feature norm, no
whitening).
"""

from megatron_ebft.run.flags.flag import FINITE, Flag, Group, above, at_least

METHOD = Group("EBFT", (
    Flag("--ebft-rollout-length", int, "G, tokens of a rollout", default=8, valid=at_least(1)),
    Flag("--ebft-stride", int, "s, gold tokens between anchors", default=8, valid=at_least(1)),
    Flag("--ebft-context-length", int, "c, gold tokens before the first anchor", default=8, valid=at_least(1)),
    Flag("--ebft-num-samples", int, "n, rollouts of a block", default=4, valid=at_least(1)),
    Flag("--ebft-temperature", float, "τ, temperature of sampling and of the rollouts' log-probabilities", default=0.6,
         valid=above(0)),
    Flag("--ebft-top-p", float, "sample from the most likely tokens whose probabilities add up to this (1: all)",
         default=1.0, valid=above(0, at_most=1)),
    Flag("--ebft-top-k", int, "sample from the N most likely tokens (0: all)", default=0, valid=at_least(0)),
    Flag("--ebft-feature-layers", float, "depths of the encoder layers whose hidden states make up the feature, as "
         "fractions of all layers", default=[0.25, 0.5, 0.75], many=True, metavar="FRACTION",
         valid=above(0, at_most=1)),
    Flag("--ebft-feature-norm", str, "L2-normalise the concatenated layers (joint) or each layer by itself (layer)",
         default="joint", choices=("joint", "layer")),
    Flag("--ebft-feature-pooling", str, "feature of a completion: its last token's, or the mean over its tokens",
         default="last_token", choices=("last_token", "mean")),
    Flag("--ebft-whitening", str, "whitening of a block's features. none: the exact gradient; paper: Eq. 8; released: "
         "the authors' code", default="none", choices=("none", "paper", "released")),
    Flag("--ebft-advantage", str, "baseline of a rollout within its block, or of a completion within its question's. "
         "rloo: the mean of the others. reinforce: none. group_norm: the mean of all, and divided by their standard "
         "deviation (GRPO's)", default="rloo",
         choices=("rloo", "reinforce", "group_norm")),
    Flag("--ebft-alignment-coef", float, "weight of the alignment in the reward", default=1.0, valid=FINITE),
    Flag("--ebft-diversity-coef", float, "α, weight of the diversity in the reward; 1 gives the gradient of feature "
         "matching", default=1.0, valid=FINITE),
    Flag("--ebft-rl-coef", float, "weight of the rollout loss", default=1.0, valid=at_least(0)),
    Flag("--ebft-ce-coef", float, "γ, weight of the next-token loss on gold tokens", default=0.03, valid=at_least(0)),
    Flag("--ebft-kl-coef", float, "β, weight of KL(policy ‖ start)", default=0.0, valid=at_least(0)),
    Flag("--ebft-importance-cap", float, "weight the loss of each rollout token by min(X, p of the training pass / p "
         "of the sampler) (0: no weights)", default=2.0, valid=at_least(0)),
    Flag("--ebft-kl-estimator", str, "KL of a token, where d is the log ratio. k1: d, as a score function; k2: d²/2; "
         "k3: exp(−d) − 1 + d", default="k2", choices=("k1", "k2", "k3")),
))
