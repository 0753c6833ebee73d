"""Flags of RLVR: policy gradient with a verifier's reward on whole generations. Defaults are the paper's.

RLVR also reads --ebft-advantage, --ebft-rl-coef, --ebft-kl-coef, --ebft-kl-estimator, --ebft-importance-cap,
--ebft-top-p, --ebft-top-k, --ebft-rollout-rows and --ebft-rollout-fp8.
"""

from megatron_ebft.run.flags.flag import Flag, Group, above, at_least

RLVR = Group("RLVR", (
    Flag("--ebft-questions", str, "questions to train on, as JSON Lines (plain, gzip or Zstandard): `prompt` and the "
         "fields that the verifier reads", metavar="FILE"),
    Flag("--ebft-rlvr-num-samples", int, "n, completions of a question", default=8, valid=at_least(1)),
    Flag("--ebft-rlvr-temperature", float, "τ, temperature of the completions and of their log-probabilities",
         default=1.0, valid=above(0)),
    Flag("--ebft-max-new-tokens", int, "longest completion, in tokens", default=1024, valid=at_least(1)),
    Flag("--ebft-stop", str, "texts that end a completion, besides the end token", many=True, metavar="TEXT"),
))
