"""Hostile values in options, config files and the files that scripts read: every case ends with its work done, or with one line.

    python -m tests.fuzz                           for a minute, on 2 processes
    python -m tests.fuzz --seconds=600 --seed=7    for ten, other cases
    python -m tests.fuzz --only=sample             cases of one script
    python -m tests.fuzz --case='["sample", …]'    one case, as a report prints it

A case calls a script's main in a process that has torch already, in a fresh copy of a folder with tiny data and runs.
It passes if the script exits with 0 and what it should make is there, or with another status and one line on stderr.
It fails on a traceback, on more lines than one, on a status of 0 with nothing done, on a process that dies, and if it
takes longer than LIMIT seconds. Exit status 0 only if all passed. test_fuzz.py runs a few under pytest.
"""

import contextlib
import copy
import dataclasses
import importlib
import io
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback

os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="disabled")  # before they are imported: no network
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

LIMIT = 60  # seconds for a case
MEMORY = 8 * 2**30  # bytes of address space for a case, beyond what torch has mapped
WHOLE = 2**63 - 1

# ---------------------------------------------------------------------------------------
# Hostile values

TEXTS = [
    "", " ", "0", "-1", "1", "2", "3", "7", "0.5", "-0.0", "1e-320", "1e30", "1e308", "1e400", "-1e400", "nan", "inf",
    "-inf", "9" * 400, "9223372036854775807", "9223372036854775808", "-9223372036854775809", "4611686018427387904",
    "1000000007", "65537", "1e9", "0x10", "1_000", "١٢", "None", "True", "False", "true", "()", "[]", "{}", "(1,)", "(0,)",
    "(-1, 2)", "('a',)", "(1e400,)", "{'a': 1}", "{1: 2}", "{'ffn': 'btt'}", "{'ffn': {'structure': 'btt', 'rank': -1}}",
    "{'ffn': {'rank': '2'}}", "{'ffn': None}", "{'attn.q': {'bias': 3}}", "{(): ()}", "{[]: 1}", "[[[]]]", "(" * 300, "a",
    "a,b", "ä€😀", "\udcff", "\x7f", "\x1b[31m", "a\nb", "%s%n{0}", "--lr=1", "'", "\\", "folder", "fifo", "missing",
    "missing/missing", "text/a.txt", "text/a.txt/b", "/dev/null", "/dev/full", "/proc/self/mem", "/", ".", "..", "~",
    "loop", "x" * 300, "/" + "y/" * 3000, "run", "data", "images", "hf", "FILE:fifo", "FILE:missing", "FILE:folder",
    "FILE:text/a.txt", "btt", "dense", "einsum", "cpu", "cuda:99", "meta", "xla", "cpu:7", "cuda",
]  # fmt: skip
VALUES = [
    None, True, False, 0, -1, 1, 2, 7, 0.5, -0.5, 1e308, math.nan, math.inf, -math.inf, 10**400, 2**63, -(2**63), 2**31,
    10**9, "", "x", "\0", "a\nb", "ä😀", "\udcff", "x" * 5000, "/", "fifo", "folder", [], [1], [None], [[]], ["x"], {},
    {"a": 1}, {"": None}, [math.nan], [[[[[[]]]]]], "uint8", "dense", "none",
]  # fmt: skip
CONTENTS = [
    b"", b" ", b"\n", b"null", b"true", b"3", b"-1e999", b'"text"', b"[]", b"[1]", b"{}", b'{"a": 1}', b"{",
    b"[" * 100_000, b'{"a":' * 3000, b"\xff\xfe\x00", b"\x00" * 1000, b"\xef\xbb\xbf{}", b"9" * 5000,
    b"[" + b"9" * 5000 + b"]", b"x" * 1_000_000, b"PK\x03\x04" + b"\0" * 60, b"\x80\x02.",
    b"SQLite format 3\0" + b"\0" * 200, b"\x93NUMPY\x01\x00", b"PAR1\0\0PAR1", "ä€😀\n".encode(), b"NaN", b'{"step": NaN}',
    b"\x89PNG\r\n\x1a\n" + b"\0" * 50, b"[]\n[]\n", b"\n" * 10_000,
]  # fmt: skip
PROGRAMS = [
    "exit()", "exit(0)", "quit()", "import sys; sys.exit()", "import sys; sys.exit('text')", "raise SystemExit",
    "raise SystemExit(0)", "raise KeyboardInterrupt", "raise BaseException('x')", "raise GeneratorExit",
    "raise RecursionError", "def f(): f()\nf()", "1/0", "x =", "\tx = 1", "\0", "lr = ", "import nothing_of_this_name",
    "raise Exception('a\\nb')", "class E(Exception):\n  def __str__(s): 1/0\nraise E", "lr = float('nan')",
    "lr = float('inf')", "lr = 10**400", "max_steps = 10**400", "lr = 'x'", "lr = object()", "lr = [1]", "lr = 1j",
    "lr = b'x'", "lr = {1, 2}", "import numpy\nlr = numpy.nan", "import numpy\nlr = numpy.float64('inf')",
    "import numpy\nlr = numpy.array([1, 2])", "max_steps = True", "data_dir = None", "data_dir = '\\0'", "data_dir = 3",
    "out_dir = '\\0'", "out_dir = '\\udcff'", "overrides = {'ffn': {'rank': float('nan')}}", "overrides = []",
    "overrides = {3: 4}", "theta = (float('nan'),) * 7", "theta = ('a',) * 7", "structured_layers = (None,)",
    "structured_layers = ([],)", "structure = 'a\\nb'", "structure_options = {'rank': 2}", "structure_options = {3: 4}",
    "class lr: pass", "lr = None", "a b", "unknown = 3", "runs = 3", "runs = []", "runs = [3]", "runs = [{}]",
    "runs = [{'lr': 1}] * 2", "runs = [{3: 4}]", "runs = [{'lr': {}}]", "runs = [{'seed': 1}]\ncommon = 3",
    "runs = [{'seed': 1}]\ncommon = {3: 4}", "runs = [{'seed': 1}]\nscript = 3", "runs = [{'seed': 1}]\nscript = 'fifo'",
    "runs = [{'seed': 1}]\nconfig = 3", "runs = [{'seed': 1}]\nconfig = '\"'", "runs = [{'seed': 1}]\nfit = 3",
    "runs = [{'seed': 1}]\nsmall = 3", "runs = [{'seed': 1}]\nsmall = {'runs': 3}",
    "runs = [{'seed': 1}]\nsmall = {'common': 3}", "runs = [{'seed': 1}]\nsmall = {3: 4}", "runs = [{'out_dir': 3}]",
    "runs = [{'a/b': 'c/d', 'x': '\\0'}]", "runs = [{'seed': 1}, {'x' * 300: 'y' * 300}]", "print('\\udcff')",
    "import os; os.close(0)", "lr = -1", "# \udcff",
]  # fmt: skip

