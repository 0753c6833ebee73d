"""Flags of AdamW and the learning-rate schedule."""

from megatron_ebft.run.flags.flag import Flag, Group, above, at_least

OPTIMIZER = Group("optimizer", (
    Flag("--lr", float, "highest learning rate", default=1e-6, valid=at_least(0)),
    Flag("--min-lr", float, "learning rate at the end of the decay, which is that of --train-iters",
         default=0.0, valid=at_least(0)),
    Flag("--lr-decay-style", str, "how the learning rate falls after the warm-up", default="constant",
         choices=("constant", "linear", "cosine")),
    Flag("--lr-warmup-fraction", float, "fraction of --train-iters over which the learning rate rises", default=0.03,
         valid=at_least(0, below=1)),
    Flag("--weight-decay", float, "weight decay of AdamW; biases and norms are exempt", default=0.0,
         valid=at_least(0)),
    Flag("--adam-beta1", float, "β₁ of AdamW", default=0.9, valid=at_least(0, below=1)),
    Flag("--adam-beta2", float, "β₂ of AdamW", default=0.95, valid=at_least(0, below=1)),
    Flag("--adam-eps", float, "ε of AdamW", default=1e-8, valid=above(0)),
    Flag("--clip-grad", float, "largest gradient norm (0: no clipping)", default=1.0, valid=at_least(0)),
))
