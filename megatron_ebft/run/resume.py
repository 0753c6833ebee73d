"""Where a run begins: a checkpoint of its own to continue from, or weights to start from; and whether they fit.

The policy starts from --pretrained-checkpoint, or from the seed; a --load that holds only weights, as a conversion
makes them, is such a start. A checkpoint in --load then takes the policy further. It records by content hash the
encoder and the start it was trained with, which must be the ones at hand.

A run that has saved continues from its own --save, whatever --load it began with: the same command, started again, goes
on. A --save that another run has filled is refused.
"""

import argparse
import os
from dataclasses import asdict

from megatron_ebft.checkpointing.companions import COMPANIONS, SENTENCEPIECE, TOKENIZER_FILES, read_companions
from megatron_ebft.checkpointing.folders import POINTER, RECORD, complete_iterations, resolve
from megatron_ebft.checkpointing.record import (
    TrainState,
    architecture_of,
    first_readable,
    read_metadata,
    read_record,
)
from megatron_ebft.common.disk import file_mode
from megatron_ebft.model.architecture import ModelArgs, feature_layers, free_fields, read_architecture
from megatron_ebft.run.flags.flag import spelled
from megatron_ebft.run.flags.parser import as_argv
from megatron_ebft.run.models import fixed_fields

SCHEDULE = ("lr", "min_lr", "lr_decay_style", "lr_warmup_fraction", "weight_decay")
"""Flags of the learning-rate schedule. Its end, --train-iters, may change."""
INITIAL_WEIGHTS = ("seed", "init_method_std", "make_vocab_size_divisible_by", "tensor_model_parallel_size",
                   "pipeline_model_parallel_size", "num_virtual_stages_per_pipeline_rank",
                   "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers", "transformer_impl")
"""What decides the weights of a run that starts from the seed, besides its architecture."""
UNTOLD = ("ebft_stop_file", "exit_duration_in_mins", "load", "tokenizer_model")
"""Flags that every start of a job script sets anew, and paths that the log names or whose contents are compared."""


def find_resume(args) -> bool:
    """Whether there is a checkpoint to continue from; sets --load to its folder, which may be that of --save.

    An empty --load is allowed only if it is also --save.

    Raises:
        ValueError: --load holds no checkpoint, or --save those of another run, or weights alone.
    """
    began = beginning(args)
    is_begun = _find_beginning(args)
    if not args.save or _is_own(args) or not _holds_checkpoints(args.save):
        return is_begun
    folder, record = first_readable(args.save, "--save")
    if record["optimizer"] is None:
        raise ValueError(f"--save {args.save}: holds weights alone, to start from; give it as --pretrained-checkpoint, "
                         "and a folder of the run's own for --save")
    saved = record["metadata"]
    theirs = saved["beginning"] if "beginning" in saved else beginning(argparse.Namespace(**saved["arguments"]))
    if theirs != began:
        raise ValueError(f"--save {args.save}: {os.path.basename(folder)} there is of a run that began with "
                         f"{' and '.join(theirs) or 'no checkpoint'}, and these flags begin with "
                         f"{' and '.join(began) or 'none'}. To continue that run, add --load {args.save}; for another "
                         "one, name a new folder")
    args.load = args.save
    return True


def beginning(args) -> list[str]:
    """The checkpoints that a run begins with, as its flags name them."""
    paths = {os.path.abspath(path) for path in (args.load, args.pretrained_checkpoint) if path}
    return sorted(paths - {os.path.abspath(args.save)} if args.save else paths)


def _is_own(args) -> bool:
    return bool(args.load and args.save) and os.path.abspath(args.load) == os.path.abspath(args.save)


def _holds_checkpoints(folder: str) -> bool:
    return bool(complete_iterations(folder)) or any(file_mode(os.path.join(folder, x)) for x in (RECORD, POINTER))


def _find_beginning(args) -> bool:
    """Whether --load holds a checkpoint to continue from. If it holds weights, they become --pretrained-checkpoint."""
    if not args.load:
        return False
    is_own = _is_own(args)
    if _holds_checkpoints(args.load):
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


