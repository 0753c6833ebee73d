"""Checkpoints: training continues bit for bit, layouts may change, damage is named."""

import json
import os
import random
import resource
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy
import pytest
import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron_ebft.checkpointing.checkpoint import Saver, TrainState, load_checkpoint, load_weights, newest_whole
from megatron_ebft.checkpointing.files import MANIFEST, POINTER, complete_iterations, latest_iteration, read_metadata
from ranks import run_ranks

from megatron_ebft.checkpointing import files, fingerprint
from megatron_ebft.checkpointing.fingerprint import weights_fingerprint
from megatron_ebft.common.device import device
from megatron_ebft.model.attention import CausalPattern, as_mask
from megatron_ebft.model.decoder import ModelArgs, build_encoder, build_frozen, build_policy, unwrap
from megatron_ebft.parallel import errors, groups

pytestmark = pytest.mark.usefixtures("one_rank")

ARGS = ModelArgs(num_layers=4, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2,
                 kv_channels=8, vocab_size=60, padded_vocab_size=64, max_position_embeddings=64)
META = {"architecture": {"num_layers": 4, "hidden_size": 32}, "tokenizer": "fingerprint ü"}


def seed_all(seed: int) -> None:
    groups.set_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed)


class Run:
    """A policy with Megatron's optimizer and schedule, and a loop whose data comes from all random generators."""

    def __init__(self, distributed: bool = True, lr: float = 1e-2, overlap: bool = False, args: ModelArgs = ARGS,
                 **config):
        seed_all(1)
        ddp = DistributedDataParallelConfig(use_distributed_optimizer=distributed, overlap_param_gather=overlap,
                                            overlap_grad_reduce=overlap, bucket_size=2000)  # overlap: many buckets
        self.model = build_policy(args, ddp, **config)
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(optimizer="adam", lr=lr, min_lr=1e-4, weight_decay=0.1, clip_grad=1.0,
                            bf16=config.get("bf16", False), use_distributed_optimizer=distributed,
                            overlap_param_gather=overlap), self.model)
        self.scheduler = OptimizerParamScheduler(
            self.optimizer, init_lr=0.0, max_lr=lr, min_lr=1e-4, lr_warmup_steps=2, lr_decay_steps=20,
            lr_decay_style="cosine", start_wd=0.1, end_wd=0.1, wd_incr_steps=20, wd_incr_style="constant",
            use_checkpoint_opt_param_scheduler=False)
        self.parts = (self.model, self.optimizer, self.scheduler)

    def train(self, steps: int):
        ddp = self.model[0]
        for _ in range(steps):
            shift = random.randrange(8) + int(numpy.random.randint(8))
            token_BT = ((torch.randint(0, 64, (2, 16)) + shift) % 64).to(device())
            ddp.zero_grad_buffer()
            self.optimizer.zero_grad()
            positions = torch.arange(16, device=device()).expand(2, 16)
            logits_TBV = unwrap(ddp)(token_BT, positions, as_mask(CausalPattern()),
                                     labels=lambda hidden, model: model.head(hidden))
            loss = torch.nn.functional.cross_entropy(logits_TBV.float().flatten(0, 1), token_BT.t().flatten())
            (loss / groups.dp_size()).backward()
            ddp.finish_grad_sync()
            self.optimizer.step()
            self.scheduler.step(1)
        return self

    def weights(self) -> dict:
        return {name: p.detach().clone() for name, p in unwrap(self.model[0]).named_parameters()}

    def save(self, directory, iteration: int) -> str:
        saver = Saver(str(directory))
        saver.save(TrainState(iteration, 2 * iteration), *self.parts, META)
        return saver.finished()


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, one_rank):
    """A directory with iterations 2 and 3, and the run that wrote them."""
    directory = tmp_path_factory.mktemp("saved")
    run = Run().train(2)
    run.save(directory, 2)
    run.train(1).save(directory, 3)
    return directory, run


@pytest.fixture
def copy(saved, tmp_path):
    """A copy of `saved` to damage."""
    return Path(shutil.copytree(saved[0], tmp_path / "copy"))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


# --- continuing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [dict(), dict(bf16=True), dict(distributed=False),
                                     dict(distributed=False, bf16=True), dict(overlap=True)], ids=str)
def test_training_continues_bit_for_bit(tmp_path, options):
    first = Run(**options).train(2)
    first.save(tmp_path, 2)
    expected = first.train(3).weights()
    second = Run(**options)
    state, metadata = load_checkpoint(str(tmp_path), *second.parts, architecture=META["architecture"])
    assert (state, metadata) == (TrainState(iteration=2, consumed_samples=4), META)
    assert same(second.train(3).weights(), expected)


