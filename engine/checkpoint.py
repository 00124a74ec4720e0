"""Checkpoints that survive: written under another name, flushed, renamed; the one before is kept; verified before use.

    out_dir/ckpt.pt    ckpt_prev.pt      the newest and the one before: a file each, written by torch.save;
    out_dir/ckpt.dcp/  ckpt_prev.dcp/    of a model that FSDP2 has sharded, a directory:

        __0_0.distcp …  .metadata        each rank's parts of the tensors, and where each part is, written by torch's DCP
        values.json                      everything that is not a tensor
        manifest.json                    {file: [bytes, CRC32]} of all the above, written last

    ckpt_best.pt  ckpt_step500.pt  …     copies that --keep_best and --keep_every keep

A model loads either format, sharded or not, on any number of ranks. A checkpoint holds tensors and plain values only,
and reading one never runs code.
"""

import errno
import io
import itertools
import json
import math
import os
import pickle
import re
import shutil
import signal
import time
import warnings
import zipfile
import zlib
from contextlib import contextmanager, suppress
from functools import partial

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.tensor import DTensor

from configurator import ConfigError, OneLineExit, RunFailed
from engine.heartbeat import Watchdog
from engine.nanogpt import from_nanogpt, is_from_nanogpt
from optim import copy_whole

# ASIDE is the former newest while its successor is put in place. A directory's name has .dcp where a file's has .pt.
PLACES = NEWEST, ASIDE, PREVIOUS = "ckpt.pt", "ckpt_aside.pt", "ckpt_prev.pt"
BEST = "ckpt_best.pt"
PIECE = 1 << 26  # bytes that a file writes to the disk at a time
PAUSES = (0.5, 1, 2, 4)  # seconds before a failed read is tried again

# ---------------------------------------------------------------------------------------
# When


class Saves:
    """Decides when a run saves between its evaluations, and which checkpoints it keeps: save_minutes, keep_every, keep_best.

    SIGUSR1 asks for a checkpoint. say: prints a line. watchdog: the run's heartbeat.Watchdog.
    """

    def __init__(self, config, say=print, watchdog=None):
        self.config, self.say, self.watchdog = config, say, watchdog
        self.by_signal, self.last = False, time.monotonic()
        signal.signal(signal.SIGUSR1, self._ask)

    def _ask(self, *_):
        self.by_signal = self.config.save
        self.say("asked to save: after this step" if self.config.save else "asked to save, but save=False", flush=True)

    def asked(self):
        """Whether a signal to this process or the clock asks for a checkpoint; the processes have yet to agree on it."""
        minutes = self.config.save_minutes
        return self.by_signal or (minutes > 0 and time.monotonic() - self.last >= 60 * minutes)

    def due(self, step):
        """Whether keep_every keeps the checkpoint of this step."""
        return self.config.keep_every > 0 and step % self.config.keep_every == 0

    def save(self, checkpoint, best):
        """Call `save` on the run's out_dir. best: this checkpoint has the lowest validation loss so far."""
        step = checkpoint["step"]
        names = [f"ckpt_step{step}.pt"] if step and self.due(step) else []
        names += [BEST] if best and self.config.keep_best else []
        save(self.config.out_dir, checkpoint, names, self.watchdog)
        self.by_signal, self.last = False, time.monotonic()


# ---------------------------------------------------------------------------------------
# Writing


