"""The command line, and from it the typed configurations the rest of the code takes.

Megatron's flag names where Megatron has the thing; `--ebft-…` for what only EBFT has. Defaults are the paper's coding
settings, with the released code's choices where they differ (joint feature norm, no whitening). Whatever can be refused
from the flags alone is refused here, before any file is read or GPU taken.
"""

import argparse
import dataclasses
import math

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig

from megatron_ebft.data.tokenizer import TOKENIZER_TYPES
from megatron_ebft.layout.strided import ROW_SIZES, StridedLayout
from megatron_ebft.method import energy, losses
from megatron_ebft.method.ebft import EBFTConfig
from megatron_ebft.method.features import FEATURE_NORMS, POOLINGS, FeatureMap
from megatron_ebft.model import flex_attention, kernels
from megatron_ebft.model.architecture import ModelArgs, feature_layers, split_layers
from megatron_ebft.rollout.sampler import SamplingConfig
from megatron_ebft.run.fp8_flags import add_fp8, check_fp8_sizes, fp8_config, fp8_recipes, row_multiple, training_fp8

NO_EXPERTS = "mixture-of-experts models are not supported"
NO_FSDP = "use the distributed optimizer with tensor and pipeline parallelism"
UNSUPPORTED = {
    "--context-parallel-size": "the strided attention needs whole rows; share long rows out with --sequence-parallel, "
                               "--ebft-blocks-per-microbatch or --ebft-sample-parallel-size",
    "--expert-model-parallel-size": NO_EXPERTS,
    "--expert-tensor-parallel-size": NO_EXPERTS,
    "--num-experts": NO_EXPERTS,
    "--multi-latent-attention": "the strided attention has no latent form",
    "--mtp-num-layers": "multi-token prediction is not part of the method",
    "--use-megatron-fsdp": NO_FSDP,
    "--use-torch-fsdp2": NO_FSDP,
    "--pipeline-model-parallel-layout": "use --decoder-first-pipeline-num-layers and "
                                        "--decoder-last-pipeline-num-layers",
    "--num-layers-per-virtual-pipeline-stage": "use --num-virtual-stages-per-pipeline-rank",
    "--fp16": "use --bf16",
    "--fp8-param-gather": "weights stay in bf16, which rollouts and checkpoints read",
}
"""Megatron's flags that are refused by name, and what to do instead. Parallel sizes of 1 pass."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are ValueErrors of one line."""

    def error(self, message: str):
        raise ValueError(f"{message}; --help lists all flags")


