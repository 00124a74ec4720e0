"""Tests frontiers, power laws and multipliers on synthetic runs whose law is known, and against brute force."""

import json
import shutil
from dataclasses import asdict

import numpy as np
import pytest

import theta
from configurator import ConfigError
from conftest import run_forked
from lab import frontiers, scaling_laws
from lab.frontiers import Fit, Run, fit_power_law, frontier

TRUE = {"dense": Fit(0.5, 1e12, 0.30), "btt": Fit(0.5, 2.5e11, 0.30), "low_rank": Fit(0.6, 1e12, 0.22)}


def synthetic_runs(group, noise=0.002, sizes=6, seed=0, tops=None):
    """Curves of models of several sizes. Their lower envelope follows the group's law: each touches it at one compute."""
    random = np.random.default_rng(seed)
    law, runs = TRUE[group], []
    for i, best in enumerate(np.geomspace(1e14, 1e17, sizes)):
        c = best * np.geomspace(0.2, 5, 15)
        # On both sides of the model's best compute the loss rises above the envelope with the squared distance in log.
        loss = law.loss(c) * (1 + 0.03 * np.log(c / best) ** 2) * np.exp(noise * random.standard_normal())
        cost = {"flops": c, "seconds": c / 1e13, "parameters": np.full(len(c), best**0.5)}
        runs.append(Run(f"{group}{i}", group, cost, loss))
    return runs


def test_the_frontier_equals_the_hull_by_brute_force():
    random = np.random.default_rng(0)
    for n in (1, 2, 3, 10, 60):
        cost, loss = np.exp(random.uniform(0, 5, n)), np.exp(random.uniform(0, 2, n))
        x, y = np.log(cost), np.log(loss)
        on = []
        for j in range(n):
            # j is on the hull if no line through two others passes below it, and no cheaper point is better
            below = any(
                x[i] < x[j] < x[k] and y[i] + (y[k] - y[i]) * (x[j] - x[i]) / (x[k] - x[i]) <= y[j]
                for i in range(n) for k in range(n)
            )  # fmt: skip
            better = any(x[i] <= x[j] and y[i] <= y[j] and i != j for i in range(n))
            if not below and not better:
                on.append(j)
        assert frontier(cost, loss) == sorted(on, key=lambda j: x[j])


def test_a_law_without_noise_is_recovered():
    c = np.geomspace(1e14, 1e17, 12)
    for law in TRUE.values():
        found = fit_power_law(c, law.loss(c))
        assert found.exponent == pytest.approx(law.exponent, rel=1e-2)
        assert found.loss_at_infinity == pytest.approx(law.loss_at_infinity, rel=1e-2)
        np.testing.assert_allclose(found.loss(c), law.loss(c), rtol=1e-5)


def test_known_multipliers_are_recovered():
    """btt needs a quarter of dense's compute for every loss."""
    runs = [run for i, group in enumerate(TRUE) for run in synthetic_runs(group, sizes=10, seed=i)]
    figures = frontiers.analyse(runs, "dense", "flops", samples=64)
    assert [figures[group]["outliers"] for group in TRUE] == [[], [], []]
    low, high = figures["btt"]["multiplier_interval"]
    assert low <= 4 <= high and high - low < 1.5 and figures["btt"]["multiplier"] == pytest.approx(4, rel=0.15)
    assert figures["dense"]["multiplier"] == pytest.approx(1, abs=1e-9) and figures["low_rank"]["multiplier"] < 0.7
    low, high = figures["btt"]["multiplier_window"]
    ends = [figures[group]["frontier_loss"] for group in ("dense", "btt")]
    assert low == pytest.approx(max(map(min, ends))) and high == pytest.approx(min(map(max, ends)))


def test_the_ends_where_no_size_is_optimal_do_not_count():
    """A single run is no frontier; of three, the first counts up to the point where the second becomes better."""
    runs = synthetic_runs("dense", noise=0, sizes=3)
    c, loss = frontiers.optimal(runs, "flops")
    np.testing.assert_allclose(loss, TRUE["dense"].loss(c), rtol=0.01)
    assert c.min() > runs[0].cost["flops"].min() and c.max() < runs[-1].cost["flops"].max()
    assert frontiers.analyse(runs[:1], "dense", "flops", 4)["dense"]["law"] is None


def test_a_run_in_other_units_is_left_out():
    runs = synthetic_runs("dense", sizes=8)
    wrong = runs[3]._replace(name="bits", loss=runs[3].loss * np.log(2))
    _, dropped = frontiers.without_outliers([*runs, wrong], "flops")
    assert dropped == ["bits"]
    good = runs[3]._replace(name="good", loss=runs[3].loss * 0.95)  # a run may be this good without being an outlier
    assert frontiers.without_outliers([*runs, good], "flops")[1] == []
    bad = runs[3]._replace(name="diverged", loss=runs[3].loss * 3)  # above the frontier it does no harm
    assert frontiers.without_outliers([*runs, bad], "flops")[1] == []


