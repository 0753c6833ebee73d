"""The architecture of a model, and how its layers are split over pipeline stages."""

import dataclasses
import math
from dataclasses import dataclass

LARGEST_SIZE, MOST_LAYERS, LARGEST_NUMBER = 2**31 - 1, 2**16, 1e30
"""Bounds that no model exceeds. A file that does would keep loops and allocations busy for hours."""
CHOICES = {"position_embedding_type": ("rope", "learned_absolute", "none"), "normalization": ("RMSNorm", "LayerNorm")}
"""Values of the fields of ModelArgs that are words."""


@dataclass
class ModelArgs:
    """Architecture of policy and encoder; field names are Megatron's flags.

    Checkpoints record it, and `--use-checkpoint-args` restores it.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    """Number of token ids."""
    padded_vocab_size: int
    """Rows of the embedding: vocab_size padded to a multiple of --make-vocab-size-divisible-by × the tensor-parallel
    size. Two checkpoints of one model may differ in it."""
    max_position_embeddings: int
    position_embedding_type: str = "rope"
    """`rope` or `learned_absolute`."""
    rotary_base: float = 10000.0
    rotary_percent: float = 1.0
    use_rope_scaling: bool = False
    rope_scaling_factor: float = 8.0
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_max_position_embeddings: int = 8192
    normalization: str = "RMSNorm"
    norm_epsilon: float = 1e-5
    swiglu: bool = True
    add_bias_linear: bool = False
    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    untie_embeddings_and_output_weights: bool = True
    init_method_std: float = 0.02


def matrix_elements(args: ModelArgs) -> int:
    """Number of weights in all matrices of the model."""
    attention = 2 * args.hidden_size * args.kv_channels * (args.num_attention_heads + args.num_query_groups)
    mlp = (3 if args.swiglu else 2) * args.hidden_size * args.ffn_hidden_size
    tables = args.padded_vocab_size * (2 if args.untie_embeddings_and_output_weights else 1)
    if args.position_embedding_type == "learned_absolute":
        tables += args.max_position_embeddings
    return args.num_layers * (attention + mlp) + tables * args.hidden_size


def read_architecture(fields, where: str) -> ModelArgs:
    """An architecture from what a file says.

    Raises:
        ValueError: beginning with `where`: a field is missing, unknown, of another type or not possible.
    """
    if not isinstance(fields, dict):
        raise ValueError(f"{where} has no fields")
    known = {field.name: field for field in dataclasses.fields(ModelArgs)}
    for name in fields.keys() - known.keys():
        raise ValueError(f"{where} has the field {name}, which this version does not know")
    for name, field in known.items():
        if name not in fields and field.default is dataclasses.MISSING:
            raise ValueError(f"{where} has no {name}")
        value = fields.get(name, field.default)
        kinds = (int, float) if field.type is float else (field.type,)
        is_right = type(value) in kinds and value in CHOICES.get(name, (value,))
        if is_right and field.type in (int, float):
            largest = LARGEST_SIZE if field.type is int else LARGEST_NUMBER
            is_right = 0 < value <= (MOST_LAYERS if name == "num_layers" else largest)
        if not is_right:
            raise ValueError(f"{where} says {name} = {str(value)[:80]}, which no model has")
    args = ModelArgs(**fields)
    if args.num_attention_heads % args.num_query_groups or args.padded_vocab_size < args.vocab_size:
        raise ValueError(f"{where} contradicts itself: {args.num_attention_heads} heads for {args.num_query_groups} "
                         f"groups, {args.padded_vocab_size} rows for {args.vocab_size} ids")
    return args


def free_fields(architecture: dict) -> set[str]:
    """Fields in which a model may differ from the checkpoint that it takes its weights from.

    Args:
        architecture: fields of the model's ModelArgs.
    """
    free = {"init_method_std", "padded_vocab_size"}
    return free | {"max_position_embeddings"} if architecture["position_embedding_type"] == "rope" else free


def split_layers(num_layers: int, stages: int, first: int | None = None, last: int | None = None,
                 virtual: int = 1) -> list[int]:
    """Number of decoder layers of each stage, in the order of a forward pass (`virtual` times round the pipeline).

    Args:
        first, last: layers of the first and of the last stage; None: as many as the others.

    Raises:
        ValueError: naming the flag, when the layers cannot be split like this.
    """
    ends = [x for x in (first, last) if x is not None]
    middle, rest = stages * virtual - len(ends), num_layers - sum(ends)
    if virtual > 1 and ends:
        raise ValueError("--num-virtual-stages-per-pipeline-rank: not with --decoder-first-pipeline-num-layers or "
                         "--decoder-last-pipeline-num-layers")
    if rest < 0:
        raise ValueError(f"--num-layers {num_layers}: fewer than --decoder-first-pipeline-num-layers and "
                         f"--decoder-last-pipeline-num-layers give to the ends, {sum(ends)}")
    if rest % middle if middle else rest:
        raise ValueError(f"--num-layers {num_layers}: cannot be split evenly over --pipeline-model-parallel-size "
                         f"{stages}" + (f" × --num-virtual-stages-per-pipeline-rank {virtual}" if virtual > 1 else "") +
                         "; change one of them, or give the ends a share of their own with "
                         "--decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers")
    split = [rest // middle if middle else 0] * (stages * virtual)
    if first is not None:
        split[0] = first
    if last is not None:
        split[-1] = last
    return split


def balanced_split(num_layers: int, stages: int) -> list[int]:
    """Number of layers of each stage when they need not divide: the first stages get one more.

    Frozen models are split like this; the encoder has fewer layers than the policy.
    """
    return [num_layers // stages + (stage < num_layers % stages) for stage in range(stages)]


def feature_layers(fractions: list[float], num_layers: int) -> list[int]:
    """Layers ⌊f·L⌋ counted from 1 (METHOD: "Features").

    Raises:
        ValueError: a fraction outside (0, 1], one that names no layer, or two that name the same one.
    """
    layers = [math.floor(fraction * num_layers) for fraction in fractions]
    if not layers or min(layers) < 1 or max(layers) > num_layers or len(set(layers)) != len(layers):
        raise ValueError(f"--ebft-feature-layers {' '.join(map(str, fractions))}: with --num-layers {num_layers} these "
                         f"are layers {layers}; each must be different and between 1 and {num_layers}")
    return layers
