"""Tests checkpoints of both formats, bit for bit against the tensors saved: damage, malice, full disks, kills.

Ranks are real processes that talk through gloo.
"""

import dataclasses
import errno
import io
import json
import math
import multiprocessing
import os
import pickle
import shutil
import signal
import time
import traceback
import zipfile
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import theta
from configurator import ConfigError, RunFailed
from conftest import small_disk
from engine import checkpoint
from engine.parallel import shard
from model import GPT
from optim import make_optimizers
from options import GPTConfig, RunConfig
from sample import load_model
from theta import Sizes, rank_of

CONFIG = dict(vocab_size=96, n_layer=1, n_head=2, d_model=36, block_size=32, structure="btt")
PLAIN = dict(
    seconds=1.5, best_val_loss=math.inf, wandb_id=None, scaler={}, meta={"tokenizer": "char96"},
    config={**CONFIG, "structured_layers": ("attn", "ffn", "lm_head"), "theta": None, "odd": {"a": [0.5, (1, ()), []]}},
)  # fmt: skip
RUN = RunConfig(lr=1e-2, weight_decay=0.0)
BATCH = torch.randint(96, (2, 8, 32), generator=torch.Generator().manual_seed(3))


def make_model_and_optimizers(seed, sharded=False):
    """A GPT with random weights and its optimizer without state, sharded over all ranks by FSDP2 or not."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**CONFIG))
    if sharded:
        shard(model, torch.device("cpu"), compiling=False)
    return model, make_optimizers(model, RUN)


def train(model, optimizers, steps):
    for _ in range(steps):
        model(*BATCH)[1].backward()
        optimizers.step()
        optimizers.zero_grad()
    return model, optimizers


def save(out_dir, step, model, optimizers):
    tensors = {"optimizer": optimizers.state_dict(), "model": model.state_dict()}
    os.makedirs(out_dir, exist_ok=True)
    checkpoint.save(out_dir, {**PLAIN, "step": step, **tensors})


def tensors_of(model, optimizers):
    """{flat name: whole tensor} of the weights and Adam's state."""
    state = {"optimizer": optimizers.state_dict(), "model": model.state_dict()}
    return {name: gather_whole(tensor).clone() for name, tensor in checkpoint.flatten_checkpoint(state).items()}


def gather_whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def are_equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def load(out_dir):
    """-> the checkpoint, and the messages printed while it was loaded."""
    said = []
    return checkpoint.load(out_dir, said.append), "\n".join(said)


@contextmanager
def one_rank():
    """A process group of this process alone, so that FSDP2 can make DTensors."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def run_on_ranks(world, function, *args, seconds=120):
    """Run function(rank, *args) in `world` processes; fail if one of them fails or hangs."""
    store = os.path.join(args[0], f"store{time.monotonic_ns()}")
    context = mp.start_processes(
        rank_main, (world, store, function, args), nprocs=world, join=False, start_method="forkserver"
    )
    deadline = time.monotonic() + seconds
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, "a rank hangs"
    finally:
        for process in context.processes:
            process.kill()


def rank_main(rank, world, store, function, args):
    torch.set_num_threads(1)
    os.environ["RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    function(rank, *args)
    dist.destroy_process_group()


# -- saving and loading


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with the runs "file" and "directory", each with steps 1 and 2 of the same training, and {step: tensors}."""
    folder, tensors = tmp_path_factory.mktemp("runs"), {}
    for name in ("file", "directory"):
        with one_rank():
            model, optimizers = make_model_and_optimizers(0, sharded=name == "directory")
            for step in (1, 2):
                train(model, optimizers, 1)
                save(folder / name, step, model, optimizers)
                tensors[step] = tensors_of(model, optimizers)
    return folder, tensors


def test_files_of_both_formats_have_their_names(runs):
    folder, _ = runs
    assert sorted(os.listdir(folder / "file")) == ["ckpt.pt", "ckpt_prev.pt"]
    assert sorted(os.listdir(folder / "directory")) == ["ckpt.dcp", "ckpt_prev.dcp"]
    assert sorted(os.listdir(folder / "directory" / "ckpt.dcp")) == [
        ".metadata", "__0_0.distcp", "manifest.json", "values.json",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["file", "directory"])
def test_round_trip_is_bit_exact(runs, name):
    folder, tensors = runs
    saved, said = load(folder / name)
    assert {key: saved[key] for key in PLAIN} == PLAIN and saved["step"] == 2 and not said
    assert repr(saved["config"]) == repr(PLAIN["config"])  # repr tells 1 from 1.0, and checks tuples within tuples
    assert os.path.dirname(saved["path"]) == str(folder / name)
    assert are_equal(checkpoint.flatten_checkpoint(saved), tensors[2])
    model, optimizers = make_model_and_optimizers(1)
    assert not are_equal(tensors_of(model, optimizers), tensors[2])
    checkpoint.restore(saved, model, optimizers)
    assert are_equal(tensors_of(model, optimizers), tensors[2])
    sizes = {tensor.shape for tensor in tensors[2].values()}
    assert (2,) in sizes and () in sizes  # gains, Adam's step counters
    rest = train(*make_model_and_optimizers(0), 3)
    assert are_equal(tensors_of(*train(model, optimizers, 1)), tensors_of(*rest))


@pytest.mark.parametrize("name", ["file", "directory"])
def test_load_model_reads_both_formats(runs, name):
    folder, tensors = runs
    model, meta = load_model(str(folder / name))
    assert are_equal({f"model.{key}": value for key, value in model.state_dict().items()}, {
        key: value for key, value in tensors[2].items() if key.startswith("model.")
    })  # fmt: skip
    assert meta == PLAIN["meta"]


def test_adams_state_is_restored_and_copied(runs):
    folder, tensors = runs
    saved, _ = load(folder / "file")
    for fused in (True, False):
        model, optimizers = make_model_and_optimizers(1)
        for group in optimizers.param_groups:
            group["fused"] = fused
        optimizers.load_state_dict(saved["optimizer"])
        got = checkpoint.flatten_checkpoint({"model": {}, "optimizer": optimizers.state_dict()})
        assert got and all(torch.equal(got[name], tensors[2][name]) for name in got)
        optimizers.parts[0].state[model.token_embedding.weight]["exp_avg"].zero_()
    assert are_equal(checkpoint.flatten_checkpoint(saved), tensors[2])  # the loaded tensors are copied, not shared