def test_there_is_no_multiplier_beyond_the_losses_that_were_reached():
    dense, btt = synthetic_runs("dense", noise=0), synthetic_runs("btt", noise=0)
    cheap = [run for run in dense if run.cost["flops"].max() < 1e17]
    at, ratio = frontiers.multipliers(*(frontiers.optimal(runs, "flops") for runs in (btt, cheap)))
    reached = min(run.loss.min() for run in cheap)
    assert np.isfinite(ratio).any() and np.isnan(ratio[at < reached]).all()


# -- seeds


def make_seeds(run, shifts):
    """Copies of a run with other seeds, whose losses are multiplied by these factors."""
    return [
        run._replace(name=f"{run.name}_{i}", loss=run.loss * shift, setting=run.name) for i, shift in enumerate(shifts)
    ]


def test_runs_that_differ_only_in_their_seed_are_averaged():
    one, other = synthetic_runs("dense", sizes=2)
    three = make_seeds(one, (0.9, 1.0, 1.1))
    three[1] = three[1]._replace(
        loss=three[1].loss[:10], cost={k: c[:10] for k, c in three[1].cost.items()}
    )  # cut short
    mean, alone = frontiers.mean_over_seeds([three[0], other, *three[1:]])
    np.testing.assert_allclose(mean.loss, one.loss[:10])
    np.testing.assert_allclose(mean.cost["flops"], one.cost["flops"][:10])
    assert (
        alone is other and len(frontiers.mean_over_seeds([one, other])) == 2
    )  # runs without a setting are not averaged
    settings, spread = frontiers.spread_of_seeds([*make_seeds(one, (0.9, 1.0, 1.1)), other])
    assert settings == 1 and spread == pytest.approx(0.1)
    assert frontiers.spread_of_seeds([one, other])[0] == 0


def test_seeds_are_averaged_step_by_step():
    """A step that one seed lacks is left out; of final points alone, only those at the last step count."""
    run = synthetic_runs("dense", sizes=1)[0]._replace(step=np.arange(15) * 50)
    whole, other = make_seeds(run, (1.0, 1.2))
    gap = np.arange(15) != 3
    other = other._replace(step=run.step[gap], loss=other.loss[gap], cost={k: c[gap] for k, c in other.cost.items()})
    (mean,) = frontiers.mean_over_seeds([whole, other])
    np.testing.assert_allclose(mean.loss, 1.1 * run.loss[gap])
    np.testing.assert_allclose(mean.cost["flops"], run.cost["flops"][gap])
    last = [one._replace(step=one.step[i : i + 1], loss=one.loss[i : i + 1],
                         cost={k: c[i : i + 1] for k, c in one.cost.items()}) for one, i in ((whole, 14), (other, 5))]  # fmt: skip
    (mean,) = frontiers.mean_over_seeds(last)
    assert mean.loss == pytest.approx(run.loss[14]) and list(mean.step) == [700]


def test_a_loss_that_hardly_falls_still_has_a_law():
    cost = np.geomspace(1e12, 1e16, 5)
    for loss in (4.56 * cost**-0.001, np.full(5, 4.56)):
        law = frontiers.fit_power_law(cost, loss)
        np.testing.assert_allclose(law.loss(cost), loss, rtol=0.02)


def test_a_lucky_seed_does_not_improve_a_group():
    """Two groups follow one law, one with three seeds: the best seed would be ahead, their mean is not."""
    shifts = (0.97, 1.0, 1.03)
    lucky = [
        seed._replace(group="three") for run in synthetic_runs("dense", noise=0) for seed in make_seeds(run, shifts)
    ]
    figures = frontiers.analyse(lucky + synthetic_runs("dense", noise=0), "dense", "flops", samples=64)
    assert figures["three"]["multiplier"] == pytest.approx(1, abs=0.01) and figures["three"]["runs"] == 18
    assert min(figures["three"]["frontier_loss"]) == pytest.approx(min(figures["dense"]["frontier_loss"]))
    low, high = figures["three"]["multiplier_interval"]
    assert low < 0.97 and high > 1.03


def final_points(group, losses, seeds=(None,), scale=1.0):
    """Runs of one point each, at sizes that cost 1, 4, 16, … × scale. losses: (sizes, seeds)"""
    return [
        Run(
            f"{group}{i}_{seed}",
            group,
            {"flops": np.array([scale * 4.0**i])},
            np.array([loss]),
            f"{group}{i}",
            None,
            seed,
        )
        for i, each in enumerate(losses)
        for seed, loss in zip(seeds, each)
    ]