def save(out_dir, checkpoint, keep=(), watchdog=None):
    """Write `checkpoint` as the newest of out_dir; a kill at any moment leaves a whole checkpoint behind.

    checkpoint  {"model": {name: tensor}, "optimizer": Optimizers.state_dict(), and the plain VALUES}
    keep        further names to keep it under, such as "ckpt_best.pt"
    watchdog    a heartbeat.Watchdog, which ends the run when a rank hangs in here
    Every rank calls it and returns when all is done. DTensors: each rank writes its parts; other tensors: rank 0 writes them.
    RunFailed on every rank where writing fails on any, ConfigError where the ranks do not share out_dir but have to.
    """
    watchdog = watchdog or Watchdog()
    on_rank_0 = partial(run_on_ranks, only=0, watchdog=watchdog)
    sharded = any(isinstance(tensor, DTensor) for tensor in checkpoint["model"].values())
    newest = os.path.join(out_dir, directory_name(NEWEST) if sharded else NEWEST)
    partial_path = newest + ".part"
    try:
        if sharded:
            write_directory(partial_path, checkpoint, watchdog)
        else:
            on_rank_0(write_file, partial_path, lambda file: torch.save(checkpoint, file), watchdog)
        for name in keep:
            on_rank_0(keep_as, partial_path, os.path.join(out_dir, name), watchdog)
        on_rank_0(make_newest, out_dir, partial_path, newest)
    except FailedOnARank as error:
        with suppress(FailedOnARank):
            on_rank_0(remove_path, partial_path)
        raise RunFailed(
            f"out_dir={out_dir}: {partial_path} cannot be written ({error}): make room or correct the permissions there, "
            f"then resume with --resume. What was saved before is intact; {describe_newest(out_dir)}"
        ) from None


def first_non_finite(checkpoint):
    """-> the name of a weight, or of an optimizer's tensor, that holds inf or NaN; None. Every rank gets the same answer.

    checkpoint: as for `save`.
    """
    own = next((name for name, t in flatten_checkpoint(checkpoint).items() if not is_finite(t)), None)
    return next((name for name in gather_from_ranks(own) if name), None)


def is_finite(tensor):
    """Whether no number in a tensor, or in this rank's part of a DTensor, is inf or NaN."""
    part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if not part.numel() or not part.is_floating_point() or part.dtype.itemsize == 1:
        return True
    return math.isfinite(torch.linalg.vector_norm(part.detach(), math.inf))  # unlike isfinite(), it needs no memory


class WatchedFile(io.FileIO):
    """A new file whose bytes go to the disk a piece at a time; after each piece it tells the watchdog that it gets on."""

    def __init__(self, path, watchdog):
        super().__init__(path, "wb")
        self.watchdog, self.unflushed = watchdog, 0

    def write(self, data):
        count = super().write(memoryview(data).cast("B")[:PIECE])
        self.unflushed += count
        if self.unflushed >= PIECE:
            os.fsync(self.fileno())
            self.unflushed = 0
        self.watchdog.show_life()
        return count


def write_file(path, write, watchdog):
    """Call write(file) with a new file, which is on the disk when this returns."""
    with io.BufferedWriter(WatchedFile(path, watchdog)) as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def write_directory(path, checkpoint, watchdog):
    """Write each rank's parts of the tensors, and the rest on rank 0. FailedOnARank on every rank where any fails.

    ConfigError where rank 0 does not see what another rank wrote.
    """
    on_ranks = partial(run_on_ranks, watchdog=watchdog)

    def write_json(name, value):
        write_file(os.path.join(path, name), lambda file: file.write(json.dumps(value, indent=1).encode()), watchdog)

    def begin():
        remove_path(path)  # a killed run may have left it
        os.mkdir(path)
        write_json("values.json", tag_tuples({k: v for k, v in checkpoint.items() if k not in ("model", "optimizer")}))

    def sum_own_files():
        rank, _ = group_rank()
        own = [".metadata", "values.json"] if rank == 0 else []
        own += [name for name in os.listdir(path) if name.startswith(f"__{rank}_")]
        return {name: checksum_of(os.path.join(path, name), watchdog) for name in own}

    def publish(manifest):
        Reader(path).read_metadata()  # fails now rather than when it is needed
        write_json("manifest.json", manifest)
        flush_to_disk(path)

    on_ranks(begin, only=0)
    try:
        with warnings.catch_warnings(action="ignore"):
            planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
            dcp.save(flatten_checkpoint(checkpoint), storage_writer=Writer(path, watchdog), planner=planner)
    except CheckpointException as failed:  # on every rank
        raise FailedOnARank(cause_of(failed)) from None
    sums = gather_from_ranks(on_ranks(sum_own_files))
    manifest = {name: entry for of_rank in sums for name, entry in of_rank.items()}
    (missing, *_) = gather_from_ranks(on_ranks(find_missing, path, manifest, only=0))
    if missing:
        shutil.rmtree(path, ignore_errors=True)  # on each node its own
        writer = next(rank for rank, of_rank in enumerate(sums) if missing in of_rank)
        raise ConfigError(
            f"out_dir={os.path.dirname(path)}: rank 0 does not see {missing}, which rank {writer} has written: "
            "with --shard=fsdp, out_dir must be on a file system that all nodes share"
        )
    on_ranks(publish, manifest, only=0)


