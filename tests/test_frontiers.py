"""Frontiers, power laws and multipliers, on synthetic runs whose truth is known."""

import json

import numpy as np
import pytest

import frontiers
import scaling_laws
from configurator import ConfigError
from conftest import run_script
from frontiers import Fit, Run, fit_power_law, frontier

TRUE = {"dense": Fit(0.5, 1e12, 0.30), "btt": Fit(0.5, 2.5e11, 0.30), "low_rank": Fit(0.6, 1e12, 0.22)}


def synthetic(group, noise=0.002, sizes=6, seed=0, tops=None):
    """Curves of models of several sizes whose lower envelope follows the group's law: each touches it at one compute."""
    random = np.random.default_rng(seed)
    law, runs = TRUE[group], []
    for i, best in enumerate(np.geomspace(1e14, 1e17, sizes)):
        c = best * np.geomspace(0.2, 5, 15)
        # Above the envelope on both sides of the model's own best compute, in proportion to the distance in log.
        loss = law.loss(c) * (1 + 0.03 * np.log(c / best) ** 2) * np.exp(noise * random.standard_normal())
        cost = {"flops": c, "seconds": c / 1e13, "parameters": np.full(len(c), best**0.5)}
        runs.append(Run(f"{group}{i}", group, cost, loss))
    return runs


def test_frontier_is_the_hull_by_brute_force():
    random = np.random.default_rng(0)
    for n in (1, 2, 3, 10, 60):
        cost, loss = np.exp(random.uniform(0, 5, n)), np.exp(random.uniform(0, 2, n))
        x, y = np.log(cost), np.log(loss)
        on = []
        for j in range(n):
            # j is on the hull if no pair of others, and no single cheaper one that is better, passes below it
            below = any(
                x[i] < x[j] < x[k] and y[i] + (y[k] - y[i]) * (x[j] - x[i]) / (x[k] - x[i]) <= y[j]
                for i in range(n) for k in range(n)
            )  # fmt: skip
            better = any(x[i] <= x[j] and y[i] <= y[j] and i != j for i in range(n))
            if not below and not better:
                on.append(j)
        assert frontier(cost, loss) == sorted(on, key=lambda j: x[j])


def test_law_without_noise_is_found():
    c = np.geomspace(1e14, 1e17, 12)
    for law in TRUE.values():
        found = fit_power_law(c, law.loss(c))
        assert found.exponent == pytest.approx(law.exponent, rel=1e-2)
        assert found.loss_at_infinity == pytest.approx(law.loss_at_infinity, rel=1e-2)
        np.testing.assert_allclose(found.loss(c), law.loss(c), rtol=1e-5)


def test_known_laws_are_within_their_intervals():
    """Of 90% intervals some may miss: of 30 here no more than 5. btt pays a quarter of dense for every loss."""
    hits = 0
    for seed in range(10):
        runs = [run for i, group in enumerate(TRUE) for run in synthetic(group, sizes=10, seed=10 * seed + i)]
        figures = frontiers.analyse(runs, "dense", "flops", samples=60)
        for group, law in TRUE.items():
            low, high = figures[group]["intervals"]["exponent"]
            hits += low <= law.exponent <= high
            assert high - low < 0.1 and figures[group]["outliers"] == []
        low, high = figures["btt"]["multiplier_interval"]
        assert low <= 4 <= high and high - low < 1.5 and figures["btt"]["multiplier"] == pytest.approx(4, rel=0.15)
        assert figures["dense"]["multiplier"] == pytest.approx(1, abs=1e-9)
        assert figures["low_rank"]["multiplier"] < 0.7
    assert hits >= 25


def test_the_ends_that_no_size_was_best_at_do_not_count():
    """One run on and on is no frontier; of three, the first counts up to where the second takes over."""
    runs = synthetic("dense", noise=0, sizes=3)
    c, loss = frontiers.optimal(runs, "flops")
    np.testing.assert_allclose(loss, TRUE["dense"].loss(c), rtol=0.01)
    assert c.min() > runs[0].cost["flops"].min() and c.max() < runs[-1].cost["flops"].max()
    assert frontiers.fit_group(runs[:1], "flops") is None


