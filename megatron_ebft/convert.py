"""Conversion of checkpoints between Hugging Face and Megatron-Core, one tensor at a time.

1. Neither side is ever in memory as a whole: a Megatron-Core tensor is made of its Hugging Face parts when it is
   written, and taken apart when it is read. torch's checkpointing is given a planner that does so; no model is built.
2. What is converted is a checkpoint like those that training saves, at iteration 0, without an optimizer: its record
   has the architecture, its folder the companions (hf_files.py), its files their sizes in the manifest.
3. Everything that can be found wrong is found from the headers, before a byte is written. Output appears at the end,
   whole, by a rename.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_ebft.checkpoint_files import (
    FORMAT,
    RECORD,
    check_whole,
    clear_leftovers,
    commit,
    complete_iterations,
    folder_name,
    read_record,
    reading,
    resolve,
    sync,
    temporary_name,
    write_json,
    writing,
)
from megatron_ebft.families import CONFIG, VOCABULARY, HFModel, describe, parse_config, read_model, write_config
from megatron_ebft.fingerprint import sharded_tensors, sharded_weights
from megatron_ebft.hf_files import (
    COMPANIONS,
    GENERATION_CONFIG,
    INDEX,
    SINGLE,
    TOKENIZER_FILES,
    HFWeights,
    SafetensorsWriter,
    read_companions,
    tensor_bytes,
    write_companions,
)
from megatron_ebft.logger import clock
from megatron_ebft.model import ModelArgs
from megatron_ebft.tokenizer import build_tokenizer

FREE_FIELDS = {"init_method_std", "padded_vocab_size", "max_position_embeddings"}
"""Of the architecture: what a template may say otherwise than the checkpoint."""


class Progress:
    """A line with the time left about every 10 seconds, and one at the end."""

    def __init__(self, what: str, total: int):
        self.what, self.total, self.done = what, total, 0
        self.start = self.last = time.perf_counter()

    def add(self, size: int) -> None:
        """So many bytes more are done."""
        self.done += size
        now = time.perf_counter()
        if now - self.last > 10 and self.done < self.total:
            self.last = now
            left = (now - self.start) / self.done * (self.total - self.done)
            print(f"{self.what} {self.done / 1e9:.1f}/{self.total / 1e9:.1f} GB | left {clock(left)}", flush=True)

    def close(self) -> None:
        print(f"{self.what} {self.total / 1e9:.3g} GB in {clock(time.perf_counter() - self.start)}", flush=True)


class _AsWritten(DefaultSavePlanner):
    """Saves tensors that are only promised: `make(key)` is asked for each when it is written."""

    def __init__(self, make):
        super().__init__(flatten_state_dict=False)
        self.make = make

    def lookup_object(self, index):
        return self.make(index.fqn)


def hf_to_megatron(hf_folder: str, output: str, dtype: torch.dtype | None = None) -> str:
    """Convert a Hugging Face folder to a torch_dist checkpoint of iteration 0; returns its folder.

    Args:
        output: a directory without checkpoints; made where there is none.
        dtype: of all weights; None: as they are.

    Raises:
        ValueError: naming --hf-model and the file, key or tensor that is wrong, or --output.
    """
    model = read_model(hf_folder, "--hf-model")
    weights = HFWeights(hf_folder, "--hf-model")
    weights.check(model)
    halves = [name for name, found in weights.dtypes.items() if found == torch.float16]
    if halves and dtype is None:
        raise ValueError(f"--hf-model {hf_folder}: the weights are float16 ({halves[0]}), which is not trained here; "
                         "give --dtype bf16 (which rounds them) or --dtype fp32 (which does not)")
    mixed = [entry.names for entry in model.entries.values() if len({weights.dtypes[name] for name in entry.names}) > 1]
    if mixed and dtype is None:
        raise ValueError(f"--hf-model {hf_folder}: {', '.join(mixed[0])} have several dtypes, and become one tensor; "
                         "give --dtype")
    promised = {key: torch.empty(entry.shape, dtype=dtype or weights.dtypes[entry.names[0]], device="meta")
                for key, entry in model.entries.items()}
    total = sum(tensor.nbytes for tensor in promised.values())
    if complete_iterations(output):
        raise ValueError(f"--output {output}: holds checkpoints already; name a new folder")
    _check_space(output, total, "--output")
    companions = read_companions(hf_folder)
    metadata = {"architecture": asdict(model.architecture), "tokenizer": _tokenizer(hf_folder, companions, model),
                "converted_from": {"hf_model": os.path.abspath(hf_folder), "family": model.family.architecture}}
    record = {"format": FORMAT, "train_state": {"iteration": 0, "consumed_samples": 0}, "layout": None,
              "optimizer": None, "metadata": metadata}

    progress = Progress("converted", total)

    def make(key: str) -> Tensor:
        entry = model.entries[key]
        tensor = entry.join([weights.read(name).to(promised[key].dtype) for name in entry.names])
        assert (tensor.dtype, tensor.shape) == (promised[key].dtype, promised[key].shape), key
        progress.add(tensor.nbytes)
        return tensor

    folder = os.path.join(output, folder_name(0))
    temporary = os.path.join(output, temporary_name(0))
    with writing(output, "--output"):
        clear_leftovers(output)
        # One file a tensor: torch keeps what it writes to a file in memory until the file is closed.
        writer = FileSystemWriter(temporary, single_file_per_rank=False, thread_count=1)
        checkpoint.save(promised, storage_writer=writer, planner=_AsWritten(make), no_dist=True)
        save_config(CheckpointingConfig("torch_dist"), temporary)
        torch.save({}, os.path.join(temporary, "common.pt"))
        write_companions(os.path.join(temporary, COMPANIONS), companions)
        write_json(os.path.join(temporary, RECORD), record)
        commit(output, temporary, folder, 0)
    progress.close()
    return folder


def megatron_to_hf(load: str, output: str, template: str | None = None, max_shard_size: int = 5 * 10**9) -> None:
    """Convert a checkpoint (the latest of a directory, or an iter_* folder itself) to a Hugging Face folder.

    Args:
        output: a folder that is not there yet, or empty.
        template: a Hugging Face folder whose configuration and tokenizer replace those that the checkpoint carries.
        max_shard_size: bytes of a safetensors file, unless one tensor has more.

    Raises:
        ValueError: naming --load, --output or --hf-template and what is wrong.
    """
    reader = CheckpointReader(load, "--load")
    if os.path.isdir(output) and os.listdir(output):
        raise ValueError(f"--output {output}: is not empty; name a new folder")
    companions = read_companions(os.path.join(reader.folder, COMPANIONS))
    if template is not None:
        if not os.path.isdir(template):
            raise ValueError(f"--hf-template {template}: no such folder")
        companions |= read_companions(template)
    model = _family_of(reader, companions, f"--hf-template {template}" if template else f"--load {reader.folder}")
    reader.check(model)
    tensors = {name: (reader.dtypes[key], shape) for key, entry in model.entries.items()
               for name, shape in zip(entry.names, entry.shapes)}
    total = sum(tensor_bytes(*tensor) for tensor in tensors.values())
    _check_space(output, total, "--output")
    companions = _configured(companions, model, next(iter(tensors.values()))[0])

    temporary = output.rstrip("/") + ".tmp"
    with writing(output, "--output"):
        shutil.rmtree(temporary, ignore_errors=True)
        write_companions(temporary, companions)
        _write_shards(temporary, tensors, _parts(reader, model), max_shard_size, Progress("converted", total))
        for name in os.listdir(temporary):
            sync(os.path.join(temporary, name))
        sync(temporary)
        if os.path.isdir(output):
            os.rmdir(output)
        os.rename(temporary, output)


class CheckpointReader:
    """Whole weights of a checkpoint, one at a time, whatever layout it was saved in.

    Raises:
        ValueError: as checkpoint.load_weights.
    """

    def __init__(self, directory: str, flag: str):
        self.flag, self.folder = flag, resolve(directory, flag)
        self.architecture = ModelArgs(**read_record(self.folder, flag)["metadata"]["architecture"])
        check_whole(self.folder, flag)
        with reading(self.folder, flag):
            self._reader = FileSystemReader(self.folder)
            self._metadata = self._reader.read_metadata()
            self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        stored = {key: value for key, value in self._metadata.state_dict_metadata.items()
                  if isinstance(value, TensorStorageMetadata) and not key.startswith("optimizer.")}
        self.dtypes = {key: value.properties.dtype for key, value in stored.items()}
        self.shapes = {key: tuple(value.size) for key, value in stored.items()}

    def check(self, model: HFModel) -> None:
        """ValueError unless the weights are the model's, each once, in its shape (rows may pad the vocabulary)."""
        where = f"{self.flag} {self.folder}"
        differ = self.shapes.keys() ^ model.entries.keys()
        if differ:
            raise ValueError(f"{where}: {', '.join(sorted(differ)[:8])}: not both in the checkpoint and in "
                             f"{model.family.architecture}; the conversion would lose it")
        for key, entry in model.entries.items():
            rows, *rest = self.shapes[key]
            is_padded = key in VOCABULARY and rows > entry.shape[0]
            if rest != [*entry.shape[1:]] or not (rows == entry.shape[0] or is_padded):
                raise ValueError(f"{where}: {key} has the shape {self.shapes[key]}, but the architecture says "
                                 f"{entry.shape}")

    def read(self, key: str) -> Tensor:
        """A whole tensor, rows that pad the vocabulary included."""
        wanted = {key: torch.empty(self.shapes[key], dtype=self.dtypes[key])}
        planner = DefaultLoadPlanner(flatten_state_dict=False)
        planner.set_up_planner(wanted, self._metadata, is_coordinator=True)
        with reading(self.folder, self.flag):
            self._reader.read_data(planner.create_local_plan(), planner).wait()
        return wanted[key]