@pytest.mark.parametrize("name", ["file", "directory"])
@pytest.mark.parametrize("options", [dict(n_layer=2), dict(d_model=72), dict(vocab_size=108)])
def test_another_model_is_refused(runs, name, options):
    saved, _ = load(runs[0] / name)
    model = GPT(GPTConfig(**{**CONFIG, **options}))
    with pytest.raises(ConfigError, match="is of another model"):
        checkpoint.restore(saved, model, make_optimizers(model, RUN))


def test_cores_of_other_sizes_are_refused_in_one_line_with_the_reason(tmp_path, monkeypatch):
    """Earlier versions made a Kronecker layer of width 128 as (8 × 16) ⊗ (16 × 8), which loses rank."""
    options = dict(structure="kronecker", rank=1, d_model=128, n_head=2, n_layer=1, vocab_size=100, block_size=32)
    old = {(128, 128): Sizes(8, 16, 1, 16, 8, 1, 1)}
    with monkeypatch.context() as patch:
        now = theta.STRUCTURES["kronecker"]
        earlier = lambda d_in, d_out, options: old.get((d_in, d_out)) or now.function(d_in, d_out, options)  # noqa: E731
        patch.setitem(theta.STRUCTURES, "kronecker", now._replace(function=earlier))
        model = GPT(GPTConfig(**options))
    assert rank_of(model.blocks[0].attn.q.sizes) == 64
    state = {**PLAIN, "model": model.state_dict(), "optimizer": {}, "step": 1, "config": options}
    checkpoint.save(str(tmp_path), state)
    model = GPT(GPTConfig(**options))
    optimizers = make_optimizers(model, RUN)
    for read in (
        lambda: load_model(str(tmp_path)),
        lambda: checkpoint.restore(checkpoint.load(str(tmp_path)), model, optimizers),
    ):
        with pytest.raises(
            ConfigError, match="was made with other sizes: .*cores.*Earlier versions.* lost rank"
        ) as caught:
            read()
        assert "\n" not in str(caught.value)


def test_adams_state_is_complete_after_an_evaluation():
    """An evaluation leaves FSDP2's root parameters gathered, as objects that the optimizer does not know."""
    with one_rank():
        model, optimizers = train(*make_model_and_optimizers(0, sharded=True), 1)
        with torch.no_grad():
            model(BATCH[0])
        assert not isinstance(model.token_embedding.weight, DTensor), "nothing is gathered: this test checks nothing"
        assert optimizers.state_dict().keys() == dict(model.named_parameters()).keys()


# -- other numbers of ranks


def test_a_checkpoint_is_restored_on_any_number_of_ranks(tmp_path):
    plain = train(*make_model_and_optimizers(0), 2)
    save(tmp_path / "file", 2, *plain)
    torch.save(tensors_of(*plain), tmp_path / "before.pt")
    torch.save(tensors_of(*train(*plain, 1)), tmp_path / "after.pt")
    run_on_ranks(2, file_into_two_ranks_into_directory, tmp_path)
    names = os.listdir(tmp_path / "directory" / "ckpt.dcp")
    assert {"__0_0.distcp", "__1_0.distcp"} <= set(names)
    run_on_ranks(4, directory_into_ranks, tmp_path)
    model, optimizers = make_model_and_optimizers(1)
    saved, _ = load(tmp_path / "directory")
    checkpoint.restore(saved, model, optimizers)
    assert are_equal(tensors_of(model, optimizers), torch.load(tmp_path / "before.pt"))
    assert are_equal(checkpoint.flatten_checkpoint(saved), torch.load(tmp_path / "before.pt"))
    assert are_equal(tensors_of(*train(model, optimizers, 1)), torch.load(tmp_path / "after.pt"))


def file_into_two_ranks_into_directory(rank, folder):
    model, optimizers = make_model_and_optimizers(1, sharded=True)
    checkpoint.restore(checkpoint.load(folder / "file"), model, optimizers)
    check_and_step(folder, model, optimizers, lambda: save(folder / "directory", 2, model, optimizers))
    directory_into_ranks(rank, folder)


def directory_into_ranks(rank, folder):
    model, optimizers = make_model_and_optimizers(1, sharded=True)
    assert not are_equal(tensors_of(model, optimizers), torch.load(folder / "before.pt"))
    saved = checkpoint.load(folder / "directory")
    checkpoint.restore(saved, model, optimizers)
    assert not any(kind in saved for kind in ("model", "optimizer")), "whole tensors were read"
    check_and_step(folder, model, optimizers)


def check_and_step(folder, model, optimizers, between=lambda: None):
    """The tensors equal the saved ones, Adam's are sharded like the weights, and a step equals the unsharded run's."""
    assert are_equal(tensors_of(model, optimizers), torch.load(folder / "before.pt"))
    for p, state in optimizers.parts[0].state.items():
        kinds = {key: type(value) for key, value in state.items()}
        assert kinds == {"step": torch.Tensor, "exp_avg": DTensor, "exp_avg_sq": DTensor}
        assert state["exp_avg"].placements == p.placements and state["exp_avg"].to_local().shape == p.to_local().shape
    between()
    after, got = torch.load(folder / "after.pt"), tensors_of(*train(model, optimizers, 1))
    for name in after:  # sums are taken in another order, and Adam may divide by a number near zero
        torch.testing.assert_close(got[name], after[name], atol=1e-5, rtol=1e-3, msg=name)


# -- damage


def copy_to_damage(runs, name, tmp_path):
    """-> a copy of the run, for a test to damage, and the path of its newest checkpoint."""
    shutil.copytree(runs[0] / name, tmp_path / name)
    return tmp_path / name, tmp_path / name / ("ckpt.pt" if name == "file" else "ckpt.dcp")


def assert_skipped(out_dir, tensors, why="not a whole checkpoint"):
    """The newest checkpoint is skipped with one line that states why, and the previous one is loaded."""
    saved, said = load(out_dir)
    assert saved["step"] == 1 and "ckpt_prev" in saved["path"] and why in said, said
    assert "\n" not in said
    assert are_equal(checkpoint.flatten_checkpoint(saved), tensors[1])


def flip_bit(path, position):
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 16]))