def build_parser() -> argparse.ArgumentParser:
    """All flags of `python -m megatron_ebft.train`."""
    parser = Parser(
        prog="torchrun --nproc-per-node N -m megatron_ebft.train", allow_abbrev=False,
        description="Energy-Based Fine-Tuning (and plain next-token training) of language models on Megatron-Core.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    _add_run(parser.add_argument_group("run"))
    _add_model(parser.add_argument_group("model"))
    _add_data(parser.add_argument_group("data"))
    _add_optimizer(parser.add_argument_group("optimizer"))
    add_machine(parser.add_argument_group("parallelism, precision and memory"))
    _add_checkpoint(parser.add_argument_group("checkpoints"))
    _add_logging(parser.add_argument_group("evaluation and logging"))
    add_fp8(parser.add_argument_group("FP8"))
    ebft = parser.add_argument_group("EBFT")
    _add_ebft(ebft)
    ebft.add_argument(
        "--ebft-skip-duplicates", action=argparse.BooleanOptionalAction, default=True, help="encoder and training pass "
        "compute identical rollouts of a block once, and leave out those that change nothing: of blocks that do not "
        "count, and in training without a KL term those whose advantage is zero. The loss and the gradient stay the "
        "same; runs that dump or replay steps leave nothing out, so that files are complete")
    _add_steps(parser.add_argument_group("dumped steps"))
    return parser


def _add_run(group):
    add = group.add_argument
    add("--training-mode", choices=("ebft", "sft"), default="ebft",
        help="ebft: energy-based fine-tuning; sft: next-token training on the same rows, also from scratch")
    add("--train-iters", type=int, required=True, help="optimizer steps in all, those before a resume included")
    add("--micro-batch-size", type=int, default=1, help="rows of a micro-batch on one rank; bounds memory")
    add("--global-batch-size", type=int, default=16, help="rows of a step over all ranks")
    add("--seed", type=int, default=1234, help="of initial weights, data order and rollouts")
    add("--exit-duration-in-mins", type=float, help="save and stop (exit code 75) before the process is this old; "
        "SIGUSR1 and SIGTERM stop it in the same way")
    add("--ebft-stop-file", metavar="FILE", help="save and stop (exit code 75) when this file exists")


def _add_model(group):
    add = group.add_argument
    add("--num-layers", type=int, help="decoder layers")
    add("--hidden-size", type=int, help="width of the residual stream")
    add("--ffn-hidden-size", type=int, help="width of the MLP; default: 4 × hidden size, or 8/3 of it with --swiglu, "
        "rounded up to a multiple of 64")
    add("--num-attention-heads", type=int, help="query heads")
    add("--num-query-groups", type=int, help="key/value heads; default: as many as query heads")
    add("--kv-channels", type=int, help="dimension of a head; default: hidden size / heads")
    add("--max-position-embeddings", type=int, help="longest sequence the model is for; default: --seq-length")
    add("--position-embedding-type", choices=("rope", "learned_absolute", "none"), default="rope", help="positions")
    add("--rotary-base", type=float, default=10000.0, help="base of the rotary frequencies")
    add("--rotary-percent", type=float, default=1.0, help="share of a head that is rotated")
    add("--use-rope-scaling", action="store_true", help="Llama 3's scaling of the rotary frequencies")
    add("--rope-scaling-factor", type=float, default=8.0, help="its factor")
    add("--rope-low-freq-factor", type=float, default=1.0, help="its lower cut-off, in turns of the original context")
    add("--rope-high-freq-factor", type=float, default=4.0, help="its upper cut-off")
    add("--rope-original-max-position-embeddings", type=int, default=8192, help="its original context")
    add("--normalization", choices=("RMSNorm", "LayerNorm"), default="RMSNorm", help="kind of norm")
    add("--norm-epsilon", type=float, default=1e-5, help="added under the norm's square root")
    add("--swiglu", action=argparse.BooleanOptionalAction, default=True, help="gated MLP with SiLU (else GELU)")
    add("--add-bias-linear", action=argparse.BooleanOptionalAction, default=False, help="biases in linear layers")
    add("--add-qkv-bias", action=argparse.BooleanOptionalAction, default=False, help="biases of Q, K, V (Qwen2)")
    add("--qk-layernorm", action=argparse.BooleanOptionalAction, default=False, help="norms of Q and K (Qwen3)")
    add("--untie-embeddings-and-output-weights", action=argparse.BooleanOptionalAction, default=False,
        help="an output head of its own")
    add("--make-vocab-size-divisible-by", type=int, default=128, help="the embedding is padded to a multiple of this "
        "× tensor-parallel size; ids that do not exist are never predicted")
    add("--init-method-std", type=float, default=0.02, help="standard deviation of initial weights")


def _add_data(group):
    add = group.add_argument
    add("--data-path", nargs="+", metavar="PREFIX", help="datasets made by tools/preprocess_data.py: one, several, or "
        "a weight before each")
    add("--split", help="weights of training, validation and test documents of --data-path; default 969,30,1")
    for kind in ("train", "valid"):
        add(f"--{kind}-data-path", nargs="+", metavar="PREFIX", help=f"instead of --data-path, for the {kind} split")
    add("--data-cache-path", help="folder for dataset indices; default: beside each dataset")
    add("--seq-length", type=int, default=1024, help="T, gold tokens of a row")
    add("--tokenizer-type", choices=TOKENIZER_TYPES, default="HuggingFaceTokenizer", help="kind of tokenizer")
    add("--tokenizer-model", help="SentencePiece model file, or Hugging Face tokenizer folder")
    add("--vocab-size", type=int, help="ids of the NullTokenizer, or more ids than the tokenizer has")
    add("--ebft-document-mask", action=argparse.BooleanOptionalAction, default=False,
        help="documents of a row do not see each other: attention and positions restart, blocks stay within one")
    add("--ebft-answer-only", action=argparse.BooleanOptionalAction, default=False,
        help="only answer tokens are trained on: blocks whose completion is all answer, cross entropy of answers")


def _add_optimizer(group):
    add = group.add_argument
    add("--lr", type=float, default=1e-6, help="highest learning rate")
    add("--min-lr", type=float, default=0.0, help="learning rate at the end of the decay")
    add("--lr-decay-style", choices=("constant", "linear", "cosine"), default="constant", help="after the warm-up")
    add("--lr-warmup-fraction", type=float, default=0.03, help="share of --train-iters with rising learning rate")
    add("--weight-decay", type=float, default=0.0, help="AdamW's, not on biases and norms")
    add("--adam-beta1", type=float, default=0.9, help="AdamW's")
    add("--adam-beta2", type=float, default=0.95, help="AdamW's")
    add("--adam-eps", type=float, default=1e-8, help="AdamW's")
    add("--clip-grad", type=float, default=1.0, help="largest gradient norm; 0: no clipping")


def add_machine(group):
    """Flags of parallelism, precision and memory, which tools that run a model take as well."""
    add = group.add_argument
    add("--tensor-model-parallel-size", type=int, default=1, help="ranks that share each layer")
    add("--sequence-parallel", action="store_true", help="tensor ranks also share the tokens between layers: less "
        "memory, the same communication; needs a tensor-parallel size above 1")
    add("--pipeline-model-parallel-size", type=int, default=1, help="ranks that share the layers, a stage each")
    add("--num-virtual-stages-per-pipeline-rank", type=int, default=1, help="times a micro-batch goes round the "
        "pipeline in training (interleaved schedule): more than 1 shortens its bubble")
    add("--decoder-first-pipeline-num-layers", type=int, help="layers of the first stage, where not an equal share")
    add("--decoder-last-pipeline-num-layers", type=int, help="layers of the last stage, where not an equal share")
    add("--ebft-sample-parallel-size", type=int, default=1, help="data-parallel ranks that take the same documents and "
        "share out their rollouts; for numbers of samples that one rank cannot hold")
    for flag in UNSUPPORTED:
        add(flag, nargs="?", const="on", help=argparse.SUPPRESS)
    add("--transformer-impl", choices=kernels.TRANSFORMER_IMPLS, default="auto", help="layers: Transformer "
        "Engine's or Megatron-Core's own; auto: the former with CUDA and --bf16 (`python -m megatron_ebft.environment` "
        "says what there is)")
    add("--ebft-attention", choices=kernels.ATTENTIONS, default="auto", help="FlexAttention, or torch's SDPA in "
        "chunks; auto: the former on GPUs")
    add("--bf16", action="store_true", help="weights and activations in bfloat16; optimizer and sampling in float32")
    add("--deterministic-mode", action="store_true", help="on a GPU, kernels that add up in a fixed order: an "
        "interrupted run ends with the same weights, bit for bit, as an uninterrupted one. SDPA then takes more memory "
        "and time (FlexAttention does not)")
    add("--recompute-granularity", choices=("full", "selective"), help="recompute activations in the backward pass: "
        "whole layers, or only attention")
    add("--overlap-grad-reduce", action=argparse.BooleanOptionalAction, default=False,
        help="reduce gradients while the backward pass still runs")
    add("--ebft-blocks-per-microbatch", type=int, default=0, help="blocks of a row that train (and are embedded) "
        "together, 0: all; bounds memory of long rows without changing the result")
    add("--ebft-rollout-rows", type=int, default=0, help="rows of a rank that decode together, 0: all "
        "(with pipeline stages: a group of rows for each); bounds memory "
        "of the key-value cache without changing the result")
    add("--distributed-timeout-minutes", type=int, default=10, help="a rank that stands still for longer than this in "
        "a step is named, and the run ends; starting and saving may take six times as long")


def _add_checkpoint(group):
    add = group.add_argument
    add("--save", help="folder for checkpoints")
    add("--save-interval", type=int, default=100, help="steps between checkpoints; there is one at the end, too")
    add("--async-save", action="store_true", help="training goes on while checkpoints are written")
    add("--ebft-keep-checkpoints", type=int, default=0, help="the newest so many stay, 0: all; those that a run "
        "which went back has left ahead of it go, too")
    add("--save-retain-interval", type=int, default=0, help="with --ebft-keep-checkpoints, those of every so many "
        "steps stay as well, 0: none")
    add("--load", help="folder to continue from, bit for bit; where it holds none yet, the run starts afresh, and "
        "where it holds weights alone (tools/convert), from these")
    add("--pretrained-checkpoint", help="folder with the weights to start from, a run's or a converted model's; also "
        "the encoder's, by default")
    add("--ebft-encoder-load", help="folder with the encoder's weights, where it is not the starting policy (for an "
        "SFT start: the base model)")
    add("--override-opt-param-scheduler", action="store_true", help="on resume, the flags' learning-rate schedule "
        "replaces the checkpoint's; without it a different one is refused")
    add("--use-checkpoint-opt-param-scheduler", action="store_true", help="on resume, keep the checkpoint's schedule")
    add("--use-checkpoint-args", action="store_true",
        help="take the architecture from --load or --pretrained-checkpoint, and the tokenizer unless "
        "--tokenizer-model names one")


def _add_logging(group):
    add = group.add_argument
    add("--eval-interval", type=int, default=100, help="steps between evaluations, 0: none; also before the first step")
    add("--eval-iters", type=int, default=4, help="global batches of an evaluation, always the same rows")
    add("--log-interval", type=int, default=1, help="steps between console and TensorBoard lines")
    add("--tensorboard-dir", help="default: `tensorboard` in --save, or in the working folder")
    add("--ebft-eval-length", type=int, default=64, help="CFM is evaluated for completions of 1, 2, 4, … up to this")
    add("--ebft-track-kl", action=argparse.BooleanOptionalAction, default=True, help="measure KL to the starting "
        "policy at evaluation; keeps a frozen copy of it, as a KL coefficient does")


def _add_ebft(group):
    add = group.add_argument
    add("--ebft-rollout-length", type=int, default=8, help="G, tokens of a rollout")
    add("--ebft-stride", type=int, default=8, help="s, gold tokens between anchors")
    add("--ebft-context-length", type=int, default=8, help="c, gold tokens before the first anchor")
    add("--ebft-num-samples", type=int, default=4, help="n, rollouts of a block")
    add("--ebft-temperature", type=float, default=0.6, help="τ, of sampling and of the rollouts' log-probabilities")
    add("--ebft-top-p", type=float, default=1.0, help="sample from the most likely tokens of this mass; 1: all")
    add("--ebft-top-k", type=int, default=0, help="sample from this many most likely tokens; 0: all")
    add("--ebft-feature-layers", type=float, nargs="+", default=[0.25, 0.5, 0.75], metavar="FRACTION",
        help="depths of the encoder whose hidden states are the feature")
    add("--ebft-feature-norm", choices=FEATURE_NORMS, default="joint", help="one L2 norm of the concatenation, or one "
        "for each layer")
    add("--ebft-feature-pooling", choices=POOLINGS, default="last_token", help="of a completion's tokens")
    add("--ebft-whitening", choices=energy.WHITENING, default="none", help="of a block's features: none is the exact "
        "gradient, paper is its Eq. 8, released is the authors' code")
    add("--ebft-advantage", choices=energy.ADVANTAGES, default="rloo", help="baseline within a block's rollouts")
    add("--ebft-alignment-coef", type=float, default=1.0, help="weight of the alignment in the reward")
    add("--ebft-diversity-coef", type=float, default=1.0, help="α, weight of the diversity in the reward; 1 is the "
        "gradient of feature matching")
    add("--ebft-rl-coef", type=float, default=1.0, help="weight of the rollout loss")
    add("--ebft-ce-coef", type=float, default=0.03, help="γ, weight of the next-token loss on gold tokens")
    add("--ebft-kl-coef", type=float, default=0.0, help="β, weight of KL(policy ‖ starting policy)")
    add("--ebft-importance-cap", type=float, default=2.0, help="each rollout token's loss is weighted by min(p of the "
        "training pass / p of the sampler, this); 0: not weighted")
    add("--ebft-kl-estimator", choices=losses.KL_ESTIMATORS, default="k2", help="per token, d = log ratio: d (score "
        "function), d²/2, or exp(−d) − 1 + d")


def _add_steps(group):
    add = group.add_argument
    add("--ebft-dump-steps", metavar="DIR", help="write steps to DIR/step_0000012.safetensors: rows, rollouts and what "
        "became of them (no features, no gradients: tools/replay.py computes those). A step that fails is written in "
        "any case, to `failed_steps` in --save where this is not given")
    add("--ebft-dump-interval", type=int, default=1, help="steps between dumps")
    add("--ebft-replay-steps", metavar="DIR", help="take rows and rollouts from the steps dumped there, instead of the "
        "next rows of the data and of sampling; the data are still evaluated on")


def method_flags(args: argparse.Namespace) -> dict:
    """Values of the flags that say what an EBFT step computes, by name."""
    parser = Parser()
    _add_ebft(parser)
    return {name: vars(args)[name] for name in ("seq_length", *vars(parser.parse_args([])))}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the flags; raises as `check_args`."""
    return check_args(build_parser().parse_args(argv))


def check_args(args: argparse.Namespace) -> argparse.Namespace:
    """The same flags, if nothing about them alone is wrong.

    Raises:
        ValueError: naming the flag that cannot be right.
    """
    for flag, why in UNSUPPORTED.items():
        value = vars(args)[flag[2:].replace("-", "_")]
        if value is not None and not (value == "1" and flag.endswith("-parallel-size")):
            raise ValueError(f"{flag}{'' if value == 'on' else ' ' + value}: {why}")
    for flag in ("train_iters", "micro_batch_size", "global_batch_size", "seq_length", "save_interval", "log_interval",
                 "eval_iters", "ebft_eval_length", "distributed_timeout_minutes", "tensor_model_parallel_size",
                 "pipeline_model_parallel_size", "num_virtual_stages_per_pipeline_rank", "ebft_sample_parallel_size",
                 "make_vocab_size_divisible_by", "ebft_dump_interval"):
        _require(args, flag, lambda x: x >= 1, "must be at least 1")
    for flag in ("eval_interval", "ebft_keep_checkpoints", "save_retain_interval", "ebft_blocks_per_microbatch",
                 "ebft_rollout_rows", "ebft_ce_coef", "ebft_kl_coef", "ebft_rl_coef", "clip_grad", "weight_decay", "lr",
                 "min_lr", "ebft_top_k", "ebft_importance_cap", "num_layers_at_start_in_bf16",
                 "num_layers_at_end_in_bf16"):
        _require(args, flag, lambda x: x >= 0, "must be 0 or more")
    for flag in ("ebft_temperature", "ebft_top_p", "rotary_base", "init_method_std", "norm_epsilon"):
        _require(args, flag, lambda x: x > 0, "must be above 0")
    for flag in ("ebft_alignment_coef", "ebft_diversity_coef"):
        _require(args, flag, lambda x: True, "must be a finite number")
    for flag in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups",
                 "kv_channels", "max_position_embeddings", "vocab_size", "decoder_first_pipeline_num_layers",
                 "decoder_last_pipeline_num_layers"):
        if vars(args)[flag] is not None:
            _require(args, flag, lambda x: x >= 1, "must be at least 1")
    if args.exit_duration_in_mins is not None:
        _require(args, "exit_duration_in_mins", lambda x: x > 0, "must be above 0")
    _require(args, "lr_warmup_fraction", lambda x: 0 <= x < 1, "must be in [0, 1)")
    _check_parallelism(args)
    if args.global_batch_size % args.micro_batch_size:
        raise ValueError(f"--global-batch-size {args.global_batch_size}: must be a multiple of --micro-batch-size "
                         f"{args.micro_batch_size}")
    if args.training_mode == "ebft":
        StridedLayout(args.seq_length, args.ebft_context_length, args.ebft_stride, args.ebft_rollout_length,
                      args.ebft_num_samples)
        if args.ebft_num_samples < 2 and args.ebft_advantage != "reinforce":
            raise ValueError(f"--ebft-num-samples {args.ebft_num_samples} with --ebft-advantage {args.ebft_advantage}: "
                             "needs at least 2 rollouts of a block; use --ebft-advantage reinforce for one")
    for flag in ("ebft_dump_steps", "ebft_replay_steps"):
        if vars(args)[flag] and args.training_mode == "sft":
            raise ValueError(f"--{flag.replace('_', '-')}: next-token training has no rollouts, leave it out")
    if args.ebft_dump_steps and args.ebft_dump_steps == args.ebft_replay_steps:
        raise ValueError(f"--ebft-dump-steps {args.ebft_dump_steps}: would write over what --ebft-replay-steps reads")
    if args.use_checkpoint_args and not (args.load or args.pretrained_checkpoint):
        raise ValueError("--use-checkpoint-args: needs --load or --pretrained-checkpoint to take them from")
    return args


def _check_parallelism(args) -> None:
    if args.sequence_parallel:
        if args.tensor_model_parallel_size == 1:
            raise ValueError("--sequence-parallel: needs --tensor-model-parallel-size above 1")
        if args.seq_length % args.tensor_model_parallel_size:
            raise ValueError(f"--seq-length {args.seq_length}: with --sequence-parallel it must be a multiple of "
                             f"--tensor-model-parallel-size {args.tensor_model_parallel_size}")
    multiple = row_multiple(args)
    if args.seq_length % multiple:
        each = f" ({multiple // args.tensor_model_parallel_size} a tensor rank)" if args.sequence_parallel else ""
        raise ValueError(f"--seq-length {args.seq_length}: with {', '.join(fp8_recipes(args))} it must be a multiple "
                         f"of {multiple}{each}")
    if args.pipeline_model_parallel_size == 1:
        for flag, default in (("num_virtual_stages_per_pipeline_rank", 1), ("decoder_first_pipeline_num_layers", None),
                              ("decoder_last_pipeline_num_layers", None)):
            if vars(args)[flag] != default:
                raise ValueError(f"--{flag.replace('_', '-')}: needs --pipeline-model-parallel-size above 1")
    samples, share = args.ebft_num_samples, args.ebft_sample_parallel_size
    if samples % share:
        raise ValueError(f"--ebft-sample-parallel-size {share}: must divide --ebft-num-samples {samples}")
    if share > 1 and args.training_mode == "sft":
        raise ValueError(f"--ebft-sample-parallel-size {share}: next-token training has no samples to share out")


def _require(args, name: str, test, message: str) -> None:
    value = vars(args)[name]
    if not (math.isfinite(value) and test(value)):
        raise ValueError(f"--{name.replace('_', '-')} {value}: {message}")


def model_args(args: argparse.Namespace, vocab_size: int) -> ModelArgs:
    """The architecture the flags describe, for a tokenizer of `vocab_size` ids.

    Raises:
        ValueError: a size is missing or does not divide.
    """
    for flag in ("num_layers", "hidden_size", "num_attention_heads"):
        if vars(args)[flag] is None:
            raise ValueError(f"--{flag.replace('_', '-')}: give it, or --use-checkpoint-args with a checkpoint")
    hidden, heads = args.hidden_size, args.num_attention_heads
    groups = args.num_query_groups or heads
    if args.kv_channels is None and hidden % heads:
        raise ValueError(f"--hidden-size {hidden}: must be a multiple of --num-attention-heads {heads}")
    if heads % groups:
        raise ValueError(f"--num-attention-heads {heads}: must be a multiple of --num-query-groups {groups}")
    multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
    derived = dict(
        ffn_hidden_size=args.ffn_hidden_size or (math.ceil(hidden * 8 / 3 / 64) * 64 if args.swiglu else 4 * hidden),
        num_query_groups=groups, kv_channels=args.kv_channels or hidden // heads, vocab_size=vocab_size,
        padded_vocab_size=math.ceil(vocab_size / multiple) * multiple,
        max_position_embeddings=args.max_position_embeddings or args.seq_length)
    for flag, value in (("num-attention-heads", heads), ("num-query-groups", groups),
                        ("ffn-hidden-size", derived["ffn_hidden_size"])):
        if value % args.tensor_model_parallel_size:
            raise ValueError(f"--{flag} {value}: must be a multiple of --tensor-model-parallel-size "
                             f"{args.tensor_model_parallel_size}")
    slices = args.tensor_model_parallel_size * args.ebft_sample_parallel_size
    if hidden % slices:
        raise ValueError(f"--hidden-size {hidden}: must be a multiple of --tensor-model-parallel-size × "
                         f"--ebft-sample-parallel-size, {slices}")
    split_layers(args.num_layers, args.pipeline_model_parallel_size, args.decoder_first_pipeline_num_layers,
                 args.decoder_last_pipeline_num_layers, args.num_virtual_stages_per_pipeline_rank)
    flags = {f.name: vars(args)[f.name] for f in dataclasses.fields(ModelArgs) if f.name not in derived}
    architecture = ModelArgs(**flags, **derived)
    check_fp8_sizes(args, architecture)
    return architecture


def _dtype(args: argparse.Namespace):
    """torch's, of weights and activations."""
    import torch

    return torch.bfloat16 if args.bf16 else torch.float32


def transformer_overrides(args: argparse.Namespace) -> dict:
    """Fields of Megatron-Core's TransformerConfig that describe the machine, for policy, encoder and reference."""
    dtype, recompute = _dtype(args), {}
    if args.recompute_granularity == "full":
        recompute = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    elif args.recompute_granularity == "selective":
        recompute = dict(recompute_granularity="selective")
    # Interleaved stages: unbatched, or two stages would mix up what goes forward and backward between the same ranks.
    p2p = dict(overlap_p2p_comm=True, batch_p2p_comm=False) if virtual_stages(args) else {}
    return dict(bf16=args.bf16, params_dtype=dtype, pipeline_dtype=dtype,
                tensor_model_parallel_size=args.tensor_model_parallel_size,
                pipeline_model_parallel_size=args.pipeline_model_parallel_size,
                virtual_pipeline_model_parallel_size=virtual_stages(args), sequence_parallel=args.sequence_parallel,
                deterministic_mode=args.deterministic_mode, transformer_impl=args.transformer_impl,
                attention_kernel=args.ebft_attention, **p2p, **recompute)


def policy_overrides(args: argparse.Namespace) -> dict:
    """The same for the policy, whose first and last stage may have a share of their own; its training pass has FP8."""
    return {**transformer_overrides(args), **training_fp8(args),
            "first_stage_layers": args.decoder_first_pipeline_num_layers,
            "last_stage_layers": args.decoder_last_pipeline_num_layers}


def parallel_sizes(args: argparse.Namespace) -> dict:
    """The arguments of `init_parallel`."""
    return dict(tensor_model_parallel_size=args.tensor_model_parallel_size,
                pipeline_model_parallel_size=args.pipeline_model_parallel_size, seed=args.seed,
                timeout_minutes=args.distributed_timeout_minutes,
                virtual_pipeline_model_parallel_size=virtual_stages(args),
                sample_parallel_size=args.ebft_sample_parallel_size, is_deterministic=args.deterministic_mode)


def virtual_stages(args: argparse.Namespace) -> int | None:
    """Virtual pipeline stages of a rank as Megatron-Core counts them: None for one."""
    virtual = args.num_virtual_stages_per_pipeline_rank
    return virtual if virtual > 1 else None


def ddp_config(args: argparse.Namespace) -> DistributedDataParallelConfig:
    """Gradients reduced in float32, sharded over the data-parallel ranks."""
    return DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True,
                                         overlap_grad_reduce=args.overlap_grad_reduce)


