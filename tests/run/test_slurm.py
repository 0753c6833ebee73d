"""What the job scripts of slurm/ start with, their checks and the comparison of runs; jobs themselves: tests/slurm/."""

import csv
import io
import json
import os
import re
import shutil
import subprocess
from collections import namedtuple
from pathlib import Path

import compare_runs
import preflight
import pytest
from preprocess_data import main as preprocess
from torch.utils.tensorboard import SummaryWriter

from megatron_ebft.checkpointing.folders import MANIFEST, resolve
from megatron_ebft.checkpointing.record import first_readable
from megatron_ebft.checkpointing.saver import Saver
from megatron_ebft.parallel.groups import init_parallel, shut_down
from megatron_ebft.run.build import build_run, check_batch
from megatron_ebft.run.configs import parallel_sizes
from megatron_ebft.run.flags import parse_args

SLURM = Path(__file__).parents[2] / "slurm"
TOKENIZER = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "64"]
MODEL = ["--num-layers", "4", "--hidden-size", "32", "--num-attention-heads", "4"]
SMALL = ["--train-iters", "4", "--seq-length", "24", "--global-batch-size", "4", "--eval-iters", "1",
         "--split", "80,20,0"]
JOB = ["--world-size", "4", "--ranks-per-node", "2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Flags of a run that has all it needs, and the folder of its files."""
    folder = tmp_path_factory.mktemp("run")
    with open(folder / "text.jsonl", "w") as file:
        for first in range(30):
            file.write(json.dumps({"text": " ".join(str((first + 3 * i) % 63) for i in range(60))}) + "\n")
    preprocess(["--input", str(folder / "text.jsonl"), "--output-prefix", str(folder / "set"), *TOKENIZER])
    data = ["--data-path", str(folder / "set_text_document")]
    init_parallel(1, 1, seed=1)
    start = build_run(parse_args([*data, *TOKENIZER, *MODEL, *SMALL, "--training-mode", "sft"]))
    Saver(str(folder / "base")).save(start.state, start.policy, start.optimizer, start.scheduler, start.metadata)
    shut_down()
    return folder, [*JOB, *data, *SMALL, "--use-checkpoint-args", "--pretrained-checkpoint", str(folder / "base"),
                    "--save", str(folder / "new"), "--load", str(folder / "new")]


@pytest.fixture
def script_flags(tmp_path):
    """(script, flags, environment) → what a job script hands to the training command."""
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm/lib.sh").write_text("train_until_done() { printf '%s\\n' \"$@\"; }")

    def flags_of(name: str, *flags: str, **environment: str) -> list[str]:
        return subprocess.run(["bash", str(SLURM / name), *flags], check=True, text=True, stdout=subprocess.PIPE,
                              env=os.environ | {"EBFT_REPO": str(tmp_path)} | environment).stdout.splitlines()
    return flags_of


@pytest.mark.parametrize("name", ["ebft_1b.sh", "ebft_8b.sh", "ebft_70b.sh", "sweep.sh"])
def test_flags_of_the_scripts(name, script_flags):
    """They parse, fit the ranks the script asks for, and give way to those after the script and to the environment."""
    args = parse_args(script_flags(name, "--lr", "3e-6", DATA="here"))
    assert args.lr == 3e-6 and args.data_path == ["here"] and args.save == args.load and args.bf16
    text = (SLURM / name).read_text()
    nodes, ranks = (int(re.search(rf"#SBATCH --{key}=(\d+)", text)[1]) for key in ("nodes", "ntasks-per-node"))
    with preflight.rank_zero(nodes * ranks, parallel_sizes(args)):
        check_batch(args)
    for line in ("--requeue", "--open-mode=append", "--signal=B:USR1@", "--output="):
        assert f"#SBATCH {line}" in text


def test_points_of_the_sweep(script_flags):
    points = set()
    for index in range(27):
        args = parse_args(script_flags("sweep.sh", SLURM_ARRAY_TASK_ID=str(index)))
        points.add((args.ebft_ce_coef, args.ebft_diversity_coef, args.ebft_whitening))
        name = f"ce{args.ebft_ce_coef:g}-diversity{args.ebft_diversity_coef:g}-{args.ebft_whitening}"
        assert args.save.endswith(f"/{name}")
    assert points == {(ce, alpha, whitening) for ce in (0, 0.03, 0.1) for alpha in (0, 0.5, 1)
                      for whitening in ("none", "paper", "released")}
    with pytest.raises(subprocess.CalledProcessError):
        script_flags("sweep.sh", SLURM_ARRAY_TASK_ID="27")


def check(capsys, *flags: str) -> tuple[int, str]:
    """Exit code and output of the preflight."""
    return preflight.main([*flags]), capsys.readouterr().out


def test_preflight_of_a_run_that_has_all(run, capsys):
    code, said = check(capsys, *run[1])
    assert code == 0 and "no GPUs, CPUs compute" in said and "starts afresh" in said
    size = float(re.search(r"a checkpoint takes (\S+) GB", said)[1]) * 1e9
    saved = sum(file.stat().st_size for file in Path(resolve(str(run[0] / "base"), "--load")).glob("*.distcp"))
    assert saved == pytest.approx(size, rel=0.25)  # a small model's headers count
    code, said = check(capsys, *run[1], "--save", str(run[0] / "base"), "--load", str(run[0] / "base"),
                       "--training-mode", "sft")
    assert code == 0 and "goes on from" in said


def test_preflight_names_all_that_is_missing(run, capsys):
    code, said = check(capsys, *run[1], "--world-size", "6", "--tensor-model-parallel-size", "4",
                       "--data-path", "/no/a", "/no/b", "--ebft-encoder-load", "/no/encoder", "--save", "/proc/new",
                       "--load", "/proc/new", "--gpus-per-node", "8", "--ranks-per-node", "8",
                       "--ebft-temperature", "0")
    assert code == preflight.EXIT_WRONG and "7 problems" in said, said
    for problem in ("torch .* sees 0 GPUs on this node", "--ebft-temperature 0.0: must be above 0",
                    "world size 6 is not a multiple of --tensor-model-parallel-size 4",
                    "--ebft-encoder-load /no/encoder: no", "--data-path /no/a: ", "--data-path /no/b: ",
                    "--save /proc/new: /proc cannot be written"):
        assert re.search(problem, said), f"no {problem!r} in {said}"


@pytest.mark.parametrize("flags, message", [
    (["--global-batch-size", "6"], "--global-batch-size 6: must be a multiple of --micro-batch-size 1 × 4 ranks"),
    (["--tokenizer-model", "/no/tokenizer"], "--tokenizer-model /no/tokenizer: no such folder"),
    (["--tokenizer-type", "NullTokenizer", "--vocab-size", "65", "--no-ebft-track-kl"], None),
    (["--fp8-param-gather"], "--fp8-param-gather: weights stay in bf16"),
    (["--pretrained-checkpoint", "/no/base"], "--pretrained-checkpoint /no/base: no such directory"),
    (["--seed", str(2**64)], "--seed 18446744073709551616: must be at most 2147483647"),
    (["--tensor-model-parallel-size", "0"], "--tensor-model-parallel-size 0: must be at least 1"),
    (["--bogus"], "unrecognized arguments: --bogus"),
    (["--data-cache-path", "/proc/new"], "--data-cache-path /proc/new: /proc cannot be written"),
    (["--tensorboard-dir", "/proc/new"], "--tensorboard-dir /proc/new: /proc cannot be written"),
    (["--split", "100,0,0"], "--split gives the valid split no share")])
def test_preflight_of_one_thing(run, capsys, flags, message):
    code, said = check(capsys, *run[1], *flags)
    assert (code, "all well" in said) == ((64, False) if message else (0, True)), said
    assert message is None or "1 problem\n" in said and message in said, said


def test_preflight_finds_a_damaged_checkpoint(run, capsys, tmp_path):
    copy = tmp_path / "base"
    shutil.copytree(run[0] / "base", copy)
    file = next(Path(resolve(str(copy), "--load")).glob("*.distcp"))
    os.truncate(file, file.stat().st_size - 1)
    code, said = check(capsys, *run[1], "--ebft-encoder-load", str(copy))
    assert code == 64 and re.search(rf"--ebft-encoder-load {copy}.* damaged \({file.name} has", said), said


def test_preflight_goes_back_to_an_older_checkpoint(run, capsys, tmp_path):
    """As training does, where --load has another one that is whole."""
    for iteration in (0, 8):
        shutil.copytree(run[0] / "base/iter_0000000", tmp_path / f"iter_{iteration:07d}")
    os.truncate(next((tmp_path / "iter_0000008").glob("*.distcp")), 1)
    flags = [*run[1], "--training-mode", "sft", "--save", str(tmp_path), "--load", str(tmp_path)]
    code, said = check(capsys, *flags)
    assert code == 0 and f"goes on from {tmp_path}/iter_0000000" in said, said
    newest = tmp_path / "iter_0000008"
    for name in (".metadata", "ebft.json", MANIFEST, "metadata.json"):  # cut, then with a flipped bit, then gone
        for damage in ("cut", "flip", "gone"):
            shutil.rmtree(newest)
            shutil.copytree(run[0] / "base/iter_0000000", newest)
            content = bytearray((newest / name).read_bytes())
            content[len(content) // 2] ^= 4
            (newest / name).write_bytes(content[:20] if damage == "cut" else content)
            if damage == "gone":
                (newest / name).unlink()
            code, said = check(capsys, *flags)
            assert code == 0 and f"goes on from {tmp_path}/iter_0000000" in said, (name, damage, said)
            is_named = name in ("ebft.json", MANIFEST)  # what training looks at before its ranks compare checksums
            assert first_readable(str(tmp_path), "--load")[0].endswith("0" if is_named else "8"), (name, damage)
    os.truncate(next((tmp_path / "iter_0000000").glob("*.distcp")), 1)
    code, said = check(capsys, *flags)
    assert code == 64 and re.search(rf"--load {tmp_path}/iter_0000008: .* damaged", said), said


def test_preflight_finds_a_full_disk(run, capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**12, 10**12 - 10**5, 10**5))
    code, said = check(capsys, *run[1])
    assert code == 64 and "0.0 GB are free, and 1 more checkpoint of 0.0 GB must fit" in said, said


def test_preflight_of_a_node_alone(run, capsys):
    assert check(capsys, *run[1], "--node-only", "--data-path", "/no/a")[0] == 0


def test_runs_side_by_side(tmp_path, capsys):
    """A run with a restart that did step 3 again, and one that has no evaluation yet."""
    for start, end in ((1, 4), (3, 6)):
        folder = str(tmp_path / "sweep/a/tensorboard")
        with SummaryWriter(folder, purge_step=start, filename_suffix=f".{start}") as writer:
            for step in range(start, end):
                writer.add_scalar("train/loss", start, step)
                writer.add_scalar("train/reward", 0.5, step)
                writer.add_scalar("train/tokens_per_second", 100 * step, step)
                writer.add_scalar("seconds/step", 2 * step, step)
                writer.add_scalar("eval/cfm", abs(step - 4) + 2 * start, step)
    with SummaryWriter(str(tmp_path / "sweep/b")) as writer:
        writer.add_scalar("train/loss", 1.0, 7)
    for form, sign in (("text", "  "), ("markdown", "|"), ("csv", ",")):
        compare_runs.main([str(tmp_path / "sweep"), "--format", form, "--output", str(tmp_path / "curves.png")])
        first, *_, a, b = capsys.readouterr().out.strip().splitlines()
        cells = [cell.strip() for cell in a.strip("|").split(sign) if cell.strip()]
        assert cells == ["a", "5", "1", "7.0000", "4.0000 @2", "+0.5000", "300", "30"], a
        assert b.strip("| ").startswith("b") and "7" in b and "CFM" in first
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        compare_runs.main([str(tmp_path / "nowhere")])


def test_runs_that_answer_questions(tmp_path, capsys):
    """Their columns: the last accuracy and the highest, pass@k by k. Seconds of steps that were not logged count."""
    for name, tags in (("a", {"accuracy": (0.25, 0.75, 0.5), "pass@16": (0.5, 0.75, 1.0), "pass@4": (0.25, 0.5, 0.75),
                              "length": (9, 9, 9)}), ("b", {})):
        with SummaryWriter(str(tmp_path / name)) as writer:
            for step in (0, 10, 20):
                for tag, values in tags.items():
                    writer.add_scalar(f"eval/answers/{tag}", values[step // 10], step)
                if step:
                    writer.add_scalar("train/loss", 1.0, step)
                    writer.add_scalar("seconds/step", step / 10, step)
    flags = ["--format", "csv", "--output", str(tmp_path / "curves.png")]
    compare_runs.main([str(tmp_path), *flags])
    a, b = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert list(a) == ["run", "steps", "restarts", "CFM", "best CFM", "CE", "best CE", "accuracy", "best accuracy",
                       "pass@4", "pass@16", "reward", "KL to start", "tokens/s", "seconds"]
    titles = ["accuracy", "best accuracy", "pass@4", "pass@16"]
    assert [a[title] for title in titles] == ["0.5000", "0.7500 @10", "0.7500", "1.0000"]
    assert [b[title] for title in titles] == [""] * 4
    assert a["seconds"] == b["seconds"] == "30"
    compare_runs.main([str(tmp_path / "b"), *flags])
    assert list(csv.reader(io.StringIO(capsys.readouterr().out)))[0] == [*compare_runs.COLUMNS]