def find_missing(path, manifest):
    """-> a file of the manifest that is not in the folder, or has another size; None. A network may show it late."""
    for pause in (*PAUSES, None):
        missing = next(
            (name for name, (size, _) in manifest.items() if size_of(os.path.join(path, name)) != size), None
        )
        if missing is None or pause is None:
            return missing
        time.sleep(pause)


def size_of(path):
    return os.path.getsize(path) if os.path.exists(path) else None


def keep_as(path, kept, watchdog):
    """Give a whole checkpoint, of either format, a second name, in place of what had it. By hard links, where possible."""
    folder, place = os.path.split(kept)
    kept = os.path.join(folder, directory_name(place)) if os.path.isdir(path) else kept
    copy = partial(link_or_copy, watchdog=watchdog)
    remove_path(kept + ".part")
    try:
        if os.path.isdir(path):
            shutil.copytree(path, kept + ".part", copy_function=copy)
        else:
            copy(path, kept + ".part")
        for old in existing_paths(folder, place):
            if old != kept or os.path.isdir(old):
                remove_path(old)
        os.replace(kept + ".part", kept)
    except OSError:
        with suppress(OSError):
            remove_path(kept + ".part")
        raise


def link_or_copy(source, target, watchdog):
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        with open(source, "rb") as file:
            write_file(target, lambda copy: shutil.copyfileobj(file, copy, 1 << 22), watchdog)


def make_newest(out_dir, partial_path, newest):
    """Rename: `partial_path` becomes the newest, the newest becomes the previous. At any moment a whole one has a name."""
    move_aside_to_previous(out_dir)
    for path in existing_paths(out_dir, NEWEST):
        os.replace(path, path_in_place(path, ASIDE))
    os.replace(partial_path, newest)
    flush_to_disk(out_dir)
    with suppress(OSError):  # the new one is in place: what cannot be tidied now is tidied after the next
        move_aside_to_previous(out_dir)
        for path in existing_paths(out_dir, NEWEST, ".part"):  # of the other format, left by a killed run
            remove_path(path)


def move_aside_to_previous(out_dir):
    """Where there is a newest, rename what is aside to the previous: a kill may have come between the two renames."""
    aside = existing_paths(out_dir, ASIDE)
    if aside and existing_paths(out_dir, NEWEST):
        for path in existing_paths(out_dir, PREVIOUS):
            remove_path(path)
        for path in aside:
            os.replace(path, path_in_place(path, PREVIOUS))


class Writer(dcp.FileSystemWriter):
    """DCP's writer, with signs of life to the watchdog. A rank that hangs has made fewer beats than those that wait for it."""

    def __init__(self, path, watchdog):
        super().__init__(path)
        self.fs, self.watchdog = WatchedFileSystem(watchdog), watchdog

    def storage_meta(self):
        return None  # it would hold the path, which is about to change

    def write_data(self, plan, planner):
        try:
            written = super().write_data(plan, planner)
        except Exception as error:  # sent to the other ranks it would lose its cause, the system's own words
            raise OSError(cause_of(error)) from None
        self.watchdog.beat()
        if group_rank()[0] != 0:
            self.watchdog.beat()  # rank 0 has yet to call finish
        return written

    def finish(self, metadata, results):
        super().finish(metadata, results)
        self.watchdog.beat()


class WatchedFileSystem(FileSystem):
    def __init__(self, watchdog):
        self.watchdog = watchdog

    @contextmanager
    def create_stream(self, path, mode):
        with io.BufferedWriter(WatchedFile(path, self.watchdog)) as stream:
            yield stream


# ---------------------------------------------------------------------------------------
# Reading


