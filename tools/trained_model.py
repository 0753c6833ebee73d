"""A trained model for tools that only read from it: from a Hugging Face folder or a checkpoint, on any layout of
ranks."""

import argparse
import contextlib
import os
from dataclasses import dataclass

from megatron_ebft.run.flags.flag import Flag, Group
from megatron_ebft.run.flags.parallelism import PARALLELISM
from megatron_ebft.run.flags.parser import Parser
from megatron_ebft.run.flags.precision import PRECISION

MODEL = Group("model", (
    Flag("--hf-model", str, "Hugging Face folder of the model and its tokenizer", metavar="DIR"),
    Flag("--load", str, "checkpoint of the model, instead of --hf-model", metavar="DIR"),
    Flag("--tokenizer-type", str, "kind of tokenizer, if it is not the model's own", default="HuggingFaceTokenizer",
         choices=("SentencePieceTokenizer", "HuggingFaceTokenizer", "NullTokenizer")),
    Flag("--tokenizer-model", str, "SentencePiece model file, or folder of a Hugging Face tokenizer", metavar="PATH",
         default_text="the model's own")))
READS = frozenset({*(flag for flag in PARALLELISM.dests if flag in (
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "sequence_parallel", "distributed_timeout_minutes")),
    *(flag for flag in PRECISION.dests if flag in ("bf16", "transformer_impl", "ebft_attention"))})
"""Training's flags that apply to a model that is not trained."""


@dataclass(kw_only=True)
class TrainedModel:
    """A model without gradients on this rank, and what belongs to it. `build` loads its weights."""

    args: argparse.Namespace
    source: object
    """Where the weights are."""
    tokenizer: object
    architecture: object
    end_ids: tuple[int, ...]
    """Tokens that end a completion: the tokenizer's end of documents, and those that the model's settings name."""
    origin: str
    """The flag and folder it came from, for messages."""
    watchdog: object
    model: object = None
    """This rank's pipeline stage, after `build`."""

    def build(self) -> None:
        """Build the model and load its weights."""
        self.model = self.source.build(self.args, self.architecture)
        self.model.register_forward_pre_hook(self.watchdog.move)


def parser(name: str, doc: str, own: tuple[Group, ...], reads: frozenset[str] = frozenset()) -> Parser:
    """A parser of the tool's own flags, the model's, and training's that apply."""
    return Parser(f"torchrun --nproc-per-node N tools/{name}.py", doc, own=(*own, MODEL), reads=READS | reads)


def check_model(args: argparse.Namespace) -> None:
    """Training's checks of the flags.

    Raises:
        ValueError: naming the flag.
    """
    from megatron_ebft.run.flags.checks import check_args

    if bool(args.hf_model) == bool(args.load):
        raise ValueError("--hf-model, --load: give one of the two")
    check_args(args)


@contextlib.contextmanager
def on_ranks(args: argparse.Namespace):
    """Process groups, a watchdog, and the model that the flags name, not yet built (TrainedModel.build).

    Raises:
        ValueError: it is missing, damaged or not supported; names the flag.
    """
    from megatron_ebft.common.device import import_megatron

    import_megatron()
    from megatron_ebft.parallel.groups import init_parallel, shut_down
    from megatron_ebft.run.configs import parallel_sizes
    from megatron_ebft.run.watchdog import PATIENCE, Watchdog

    minutes = args.distributed_timeout_minutes
    watchdog = Watchdog(0.9 * 60 * minutes)
    init_parallel(**{**parallel_sizes(args), "timeout_minutes": PATIENCE * minutes})
    watchdog.watch()
    try:
        yield _describe(args, watchdog)
    finally:
        watchdog.stop()
    shut_down()


def _describe(args: argparse.Namespace, watchdog) -> TrainedModel:
    from megatron_ebft.checkpointing.companions import end_ids, read_companions
    from megatron_ebft.data.tokenizer import build_tokenizer
    from megatron_ebft.run.configs import model_args

    flag, folder = ("--hf-model", args.hf_model) if args.hf_model else ("--load", args.load)
    source = _HuggingFace(args) if args.hf_model else _Checkpoint(args)
    tokenizer = build_tokenizer(args.tokenizer_type, args.tokenizer_model, args.vocab_size)
    return TrainedModel(args=args, source=source, tokenizer=tokenizer,
                        architecture=model_args(args, tokenizer.vocab_size), origin=f"{flag} {folder}",
                        end_ids=end_ids(read_companions(source.companions), tokenizer.eod), watchdog=watchdog)


class _HuggingFace:
    """Weights and tokenizer of a Hugging Face folder. Sets the flags of the architecture."""

    def __init__(self, args: argparse.Namespace):
        from dataclasses import asdict

        from megatron_ebft.hf.config import read_model
        from megatron_ebft.hf.weights import HFWeights

        self.hf, self.weights = read_model(args.hf_model, "--hf-model"), HFWeights(args.hf_model, "--hf-model")
        self.weights.check(self.hf)
        self.companions = args.hf_model
        fields = asdict(self.hf.architecture)
        vars(args).update({name: value for name, value in fields.items() if name in vars(args)})
        if args.tokenizer_type != "NullTokenizer":
            args.tokenizer_model = args.tokenizer_model or args.hf_model

    def build(self, args: argparse.Namespace, architecture):
        from megatron_ebft.hf.load import load_hf_weights
        from megatron_ebft.model.build import build_start
        from megatron_ebft.run.configs import transformer_overrides

        model = build_start(architecture, **transformer_overrides(args))
        load_hf_weights(model, self.hf, self.weights)
        return model


class _Checkpoint:
    """Weights and tokenizer of a checkpoint. Sets the flags of the architecture."""

    def __init__(self, args: argparse.Namespace):
        from megatron_ebft.checkpointing.companions import COMPANIONS
        from megatron_ebft.checkpointing.loader import newest_whole
        from megatron_ebft.run.resume import restore_architecture

        self.folder = newest_whole(args.load)
        restore_architecture(args, "--load", self.folder)
        self.companions = os.path.join(self.folder, COMPANIONS)

    def build(self, args: argparse.Namespace, architecture):
        from megatron_ebft.checkpointing.loader import load_weights
        from megatron_ebft.model.build import build_start
        from megatron_ebft.run.configs import transformer_overrides
        from megatron_ebft.run.models import fixed_fields

        model = build_start(architecture, **transformer_overrides(args))
        load_weights(self.folder, model, architecture=fixed_fields(architecture), flag="--load")
        return model