@pytest.mark.parametrize("distributed", [True, False])
def test_a_save_before_the_first_step_changes_nothing(tmp_path, distributed):
    expected = Run(distributed).train(2).weights()
    first = Run(distributed)
    first.save(tmp_path, 0)
    assert same(first.train(2).weights(), expected)
    second = Run(distributed)
    load_checkpoint(str(tmp_path), *second.parts)
    assert same(second.train(2).weights(), expected)


def two_ranks(one: str, two: str) -> dict:
    """On two ranks: continue at DP 2, save there, and fingerprint a one-rank checkpoint in three layouts."""
    groups.init_parallel(1, 1, seed=1)
    run = Run().train(2)
    run.save(two, 2)
    saved_print = weights_fingerprint(run.model[0])
    expected = run.train(2).weights()
    again = Run()
    load_checkpoint(two, *again.parts)
    result = {"continues": same(again.train(2).weights(), expected), "saved": saved_print,
              "trained": weights_fingerprint(run.model[0]), "prints": [], "agreed": ""}
    from_one = Run()
    load_checkpoint(one, *from_one.parts)
    result["prints"].append(weights_fingerprint(from_one.model[0]))
    try:
        with errors.together():
            if torch.distributed.get_rank() == 1:
                raise ValueError("only rank 1")
    except ValueError as error:
        result["agreed"] = str(error)
    result["full"] = [full_disk_on_rank_1(again, f"{two}/full", is_async) for is_async in (False, True)]
    for tensor_parallel, pipeline_parallel in ((2, 1), (1, 2)):
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(tensor_parallel, pipeline_parallel)
        groups.set_seed(1)
        module = build_frozen(ARGS, tensor_model_parallel_size=tensor_parallel, pipeline_dtype=torch.float32,
                              pipeline_model_parallel_size=pipeline_parallel)
        load_weights(one, module)
        result["prints"].append(weights_fingerprint(module))
    groups.shut_down()
    return result


def full_disk_on_rank_1(run, directory: str, is_async: bool) -> list[str]:
    """What a save says that rank 1 has no room for, and the one after it, with room again."""
    saver, said = Saver(directory, is_async=is_async), []
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (10_000, unlimited[0]):
        if torch.distributed.get_rank() == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
        try:
            saver.save(TrainState(2), *run.parts, META)
            said.append(saver.finished(wait=True))
        except ValueError as error:
            said.append(str(error))
    return said


def test_two_ranks(saved, tmp_path, capsys):
    one, run = saved
    ranks = run_ranks(2, "test_checkpoint:two_ranks", str(one), str(tmp_path))
    for result in ranks:
        assert result["continues"]
        assert result["agreed"] == "only rank 1"
        for failed, done in result["full"]:
            assert "cannot write there" in failed and "Earlier checkpoints are untouched" in failed, failed
            assert done == str(tmp_path / "full/iter_0000002")
        assert result["prints"] == [weights_fingerprint(run.model[0])] * 3  # DP 2, TP 2, PP 2
    single = Run()
    load_checkpoint(str(tmp_path), *single.parts)  # DP 2 → DP 1
    assert "saved with world_size 2, now 1, data_parallel_size 2, now 1; random states" in capsys.readouterr().out
    assert weights_fingerprint(single.model[0]) == ranks[0]["saved"]
    seed_all(5)
    expected = single.train(2).weights()
    moved = Run()
    load_checkpoint(str(tmp_path), *moved.parts)
    single_state, moved_state = (r.optimizer.chained_optimizers[0].optimizer.state for r in (single, moved))
    assert all(float(s["step"]) == 4 for s in single_state.values())
    assert all(float(s["step"]) == 2 and float(s["exp_avg"].abs().max()) > 0 for s in moved_state.values())
    seed_all(5)
    assert same(moved.train(2).weights(), expected)


# --- weights alone ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bf16", [False, True])
def test_truncated_encoder_takes_the_lower_layers(saved, bf16):
    directory, run = saved
    encoder = build_encoder(ARGS, 2, bf16=bf16)
    assert load_weights(str(directory / "iter_0000003"), encoder, architecture={"hidden_size": 32}) == META
    policy, kept = run.weights(), dict(unwrap(encoder).named_parameters())
    assert {name.split(".")[2] for name in kept if "layers" in name} == {"0", "1"}
    assert not any("final" in name or "output" in name for name in kept)
    assert all(torch.equal(p, policy[name].to(p.dtype)) for name, p in kept.items())