def load(out_dir, say=print, alone=False):
    """The newest whole checkpoint in out_dir, as a dict that also has its "path"; None where there is none.

    out_dir may be the path of one checkpoint instead, out/run/ckpt_best.pt (or .dcp), also of nanoGPT's ckpt.pt.
    Tensors are whole and on the CPU; a directory's are read when saved["model"] or saved["optimizer"] is asked for.
    Every rank calls it and gets the same checkpoint, unless alone=True. A damaged one, or one with inf or NaN among its
    tensors, is skipped with a message. RunFailed where all are damaged; also where one cannot be read, for it may be
    whole, and a run that took an older one would overwrite it. ConfigError where the ranks do not see the same files.
    """
    rank, world = (0, 1) if alone else group_rank()
    folder, places, one = out_dir, PLACES, names_one(out_dir)
    if one:
        folder, place = os.path.split(out_dir)
        places = [place.removesuffix(".dcp").removesuffix(".pt") + ".pt"]

    def find_names():
        return [os.path.basename(path) for place in places for path in existing_paths(folder, place)]

    damaged, path = [], out_dir
    try:
        views = gather_from_ranks(run_on_ranks(read_patiently, find_names, alone=alone), alone)
        if any(view != views[0] for view in views):
            raise ConfigError(
                f"out_dir={folder}: not all ranks see the checkpoints that rank 0 sees: "
                "out_dir must be on a file system that all nodes share"
            )
        for place in places:
            whole = []
            for path in [os.path.join(folder, name) for name in views[0] if name in (place, directory_name(place))]:
                try:
                    whole.append(run_on_ranks(read_patiently, read, path, rank, world, one, alone=alone))
                except FailedOnARank as error:
                    if error.unreadable:
                        raise
                    damaged.append(path)
                    if rank == 0:
                        say(f"{path} is not a whole checkpoint ({error}): skipped")
            if whole:
                return max(whole, key=lambda saved: saved["step"])
    except FailedOnARank as error:
        raise read_failure(path, error) from None
    if damaged:
        raise RunFailed(
            f"out_dir={out_dir}: no whole checkpoint ({', '.join(damaged)} damaged): start a new run in another out_dir"
        )
    return None


def read_failure(path, cause):
    """RunFailed: there may be a whole checkpoint at `path`, but the system does not let us read it."""
    return RunFailed(
        f"{path} cannot be read ({cause}), tried {len(PAUSES) + 1} times: it may be whole, so nothing older takes its "
        "place; check the disk and the permissions, then try again"
    )


def read_patiently(work, *args):
    """-> work(*args), tried again after each of PAUSES where the system could not read for the moment."""
    for pause in PAUSES:
        try:
            return work(*args)
        except Exception as error:
            if not is_unreadable(error):
                raise
        time.sleep(pause)
    return work(*args)


# How the system refuses a path that is missing, or is not what it should be: damage. Every other refusal may pass.
DAMAGE_ERRORS = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.ELOOP}


def is_unreadable(error):
    """Whether an exception means that something could not be read (a failing disk or network, permissions, no memory)
    rather than that it was read and is wrong."""
    if isinstance(error, Damaged):
        return False
    cause = system_error(error)
    if cause is not None:
        return cause.errno is not None and cause.errno not in DAMAGE_ERRORS
    return isinstance(error, MemoryError) or re.search(r"unable to (open|mmap)|allocate memory", str(error)) is not None


def names_one(path):
    """Whether this is the path of a checkpoint rather than of a folder that has some."""
    path = os.fspath(path)
    return path.endswith(".dcp") or (path.endswith(".pt") and not os.path.isdir(path))


def read(path, rank, world, any_kind=False):
    """The checkpoint at `path`, of which each of `world` ranks verifies a share. Exceptions of many kinds.

    any_kind: nanoGPT's too, which a run must not take for its own.
    """
    check_regular(path)
    if path.endswith(".dcp"):
        return Sharded(path, rank, world)
    sizes = check_members(path) if rank == 0 else None
    # Mapped: a rank reads what it uses, and the ranks of a machine share the memory.
    stored = saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if is_from_nanogpt(saved):
        if not any_kind:
            raise Damaged(f"it is nanoGPT's: --init_from={path} starts from it")
        saved = from_nanogpt(saved)
    check_values(saved)
    tensors = flatten_checkpoint(saved)
    check_kinds(tensors)
    if rank == 0:
        if storage_sizes(stored) != sizes:
            raise Damaged("its tensors do not have the sizes of its members")
        for name, tensor in tensors.items():
            check_finite(name, tensor)
    return {**saved, "path": path}


