"""Flags of FP8 in rollouts, in the encoder and in the training pass."""

from megatron_ebft.run.flags.flag import Flag, Group, at_least

RECIPES = ("blockwise", "tensorwise")
_HELP = (" in FP8. blockwise rounds less. tensorwise is faster, but one scale serves all rows that are computed "
         "together, so rounding depends on the micro-batches and on --ebft-skip-duplicates")

FP8 = Group("FP8", (
    Flag("--ebft-rollout-fp8", str, "run the policy's linear layers during sampling" + _HELP, default="off",
         choices=("off", *RECIPES)),
    Flag("--ebft-encoder-fp8", str, "run the encoder's linear layers during training" + _HELP, default="off",
         choices=("off", *RECIPES)),
    Flag("--ebft-fp8-emulate", bool, "round to FP8 and multiply in the usual precision: the same numbers on any "
         "hardware, slowly", default=False),
    Flag("--fp8-format", str, "run the policy's linear layers in the training pass in FP8, by Transformer Engine. "
         "e4m3: both directions. hybrid: e4m3 forward, e5m2 backward", choices=("e4m3", "hybrid"),
         default_text="no FP8 in training"),
    Flag("--fp8-recipe", str, "scaling of --fp8-format. Delayed scaling is not supported, since its history would have "
         "to be saved", default="blockwise", choices=RECIPES),
    Flag("--first-last-layers-bf16", bool, "keep the first and last layers out of FP8", default=False),
    Flag("--num-layers-at-start-in-bf16", int, "number of layers kept out of FP8 at the start, with "
         "--first-last-layers-bf16", default=1, valid=at_least(0)),
    Flag("--num-layers-at-end-in-bf16", int, "number of layers kept out of FP8 at the end, with "
         "--first-last-layers-bf16; in the encoder, counted from its deepest feature layer", default=1,
         valid=at_least(0)),
))