# Options that say how long to work, or in how many processes: no large values, which are no mistakes.
LONG = {
    "n_layer", "max_steps", "steps", "max_new_tokens", "num_samples", "samples", "sweeps", "trials", "teacher_layers",
    "teacher_width", "eval_inputs", "megabytes", "tokens", "seeds", "batch_rows", "num_proc", "processes", "jobs",
    "workers", "sample_tokens", "batches", "context", "timeout",
}  # fmt: skip

# ---------------------------------------------------------------------------------------
# Scripts


@dataclasses.dataclass
class Target:
    """A script, a call of it that works, the files that this call reads, and what it makes."""

    script: str
    words: dict  # {option: text}
    config: str | None = None  # "module.Dataclass" of its options
    first: tuple = ()  # words before the options
    reads: tuple = ()
    makes: str = ""  # path of a file, with its options in {}
    speaks: bool = True  # whether it prints to stdout


TINY = dict(
    n_layer=1, n_head=2, d_model=36, block_size=32, vocab_size=96, micro_batch=2, batch_tokens=64, max_steps=2,
    eval_interval=2, eval_tokens=64, log_interval=1, warmup_steps=1, device="cpu", compile=False, data_dir="data",
)  # fmt: skip
SMALL_IMAGES = dict(
    n_layer=1, d_model=16, image_size=8, data_dir="images", n_classes=2, batch_size=2, micro_batch=2, max_steps=2,
    eval_interval=2, log_interval=1, warmup_steps=1, device="cpu", compile=False,
)  # fmt: skip
RUN = ("run/ckpt.pt", "run/config.json", "run/log.jsonl", "run/run.lock")