def check_regular(path):
    """ValueError where the checkpoint at `path` has something other than files: opening a FIFO would wait for ever."""
    for file in [os.path.join(path, name) for name in os.listdir(path)] if path.endswith(".dcp") else [path]:
        if not os.path.isfile(file):
            raise ValueError(f"{os.path.basename(file)} is not a regular file")


def check_members(path):
    """Verify the CRCs of a file of torch.save, which torch itself does not -> sorted sizes of its members with tensors.

    torch reads the bytes as they are in the file, zipfile those it would unpack: they must be the same.
    """
    with open(path, "rb") as file:
        if file.read(2) not in (b"PK", b""):
            raise pickle.UnpicklingError("not of torch.save")
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        packed = [member.filename for member in members if member.compress_type != zipfile.ZIP_STORED]
        if packed:
            raise Damaged(f"{packed[0]} is compressed, as torch never writes it")
        if len({member.filename for member in members}) < len(members):
            raise Damaged("it has two members of one name")
        damaged = archive.testzip()
    if damaged:
        raise Damaged(f"{damaged} is damaged")
    return sorted(m.file_size for m in members if re.search(r"/data/\d+$", m.filename) and m.file_size)


def storage_sizes(saved):
    """Sorted bytes of the storages under the tensors in nested dicts, lists and tuples; without empty ones."""
    storages, left = {}, [saved]
    while left:
        value = left.pop()
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            left += value.values()
        elif isinstance(value, (list, tuple)):
            left += value
    return sorted(size for size in storages.values() if size)


# The plain values of a checkpoint: {name: its type}.
VALUES = {
    "step": int, "seconds": (int, float), "best_val_loss": (int, float), "wandb_id": (str, type(None)), "config": dict,
    "meta": dict, "scaler": dict,
}  # fmt: skip


def check_values(saved):
    """Damaged where one of VALUES is missing, or of a type or size that it cannot have."""
    for name, kind in VALUES.items():
        if name not in saved:
            raise Damaged(f"it has no {name}")
        value = saved[name]
        if not isinstance(value, kind) or isinstance(value, bool) or value != value:
            raise Damaged(f"its {name} is {str(value)[:40]!r}")
    if not (saved["step"] >= 0 and 0 <= saved["seconds"] < math.inf):
        raise Damaged(f"its step is {saved['step']}, its seconds {saved['seconds']}")
    scale = saved["scaler"]  # empty without float16
    if scale and scale.keys() != torch.amp.GradScaler("cpu").state_dict().keys():
        raise Damaged("its scaler has other keys than torch's GradScaler")
    if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in scale.values()):
        raise Damaged("its scaler holds something other than finite numbers")