def test_a_linear_figure_has_students_interval():
    """For small errors, the difference of two sizes' losses is linear: its interval is mean ± t · s / √n of paired seeds."""
    means, errors = np.array([3.0, 2.0]), 1e-6 * np.array([[1.0, -2.0, 1.5], [0.5, 0.5, -0.2]])
    runs = final_points("a", means[:, None] * np.exp(errors), (1, 2, 3))
    shifts = frontiers.draw_shifts([runs], "flops", 4096)
    assert shifts.freedom == 2
    drawn = shifts.groups[0][0][:, 0] - shifts.groups[0][1][:, 0]
    low, high = frontiers.interval(0.0, drawn, shifts.freedom)
    differences = errors[0] - errors[1]
    half = 2.920 * np.std(differences, ddof=1) / np.sqrt(3)  # the 95% quantile of t with 2 degrees of freedom
    assert -low == pytest.approx(half, rel=0.02) and high == pytest.approx(half, rel=0.02)


def test_an_effect_of_a_seed_on_all_runs_cancels_in_a_multiplier():
    of_seed = np.exp([0.01, -0.02, 0.015])
    losses = (2 + 1 / np.arange(1, 5))[:, None] * of_seed
    width = {}
    for name, seeds in (("paired", (1, 2, 3)), ("not", (4, 5, 6))):
        runs = final_points("dense", losses, (1, 2, 3)) + final_points("btt", losses, seeds, scale=0.25)
        entry = frontiers.analyse(runs, "dense", "flops", 64)["btt"]
        width[name] = np.log(entry["multiplier_interval"][1] / entry["multiplier_interval"][0])
        assert entry["multiplier"] == pytest.approx(4)
    assert width["paired"] < 1e-6 < 0.3 < width["not"]


def test_the_spread_of_seeds_in_one_setting_is_used_for_all_settings():
    """Without pairs, every setting gets the error measured where there are several seeds; for a mean it is √seeds smaller."""
    several = final_points("a", [[2.0 * np.exp(0.01), 2.0, 2.0 * np.exp(-0.01)]], (1, 2, 3))
    one = final_points("a", [[9.0], [1.0]], (1,))[1:]
    shifts = frontiers.draw_shifts([[*several, *one]], "flops", 4096)
    assert shifts.freedom == 2
    assert [float(np.std(each)) for each in shifts.groups[0]] == pytest.approx([0.01 / np.sqrt(3), 0.01], rel=0.02)


def test_curves_of_few_sizes_have_an_error_between_sizes_and_final_points_have_none():
    """Without noise, the distance of a frontier from its law comes from gaps between sizes, and shrinks with more sizes."""
    found = {}
    for sizes in (3, 4, 6):
        points = frontiers.optimal(synthetic_runs("dense", noise=0, sizes=sizes), "flops")
        found[sizes] = frontiers.variance_between_sizes(points, [points], sizes)
        residuals = np.log(points[1] / fit_power_law(*points).loss(points[0]))
        assert found[sizes] == pytest.approx((residuals**2).sum() / (len(residuals) - 3))
    assert found[3] > found[4] > found[6] > 0
    points = frontiers.optimal(final_points("dense", [[3.0], [2.5], [2.3], [2.2], [2.15]]), "flops")
    assert len(points[0]) == 5 and frontiers.variance_between_sizes(points, [points], 5) == 0


def test_the_noise_of_seeds_is_not_counted_as_an_error_between_sizes():
    """These points scatter by their noise alone; with noise drawn again they scatter √2 times as much."""
    random, cost = np.random.default_rng(0), np.geomspace(1e14, 1e17, 40)

    def noisy(loss):
        return loss * np.exp(0.002 * random.standard_normal(len(cost)))

    loss = noisy(TRUE["dense"].loss(cost))
    alone = frontiers.variance_between_sizes((cost, loss), [], 4)
    less = frontiers.variance_between_sizes((cost, loss), [(cost, noisy(loss)) for _ in range(32)], 4)
    assert alone == 0 and less < 0.3 * 0.002**2
    bent = loss * np.exp(0.01 * np.sin(np.linspace(0, 20, 40)))
    bulges = frontiers.variance_between_sizes((cost, bent), [(cost, noisy(bent)) for _ in range(32)], 4)
    assert bulges == pytest.approx(0.01**2 / 2, rel=0.2)


