"""One run at a time in a folder of checkpoints."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_ebft.checkpointing import lock as lock_module
from megatron_ebft.checkpointing.lock import NAME, FolderLock

HOLDS = """
import sys
from megatron_ebft.checkpointing.lock import FolderLock
FolderLock(sys.argv[1]).acquire()
print("holds", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(lock_module, "WATCH", 0.2)
    monkeypatch.setattr(lock_module, "HEARTBEAT", 1e6)  # locks that a test has forgotten stay silent
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


def owned(folder: Path, **changes) -> dict:
    """Leave the lock of another process, on another machine unless `changes` say otherwise."""
    owner = FolderLock(str(folder)).owner | {"host": "node7", "machine": "another", "process": 1234567} | changes
    (folder / NAME).write_text(json.dumps(owner))
    return owner


def owner_of(folder: Path) -> dict:
    return json.loads((folder / NAME).read_text())


def test_two_runs_on_one_machine(tmp_path):
    """The second is refused while the first is alive, and has the folder at once when it has been killed."""
    first = subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path)], stdin=subprocess.PIPE, text=True,
                             stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])})
    assert first.stdout.readline() == "holds\n"
    with pytest.raises(ValueError, match=rf"--save {tmp_path}: process {first.pid} on .* writes its checkpoints there"):
        FolderLock(str(tmp_path)).acquire()
    first.kill()
    os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie, which is gone, too
    second = FolderLock(str(tmp_path))
    second.acquire(say=pytest.fail)
    assert owner_of(tmp_path) == second.owner
    first.communicate()
    FolderLock(str(tmp_path)).acquire()  # the same process
    second.release()
    assert os.listdir(tmp_path) == []


def test_a_process_with_the_number_of_one_that_has_ended(tmp_path):
    owned(tmp_path, machine=FolderLock(str(tmp_path)).owner["machine"], process=os.getppid(), started=1)
    FolderLock(str(tmp_path)).acquire(say=pytest.fail)


def test_a_run_on_another_machine(tmp_path, monkeypatch):
    """It is alive if it touches the file. Without that, and if the file says nothing, the folder is taken over."""
    said = []
    owned(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(lock_module, "WATCH", 1e6)
        patch.setattr(time, "sleep", lambda seconds: os.utime(tmp_path / NAME))
        with pytest.raises(ValueError, match="process 1234567 on node7 writes its checkpoints there"):
            FolderLock(str(tmp_path)).acquire(said.append)
    FolderLock(str(tmp_path)).acquire(said.append)
    assert owner_of(tmp_path)["process"] == os.getpid() and "whether process 1234567 on node7 is gone" in said[0]
    for nothing in ("", "[]", "[" * 100_000, "{}"):
        (tmp_path / NAME).write_text(nothing)
        FolderLock(str(tmp_path)).acquire(said.append)
        assert owner_of(tmp_path)["process"] == os.getpid()


def test_a_job_that_slurm_has_requeued(tmp_path, monkeypatch):
    """It neither waits nor is it refused on another node. On the same node the process itself is asked."""
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    owned(tmp_path, job="77")
    FolderLock(str(tmp_path)).acquire(say=pytest.fail)
    owned(tmp_path, job="77", machine=FolderLock(str(tmp_path)).owner["machine"], process=os.getppid(),
          started=lock_module._start_of(os.getppid()))
    with pytest.raises(ValueError, match=r"on node7 \(SLURM job 77\) writes"):
        FolderLock(str(tmp_path)).acquire(say=lambda line: None)


def test_an_owner_that_lost_the_folder_notices(tmp_path):
    lock = FolderLock(str(tmp_path))
    lock.acquire()
    lock.check()
    (tmp_path / NAME).unlink()
    lock.check()
    assert owner_of(tmp_path) == lock.owner
    thief = owned(tmp_path)
    with pytest.raises(ValueError, match="process 1234567 on node7 has taken this folder over"):
        lock.check()
    lock.release()
    assert owner_of(tmp_path) == thief


def test_the_owner_shows_that_it_is_alive(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_module, "HEARTBEAT", 0.01)
    lock = FolderLock(str(tmp_path))
    lock.acquire()
    os.utime(tmp_path / NAME, (0, 0))
    while os.stat(tmp_path / NAME).st_mtime == 0:
        time.sleep(0.01)
    lock.release()
