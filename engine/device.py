"""The device of a run: which one, its 16-bit type, its peak speed, and transfers to and from it."""

import importlib
import json
import os
import platform
from contextlib import suppress

import torch

from configurator import ConfigError
from text_files import first_line

# Peak FLOP/s of dense 16-bit matrix products, from the makers' data sheets. For other GPUs no MFU is reported.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
}


def choose_device(name, local_rank=0):
    """torch.device for the option `device`: "auto" is a GPU if there is one. A process takes the GPU of its local rank.

    Apple's GPU (mps) serves one process only and has no float64, so no tensor on a device may be float64.
    ConfigError if the device is unknown, missing or cannot be used.
    """
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if name == "auto":
        apples = torch.backends.mps.is_available() and processes == 1
        name = "cuda" if torch.cuda.is_available() else "mps" if apples else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cuda", "cpu", "mps"):
        raise ConfigError(f"device={name!r} is unknown: auto, cuda, cpu or mps")
    if device.type == "mps":
        if not torch.backends.mps.is_available():
            raise ConfigError(f"device={name}, but torch sees no Apple GPU: take --device=cpu")
        if processes > 1:
            raise ConfigError(f"device={name} is for one process, there are {processes}: take --device=cpu")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f"device={name}, but torch sees no GPU: take --device=cpu")
        count, by_rank = torch.cuda.device_count(), device.index is None
        device = torch.device("cuda", local_rank if by_rank else device.index)
        if device.index >= count:
            remedy = f"lower --nproc_per_node to {count}" if by_rank else "take --device=cuda"
            raise ConfigError(f"device={name}: there is no GPU {device.index}, torch sees {count}: {remedy}")
        try:
            torch.cuda.set_device(device)
            torch.zeros(1, device=device)
        except RuntimeError as error:  # in use by another process alone, broken, too old for this build of torch
            raise ConfigError(
                f"device={name}: GPU {device.index} cannot be used ({first_line(error)}): take --device=cpu"
            ) from None
        torch.set_num_threads(1)  # the host only copies batches: 32 threads took 32 ms for what one does in 1
    return device


def choose_dtype(name, device):
    """torch.dtype for the option `dtype`: "auto" is bfloat16 on a GPU that has it, float16 on an older GPU, otherwise float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def device_name(device):
    """Name of the GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def to_device(tensor, device):
    """-> the tensor on the device. The host does not wait for a copy to a GPU."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class Turn:
    """The right to train on a GPU that several runs share: a lock on the file that lab.sweep names in GPU_TURN.

    Starting and compiling keep the processors busy and the GPU idle; training does the opposite. So runs start side by
    side and train one by one.
    """

    def __init__(self):
        self.path, self.file = os.environ.get("GPU_TURN"), None

    def take(self):
        """Wait for the lock. It is released by `give`, or by the end of the process."""
        import fcntl

        self.file = open(self.path, "w")
        fcntl.flock(self.file, fcntl.LOCK_EX)

    def give(self):
        """Release the lock, if it is held."""
        if self.file is not None:
            self.file.close()


class Numbers:
    """A few numbers on their way from the device to the host, which does not wait until it needs them.

    tensor: (n,) on the device
    """

    def __init__(self, tensor):
        self.event = None
        if tensor.is_cuda:
            self.host = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()
        else:
            self.host = tensor

    def wait(self):
        """-> list of n floats, when they have arrived."""
        if self.event is not None:
            self.event.synchronize()
        return self.host.tolist()


def write_rows(path, rows, device):
    """Write a list of measurements (dicts of plain values) as JSON, each with the device and the versions it was measured with."""
    where = {"device": device_name(device), "python": platform.python_version(), "torch": torch.__version__}
    with suppress(ImportError):
        where["triton"] = importlib.import_module("triton").__version__
    with open(path, "w") as file:
        json.dump([{**where, **row} for row in rows], file, indent=1)


def peak_flops(name):
    """Peak FLOP/s of the GPU with this name, or None if the table does not have it."""
    words = name.replace("-", " ").split()
    for known, peak in PEAK_FLOPS.items():
        if all(word in words for word in known.split()):
            return peak
    return None
