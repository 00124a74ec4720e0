"""Checkpoints that survive: written beside, flushed, renamed; the one before is kept; verified before use.

    out_dir/ckpt.pt    ckpt_prev.pt      the newest and the one before: each a file, by torch.save, or,
    out_dir/ckpt.dcp/  ckpt_prev.dcp/    of a model that FSDP2 has split, a directory:

        __0_0.distcp …  .metadata        each rank's parts of the tensors, and which is where, by torch's DCP
        values.json                      what is no tensor
        manifest.json                    {file: [bytes, CRC32]} of all these, written last

    ckpt_best.pt  ckpt_step500.pt  …     of --keep_best and --keep_every: names of their own for what was newest once

Either goes back into either kind of model, on any number of ranks. A checkpoint holds tensors and plain values only,
and reading one never runs code.
"""

import itertools
import json
import os
import pickle
import re
import shutil
import signal
import time
import warnings
import zipfile
import zlib
from contextlib import suppress

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from configurator import ConfigError, OneLineExit, RunFailed
from engine.nanogpt import from_nanogpt, is_nanogpts
from optim import copy_whole

# Aside is what was newest, while the next takes its place. A directory's name has .dcp where the file's has .pt.
PLACES = NEWEST, ASIDE, PREVIOUS = "ckpt.pt", "ckpt_aside.pt", "ckpt_prev.pt"
BEST = "ckpt_best.pt"

# ---------------------------------------------------------------------------------------
# When


class Saves:
    """When a run saves beside its evaluations, and what it keeps: save_minutes, keep_every, keep_best. SIGUSR1 asks for one."""

    def __init__(self, config, say=print):
        self.config, self.say, self.by_signal, self.last = config, say, False, time.monotonic()
        signal.signal(signal.SIGUSR1, self.ask)

    def ask(self, *_):
        self.by_signal = self.config.save
        self.say("asked to save: after this step" if self.config.save else "asked to save, but save=False", flush=True)

    def asked(self):
        """Whether this process has been asked for a checkpoint, or the clock asks: processes have to agree."""
        minutes = self.config.save_minutes
        return self.by_signal or (minutes > 0 and time.monotonic() - self.last >= 60 * minutes)

    def due(self, step):
        """Whether the checkpoint of this step is to stay."""
        return self.config.keep_every > 0 and step % self.config.keep_every == 0

    def save(self, checkpoint, best):
        """`save` to the run's out_dir; best: this one has the lowest validation loss so far."""
        step = checkpoint["step"]
        names = [f"ckpt_step{step}.pt"] if step and self.due(step) else []
        names += [BEST] if best and self.config.keep_best else []
        save(self.config.out_dir, checkpoint, names)
        self.by_signal, self.last = False, time.monotonic()


# ---------------------------------------------------------------------------------------
# Writing


def save(out_dir, checkpoint, keep=()):
    """Write `checkpoint` as the newest of out_dir; a kill at any moment leaves a whole one behind.

    keep        names under which it stays when it is no longer the newest, "ckpt_best.pt"
    checkpoint  {"model": {name: tensor}, "optimizer": Optimizers.state_dict(), and plain values: step, config, …}
    Every rank calls it and returns when all is done. Of DTensors each rank writes its parts, else rank 0 writes all.
    RunFailed on every rank where writing fails on any.
    """
    sharded = any(isinstance(tensor, DTensor) for tensor in checkpoint["model"].values())
    newest = os.path.join(out_dir, directory_name(NEWEST) if sharded else NEWEST)
    partial = newest + ".part"
    try:
        if sharded:
            write_directory(partial, checkpoint)
        else:
            run_on_ranks(write_file, partial, lambda file: torch.save(checkpoint, file), only=0)
        for name in keep:
            run_on_ranks(keep_as, partial, os.path.join(out_dir, name), only=0)
        run_on_ranks(make_newest, out_dir, partial, newest, only=0)
    except FailedOnARank as error:
        with suppress(FailedOnARank):
            run_on_ranks(remove_path, partial, only=0)
        raise RunFailed(
            f"out_dir={out_dir}: {partial} cannot be written ({error}): make room there, or see to its permissions, then "
            f"go on with --resume. What was saved before is intact; {describe_newest(out_dir)}"
        ) from None