def test_steepness_is_the_slope_that_turns_errors_of_losses_into_errors_of_costs():
    frontier = np.array([1.0, 10.0, 1000.0]), np.array([4.0, 2.0, 1.0])
    np.testing.assert_allclose(
        frontiers.steepness(frontier, [3.0, 1.5, 1.0, 4.0]), np.log([10, 100, 100, 10]) / np.log(2)
    )


def test_the_order_of_runs_changes_no_bit():
    for seeds in ((1.0,), (0.995, 1.0, 1.004)):
        runs = [
            seed._replace(group=group)
            for group in ("dense", "btt")
            for run in synthetic_runs(group, sizes=4)
            for seed in make_seeds(run, seeds)
        ]
        wanted = json.dumps(frontiers.analyse(runs, "dense", "flops", 32))
        for order in (runs[::-1], runs[5:] + runs[:5]):
            assert json.dumps(frontiers.analyse(order, "dense", "flops", 32)) == wanted


def test_groups_without_a_frontier_are_named_and_have_no_figures():
    dense = final_points("dense", [[3.0], [2.5], [2.2], [2.0]])
    groups = {
        "one": final_points("one", [[2.3]]),
        "rising": final_points("rising", [[2.3], [2.4], [2.5]]),
        "apart": final_points("apart", [[9.0], [8.0], [7.5], [7.2]]),
        "partly": final_points("partly", [[2.8], [2.4], [2.5], [2.1]]),
    }
    figures = frontiers.analyse([*dense, *sum(groups.values(), [])], "dense", "flops", 32)
    rows = (
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in frontiers.table_of_frontiers(figures, "flops", "dense")
    )
    lines = {cells[0]: cells for cells in rows if cells}
    assert lines["one"][3:] == ["one size", "", "2.3000", "one size", ""]
    assert lines["rising"][3:] == ["losses rise", "", "2.3000", "losses rise", ""]
    assert lines["apart"][6] == "no loss in common" and lines["apart"][3].startswith("0.")
    assert lines["partly"][7].startswith("2.100 to 2.8") and "[" in lines["partly"][6]
    assert all(figures[name]["multiplier"] is None for name in ("one", "rising", "apart"))
    assert all(figures[name]["law"] is None for name in ("one", "rising"))
    *_, note = frontiers.table_of_frontiers(figures, "flops", "dense")
    assert note.endswith("rising (2 of 3), partly (1 of 4).") or note.endswith("partly (1 of 4), rising (2 of 3).")


def test_few_runs_have_a_multiplier_without_an_interval():
    """Three sizes with one seed each determine a law exactly and leave nothing to estimate their scatter from."""
    runs = final_points("dense", [[3.0], [2.5], [2.2]]) + final_points("btt", [[2.9], [2.45], [2.15]])
    entry = frontiers.analyse(runs, "dense", "flops", 32)["btt"]
    assert entry["multiplier"] > 1 and entry["multiplier_interval"] is None and entry["intervals"] is None
    *_, line = frontiers.table_of_frontiers({"btt": entry}, "flops", "dense")
    assert line.count("too few runs for an interval") == 3


def test_multipliers_are_taken_at_the_points_of_both_frontiers():
    """The group's two losses lie above and below the reference's two, so the reference reaches neither."""

    def run(group, cost, loss):
        return Run(f"{group}{cost}", group, {"flops": np.array([cost])}, np.array([loss]))

    group = [run("a", 1.0, 4.0), run("a", 100.0, 1.0)]
    reference = [run("b", 20.0, 2.5), run("b", 80.0, 2.0)]
    at, ratio = frontiers.multipliers(*(frontiers.optimal(runs, "flops") for runs in (group, reference)))
    both = np.isfinite(ratio)
    assert list(at[both]) == [2.0, 2.5]
    np.testing.assert_allclose(ratio[both], [80 / 10, 20 / 100 ** (np.log(4 / 2.5) / np.log(4))])


def test_the_ends_of_intervals_have_significant_digits():
    shown = frontiers.with_interval(0.5, (0.0004, 25_000.0), "{:.2f}")
    assert shown == "0.50 [4e-04, 2e+04]"
    assert frontiers.with_interval(1.5, (0.0, 2.0), "{:.2f}") == "1.50 [0.00, 2.00]"


# -- the command