LOG = "{out_dir}/log.jsonl"


TARGETS = {
    "train": Target(
        "train", {**TINY, "out_dir": "new"}, "options.TrainConfig", (),
        ("data/meta.json", "data/train.bin", "data/val.bin"), LOG,
    ),
    "config_file": Target("train", {**TINY, "out_dir": "new"}, None, ("config.py",), ("config.py",), LOG),
    "resume": Target(
        "train", {**TINY, "out_dir": "run", "max_steps": 4, "resume": True}, "options.TrainConfig", (), RUN, LOG,
    ),
    "restart": Target(
        "train", {**TINY, "out_dir": "run"}, "options.TrainConfig", (),
        ("run/config.json", "run/log.jsonl", "run/run.lock"), LOG,
    ),
    "init_from": Target("train", {**TINY, "out_dir": "new", "init_from": "run"}, None, (), ("run/ckpt.pt",), LOG),
    "nanogpt": Target("train", {**TINY, "out_dir": "new", "data_dir": "nanogpt"}, None, (), ("nanogpt/meta.json",), LOG),
    "sample": Target(
        "sample", dict(out_dir="run", max_new_tokens=3, device="cpu"), "sample.SampleConfig", (), ("run/ckpt.pt",),
    ),
    "prepare": Target(
        "prepare_owt", dict(source="text", tokenizer="bytes", out_dir="new", num_proc=1), "prepare_owt.PrepareConfig", (),
        ("text/a.txt", "text/b.jsonl", "text/c.parquet"),
    ),
    "bpe": Target(
        "prepare_owt", dict(source="text/a.txt", bpe_dir="bpe", out_dir="new", num_proc=1), None, (),
        ("bpe/vocab.bpe", "bpe/encoder.json"),
    ),
    "prepare_nanogpt": Target(
        "prepare_owt", dict(source="raw"), None, (), ("raw/meta.pkl", "raw/train.bin", "raw/val.bin"),
    ),
    "convert": Target(
        "lab.convert", dict(source="run", structure="low_rank", rank=4, out_dir="new"), "lab.convert.ConvertConfig", (),
        ("run/ckpt.pt",), "{out_dir}/ckpt.pt",
    ),
    "convert_hf": Target(
        "lab.convert", dict(source="hf", structure="low_rank", rank=4, out_dir="new"), None, (),
        ("hf/config.json", "hf/model.safetensors"), "new/ckpt.pt",
    ),
    "export": Target(
        "lab.convert", dict(source="run_standard", export="new"), None, (), ("run_standard/ckpt.pt",), "new/config.json",
    ),
    "images": Target(
        "vision.train", {**SMALL_IMAGES, "out_dir": "new"}, "vision.train.ImageTrainConfig", (),
        ("images/train/a/0.png", "images/val/b/0.png", "images/train", "images/val/a"), LOG,
    ),
    "vit": Target(
        "vision.train", {**SMALL_IMAGES, "out_dir": "new", "model": "vit", "patch_size": 4},
        "vision.train.ImageTrainConfig", makes=LOG,
    ),
    "images_resume": Target(
        "vision.train", {**SMALL_IMAGES, "out_dir": "run_images", "max_steps": 4, "resume": True}, None, (),
        tuple(path.replace("run", "run_images", 1) for path in RUN[:3]), LOG,
    ),
    "pixels": Target(
        "vision.data", dict(data_dir="images", out_dir="new", image_size=2), "vision.data.PixelsConfig", (),
        ("images/train/a/0.png", "images/val/b/0.png"), "{out_dir}/meta.json",
    ),
    "npz": Target(
        "vision.data", dict(data_dir="npz", out_dir="new", image_size=2), None, (), ("npz/0.npz", "npz/1.npz"),
        "new/meta.json",
    ),
    "regression": Target(
        "vision.regression",
        dict(out_dir="new", n_layer=1, d_model=16, d_in=4, teacher_layers=1, teacher_width=8, batch_size=4,
            micro_batch=4, eval_inputs=4, max_steps=2, eval_interval=2, warmup_steps=1, device="cpu", compile=False),
        "vision.regression.RegressionConfig", makes=LOG,
    ),
    "plot": Target(
        "lab.scaling_laws", dict(png="new.png"), "lab.scaling_laws.PlotConfig", ("plot", "run", "run_standard"), RUN[1:3],
    ),
    "fit": Target(
        "lab.scaling_laws", dict(out="new", costs="flops,parameters"), "lab.scaling_laws.FitConfig",
        ("fit", "runs/a", "runs/b", "runs/c", "runs/d"), ("runs/a/log.jsonl", "runs/b/config.json", "runs/c/config.json"),
    ),
    "rates": Target(
        "lab.scaling_laws", dict(out="new"), "lab.scaling_laws.RatesConfig", ("rates", "runs/a", "runs/b", "rates.json"),
        ("rates.json", "runs/a/log.jsonl", "runs/b/config.json"),
    ),
    "sweep": Target(
        "lab.sweep", dict(commands=True, out="sweep"), "lab.sweep.SweepConfig", ("sweep.py",),
        ("sweep.py", "sweep/seed1/log.jsonl", "sweep/seed1/config.json"), speaks=False,
    ),
    "structures": Target("lab.structures", dict(d_in=16, d_out=16), "lab.structures.StructuresConfig"),
    "search_report": Target(
        "lab.search", {**TINY, "out": "search", "report": True, "trials": 1}, "lab.search.SearchConfig", (),
        ("search/search.db",),
    ),
    "coords": Target(
        "lab.mup_check",
        dict(widths="16,32", n_layer=1, n_head=2, block_size=8, batch_rows=1, steps=1, device="cpu", seeds=1),
        "lab.mup_check.CoordsConfig", ("coords",),
    ),
    "landscape": Target(
        "lab.mup_check",
        dict(widths="16", n_layer=1, n_head=2, block_size=8, batch_rows=1, steps=1, device="cpu", lrs="0.01",
            data_dir="data"),
        "lab.mup_check.LandscapeConfig", ("lr_landscape",), ("data/meta.json",),
    ),
    "depth": Target(
        "lab.mup_check",
        dict(n_layers="1,2", width=16, n_head=2, block_size=8, batch_rows=1, steps=1, device="cpu", structures="dense"),
        "lab.mup_check.DepthConfig", ("depth",),
    ),
    "bench_step": Target(
        "lab.bench", {**TINY, "steps": 1, "json": "new.json", "parts": False}, "lab.bench_options.StepConfig", ("step",),
    ),
    "bench_layers": Target(
        "lab.bench", dict(layers="16-16:1", tokens="4,", device="cpu", json="new.json", methods="torch"),
        "lab.bench_options.LayersConfig", ("layers",),
    ),
    "bench_draw": Target(
        "lab.bench", dict(draw="layers.json", png="new.png"), None, ("layers",), ("layers.json",), "new.png", False,
    ),
    "bench_mixtures": Target(
        "lab.bench", dict(layers="btt/16-16:1/2:1", tokens=4, device="cpu", json="new.json"),
        "lab.bench_options.MixturesConfig", ("mixtures",),
    ),
}  # fmt: skip