def test_tensors_that_do_not_fit_are_named(saved):
    directory = str(saved[0])
    with pytest.raises(ValueError, match="--ebft-encoder-load .*decoder.layers.4.*missing, needs"):
        load_weights(directory, build_encoder(ARGS, 5), flag="--ebft-encoder-load")
    wide = ModelArgs(**{**vars(ARGS), "vocab_size": 65, "padded_vocab_size": 128})
    with pytest.raises(ValueError, match=r"word_embeddings.weight: shape \(64, 32\), needs \(128, 32\)"):
        load_weights(directory, build_frozen(wide))


def test_fingerprint_sees_every_element_and_its_place():
    module = build_frozen(ARGS)
    original = weights_fingerprint(module)
    assert original == weights_fingerprint(module) and len(original) == 16
    prints = {original}
    for name, parameter in module.named_parameters():
        if ".1." in name or "layers" not in name:
            flat = parameter.data.view(-1)
            flat[3] += 2 ** -20
            prints.add(weights_fingerprint(module))
            flat[3] -= 2 ** -20
    changed = len(prints)
    fc1 = module.decoder.layers[0].mlp.linear_fc1.weight.data
    fc1[[0, 50]] = fc1[[50, 0]]  # a gate row with an up row
    prints.add(weights_fingerprint(module))
    fc1[[0, 50]] = fc1[[50, 0]]
    a, b = (module.decoder.layers[i].mlp.linear_fc2.weight for i in (0, 1))
    a.data, b.data = b.data, a.data
    prints.add(weights_fingerprint(module))
    a.data, b.data = b.data, a.data
    assert changed == 1 + 6 + 3 and len(prints) == changed + 2
    assert weights_fingerprint(module) == original


def test_fingerprint_does_not_depend_on_chunks():
    data = torch.randn(6, 10)
    tensor = ShardedTensor.from_rank_offsets("key", data, (0, 1, 2), (1, 0, 3), (2, 2, 3),
                                                        prepend_axis_num=1)
    whole = fingerprint._tensor_hash(tensor, 0)
    assert all(torch.equal(whole, fingerprint._tensor_hash(tensor, 0, chunk)) for chunk in (1, 7, 20, 59, 60))


# --- saving ----------------------------------------------------------------------------------------------------------


def test_folder_layout(saved):
    directory, _ = saved
    assert sorted(os.listdir(directory)) == ["iter_0000002", "iter_0000003", "latest_checkpointed_iteration.txt"]
    assert (directory / POINTER).read_text() == "3" and latest_iteration(str(directory)) == 3
    record = json.loads((directory / "iter_0000003/ebft.json").read_text())
    assert record["metadata"] == META == read_metadata(str(directory))
    assert record["train_state"] == asdict(TrainState(3, 6))
    assert record["optimizer"] == {"class": "DistributedOptimizer", "sharding": "fully_reshardable"}
    assert set(record["layout"].values()) == {1}


def test_a_killed_save_leaves_the_older_checkpoint(copy, saved, monkeypatch):
    run, rename = saved[1], os.rename

    def killed_before(source, target):
        if os.path.basename(source).startswith("iter_0000004.tmp"):
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", killed_before)
    with pytest.raises(KeyboardInterrupt):
        run.save(copy, 4)
    monkeypatch.undo()
    assert len(list(copy.glob("iter_0000004.tmp.*"))) == 1 and latest_iteration(str(copy)) == 3
    load_checkpoint(str(copy), *Run().parts)
    run.save(copy, 5)
    assert not list(copy.glob("*.tmp*")) and latest_iteration(str(copy)) == 5


def test_a_save_over_an_iteration_is_safe(copy, saved, monkeypatch):
    run, rename = saved[1], os.rename

    def killed_between(source, target):
        if os.path.basename(source).startswith("iter_0000003.tmp"):
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", killed_between)
    with pytest.raises(KeyboardInterrupt):
        run.save(copy, 3)
    monkeypatch.undo()
    assert not (copy / "iter_0000003").exists() and latest_iteration(str(copy)) == 3
    assert load_checkpoint(str(copy), *Run().parts)[0].iteration == 3  # from iter_0000003.old
    os.rename(copy / "iter_0000002", copy / "iter_0000009")
    run.save(copy, 3)
    assert sorted(os.listdir(copy)) == ["iter_0000003", "iter_0000009", "latest_checkpointed_iteration.txt"]
    load_checkpoint(str(copy), *Run().parts)


def test_a_lost_pointer_means_the_newest(copy, tmp_path):
    os.remove(copy / POINTER)
    os.remove(copy / "iter_0000003" / MANIFEST)
    assert latest_iteration(str(copy)) == 2
    assert latest_iteration(str(tmp_path / "nothing")) is None


