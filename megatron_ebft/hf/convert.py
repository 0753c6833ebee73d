"""Converts checkpoints between Hugging Face and Megatron-Core one tensor at a time.

1. Neither model is ever in memory as a whole. A Megatron-Core tensor is made from its Hugging Face parts when it is
   written, and split into them when it is read. No model is built: torch's checkpointing gets a planner that asks for
   each tensor when its turn comes.
2. The result looks like a checkpoint that training saved at iteration 0 without an optimizer: the record has the
   architecture, the folder the companions, the manifest the checksums.
3. Errors that the headers reveal are raised before a tensor is written. Output is written into a temporary folder
   beside its place, verified there if asked, and renamed. After a failure nothing stays.
"""

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from megatron_ebft.checkpointing.companions import (
    COMPANIONS,
    CONFIG,
    GENERATION_CONFIG,
    SENTENCEPIECE,
    TOKENIZER_FILES,
    read_companions,
    write_companions,
)
from megatron_ebft.checkpointing.errors import writing
from megatron_ebft.checkpointing.folders import POINTER, RECORD, clear_leftovers, publish, temporary_name
from megatron_ebft.checkpointing.lock import FolderLock
from megatron_ebft.checkpointing.manifest import seal
from megatron_ebft.checkpointing.reader import CheckpointReader
from megatron_ebft.checkpointing.record import FORMAT
from megatron_ebft.common.disk import parse_json, sync, write_json
from megatron_ebft.common.progress import Progress, gigabytes
from megatron_ebft.common.safetensors_writer import SafetensorsWriter, tensor_bytes
from megatron_ebft.data.tokenizer import build_tokenizer
from megatron_ebft.hf.config import describe, parse_config, read_config, read_model, write_config
from megatron_ebft.hf.families import VOCABULARY, HFModel
from megatron_ebft.hf.weights import INDEX, SINGLE, HFWeights
from megatron_ebft.model.architecture import free_fields

NOTHING_STAYS = "Nothing was left there"


class _LazyPlanner(DefaultSavePlanner):
    """Saves tensors that do not exist yet: calls `make(key)` for each when it is written."""

    def __init__(self, make):
        super().__init__(flatten_state_dict=False)
        self.make = make

    def lookup_object(self, index):
        return self.make(index.fqn)


def hf_to_megatron(hf_folder: str, output: str, dtype: torch.dtype | None = None, say=print, verify=None) -> str:
    """Convert a Hugging Face folder to a torch_dist checkpoint of iteration 0; returns its folder.

    Args:
        output: a directory without checkpoints. It is created if it is missing.
        dtype: of all weights; None keeps the dtype of each.
        say: receives progress lines.
        verify: called as verify(hf_folder, HFWeights, CheckpointReader) before the output appears; may raise.

    Raises:
        ValueError: names --hf-model and the file, key or tensor that is wrong, or --output.
    """
    model = read_model(hf_folder, "--hf-model")
    weights = HFWeights(hf_folder, "--hf-model")
    weights.check(model)
    templates = _templates(model, weights, dtype)
    total = sum(tensor.nbytes for tensor in templates.values())
    if os.path.isdir(output) and any(name == POINTER or re.match(r"iter_\d+(?!.*\.tmp\.)", name)
                                     for name in os.listdir(output)):
        raise ValueError(f"--output {output}: holds checkpoints already; name a new folder")
    _check_place(output, total)
    companions = read_companions(hf_folder)
    metadata = {"architecture": asdict(model.architecture), "tokenizer": _tokenizer(hf_folder, companions, model, say),
                "converted_from": {"hf_model": os.path.abspath(hf_folder), "family": model.family.architecture}}
    record = {"format": FORMAT, "train_state": {"iteration": 0, "consumed_samples": 0}, "layout": None,
              "optimizer": None, "metadata": metadata}
    progress = Progress("converted", total, say, gigabytes)

    def make(key: str) -> Tensor:
        entry = model.entries[key]
        tensor = entry.join([weights.read(name).to(templates[key].dtype) for name in entry.names])
        assert (tensor.dtype, tensor.shape) == (templates[key].dtype, templates[key].shape), key
        progress.add(tensor.nbytes)
        return tensor

    temporary = os.path.join(output, temporary_name(0))
    with writing(output, "--output", NOTHING_STAYS):
        os.makedirs(output, exist_ok=True)
    with writing(output, "--output", NOTHING_STAYS), FolderLock(output, "--output"), _removed_on_failure(temporary):
        clear_leftovers(output)
        # One file per tensor: torch keeps the content of a file in memory until the file is closed.
        writer = FileSystemWriter(temporary, single_file_per_rank=False, thread_count=1)
        checkpoint.save(templates, storage_writer=writer, planner=_LazyPlanner(make), no_dist=True)
        save_config(CheckpointingConfig("torch_dist"), temporary)
        torch.save({}, os.path.join(temporary, "common.pt"))
        write_companions(os.path.join(temporary, COMPANIONS), companions)
        write_json(os.path.join(temporary, RECORD), record)
        seal(temporary)
        progress.close()
        if verify is not None:
            verify(hf_folder, weights, CheckpointReader(temporary, "--output", is_whole=True))
        publish(output, temporary, 0)
    return os.path.join(output, "iter_0000000")