def write_runs(folder, groups=("dense", "btt"), sizes=4):
    for group in groups:
        for i, run in enumerate(synthetic_runs(group, sizes=sizes)):
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
    done = run_forked("lab.scaling_laws", "fit", *runs, f"--out={tmp_path}/fit", "--samples=20")
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "fit" / "table.md").read_text()
    assert "| btt, rank=4 | 4 |" in table and table in done.stdout
    fit = json.loads((tmp_path / "fit" / "fit.json").read_text())
    assert fit["flops"]["btt, rank=4"]["multiplier"] == pytest.approx(4, rel=0.15)
    assert fit["groups"]["dense"] == [0, 1, 1] and fit["groups"]["btt, rank=4"][0] == 0
    for name in ("frontiers_flops", "frontiers_seconds", "frontiers_parameters", "multipliers", "frontiers_nu"):
        assert (tmp_path / "fit" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_users_own_structure_is_a_group_without_a_place_in_the_taxonomy(tmp_path, monkeypatch):
    monkeypatch.setitem(theta.STRUCTURES, "mine", theta.STRUCTURES["btt"]._replace(theta=None))
    runs = write_runs(tmp_path, sizes=2)
    for i in range(2):
        edit_json(tmp_path / f"btt{i}" / "config.json", structure="mine", knob={"a": None})
    scaling_laws.main(["fit", *runs, f"--out={tmp_path}/fit", "--samples=5", "--costs=flops"])
    groups = json.loads((tmp_path / "fit" / "fit.json").read_text())["groups"]
    assert groups == {"mine, rank=4": None, "dense": [0, 1, 1]}
    assert not (
        tmp_path / "fit" / "frontiers_nu.png"
    ).exists()  # a single group with a place has nothing to compare with


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(structure="mine"), "structure='mine' is unknown"),
        (dict(model="resnet", vocab_size=...), "KeyError: 'resnet'"),
        (dict(structure=...), "KeyError: 'structure'"),
        (dict(d_model="64"), "TypeError"),
        (dict(structure="einsum", theta="all"), "ValueError"),
        ([1], "config.json cannot be read"),
        (dict(warmup_steps=None, structured_layers=None, future_option={"x": 1}), "TypeError"),
    ],
)
def test_invalid_options_of_a_run_are_one_line(tmp_path, changes, message):
    runs, path = write_runs(tmp_path, sizes=1), tmp_path / "btt0" / "config.json"
    options = changes if isinstance(changes, list) else {**json.loads(path.read_text()), **changes}
    if isinstance(options, dict):
        options = {key: value for key, value in options.items() if value is not ...}
    path.write_text(json.dumps(options))
    words = ["fit", *runs, f"--out={tmp_path}/fit", "--samples=5", "--costs=flops"]
    with pytest.raises(ConfigError, match=f"btt0/.*{message}") as error:
        scaling_laws.main(words)
    assert "\n" not in str(error.value)


def test_values_that_are_no_numbers_and_missing_costs_are_one_line(tmp_path):
    runs, path = write_runs(tmp_path, sizes=2), tmp_path / "btt0" / "log.jsonl"
    whole, words = path.read_text(), ["fit", *runs, "--samples=5", "--costs=flops", f"--out={tmp_path}/fit"]
    for key, value in (("val_loss", None), ("loss", "low"), ("flops", {"forward": 1}), ("moe", [1])):
        path.write_text(whole + json.dumps({"step": 16, key: value}) + "\n")
        with pytest.raises(ConfigError, match=f"btt0/log.jsonl: line 17 has {key}=.*: remove the line") as error:
            scaling_laws.main(words)
        assert "\n" not in str(error.value)
    path.write_text(json.dumps({"step": 16, "val_loss": 2.5}) + "\n")
    with pytest.raises(ConfigError, match="btt0/log.jsonl has validations without flops: leave the run out$"):
        scaling_laws.main(words)


def test_there_are_pictures_for_exponents_that_differ_and_titles_mention_laws_that_exist(tmp_path, monkeypatch):
    titles = {}
    monkeypatch.setattr(
        scaling_laws, "save_figure",
        lambda figure, path, remedy: titles.update({path: [axes.get_title() for axes in figure.axes][0]}),
    )  # fmt: skip
    runs = write_runs(tmp_path, groups=("dense", "btt", "low_rank"), sizes=2)
    for i in range(2):
        edit_json(tmp_path / f"low_rank{i}" / "config.json", rank=4)
    scaling_laws.main(["fit", *runs, f"--out={tmp_path}/fit", "--samples=5", "--costs=flops"])
    named = {path.rpartition("frontiers_")[2]: title for path, title in titles.items() if "frontiers_" in path}
    assert named == {
        "flops.png": "the least loss for what it costs",  # two sizes give two points, and no law
        "psi.png": "the least loss for what it costs, by ψ",  # 1 for dense and BTT, less for low rank; ω is 0 for all
        "nu.png": "the least loss for what it costs, by ν",
    }
    some = {"a": {"law": None}, "b": {"law": {}}}
    assert scaling_laws.title_of_laws(some).endswith("where it has three points")
    assert scaling_laws.title_of_laws({"b": {"law": {}}}) == ", and its power law"


