"""Tests the tables of loss against learning rate on synthetic runs, whose best rate is known."""

import json
import math

import numpy as np
import pytest

from configurator import ConfigError
from lab import pages, rates, scaling_laws
from lab.rates import Curve

BEST = {("dense", 64): 1.3e-3, ("dense", 128): 1.7e-3, ("btt", 64): 7e-3, ("btt", 128): 5e-3}
RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
SEEDS = {1: -0.01, 2: 0.0, 3: 0.03}  # what a seed adds to the loss


def true_loss(group, width, lr):
    return 1.5 + 0.2 * math.log(lr / BEST[group, width]) ** 2


def write_run(folder, loss, last=100, **options):
    """A run of 100 steps that logs every tenth, with a training loss 0.1 above the validation loss."""
    folder.mkdir(parents=True)
    rows = [
        {"step": step, "tokens": step, "loss": loss + 0.1 + (100 - step) / 100, "val_loss": loss + (100 - step) / 100}
        for step in range(0, last + 1, 10)
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = dict(max_steps=100, warmup_steps=10, out_dir=str(folder), n_head=options["d_model"] // 64, **options)
    (folder / "config.json").write_text(json.dumps(options))
    return str(folder)


@pytest.fixture
def runs(tmp_path):
    return [
        write_run(
            tmp_path / "runs" / f"{group}_{width}_{lr}_{seed}", true_loss(group, width, lr) + more,
            structure=group, rank=1, d_model=width, lr=lr, seed=seed,
        )
        for group, width in BEST for lr in RATES for seed, more in SEEDS.items()
    ]  # fmt: skip


def fit_rates(tmp_path, *words):
    """Run `lab.scaling_laws rates` -> the curves it writes."""
    scaling_laws.main(["rates", *words, f"--out={tmp_path}/found/rates"])
    return json.loads((tmp_path / "found" / "rates.json").read_text())["curves"]


def test_best_rates_and_optima_are_found(runs, tmp_path):
    curves = fit_rates(tmp_path, *reversed(runs))
    assert [(curve["group"], curve["width"]) for curve in curves] == [("dense", 64), ("dense", 128), ("btt", 64), ("btt", 128)]  # fmt: skip
    for curve in curves:
        group, width = curve["group"], curve["width"]
        assert curve["steps"] == 100 and [at["lr"] for at in curve["rates"]] == list(RATES)
        assert curve["optimum"] == pytest.approx(BEST[group, width]) == pytest.approx(curve["optima_of_seeds"][0])
        assert curve["best"] == min(RATES, key=lambda lr: true_loss(group, width, lr))
        for at in curve["rates"]:
            expected = [true_loss(group, width, at["lr"]) + SEEDS[seed] for seed in at["seeds"]]
            assert at["losses"] == pytest.approx(expected) and sorted(at["seeds"]) == [1, 2, 3]
            assert at["mean"] == pytest.approx(np.mean(expected))
            assert at["standard_deviation"] == pytest.approx(np.std(expected, ddof=1))
    line = (tmp_path / "found" / "rates.md").read_text().splitlines()[2]
    assert line.startswith("| dense | 64 | 100 | 3 | 1.689 ± 0.021 | **1.520** ± 0.021 | 1.544 ± 0.021 |")
    assert line.endswith("| 1.3e-3 [1.3e-3, 1.3e-3] |")


def test_the_training_loss_is_the_mean_over_the_last_tenth(runs, tmp_path):
    curve = fit_rates(tmp_path, *runs, "--loss=loss")[0]
    assert curve["rates"][0]["losses"][0] == pytest.approx(true_loss("dense", 64, 5e-4) + SEEDS[1] + 0.1 + 0.05)


def test_runs_added_later_join_the_same_table(runs, tmp_path):
    whole = fit_rates(tmp_path, *runs)
    fit_rates(tmp_path, *runs[::2])
    together = fit_rates(tmp_path, *runs[1::2], f"{tmp_path}/found/rates.json")
    assert [curve["optimum"] for curve in together] == pytest.approx([curve["optimum"] for curve in whole])
    assert [sorted(at["losses"]) for curve in together for at in curve["rates"]] == [
        sorted(at["losses"]) for curve in whole for at in curve["rates"]
    ]


def test_a_rate_at_which_a_run_diverged_is_never_the_best(tmp_path, capsys):
    words = [
        write_run(tmp_path / str(lr), loss, last, structure="dense", d_model=64, lr=lr, seed=1)
        for lr, loss, last in ((1e-3, 2.0, 100), (2e-3, 1.9, 100), (4e-3, 1.0, 70))
    ]
    (curve,) = fit_rates(tmp_path, *words)
    assert curve["best"] == 2e-3 and curve["optimum"] is None and curve["rates"][2]["losses"] == [None]
    said = capsys.readouterr().out
    assert "0.004/log.jsonl ends at step 70 of 100: it diverged, or is not finished" in said
    assert "| 2.000 | **1.900** | – | 2e-3 to 4e-3 |" in said and "did not reach its last step" in said


def test_runs_with_different_settings_are_kept_apart_and_named(tmp_path):
    words = [
        write_run(tmp_path / f"{lr}{beta2}", 2.0, structure="dense", d_model=64, lr=lr, seed=1, beta2=beta2)
        for lr in (1e-3, 2e-3)
        for beta2 in (0.95, 0.99)
    ]
    names = [curve["group"] for curve in fit_rates(tmp_path, *words)]
    assert names == ["dense, beta2=0.95", "dense, beta2=0.99"]


@pytest.mark.parametrize(
    "losses, optimum, shown",
    [
        ((3.0, 2.0, 3.0), 2e-3, "2e-3"),
        ((1.0, 2.0, 3.0), None, "≤ 1e-3"),
        ((3.0, 2.0, 1.0), None, "≥ 4e-3"),
        ((2.0, 2.0, 3.0), None, "≤ 1e-3"),
        ((None, None, None), None, "none"),
    ],
)
def test_no_optimum_is_given_unless_the_rates_enclose_it(losses, optimum, shown):
    curve = Curve("dense", 64, 100, {lr: {1: loss} for lr, loss in zip((1e-3, 2e-3, 4e-3), losses)}, {})
    assert rates.optimum(curve) == (pytest.approx(optimum) if optimum else None, None)
    assert f"| {shown} |" in list(rates.table_of_rates([curve], "loss"))[2]


def test_the_optimum_is_the_vertex_of_the_parabola_through_three_points():
    random = np.random.default_rng(0)
    for _ in range(20):
        lr = np.exp(np.sort(random.uniform(-8, -3, 5)))
        losses = random.uniform(2, 3, 5)
        losses[2] = 1.9
        square, slope, _ = np.polyfit(np.log(lr[1:4]), losses[1:4], 2)
        assert rates.optimal_rate(lr, losses) == pytest.approx(math.exp(-slope / (2 * square)))


def test_a_note_is_printed_below_the_table():
    dense = Curve("dense", 64, 100, {1e-3: {1: 2.0}}, {"note": "made of cheese"})
    curves = [dense, Curve("btt", 64, 100, {2e-3: {1: 2.0}}, {})]
    lines = list(rates.table_of_rates(curves, "loss"))
    assert lines[2].startswith("| dense † |") and lines[3].startswith("| btt |")
    assert lines[-1] == "† dense: made of cheese."


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "rates: which runs?"),
        (["{tmp}/config.json"], "is no file of lab.scaling_laws rates"),
        (["{tmp}/nothing.json"], "cannot be read"),
        (["{tmp}/nolr"], "has no d_model, max_steps or lr"),
        (["{run}", "{tmp}/found/rates.json"], "take another --loss, or leave one out"),
    ],
)
def test_mistakes_are_one_line(tmp_path, words, message):
    run = write_run(tmp_path / "run", 2.0, structure="dense", d_model=64, lr=1e-3, seed=1)
    write_run(tmp_path / "nolr", 2.0, structure="dense", d_model=64, seed=1)
    (tmp_path / "config.json").write_text('{"structure": "dense"}')
    fit_rates(tmp_path, run, "--loss=loss")
    with pytest.raises(ConfigError, match=message) as error:
        scaling_laws.main(["rates", *(word.format(run=run, tmp=tmp_path) for word in words), f"--out={tmp_path}/x"])
    assert "\n" not in str(error.value)


def test_the_tables_of_rates_in_results_equal_their_files(monkeypatch):
    """For every page with multipliers at tuned rates there is a table of the rates tried and the loss at each."""
    for name in ("scaling/rates", "scaling/moe_rates", "vision/mlp_rates"):
        path = f"{pages.__file__.rpartition('/lab/')[0]}/results/{name}"
        curves, loss = rates.read_curves(f"{path}.json")
        with open(f"{path}.md") as file:
            assert file.read() == "\n".join([*rates.table_of_rates(curves, loss), ""])
