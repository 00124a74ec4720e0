"""Timings.

    python bench.py data            # the character encoder, and batches from a memory-mapped file

`--json=FILE` writes the figures as rows too. Imports from configurator, device, data and prepare_owt.
"""

import os
import sys
import tempfile
import time
from dataclasses import dataclass

import numpy as np
import torch

from configurator import ConfigError, load_config
from data import CharTokenizer, TokenData
from device import write_rows
from prepare_owt import Config as PrepareConfig
from prepare_owt import prepare, stdlib_files


@dataclass
class DataConfig:
    megabytes: int = 200  # of text
    block_size: int = 128  # context of the batches
    batch_tokens: int = 65_536  # tokens a batch
    json: str | None = None  # file for the rows


def seconds(function, repeats=5):
    """Median seconds of a call, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return float(np.median(times[1:]))


def bench_data(config):
    tokenizer, rows = CharTokenizer(), []

    def report(what, amount, unit, elapsed):
        rows.append(
            {"what": what, "amount": amount, "unit": unit, "seconds": elapsed, f"{unit}_per_second": amount / elapsed}
        )
        print(f"{what}: {amount:,.0f} {unit} in {elapsed:.4f} s, {amount / elapsed:,.0f} {unit}/s")

    texts = [open(path, encoding="utf-8", errors="replace").read() for path in stdlib_files()]
    texts = texts * max(1, config.megabytes * 10**6 // sum(map(len, texts)))
    size = sum(len(text.encode()) for text in texts) / 1e6
    report(
        "character encoder, one process",
        size,
        "MB",
        seconds(lambda: [tokenizer.encode_document(text) for text in texts]),
    )
    with tempfile.TemporaryDirectory() as folder:
        path, out = os.path.join(folder, "text.txt"), os.path.join(folder, "out")
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(text for text in texts if tokenizer.encode_document(text) is not None)
        start = time.perf_counter()
        prepare(PrepareConfig(source=path, tokenizer="char96", out_dir=out))
        report(
            "prepare_owt.py, disk to disk, one process", os.path.getsize(path) / 1e6, "MB", time.perf_counter() - start
        )
        data, count = TokenData(out, config.block_size), config.batch_tokens // config.block_size
        batch = seconds(lambda: [data.train_batch(0, step, count, 0, count) for step in range(20)]) / 20
        report(f"training batch, {count} x {config.block_size}", count * config.block_size, "tokens", batch)
    if config.json:
        write_rows(config.json, rows, torch.device("cpu"))


def main(argv):
    if argv[:1] != ["data"]:
        raise ConfigError(f"bench.py {' '.join(argv[:1])}: say what to time, 'data'")
    bench_data(load_config(DataConfig, argv[1:]))


if __name__ == "__main__":
    main(sys.argv[1:])
