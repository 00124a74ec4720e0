"""Tests the benchmarks of updates, layers and mixtures on the CPU: the rows they write, against FLOPs by hand."""

import json
import typing

import pytest
import torch

from configurator import ConfigError, load_config
from conftest import ROOT, run_forked
from lab import sweep
from lab.bench import SampleBenchConfig, bench_sample
from lab.bench_layers import AllExperts, LayersConfig, MixturesConfig, bench_layers, bench_mixtures
from lab.mup_check import CoordsConfig, LandscapeConfig
from lab.scaling_laws import FitConfig, PlotConfig
from moe import make_mixture

SHAPE = "--vocab_size=96 --n_layer=1 --n_head=2 --d_model=36 --block_size=32 --micro_batch=2 --batch_tokens=256"


@pytest.mark.parametrize("processes", [None, 2])
def test_an_update_is_timed(tmp_path, processes):
    """Of three configs the last is sharded; one process prints, and writes a row for each config."""
    words = f"{SHAPE} --device=cpu --compile=False"
    against = f"--against={words} --structure=dense; {words} --shard=fsdp"
    path = tmp_path / "step.json"
    done = run_forked(
        "lab.bench",
        "step",
        *words.split(),
        "--steps=2",
        "--parts=False",
        f"--json={path}",
        against,
        processes=processes,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("tokens_per_second") == 1
    said = done.stdout.splitlines()  # three lines per config: its words, how long it takes, its main figures
    assert [line[:3] for line in said[:9]] == ["1: ", "   ", "   ", "2: ", "   ", "   ", "3: ", "   ", "   "], said
    assert "five updates" in said[4] and "about" in said[4] and " ms an update, " in said[5] and "tokens/s" in said[5]
    rows = json.loads(path.read_text())
    assert len(rows) == 3 and "--structure=dense" in rows[1]["command"]
    for row in rows:
        assert row["processes"] == (processes or 1) and row["tokens_an_update"] == 256
        assert row["tokens_per_second"] == pytest.approx(256e3 / row["ms_median"]) and "forward_share" not in row


def test_parts_of_an_update_are_timed_and_profiled(tmp_path):
    words = f"{SHAPE} --device=cpu --compile=False --steps=2 --profile={tmp_path}".split()
    done = run_forked("lab.bench", "step", *words, processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "optimizer_share" in done.stdout and "matrix products" in (tmp_path / "profile.txt").read_text()
    assert (tmp_path / "trace.json").stat().st_size > 1000


def test_an_update_on_images_is_timed(tmp_path):
    """Compares two models and times their parts."""
    words = (
        "--n_layer=1 --d_model=36 --image_size=8 --channels=1 --mixup=0.4 --batch_size=64 --micro_batch=32 --device=cpu"
    )
    path = tmp_path / "step.json"
    against = f"--against={words} --compile=False --structure=dense"
    words = [*words.split(), "--compile=False", "--steps=2", f"--profile={tmp_path}", f"--json={path}", against]
    done = run_forked("lab.bench", "image_step", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    btt, dense = json.loads(path.read_text())
    for row in (btt, dense):
        assert row["images_an_update"] == 64
        assert row["images_per_second"] == pytest.approx(64e3 / row["ms_median"]) and row["forward_share"] > 0
    # dense: input 64 x 36, a block 36 -> 144 -> 36, head 36 x 10; 2 FLOPs per weight, and 4 in the backward pass
    assert dense["training_mflops_an_image"] == pytest.approx(6e-6 * (64 * 36 + 2 * 36 * 144 + 36 * 10))
    assert btt["training_mflops_an_image"] < dense["training_mflops_an_image"]
    assert "matrix products" in (tmp_path / "profile.txt").read_text()


def test_layers_on_a_cpu_are_timed_with_the_plain_torch_methods(tmp_path):
    words = [
        "--layers=64-64:1 48-96:2",
        "--tokens=(32,)",
        "--device=cpu",
        f"--json={tmp_path}/rows.json",
        f"--png={tmp_path}/a.png",
    ]
    done = run_forked("lab.bench", "layers", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["method"] for row in rows] == 2 * ["dense", "btt, torch", "btt, dense", "chosen: torch"]
    assert all(row["error"] < 1e-5 for row in rows if row["method"] != "dense")
    assert "1 of 2 done, about " in done.stdout and "2 of 2" not in done.stdout
    again = run_forked("lab.bench", "layers", f"--draw={tmp_path}/rows.json", f"--png={tmp_path}/b.png")
    assert again.returncode == 0 and (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG"), again.stderr


@pytest.mark.parametrize(
    "bench, words, message",
    [
        (bench_layers, ["--dtype=bfloat"], "dtype='bfloat'"),
        (bench_layers, ["--device=cuda"], "device=cuda, but torch sees no GPU"),
        (bench_layers, ["--draw=nowhere.json"], "draw=nowhere.json has no rows of layers: give the --json"),
        (bench_layers, ["--draw=pyproject.toml"], "draw=pyproject.toml has no rows of layers"),
        (bench_layers, ["--tokens=0,", "--device=cpu"], "tokens=.0,.: give whole numbers"),
        (bench_layers, ["--layers=64-64:1 64", "--device=cpu"], "'64' is no layer"),
        (bench_sample, ["--block_size=64"], "context=512, but the model reads 1 to block_size=64 tokens"),
        (bench_mixtures, ["--tokens=0", "--device=cpu"], "tokens=.0,.: give whole numbers"),
        (bench_mixtures, ["--layers=btt/64-36:1", "--device=cpu"], "'btt/64-36:1' is no mixture: write"),
    ],
)
def test_mistakes_are_found_before_the_work(monkeypatch, bench, words, message):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError, match=message):
        bench(words)


@pytest.mark.parametrize(
    "Config",
    [
        LayersConfig,
        MixturesConfig,
        SampleBenchConfig,
        CoordsConfig,
        LandscapeConfig,
        PlotConfig,
        FitConfig,
        sweep.SweepConfig,
    ],
)
def test_names_of_files_and_folders_may_look_like_numbers(Config):
    named = [name for name, hint in typing.get_type_hints(Config).items() if hint in (str, str | None)]
    named = [name for name in named if name != "device"]
    config = load_config(Config, [f"--{name}=2024" for name in named])
    assert named and all(getattr(config, name) == "2024" for name in named)


def test_the_default_sizes_fit_a_cpu_and_rows_are_written_case_by_case(monkeypatch, capsys, tmp_path):
    """An interrupted benchmark keeps the rows of the cases it has finished."""
    seen = []

    def time_layer(d_in, d_out, rank, tokens, *rest):
        seen.append((d_in, d_out, rank, tokens))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return [{"layer": f"{d_in}-{d_out}:{rank}"}]

    monkeypatch.setattr("lab.bench_layers.time_layer", time_layer)
    monkeypatch.setattr("lab.bench_layers.format_row", str)
    with pytest.raises(KeyboardInterrupt):
        bench_layers(["--device=cpu", f"--json={tmp_path}/rows.json"])
    assert seen == [(256, 256, 1, 2048), (512, 512, 1, 2048), (512, 512, 4, 2048)]
    assert [row["layer"] for row in json.loads((tmp_path / "rows.json").read_text())] == ["256-256:1", "512-512:1"]
    assert "2 of 5 done, about" in capsys.readouterr().out


def test_all_methods_for_mixtures_are_timed_on_a_cpu(tmp_path):
    """The published method, with which the others are compared, computes the same outputs."""
    layers = "btt/64-36:1/4:2 low_rank/48-64:4/4:2 dense/32-32:1/3:1"
    words = [f"--layers={layers}", "--tokens=32", "--device=cpu", f"--json={tmp_path}/rows.json"]
    done = run_forked("lab.bench", "mixtures", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    both = ["dense", "2 experts, no router", "mixture", "all experts, by bmm"]
    assert [row["method"] for row in rows] == 2 * both + ["dense", "mixture"]
    assert all(row["ms"] > 0 for row in rows)

    mixture, x = make_mixture(36, 48, 4, 2, structure="btt", rank=2), torch.randn(20, 36)
    torch.testing.assert_close(AllExperts(mixture)(x), mixture(x))
