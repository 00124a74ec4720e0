"""Tests that a sweep trains the unfinished runs of its list and fits them, with real runs of a tiny model."""

import json
import os
import shlex
import signal
import sys
import time

import numpy as np
import pytest
import torch

import train
import vision.regression
import vision.train
from configurator import ConfigError, load_config, read_config_file
from conftest import ROOT, read_rows, run_forked, start_script
from engine.ownership import is_alive, owning
from lab import scaling_laws, sweep
from model import GPT
from vision.mlp import MLP

SWEEPS = os.path.join(ROOT, "config", "sweeps")

# {script: (its options, FLOPs of a forward pass per token, image or sample)}
RUNS_OF = {
    "train.py": (train.TrainConfig, lambda config: GPT(config).flops_per_token()),
    "vision/train.py": (
        vision.train.ImageTrainConfig,
        lambda config: vision.train.MODELS[config.model](config).flops(),
    ),
    "vision/regression.py": (vision.regression.RegressionConfig, lambda config: MLP(config).flops()),
}

SWEEP = """
config = ""
common = dict(data_dir={data!r}, n_layer=1, n_head=2, vocab_size=96, block_size=32, micro_batch=4, batch_tokens=256,
              max_steps=6, eval_interval=2, eval_tokens=1000, warmup_steps=2, device="cpu", compile=False)
runs = [dict(structure="dense", d_model=36), dict(structure="btt", d_model=36), dict(structure="btt", d_model=64)]
fit = "--samples=5"
"""


@pytest.fixture
def path(char_data, tmp_path):
    file = tmp_path / "tiny.py"
    file.write_text(SWEEP.format(data=char_data))
    return str(file)


def test_names_of_runs_hold_the_options_that_differ():
    runs = [
        {"structure": "btt", "rank": 1, "lr": 0.1, "overrides": {"ffn": "dense"}},
        {"structure": "btt", "rank": 4, "lr": 0.1},
        {"structure": "einsum", "theta": (0.5, 0, 0.5, 0, 0.5, 0.5, 0), "lr": 0.1},
    ]
    assert sweep.run_names(runs) == ["btt_rank1_overridesffn.dense", "btt_rank4", "einsum_theta0.5-0-0.5-0-0.5-0.5-0"]
    assert sweep.run_names([{"structure": "dense"}]) == ["dense"]


def test_a_sweep_trains_what_is_left_and_fits_and_then_nothing_is_left(path, tmp_path, capsys):
    words = ["lab.sweep", path, f"--out={tmp_path}/runs", "--gpus=0", "--jobs=2"]
    # the first command trains one of the three runs
    done = run_forked(*words, "--only=dense_d_model36")
    assert done.returncode == 0 and "1/1 dense_d_model36" in done.stdout, done.stdout + done.stderr
    assert "2 of the sweep's 3 runs are left: the fit follows when all are finished" in done.stdout
    log = tmp_path / "runs" / "dense_d_model36" / "log.jsonl"
    before = log.read_bytes()
    sweep.main([*words[1:], "--commands"])
    left = capsys.readouterr().out.splitlines()
    assert len(left) == 2 and all("-m train" in line and "--resume" in line for line in left)
    done = run_forked(*words)
    assert done.returncode == 0 and "3 runs, 1 of them finished; 2 at a time" in done.stdout, done.stdout + done.stderr
    assert log.read_bytes() == before
    fit = json.loads((tmp_path / "runs" / "fit" / "fit.json").read_text())
    assert set(fit["groups"]) == {"dense", "btt"} and len(fit["runs"]) == 3
    assert "seconds" not in fit and "no fit of their seconds" in done.stdout  # the runs shared the CPU
    sweep.main([*words[1:], "--commands"])
    assert capsys.readouterr().out.strip() == ""


def test_a_run_that_fails_is_named_and_the_others_continue(path, tmp_path):
    text = open(path).read().replace('dict(structure="btt", d_model=36), ', "")
    open(path, "w").write(text.replace("d_model=36", "d_model=37"))  # n_head=2 does not divide it
    done = run_forked("lab.sweep", path, f"--out={tmp_path}/runs", "--gpus=0", "--jobs=2")
    assert done.returncode == 1 and "error: 1 of 2 runs failed: dense_d_model37; the same" in done.stderr
    assert "n_head=2 does not divide d_model=37" in (tmp_path / "runs" / "dense_d_model37" / "train.log").read_text()
    assert sweep.is_finished({"out_dir": str(tmp_path / "runs" / "btt_d_model64"), "max_steps": 6})