def test_a_run_that_was_set_aside_is_not_taken_for_a_second_seed(tmp_path, capsys):
    """A new run moves an old one, with the same options and fewer steps, to NAME.1. The fit uses the whole runs only."""
    runs, fits = write_runs(tmp_path), []
    shutil.copytree(runs[0], f"{runs[0]}.1")
    lines = (tmp_path / "btt0" / "log.jsonl").read_text().splitlines(keepends=True)
    with open(f"{runs[0]}.1/log.jsonl", "w") as file:
        file.writelines(lines[:4])
    for words in (runs, [*runs, f"{runs[0]}.1"]):
        scaling_laws.main(["fit", *words, f"--out={tmp_path}/fit", "--samples=5", "--costs=flops"])
        fits.append(json.loads((tmp_path / "fit" / "fit.json").read_text())["flops"])
    assert fits[0] == fits[1]
    assert "btt0.1/log.jsonl: left out, since" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        (["--out=x"], "which runs"),
        (["{run}", "--reference=tt"], "no group of these runs: take one of"),
        (["{run}", "--costs=('tokens',)"], "choose from flops, seconds, parameters"),
        (["{run}", "--costs=()"], "costs is empty"),
        (["{run}", "--by=strukture"], "by: 'strukture' is no option"),
        (["{tmp}"], "does not exist"),
    ],
)
def test_mistakes_are_one_line(tmp_path, words, message):
    (tmp_path / "runs").mkdir()
    run = write_runs(tmp_path / "runs", groups=("dense",), sizes=1)[0]
    with pytest.raises(ConfigError, match=message):
        scaling_laws.fit_logs([word.format(run=run, tmp=tmp_path) for word in words])


def test_a_run_without_its_options_is_one_line(tmp_path):
    (tmp_path / "runs").mkdir()
    run = write_runs(tmp_path / "runs", groups=("dense",), sizes=1)[0]
    (tmp_path / "runs" / "dense0" / "config.json").unlink()
    with pytest.raises(ConfigError, match="fit needs it beside log.jsonl"):
        scaling_laws.fit_logs([run])


def test_groups_are_named_by_their_options():
    by = scaling_laws.FitConfig().by
    assert scaling_laws.group_name({"structure": "dense", "rank": 1}, by) == "dense"
    theta = [0.5, 0, 0.5, 0, 0.5, 0.5, 0]
    assert (
        scaling_laws.group_name({"structure": "einsum", "theta": theta}, by) == "full-rank BTT (0.5 0 0.5 0 0.5 0.5 0)"
    )
    assert scaling_laws.group_name({"structure": "einsum", "theta": theta}, ("structure",)) == "einsum"
    assert scaling_laws.group_name({"structure": "low_rank", "rank": 24}, ("structure",)) == "low_rank"
    assert scaling_laws.group_name({"structure": "btt", "align_heads": True}, by) == "btt, align_heads"
    mixture = {"structure": "btt", "moe": "linear", "rank": 2}
    assert scaling_laws.group_name(mixture, by) == "btt, linear MoE, 2 of 8, rank=2"
    assert scaling_laws.group_name({**mixture, "num_experts": 16}, ("structure", "moe")) == "btt, linear MoE, 2 of 16"
    assert scaling_laws.group_name({"structure": "dense", "model": "vit"}, ("model",)) == "model=vit"


@pytest.mark.parametrize(
    "theta, name",
    [
        ((1, 0, 0, 0, 1, 0, 0.5), "low-rank"),
        ((0, 1, 0, 1, 0, 0, 0.5), "low-rank"),  # with A and B exchanged
        ((0.5, 0, 0.5, 0, 0.5, 0.5, 0.25), "full-rank BTT"),
        ((0.67, 0, 0.33, 0, 0.33, 0.67, 0), "full-rank BTT"),
        ((0, 0.67, 0.33, 0.33, 0, 0.67, 0), "full-rank BTT"),
        ((0.67, 0, 0.33, 0, 0.67, 0.33, 0), "low-rank BTT"),
        ((0.5, 0.5, 0, 0.5, 0.5, 0, 0), "Kronecker"),
        ((0.33, 0.67, 0, 0.33, 0.67, 0, 0.25), "TT"),
        ((0.5, 0.25, 0.25, 0.25, 0.5, 0.25, 0), "generic"),
    ],
)
def test_a_theta_has_the_name_of_its_family(theta, name):
    assert scaling_laws.family(theta) == name


def test_monarchs_place_in_the_taxonomy_depends_on_its_blocks():
    place = scaling_laws.place_in_taxonomy({"structure": "monarch", "num_blocks": 4, "d_model": 256})
    assert place == pytest.approx((0, 1, 0.75))  # 2 d² / 4 multiplications per token equal 2 d^1.75 at d = 256
    place = scaling_laws.place_in_taxonomy({"structure": "monarch", "num_blocks": None, "d_model": 256})
    assert place == pytest.approx((0, 1, 0.5))