def check_kinds(tensors):
    """Damaged where one of {flat name: tensor} is not a dense tensor, or has a dtype that nothing in a run has."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_quantized:
            raise Damaged(f"{name} is not a dense tensor")
        kind, _, rest = name.partition(".")
        weight = tensors.get(f"model.{rest.rpartition('.')[0]}") if kind == "optimizer" else None
        alike = weight is not None and tensor.dim() > 0 and tensor.shape == weight.shape
        if tensor.is_complex() or (alike and not tensor.is_floating_point() and tensor.dtype.itemsize > 1):
            raise Damaged(f"{name} is of {tensor.dtype}")


def check_finite(name, tensor):
    if not is_finite(tensor):
        raise Damaged(f"{name} holds inf or NaN")


class Sharded(dict):
    """The plain values of a checkpoint directory, which is verified here; its tensors are read when they are asked for."""

    def __init__(self, path, rank, world):
        self.manifest = read_json(path, "manifest.json")
        own = sorted(self.manifest)[rank::world]
        for name in own:
            if checksum_of(os.path.join(path, name)) != self.manifest[name]:
                raise Damaged(f"{name} is damaged")
        metadata = Reader(path).read_metadata()
        parts = metadata.storage_data
        if not {".metadata", "values.json", *(part.relative_path for part in parts.values())} <= self.manifest.keys():
            raise Damaged("manifest.json is incomplete")
        self.blanks = {}
        for name, entry in metadata.state_dict_metadata.items():
            self.blanks[name] = torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
            check_chunks(name, entry, parts)
            for chunk in entry.chunks:
                part = parts[MetadataIndex(name, chunk.offsets)]
                if part.relative_path in own:
                    check_part(path, name, part, chunk.sizes, entry.properties.dtype)
        super().__init__(read_json(path, "values.json"), path=path)
        check_values(self)
        nest_checkpoint(self.blanks)  # raises for a name that no tensor of ours has
        check_kinds(self.blanks)

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


def check_chunks(name, entry, parts):
    """Damaged where the chunks of DCP's entry of a tensor do not make up the tensor, or are not among the stored parts."""
    places = {tuple(chunk.offsets) for chunk in entry.chunks}
    if len(places) < len(entry.chunks) or sum(math.prod(chunk.sizes) for chunk in entry.chunks) != math.prod(
        entry.size
    ):
        raise Damaged(f"chunks of {name} are missing")
    for chunk in entry.chunks:
        inside = len(chunk.offsets) == len(chunk.sizes) == len(entry.size) and all(
            0 <= at <= at + size <= whole for at, size, whole in zip(chunk.offsets, chunk.sizes, entry.size)
        )
        if not inside or MetadataIndex(name, chunk.offsets) not in parts:
            raise Damaged(f"a chunk of {name} is missing")


def check_part(path, name, part, shape, dtype):
    """Damaged where a stored part of a tensor has another shape or dtype than DCP's metadata state, or inf or NaN."""
    with open(os.path.join(path, part.relative_path), "rb") as file:
        file.seek(part.offset)
        tensor = torch.load(io.BytesIO(file.read(part.length)), map_location="cpu", weights_only=True)
    if tensor.shape != shape or tensor.dtype != dtype or part.transform_descriptors:
        raise Damaged(f"a part of {name} is not what the metadata state")
    check_finite(name, tensor)


class Reader(dcp.FileSystemReader):
    """DCP itself reads tensors with weights_only=True, but .metadata as a pickle that may run code."""

    def read_metadata(self):
        with open(os.path.join(self.path, ".metadata"), "rb") as file:
            return MetadataUnpickler(file).load()

    def read_data(self, plan, planner):
        return read_patiently(super().read_data, plan, planner)


class MetadataUnpickler(pickle.Unpickler):
    """Makes the objects with which DCP describes tensors. Not BytesStorageMetadata, for which DCP unpickles any object."""

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
    """Put what `load` returned into a model and its optim.Optimizers, sharded or not; without optimizers, weights only.

    Every rank calls it and reads its own parts only. ConfigError if the checkpoint holds another model.
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
    """ConfigError where a checkpoint's tensors have other names, shapes or kinds of numbers than the model's.

    theirs, ours  {name: tensor}
    """
    one, other = ({(name, tuple(tensor.shape)) for name, tensor in tensors.items()} for tensors in (theirs, ours))
    if one == other:
        for name, tensor in theirs.items():
            if tensor.is_floating_point() != ours[name].is_floating_point():
                raise ConfigError(f"{path}: {name} is of {tensor.dtype}, where the model has {ours[name].dtype}")
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
    """{"model": …, "optimizer": …} -> {"model.<name>": tensor, "optimizer.<name>.<key>": tensor}, as DCP needs it."""
    tensors = {f"model.{name}": tensor for name, tensor in checkpoint["model"].items()}
    for name, state in checkpoint["optimizer"].items():
        tensors.update({f"optimizer.{name}.{key}": tensor for key, tensor in state.items()})
    return tensors


def nest_checkpoint(tensors):
    """The inverse of flatten_checkpoint."""
    checkpoint = {"model": {}, "optimizer": {}}
    for path, tensor in tensors.items():
        kind, name = path.split(".", 1)
        if kind == "optimizer":
            name, key = name.rsplit(".", 1)
            checkpoint[kind].setdefault(name, {})[key] = tensor
        else:
            checkpoint[kind][name] = tensor
    return checkpoint


# ---------------------------------------------------------------------------------------
# A run's folder


def exists(out_dir):
    """Whether out_dir has a checkpoint, whole or not, or is one. RunFailed where that cannot be found out."""
    if names_one(out_dir):
        return os.path.exists(out_dir)
    try:
        return any(read_patiently(existing_paths, out_dir, place) for place in PLACES)
    except OSError as error:
        raise read_failure(out_dir, cause_of(error)) from None


# What a run writes into its out_dir, unfinished files included (runlog.whole_file has them end in .HOST.PROCESS.part).
OWN = re.compile(r"(ckpt(_\w+)?\.(pt|dcp)|log\.jsonl|config\.json|loss\.png|experts\.png)((\.[\w.-]+)?\.part)?")


def set_aside(out_dir, say=print, also=()):
    """Move an earlier run's files to out_dir.1, .2, …, so that a new run in its place destroys nothing.

    Other files stay where they are, except those named in `also`. The working folder, a folder above it and a mounted
    disk cannot have a neighbour: there the files move to run.1, run.2, … inside.
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
    """Words that name the checkpoint a run would resume from. Waits for no other rank."""
    if group_rank()[0] != 0:
        return "rank 0 names the last checkpoint"  # there is no need for all to read it
    try:
        saved = load(out_dir, say=lambda message: None, alone=True)
    except OneLineExit as error:
        return "there is no whole checkpoint" if "no whole checkpoint" in str(error) else str(error)
    return f"last checkpoint: {saved['path']} of step {saved['step']}" if saved else "there is no checkpoint"