def optimizer_config(args: argparse.Namespace) -> OptimizerConfig:
    """AdamW with Megatron's distributed optimizer."""
    overrides = transformer_overrides(args)
    return OptimizerConfig(
        optimizer="adam", lr=args.lr, min_lr=args.min_lr, weight_decay=args.weight_decay, adam_beta1=args.adam_beta1,
        adam_beta2=args.adam_beta2, adam_eps=args.adam_eps, clip_grad=args.clip_grad, bf16=args.bf16,
        params_dtype=overrides["params_dtype"], use_distributed_optimizer=True)


def ebft_config(args: argparse.Namespace, num_layers: int) -> EBFTConfig:
    """The method's configuration for an encoder made from a model of `num_layers`.

    Raises:
        ValueError: naming the flag.
    """
    multiple, tiles = row_multiple(args), math.lcm(row_multiple(args), flex_attention.TILE)
    is_known = args.hidden_size and args.num_attention_heads  # or a checkpoint's architecture is still to be read
    head_dim = args.kv_channels or (args.hidden_size // args.num_attention_heads if is_known else 128)
    kernel = kernels.choose(args.transformer_impl, args.ebft_attention, dtype=_dtype(args),
                            head_dim=head_dim).attention_kernel
    if kernel == "flex" and args.seq_length % tiles == 0:
        multiple = tiles  # so that FlexAttention need not fill up queries, keys and values in every layer
    row_sizes = flex_attention.ROW_SIZES if kernel == "flex" else ROW_SIZES
    layout = StridedLayout(args.seq_length, args.ebft_context_length, args.ebft_stride, args.ebft_rollout_length,
                           args.ebft_num_samples // args.ebft_sample_parallel_size, pad_to=multiple,
                           row_sizes=row_sizes)
    return EBFTConfig(
        layout=layout,
        sampling=SamplingConfig(args.ebft_temperature, args.ebft_top_p, args.ebft_top_k, args.seed,
                                fp8_config(args, "rollout")),
        feature_map=FeatureMap(feature_layers(args.ebft_feature_layers, num_layers), args.ebft_feature_norm,
                               args.ebft_feature_pooling),
        whitening=args.ebft_whitening, advantage=args.ebft_advantage, alignment_coef=args.ebft_alignment_coef,
        diversity_coef=args.ebft_diversity_coef, rl_coef=args.ebft_rl_coef, ce_coef=args.ebft_ce_coef,
        kl_coef=args.ebft_kl_coef, kl_estimator=args.ebft_kl_estimator, micro_batch_size=args.micro_batch_size,
        blocks_per_microbatch=args.ebft_blocks_per_microbatch, rollout_rows=args.ebft_rollout_rows,
        importance_cap=args.ebft_importance_cap, encoder_fp8=fp8_config(args, "encoder"),
        skip_duplicates=args.ebft_skip_duplicates and not (args.ebft_dump_steps or args.ebft_replay_steps))