def progress(args, folder: str | None) -> tuple[dict | None, TrainState]:
    """The metadata and the progress of the checkpoint to resume from; None and no progress without one.

    Raises:
        ValueError: it has another --training-mode, lacks what training records, or has come further than
            --train-iters.
    """
    if folder is None:
        return None, TrainState()
    record = read_record(folder, "--load")
    saved = record["metadata"]
    mode = (saved.get("arguments") or {}).get("training_mode")
    if mode not in (None, args.training_mode):
        raise ValueError(f"--load {args.load}: was saved by --training-mode {mode}; to start {args.training_mode} from "
                         "its weights, give it as --pretrained-checkpoint")
    needed = {"arguments", "start", *(["encoder"] if args.training_mode == "ebft" else [])}
    lacks = sorted(name for name in needed if saved.get(name) is None) or ([] if mode else ["arguments.training_mode"])
    if lacks:
        raise ValueError(f"--load {args.load}: {RECORD} has no {', '.join(lacks)}, which training records; give the "
                         "checkpoint as --pretrained-checkpoint")
    state = TrainState(**record["train_state"])
    if state.iteration > args.train_iters:
        raise ValueError(f"--train-iters {args.train_iters}: --load {args.load} is at step {state.iteration} already")
    return saved, state


def restore_architecture(args, flag: str, folder: str) -> None:
    """Set the flags of the architecture, and of the tokenizer if none was named, to what a checkpoint says."""
    metadata, folder = read_metadata(folder, flag=flag), resolve(folder, flag)
    fields = asdict(read_architecture(metadata["architecture"], architecture_of(folder, flag)))
    tokenizer, longest = metadata["tokenizer"], "max_position_embeddings"
    for name, value in fields.items():
        if name in vars(args) and name not in free_fields(fields) or name == longest and vars(args)[name] is None:
            setattr(args, name, value)
    args.vocab_size = fields["vocab_size"]
    if tokenizer is None or args.tokenizer_model or args.tokenizer_type == "NullTokenizer":
        return
    path = os.path.join(folder, COMPANIONS)
    files = {"HuggingFaceTokenizer": path, "SentencePieceTokenizer": os.path.join(path, SENTENCEPIECE)}
    args.tokenizer_type, args.tokenizer_model = tokenizer["type"], files.get(tokenizer["type"])


def check_tokenizer(metadata: dict, tokenizer, flag: str) -> None:
    """ValueError unless a checkpoint's tokenizer, where its metadata has one, is this one."""
    saved = metadata["tokenizer"]
    if saved is not None and saved["fingerprint"] != tokenizer.fingerprint:
        raise ValueError(f"--tokenizer-model: {flag} was trained with another tokenizer ({saved['type']} "
                         f"{saved['fingerprint'][:12]}, this is {tokenizer.name} {tokenizer.fingerprint[:12]})")


def check_flags(saved: dict, args, architecture: ModelArgs) -> None:
    """Check what a checkpoint of the run records against the flags, before anything is built.

    With --use-checkpoint-opt-param-scheduler, set the flags of the learning rate to what it records.

    Args:
        saved: its metadata.

    Raises:
        ValueError: another model or schedule, or an encoder that cannot be compared with the recorded one; names
            each flag.
    """
    then = saved["arguments"]
    fields = fixed_fields(architecture)
    _refuse_changes(args, {name: saved["architecture"].get(name) for name in fields}, fields,
                    "its model differs; give the recorded flags, or --use-checkpoint-args")
    if args.use_checkpoint_opt_param_scheduler:
        vars(args).update({name: then[name] for name in SCHEDULE})
    elif not args.override_opt_param_scheduler:
        _refuse_changes(args, {name: then[name] for name in SCHEDULE}, vars(args), "give the recorded flags. Or choose "
                        "one: --override-opt-param-scheduler takes the learning-rate schedule of the flags, "
                        "--use-checkpoint-opt-param-scheduler that of the checkpoint")
    if args.training_mode == "ebft":
        names = ["bf16"]
        depths = [max(feature_layers(flags["ebft_feature_layers"], architecture.num_layers))
                  for flags in (then, vars(args))]
        if depths[0] != depths[1]:
            names.append("ebft_feature_layers")
        _refuse_changes(args, {name: then[name] for name in names}, vars(args), "the encoder then differs from the one "
                        "that it was trained with; give the recorded flags")