def write_file(path, write):
    """write(file) into a new file, which is on the disk when this returns."""
    with open(path, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def write_directory(path, checkpoint):
    """Every rank its parts of the tensors, rank 0 the rest. FailedOnARank on every rank where any fails."""

    def write_json(name, value):
        write_file(os.path.join(path, name), lambda file: file.write(json.dumps(value, indent=1).encode()))

    def begin():
        remove_path(path)  # an earlier kill's
        os.mkdir(path)
        write_json("values.json", tag_tuples({k: v for k, v in checkpoint.items() if k not in ("model", "optimizer")}))

    def sums():  # of the files that this rank wrote
        rank, _ = group_rank()
        own = [".metadata", "values.json"] if rank == 0 else []
        own += [name for name in os.listdir(path) if name.startswith(f"__{rank}_")]
        return {name: checksum_of(os.path.join(path, name)) for name in own}

    def finish(*sums):
        Reader(path).read_metadata()  # should it not be readable, better to know now
        write_json("manifest.json", {name: entry for of_rank in sums for name, entry in of_rank.items()})
        flush_to_disk(path)

    run_on_ranks(begin, only=0)
    try:
        with warnings.catch_warnings(action="ignore"):
            planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
            dcp.save(flatten_checkpoint(checkpoint), storage_writer=Writer(path), planner=planner)
    except CheckpointException as failed:  # on every rank
        raise FailedOnARank(cause_of(failed)) from None
    run_on_ranks(finish, *gather_from_ranks(run_on_ranks(sums)), only=0)


def keep_as(path, kept):
    """A second name for a whole checkpoint, of either format, in the place of what had it. Hard links, where there are any."""
    folder, place = os.path.split(kept)
    kept = os.path.join(folder, directory_name(place)) if os.path.isdir(path) else kept
    remove_path(kept + ".part")
    try:
        if os.path.isdir(path):
            shutil.copytree(path, kept + ".part", copy_function=link_or_copy)
        else:
            link_or_copy(path, kept + ".part")
        for old in existing_paths(folder, place):
            if old != kept or os.path.isdir(old):
                remove_path(old)
        os.replace(kept + ".part", kept)
    except OSError:
        with suppress(OSError):
            remove_path(kept + ".part")
        raise


def link_or_copy(source, target):
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        with open(source, "rb") as file:
            write_file(target, lambda copy: shutil.copyfileobj(file, copy, 1 << 22))


def make_newest(out_dir, partial, newest):
    """`partial` becomes the newest, what was newest the one before; at any moment a whole one is in some place."""
    move_aside_to_previous(out_dir)
    for path in existing_paths(out_dir, NEWEST):
        os.replace(path, path_in_place(path, ASIDE))
    os.replace(partial, newest)
    flush_to_disk(out_dir)
    with suppress(OSError):  # the new one is in its place: what cannot be tidied now is tidied after the next
        move_aside_to_previous(out_dir)
        for path in existing_paths(out_dir, NEWEST, ".part"):  # an earlier kill's, in the other format
            remove_path(path)


def move_aside_to_previous(out_dir):
    """Where a newest one is in its place, that aside becomes the one before. A kill may have come between."""
    aside = existing_paths(out_dir, ASIDE)
    if aside and existing_paths(out_dir, NEWEST):
        for path in existing_paths(out_dir, PREVIOUS):
            remove_path(path)
        for path in aside:
            os.replace(path, path_in_place(path, PREVIOUS))


class Writer(dcp.FileSystemWriter):
    def storage_meta(self):
        return None  # it would be the path, which is about to change

    def write_data(self, plan, planner):
        try:
            return super().write_data(plan, planner)
        except Exception as error:  # sent to the other ranks it would lose its cause, the system's own words
            raise OSError(cause_of(error)) from None


# ---------------------------------------------------------------------------------------
# Reading


def load(out_dir, say=print, alone=False):
    """The newest whole checkpoint in out_dir, with its "path", as a dict; None where there is none.

    out_dir may be the path of one checkpoint instead, out/run/ckpt_best.pt (or .dcp), also of nanoGPT's ckpt.pt.
    Tensors are whole and on the CPU; a directory's are read when saved["model"] or saved["optimizer"] is asked for.
    Every rank calls it and gets the same checkpoint, unless alone=True. A damaged one is passed over with a message.
    RunFailed where all are damaged, ConfigError where the ranks do not see the same.
    """
    rank, world = (0, 1) if alone else group_rank()
    asked, places = out_dir, PLACES
    if names_one(out_dir):
        out_dir, place = os.path.split(out_dir)
        places = [place.removesuffix(".dcp").removesuffix(".pt") + ".pt"]
    names = [os.path.basename(path) for place in places for path in existing_paths(out_dir, place)]
    views = gather_from_ranks(names, alone)
    if any(view != views[0] for view in views):
        raise ConfigError(
            f"out_dir={out_dir}: not all ranks see the checkpoints that rank 0 sees: "
            "out_dir must be on a file system that all nodes share"
        )
    damaged = []
    for place in places:
        whole = []
        for path in [os.path.join(out_dir, name) for name in views[0] if name in (place, directory_name(place))]:
            try:
                whole.append(run_on_ranks(read, path, rank, world, asked != out_dir, alone=alone))
            except FailedOnARank as error:
                damaged.append(path)
                if rank == 0:
                    say(f"{path} is not a whole checkpoint ({error}): passed over")
        if whole:
            return max(whole, key=lambda saved: saved["step"])
    if damaged:
        raise RunFailed(
            f"out_dir={asked}: no whole checkpoint ({', '.join(damaged)} torn): start anew in another out_dir"
        )
    return None


def names_one(path):
    """Whether this is the path of a checkpoint, not of a folder that has some."""
    path = os.fspath(path)
    return path.endswith(".dcp") or (path.endswith(".pt") and not os.path.isdir(path))


def read(path, rank, world, any_kind=False):
    """The checkpoint at `path`, of which each of `world` ranks verifies a share. Exceptions of many kinds.

    any_kind: nanoGPT's too, which a run must not take for its own.
    """
    check_regular(path)
    if path.endswith(".dcp"):
        return Sharded(path, rank, world)
    if rank == 0:  # torch.load checks no CRC
        with open(path, "rb") as file:
            if file.read(2) not in (b"PK", b""):
                raise pickle.UnpicklingError("not of torch.save")
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"{damaged} is damaged")
    # Mapped: a rank reads what it uses, and the ranks of a machine share the memory.
    saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if is_nanogpts(saved):
        if not any_kind:
            raise ValueError(f"it is nanoGPT's: --init_from={path} starts from it")
        saved = from_nanogpt(saved)
    saved["step"], saved["config"], saved["model"], saved["optimizer"]
    return {**saved, "path": path}


