"""What a run records: the same values in TensorBoard, JSON Lines and Weights & Biases, and the page that shows them."""

import errno
import json
import math
import os
import sys
from pathlib import Path

import pytest
from small_run import MODEL, SMALL, by_tag, empty_charts, lines, scalars, start
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard import FileWriter

from megatron_ebft.run.flags import parse_args
from megatron_ebft.run.folders import check_folders
from megatron_ebft.run.logger import Logger
from megatron_ebft.run.loop import train
from megatron_ebft.run.sinks import weights_and_biases
from megatron_ebft.run.sinks.json_lines import JsonLines
from megatron_ebft.run.sinks.sink import Values
from megatron_ebft.run.sinks.tensorboard import TensorBoard

FLAGS = ["--train-iters", "4", "--eval-interval", "2", "--ebft-histogram-interval", "2", "--lr", "1e-3",
         "--ebft-document-mask", "--ebft-context-length", "5", "--seed", "2"]
"""In some of the rows of this seed, a document ends within a completion: one block of eight does not count."""


@pytest.fixture(scope="module")
def run(data, tmp_path_factory, one_rank):
    """The arguments of a run that has ended, which had Weights & Biases, offline."""
    folder = tmp_path_factory.mktemp("logged")
    args = parse_args([*data, *MODEL, *SMALL, *FLAGS, "--tensorboard-dir", str(folder / "tensorboard"),
                       "--wandb-project", "tests", "--wandb-save-dir", str(folder / "wandb")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        begun, log = start(args)
        assert train(begun, log)
        log.close(0.0)
    return args


def test_json_lines_have_the_values_of_tensorboard(run):
    rows, expected = lines(run.tensorboard_dir), scalars(run.tensorboard_dir)
    assert [row["iteration"] for row in rows] == [0, 1, 2, 3, 4]
    assert all(a["time"] <= b["time"] for a, b in zip(rows, rows[1:]))
    assert {"train/loss", "eval/cfm", "seconds/step", "run/restarts"} <= rows[2].keys()
    logged = by_tag(rows)
    assert logged.keys() == expected.keys()
    for tag, values in logged.items():
        assert [step for step, _ in values] == [step for step, _ in expected[tag]], tag
        assert [x for _, x in values] == pytest.approx([x for _, x in expected[tag]], rel=1e-6), tag  # float32 there


def wandb_records(folder):
    """The records of an offline run: a log of LevelDB's format behind a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    file, = folder.glob("wandb/offline-run-*/run-*.wandb")
    content, place, parts = file.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:  # the rest of a block is empty
            place += 32768 - place % 32768
            continue
        size, kind = int.from_bytes(content[place + 4:place + 6], "little"), content[place + 6]
        parts, place = parts + content[place + 7:place + 7 + size], place + 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def test_weights_and_biases_have_the_values_of_tensorboard(run):
    records = list(wandb_records(Path(run.wandb_save_dir)))
    rows = [{tuple(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for record in records if record.HasField("history")]
    assert [row["_step",] for row in rows] == [0, 1, 2, 3, 4]
    assert [sum(row["train/advantages", "values"]) for row in rows if ("train/advantages", "values") in row] == [
        32 * row["train/valid_blocks",] for row in rows if row["_step",] in (2, 4)]
    logged = by_tag([{"iteration": row["_step",], **{key[0]: value for key, value in row.items() if len(key) == 1}}
                     for row in rows])
    assert {tag: values for tag, values in logged.items() if tag[0] != "_"} == by_tag(lines(run.tensorboard_dir))
    config = {item.key: json.loads(item.value_json) for record in records if record.HasField("run")
              for item in record.run.config.update}
    assert config["lr"] == run.lr and config["ebft_stride"] == run.ebft_stride


def test_a_missing_package_is_named_before_training(arguments, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    args = arguments("--tensorboard-dir", str(tmp_path), "--wandb-project", "tests")
    with pytest.raises(ValueError, match="^--wandb-project tests: needs the package wandb .*: pip install wandb"):
        check_folders(args)


def test_a_resumed_run_continues_its_run_at_weights_and_biases(tmp_path):
    new = weights_and_biases.run_id(str(tmp_path), 0)
    assert weights_and_biases.run_id(str(tmp_path), 7) == new != weights_and_biases.run_id(str(tmp_path), 0)
    (tmp_path / weights_and_biases.RUN_ID).write_text("")  # as a full disk leaves it
    assert weights_and_biases.run_id(str(tmp_path), 7)


# ---------------------------------------------------------------- TensorBoard's page


def test_the_page(run):
    """Every chart finds values. Flags, texts and the mask are in the folder of the scalars."""
    assert empty_charts(run) == []
    assert [x.name for x in Path(run.tensorboard_dir).iterdir() if x.is_dir()] == []
    events = EventAccumulator(run.tensorboard_dir).Reload()
    tags = events.Tags()
    assert tags["images"] == ["mask"] and set(tags["histograms"]) == {"train/advantages", "train/cfm_of_blocks"}
    assert {"run/text_summary", "flags/text_summary", "rollouts/text_summary", "custom_scalars__config__"} <= set(
        tags["tensors"])
    flags = events.Tensors("flags/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "--ebft-histogram-interval=2" in flags and "| --ebft-stride | 4 |" in flags
    sizes = events.Tensors("run/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| blocks of a row | 4 |" in sizes and "| tokens of an encoder row | 88 |" in sizes  # 24 + 4 · 4 · 4
    data = HParamsPluginData.FromString(events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content)
    assert data.session_start_info.hparams["lr"].number_value == run.lr
    assert data.session_start_info.hparams["ebft_feature_layers"].string_value == "0.25 0.5 0.75"
    data = HParamsPluginData.FromString(events.SummaryMetadata("_hparams_/experiment").plugin_data.content)
    results = {info.name.tag for info in data.experiment.metric_infos}
    assert {"eval/cfm", "train/reward"} <= results <= set(tags["scalars"])


def test_histograms_have_the_blocks_that_count(run):
    """On one rank their means are the scalars'. Advantages with leave-one-out baselines have a mean of 0."""
    events = EventAccumulator(run.tensorboard_dir, size_guidance={"histograms": 0}).Reload()
    values = scalars(run.tensorboard_dir)
    cfm, advantages = events.Histograms("train/cfm_of_blocks"), events.Histograms("train/advantages")
    assert [event.step for event in cfm] == [event.step for event in advantages] == [2, 4]
    assert min(share for _, share in values["train/valid_blocks"]) < 1
    for event, other in zip(cfm, advantages):
        histogram, blocks = event.histogram_value, 2 * 4 * dict(values["train/valid_blocks"])[event.step]
        assert (histogram.num, other.histogram_value.num) == (blocks, blocks * 4)
        mean = dict(values["train/cfm"])[event.step]
        assert histogram.sum / blocks == pytest.approx(mean, rel=1e-5)
        assert abs(other.histogram_value.sum) < 1e-4 < other.histogram_value.max


# ---------------------------------------------------------------- JSON Lines


def record(sink, iteration: int, **scalars: float) -> None:
    sink.write(Values(iteration=iteration, scalars=scalars))


def test_a_line_grows_until_the_next_step(tmp_path):
    sink = JsonLines(str(tmp_path), 0)
    for iteration in (0, 1, 2):
        record(sink, iteration, a=iteration / 3)
        assert len(lines(tmp_path)) == iteration + 1  # on disk at once
        sink.write(Values(iteration=iteration, texts={"none": "of a scalar"}))
        record(sink, iteration, b=math.nan)
        record(sink, iteration, c=7)
    assert [{**row, "time": None} for row in lines(tmp_path)] == [
        {"iteration": i, "time": None, "a": i / 3, "b": None, "c": 7.0} for i in (0, 1, 2)]


def test_lines_after_the_checkpoint_are_dropped(tmp_path):
    first = JsonLines(str(tmp_path), 0)
    for iteration in range(1, 6):
        record(first, iteration, a=iteration)
    with open(first.path, "a") as file:
        file.write('{"iteration": 6, "ti')  # as a machine leaves it that loses its power
    resumed = JsonLines(str(tmp_path), 3)
    record(resumed, 3, evaluated=1)
    record(resumed, 4, a=44)
    rows = lines(tmp_path)
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4] and (rows[2]["evaluated"], rows[3]["a"]) == (1, 44)
    whole = Path(first.path).read_bytes()
    for _ in range(2):
        record(JsonLines(str(tmp_path), 0), 1, a=0)
    assert len(lines(tmp_path)) == 1 and Path(f"{first.path}.before1").read_bytes() == whole
    assert Path(f"{first.path}.before2").read_bytes().count(b"\n") == 1


def test_a_full_disk_costs_values_and_one_warning(tmp_path, monkeypatch, capsys, one_rank):
    """A write that ends half-way leaves complete lines, also where it was to lengthen one."""
    room, write = [10**6], os.pwrite

    def limited(file, content, place):
        inside = max(0, os.fstat(file).st_size - place)  # needs no room
        content = content[:inside + room[0]]
        if not content:
            raise OSError(errno.ENOSPC, "No space left on device")
        room[0] -= max(0, len(content) - inside)
        return write(file, content, place)

    monkeypatch.setattr(os, "pwrite", limited)
    sink = JsonLines(str(tmp_path), 0)
    log = Logger([sink], 9, 48, 4, None)
    log.record(1, {"a": 1.0})
    for space, iteration in ((20, 1), (0, 1), (30, 2), (0, 3)):
        room[0] = space
        log.record(iteration, {"b": 2.0, "a long name": 3.0})
        assert [row.keys() for row in lines(tmp_path)] == [{"iteration", "time", "a"}]
    room[0] = 10**6
    log.record(1, {"c": 1.0})
    log.record(4, {"d": 2.0}, flush=True)
    assert [row.keys() - {"time"} for row in lines(tmp_path)] == [{"iteration", "a", "c"}, {"iteration", "d"}]
    said = capsys.readouterr().out
    assert said.count("metrics.jsonl: cannot be written (") == said.count("Training goes on") == 1


def test_tensorboard_goes_on_after_a_full_disk(tmp_path, monkeypatch, capsys, one_rank):
    log = Logger([TensorBoard(str(tmp_path), 0, {}, {}, [])], 9, 48, 4, None)
    log.record(1, {"a": 1.0}, flush=True)
    with monkeypatch.context() as patch:
        patch.setattr(FileWriter, "flush", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
        log.record(2, {"a": 2.0}, flush=True)
        log.flush()
    log.record(3, {"a": 3.0}, flush=True)
    assert capsys.readouterr().out.count(f"warning: --tensorboard-dir {tmp_path}: cannot be written (") == 1
    assert {1: 1.0, 3: 3.0}.items() <= dict(scalars(tmp_path)["a"]).items()