def make_whole(folder, names):
    """In `folder`: tiny data, and the runs that these targets read."""
    needed = set()
    for target in (TARGETS[name] for name in names):
        words = [*target.words.values(), *target.first, *target.reads]
        needed |= {str(word).partition("/")[0] for word in words}
    os.chdir(folder)
    make_data()
    make_runs(needed)
    if "hf" in needed:
        import transformers

        shape = dict(vocab_size=96, n_positions=32, n_embd=36, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
        transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).save_pretrained("hf")
    if "search" in needed:
        make_search()


def make_data():
    """Tokens, texts, images, tokenizers, a config file and a sweep file."""
    import numpy as np
    import pyarrow
    import pyarrow.parquet
    from PIL import Image

    os.mkdir("folder")
    os.mkdir("text")
    text = "".join(f"{a} + {b} = {a + b}\n" for a in range(40) for b in range(40))
    for name in ("data", "nanogpt", "raw"):
        os.mkdir(name)
        ids = np.frombuffer(text.encode(), dtype=np.uint8)
        ids = np.where(ids == 10, 0, ids - 31).astype(np.uint8 if name == "data" else np.uint16)
        ids[:-4000].tofile(f"{name}/train.bin")
        ids[-4000:].tofile(f"{name}/val.bin")
        meta = dict(
            tokenizer="char96", vocab_size=96, dtype=str(ids.dtype), train_tokens=len(ids) - 4000, val_tokens=4000
        )
        if name == "nanogpt":
            characters = "".join(map(chr, range(31, 127)))
            meta |= dict(tokenizer="chars", vocabulary=characters)
        if name != "raw":
            write(f"{name}/meta.json", json.dumps(meta))
    characters = list(map(chr, range(31, 127)))
    ids = {character: number for number, character in enumerate(characters)}
    write("raw/meta.pkl", pickle.dumps(dict(vocab_size=96, itos=dict(enumerate(characters)), stoi=ids)))
    write("text/a.txt", text[:4000])
    write("text/b.jsonl", "".join(json.dumps({"text": line}) + "\n" for line in text.splitlines()[:100]))
    pyarrow.parquet.write_table(pyarrow.table({"text": text.splitlines()[:100]}), "text/c.parquet")
    for path, seed in (("images/train/a", 0), ("images/train/b", 1), ("images/val/a", 2), ("images/val/b", 3)):
        os.makedirs(path)
        for number in range(2):
            pixels = np.random.default_rng(seed + number).integers(0, 255, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(f"{path}/{number}.png")
    os.mkdir("npz")
    for number in range(2):
        np.savez(f"npz/{number}.npz", X=np.zeros((2, 4, 4, 3), np.uint8), Y=np.zeros(2))
    os.mkdir("bpe")
    write("bpe/vocab.bpe", "#version: 0.2\na b\n")
    write("bpe/encoder.json", '{"a": 0, "b": 1, "ab": 2}')
    write("config.py", "lr = 1e-3\n")
    write("train.py", "")  # that a sweep calls, in name
    write("sweep.py", "runs = [dict(seed=1), dict(seed=2)]\ncommon = dict(max_steps=2)\nfit = ''\n")


def make_runs(needed):
    """Folders of runs, and files made of them, with a name in `needed`."""
    from train import main as train_gpt
    from vision.train import main as train_on_images

    wider = dict(structure="btt", d_model=64, vocab_size=100)
    curve = dict(max_steps=3, eval_interval=1)
    runs = dict(run={}, run_standard=dict(parametrization="standard", bias=True), sweep={}) | {"runs/a": curve}
    runs |= {"runs/b": {**curve, "d_model": 72}, "runs/c": {**curve, "structure": "btt"}, "runs/d": {**curve, **wider}}
    for name, changes in runs.items():
        out_dir = "sweep/seed1" if name == "sweep" else name
        options = {**TINY, "structure": "dense", "out_dir": out_dir, **changes}
        if name.partition("/")[0] in needed:
            train_gpt([f"--{key}={value}" for key, value in options.items()])
    if "run_images" in needed:
        train_on_images([f"--{key}={value}" for key, value in {**SMALL_IMAGES, "out_dir": "run_images"}.items()])
    if "rates.json" in needed:
        find("lab.scaling_laws.main")(["rates", "runs/a", "runs/b", "--out=rates"])
    if "layers.json" in needed:
        find("lab.bench.main")(["layers", "--layers=16-16:1", "--tokens=4,", "--device=cpu", "--json=layers.json"])


def make_search():
    """The database of a search with one trial."""
    import optuna

    from lab import search

    words = [f"--{key}={value}" for key, value in {**TINY, "out": "search", "trials": 1}.items()]
    study = search.open_study(search.load_config(search.SearchConfig, words))
    place, sizes = dict(omega=0.5, psi=0.5, nu=0.5), dict(d_model=36, parameters=1000, flops=1e6)
    model = dict(theta=[0.5, 0, 0.5, 0, 0.5, 0.5, 0], experts=1, structure="einsum", options={}, **place, **sizes)
    complete = optuna.trial.TrialState.COMPLETE
    study.add_trial(optuna.trial.create_trial(state=complete, value=1.5, user_attrs={"model": model}))


def write(path, content):
    with open(path, "wb") as file:
        file.write(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))