def directory_name(place):
    return place.removesuffix(".pt") + ".dcp"


def path_in_place(path, place):
    return os.path.join(os.path.dirname(path), directory_name(place) if path.endswith(".dcp") else place)


def existing_paths(out_dir, place, suffix=""):
    """Those that exist of a place's two paths. OSError where the system does not tell."""
    paths = [os.path.join(out_dir, name + suffix) for name in (place, directory_name(place))]
    return [path for path in paths if path_exists(path)]


def path_exists(path):
    """As os.path.lexists, which takes a path that cannot be read for one that does not exist."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


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


def checksum_of(path, watchdog=None):
    """[bytes, CRC32]"""
    crc, watchdog = 0, watchdog or Watchdog()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
            watchdog.show_life()
        return [file.tell(), crc]


def tag_tuples(value):
    """Replace each tuple by {"tuple": […]}, since JSON has none; read_json makes it a tuple again."""
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


class Damaged(Exception):
    """What was read is no whole checkpoint. The message says what is wrong with it."""


class FailedOnARank(Exception):
    """Work failed on one rank, and so on all. unreadable: of the kind of is_unreadable."""

    def __init__(self, cause, unreadable=False):
        super().__init__(cause)
        self.unreadable = unreadable


def group_rank():
    """-> this rank, number of ranks"""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather_from_ranks(value, alone=False):
    """-> [the value of rank 0, of rank 1, …]"""
    values = [value] * (1 if alone else group_rank()[1])
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def run_on_ranks(work, *args, only=None, alone=False, watchdog=None):
    """-> work(*args), on this rank. Where it fails on one rank, FailedOnARank on every one: none continues, none waits.

    only: the one rank that works. watchdog: it gets a beat after the work, so that who waits is ahead of who hangs.
    """
    result = failure = None
    try:
        if only in (None, group_rank()[0]):
            result = work(*args)
    except Exception as error:  # torch and zipfile have many kinds for a damaged file
        failure = cause_of(error), is_unreadable(error)
    if watchdog is not None:
        watchdog.beat()
    failures = [failure for failure in gather_from_ranks(failure, alone) if failure]
    if failures:
        raise FailedOnARank(*max(failures, key=lambda failure: failure[1]))
    return result


def cause_of(error):
    """One line about an exception, in the system's words where it has any."""
    if isinstance(error, CheckpointException):
        error, _ = next(iter(error.failures.values()))
    if isinstance(error, pickle.UnpicklingError):
        return "it holds something other than tensors and plain values"
    if isinstance(error, Damaged):
        return str(error)
    system = system_error(error)
    if system is not None:
        return system.strerror or str(system)
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def system_error(error):
    """The OSError that an exception is, or arose from; None."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error