@torch.no_grad()
def load_hf_weights(model, hf: HFModel, weights: HFWeights) -> None:
    """Set this rank's part of a policy's chunks, an encoder or a reference; padding of the vocabulary becomes 0."""
    for tensor in sharded_tensors(sharded_weights(model)):
        entry = hf.entries[tensor.key]
        whole = entry.join([weights.read(name) for name in entry.names])
        if tensor.key in VOCABULARY:
            whole = torch.nn.functional.pad(whole, (0, 0, 0, tensor.global_shape[0] - len(whole)))
        place = tensor.global_offset[tensor.prepend_axis_num:]
        tensor.data.copy_(whole[tuple(slice(first, first + size) for first, size in zip(place, tensor.data.shape))])


def _tokenizer(folder: str, companions: dict, model: HFModel) -> dict | None:
    """What the record says of the tokenizer; None where none travels with the model."""
    if not companions.keys() & set(TOKENIZER_FILES):
        print(f"--hf-model {folder}: no tokenizer files there; training will need --tokenizer-model", flush=True)
        return None
    tokenizer = build_tokenizer("HuggingFaceTokenizer", folder, model.architecture.vocab_size)
    return {"type": tokenizer.name, "fingerprint": tokenizer.fingerprint}


def _check_space(output: str, needed: int, flag: str) -> None:
    parent = os.path.abspath(output)
    while not os.path.isdir(parent):
        parent = os.path.dirname(parent)
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise ValueError(f"{flag} {output}: needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there")