def _refuse_changes(args, then: dict, now: dict, why: str) -> None:
    """ValueError that names the flags whose values are not the recorded ones, if there are any."""
    changed = [name for name, value in then.items() if now[name] != value]
    if changed:
        raise ValueError(f"{', '.join(_given(name, now[name]) for name in changed)}: --load {args.load} was trained "
                         f"with {', '.join(_given(name, then[name]) for name in changed)}: {why}")


def _given(name: str, value) -> str:
    """A flag and its value, as a command line has them."""
    if value is None:
        return f"no {spelled(name)}"
    return " ".join(as_argv({name: value})).replace("=", " ", 1)


def check_origins(saved: dict, now: dict, args) -> None:
    """The encoder and the start, where training uses them, must be those the checkpoint was trained with.

    Args:
        saved, now: metadata of the checkpoint and of this run.

    Raises:
        ValueError: naming the flag.
    """
    flags = {"encoder": "--ebft-encoder-load", "start": "--pretrained-checkpoint"}
    used = {"ebft": ("encoder", "start"), "rlvr": ("start",) if args.ebft_kl_coef else (), "sft": ()}
    for part in used[args.training_mode]:
        flag = flags[part]
        if saved[part]["fingerprint"] == now[part]["fingerprint"]:
            continue
        if now[part]["origin"] == f"--seed {args.seed}" and saved[part]["origin"].startswith("--seed"):
            then = saved["arguments"]
            _refuse_changes(args, {name: then[name] for name in INITIAL_WEIGHTS}, vars(args), "the initial weights "
                            "depend on it; give the recorded flags. Runs that start from --pretrained-checkpoint "
                            "continue at any split")
        raise ValueError(f"{flag}: the {part}'s weights are not those {args.load} was trained with "
                         f"(hash {now[part]['fingerprint']} from {now[part]['origin']}, recorded "
                         f"{saved[part]['fingerprint']} from {saved[part]['origin']}); give the recorded one")


def changed_data(saved: dict, now: dict[str, str], args) -> list[str]:
    """Datasets whose content is not what it was when a checkpoint was saved, as the log names them.

    Args:
        saved: the checkpoint's metadata.
        now: hashes of the data at hand (build.data_hashes).

    Raises:
        ValueError: there is one, and --ebft-allow-changed-data is not given.
    """
    before = saved.get("data", {})  # earlier versions recorded none
    changed = [prefix for prefix, content in now.items() if before.get(prefix, content) != content]
    if changed and not args.ebft_allow_changed_data:
        files = changed[0] if changed[0] == args.ebft_questions else f"{changed[0]}.bin and .idx"
        raise ValueError(f"{files}: are not the data that --load {args.load} was trained on (hash "
                         f"{now[changed[0]]}, recorded {before[changed[0]]}). Bring those back, or go on with these by "
                         "--ebft-allow-changed-data")
    return [f"content of {prefix}" for prefix in changed]


def changed_flags(saved: dict, now: dict) -> list[str]:
    """Flags that are not what they were when a checkpoint was saved, as `--flag old → new`.

    Those of UNTOLD may differ at every start.
    """
    return [f"{spelled(name)} {saved[name]} → {value}" for name, value in now.items()
            if name in saved and saved[name] != value and name not in UNTOLD]


def gather_companions(args, flag: str, folder: str | None) -> dict[str, bytes]:
    """Small files that every checkpoint of the run will carry: those of the one it comes from, and the tokenizer's."""
    companions = read_companions(os.path.join(resolve(folder, flag), COMPANIONS)) if folder else {}
    if args.tokenizer_type == "SentencePieceTokenizer":
        with open(args.tokenizer_model, "rb") as file:
            companions[SENTENCEPIECE] = file.read()
    elif args.tokenizer_type == "HuggingFaceTokenizer":
        companions |= read_companions(args.tokenizer_model, TOKENIZER_FILES)
    return companions