def check_regular(path):
    """ValueError where the checkpoint at `path` has something other than files: opening a FIFO would wait for ever."""
    for file in [os.path.join(path, name) for name in os.listdir(path)] if path.endswith(".dcp") else [path]:
        if not os.path.isfile(file):
            raise ValueError(f"{os.path.basename(file)} is not a regular file")


class Sharded(dict):
    """The plain values of a checkpoint directory, which is verified here; its tensors when they are asked for."""

    def __init__(self, path, rank, world):
        self.manifest = read_json(path, "manifest.json")
        for name in sorted(self.manifest)[rank::world]:
            if checksum_of(os.path.join(path, name)) != self.manifest[name]:
                raise ValueError(f"{name} is damaged")
        metadata = Reader(path).read_metadata()
        entries = metadata.state_dict_metadata.items()
        self.blanks = {name: torch.empty(t.size, dtype=t.properties.dtype, device="meta") for name, t in entries}
        files = {part.relative_path for part in metadata.storage_data.values()}
        if not {".metadata", "values.json", *files} <= self.manifest.keys():
            raise ValueError("manifest.json is incomplete")
        super().__init__(read_json(path, "values.json"), path=path)
        self["step"], self["config"]

    def __missing__(self, key):
        if key not in ("model", "optimizer"):
            raise KeyError(key)
        tensors = {name: torch.empty_like(t, device="cpu") for name, t in self.blanks.items() if name.startswith(key)}
        self.read_into(tensors, alone=True)
        self[key] = nest_checkpoint(tensors)[key]
        return self[key]

    def read_into(self, tensors, alone=False):
        """Read {flat name: tensor or DTensor} in place, of a DTensor this rank's part."""
        path = self["path"]
        try:
            with warnings.catch_warnings(action="ignore"):
                planner = dcp.DefaultLoadPlanner(flatten_state_dict=False)
                dcp.load(tensors, storage_reader=Reader(path), planner=planner, no_dist=alone)
            if read_json(path, "manifest.json") != self.manifest:
                raise OSError("a newer one took its place meanwhile")
        except (OSError, CheckpointException) as error:
            raise RunFailed(f"{path} was whole, but cannot be read: {cause_of(error)}: try again") from None