def test_ctrl_c_twice_leaves_nothing_running_and_the_same_command_resumes(path, tmp_path):
    words = ["lab.sweep", path, f"--out={tmp_path}/runs", "--gpus=0", "--only=dense_d_model36"]
    log = tmp_path / "runs" / "dense_d_model36" / "log.jsonl"
    long = "--common=--max_steps=100000 --eval_interval=50000"
    process = start_script(*words, long)
    try:
        waited = time.monotonic() + 120
        while not (log.exists() and log.stat().st_size) and time.monotonic() < waited:
            time.sleep(0.05)
        for _ in range(2):
            process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 1 and "stopped: the same command resumes" in said and "Traceback" not in said
    steps = [row["step"] for row in read_rows(log.parent)]
    train_log = (log.parent / "train.log").read_text()
    assert "Traceback" not in train_log and 0 < steps[-1] < 100_000, train_log
    done = run_forked(*words, f"--common=--max_steps={steps[-1] + 2}")
    assert done.returncode == 0 and "1/1 dense_d_model36" in done.stdout, done.stdout + done.stderr
    assert f"resuming from step {steps[-1]}" in (log.parent / "train.log").read_text()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGKILL"])
def test_runs_end_with_their_sweep(path, tmp_path, name):
    """For each signal; a second sweep in the folder is refused before it and can start after it."""
    out = tmp_path / "runs"
    words = ["lab.sweep", path, f"--out={out}", "--gpus=0", "--only=btt_d_model36"]
    process = start_script(*words, "--common=--max_steps=100000 --eval_interval=50000")
    lock = out / "btt_d_model36" / "run.lock"
    try:
        wait_until(lambda: lock.exists() and json.loads(lock.read_text() or "{}").get("run"))  # the run trains
        run = json.loads(lock.read_text())["pid"]
        assert is_alive(run) and run != process.pid
        with pytest.raises(ConfigError, match=f"runs is in use by process {process.pid} on .*, or give another --out"):
            sweep.main(words[1:])
        process.send_signal(getattr(signal, name))
        said, _ = process.communicate(timeout=120)
        wait_until(lambda: not is_alive(run))
    finally:
        process.kill()
    assert process.returncode == (-9 if name == "SIGKILL" else 1)
    assert name == "SIGKILL" or "stopped: the same command resumes" in said
    assert "saved in" in (out / "btt_d_model36" / "train.log").read_text()
    with owning(str(out), ""), owning(str(out / "btt_d_model36"), ""):
        pass


