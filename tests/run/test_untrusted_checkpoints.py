"""No way of reading a checkpoint runs code from it, whoever wrote its files and their checksums."""

import pickle
import shutil
from pathlib import Path

import preflight
import pytest
import replay
import torch.distributed as dist
from resealed import Marker, edit_metadata, mark_common, mark_metadata, mark_random_states, resealed
from small_run import MODEL, SMALL, start
from torch.distributed.checkpoint.metadata import Metadata

from megatron_ebft.checkpointing.unpickling import read_metadata
from megatron_ebft.hf.convert import megatron_to_hf
from megatron_ebft.parallel import groups
from megatron_ebft.run.build import build_run
from megatron_ebft.run.flags import parse_args
from megatron_ebft.run.loop import train


@pytest.fixture(scope="module")
def made(tmp_path_factory, data):
    """A checkpoint of step 1 of a run on one rank, and that step as a file."""
    folder = tmp_path_factory.mktemp("made")
    groups.init_parallel(1, 1, seed=1)
    run, log = start(parse_args([*data, *MODEL, *SMALL, "--train-iters", "1", "--eval-interval", "0", "--save",
                                 str(folder / "run"), "--ebft-dump-steps", str(folder / "steps")]))
    train(run, log)
    log.close(0.0)
    groups.shut_down()
    return folder / "run/iter_0000001", folder / "steps/step_0000001.safetensors"


@pytest.fixture
def read(made, arguments, data, tmp_path):
    """(way, folder) → read that checkpoint in one of the ways there are."""
    def training(flag: str, folder: Path) -> None:
        groups.init_parallel(1, 1, seed=1)
        build_run(arguments("--save", str(tmp_path / "new"), flag, str(folder)))

    def read(way: str, folder: Path) -> None:
        if way.startswith("--"):
            training(way, folder)
        elif way == "convert":
            megatron_to_hf(str(folder), str(tmp_path / "hf"))
        elif way == "replay":
            replay.main(["--load", str(folder), "--batch", str(made[1]), "--output", str(tmp_path / "out.safetensors")])
        else:
            assert way == "preflight"
            assert preflight.main([*data, *MODEL, *SMALL, "--train-iters", "4", "--world-size", "1", "--ranks-per-node",
                                   "1", "--save", str(tmp_path / "new"), "--pretrained-checkpoint", str(folder)]) == 64
            raise ValueError

    yield read
    if dist.is_initialized():
        groups.shut_down()


def marked(made, tmp_path, mark) -> tuple[Path, Path, str]:
    """A copy of the checkpoint with a marker, the marker's folder, and what the refusal must name."""
    folder, marker = tmp_path / "marked", tmp_path / "marker"
    shutil.copytree(made[0], folder)
    with resealed(folder):
        named = mark(folder, marker)
    return folder, marker, named


@pytest.mark.parametrize("way", ["--load", "--pretrained-checkpoint", "--ebft-encoder-load", "convert", "replay",
                                 "preflight"])
def test_metadata_runs_no_code(made, read, tmp_path, capsys, way):
    folder, marker, named = marked(made, tmp_path, mark_metadata)
    with pytest.raises(ValueError, match=None if way == "preflight" else f"{folder}.*{named}"):
        read(way, folder)
    assert not marker.exists()
    if way == "preflight":
        assert f"{folder}/.metadata asks for posix.mkdir" in capsys.readouterr().out


@pytest.mark.parametrize("way, mark", [("--load", mark_random_states), ("--load", mark_common),
                                       ("--pretrained-checkpoint", mark_common)])
def test_objects_run_no_code(made, read, tmp_path, way, mark):
    folder, marker, named = marked(made, tmp_path, mark)
    with pytest.raises(ValueError, match=f"{folder}.*{named}"):
        read(way, folder)
    assert not marker.exists()


def test_a_pickle_leaves_classes_as_they_are(made, tmp_path):
    """It may set attributes of what it finds: of stand-ins, then, not of torch's classes."""
    path = tmp_path / ".metadata"
    path.write_bytes(b"c" + f"{Metadata.__module__}\n{Metadata.__name__}\n".encode() + b"(N}S'version'\nS'x'\nstb.")
    with pytest.raises(ValueError, match="does not describe a checkpoint"):
        read_metadata(str(path))
    assert Metadata.version is None
    path.write_bytes(pickle.dumps(Marker(tmp_path / "marker")))
    with pytest.raises(ValueError, match="asks for posix.mkdir"):
        read_metadata(str(path))


@pytest.mark.parametrize("place", ["../other.distcp", "/dev/zero", "..", "missing.distcp"])
def test_tensors_come_from_the_folder(made, read, tmp_path, place):
    def edit(metadata) -> None:
        next(iter(metadata.storage_data.values())).relative_path = place

    folder, _, _ = marked(made, tmp_path, lambda folder, _: edit_metadata(folder, edit))
    with pytest.raises(ValueError, match=f"{folder}.* damaged .*{place}"):
        read("--load", folder)