# ---------------------------------------------------------------------------------------
# Cases


def draw_case(chance, only=""):
    """-> [name of a target, {option: text}, [[path, kind of damage, …]]]"""
    name = chance.choice([name for name in TARGETS if only in name])
    target = TARGETS[name]
    if target.reads and (target.config is None or chance.random() < 0.6):
        path = chance.choice(target.reads)
        return [name, {}, [[path, *draw_damage(chance, path)]]]
    options = [field.name for field in dataclasses.fields(find(target.config))]
    return [
        name,
        {option: draw_text(chance, option) for option in chance.sample(options, chance.choice([1, 1, 1, 2, 3]))},
        [],
    ]


def draw_text(chance, option):
    text = chance.choice(TEXTS)
    with contextlib.suppress(ValueError):
        while option in LONG and 1e3 <= abs(float(text)) <= WHOLE * 1.01:
            text = chance.choice(TEXTS)
    return text


def draw_damage(chance, path):
    """-> kind of damage and its arguments, JSON-ready"""
    kinds = ["content", "content", "fifo", "folder", "missing", "loop", "bits", "cut", "grow"]
    structured = dict(
        json=["field"] * 30, jsonl=["field"] * 30, pt=["field"] * 30, pkl=["field"] * 4, py=["program"] * 60
    )
    kind = chance.choice(kinds + structured.get(path.rpartition(".")[2], []))
    if kind == "content":
        return kind, chance.choice(CONTENTS).decode("latin-1")
    if kind == "program":
        return kind, chance.choice(PROGRAMS)
    if kind == "field":
        return (
            kind,
            chance.random(),
            chance.choice(["value", "value", "value", "value", "remove", "add"]),
            chance.randrange(len(VALUES)),
        )
    return kind, chance.random(), chance.randrange(1, 9)


