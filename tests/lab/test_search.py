"""Tests the search over structures: samplers against random search, budgets against real models, resumed searches."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

optuna = pytest.importorskip("optuna")

from sqlalchemy.exc import SQLAlchemyError  # noqa: E402

import train  # noqa: E402
from configurator import ConfigError, load_config  # noqa: E402
from conftest import ROOT, environment, losses, run_forked  # noqa: E402
from lab import (
    search,  # noqa: E402
    search_report,  # noqa: E402
)
from model import GPT  # noqa: E402
from theta import BTT, NAMED_THETAS, check_theta, factor_sizes, taxonomy  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
SMALL = ["config/quickstart.py", "--n_layer=2", "--d_model=64"]


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def draw_points(space, number, kind="random", study=None):
    study = study or optuna.create_study()
    for seed in range(number):
        study.sampler = search.make_sampler(kind, seed)
        yield space.draw(study.ask())


# ---------------------------------------------------------------------------------------
# The space and the budget


@pytest.mark.parametrize("space", [search.Space(), search.Space(max_rank=0.25), search.Space(experts=(1, 4, 8))])
def test_points_are_valid_structures_in_a_unique_form_that_cost_no_more_than_dense(space):
    points = list(draw_points(space, 300))
    for theta, experts, _ in points:
        a, b, _, d, e, _, r = check_theta(theta)
        assert a >= b and r <= space.max_rank
        assert taxonomy(theta)[2] <= 1 + 0.002  # exponents have three decimals
        assert experts in space.experts and (experts == 1 or b == d == 0)
        assert all(exponent == round(exponent, 3) for exponent in theta)
    assert {point.experts for point in points} == set(space.experts)


def test_points_are_uniform_on_the_triangles():
    thetas = np.array([point.theta for point in draw_points(search.Space(), 2000)])
    folded = np.sort(thetas[:, :2])  # sorting α and β folds the triangle onto itself
    for three in (np.column_stack((folded, thetas[:, 2])), thetas[:, 3:6]):
        # for uniform points each exponent has mean 1/3 and is above 1/2 with probability 1/4
        assert three[:, 2].mean() == pytest.approx(1 / 3, abs=0.02)
        assert (three[:, 2] > 0.5).mean() == pytest.approx(1 / 4, abs=0.03)
        assert (three > 0.5).any(1).mean() == pytest.approx(3 / 4, abs=0.03)


def test_the_corners_of_the_space_are_valid_structures():
    study = optuna.create_study()
    for corner in np.ndindex(2, 2, 2, 2, 2):
        names = ("input", "input_split", "output", "output_split", "rank")
        study.enqueue_trial(dict(zip(names, map(float, corner))))
        check_theta(search.Space().draw(study.ask()).theta)


def test_models_use_the_whole_budget():
    config = load_config(search.SearchConfig, [*SMALL, "--experts=1,4", "--top_k=1"])
    budget = search.meta_model(config).flops_per_token()
    dense = train.TrainConfig(**search.train_options(config, {"structure": "dense"}))
    assert budget == GPT(dense).flops_per_token()
    whole = 3 * budget * config.max_steps * config.batch_tokens
    seen = set()
    for point in draw_points(search.Space(experts=config.experts), 10):
        try:
            options, figures = search.fit_model(config, point, budget)
        except search.Misfit:
            continue
        run = train.TrainConfig(**search.train_options(config, options))
        model = GPT(run)
        assert sum(parameter.numel() for parameter in model.parameters()) == figures["parameters"]
        assert model.flops_per_token() <= budget and run.d_model % config.n_head == 0
        a_step = 3 * model.flops_per_token() * run.batch_tokens
        assert figures["flops"] == a_step * run.max_steps
        assert abs(figures["flops"] - whole) <= a_step / 2  # to within a step
        assert config.max_steps <= run.max_steps <= 2 * config.max_steps
        assert -(-run.max_steps // run.eval_interval) <= search.evaluations(config) == 6
        assert (run.moe, run.top_k) == (("none", 2) if point.experts == 1 else ("linear", 1))
        seen.add(point.experts)
    assert seen == {1, 4}


def test_a_point_without_a_model_of_the_budget_is_a_misfit():
    config = load_config(search.SearchConfig, [*SMALL, "--max_width=64"])
    budget = search.meta_model(config).flops_per_token()
    with pytest.raises(search.Misfit, match="max_width=64 uses half to all"):
        search.fit_model(config, search.Point((0.5, 0.5, 0, 0.5, 0.5, 0, 0), 1), budget)  # far too cheap at width 64


def test_sizes_have_the_taxonomy_and_the_name_of_their_structure():
    named = {name: factor_sizes(4096, 4096, theta) for name, theta in NAMED_THETAS.items()}
    for name, sizes in named.items():
        assert search.taxonomy_of_sizes(sizes) == pytest.approx(taxonomy(NAMED_THETAS[name]), abs=1e-4), name
    assert [search.name_of_sizes(sizes) for sizes in named.values()] == [
        "low-rank, rank 64", "low-rank, rank 512", "Kronecker", "TT, rank 8", "BTT, rank 1", "BTT, rank 8",
        "BTT family, rank 1", "BTT family, rank 1", "", "dense",
    ]  # fmt: skip
    assert search.name_of_sizes((1, 16, 16, 16, 1, 16, 2)) == "BTT, rank 2"  # with A and B exchanged
    assert search.name_of_sizes((64, 1, 4, 64, 1, 4, 1)) == "dense"  # B is a single number in each block


# ---------------------------------------------------------------------------------------
# The search, on made-up losses without training

D = 4096


def made_up_loss(sizes):
    """A scaling law in the width D^(2 / (1 + ν)), which costs as many FLOPs as a dense D × D layer, plus ω and 1 - ψ."""
    omega, psi, nu = search.taxonomy_of_sizes(sizes)
    return 1.5 + 3 * (D ** (2 / (1 + nu))) ** -0.12 + omega + (1 - psi)


def made_up_objective(seen=None, costs=None):
    """An objective with three evaluations that falls to the made-up loss. Sizes in `seen` are a misfit."""

    def objective(trial, point, slot):
        try:
            sizes = factor_sizes(D, D, point.theta)
        except ConfigError as error:
            raise search.Misfit(str(error)) from None
        if seen is not None and sizes in seen:
            raise search.Misfit("seen")
        if seen is not None:
            seen.add(sizes)
        trial.set_user_attr("slot", slot)
        for evaluation in (1, 2):
            if costs is not None:
                costs.append(trial.number)
            yield evaluation, made_up_loss(sizes) + 1 / evaluation
        return made_up_loss(sizes)

    return objective


def halving():
    return optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)


def best_of(sampler, seed, trials=60, pruner=None):
    study = optuna.create_study(pruner=pruner or optuna.pruners.NopPruner())
    search.search(study, search.Space(), made_up_objective(set()), trials, sampler, seed)
    assert len(ended_trials(study)) == trials
    return study.best_value


def ended_trials(study):
    return study.get_trials(deepcopy=False, states=search.ENDED)


def test_samplers_beat_random_search_with_as_many_trials():
    best = {kind: np.array([best_of(kind, seed) for seed in range(12)]) for kind in ("random", "tpe", "cmaes")}
    optimum = made_up_loss(factor_sizes(D, D, BTT))
    assert all((found >= optimum - 1e-9).all() for found in best.values())
    for kind in ("tpe", "cmaes"):
        gain = best["random"] - best[kind]
        assert gain.mean() > 3 * gain.std(ddof=1) / np.sqrt(len(gain)), (kind, gain)  # at three standard errors
    assert (best["tpe"] - optimum).mean() < 0.5 * (best["random"] - optimum).mean(), best


def test_halving_ends_most_trials_early_and_finds_the_same_best():
    study, costs = optuna.create_study(pruner=halving()), []
    search.search(study, search.Space(), made_up_objective(costs=costs), 60, "random", 1)
    early = study.get_trials(states=(optuna.trial.TrialState.PRUNED,))
    assert 30 <= len(early) < 60 and all(list(trial.intermediate_values) == [1] for trial in early)
    assert len(costs) == 2 * 60 - len(early)  # trials that were ended early did not continue
    whole = optuna.create_study()
    search.search(whole, search.Space(), made_up_objective(), 60, "random", 1)
    assert (
        study.best_value == whole.best_value
    )  # it draws the same points, and their losses have the same order at every evaluation


def test_a_resumed_search_draws_the_same_points_as_an_unbroken_one():
    def points(*stages):
        study = optuna.create_study()
        for trials in stages:
            search.search(study, search.Space(), made_up_objective(), trials, "tpe", 3)
        return [trial.params for trial in study.trials]

    assert points(8, 14) == points(14) and len({str(point) for point in points(14)}) == 14


def test_all_slots_are_used_at_once():
    study, at_once = optuna.create_study(), []

    def objective(trial, point, slot):
        trial.set_user_attr("slot", slot)
        for evaluation in (1, 2, 3):
            at_once.append(len(study.get_trials(states=(optuna.trial.TrialState.RUNNING,))))
            yield evaluation, 1.0
        return 1.0

    search.search(study, search.Space(), objective, 6, "random", 0, slots=[0, 1, 1])
    assert max(at_once) == 3 and len(study.trials) == 6
    assert {trial.user_attrs["slot"] for trial in study.trials} == {0, 1}


def test_failed_trials_do_not_count_but_too_many_in_a_row_end_the_search():
    calls = []

    def fails(bad):
        def objective(trial, point, slot):
            calls.append(trial.number)
            if bad(len(calls)):
                raise search.TrialFailed("it blew up")
            yield None
            return 1.0

        return objective

    study = optuna.create_study()
    search.search(study, search.Space(), fails(lambda n: n % 3 != 0), 4, "random")
    assert len(calls) == 12 and len(ended_trials(study)) == 4
    assert {trial.user_attrs.get("reason") for trial in study.trials} == {None, "it blew up"}
    calls.clear()
    with pytest.raises(ConfigError, match="5 trials in a row failed, the last: it blew up"):
        search.search(optuna.create_study(), search.Space(), fails(lambda n: True), 4, "random")
    assert len(calls) == search.FAILURES
    with pytest.raises(ConfigError, match="50 points in a row have no new model of this budget"):
        seen = {factor_sizes(D, D, point.theta) for point in draw_points(search.Space(), 1)}
        study.sampler = optuna.samplers.RandomSampler(seed=0)

        class Same(search.Space):
            def draw(self, trial):
                return next(draw_points(search.Space(), 1))

        search.search(optuna.create_study(), Same(), made_up_objective(seen), 4, "random")


def test_interrupted_trials_are_put_back_and_come_first():
    study, closed = optuna.create_study(), []

    def objective(trial, point, slot):
        trial.set_user_attr("folder", f"trial_{trial.number}")
        try:
            yield 1, 2.0
            if trial.number == 2:
                raise KeyboardInterrupt
            yield None
        finally:
            closed.append(trial.number)
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        search.search(study, search.Space(), objective, 5, "random", slots=[0, 1, 2])
    assert closed == [2, 0, 1] and not ended_trials(study)
    assert [trial.state.name for trial in study.trials] == ["FAIL"] * 3 + ["WAITING"] * 3
    before = [trial.params for trial in study.trials[:3]]
    search.search(study, search.Space(), made_up_objective(), 5, "random")
    again = study.trials[3:]
    assert len(ended_trials(study)) == len(again) == 5
    assert [trial.params for trial in again[:3]] == before
    assert [trial.user_attrs.get("folder") for trial in again] == ["trial_0", "trial_1", "trial_2", None, None]


def test_a_search_takes_over_only_trials_whose_search_has_ended(monkeypatch):
    import socket

    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    here, now = socket.gethostname(), time.time()
    owners = {
        "another living process on this machine": ({"host": here, "pid": os.getppid(), "time": now - 9999}, False),
        "this process, which is not running it": ({"host": here, "pid": os.getpid(), "time": now}, True),
        "a dead process": ({"host": here, "pid": gone.pid, "time": now}, True),
        "another machine": ({"host": "elsewhere", "pid": gone.pid, "time": now - 60}, False),
        "another machine, silent for a long time": ({"host": "elsewhere", "pid": 1, "time": now - 9999}, True),
        "no owner yet, begun a moment ago": (None, False),
    }
    study = optuna.create_study()
    for owner, _ in owners.values():
        trial = study.ask()
        search.Space().draw(trial)
        if owner:
            trial.set_user_attr("owner", owner)
    search.recover_trials(study, running={})
    states = [trial.state.name for trial in study.trials]
    assert states[:6] == ["FAIL" if taken else "RUNNING" for _, taken in owners.values()]
    assert states[6:] == ["WAITING"] * 3


def test_a_trial_that_another_machine_took_over_is_dropped():
    study = optuna.create_study()

    def objective(trial, point, slot):
        if trial.number == 0:
            study.tell(0, state=optuna.trial.TrialState.FAIL)  # as put_back_trial on another machine does
        yield 1, 1.0
        return 1.0

    search.search(study, search.Space(), objective, 2, "random")
    assert [trial.state.name for trial in study.trials] == ["FAIL", "COMPLETE", "COMPLETE"]


# ---------------------------------------------------------------------------------------
# Pictures and tables


def test_rank_correlation_equals_scipys():
    assert search_report.rank_correlation([1, 2, 3, 4], [10, 20, 40, 80]) == pytest.approx(1)
    assert search_report.rank_correlation([1, 1, 2, 2], [4, 3, 2, 1]) == pytest.approx(
        -0.894427
    )  # by scipy.stats.spearmanr
    assert np.isnan(search_report.rank_correlation([1, 1], [1, 2]))


@pytest.mark.parametrize("pruner", [None, halving()])
def test_the_report_lists_trials_by_loss_and_draws_a_picture(tmp_path, capsys, pruner):
    config = load_config(search.SearchConfig, [*SMALL, "--experts=1,4", "--n_layer=1"])
    budget = search.meta_model(config).flops_per_token()
    study = optuna.create_study(pruner=pruner or optuna.pruners.NopPruner())
    study.set_user_attr("budget", {"flops": 1e13, "evaluations": 3})

    def objective(trial, point, slot):
        _, figures = search.fit_model(config, point, budget)
        trial.set_user_attr("model", {**figures, "command": "python train.py", "device": "some GPU", "torch": "2"})
        if trial.number == 3:
            raise search.TrialFailed("it blew up")
        for evaluation in (1, 2):
            yield evaluation, 1 + figures["omega"] + 1 / evaluation
        return 1 + figures["omega"]

    say = search.trial_reporter(study, 9)
    search.search(study, search.Space(experts=(1, 4)), objective, 9, "random", 0, say=say)
    shown = capsys.readouterr().out.strip().split("\n")
    assert len(shown) == 10 and sum("FAILED: it blew up" in line for line in shown) == 1
    assert shown[-1].startswith("9/9 trial") and "left" in shown[-2]
    search_report.write_report(search.make_rows(study), study.user_attrs["budget"], str(tmp_path))
    assert "| 1 | 1.0000 |" in capsys.readouterr().out
    text = (tmp_path / "table.md").read_text()
    listed = [float(line.split("|")[2]) for line in text.split("\n") if line.startswith("| ") and "loss" not in line]
    assert listed == sorted(listed) and "1 failed" in text and "ω +1.00" in text
    rows = json.loads((tmp_path / "search.json").read_text())
    assert all((row["loss"] is not None) == (row["state"] == "complete") for row in rows)
    assert (
        len(rows) == 10
        and rows[0]["device"] == "some GPU"
        and rows[0]["losses"]["1"] == pytest.approx(2 + rows[0]["omega"])
    )
    at, scored = search_report.comparable(search.make_rows(study), study.user_attrs["budget"])
    assert (at, len(scored)) == (1 if pruner else 3, 9)
    assert (tmp_path / "search.png").read_bytes()[:4] == b"\x89PNG"


# ---------------------------------------------------------------------------------------
# Real runs


def open_study_at_once(barrier, words, path):
    """Open a study when all processes are ready, and write its id and learning rate, or the error, to a file."""
    barrier.wait()
    with open(path, "w") as file:
        try:
            study = search.open_study(load_config(search.SearchConfig, words))
            file.write(json.dumps([study._study_id, study.user_attrs["settings"]["lr"]]))
        except ConfigError as error:
            file.write(str(error))


@pytest.mark.parametrize("storage", [None, "sqlite:///{tmp}/shared.db"])
def test_searches_that_start_together_on_a_new_database_share_it(tmp_path, storage):
    """They share a folder, or only a database while each has a folder of its own."""
    fork = multiprocessing.get_context("fork")
    barrier, processes = fork.Barrier(4), []
    for i in range(4):
        words = [*SMALL, f"--out={tmp_path}/out{i if storage else ''}", "--device=cpu"]
        words += [f"--storage={storage.format(tmp=tmp_path)}"] if storage else []
        processes.append(fork.Process(target=open_study_at_once, args=(barrier, words, tmp_path / f"{i}.txt")))
        processes[-1].start()
    for process in processes:
        process.join(60)
    assert {(tmp_path / f"{i}.txt").read_text() for i in range(4)} == {
        f"[1, {load_config(search.SearchConfig, SMALL).lr}]"
    }


@pytest.fixture(scope="module")
def small_search(tmp_path_factory):
    """A folder with a search.db of two trials."""
    folder = tmp_path_factory.mktemp("search")
    config = load_config(search.SearchConfig, [*SMALL, f"--out={folder}", "--device=cpu"])
    study, budget = search.open_study(config), search.meta_model(config).flops_per_token()

    def objective(trial, point, slot):
        _, figures = search.fit_model(config, point, budget)
        trial.set_user_attr("model", {**figures, "command": "python train.py"})
        yield 1, 2.0
        return 1.5

    search.search(study, search.Space(), objective, 2, "random")
    return folder


def print_report(folder):
    search.main(["--report", f"--out={folder}"])


@pytest.mark.parametrize("what", ["text", "empty", "truncated", "zeros in the middle", "folder", "pipe"])
def test_a_damaged_database_is_one_line(small_search, tmp_path, what):
    content, file = (small_search / "search.db").read_bytes(), tmp_path / "search.db"
    middle = len(content) // 8
    contents = {
        "text": b"This is no database.", "empty": b"", "truncated": content[: len(content) // 3],
        "zeros in the middle": content[:middle] + bytes(6 * middle) + content[7 * middle :],
    }  # fmt: skip
    if what in contents:
        file.write_bytes(contents[what])
    else:
        {"folder": os.mkdir, "pipe": os.mkfifo}[what](file)
    with pytest.raises(ConfigError) as error:
        print_report(tmp_path)
    assert "search.db" in str(error.value) and "\n" not in str(error.value)


HOSTILE = [None, True, -1, "x", [], [1], {}, {"a": 1}, float("nan"), 1e308, 10**400, [[]] * 3]


def test_any_value_in_the_database_is_read_or_refused(small_search, capsys):
    """Each field of the study and of a trial in turn gets hostile values: those that pass the check can be shown."""
    print_report(small_search)
    assert "| 1 | 1.5000 |" in capsys.readouterr().out
    study = optuna.load_study(study_name="search", storage=f"sqlite:///{small_search}/search.db")
    about, trials = study.user_attrs, study.get_trials()
    places = [(where, name, None) for where in (about, trials[0].user_attrs) for name in where]
    places += [(where, name, field) for where, name, _ in places if name != "settings" for field in where[name]]
    assert {("budget", "flops"), ("owner", "pid"), ("model", "theta")} <= {place[1:] for place in places}
    refused = 0
    for where, name, field in places:
        whole = where[name]
        for value in HOSTILE:
            where[name] = value if field is None else {**whole, field: value}
            shown = SimpleNamespace(user_attrs=about, study_name="search", get_trials=lambda **how: trials)
            try:
                search.check_study(shown)
                rows = search.make_rows(shown)
                assert list(search_report.table_of_trials(rows, about["budget"]))
                search_report.rows_by_loss(search_report.rows_in_taxonomy(rows))
            except ValueError as error:
                assert name in str(error) and "search" in str(error)
                refused += 1
        where[name] = whole
    assert refused > len(places) * len(HOSTILE) // 2


def test_a_hostile_value_in_the_database_is_one_line(small_search, tmp_path):
    shutil.copy(small_search / "search.db", tmp_path / "search.db")
    with sqlite3.connect(tmp_path / "search.db") as database:
        database.execute("UPDATE trial_user_attributes SET value_json = '7' WHERE key = 'model'")
    with pytest.raises(
        ConfigError, match=r"search.db cannot be used, ValueError: model of trial 0 is not what a search"
    ):
        print_report(tmp_path)
    with pytest.raises(
        ConfigError, match=r"search.db cannot be used, ValueError: model of trial 0 is not what a search"
    ):
        search.main([*SMALL, f"--out={tmp_path}", "--device=cpu"])


def test_a_storage_that_cannot_be_opened_is_not_tried_again(monkeypatch):
    calls = []

    def fail(url):
        calls.append(url)
        raise SQLAlchemyError("no such host")

    monkeypatch.setattr(optuna.storages, "RDBStorage", fail)
    with pytest.raises(SQLAlchemyError):
        search.open_storage("sqlite://")
    assert len(calls) == 1


def test_on_a_cpu_a_search_without_a_config_file_is_small_and_prints_its_duration(tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(search, "search", lambda study, *rest: seen.append(study.user_attrs["settings"]))
    monkeypatch.setattr(search, "prepare_default", lambda folder: None)
    monkeypatch.setattr(search, "TokenData", lambda *args: None)
    search.main([f"--out={tmp_path}", "--device=cpu", "--trials=80", "--max_steps=600"])
    said = capsys.readouterr().out
    assert seen[0]["d_model"] == 32 and seen[0]["max_steps"] == 600  # an option on the command line wins
    assert "on a CPU, without a config file: python -m lab.search config/quickstart.py --n_layer=2" in said
    assert re.search(r"\n80 trials of at most [\d.e+]+ FLOPs: about \d+ (s|min|h)", said)


def test_share_trained_is_the_share_of_steps_that_halving_leaves():
    """With 9 evaluations, all trials reach the first, a third of them two more, and a ninth the other six."""
    config = load_config(search.SearchConfig, [*SMALL, "--max_steps=900", "--eval_interval=100"])
    assert search.share_trained(config) == pytest.approx((1 + 2 / 3 + 6 / 9) / 9)
    config.prune = 0
    assert search.share_trained(config) == 1


def test_the_remedies_of_a_refusal_work(tmp_path):
    """A second study in the same folder is refused, as its trials would mix: the remedy is another folder."""
    first = load_config(search.SearchConfig, [*SMALL, f"--out={tmp_path}/a"])
    search.open_study(first)
    (tmp_path / "a" / "trial_0").mkdir()
    other = [*SMALL, "--lr=0.01"]
    with pytest.raises(ConfigError, match="make it that, or give another --out$"):
        search.open_study(load_config(search.SearchConfig, [*other, f"--out={tmp_path}/a"]))
    search.open_study(load_config(search.SearchConfig, [*other, f"--out={tmp_path}/b"]))
    shared = f"--storage=sqlite:///{tmp_path}/a/search.db"
    with pytest.raises(ConfigError, match="make it that, or give another --study and another --out$"):
        search.open_study(load_config(search.SearchConfig, [*other, f"--out={tmp_path}/c", shared]))
    search.open_study(load_config(search.SearchConfig, [*other, f"--out={tmp_path}/c", shared, "--study=other"]))


def test_trials_at_one_place_are_one_point_of_the_picture():
    """Mixtures are kept apart, and no trial is moved."""
    rows = [dict(omega=0, psi=1, experts=1), dict(omega=0.3, psi=1, experts=1)]
    rows += [dict(omega=0.01, psi=1, experts=experts) for experts in (1, 1, 4)]
    places = search_report.cluster_rows(rows, ("omega", "psi"))
    assert [[(row["omega"], row["experts"]) for row in place] for place in places] == [
        [(0, 1), (0.01, 1), (0.01, 1)], [(0.3, 1)], [(0.01, 4)],
    ]  # fmt: skip


def test_a_trial_waits_for_a_run_that_outlived_its_search_and_reports_a_failed_one(tmp_path):
    folder = tmp_path / "trial_0"
    config = load_config(search.SearchConfig, [*SMALL, "--data_dir=nowhere"])
    options = search.train_options(config, {"structure": "dense", "out_dir": str(folder)})
    folder.mkdir()
    held = open(folder / "train.log", "a")
    assert search.lock_file(held)
    run = search.run_training(options, str(folder), None, 3)
    assert (
        next(run) is None and next(run) is None and (folder / "train.log").read_text() == ""
    )  # it waits for the other run
    held.close()
    with pytest.raises(search.TrialFailed, match=r"nowhere.*trial_0/train.log\)"):
        while next(run) is None:
            time.sleep(0.05)


def test_a_killed_search_resumes_and_finishes(tiny, tmp_path):
    out = tmp_path / "search"
    words = [word for word in tiny if not word.startswith(("--out_dir", "--max_steps", "--eval_interval"))]
    words += [f"--out={out}", "--max_steps=75", "--eval_interval=15", "--trials=2", "--prune=2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "lab.search", *words], env=environment(None), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    started = time.monotonic()
    while not os.path.exists(out / "trial_0" / "ckpt_prev.pt"):  # two evaluations
        assert process.poll() is None and time.monotonic() - started < 60
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)  # with its run
    process.wait()
    before = losses(out / "trial_0", "val_loss")
    log = out / "trial_0" / "log.jsonl"
    log.write_text(
        '{"step": 8, "val_loss": 9.9}\n' + log.read_text()
    )  # a row as a stopped run leaves it: not one of the evaluations
    done = run_forked("lab.search", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("/2 trial") == 2 and "ended early" in done.stdout, done.stdout
    assert "resuming from step" in (out / "trial_0" / "train.log").read_text()
    after = losses(out / "trial_0", "val_loss")
    assert after.pop(8) == 9.9 and after.pop(0) and before.pop(0)
    assert {step: after[step] for step in before} == before
    rows = json.loads((out / "search.json").read_text())
    assert [row["state"] for row in rows] == ["complete", "pruned"]
    assert rows[0]["losses"] == {str(number): loss for number, loss in enumerate(after.values(), 1)} and len(after) == 5
    assert not list(out.glob("trial_*/ckpt*"))  # trials that have ended keep no checkpoint
    assert all(row["torch"] and row["device"] for row in rows)
    with pytest.raises(ConfigError, match="lr=0.001, but study 'search' in sqlite:///.* has lr=0.005: make it that"):
        search.main([*words, "--lr=1e-3"])


@pytest.mark.parametrize(
    "words, message",
    [
        (["--trials=0"], "trials=0"),
        (["--sampler=grid"], "sampler='grid'.*'tpe', 'cmaes', 'random'"),
        (["--prune=1"], "prune=1: make it 2 or more, or 0"),
        (["--max_rank=2"], "max_rank=2.0: make it at most 1"),
        (["--max_width=32"], "max_width=32: make it at least d_model=64"),
        (["--experts=0,4"], "whole numbers of 1 or more"),
        (["--experts=2,4", "--top_k=3"], "top_k=3"),
        (["--top_k=3"], "top_k=3 with moe='none'"),
        (["--structure=btt"], "--structure is set by each trial"),
        (["--out_dir=out/x"], "--out_dir is set by each trial.*--out"),
        (["--trails=4"], "unknown option --trails: did you mean 'trials'?"),
        (["--storage=search.db"], "storage=search.db: give a URL"),
        (["--storage=nosql://me:secret@host/db"], "storage=nosql://me:…@host/db cannot be used"),
        (["--storage=sqlite:////nowhere/at/all.db"], "cannot be used, .*: give another"),
        (["--out=README.md"], "README.md cannot be written"),
        (["--device=cuda"], "device=cuda, but torch sees no GPU"),
        (["--report", "--out={tmp}/none"], "none/search.db does not exist"),
        (["--data_dir=nowhere", "--out={tmp}/x"], "nowhere"),
    ],
)
def test_mistakes_are_one_line(tmp_path, words, message):
    words = [word.format(tmp=tmp_path) for word in words]
    out = [] if any(word.startswith("--out=") for word in words) else [f"--out={tmp_path}/out"]
    with pytest.raises(ConfigError, match=message) as caught:
        search.main([*SMALL, *words, *out])
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)


def test_folders_of_another_study_and_unknown_studies_are_refused(tmp_path):
    (tmp_path / "trial_0").mkdir()
    with pytest.raises(ConfigError, match="holds trials of another study"):
        search.main([*SMALL, f"--out={tmp_path}"])
    with pytest.raises(ConfigError, match="study='other' is not in sqlite"):
        search.main([*SMALL, f"--out={tmp_path}", "--report", "--study=other"])
