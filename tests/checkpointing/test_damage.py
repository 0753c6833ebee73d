"""Damaged and foreign checkpoints are refused, and the error names the file."""

import errno
import json
import os
import random

import pytest
from checkpoint_runs import ARGS, META, truncate
from torch.distributed.checkpoint import FileSystemReader

from megatron_ebft.checkpointing import manifest
from megatron_ebft.checkpointing.folders import MANIFEST, POINTER, complete_iterations
from megatron_ebft.checkpointing.loader import load_weights, newest_whole
from megatron_ebft.checkpointing.record import TrainState, read_metadata
from megatron_ebft.checkpointing.saver import Saver
from megatron_ebft.common import disk
from megatron_ebft.model.build import build_start

pytestmark = pytest.mark.usefixtures("one_rank")
DAMAGED = "--load .*iter_0000003: the checkpoint is damaged"


def refused(directory, match: str, **options) -> None:
    with pytest.raises(ValueError, match=match):
        load_weights(str(directory), build_start(ARGS), flag="--load", **options)


def test_nothing_to_load(tmp_path):
    refused(tmp_path / "no", "--load .*no: no such directory; name one")
    refused(tmp_path, "--load .*no complete checkpoint there")


@pytest.mark.parametrize("text", ["7", "release", ""])
def test_a_pointer_to_nowhere(copy, text):
    (copy / POINTER).write_text(text)
    refused(copy, f"--load .*says '{text}', but complete checkpoints there are 2, 3; write one of these")


def test_damaged_files_are_named(copy):
    folder = copy / "iter_0000003"
    data = next(folder.glob("*.distcp"))
    truncate(data)
    refused(copy, rf"--load .*damaged \({data.name} has \d+ bytes instead of \d+\).*there: 2\) into .*latest")
    data.unlink()
    refused(copy, f"damaged .{data.name} is missing")
    refused(folder, f"damaged .{data.name} is missing")


def test_any_flipped_byte_or_cut_is_noticed(copy, capfd):
    """Thirty of them, in files of any kind: each time the checkpoint before is taken, and the file is named."""
    generator, folder = random.Random(0), copy / "iter_0000003"
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for _ in range(30):
        path = generator.choice(files)
        content = path.read_bytes()
        place = generator.randrange(len(content))
        if generator.random() < 0.5:
            path.write_bytes(content[:place])
        else:
            path.write_bytes(content[:place] + bytes([content[place] ^ 1 << generator.randrange(8)]) +
                             content[place + 1:])
        assert newest_whole(str(copy)) == str(copy / "iter_0000002")
        said = capfd.readouterr().out
        assert "warning: --load" in said and "goes back to" in said
        assert path.name in said or "metadata" in said or path.name in ("ebft.json", MANIFEST), said
        with pytest.raises(ValueError, match="no checkpoint there is whole: .*iter_0000003"):
            newest_whole(str(folder))
        path.write_bytes(content)
    assert newest_whole(str(copy)) == str(folder)
    os.rename(folder / MANIFEST, copy / "kept")
    assert newest_whole(str(copy)) == str(copy / "iter_0000002")
    assert "says '3', but complete checkpoints there are 2" in capfd.readouterr().out
    os.rename(copy / "kept", folder / MANIFEST)
    for number in (2, 3):
        os.truncate(copy / f"iter_000000{number}" / MANIFEST, 10)
    with pytest.raises(ValueError, match="no checkpoint there is whole: .*iter_0000003.*damaged.*iter_0000002.*damag"):
        newest_whole(str(copy))


@pytest.mark.parametrize("keep", [1, 2])
def test_a_run_that_went_back_keeps_what_it_has_made_since(copy, saved, keep):
    """Iteration 3 is damaged: those made after going back to 2 count among the newest, 3 does not."""
    truncate(next((copy / "iter_0000003").glob("*.distcp")))
    os.rename(copy / "iter_0000003", copy / "iter_0000009")
    (copy / POINTER).write_text("9")
    assert newest_whole(str(copy)) == str(copy / "iter_0000002")
    saver = Saver(str(copy), keep=keep)
    for iteration in (4, 5):
        saver.save(TrainState(iteration), *saved[1].parts, META)
        saver.drop_old()
        assert complete_iterations(str(copy)) == [x for x in (2, 4, 5) if iteration - keep < x <= iteration or
                                                  (x, iteration, keep) == (2, 4, 2)]
    assert newest_whole(str(copy)) == str(copy / "iter_0000005")