def do_damage(path, kind, *how):
    whole = None
    if os.path.isdir(path):
        shutil.move(path, path + ".was")
    else:
        with open(path, "rb") as file:
            whole = file.read()
        os.remove(path)
    if kind in ("content", "program"):
        write(path, how[0].encode("latin-1") if kind == "content" else how[0])
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        os.mkdir(path)
    elif kind == "loop":
        os.symlink(os.path.basename(path), path)
    elif kind == "field":
        change_field(path, whole, *how)
    elif kind != "missing" and whole:
        place = int(how[0] * len(whole))
        if kind == "bits":
            whole = bytearray(whole)
            for at in range(place, min(len(whole), place + how[1])):
                whole[at] ^= 1 << (how[1] - 1)
        write(path, whole[:place] if kind == "cut" else whole + whole[:place] if kind == "grow" else bytes(whole))


def change_field(path, whole, where, how, number):
    """Change one field, at any depth, of a file of JSON, or of what torch.save or pickle wrote."""
    import torch

    if path.endswith(".pt"):
        content = torch.load(io.BytesIO(whole), weights_only=True)
    elif path.endswith(".pkl"):
        content = pickle.loads(whole)
    elif path.endswith(".jsonl"):
        content = [json.loads(line) for line in whole.splitlines()]
    else:
        content = json.loads(whole)
    places = [place for place in places_in(content) if not isinstance(place[0][place[1]], torch.Tensor) or where < 0.1]
    container, key = places[int(where * len(places))]
    value = copy.deepcopy(VALUES[number])
    if how == "remove":
        del container[key]
    elif how == "add" and isinstance(container, dict):
        container[str(value)] = value
    else:
        container[key] = value
    if path.endswith(".pt"):
        torch.save(content, path)
    elif path.endswith(".pkl"):
        write(path, pickle.dumps(content))
    elif path.endswith(".jsonl"):
        write(path, "".join(json.dumps(row) + "\n" for row in content))
    else:
        write(path, json.dumps(content))