def wait_until(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("file, text", [("config.json", "[7]"), ("log.jsonl", '{"step": 6, "val_loss": "low"}\n')])
def test_a_damaged_run_is_one_line(path, tmp_path, file, text):
    run = tmp_path / "runs" / "dense_d_model36"
    run.mkdir(parents=True)
    (run / "log.jsonl").write_text('{"step": 6}\n')
    (run / file).write_text(text)
    with pytest.raises(ConfigError, match=f"dense_d_model36/{file}"):
        sweep.main([path, f"--out={tmp_path}/runs", "--gpus=0"])


@pytest.mark.parametrize(
    "text, message",
    [
        ("runs = 3", "no list `runs`"),
        ("runs = []", "no list `runs`"),
        ("runs = [", "no sweep file, SyntaxError"),
        ("runs = [dict(lr=1), dict(lr=1)]", "two runs are the same, lr1"),
        ("runs = [dict(lr=1)]; script = 'trian.py'", "script='trian.py' is no file here"),
    ],
)
def test_mistakes_are_one_line(tmp_path, text, message):
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(ConfigError, match=message):
        sweep.main([str(tmp_path / "bad.py"), "--commands"])
    with pytest.raises(ConfigError, match="give one sweep file"):
        sweep.main([])
    with pytest.raises(ConfigError, match="cannot be read"):
        sweep.main([str(tmp_path / "none.py")])


# -- small versions, options for all runs


def write_sweep(folder, text):
    (folder / "some.py").write_text(text)
    return str(folder / "some.py")


def test_the_small_version_overrides_the_large_one(tmp_path):
    path = write_sweep(
        tmp_path,
        """
common = dict(lr=0.1, max_steps=1000)
runs = [dict(d_model=d) for d in (64, 128, 256)]
fit = "--points=final"
small = dict(common=dict(max_steps=10), runs=[dict(d_model=16), dict(d_model=32)])
""",
    )
    large, small = (sweep.read_sweep(path, small=small) for small in (False, True))
    assert (
        list(large.runs) == ["d_model64", "d_model128", "d_model256"] and large.runs["d_model64"]["max_steps"] == 1000
    )
    assert list(small.runs) == ["d_model16", "d_model32"] and small.fit == "--points=final"
    where = os.path.join("out", "sweeps", "some_small", "d_model16")
    assert small.runs["d_model16"] == {"lr": 0.1, "max_steps": 10, "d_model": 16, "out_dir": where}
    with pytest.raises(ConfigError, match="small defines 'run', which is unknown: it may define runs, common"):
        sweep.read_sweep(write_sweep(tmp_path, "runs = [{}]; small = dict(run=[])"), small=True)
    with pytest.raises(ConfigError, match="has no small version: leave --small out"):
        sweep.read_sweep(write_sweep(tmp_path, "runs = [{}]"), small=True)


def test_common_sets_options_of_all_runs(tmp_path, capsys):
    path = write_sweep(
        tmp_path, "common = dict(max_steps=9); runs = [dict(d_model=d) for d in (64, 128)]; small = dict()"
    )
    make_run(tmp_path / "runs" / "d_model64", last=7, max_steps=7, data_dir="data/a b")
    words = [path, "--small", "--commands", f"--out={tmp_path}/runs"]
    sweep.main(words)
    assert len(capsys.readouterr().out.splitlines()) == 2  # with 9 steps neither is finished
    sweep.main([*words, "--common=--max_steps=7 --data_dir='data/a b'"])
    (line,) = capsys.readouterr().out.splitlines()  # with 7 steps one is
    assert "--d_model=128" in line and "--max_steps=7" in line and "'--data_dir=data/a b'" in line
    for text, message in (
        ("data/mine", "'data/mine' is not an option, write each as --key=value"),
        ("--save 'x", "close the quotes"),
        ("--d_model=8", "d_model differs from run to run: change it in"),
        ("--out_dir=x", "out_dir differs from run to run: give --out"),
    ):
        with pytest.raises(ConfigError, match=message):
            sweep.read_sweep(path, common=text)


def make_run(folder, last, **options):
    """Write what a run leaves: the last row of its log, and its options."""
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text(json.dumps({"step": last}))
    (folder / "config.json").write_text(json.dumps(options))


def test_a_run_whose_steps_a_config_file_sets_is_known_as_finished(tmp_path):
    """Neither the options nor a default state its number of steps, but the run's own config.json does."""
    options = {"out_dir": str(tmp_path / "run")}
    assert not sweep.is_finished(options)
    make_run(tmp_path / "run", last=6, max_steps=8)
    assert not sweep.is_finished(options)
    (tmp_path / "run" / "config.json").write_text(json.dumps({"max_steps": 6}))
    assert sweep.is_finished(options) and not sweep.is_finished({**options, "max_steps": 7})
    (tmp_path / "run" / "config.json").unlink()
    assert not sweep.is_finished(options)


def test_options_are_compared_whatever_their_type_in_config_json(tmp_path, capsys):
    """A run writes data_dir=2024 as text; a max_steps that is no number is never reached."""
    options = {"out_dir": str(tmp_path), "data_dir": 2024, "lr": 1e-3}
    (tmp_path / "log.jsonl").write_text('{"step": 5}\n')
    for text, finished in (
        ('{"data_dir": "2024", "max_steps": 5}', True),
        ('{"max_steps": "all"}', False),
    ):
        (tmp_path / "config.json").write_text(text)
        assert sweep.is_finished(options) == finished
        sweep.say_what_differs({"a": options})
    assert capsys.readouterr().out == ""


def test_finished_runs_with_other_options_are_noted(tmp_path, capsys):
    path = write_sweep(
        tmp_path, "common = dict(data_dir='b', theta=(0.5, 0)); runs = [dict(max_steps=m) for m in (5, 6)]"
    )
    for steps, data in ((5, "a"), (6, "b")):
        make_run(tmp_path / f"max_steps{steps}", steps, max_steps=steps, data_dir=data, theta=[0.5, 0], out_dir="x")
    sweep.main([path, f"--out={tmp_path}", "--gpus=0"])
    note = (
        "note: 1 of these had other options: max_steps5 data_dir='a', not 'b'; give another --out to train them again"
    )
    assert capsys.readouterr().out.splitlines() == ["2 runs, 2 of them finished; 1 at a time", note]


def test_each_run_gets_one_of_the_visible_gpus(tmp_path, monkeypatch):
    """On a machine with four, CUDA_VISIBLE_DEVICES limits which are used."""
    monkeypatch.setattr(sweep, "all_gpus", lambda: list("0123"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert (
        sweep.gpus_to_use() == ["0", "1", "2", "3"] and sweep.gpus_to_use(2) == ["0", "1"] and not sweep.gpus_to_use(0)
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert sweep.gpus_to_use() == ["3", "1"] and sweep.gpus_to_use(1) == ["3"]
    with pytest.raises(ConfigError, match="gpus=3, but CUDA_VISIBLE_DEVICES or this machine has 2: give"):
        sweep.gpus_to_use(3)
    look = "import os, sys; open(sys.argv[-1].split('=')[1] + '/gpu', 'w').write(os.environ['CUDA_VISIBLE_DEVICES'])"
    monkeypatch.setattr(
        sweep, "command_of", lambda sweep, name: [sys.executable, "-c", look, f"--to={tmp_path}/{name}"]
    )
    runs = {name: {"out_dir": str(tmp_path / name)} for name in ("a", "b")}
    assert not sweep.run_all(list(runs), sweep.Sweep(runs, "", [], None), sweep.gpus_to_use())
    assert [(tmp_path / name / "gpu").read_text() for name in runs] == ["3", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert sweep.gpus_to_use() == []


# -- runs of vision/


IMAGES = """
script = "vision/train.py"
config = "vision/config/quickstart.py"
common = dict(max_steps=20, warmup_steps=2, eval_interval=10, log_interval=5, save=False, n_layer=1, device="cpu")
runs = [dict(structure="dense", rank=1, d_model=16)]
fit = "--by=structure --loss=loss --points=final --samples=5"
"""


def test_a_sweep_of_image_runs_is_trained_and_fitted(tmp_path):
    done = run_forked("lab.sweep", write_sweep(tmp_path, IMAGES), f"--out={tmp_path}/runs", "--gpus=0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 runs of 1 groups, training loss (nats per image) at the last validation of each" in done.stdout
    fit = json.loads((tmp_path / "runs" / "fit" / "fit.json").read_text())
    assert {"flops", "seconds", "parameters"} <= set(fit)  # with one run at a time, seconds are fitted
    (run,), rows = fit["runs"], read_rows(tmp_path / "runs" / "dense")
    assert run["loss"] == rows[-1]["loss"]  # the only logged loss in the last tenth of the steps
    assert run["error"] == pytest.approx(1 - rows[-1]["top1"]) and run["val_loss"] == rows[-1]["val_loss"]
    inputs, d, classes = 64, 16, 10  # one block; biases and norms count
    assert run["parameters"] == d * (inputs + 8 * d + classes) + (d + 4 * d + d + classes) + 2 * 2 * d
    assert (tmp_path / "runs" / "fit" / "reached.png").read_bytes().startswith(b"\x89PNG")


REGRESSION = """
script = "vision/regression.py"
config = "vision/config/regression.py"
common = dict(d_model=16, max_steps=6, eval_interval=3, log_interval=3, save=False, teacher_layers=1, teacher_width=8,
              batch_size=32, micro_batch=32, eval_inputs=32, device="cpu", structure="dense")
runs = [dict(seed=seed) for seed in (1, 2)]
"""


def test_seeds_of_a_regression_are_one_setting(tmp_path, capsys):
    done = run_forked("lab.sweep", write_sweep(tmp_path, REGRESSION), f"--out={tmp_path}/runs", "--gpus=0", "--jobs=2")
    assert done.returncode == 0, done.stdout + done.stderr
    runs = [str(tmp_path / "runs" / name) for name in ("seed1", "seed2")]
    scaling_laws.fit_logs([*runs, f"--out={tmp_path}/fit", "--samples=5"])
    said = capsys.readouterr().out
    assert "1 settings have several seeds" in said and "(squared error)" in said
    fit = json.loads((tmp_path / "fit" / "fit.json").read_text())
    last = [read_rows(run)[-1]["val_loss"] for run in runs]
    assert last[0] != last[1] and fit["flops"]["dense"]["frontier_loss"][-1] == pytest.approx(np.mean(last))
    assert fit["runs"][0]["parameters"] == 8 * 16 + 3 * 8 * 16 * 16 + 16 + (16 + 3 * (64 + 16) + 1) + 4 * 2 * 16


# -- config/sweeps/


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("file", sorted(os.listdir(SWEEPS)))
def test_sweeps_of_the_project_can_be_run(file, small):
    """Options and config files exist, sizes have factorisations; the groups of a small version overlap in FLOPs."""
    if not file.endswith(".py") or (
        small and file in ("quickstart.py", "gpt_wide.py", "gpt_rates.py", "mlp_rates.py", "mlp_seeds.py")
    ):
        pytest.skip("no sweep file, or a sweep without a small version")
    chosen = sweep.read_sweep(os.path.join(SWEEPS, file), small)
    Config, flops_of = RUNS_OF[chosen.script]
    fit = load_config(scaling_laws.FitConfig, shlex.split(chosen.fit or ""))
    paid = {}
    for name in chosen.runs:
        _, _, script, *words = sweep.command_of(chosen, name)  # python -m script
        config = load_config(Config, words)  # raises an error for sizes without a factorisation
        if small:
            with torch.device("meta"):
                flops = flops_of(config)
            paid.setdefault(scaling_laws.group_name(vars(config), fit.by), []).append(flops)
    if small:
        assert len(paid) >= 2 and all(len(set(flops)) >= 4 for flops in paid.values()), paid
        assert 2 * max(map(min, paid.values())) < min(map(max, paid.values())), paid
        assert fit.reference in paid


@pytest.mark.parametrize(
    "file, config",
    [
        ("gpt_theta.py", "config/published.py config/published_theta.py"), ("moe.py", "config/published.py"),
        ("gpt2_owt.py", "config/published.py"), ("head_alignment.py", "config/published.py"),
        ("mlp_cifar.py", "vision/config/published.py"), ("vit_cifar.py", "vision/config/published.py"),
        ("next_pixel.py", "vision/config/published_pixels.py"),
    ],
)  # fmt: skip
def test_the_published_settings_reach_every_run_of_a_sweep_that_reads_them(file, config, capsys):
    """The runs are in a folder of their own."""
    chosen = sweep.read_sweep(os.path.join(SWEEPS, file), config=config)
    Config, _ = RUNS_OF[chosen.script]
    wanted = {key: value for path in config.split() for key, value in read_config_file(path).items()}
    seen = set()
    for name, options in chosen.runs.items():
        _, _, script, *words = sweep.command_of(chosen, name)
        made = load_config(Config, words)
        notes = capsys.readouterr().out
        taken = {key for key, value in wanted.items() if getattr(made, key) == value}
        assert all(key in taken or f"note: {key}={value}" in notes for key, value in wanted.items()), (name, notes)
        seen |= taken
        stems = "_".join(os.path.splitext(os.path.basename(path))[0] for path in [file, *config.split()])
        assert options["out_dir"] == os.path.join("out", "sweeps", stems, name)
    unread = {"moe.py": {"scale_decay"}, "mlp_cifar.py": {"qkv_bias", "zero_init_q", "scale_decay"}}
    routers = {"router_init", "router_balance", "expert_init", "scale_decay"}
    unread |= {"vit_cifar.py": {"input_norm", "scale_decay"}, "next_pixel.py": set()}
    assert wanted.keys() - seen == unread.get(file, routers)