def test_a_flipped_bit_in_a_weight_is_noticed_though_torch_does_not(runs, tmp_path):
    out_dir, path = copy_to_damage(runs, "file", tmp_path)
    weight = runs[1][2]["model.token_embedding.weight"]
    flip_bit(path, path.read_bytes().index(weight.numpy().tobytes()) + 1000)
    assert not torch.equal(torch.load(path, weights_only=True)["model"]["token_embedding.weight"], weight)
    assert_skipped(out_dir, runs[1])


@pytest.mark.parametrize("name", ["ckpt.pt", ".metadata", "__0_0.distcp", "manifest.json", "values.json"])
def test_a_flipped_bit_is_noticed_anywhere(runs, tmp_path, name):
    """The checkpoint is skipped, unless the bit lies in the padding between a file's records and changes nothing."""
    kind = "file" if name == "ckpt.pt" else "directory"
    out_dir, path = copy_to_damage(runs, kind, tmp_path)
    path = path if kind == "file" else path / name
    size, noticed = os.path.getsize(path), 0
    positions = [*range(0, size, size // 30), *range(min(size, 8)), *range(size - 8, size)]
    for position in positions:
        flip_bit(path, position)
        saved, said = load(out_dir)
        assert saved["step"] == (1 if said else 2)
        if not said:
            assert (
                are_equal(checkpoint.flatten_checkpoint(saved), runs[1][2])
                and {key: saved[key] for key in PLAIN} == PLAIN
            )
        noticed += bool(said)
        flip_bit(path, position)
    assert noticed > len(positions) / 2 if kind == "file" else noticed == len(positions)
    assert load(out_dir)[0]["step"] == 2


@pytest.mark.parametrize("name", ["ckpt.pt", ".metadata", "__0_0.distcp", "manifest.json", "values.json"])
def test_truncated_empty_and_missing_files_are_skipped(runs, tmp_path, name):
    kind = "file" if name == "ckpt.pt" else "directory"
    out_dir, path = copy_to_damage(runs, kind, tmp_path)
    path = path if kind == "file" else path / name
    size = os.path.getsize(path)
    for length in (size - 1, size // 2, 10, 0):
        os.truncate(path, length)
        assert_skipped(out_dir, runs[1])
    os.remove(path)
    if kind == "directory":
        assert_skipped(out_dir, runs[1])
    else:
        assert load(out_dir)[0]["step"] == 1


@pytest.mark.parametrize("text", ["{}", "[]", "null", '{"values.json": [0, 0]}'])
def test_a_manifest_without_files_is_damage(runs, tmp_path, text):
    out_dir, path = copy_to_damage(runs, "directory", tmp_path)
    (path / "manifest.json").write_text(text)
    assert_skipped(out_dir, runs[1])


def test_a_manifest_that_omits_a_file_is_damage(runs, tmp_path):
    for name in (".metadata", "__0_0.distcp", "values.json"):
        out_dir, path = copy_to_damage(runs, "directory", tmp_path / name)
        manifest = json.loads((path / "manifest.json").read_text())
        del manifest[name]
        (path / "manifest.json").write_text(json.dumps(manifest))
        assert_skipped(out_dir, runs[1])


def test_files_that_are_no_checkpoints_are_skipped(runs, tmp_path):
    out_dir, path = copy_to_damage(runs, "file", tmp_path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("letter.txt", "Dear reader")
    assert_skipped(out_dir, runs[1])
    for thing in ([1, 2], {"step": 3}, {"step": 3, "model": {}}, None):
        torch.save(thing, path)
        assert_skipped(out_dir, runs[1])
    os.remove(path)
    os.mkdir(path)
    assert_skipped(out_dir, runs[1])
    out_dir, path = copy_to_damage(runs, "directory", tmp_path)
    shutil.rmtree(path)
    path.write_text("Dear reader")
    assert_skipped(out_dir, runs[1])


@pytest.mark.parametrize("name", ["file", "directory"])
def test_if_all_checkpoints_are_damaged_loading_fails(runs, tmp_path, name):
    out_dir, path = copy_to_damage(runs, name, tmp_path)
    for path in os.listdir(out_dir):
        path = out_dir / path if name == "file" else out_dir / path / "__0_0.distcp"
        os.truncate(path, 100)
    with pytest.raises(RunFailed, match="no whole checkpoint.*another out_dir") as error:
        load(out_dir)
    assert str(error.value).count("ckpt") == 2
    assert checkpoint.describe_newest(out_dir) == "there is no whole checkpoint"


def test_a_checkpoint_replaced_while_it_is_read_is_an_error(runs, tmp_path):
    out_dir, path = copy_to_damage(runs, "directory", tmp_path)
    saved, _ = load(out_dir)
    shutil.rmtree(path)
    os.replace(out_dir / "ckpt_prev.dcp", path)
    with pytest.raises(RunFailed, match="newer one took its place.*try again"):
        saved["model"]


def test_compressed_members_are_damage(runs, tmp_path):
    """zipfile unpacks them and finds every CRC right, but torch maps the compressed bytes as numbers."""
    out_dir, path = copy_to_damage(runs, "file", tmp_path)
    rewrite_archive(path, lambda name, data: data, zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    garbage = torch.load(path, weights_only=True, mmap=True)["model"]["token_embedding.weight"]
    assert not torch.equal(garbage, runs[1][2]["model.token_embedding.weight"])
    assert_skipped(out_dir, runs[1], "is compressed")


def rewrite_archive(path, change, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path) as archive:
        members = {name: change(name, archive.read(name)) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def test_a_member_shorter_than_its_tensor_is_damage(runs, tmp_path):
    """torch would continue to read into the next member."""
    out_dir, path = copy_to_damage(runs, "file", tmp_path)
    rewrite_archive(path, lambda name, data: data[:-4] if name.endswith("/data/0") else data)
    assert_skipped(out_dir, runs[1], "sizes of its members")


HOSTILE = dict(
    step=[math.nan, "2", True, -1, None], seconds=["1.5", math.nan, math.inf, -1.0], best_val_loss=[math.nan, None],
    wandb_id=[3], config=[[], "{}"], meta=[None], scaler=[None, {"scale": 1.0}],
)  # fmt: skip


@pytest.mark.parametrize("name", ["file", "directory"])
def test_plain_values_that_are_missing_or_of_the_wrong_type_are_damage(runs, tmp_path, name):
    out_dir, path = copy_to_damage(runs, name, tmp_path)
    if name == "file":
        whole_one = torch.load(path, weights_only=True)
        write = lambda values: torch.save({**whole_one, **values}, path)  # noqa: E731
    else:
        values_now = json.loads((path / "values.json").read_text())
        write = lambda values: rewrite(path, "values.json", json.dumps({**values_now, **values}).encode())  # noqa: E731
    write({})
    assert load(out_dir)[0]["step"] == 2
    for key, values in HOSTILE.items():
        for value in values:
            write({key: value})
            assert_skipped(out_dir, runs[1], f"its {key}")
    assert HOSTILE.keys() == checkpoint.VALUES.keys()
    for key in (*HOSTILE, *(("model", "optimizer") if name == "file" else ())):
        if name == "file":
            torch.save({k: value for k, value in whole_one.items() if k != key}, path)
        else:
            left = {k: value for k, value in values_now.items() if k != key}
            rewrite(path, "values.json", json.dumps(left).encode())
        assert_skipped(out_dir, runs[1], key)


SPOILT = {
    "complex": (lambda t: t.to(torch.complex64), "is of torch.complex64"),
    "nan": (lambda t: t.clone().fill_(math.nan), "holds inf or NaN"),
    "inf": (lambda t: torch.cat((t[:-1], t[-1:] * math.inf)), "holds inf or NaN"),
    "sparse": (lambda t: t.to_sparse(), "not a dense tensor"),
    "text": (lambda t: "0.1", "has no attribute"),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_tensors_that_no_run_saves_are_damage(runs, tmp_path, kind):
    out_dir, path = copy_to_damage(runs, "file", tmp_path)
    saved, name = torch.load(path, weights_only=True), "position_embedding.weight"
    spoil, why = SPOILT[kind]
    for place in (saved["model"], saved["optimizer"][name]):
        key = name if place is saved["model"] else "exp_avg"
        right = place[key]
        place[key] = spoil(right)
        torch.save(saved, path)
        place[key] = right
        if kind == "text":
            assert load(out_dir)[0]["step"] == 1
        else:
            assert_skipped(out_dir, runs[1], why)


def test_integers_in_place_of_weights_are_refused(runs, tmp_path):
    """Some models hold integers, so only a comparison with the model shows the damage."""
    out_dir, path = copy_to_damage(runs, "file", tmp_path)
    saved = torch.load(path, weights_only=True)
    weight = saved["model"]["final_norm.weight"]
    saved["model"]["final_norm.weight"] = weight.long()
    torch.save(saved, path)
    with pytest.raises(ConfigError, match="final_norm.weight is of torch.int64, where the model has torch.float32"):
        checkpoint.restore(load(out_dir)[0], *make_model_and_optimizers(1))
    saved["model"]["final_norm.weight"] = weight
    saved["optimizer"]["final_norm.weight"]["exp_avg"] = weight.long()
    torch.save(saved, path)
    assert_skipped(out_dir, runs[1], "exp_avg is of torch.int64")


def without_chunk(metadata, name, chunk):
    del metadata.state_dict_metadata[name].chunks[0]


def without_part(metadata, name, chunk):
    del metadata.storage_data[MetadataIndex(name, chunk.offsets)]


def half_a_chunk(metadata, name, chunk):
    chunk.sizes = torch.Size((chunk.sizes[0] // 2, *chunk.sizes[1:]))


def beside_the_tensor(metadata, name, chunk):
    chunk.offsets = torch.Size((1, *chunk.offsets[1:]))


def of_another_dtype(metadata, name, chunk):
    entry = metadata.state_dict_metadata[name]
    entry.properties = dataclasses.replace(entry.properties, dtype=torch.int64)


def of_another_shape(metadata, name, chunk):
    entry = metadata.state_dict_metadata[name]
    entry.size = chunk.sizes = torch.Size((chunk.sizes[0] // 2, *chunk.sizes[1:]))


@pytest.mark.parametrize(
    "spoil", [without_chunk, without_part, half_a_chunk, beside_the_tensor, of_another_dtype, of_another_shape]
)
def test_metadata_that_do_not_cover_a_tensor_are_damage(runs, tmp_path, spoil):
    """DCP leaves whatever the memory holds where no chunk covers the tensor."""
    out_dir, path = copy_to_damage(runs, "directory", tmp_path)
    metadata, name = pickle.loads((path / ".metadata").read_bytes()), "model.token_embedding.weight"
    spoil(metadata, name, metadata.state_dict_metadata[name].chunks[0])
    rewrite(path, ".metadata", pickle.dumps(metadata))
    assert_skipped(out_dir, runs[1], name)


@pytest.mark.parametrize("kind", ["model", "optimizer"])
def test_a_directory_that_holds_nan_is_skipped(runs, tmp_path, kind):
    with one_rank():
        model, optimizers = train(*make_model_and_optimizers(0, sharded=True), 1)
        save(tmp_path, 1, model, optimizers)
        weight = model.token_embedding.weight
        with torch.no_grad():
            (weight if kind == "model" else optimizers.parts[0].state[weight]["exp_avg"]).to_local()[5, 3] = math.nan
        save(tmp_path, 2, model, optimizers)
    assert_skipped(tmp_path, runs[1], "holds inf or NaN")


def test_the_first_non_finite_tensor_is_named():
    model, optimizers = train(*make_model_and_optimizers(0), 1)
    state = {"model": model.state_dict(), "optimizer": optimizers.state_dict()}
    assert checkpoint.first_non_finite(state) is None
    weight = model.blocks[0].ffn_norm.weight
    for value in (math.inf, -math.inf, math.nan):
        optimizers.parts[0].state[weight]["exp_avg_sq"][2] = value
        assert checkpoint.first_non_finite(state) == "optimizer.blocks.0.ffn_norm.weight.exp_avg_sq"
    weight.data[0] = math.nan
    assert checkpoint.first_non_finite(state) == "model.blocks.0.ffn_norm.weight"


# -- reads that fail a few times, or always


def make_open_fail(monkeypatch, part_of_path, number, times):
    """The next `times` attempts to open a path that contains part_of_path fail with this errno -> list of attempts."""
    attempts = []

    def open_or_fail(path, *args, **kwargs):
        if part_of_path in str(path):
            attempts.append(path)
            if len(attempts) <= times:
                raise OSError(number, os.strerror(number), str(path))
        return open(path, *args, **kwargs)

    monkeypatch.setattr(checkpoint, "open", open_or_fail, raising=False)
    monkeypatch.setattr(checkpoint, "PAUSES", (0, 0))
    return attempts


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
@pytest.mark.parametrize("part", ["/ckpt.pt", "/ckpt.dcp/__0_0", "/ckpt.dcp/manifest", "/ckpt.dcp/.metadata"])
def test_a_failed_read_is_retried_and_not_taken_for_damage(runs, tmp_path, monkeypatch, part, number):
    out_dir, path = copy_to_damage(runs, "file" if part.endswith("pt") else "directory", tmp_path)
    before = sorted(out_dir.rglob("*"))
    with monkeypatch.context() as patch:
        make_open_fail(patch, part, number, times=2)
        saved, said = load(out_dir)
        assert saved["step"] == 2 and not said
    with monkeypatch.context() as patch:
        attempts = make_open_fail(patch, part, number, times=99)
        with pytest.raises(RunFailed) as error:
            load(out_dir)
        assert len(attempts) == 3
        assert str(error.value).startswith(
            f"{path} cannot be read ({os.strerror(number)}), tried 3 times: it may be whole"
        )
        assert "\n" not in str(error.value)
        assert str(error.value) == checkpoint.describe_newest(out_dir)
    assert sorted(out_dir.rglob("*")) == before and load(out_dir)[0]["step"] == 2


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_an_unreadable_folder_is_not_taken_for_an_empty_one(runs, tmp_path, monkeypatch, number):
    out_dir, path = copy_to_damage(runs, "file", tmp_path)
    lstat, attempts = os.lstat, []

    def failing(path, *args, **kwargs):
        attempts.append(path)
        if len(attempts) % 100 <= times:
            raise OSError(number, os.strerror(number), str(path))
        return lstat(path, *args, **kwargs)

    monkeypatch.setattr(os, "lstat", failing)
    monkeypatch.setattr(checkpoint, "PAUSES", (0, 0))
    times = 2
    assert load(out_dir)[0]["step"] == 2
    del attempts[:]
    assert checkpoint.exists(out_dir)
    times = 100
    for ask in (load, checkpoint.exists, checkpoint.set_aside):
        with pytest.raises(RunFailed, match=rf"cannot be read \({os.strerror(number)}\)"):
            ask(out_dir)


# -- malice


class Payload:
    """An object whose pickle makes a folder when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def payload(tmp_path):
    """A payload that is known to work; the test fails if it runs."""
    path = tmp_path / "pwned"
    pickle.loads(pickle.dumps(Payload(path)))
    path.rmdir()
    yield Payload(path)
    assert not path.exists(), "the payload ran"


def rewrite(path, name, data):
    """Write data to a file of a checkpoint directory, and the right checksum to the manifest."""
    (path / name).write_bytes(data)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest[name] = checkpoint.checksum_of(path / name)
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("form", ["pickle", "old pickle", "torch.save"])
def test_code_in_a_file_is_not_run(runs, tmp_path, payload, form):
    out_dir, path = copy_to_damage(runs, "file", tmp_path)
    saved = torch.load(path, weights_only=True)
    if form == "torch.save":
        torch.save({**saved, "scaler": payload}, path)
    else:
        path.write_bytes(pickle.dumps({**saved, "scaler": payload}, protocol=0 if "old" in form else 4))
    assert_skipped(out_dir, runs[1], "something other than tensors and plain values")


def test_code_in_a_directory_is_not_run(runs, tmp_path, payload):
    out_dir, path = copy_to_damage(runs, "directory", tmp_path)
    with open(path / ".metadata", "rb") as file:
        metadata = pickle.load(file)
    rewrite(path, ".metadata", pickle.dumps(payload))
    assert_skipped(out_dir, runs[1], "something other than tensors and plain values")
    metadata.planner_data = payload
    rewrite(path, ".metadata", pickle.dumps(metadata))
    assert_skipped(out_dir, runs[1], "something other than tensors and plain values")
    mkdir = b"os\nmkdir\n", b"posix\nmkdir\n", b"torch\nos.mkdir\n", b"builtins\neval\n", b"pathlib\nPosixPath\n"
    for function in mkdir:
        rewrite(path, ".metadata", b"c" + function + pickle.dumps((payload.path,), protocol=0)[:-1] + b"R.")
        assert_skipped(out_dir, runs[1], "something other than tensors and plain values")


def test_code_in_a_directorys_data_is_not_run(runs, tmp_path, payload):
    """It stands in place of a tensor, then as an object declared as bytes, which DCP would unpickle unrestricted."""
    out_dir, path = copy_to_damage(runs, "directory", tmp_path)
    with open(path / ".metadata", "rb") as file:
        metadata = pickle.load(file)
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    index, info = next(iter(metadata.storage_data.items()))
    parts = (path / "__0_0.distcp").read_bytes()
    info.offset, info.length = len(parts), len(buffer.getvalue())
    rewrite(path, "__0_0.distcp", parts + buffer.getvalue())
    rewrite(path, ".metadata", pickle.dumps(metadata))
    assert_skipped(out_dir, runs[1], "something other than tensors and plain values")
    metadata.state_dict_metadata[index.fqn] = BytesStorageMetadata()
    rewrite(path, ".metadata", pickle.dumps(metadata))
    assert_skipped(out_dir, runs[1], "something other than tensors and plain values")


# -- disks that refuse to write


@pytest.mark.parametrize("size", [200, 3000, 50_000])  # within values.json, within a small tensor, after many tensors
@pytest.mark.parametrize("name", ["file", "directory"])
def test_if_the_disk_refuses_to_write_the_previous_checkpoint_stays(runs, tmp_path, name, size):
    out_dir, path = copy_to_damage(runs, name, tmp_path)
    before = sorted(os.listdir(out_dir))
    with one_rank():
        model, optimizers = train(*make_model_and_optimizers(0, sharded=name == "directory"), 1)
        with small_disk(size), pytest.raises(RunFailed) as error:
            save(out_dir, 3, model, optimizers)
    message = str(error.value)
    assert f"out_dir={out_dir}: {path}.part" in message and "(File too large)" in message
    assert f"intact; last checkpoint: {path} of step 2" in message and "--resume" in message and "\n" not in message
    assert sorted(os.listdir(out_dir)) == before
    assert load(out_dir)[0]["step"] == 2


def test_a_full_disk_keeps_the_checkpoints(runs, tmp_path):
    out_dir, path = copy_to_damage(runs, "file", tmp_path)
    os.symlink("/dev/full", f"{path}.part")
    with pytest.raises(RunFailed, match=r"ckpt.pt.part cannot be written \(No space left on device\)"):
        save(out_dir, 3, *make_model_and_optimizers(0))
    assert sorted(os.listdir(out_dir)) == ["ckpt.pt", "ckpt_prev.pt"] and load(out_dir)[0]["step"] == 2
    save(out_dir, 3, *make_model_and_optimizers(0))
    assert load(out_dir)[0]["step"] == 3


@pytest.mark.parametrize("sharded", [False, True])
def test_saving_to_an_impossible_folder_fails_and_leaves_nothing(tmp_path, sharded):
    (tmp_path / "notes").touch()
    with one_rank():
        model, optimizers = make_model_and_optimizers(0, sharded)
        plain = {**PLAIN, "step": 1, "model": model.state_dict(), "optimizer": {}}
        with pytest.raises(RunFailed, match=r"\(Not a directory\).*there is no checkpoint"):
            checkpoint.save(tmp_path / "notes" / "run", plain)
        with pytest.raises(RunFailed, match="No such file or directory"):
            checkpoint.save(tmp_path / "nowhere", plain)
        with pytest.raises(RunFailed, match="TypeError" if sharded else "pickle"):
            checkpoint.save(tmp_path, {**plain, "config": {"d_model": lambda: 36}})
    assert os.listdir(tmp_path) == ["notes"]


# -- when one rank fails, all end and none waits


def test_if_one_rank_fails_to_save_or_load_all_know(runs, tmp_path):
    copy_to_damage(runs, "directory", tmp_path)
    copy_to_damage(runs, "file", tmp_path)
    run_on_ranks(2, failing_ranks, tmp_path)


def failing_ranks(rank, folder):
    model, optimizers = train(*make_model_and_optimizers(0, sharded=True), 1)

    def save_fails(out_dir, fails, model, optimizers):
        with small_disk(4000 if rank == fails else -1):
            with pytest.raises(RunFailed) as error:
                save(out_dir, 3, model, optimizers)
            assert "(File too large)" in str(error.value)
            assert ("of step 2" in str(error.value)) == (rank == 0)
        assert not any(".part" in name for name in os.listdir(out_dir))
        dist.barrier()

    for fails in (0, 1):
        save_fails(folder / "directory", fails, model, optimizers)
    save_fails(folder / "file", 0, *make_model_and_optimizers(0))
    save(folder / "directory", 3, model, optimizers)
    # Each rank verifies a share: whichever finds the damage, all take the previous checkpoint.
    for name in sorted(os.listdir(folder / "directory" / "ckpt.dcp")):
        dist.barrier()
        if rank == 0:
            flip_bit(folder / "directory" / "ckpt.dcp" / name, 100)
        dist.barrier()
        saved, said = load(folder / "directory")
        assert saved["step"] == 2 and ("not a whole" in said) == (rank == 0)
        dist.barrier()
        if rank == 0:
            flip_bit(folder / "directory" / "ckpt.dcp" / name, 100)
    dist.barrier()
    if rank == 0:
        flip_bit(folder / "file" / "ckpt.pt", os.path.getsize(folder / "file" / "ckpt.pt") // 2)
    dist.barrier()
    assert load(folder / "directory")[0]["step"] == 3 and load(folder / "file")[0]["step"] == 1
    for out_dir in (("nowhere", "file"), ("directory", "nowhere"), ("directory", "file")):
        with pytest.raises(ConfigError, match="out_dir must be on a file system that all nodes share"):
            load(folder / out_dir[rank])
    assert load(folder / "nowhere") == (None, "")
    if rank == 1:  # with alone=True it waits for no other rank
        assert checkpoint.load(folder / "directory", alone=True)["step"] == 3


def test_ranks_that_do_not_share_a_folder_publish_nothing(tmp_path):
    run_on_ranks(2, save_apart, tmp_path)
    assert not list(tmp_path.rglob("*.dcp")) and not list(tmp_path.rglob("*.distcp"))


def save_apart(rank, folder):
    checkpoint.PAUSES = (0.01,)
    with pytest.raises(ConfigError) as error:
        save(folder / str(rank), 1, *train(*make_model_and_optimizers(0, sharded=True), 1))
    message = str(error.value)
    assert "rank 0 does not see __1_0.distcp, which rank 1 has written" in message and "\n" not in message
    assert "--shard=fsdp" in message and "all nodes share" in message


def test_a_read_that_fails_on_one_rank_stops_all(runs, tmp_path):
    copy_to_damage(runs, "directory", tmp_path)
    run_on_ranks(2, one_rank_cannot_read, tmp_path)


def one_rank_cannot_read(rank, folder):
    with pytest.MonkeyPatch.context() as patch:
        make_open_fail(patch, "ckpt.dcp/values" if rank == 1 else "nothing", errno.EIO, times=99)
        with pytest.raises(RunFailed, match=r"ckpt.dcp cannot be read \(Input/output error\)"):
            load(folder / "directory")
    assert load(folder / "directory")[0]["step"] == 2


class Beats:
    """Counts the calls to a watchdog."""

    def __init__(self):
        self.beats = self.signs = 0

    def beat(self):
        self.beats += 1

    def show_life(self):
        self.signs += 1


def test_a_rank_that_writes_has_fewer_beats_than_those_that_wait(tmp_path):
    """So the watchdog blames a rank that hangs while it writes; after the save all ranks have equally many beats."""
    run_on_ranks(2, write_and_wait, tmp_path)


def write_and_wait(rank, folder):
    model, optimizers = train(*make_model_and_optimizers(0, sharded=True), 1)
    sharded = {"model": model.state_dict(), "optimizer": optimizers.state_dict()}
    file = small_state(1, sharded=False)
    save_while_one_waits(rank, folder, file, 0, checkpoint, "write_file")
    save_while_one_waits(rank, folder, file, 0, checkpoint, "make_newest")
    save_while_one_waits(rank, folder, sharded, 1, checkpoint.Writer, "write_data")
    save_while_one_waits(rank, folder, sharded, 0, checkpoint.Writer, "finish")
    save_while_one_waits(rank, folder, sharded, 1, checkpoint, "checksum_of")
    save_while_one_waits(rank, folder, sharded, 0, checkpoint, "find_missing")


def save_while_one_waits(rank, folder, state, writer, place, work):
    """Save while the function `work` of `place` waits, on the rank `writer`, until the other rank has made more beats."""
    store, original, beats = dist.distributed_c10d._get_default_store(), getattr(place, work), Beats()

    def beat():
        beats.beats += 1
        if rank != writer:
            store.set(work, str(beats.beats))

    def wait_and_work(*args, **kwargs):
        deadline = time.monotonic() + 20
        while rank == writer and not (store.check([work]) and int(store.get(work)) > beats.beats):
            assert time.monotonic() < deadline, f"the other rank is not ahead in {work}"
            time.sleep(0.01)
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(beats, "beat", beat)
        patch.setattr(place, work, wait_and_work)
        checkpoint.save(folder, {**PLAIN, "step": 1, **state}, watchdog=beats)
    counts = checkpoint.gather_from_ranks(beats.beats)
    assert counts[0] == counts[1] and (beats.signs > 0 or rank != writer)


# -- a new checkpoint replaces the last


def small_state(step, sharded):
    """The state for a checkpoint of a few numbers, all equal to the step."""
    weight = torch.full((5, 3), float(step))
    state = {"step": torch.tensor(float(step)), "exp_avg": weight + 0}
    if sharded:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        weight, state["exp_avg"] = (distribute_tensor(t, mesh, [Shard(0)]) for t in (weight, state["exp_avg"]))
    return {**PLAIN, "step": step, "model": {"a.weight": weight}, "optimizer": {"a.weight": state}}


def check_tensors(saved):
    tensors = checkpoint.flatten_checkpoint(saved)
    assert len(tensors) == 3 and all((tensor == saved["step"]).all() for tensor in tensors.values())


def test_after_a_change_of_format_the_newest_wins_and_two_are_kept(tmp_path):
    with one_rank():
        for step, sharded in enumerate([False, False, True, False, True, True, False], 1):
            checkpoint.save(tmp_path, small_state(step, sharded))
            saved, said = load(tmp_path)
            assert saved["step"] == step and saved["path"].endswith("ckpt.dcp" if sharded else "ckpt.pt") and not said
            check_tensors(saved)
            assert len(os.listdir(tmp_path)) == min(step, 2)
            if step > 1:
                (previous,) = (name for name in os.listdir(tmp_path) if "prev" in name)
                assert checkpoint.read(str(tmp_path / previous), 0, 1)["step"] == step - 1
    assert f"{tmp_path}/ckpt.pt of step 7" in checkpoint.describe_newest(tmp_path)


@pytest.mark.parametrize("steps", [(3, 4), (4, 3)])
def test_of_a_file_and_a_directory_the_later_step_is_loaded(tmp_path, steps):
    with one_rank():
        for step, sharded in zip(steps, (False, True)):
            os.mkdir(tmp_path / str(sharded))
            checkpoint.save(tmp_path / str(sharded), small_state(step, sharded))
    os.replace(tmp_path / "False" / "ckpt.pt", tmp_path / "ckpt.pt")
    os.replace(tmp_path / "True" / "ckpt.dcp", tmp_path / "ckpt.dcp")
    assert load(tmp_path)[0]["step"] == 4


def test_a_damaged_checkpoint_never_replaces_the_whole_previous_one(runs, tmp_path, monkeypatch):
    """Before and after each rename of a save, a whole checkpoint can be loaded."""
    out_dir, path = copy_to_damage(runs, "file", tmp_path)
    os.truncate(path, 1000)

    def check_and_rename(source, target):
        assert load(out_dir)[0]["step"] in (1, 3)
        rename(source, target)
        assert load(out_dir)[0]["step"] in (1, 3)

    rename = os.replace
    monkeypatch.setattr(os, "replace", check_and_rename)
    save(out_dir, 3, *make_model_and_optimizers(0))
    assert load(out_dir)[0]["step"] == 3


@pytest.mark.parametrize("sharded", [False, True])
def test_a_run_of_either_format_is_set_aside(tmp_path, sharded):
    os.mkdir(tmp_path / "run")
    checkpoint.set_aside(tmp_path / "run")
    assert os.listdir(tmp_path) == ["run"] and not checkpoint.exists(tmp_path / "run")
    with one_rank():
        checkpoint.save(tmp_path / "run", small_state(1, sharded))
    assert checkpoint.exists(tmp_path / "run")
    checkpoint.set_aside(tmp_path / "run", say=lambda message: None)
    assert os.listdir(tmp_path) == ["run.1"] and load(tmp_path / "run.1")[0]["step"] == 1


def test_only_a_runs_own_files_are_set_aside(tmp_path, monkeypatch):
    """Twice, and from the working folder too; a log without checkpoints counts as a run, an empty folder does not."""
    own = [
        "ckpt.pt", "ckpt.pt.part", "ckpt_best.pt", "ckpt_step500.pt", "config.json", "config.json.node-7.lan.41.part",
        "experts.png", "log.jsonl", "loss.png", "loss.png.node-7.lan.41.part",
    ]  # fmt: skip
    others = ["notes.md", "quickstart", "train.log", "train.py"]
    monkeypatch.chdir(tmp_path)
    for folder, aside in ((".", "run"), ("other/", "other")):
        os.makedirs(folder, exist_ok=True)
        checkpoint.set_aside(folder, say=lambda message: pytest.fail(message))
        for number in (1, 2):
            for name in (*own, *others):
                (tmp_path / folder / name).write_text(f"{name} {number}")
            said = []
            checkpoint.set_aside(folder, said.append)
            assert said == [f"{os.path.normpath(folder)} held an earlier run: moved to {said[0].split()[-1]}"]
            assert os.path.normpath(said[0].split()[-1]) == f"{aside}.{number}"
            assert sorted(os.listdir(f"{aside}.{number}")) == own
            assert (tmp_path / f"{aside}.{number}" / "log.jsonl").read_text() == f"log.jsonl {number}"
            left = sorted(name for name in os.listdir(folder) if not name.startswith(("run.", "other")))
            assert left == others
    (tmp_path / "other" / "log.jsonl").write_text("{}")
    (tmp_path / "other" / "config.py").touch()
    checkpoint.set_aside("other", said.append, also=("config.py",))
    assert sorted(os.listdir("other.3")) == ["config.py", "log.jsonl"]


@pytest.mark.parametrize("links", [True, False])
def test_kept_checkpoints_outlive_the_newest_two(tmp_path, monkeypatch, links):
    """In both formats, on a file system with and without hard links; each is whole, and none hides the newest."""

    def no_links(*paths):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    with one_rank():
        for step, sharded in enumerate([False, True, True, False, True], 1):
            names = ["ckpt_best.pt", *([f"ckpt_step{step}.pt"] if step < 3 else [])]
            checkpoint.save(tmp_path, small_state(step, sharded), names)
            for place, want in [("", step), ("ckpt_best.pt", step), ("ckpt_best.dcp", step), ("ckpt_step1.pt", 1)]:
                saved, said = load(os.path.join(tmp_path, place))
                assert saved["step"] == want and not said
                check_tensors(saved)
        checkpoint.save(tmp_path, small_state(6, True))
        assert load(tmp_path / "ckpt_step2.dcp")[0]["step"] == 2 and load(tmp_path / "ckpt_best.pt")[0]["step"] == 5
    left = ["ckpt.dcp", "ckpt_best.dcp", "ckpt_prev.dcp", "ckpt_step1.pt", "ckpt_step2.dcp"]
    assert sorted(os.listdir(tmp_path)) == left
    assert checkpoint.exists(tmp_path / "ckpt_best.dcp") and not checkpoint.exists(tmp_path / "ckpt_step9.pt")
    assert load(tmp_path / "ckpt_step9.pt") == (None, "")


def test_if_there_is_no_room_for_a_kept_checkpoint_none_is_lost(tmp_path, monkeypatch):
    def full(*paths, watchdog):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    checkpoint.save(tmp_path, small_state(1, False), ["ckpt_best.pt"])
    monkeypatch.setattr(checkpoint, "link_or_copy", full)
    with pytest.raises(RunFailed, match=r"\(No space left on device\).*of step 1"):
        checkpoint.save(tmp_path, small_state(2, False), ["ckpt_best.pt"])
    assert sorted(os.listdir(tmp_path)) == ["ckpt.pt", "ckpt_best.pt"]
    assert load(tmp_path / "ckpt_best.pt")[0]["step"] == 1


@pytest.mark.parametrize("sharded", [False, True])
def test_weights_alone_are_restored(runs, sharded):
    """From either format into either kind of model: the weights of step 2, and no Adam state."""
    folder, tensors = runs
    for name in ("file", "directory"):
        with one_rank():
            model, optimizers = make_model_and_optimizers(7, sharded)
            checkpoint.restore(load(folder / name)[0], model)
            got = tensors_of(model, optimizers)
        want = {key: tensor for key, tensor in tensors[2].items() if key.startswith("model.")}
        assert are_equal(got, want)


@pytest.mark.parametrize("formats", ["fff", "ddd", "fdf"])
def test_a_save_killed_at_any_stage_leaves_a_whole_checkpoint(tmp_path, formats):
    """SIGKILL before the n-th change of the disk, for every n; then another save follows, itself killed or not."""
    process = multiprocessing.get_context("spawn").Process(target=kill_at_every_stage, args=(tmp_path, formats))
    process.start()
    process.join(timeout=120)
    hung = process.is_alive()
    process.kill()
    assert not hung and process.exitcode == 0
    stages = int((tmp_path / "stages").read_text())
    assert stages > {"fff": 15, "ddd": 40, "fdf": 20}[formats], "the test no longer sees what save does"


def kill_at_every_stage(folder, formats):
    # It runs in a process of its own, which only forks and checks: a fork of one with a process group would hang.
    import torch._dynamo  # noqa: F401  takes half a second, which every fork would spend again

    stage, killed = 0, True
    while killed:
        stage += 1
        out_dir = folder / str(stage)
        os.mkdir(out_dir)
        killed = run_in_fork(save_and_die, out_dir, formats, 1, stage)
        newest = step_found(out_dir)
        assert killed or newest == len(formats)
        # What a kill leaves behind must not disturb a later save in either format.
        after = "fd"[stage % 2]
        if stage % 4 < 2:
            run_in_fork(save_and_die, out_dir, after, 8, 1 + stage % 7)
            assert step_found(out_dir) >= newest
            newest = step_found(out_dir)
        assert not run_in_fork(save_and_die, out_dir, after, 9, math.inf)
        assert step_found(out_dir) == 9
        left = {path for path in os.listdir(out_dir) if path != "done"}
        assert {"f": "ckpt.pt", "d": "ckpt.dcp"}[after] in left and len(left) == (1 if newest == 0 else 2), left
        assert not any("part" in path or "aside" in path for path in left), left
        shutil.rmtree(out_dir)
    (folder / "stages").write_text(str(stage))


def run_in_fork(function, *args):
    """Run function(*args) in a fork -> whether SIGKILL ended it."""
    pid = os.fork()
    if pid == 0:
        try:
            function(*args)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL, status
    return status != 0


def save_and_die(out_dir, formats, first_step, stage):
    """Save one step for each letter of formats; die at the stage-th call that changes the disk."""
    calls = 0

    def deadly(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == stage:
                if function is torch_save:
                    half = io.BytesIO()
                    torch_save(args[0], half)
                    args[1].write(half.getvalue()[: len(half.getvalue()) // 2])
                    args[1].flush()
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    torch_save = torch.save
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    steps = [small_state(step, name == "d") for step, name in enumerate(formats, first_step)]
    torch.save = deadly(torch.save)
    for name in ("replace", "rename", "fsync", "unlink", "remove", "rmdir", "mkdir"):
        setattr(os, name, deadly(getattr(os, name)))
    for step in steps:
        checkpoint.save(out_dir, step)
        (out_dir / "done").write_text(str(step["step"]))


def step_found(out_dir):
    """The step of the checkpoint that load finds, after checking that it is whole and not older than the last saved."""
    done = int((out_dir / "done").read_text()) if (out_dir / "done").exists() else 0
    saved = checkpoint.load(out_dir, say=lambda message: None)
    if saved is None:
        assert done == 0
        return 0
    check_tensors(saved)
    assert saved["step"] >= done
    return saved["step"]