def places_in(content):
    """(container, key) of everything in nested dicts and lists, at most 20 of each."""
    if not isinstance(content, (dict, list)):
        return []
    keys = list(content if isinstance(content, dict) else range(len(content)))[:60]
    return [(content, key) for key in keys] + [place for key in keys for place in places_in(content[key])]


def find(name):
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


# ---------------------------------------------------------------------------------------
# Running them


def run_case(case, whole, folder):
    """Run a case in a copy of the folder `whole` -> None, or what is wrong, in words. The streams 1 and 2 become files."""
    name, options, damages = case
    target = TARGETS[name]
    os.chdir("/")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder, symlinks=True)
    os.chdir(folder)
    os.mkfifo("fifo")
    os.symlink("loop", "loop")
    for damage in damages:
        do_damage(*damage)
    given = {**target.words, **options}
    words = [*target.first, *(f"--{key}={value}" for key, value in given.items())]
    status, began = call(target, words), time.monotonic()
    out, err = (read_text(f"{folder}.{stream}") for stream in ("out", "err"))
    # Progress, and what Python itself prints where memory for an unpickled bytearray is missing, do not count.
    ignored = r"^\s*$|\d documents \[|deallocated bytearray"
    lines = [line for line in err.splitlines() if not re.search(ignored, line)]
    seconds = time.monotonic() - began
    if "Traceback (most recent call last)" in err:
        return "traceback: " + lines[-1][:300]
    if status and len(lines) != 1:
        return f"status {status} with {len(lines)} lines on stderr: {lines[:4]}"
    if status and (len(lines[0]) > 3000 or (lines[0] != "stopped" and not lines[0].startswith("error: "))):
        return f"status {status}: {lines[0][:300]}"
    if not status:
        path = target.makes.format(**given)
        if target.makes and given.get("out_dir") != "" and not os.path.exists(path):
            return f"status 0, but there is no {path}"
        if target.speaks and not out.strip():
            return "status 0, and nothing printed"
    return None if seconds < LIMIT else f"took {seconds:.0f} s"


def call(target, words):
    """Call the script's main as the script does -> its exit status."""
    from configurator import as_script

    module = importlib.import_module(target.script)
    main = getattr(module, "main", None) or (
        lambda words: module.write_pixels(module.load_config(module.PixelsConfig, words))
    )
    sys.argv = [target.script, *words]
    for stream in (1, 2):
        os.ftruncate(stream, 0)
        os.lseek(stream, 0, os.SEEK_SET)
    sys.stdout = open(1, "w", encoding="utf-8", errors="strict", closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False, buffering=1)
    status = 0
    try:
        as_script(main)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    with contextlib.suppress(Exception):
        importlib.import_module("matplotlib.pyplot").close("all")
    return status


def read_text(path):
    with open(path, errors="replace") as file:
        return file.read()