def test_a_run_of_another_measure_is_left_out():
    runs = synthetic("dense", sizes=8)
    wrong = runs[3]._replace(name="bits", loss=runs[3].loss * np.log(2))
    _, dropped = frontiers.without_outliers([*runs, wrong], "flops")
    assert dropped == ["bits"]
    bad = runs[3]._replace(name="diverged", loss=runs[3].loss * 3)  # above the frontier: no harm
    assert frontiers.without_outliers([*runs, bad], "flops")[1] == []


def test_multiplier_is_not_made_up_beyond_what_was_run():
    dense, btt = synthetic("dense", noise=0), synthetic("btt", noise=0)
    cheap = [run for run in dense if run.cost["flops"].max() < 1e17]
    at, ratio = frontiers.multipliers(btt, cheap, "flops")
    reached = min(run.loss.min() for run in cheap)
    assert np.isfinite(ratio).any() and np.isnan(ratio[at < reached]).all()


# -- the command


def write_runs(folder, groups=("dense", "btt"), sizes=4):
    for group in groups:
        for i, run in enumerate(synthetic(group, sizes=sizes)):
            where = folder / f"{group}{i}"
            where.mkdir()
            rows = [{"step": 0, "tokens": 0, "flops": 0, "seconds": 0.0, "val_loss": 5.0}]
            rows += [
                {"step": k + 1, "flops": c, "seconds": s, "val_loss": loss}
                for k, (c, s, loss) in enumerate(zip(run.cost["flops"], run.cost["seconds"], run.loss))
            ]
            (where / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            options = dict(structure=group, d_model=64 * (i + 1), n_head=2, vocab_size=96, n_layer=1, block_size=16)
            (where / "config.json").write_text(json.dumps({**options, "rank": 4 if group == "btt" else 1}))
    return [str(path) for path in sorted(folder.iterdir())]


def test_command_writes_table_json_and_pictures(tmp_path):
    (tmp_path / "runs").mkdir()
    runs = write_runs(tmp_path / "runs")
    done = run_script("scaling_laws.py", "fit", *runs, f"--out={tmp_path}/fit", "--samples=20")
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "fit" / "table.md").read_text()
    assert "| btt, rank=4 | 4 |" in table and table in done.stdout
    fit = json.loads((tmp_path / "fit" / "fit.json").read_text())
    assert fit["flops"]["btt, rank=4"]["multiplier"] == pytest.approx(4, rel=0.15)
    assert fit["groups"]["dense"] == [0, 1, 1] and fit["groups"]["btt, rank=4"][0] == 0
    for name in ("frontiers_flops", "frontiers_seconds", "frontiers_parameters", "multipliers", "frontiers_nu"):
        assert (tmp_path / "fit" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "words, message",
    [
        (["--out=x"], "which runs"),
        (["{run}", "--reference=tt"], "no group of these runs: take one of"),
        (["{run}", "--costs=('tokens',)"], "choose from flops, seconds, parameters"),
        (["{tmp}"], "does not exist"),
    ],
)
def test_mistakes_are_one_line(tmp_path, words, message):
    (tmp_path / "runs").mkdir()
    run = write_runs(tmp_path / "runs", groups=("dense",), sizes=1)[0]
    with pytest.raises(ConfigError, match=message):
        scaling_laws.fit([word.format(run=run, tmp=tmp_path) for word in words])


def test_a_run_without_its_options(tmp_path):
    (tmp_path / "runs").mkdir()
    run = write_runs(tmp_path / "runs", groups=("dense",), sizes=1)[0]
    (tmp_path / "runs" / "dense0" / "config.json").unlink()
    with pytest.raises(ConfigError, match="fit needs it beside log.jsonl"):
        scaling_laws.fit([run])


def test_group_names():
    by = scaling_laws.FitConfig().by
    assert scaling_laws.group_name({"structure": "dense", "rank": 1}, by) == "dense"
    assert (
        scaling_laws.group_name({"structure": "einsum", "theta": [0.5, 0, 0.5, 0, 0.5, 0.5, 0]}, by)
        == "einsum, theta=0.5 0 0.5 0 0.5 0.5 0"
    )
    assert scaling_laws.group_name({"structure": "low_rank", "rank": 24}, ("structure",)) == "low_rank"