class Reader(dcp.FileSystemReader):
    """DCP itself reads tensors with weights_only=True, but .metadata as a pickle that may run code."""

    def read_metadata(self):
        with open(os.path.join(self.path, ".metadata"), "rb") as file:
            return MetadataUnpickler(file).load()


class MetadataUnpickler(pickle.Unpickler):
    """Makes what DCP says of tensors. Not BytesStorageMetadata: other objects DCP would unpickle whatever they are."""

    allowed = {
        "torch.distributed.checkpoint.metadata": (
            "Metadata", "MetadataIndex", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        ),
        "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
        "torch.serialization": ("_get_layout",),
        "torch": ("Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))),
    }  # fmt: skip

    def find_class(self, module, name):
        if name not in self.allowed.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


# ---------------------------------------------------------------------------------------
# Model and optimizers


@torch.no_grad()
def restore(saved, model, optimizers=None):
    """Put what `load` gave into a model and its optim.Optimizers, whole or split; without optimizers, weights only.

    Every rank calls it and reads its parts only. ConfigError where it is of another model.
    """
    source = saved.blanks if isinstance(saved, Sharded) else flatten_checkpoint(saved)
    weights, state = model.state_dict(), {}
    if optimizers is None:
        source = {name: tensor for name, tensor in source.items() if name.startswith("model.")}
    else:
        state = optimizers.allocate_state(nest_checkpoint(source)["optimizer"])
    target = flatten_checkpoint({"model": weights, "optimizer": state})
    check_shapes(saved["path"], source, target)
    if isinstance(saved, Sharded):
        saved.read_into(target)
    else:
        for name, tensor in target.items():
            copy_whole(tensor, source[name])


def check_shapes(path, theirs, ours):
    """ConfigError where a checkpoint's tensors are not the model's: {name: tensor} of either."""
    one, other = ({(name, tuple(tensor.shape)) for name, tensor in tensors.items()} for tensors in (theirs, ours))
    if one == other:
        return
    name = min(one ^ other)[0]
    if theirs.keys() == ours.keys() and all(".cores." in name for name, _ in one ^ other):
        shapes = " there and ".join(str(tuple(tensors[name].shape)) for tensors in (theirs, ours))
        raise ConfigError(
            f"{path} was made with other sizes: {name} is {shapes} here. Earlier versions chose sizes that lost rank for this "
            "structure and width: use the version that made it, or train anew in another out_dir"
        )
    raise ConfigError(f"{path} is of another model: they differ in {name}")


def flatten_checkpoint(checkpoint):
    """{"model.<name>": tensor, "optimizer.<name>.<key>": tensor}, as DCP wants it."""
    tensors = {f"model.{name}": tensor for name, tensor in checkpoint["model"].items()}
    for name, state in checkpoint["optimizer"].items():
        tensors.update({f"optimizer.{name}.{key}": tensor for key, tensor in state.items()})
    return tensors


def nest_checkpoint(tensors):
    """flatten_checkpoint undone."""
    checkpoint = {"model": {}, "optimizer": {}}
    for path, tensor in tensors.items():
        kind, name = path.split(".", 1)
        if kind == "optimizer":
            name, key = name.rsplit(".", 1)
            checkpoint["optimizer"].setdefault(name, {})[key] = tensor
        else:
            checkpoint["model"][name] = tensor
    return checkpoint


# ---------------------------------------------------------------------------------------
# A run's folder


def exists(out_dir):
    """Whether out_dir has a checkpoint, whole or not, or is one."""
    if names_one(out_dir):
        return os.path.exists(out_dir)
    return any(existing_paths(out_dir, place) for place in PLACES)


# What a run writes into its out_dir.
OWN = re.compile(r"(ckpt(_\w+)?\.(pt|dcp)|log\.jsonl|config\.json|loss\.png|experts\.png)(\.part)?")


def set_aside(out_dir, say=print, also=()):
    """Move an earlier run's files to out_dir.1, .2, …, so that a new run in its place destroys nothing.

    Other files stay where they are, but for the names in `also`. Out of the working folder, a folder above it or a
    mounted disk they move to run.1, run.2, … inside.
    """
    out_dir = os.path.normpath(out_dir)
    log = os.path.join(out_dir, "log.jsonl")
    if not exists(out_dir) and not (os.path.exists(log) and os.path.getsize(log)):
        return
    real = os.path.realpath(out_dir)
    inside = os.path.ismount(real) or os.path.commonpath((real, os.getcwd())) == real
    for number in itertools.count(1):
        aside = os.path.join(out_dir, f"run.{number}") if inside else f"{out_dir}.{number}"
        with suppress(FileExistsError):
            os.mkdir(aside)
            break
    for name in sorted(os.listdir(out_dir)):
        if OWN.fullmatch(name) or name in also:
            os.replace(os.path.join(out_dir, name), os.path.join(aside, name))
    with suppress(OSError):  # not empty, or a link
        os.rmdir(out_dir)
    say(f"{out_dir} held an earlier run: moved to {aside}")


def describe_newest(out_dir):
    """Which checkpoint a run would go on from, in words. It waits for no other rank."""
    if group_rank()[0] != 0:
        return "rank 0 knows the last checkpoint"  # and prints it: no need for all to read
    try:
        saved = load(out_dir, say=lambda message: None, alone=True)
    except OneLineExit:
        return "there is no whole checkpoint"
    return f"last checkpoint: {saved['path']} of step {saved['step']}" if saved else "there is no checkpoint"


def directory_name(place):
    return place.removesuffix(".pt") + ".dcp"


def path_in_place(path, place):
    return os.path.join(os.path.dirname(path), directory_name(place) if path.endswith(".dcp") else place)


def existing_paths(out_dir, place, suffix=""):
    """What exists of a place's two paths."""
    paths = [os.path.join(out_dir, name + suffix) for name in (place, directory_name(place))]
    return [path for path in paths if os.path.lexists(path)]


def remove_path(path):
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.remove(path)


def flush_to_disk(path):
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum_of(path):
    """[bytes, CRC32]"""
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
        return [file.tell(), crc]


def tag_tuples(value):
    """JSON has no tuples: {"tuple": […]} is written for one, and read_json makes it one again."""
    if isinstance(value, dict):
        return {key: tag_tuples(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return {"tuple": tag_tuples(list(value))}
    return [tag_tuples(item) for item in value] if isinstance(value, list) else value


def read_json(path, name):
    with open(os.path.join(path, name), encoding="utf-8") as file:
        return json.load(file, object_hook=lambda d: tuple(d["tuple"]) if d.keys() == {"tuple"} else d)


# ---------------------------------------------------------------------------------------
# Ranks


class FailedOnARank(Exception):
    """A step failed on one rank, and so on all."""


def group_rank():
    """-> this rank, number of ranks"""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather_from_ranks(value, alone=False):
    """-> [the value of rank 0, of rank 1, …]"""
    values = [value] * (1 if alone else group_rank()[1])
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def run_on_ranks(work, *args, only=None, alone=False):
    """-> work(*args), on this rank. Where it fails on one rank, FailedOnARank on every one: none continues, none waits."""
    result = failure = None
    try:
        if only in (None, group_rank()[0]):
            result = work(*args)
    except Exception as error:  # torch and zipfile have many kinds for a damaged file
        failure = cause_of(error)
    failures = [failure for failure in gather_from_ranks(failure, alone) if failure]
    if failures:
        raise FailedOnARank(failures[0])
    return result


def cause_of(error):
    """One line, in the system's words where it had any."""
    if isinstance(error, CheckpointException):
        error, _ = next(iter(error.failures.values()))
    if isinstance(error, pickle.UnpicklingError):
        return "it holds something other than tensors and plain values"
    cause = error
    while cause is not None:
        if isinstance(cause, OSError):
            return cause.strerror or str(cause)
        cause = cause.__context__
    return f"{type(error).__name__}: {error}".partition("\n")[0]
