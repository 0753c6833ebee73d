"""Flags of precision, kernels and memory. They change speed, memory and rounding, not the method."""

from megatron_ebft.run.flags.flag import Flag, Group, at_least

COMPLETIONS = 64
"""Completions that decode together on a rank without --ebft-rollout-rows."""
PRECISION = Group("precision, kernels and memory", (
    Flag("--bf16", bool, "weights and activations in bfloat16; the optimizer and sampling stay in float32",
         default=False),
    Flag("--transformer-impl", str, "layers of Transformer Engine or of Megatron-Core (local). auto: Transformer "
         "Engine with CUDA and --bf16. `python -m megatron_ebft.environment` shows what this machine has",
         default="auto", choices=("auto", "transformer_engine", "local")),
    Flag("--ebft-attention", str, "FlexAttention, or torch's SDPA in chunks. auto: FlexAttention on GPUs",
         default="auto", choices=("auto", "flex", "sdpa")),
    Flag("--ebft-step", str, "fused: the forward pass that samples the rollouts of a micro-batch is the one that is "
         "differentiated, which saves a forward pass. separate: sampling and training are passes of their own, needed "
         "for pipeline stages, recomputation, FP8 of the policy and replayed steps. auto: fused where possible, but "
         "separate on GPUs, where fused is not measured yet. Both have the same gradient, up to rounding",
         default="auto",
         choices=("auto", "fused", "separate")),
    Flag("--deterministic-mode", bool, "use GPU kernels that add in a fixed order, so that an interrupted run ends "
         "with the same weights, bit for bit. SDPA then takes more memory and time; FlexAttention does not",
         default=False),
    Flag("--recompute-granularity", str, "recompute activations in the backward pass: of whole layers (full) or of "
         "attention only (selective)", choices=("full", "selective", "none"), default_text="none"),
    Flag("--ebft-blocks-per-microbatch", int, "number of blocks of a row that go through the encoder and the training "
         "pass together (0: all). A smaller value saves memory for long rows; the result is the same. In a fused step "
         "each such part also samples by itself, and repeats the pass over the gold tokens", default=0,
         valid=at_least(0)),
    Flag("--ebft-rollout-rows", int, "number of rows that a rank decodes together (0: all; with pipeline stages, one "
         "group of rows per stage); of completions in rlvr and for --ebft-eval-questions (0: "
         f"{COMPLETIONS}). A smaller value saves key-value cache; the result is the same. A fused step decodes the "
         "rows of a micro-batch together", default=0, valid=at_least(0)),
    Flag("--ebft-skip-duplicates", bool, "compute identical rollouts of a block once, and in a fused step also what "
         "rollouts of a block have in common, up to the first token that differs. Skip rollouts that cannot change the "
         "gradient: those of blocks that do not count and, without a KL term and in separate passes, those with zero "
         "advantage. Loss and gradient stay the same. Runs that dump or replay steps skip nothing",
         default=True),
))