def test_a_directory_that_cannot_be_written(tmp_path, saved):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--save .*file: cannot write there"):
        saved[1].save(tmp_path / "file", 1)


def test_old_checkpoints_are_removed(saved, tmp_path):
    run = saved[1]
    saver = Saver(str(tmp_path), keep=2, retain_interval=4)
    for iteration in range(1, 8):
        saver.save(TrainState(iteration), *run.parts, META)
    assert complete_iterations(str(tmp_path)) == [4, 6, 7] and latest_iteration(str(tmp_path)) == 7
    assert sorted(os.listdir(tmp_path)) == [*(f"iter_000000{i}" for i in (4, 6, 7)), POINTER]


def test_no_helper_of_a_save_imports_torch(saved):
    """It would cost every rank seconds of its first save."""
    server = filesystem_async._results_queue._queue._manager._process
    assert server.is_alive() and "libtorch" not in Path(f"/proc/{server.pid}/maps").read_text()
    assert "libtorch" in Path("/proc/self/maps").read_text()


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path):
    run, saver = Run().train(2), Saver(str(tmp_path), is_async=True)
    weights = run.weights()
    saver.save(TrainState(2), *run.parts, META)
    assert latest_iteration(str(tmp_path)) is None
    run.train(2)
    saver.save(TrainState(4), *run.parts, META)  # waits for the first
    assert latest_iteration(str(tmp_path)) == 2 and saver.finished() is not None
    while (folder := saver.finished()) is None:
        run.train(1)
    assert folder == str(tmp_path / "iter_0000004") and saver.finished() is None
    (tmp_path / POINTER).write_text("2")
    loaded = Run()
    load_checkpoint(str(tmp_path), *loaded.parts)
    assert same(loaded.weights(), weights) and not same(run.weights(), weights)


@pytest.mark.parametrize("is_async", [False, True])
def test_a_full_disk_leaves_the_older_checkpoint(copy, saved, is_async, monkeypatch):
    run, saver = saved[1], Saver(str(copy), is_async=is_async)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save():
        saver.save(TrainState(4), *run.parts, META)
        return saver.finished(wait=True)

    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000_000, unlimited[1]))
        assert save() is not None
        os.rename(copy / "iter_0000004", copy / "iter_0000001")
        (copy / POINTER).write_text("3")
        for bytes_left, spare in ((10_000, 1000), (1000, 1 << 25)):  # tensors do not fit; nor does the room kept free
            monkeypatch.setattr(files, "SPARE_BYTES", spare)
            resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, unlimited[1]))
            with pytest.raises(ValueError, match="--save .*: cannot write there .*Earlier checkpoints are untouched"):
                save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert latest_iteration(str(copy)) == 3 and load_checkpoint(str(copy), *Run().parts)[0].iteration == 3
    assert save() == str(copy / "iter_0000004") and not list(copy.glob("*.tmp*"))


# --- errors of loading -----------------------------------------------------------------------------------------------


def refused(directory, match: str, **options) -> None:
    with pytest.raises(ValueError, match=match):
        load_weights(str(directory), build_frozen(ARGS), flag="--load", **options)


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
    path.write_text(path.read_text().replace('"format": 3', '"format": 1'))
    manifest = json.loads((copy / "iter_0000003" / MANIFEST).read_text())
    assert manifest["ebft.json"]["bytes"] == path.stat().st_size
    refused(copy, "--load .*iter_0000003: a checkpoint of format 1, and this version reads format 3")
    with pytest.raises(ValueError, match="--pretrained-checkpoint .*format 1"):
        read_metadata(str(copy), flag="--pretrained-checkpoint")


def test_another_optimizer_or_schedule(saved):
    with pytest.raises(ValueError, match="--load .*the optimizer was another one .*Distributed.*FP32Optimizer"):
        load_checkpoint(str(saved[0]), *Run(distributed=False).parts)
    with pytest.raises(ValueError, match="--load .*learning rate do not match.*--override-opt-param-scheduler"):
        load_checkpoint(str(saved[0]), *Run(lr=2e-2).parts)
    for choice, lr in (("override_opt_param_scheduler", 2e-2), ("use_checkpoint_opt_param_scheduler", 1e-2)):
        run = Run(lr=2e-2)
        setattr(run.scheduler, choice, True)
        load_checkpoint(str(saved[0]), *run.parts)
        run.train(1)
        assert [group["max_lr"] for group in run.optimizer.param_groups] == [lr] * len(run.optimizer.param_groups)