@pytest.mark.parametrize("name", [".metadata", "ebft.json", "manifest.json", "metadata.json"])
def test_garbage_of_the_right_size_is_named(copy, name):
    path = copy / "iter_0000003" / name
    path.write_bytes(b"\xff" * path.stat().st_size)
    refused(copy, "--load .*iter_0000003: the checkpoint is damaged")


def test_garbage_in_common_state_is_named(copy):
    for path in [*(copy / "iter_0000003").glob("common.pt"), *(copy / "iter_0000003").glob("*.distcp")]:
        path.write_bytes(b"\xff" * path.stat().st_size)
    refused(copy, "--load .*iter_0000003: the checkpoint is damaged")


def test_another_architecture(saved):
    refused(saved[0], r"--load .*hidden_size \(saved 32, now 64\), kv_channels \(saved None, now 8\)",
            architecture={"num_layers": 4, "hidden_size": 64, "kv_channels": 8})


def test_another_format(copy):
    path = copy / "iter_0000003" / "ebft.json"
    path.write_text(path.read_text().replace('"format": 4', '"format": 1'))
    manifest = json.loads((copy / "iter_0000003" / MANIFEST).read_text())
    assert manifest["ebft.json"]["bytes"] == path.stat().st_size
    refused(copy, "--load .*iter_0000003: a checkpoint of format 1, and this version reads formats 3 and 4")
    with pytest.raises(ValueError, match="--pretrained-checkpoint .*format 1"):
        read_metadata(str(copy), flag="--pretrained-checkpoint")


@pytest.mark.parametrize("name, content, message", [
    ("../other", {"bytes": 1, "crc32": ""}, "names '../other', outside"),
    ("/dev/zero", {"bytes": 1, "crc32": ""}, "names '/dev/zero', outside"),
    ("pipe", {"bytes": 0, "crc32": ""}, "pipe is no regular file"),
    ("pipe", {"bytes": "0", "crc32": ""}, "says .* of pipe"), ("pipe", [0, ""], "says .* of pipe"),
    (".metadata", None, "does not name ebft.json and .metadata")])
def test_a_manifest_names_files_of_its_folder(copy, name, content, message):
    """Others would be read without end, or never begin."""
    path = copy / "iter_0000003" / MANIFEST
    os.mkfifo(copy / "iter_0000003/pipe")
    entries = json.loads(path.read_text()) | {name: content}
    path.write_text(json.dumps({name: entry for name, entry in entries.items() if entry is not None}))
    refused(copy, f"{DAMAGED}.*{message}")


@pytest.mark.parametrize("name", [MANIFEST, "ebft.json", ".metadata"])
def test_a_fifo_in_place_of_a_file(copy, name):
    path = copy / "iter_0000003" / name
    path.unlink()
    os.mkfifo(path)
    refused(copy, f"{DAMAGED}.*{name} .*no regular file")


@pytest.mark.parametrize("where, name", [(manifest, "_crc32"), (os, "stat"), (FileSystemReader, "read_data")])
def test_passing_errors_are_waited_out(copy, monkeypatch, where, name):
    """A stale handle is no damage: reading is tried again, and then fails with the error itself."""
    original, left = getattr(where, name), [2]

    def stale(*args, **kwargs):
        if left[0] and (where is not os or str(copy) in str(args[0])):
            left[0] -= 1
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return original(*args, **kwargs)

    monkeypatch.setattr(where, name, stale)
    monkeypatch.setattr(disk, "PAUSES", (0, 0))
    load_weights(str(copy), build_start(ARGS), flag="--load")
    assert left == [0]
    left[0] = 10**9
    with pytest.raises(OSError, match="Stale file handle") as caught:
        load_weights(str(copy), build_start(ARGS), flag="--load")
    assert disk.is_passing(caught.value) and "damaged" not in str(caught.value)