def megatron_to_hf(load: str, output: str, template: str | None = None, max_shard_size: int = 5 * 10**9, say=print,
                   verify=None) -> None:
    """Convert a checkpoint (the latest of a directory, or an iter_* folder itself) to a Hugging Face folder.

    Args:
        output: a new or empty folder.
        template: a Hugging Face folder whose configuration and tokenizer replace those of the checkpoint.
        max_shard_size: bytes of a safetensors file. A file with a single tensor may be larger.
        say, verify: as `hf_to_megatron`.

    Raises:
        ValueError: names --load, --output or --hf-template and what is wrong.
    """
    output = os.path.realpath(output)
    if os.path.isdir(output) and os.listdir(output):
        raise ValueError(f"--output {output}: is not empty; name a new folder")
    reader = CheckpointReader(load, "--load", say=say)
    companions = _companions(reader, template)
    model = _family_of(reader, companions, f"--hf-template {template}" if template else f"--load {reader.folder}")
    _check_weights(reader, model)
    tensors = {name: (reader.dtypes[key], shape) for key, entry in model.entries.items()
               for name, shape in zip(entry.names, entry.shapes)}
    total = sum(tensor_bytes(*tensor) for tensor in tensors.values())
    _check_place(output, total)
    companions = _configured(companions, model, next(iter(tensors.values()))[0], reader)

    temporary = f"{output}.tmp.{secrets.token_hex(4)}"
    with writing(output, "--output", NOTHING_STAYS), _removed_on_failure(temporary):
        os.makedirs(temporary)
        write_companions(temporary, companions)
        _write_shards(temporary, tensors, _parts(reader, model), max_shard_size,
                      Progress("converted", total, say, gigabytes))
        for name in os.listdir(temporary):
            sync(os.path.join(temporary, name))
        sync(temporary)
        if verify is not None:
            verify(temporary, HFWeights(temporary, "--output"), reader)
        os.rename(temporary, output)  # replaces an empty folder too
        sync(os.path.dirname(output))