# -- runs of vision/


def image_rows(best, unit="images"):
    rows = [{"step": 0, unit: 0, "flops": 0, "seconds": 0.0, "val_loss": 5.0, "top1": 0.1}]
    for step in range(10, 101, 10):
        # the first ten steps take 7 s longer, as with compilation
        row = {"step": step, unit: 32 * step, "flops": 1000 * step, "seconds": 7 + 0.1 * step, "loss": best + 1 / step}
        row[f"{unit}_per_second"] = 32 / (0.8 if step == 10 else 0.1)
        rows.append({**row, "val_loss": 2 * best, "top1": 1 - best / 4} if step % 50 == 0 else row)
    return rows


def make_log(tmp_path, rows, parameters=7, **options):
    path = str(tmp_path / "run" / "log.jsonl")
    return scaling_laws.Log(path, rows, {"structure": "dense", **options}, "dense", parameters)


def test_losses_errors_and_costs_of_image_runs_are_read_from_their_logs(tmp_path):
    log = make_log(tmp_path, image_rows(0.5))
    at = {measure: scaling_laws.make_run(log, measure) for measure in ("val_loss", "loss", "error")}
    np.testing.assert_allclose(at["val_loss"].loss, [1.0, 1.0])
    np.testing.assert_allclose(at["error"].loss, [0.125, 0.125])
    # the last tenth of 50 steps has one logged loss, the last tenth of 100 steps two
    np.testing.assert_allclose(at["loss"].loss, [0.5 + 1 / 50, 0.5 + (1 / 90 + 1 / 100) / 2])
    for run in at.values():
        np.testing.assert_allclose(run.cost["flops"], [50_000, 100_000])
        np.testing.assert_allclose(run.cost["seconds"], [5, 10])  # without the 7 s of compilation
        np.testing.assert_allclose(run.cost["parameters"], [7, 7])
    assert len(scaling_laws.make_run(log, "loss", "final").loss) == 1


def test_validations_during_the_warm_up_do_not_count(tmp_path):
    run = scaling_laws.make_run(make_log(tmp_path, image_rows(0.5), warmup_steps=50), "val_loss")
    np.testing.assert_allclose(run.cost["flops"], [100_000])
    with pytest.raises(ConfigError, match="no validation after its 100 steps of warm-up"):
        scaling_laws.make_run(make_log(tmp_path, image_rows(0.5), warmup_steps=100), "val_loss")


def test_a_setting_is_all_options_but_the_seed_and_the_folder(tmp_path):
    rows = image_rows(0.5)
    runs = [
        scaling_laws.make_run(make_log(tmp_path, rows, **options), "loss")
        for options in (
            {"seed": 1, "out_dir": "a", "d_model": 8},
            {"seed": 2, "out_dir": "b", "d_model": 8},
            {"d_model": 9},
        )
    ]
    assert runs[0].setting == runs[1].setting != runs[2].setting


@pytest.mark.parametrize("unit, label", [("images", "training loss (nats per image)"), ("samples", "squared error")])
def test_a_fit_of_another_loss_names_it(tmp_path, capsys, monkeypatch, unit, label):
    monkeypatch.setattr(scaling_laws, "num_parameters", lambda options: 100 * options["d_model"])
    titles, save = [], scaling_laws.save_figure

    def look_and_save(figure, *where, **how):
        titles.extend(axes.get_ylabel() for axes in figure.axes)
        save(figure, *where, **how)

    monkeypatch.setattr(scaling_laws, "save_figure", look_and_save)
    for group, best in (("dense", 0.5), ("btt", 0.4)):
        for width in (2, 4):
            folder = tmp_path / "runs" / f"{group}{width}"
            folder.mkdir(parents=True)
            rows = image_rows(2 * best / width, unit)
            if unit == "samples":
                rows = [{key: value for key, value in row.items() if key != "top1"} for row in rows]
            (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            (folder / "config.json").write_text(json.dumps({"structure": group, "d_model": width}))
    (tmp_path / "runs" / "fit").mkdir()
    (tmp_path / "runs" / "fit" / "fit.json").write_text("{}")  # an earlier fit is not a run
    runs = [str(folder) for folder in sorted((tmp_path / "runs").iterdir())]
    scaling_laws.fit_logs([*runs, f"--out={tmp_path}/fit", "--loss=loss", "--points=final", "--samples=5"])
    said = capsys.readouterr().out
    assert f"{label}" in said and "every validation" not in said
    assert "| btt | 0.00 | 1.00 | 0.50 | 2, 4 | 200 to 400 |" in said
    fit = json.loads((tmp_path / "fit" / "fit.json").read_text())
    (btt2,) = (run for run in fit["runs"] if run["name"] == "btt2")
    assert btt2["loss"] == pytest.approx(0.4 + (1 / 90 + 1 / 100) / 2) and ("error" in btt2) == (unit == "images")
    assert btt2["flops"] == 100_000
    reached = "error, 1 - top-1" if unit == "images" else "validation loss (squared error)"
    assert reached in titles and any(label in title for title in titles)


def test_a_fit_refuses_runs_of_different_kinds(tmp_path):
    (tmp_path / "runs").mkdir()
    text = write_runs(tmp_path / "runs", groups=("dense",), sizes=1)[0]
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in image_rows(0.5)))
    (folder / "config.json").write_text(
        json.dumps(
            {"structure": "dense", "model": "mlp", "image_size": 8, "channels": 1, "n_classes": 10, "d_model": 16}
        )
    )
    with pytest.raises(
        ConfigError, match="images/log.jsonl counts images and .*dense0/log.jsonl tokens: their losses do not compare"
    ):
        scaling_laws.fit_logs([text, str(folder)])
    with pytest.raises(ConfigError, match="log.jsonl has no top1: leave it out, or take --loss=val_loss"):
        scaling_laws.fit_logs([text, "--loss=error"])


