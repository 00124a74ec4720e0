"""Sweeps: what is left of a list of runs is done, by real runs of a tiny model."""

import json
import os

import pytest

import sweep
from configurator import ConfigError
from conftest import run_script

SWEEP = """
config = ""
common = dict(data_dir={data!r}, n_layer=1, n_head=2, vocab_size=96, block_size=32, micro_batch=4, batch_tokens=256,
              max_steps=6, eval_interval=2, eval_tokens=1000, warmup_steps=2, device="cpu", compile=False)
runs = [dict(structure=s, d_model=d) for s in ("dense", "btt") for d in (36, 64)]
fit = "--samples=5"
"""


@pytest.fixture
def path(char_data, tmp_path):
    file = tmp_path / "tiny.py"
    file.write_text(SWEEP.format(data=char_data))
    return str(file)


def test_names_tell_runs_apart():
    runs = [
        {"structure": "btt", "rank": 1, "lr": 0.1, "overrides": {"ffn": "dense"}},
        {"structure": "btt", "rank": 4, "lr": 0.1},
        {"structure": "einsum", "theta": (0.5, 0, 0.5, 0, 0.5, 0.5, 0), "lr": 0.1},
    ]
    assert sweep.run_names(runs) == ["btt_rank1_overridesffn.dense", "btt_rank4", "einsum_theta0.5-0-0.5-0-0.5-0.5-0"]
    assert sweep.run_names([{"structure": "dense"}]) == ["dense"]


def test_runs_then_fit_and_then_nothing_is_left(path, tmp_path):
    words = ["sweep.py", path, f"--out={tmp_path}/runs", "--gpus=0", "--jobs=2"]
    # one of the four is there already, one was interrupted
    done = run_script(*words, "--only=dense_d_model36")
    assert done.returncode == 0 and "1/1 dense_d_model36" in done.stdout, done.stdout + done.stderr
    log = tmp_path / "runs" / "dense_d_model36" / "log.jsonl"
    before = log.read_bytes()
    left = run_script(*words, "--commands").stdout.strip().split("\n")
    assert len(left) == 3 and all("train.py" in line and "--resume" in line for line in left)
    done = run_script(*words)
    assert done.returncode == 0 and "4 runs, 1 of them finished; 2 at a time" in done.stdout, done.stdout + done.stderr
    assert log.read_bytes() == before
    fit = json.loads((tmp_path / "runs" / "fit" / "fit.json").read_text())
    assert set(fit["groups"]) == {"dense", "btt"} and len(fit["runs"]) == 4
    assert run_script(*words, "--commands").stdout.strip() == ""


def test_a_run_that_fails_is_named_and_the_others_go_on(path, tmp_path):
    text = open(path).read().replace("for d in (36, 64)", "for d in (37, 64)")  # 37 is no multiple of two heads
    open(path, "w").write(text)
    done = run_script("sweep.py", path, f"--out={tmp_path}/runs", "--gpus=0", "--jobs=2")
    assert done.returncode == 1 and "error: 2 of 4 runs failed: dense_d_model37, btt_d_model37" in done.stderr
    assert "n_head=2 does not divide d_model=37" in (tmp_path / "runs" / "dense_d_model37" / "train.log").read_text()
    assert sweep.is_finished({"out_dir": str(tmp_path / "runs" / "btt_d_model64"), "max_steps": 6})


@pytest.mark.parametrize(
    "text, message",
    [
        ("runs = 3", "no list `runs`"),
        ("runs = []", "no list `runs`"),
        ("runs = [", "no sweep file, SyntaxError"),
        ("runs = [dict(lr=1), dict(lr=1)]", "two runs are the same, lr1"),
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


def test_sweeps_of_the_project_are_made_of_options_that_exist():
    from train import Config

    folder = os.path.join(os.path.dirname(sweep.__file__), "config", "sweeps")
    for name in os.listdir(folder):
        if name.endswith(".py"):
            runs, configs, _ = sweep.read_sweep(os.path.join(folder, name))
            assert all(os.path.exists(os.path.join(os.path.dirname(sweep.__file__), file)) for file in configs)
            for options in runs.values():
                Config(**options)  # sizes that do not factor are found here
