"""Where a run begins: a checkpoint of its own to continue from, or weights to start from; and whether they fit.

The policy starts from --pretrained-checkpoint, or from the seed; a --load that holds only weights, as a conversion
makes them, is such a start. A checkpoint in --load then takes the policy further. It records by content hash the
encoder and the start it was trained with, which must be the ones at hand.
"""

import os

from megatron_ebft.checkpointing.companions import COMPANIONS, SENTENCEPIECE, TOKENIZER_FILES, read_companions
from megatron_ebft.checkpointing.folders import POINTER, RECORD, complete_iterations, resolve
from megatron_ebft.checkpointing.record import first_readable, read_metadata
from megatron_ebft.model.architecture import free_fields
from megatron_ebft.run.flags.flag import spelled


def find_resume(args) -> bool:
    """Whether --load holds a checkpoint. An empty --load is allowed only if it is also --save."""
    if not args.load:
        return False
    is_own = bool(args.save) and os.path.abspath(args.load) == os.path.abspath(args.save)
    if complete_iterations(args.load) or any(os.path.exists(os.path.join(args.load, x)) for x in (RECORD, POINTER)):
        if first_readable(args.load, "--load")[1]["optimizer"] is not None:
            return True
        if args.pretrained_checkpoint or is_own:
            other = "--save" if is_own else "--pretrained-checkpoint"
            raise ValueError(f"--load {args.load}: holds weights alone, to start from, so it does not go with {other}; "
                             "give it as --pretrained-checkpoint, and a folder of the run's own for --save and --load")
        args.pretrained_checkpoint = args.load
        return False
    if is_own:
        return False
    raise ValueError(f"--load {args.load}: no checkpoint there; name a folder that --save wrote, or that of --save "
                     "to start afresh and continue from it later")


def restore_architecture(args, flag: str, folder: str) -> None:
    """Set the flags of the architecture, and of the tokenizer if none was named, to what a checkpoint says."""
    metadata = read_metadata(folder, flag=flag)
    fields, tokenizer = metadata["architecture"], metadata["tokenizer"]
    for name, value in fields.items():
        if name in vars(args) and name not in free_fields(fields):
            setattr(args, name, value)
    args.vocab_size = fields["vocab_size"]
    if tokenizer is None or args.tokenizer_model or args.tokenizer_type == "NullTokenizer":
        return
    path = os.path.join(resolve(folder, flag), COMPANIONS)
    files = {"HuggingFaceTokenizer": path, "SentencePieceTokenizer": os.path.join(path, SENTENCEPIECE)}
    args.tokenizer_type, args.tokenizer_model = tokenizer["type"], files.get(tokenizer["type"])


def check_tokenizer(metadata: dict, tokenizer, flag: str) -> None:
    """ValueError unless a checkpoint's tokenizer, where its metadata has one, is this one."""
    saved = metadata["tokenizer"]
    if saved is not None and saved["fingerprint"] != tokenizer.fingerprint:
        raise ValueError(f"--tokenizer-model: {flag} was trained with another tokenizer ({saved['type']} "
                         f"{saved['fingerprint'][:12]}, this is {tokenizer.name} {tokenizer.fingerprint[:12]})")


def check_origins(saved: dict, now: dict, args) -> None:
    """The encoder, and with a KL term the start, must be those the checkpoint was trained with."""
    if args.training_mode != saved["arguments"]["training_mode"]:
        raise ValueError(f"--load {args.load}: was saved by --training-mode {saved['arguments']['training_mode']}; to "
                         f"start {args.training_mode} from its weights, give it as --pretrained-checkpoint")
    if args.training_mode != "ebft":
        return
    sizes = [f"--{name} {saved['arguments'][name.replace('-', '_')]}" for name in (
        "tensor-model-parallel-size", "pipeline-model-parallel-size", "num-virtual-stages-per-pipeline-rank")]
    for part, flag in (("encoder", "--ebft-encoder-load"), ("start", "--pretrained-checkpoint")):
        if saved[part]["fingerprint"] != now[part]["fingerprint"]:
            if saved[part]["origin"] == now[part]["origin"] == f"--seed {args.seed}":
                raise ValueError(f"--seed {args.seed}: the initial weights depend on how they are split, too; "
                                 f"{args.load} began with {' '.join(sizes)}: continue so. Runs that start from "
                                 "--pretrained-checkpoint continue at any split")
            raise ValueError(f"{flag}: the {part}'s weights are not those {args.load} was trained with "
                             f"(hash {now[part]['fingerprint']} from {now[part]['origin']}, recorded "
                             f"{saved[part]['fingerprint']} from {saved[part]['origin']}); give the recorded one, in "
                             "the recorded precision (--bf16)")


def changed_data(saved: dict, now: dict[str, str], args) -> list[str]:
    """Datasets whose content is not what it was when a checkpoint was saved, as the log names them.

    Args:
        saved: the checkpoint's metadata.
        now: `content_hashes` of the data at hand.

    Raises:
        ValueError: there is one, and --ebft-allow-changed-data is not given.
    """
    before = saved.get("data", {})  # earlier versions recorded none
    changed = [prefix for prefix, content in now.items() if before.get(prefix, content) != content]
    if changed and not args.ebft_allow_changed_data:
        raise ValueError(f"{changed[0]}.bin and .idx: are not the data that --load {args.load} was trained on (hash "
                         f"{now[changed[0]]}, recorded {before[changed[0]]}). Bring those back, or go on with these by "
                         "--ebft-allow-changed-data")
    return [f"content of {prefix}" for prefix in changed]


def changed_flags(saved: dict, now: dict) -> list[str]:
    """Flags that are not what they were when a checkpoint was saved, as `--flag old → new`."""
    return [f"{spelled(name)} {saved[name]} → {value}" for name, value in now.items()
            if name in saved and saved[name] != value]


def gather_companions(args, flag: str, folder: str | None) -> dict[str, bytes]:
    """Small files that every checkpoint of the run will carry: those of the one it comes from, and the tokenizer's."""
    companions = read_companions(os.path.join(resolve(folder, flag), COMPANIONS)) if folder else {}
    if args.tokenizer_type == "SentencePieceTokenizer":
        with open(args.tokenizer_model, "rb") as file:
            companions[SENTENCEPIECE] = file.read()
    elif args.tokenizer_type == "HuggingFaceTokenizer":
        companions |= read_companions(args.tokenizer_model, TOKENIZER_FILES)
    return companions