def work(seed, only, cases, whole, folder, pipe):
    """In a process of its own: run cases, given or drawn, and send each before it runs, and what was wrong afterwards."""
    os.setsid()
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}.{name}", os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC), stream)
    used = int(read_text("/proc/self/statm").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**28, 2**28))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    chance = random.Random(seed)
    handlers = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)}
    environment = dict(os.environ)
    modules = set(sys.modules)
    for case in cases if cases is not None else iter(lambda: draw_case(chance, only), None):
        pipe.send(("begin", case))
        try:
            wrong = run_case(case, whole, folder)
        except Exception as error:
            wrong = f"the fuzzer itself: {traceback.format_exc()}" if error else None
        pipe.send(("end", wrong))
        for name, handler in handlers.items():
            signal.signal(name, handler)
        os.environ.clear()
        os.environ.update(environment)
        for name in set(sys.modules) - modules:
            if name.startswith("config_file_"):
                del sys.modules[name]
    pipe.send(("done", None))


class Worker:
    """A process that runs cases one after the other."""

    def __init__(self, seed, only, cases, whole, folder):
        self.arguments = (seed, only, cases, whole, folder)
        self.case, self.began = None, time.monotonic()
        self.pipe, theirs = multiprocessing.Pipe(duplex=False)
        self.process = multiprocessing.get_context("fork").Process(target=work, args=(*self.arguments, theirs))
        self.process.start()
        theirs.close()

    def poll(self):
        """-> [(case, what is wrong or None)] that have ended since the last call; and whether this worker has ended."""
        ended = []
        try:
            while self.pipe.poll(0.02):
                what, content = self.pipe.recv()
                if what == "done":
                    return ended, True
                if what == "begin":
                    self.case, self.began = content, time.monotonic()
                else:
                    ended.append((self.case, content))
                    self.case = None
        except EOFError:
            self.process.join()
            return [*ended, (self.case, f"the process died with status {self.process.exitcode}")], True
        if self.case is not None and time.monotonic() - self.began > LIMIT:
            stack = read_text(self.arguments[-1] + ".err")[-300:]
            self.end()
            return [*ended, (self.case, f"not ended after {LIMIT} s {stack}")], True
        return ended, False

    def end(self):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()


def run_cases(seconds, seed, jobs=2, only="", cases=None, report=print):
    """Run cases for so many seconds, or those given -> (how many, [(case, what is wrong)])."""
    names = [name for name in TARGETS if only in name] if cases is None else {name for name, _, _ in cases}
    for name in names:
        importlib.import_module(TARGETS[name].script)
    count, failures, seeds = 0, [], iter(range(seed * 1_000_000, 10**18))
    home = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        whole = os.path.join(folder, "whole")
        os.mkdir(whole)
        with contextlib.redirect_stdout(io.StringIO()):
            maker = multiprocessing.get_context("fork").Process(target=make_whole, args=(whole, names))
            maker.start()
            maker.join()
        if maker.exitcode:
            raise SystemExit("error: the fuzzer's folder could not be made")
        deadline = time.monotonic() + seconds
        start = lambda left: Worker(next(seeds), only, left, whole, os.path.join(folder, f"case{next(seeds)}"))  # noqa: E731
        workers = [start(cases)] if cases is not None else [start(None) for _ in range(jobs)]
        try:
            while workers and time.monotonic() < deadline:
                for worker in list(workers):
                    ended, over = worker.poll()
                    count += len(ended)
                    for case, wrong in ended:
                        if wrong is not None:
                            failures.append((case, wrong))
                            report(f"{json.dumps(case)}\n    {wrong}", flush=True)
                    if over:
                        workers.remove(worker)
                        if cases is None:
                            workers.append(start(None))
        finally:
            for worker in workers:
                worker.end()
            os.chdir(home)
    return count, failures


def main(words):
    options = dict(seconds="60", seed="1", jobs="2", only="", case=None)
    for word in words:
        key, _, value = word.removeprefix("--").partition("=")
        if key not in options:
            raise SystemExit(f"error: unknown option {word}: {', '.join(options)}")
        options[key] = value
    cases = None if options["case"] is None else [json.loads(options["case"])]
    began = time.monotonic()
    count, failures = run_cases(
        float(options["seconds"]), int(options["seed"]), int(options["jobs"]), options["only"], cases
    )
    print(f"{count} cases, {len(failures)} failed, {count / (time.monotonic() - began) * 60:.0f} a minute")
    raise SystemExit(1 if failures else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