def _family_of(reader: CheckpointReader, companions: dict, where: str) -> HFModel:
    """The model as the configuration at hand describes it, or by the checkpoint's architecture alone."""
    if CONFIG not in companions:
        return describe(reader.architecture, f"{reader.flag} {reader.folder}")
    model = parse_config(json.loads(companions[CONFIG]), f"{where}: {CONFIG}")
    differ = [f"{name} {value} (checkpoint {vars(reader.architecture)[name]})"
              for name, value in vars(model.architecture).items()
              if name not in FREE_FIELDS and value != vars(reader.architecture)[name]]
    if differ:
        raise ValueError(f"{where}: {CONFIG} describes another model than the checkpoint: {', '.join(differ)}")
    return model


def _configured(companions: dict, model: HFModel, dtype: torch.dtype) -> dict:
    """Companions whose config.json names the dtype of the weights, and a generation_config.json."""
    config = json.loads(companions[CONFIG]) if CONFIG in companions else write_config(model, dtype)
    key, name = "dtype" if "dtype" in config else "torch_dtype", str(dtype).removeprefix("torch.")
    made = {}
    if CONFIG not in companions or config.get(key) != name:
        made[CONFIG] = config | {key: name}
    if GENERATION_CONFIG not in companions:
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        made[GENERATION_CONFIG] = {"_from_model_config": True, **{key: config[key] for key in ids if key in config}}
    return companions | {name: json.dumps(value, indent=2).encode() + b"\n" for name, value in made.items()}


def _parts(reader: CheckpointReader, model: HFModel) -> Iterator[tuple[str, Tensor]]:
    """Every Hugging Face tensor, in the order of the model's entries."""
    for key, entry in model.entries.items():
        yield from zip(entry.names, entry.split(reader.read(key)), strict=True)


def _write_shards(folder: str, tensors: dict, parts: Iterator, max_shard_size: int, progress: Progress) -> None:
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