def _templates(model: HFModel, weights: HFWeights, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Meta tensors with the shapes and dtypes of the Megatron-Core tensors."""
    templates = {}
    for key, entry in model.entries.items():
        dtypes = {weights.dtypes[name] for name in entry.names}
        if dtype is None and torch.float16 in dtypes:
            raise ValueError(f"{weights.where}: the weights are float16 ({entry.names[0]}), which training does not "
                             "support; give --dtype bf16 (which rounds them) or --dtype fp32 (which does not)")
        if dtype is None and len(dtypes) > 1:
            raise ValueError(f"{weights.where}: {', '.join(entry.names)} have several dtypes, but become one tensor; "
                             "give --dtype")
        templates[key] = torch.empty(entry.shape, dtype=dtype or dtypes.pop(), device="meta")
    return templates


def _tokenizer(folder: str, companions: dict, model: HFModel, say) -> dict | None:
    """The record's entry about the tokenizer; None if the model has no tokenizer files."""
    if not companions.keys() & set(TOKENIZER_FILES):
        say(f"--hf-model {folder}: no tokenizer files there; training will need --tokenizer-model")
        return None
    try:
        tokenizer = build_tokenizer("HuggingFaceTokenizer", folder)
    except ValueError as error:
        raise ValueError(f"--hf-model {folder}: its tokenizer cannot be used. {error}") from error
    if tokenizer.num_ids > model.architecture.vocab_size:
        raise ValueError(f"--hf-model {folder}: its tokenizer has {tokenizer.num_ids} ids, and the model knows "
                         f"{model.architecture.vocab_size}; remove the added tokens, or resize the model's embeddings")
    return {"type": tokenizer.name, "fingerprint": tokenizer.fingerprint}


def _check_weights(reader: CheckpointReader, model: HFModel) -> None:
    """ValueError unless the checkpoint holds exactly the model's tensors in their shapes, apart from padding rows."""
    where = f"{reader.flag} {reader.folder}"
    differ = reader.shapes.keys() ^ model.entries.keys()
    if differ:
        raise ValueError(f"{where}: only one of the checkpoint and {model.family.architecture} has "
                         f"{', '.join(sorted(differ)[:8])}; the conversion would lose it")
    for key, entry in model.entries.items():
        rows, *rest = reader.shapes[key]
        is_padded = key in VOCABULARY and rows > entry.shape[0]
        if rest != [*entry.shape[1:]] or not (rows == entry.shape[0] or is_padded):
            raise ValueError(f"{where}: {key} has the shape {reader.shapes[key]}, but the architecture says "
                             f"{entry.shape}")


def _check_place(output: str, needed: int) -> None:
    """ValueError unless there is a place for the output and enough room.

    Args:
        needed: bytes.
    """
    parent = os.path.abspath(output)
    while not os.path.exists(parent):
        parent = os.path.dirname(parent)
    if not os.path.isdir(parent):
        raise ValueError(f"--output {output}: {parent} is a file; name a folder")
    if not os.access(parent, os.W_OK):
        raise ValueError(f"--output {output}: {parent} cannot be written; name another folder")
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise ValueError(f"--output {output}: needs {gigabytes(needed)}, and {gigabytes(free)} are free there")


@contextmanager
def _removed_on_failure(folder: str):
    """Remove the folder if anything ends the block early."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _companions(reader: CheckpointReader, template: str | None) -> dict[str, bytes]:
    """Configuration and tokenizer for the weights: the checkpoint's, overridden by the template's."""
    companions = read_companions(os.path.join(reader.folder, COMPANIONS))
    if template is None:
        return companions
    read_config(template, "--hf-template")
    overriding = read_companions(template)
    if overriding.keys() & set(TOKENIZER_FILES):  # never mix the files of two tokenizers
        companions = {name: content for name, content in companions.items() if name not in TOKENIZER_FILES}
    return companions | overriding


def _family_of(reader: CheckpointReader, companions: dict, where: str) -> HFModel:
    """The model as config.json describes it or, without one, as the checkpoint's architecture does."""
    if CONFIG not in companions:
        return describe(reader.architecture, f"{reader.flag} {reader.folder}")
    model = parse_config(parse_json(companions[CONFIG], f"{where}: {CONFIG}"), f"{where}: {CONFIG}")
    differ = [f"{name} {value} (checkpoint {vars(reader.architecture)[name]})"
              for name, value in vars(model.architecture).items()
              if name not in free_fields(vars(reader.architecture)) and value != vars(reader.architecture)[name]]
    if differ:
        raise ValueError(f"{where}: {CONFIG} does not describe the checkpoint's model: {', '.join(differ)}")
    return model


def _configured(companions: dict, model: HFModel, dtype: torch.dtype, reader: CheckpointReader) -> dict:
    """The companions with the dtype of the weights in config.json, and with a generation_config.json."""
    config = json.loads(companions[CONFIG]) if CONFIG in companions else write_config(model, dtype, _eos(reader))
    key, name = "dtype" if "dtype" in config else "torch_dtype", str(dtype).removeprefix("torch.")
    made = {}
    if CONFIG not in companions or config.get(key) != name:
        made[CONFIG] = config | {key: name}
    if GENERATION_CONFIG not in companions:
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        made[GENERATION_CONFIG] = {"_from_model_config": True, **{key: config[key] for key in ids if key in config}}
    return companions | {name: json.dumps(value, indent=2).encode() + b"\n" for name, value in made.items()}


def _eos(reader: CheckpointReader) -> int | None:
    """The id that ends a document, according to the checkpoint's tokenizer; None if it has none."""
    folder, tokenizer = os.path.join(reader.folder, COMPANIONS), reader.metadata["tokenizer"]
    paths = {"HuggingFaceTokenizer": folder, "SentencePieceTokenizer": os.path.join(folder, SENTENCEPIECE)}
    if tokenizer is None or tokenizer["type"] not in paths or not os.path.isdir(folder):
        return None
    return build_tokenizer(tokenizer["type"], paths[tokenizer["type"]]).eod


def _parts(reader: CheckpointReader, model: HFModel) -> Iterator[tuple[str, Tensor]]:
    """Every Hugging Face tensor by name, in the order of the model's entries."""
    for key, entry in model.entries.items():
        yield from zip(entry.names, entry.split(reader.read(key)), strict=True)


def _write_shards(folder: str, tensors: dict, parts: Iterator, max_shard_size: int, progress: Progress) -> None:
    """Write the parts into safetensors files, and an index if there are several.

    Args:
        tensors: dtype and shape by name, in the order of `parts`.
    """
    shards, size = [{}], 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor_bytes(*tensor) > max_shard_size:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor_bytes(*tensor)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else [SINGLE]
    for file, shard in zip(names, shards):
        with SafetensorsWriter(os.path.join(folder, file), shard, {"format": "pt"}) as writer:
            for _ in shard:
                name, tensor = next(parts)
                writer.write(name, tensor)
                progress.add(tensor.nbytes)
    if len(shards) > 1:
        write_json(os.path.join(folder, INDEX), {
            "metadata": {"total_size": progress.total},
            "weight_map": {name: file for file, shard in zip(names, shards) for name in shard}})
    progress.close()
