"""Flags of evaluation."""

from megatron_ebft.run.flags.flag import Flag, Group, above, at_least

EVALUATION = Group("evaluation", (
    Flag("--eval-interval", int, "steps between evaluations (0: no evaluation); one runs before the first step",
         default=100, valid=at_least(0)),
    Flag("--eval-iters", int, "global batches of an evaluation, always the same rows", default=4, valid=at_least(1)),
    Flag("--ebft-eval-length", int, "evaluate CFM for completions of 1, 2, 4, … tokens, up to this many", default=64,
         valid=at_least(1)),
    Flag("--ebft-eval-questions", str, "questions that evaluation answers, as JSON Lines: `prompt` and the fields that "
         "--ebft-verifier reads. Reports the accuracy of greedy answers, in any training mode", metavar="FILE"),
    Flag("--ebft-eval-samples", int, "sampled answers of each of --ebft-eval-questions, for pass@k", default=0,
         valid=at_least(0)),
    Flag("--ebft-pass-at", int, "values of k for pass@k", many=True, valid=at_least(1),
         default_text="1 and --ebft-eval-samples"),
    Flag("--ebft-eval-temperature", float, "temperature of --ebft-eval-samples", default=1.0, valid=above(0)),
    Flag("--ebft-eval-top-p", float, "draw --ebft-eval-samples from the most likely tokens whose probabilities add up "
         "to this (1: all)", default=1.0, valid=above(0, at_most=1)),
    Flag("--ebft-eval-top-k", int, "draw --ebft-eval-samples from the N most likely tokens (0: all)", default=0,
         valid=at_least(0)),
    Flag("--ebft-track-kl", bool, "measure KL to the start at evaluation. Keeps a frozen copy of the start in memory, "
         "as --ebft-kl-coef does", default=True),
))