def test_an_error_of_zero_is_refused_as_it_has_no_logarithm(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling_laws, "num_parameters", lambda options: 1)
    rows = [{**row, "top1": 1.0} for row in image_rows(0.5)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "config.json").write_text('{"structure": "dense", "d_model": 8}')
    with pytest.raises(ConfigError, match="error, 1 - top-1 of 0 has no logarithm: take another --loss"):
        scaling_laws.fit_logs([str(tmp_path), "--loss=error"])


@pytest.mark.parametrize(
    "options",
    [
        dict(model="mlp", image_size=8, channels=1, n_classes=10, d_model=16, n_layer=2),
        dict(
            model="vit",
            image_size=8,
            channels=1,
            patch_size=4,
            n_classes=10,
            d_model=16,
            n_head=2,
            structure="low_rank",
        ),
        dict(d_in=5, teacher_width=4, d_model=36, structure="btt", structured_layers=("ffn", "head")),
        dict(
            vocab_size=96,
            d_model=36,
            n_head=2,
            block_size=8,
            n_layer=1,
            structure="einsum",
            theta=(0.5, 0.5, 0, 0.5, 0.5, 0, 0),
        ),
    ],
    ids=["mlp", "vit", "regression", "gpt"],
)
def test_num_parameters_equals_that_of_the_trained_model(options):
    import train
    import vision.regression
    import vision.train
    from model import GPT
    from vision.mlp import MLP

    if "vocab_size" in options:
        Model, config = GPT, train.TrainConfig(**options)
    elif "d_in" in options:
        Model, config = MLP, vision.regression.RegressionConfig(**options)
    else:
        config = vision.train.ImageTrainConfig(**options)
        Model = vision.train.MODELS[config.model]
    written = json.loads(json.dumps(asdict(config)))  # as in a run's config.json
    assert scaling_laws.num_parameters(written) == sum(p.numel() for p in Model(config).parameters())


def test_the_picture_of_losses_reached_has_one_line_per_group_through_the_last_points():
    runs = [
        Run(
            f"{group}{i}",
            group,
            {"flops": np.array([1.0, 10 * i]), "seconds": np.array([1.0, i])},
            np.array([9.0, loss]),
            f"{group}{i}",
        )
        for group, losses in (("a", (3, 2)), ("b", (5, 4)))
        for i, loss in zip((2, 1), losses)
    ]
    runs += make_seeds(runs[0]._replace(name="a2", loss=np.array([9.0, 5.0])), (1.0,))  # a second seed of a2
    runs[0] = runs[0]._replace(setting="a2")
    figure = frontiers.draw_reached({"error": runs, "loss": runs}, ["flops", "seconds"], {"a": "red", "b": "blue"})
    assert [axes.get_ylabel() for axes in figure.axes] == ["error", "", "loss", ""]
    assert [axes.get_xlabel() for axes in figure.axes] == ["", "", "training FLOPs", "seconds of training"]
    for axes, scale in zip(figure.axes, (10, 1, 10, 1)):
        lines = {line.get_label(): [list(values) for values in line.get_data()] for line in axes.lines}
        assert lines == {"a": [[scale, 2 * scale], [2, 4]], "b": [[scale, 2 * scale], [4, 5]]}
