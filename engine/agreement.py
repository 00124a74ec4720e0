"""Ranks agree before they train: the same options, the same code, the same data; or all of them end with one line.

Each rank states its facts, plain values by name. They are compared with rank 0's: options and code in a store, before
there is a process group, for what the group is made of may differ; data in the group's first collective.
"""

import glob
import json
import os
import platform
import sys
import time
import zlib

import numpy as np
import torch
import torch.distributed as dist

from configurator import ConfigError
from data import shorten

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# Options that may differ between the machines of a run; of the data and the device, what matters is compared itself.
MAY_DIFFER = {"data_dir", "device", "workers"}


def facts_of_run(options, device):
    """{name: value} that all ranks must have in common, JSON-ready: options (a dict), kind of device, versions, source code."""
    facts = {f"--{name}": value for name, value in options.items() if name not in MAY_DIFFER}
    facts["--device"] = device.type
    facts["Python"] = ".".join(platform.python_version_tuple()[:2])
    facts["torch"] = torch.__version__
    for path in code_files():
        with open(os.path.join(ROOT, path), "rb") as file:
            facts[path] = f"CRC {zlib.crc32(file.read()):08x}"
    return json.loads(json.dumps(facts, default=str))


def code_files():
    """Paths of the project's modules, relative to its folder, and of the config files that this run has read."""
    paths = [path for pattern in ("*.py", "*/*.py") for path in glob.glob(pattern, root_dir=ROOT)]
    modules = [path for path in paths if path.split(os.sep)[0] not in ("tests", "results", "docs")]
    configs = [module.__file__ for name, module in sys.modules.items() if name.startswith("config_file_")]
    return sorted(modules) + configs


def first_difference(facts):
    """One line about the first fact in which a rank differs from rank 0; None where all agree. facts: a dict a rank."""
    for name in dict.fromkeys(name for of_rank in facts for name in of_rank):
        values = [of_rank.get(name, "missing") for of_rank in facts]
        others = [rank for rank, value in enumerate(values) if value != values[0]]
        if others:
            alike = [str(rank) for rank in others if values[rank] == values[others[0]]]
            who = f"ranks {', '.join(alike)} have" if len(alike) > 1 else f"rank {alike[0]} has"
            return f"{who} {_as_text(name, values[others[0]])}, rank 0 has {_as_text(name, values[0])}"
    return None


def _as_text(name, value):
    if name.startswith("--"):
        return f"{name}={shorten(value)}"
    return f"{name} {value if isinstance(value, str) and len(value) < 60 else shorten(value)}"


def check_options_of_ranks(store, rank, world, facts, seconds=10):
    """ConfigError on every rank where their facts differ. store: of these ranks and this attempt alone.

    seconds: how long rank 0, whose store it may be, stays for the others to read that they differ.
    """
    store.set(f"facts/{rank}", json.dumps(facts))
    if rank == 0:
        of_ranks = [json.loads(store.get(f"facts/{other}")) for other in range(world)]
        store.set("difference", json.dumps(first_difference(of_ranks)))
    difference = json.loads(store.get("difference"))
    if difference is None:
        return
    store.set(f"heard/{rank}", "")
    deadline = time.monotonic() + seconds
    while rank == 0 and time.monotonic() < deadline and not store.check([f"heard/{other}" for other in range(world)]):
        time.sleep(0.02)
    raise ConfigError(f"{difference}: start all ranks with the same options and the same code")


def check_data_of_ranks(meta, arrays=None):
    """ConfigError on every rank where the ranks read other data. A collective.

    meta    plain values about the data
    arrays  {name: numpy array}, a large one may be mapped: of each, some blocks are compared; None: there are none
    """
    if not dist.is_initialized():
        return
    facts = {**meta, **{f"{name}:": describe_array(array) for name, array in (arrays or {}).items()}}
    of_ranks = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, {f"data with {name}": value for name, value in facts.items()})
    difference = first_difference(of_ranks)
    if difference is not None:
        raise ConfigError(f"{difference}: give all ranks the same data")


def describe_array(array, blocks=256, size=4096):
    """'15945 bytes, CRC 0a1b2c3d': of so many blocks of so many bytes, evenly spread, or of all of a smaller array."""
    content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    starts = [0]
    if len(content) <= blocks * size:
        size = len(content)
    else:
        starts = np.linspace(0, len(content) - size, blocks).astype(int)
    crc = 0
    for start in starts:
        crc = zlib.crc32(content[start : start + size], crc)
    return f"{len(content):,} bytes, CRC {crc:08x}"
