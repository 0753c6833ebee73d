"""Flags of the architecture. --use-checkpoint-args fills them in from a checkpoint."""

from megatron_ebft.run.flags.flag import Flag, Group, above, at_least

MODEL = Group("model", (
    Flag("--num-layers", int, "number of decoder layers", valid=at_least(1)),
    Flag("--hidden-size", int, "width of the residual stream", valid=at_least(1)),
    Flag("--ffn-hidden-size", int, "width of the MLP", valid=at_least(1),
         default_text="4 × hidden size; with --swiglu 8/3 of it, rounded up to a multiple of 64"),
    Flag("--num-attention-heads", int, "number of query heads", valid=at_least(1)),
    Flag("--num-query-groups", int, "number of key/value heads", valid=at_least(1),
         default_text="number of query heads"),
    Flag("--kv-channels", int, "dimension of a head", valid=at_least(1), default_text="hidden size / heads"),
    Flag("--max-position-embeddings", int, "longest sequence the model supports", valid=at_least(1),
         default_text="--seq-length"),
    Flag("--position-embedding-type", str, "how positions enter the model", default="rope",
         choices=("rope", "learned_absolute", "none")),
    Flag("--rotary-base", float, "base of the rotary frequencies", default=10000.0, valid=above(0)),
    Flag("--rotary-percent", float, "fraction of a head that is rotated", default=1.0, valid=above(0, at_most=1)),
    Flag("--use-rope-scaling", bool, "scale the rotary frequencies as Llama 3 does", default=False),
    Flag("--rope-scaling-factor", float, "factor of --use-rope-scaling", default=8.0, valid=above(0)),
    Flag("--rope-low-freq-factor", float, "lower cut-off of --use-rope-scaling, in turns over the original context",
         default=1.0, valid=above(0)),
    Flag("--rope-high-freq-factor", float, "upper cut-off of --use-rope-scaling, in turns over the original context",
         default=4.0, valid=above(0)),
    Flag("--rope-original-max-position-embeddings", int, "original context of --use-rope-scaling, in tokens",
         default=8192, valid=at_least(1)),
    Flag("--normalization", str, "kind of norm", default="RMSNorm", choices=("RMSNorm", "LayerNorm")),
    Flag("--norm-epsilon", float, "added under the square root of a norm", default=1e-5, valid=above(0)),
    Flag("--swiglu", bool, "gated MLP with SiLU; without it GELU", default=True),
    Flag("--add-bias-linear", bool, "biases in linear layers", default=False),
    Flag("--add-qkv-bias", bool, "biases of Q, K and V (Qwen2)", default=False),
    Flag("--qk-layernorm", bool, "norms of Q and K (Qwen3)", default=False),
    Flag("--untie-embeddings-and-output-weights", bool, "output head with its own weights", default=False),
    Flag("--make-vocab-size-divisible-by", int, "pad the embedding to a multiple of this number × tensor-parallel "
         "size; the padding is never predicted", default=128, valid=at_least(1)),
    Flag("--init-method-std", float, "standard deviation of the initial weights", default=0.02, valid=above(0)),
))
