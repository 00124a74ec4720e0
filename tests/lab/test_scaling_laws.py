"""Tests the picture of several runs against their logs: what is drawn, the runs' names, mistakes."""

import json
import os

import matplotlib
import pytest

from configurator import ConfigError
from conftest import run_script
from lab import scaling_laws

matplotlib.use("Agg")


def make_rows(slope=1.0, steps=100, loss=True, validation=True):
    rows = [{"step": 0, "tokens": 0, "flops": 0, "seconds": 0.0, **({"val_loss": 5.0} if validation else {})}]
    for step in range(1, steps + 1):
        row = {"step": step, "tokens": 64 * step, "flops": int(1e6 * slope * step), "seconds": 0.25 * slope * step}
        if loss:
            row["loss"] = 2.0 + slope / step + (step % 3) / 50
        if validation and step % 20 == 0:
            row["val_loss"] = 2.1 + slope / step
        rows.append(row)
    return rows


def write_run(folder, rows):
    folder.mkdir(parents=True)
    path = folder / "log.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A new, empty folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines_of(panel, gid):
    """{label: points (x, y)} of the lines of one kind in a panel."""
    return {line.get_label(): list(zip(*map(list, line.get_data()))) for line in panel.lines if line.get_gid() == gid}


# -- the figure


@pytest.fixture
def runs():
    return {"one": make_rows(1.0), "two": make_rows(3.0, steps=250), "three": make_rows(2.0, steps=40)}


def test_four_panels_show_the_values_of_the_logs(runs):
    figure = scaling_laws.draw_runs(runs)
    panels = figure.axes
    assert [panel.get_xlabel() for panel in panels] == ["steps", "tokens", "FLOPs", "seconds of training"]
    assert [panel.get_xscale() for panel in panels] == ["linear", "log", "log", "linear"]
    for panel, cost in zip(panels, ("step", "tokens", "flops", "seconds")):
        for key in ("loss", "val_loss"):
            drawn = lines_of(panel, key)
            assert drawn == {n: [(row[cost], row[key]) for row in rows if key in row] for n, rows in runs.items()}
            assert all(drawn.values())


def test_runs_of_vision_are_drawn_over_images_and_samples():
    def rename_tokens(rows, unit):
        return [{unit if key == "tokens" else key: value for key, value in row.items()} for row in rows]

    runs = {"mlp": rename_tokens(make_rows(1.0), "images"), "vit": rename_tokens(make_rows(2.0), "images")}
    figure = scaling_laws.draw_runs(runs)
    panel = figure.axes[1]
    assert panel.get_xlabel() == "images" and figure.axes[0].get_ylabel() == "loss (nats per image)"
    for key in ("loss", "val_loss"):
        assert lines_of(panel, key) == {
            n: [(r["images"], r[key]) for r in rows if key in r] for n, rows in runs.items()
        }
    assert panel.get_xlim()[1] > 6400  # step 100
    head, first, *_ = scaling_laws.table_of_runs(runs)
    assert head.split()[:4] == ["run", "steps", "images", "FLOPs"] and first.split()[2] == "6,400"
    mixed = {**runs, "gpt": make_rows(), "regression": rename_tokens(make_rows(), "samples")}
    figure = scaling_laws.draw_runs(mixed)
    assert figure.axes[1].get_xlabel() == "images, tokens, samples"
    assert figure.axes[0].get_ylabel() == "loss (nats per image, nats per token, squared error)"
    assert set(lines_of(figure.axes[1], "loss")) == set(mixed)


def test_panels_share_the_y_axis_and_each_run_has_one_colour(runs):
    figure = scaling_laws.draw_runs(runs)
    first, *others = figure.axes
    assert all(first.get_shared_y_axes().joined(first, other) for other in others)
    colours = {}
    for panel in figure.axes:
        for line in panel.lines:
            colours.setdefault(line.get_label(), set()).add(matplotlib.colors.to_hex(line.get_color()))
    assert set(colours) == set(runs) and all(len(used) == 1 for used in colours.values())
    assert len(set.union(*colours.values())) == len(runs)
    (legend,) = figure.legends
    shown = {text.get_text(): matplotlib.colors.to_hex(line.get_color())
             for text, line in zip(legend.get_texts(), legend.get_lines())}  # fmt: skip
    assert shown == {name: used.pop() for name, used in colours.items()}


def test_the_axes_leave_out_only_the_first_fall_of_the_loss(runs):
    figure = scaling_laws.draw_runs({"two": runs["two"]})
    low, high = figure.axes[0].get_ylim()
    late = [row[key] for row in runs["two"] if row["step"] >= 2.5 for key in ("loss", "val_loss") if key in row]
    assert low < min(late) and max(late) < high < runs["two"][1]["loss"]
    left, right = figure.axes[1].get_xlim()
    assert 64 * 2 < left < 64 * 3 and right > 64 * 250


@pytest.mark.parametrize("key, gids", [("loss", {"loss", "smooth"}), ("val_loss", {"val_loss"})])
def test_a_single_loss_can_be_drawn(runs, key, gids):
    figure = scaling_laws.draw_runs(runs, key)
    for panel in figure.axes:
        assert {line.get_gid() for line in panel.lines} == gids
        assert len(panel.lines) == len(runs) * len(gids)
    left, _ = figure.axes[1].get_xlim()  # the first point of all runs is at the left edge
    first = min(64 * row["step"] for rows in runs.values() for row in rows[1:] if key in row)
    assert first / 1.2 < left < first


@pytest.mark.filterwarnings("error")
def test_a_run_that_has_just_begun_is_drawn(folder):
    rows = make_rows(steps=0)
    figure = scaling_laws.draw_runs({"one": rows})
    assert lines_of(figure.axes[0], "val_loss") == {"one": [(0, 5.0)]}
    figure.savefig(folder / "x.png")


def test_the_running_mean_has_no_lag():
    line = [3.0 - 0.01 * i for i in range(300)]
    assert scaling_laws.running_mean(line) == pytest.approx(line)
    noisy = [y + (0.3 if i % 2 else -0.3) for i, y in enumerate(line)]
    smooth = scaling_laws.running_mean(noisy)
    assert max(abs(a - b) for a, b in zip(smooth[50:-20], line[50:-20])) < 0.1
    assert (smooth[0], smooth[-1]) == (noisy[0], noisy[-1])
    assert scaling_laws.running_mean([]) == []


def test_the_legend_of_twelve_runs_fits_into_the_picture():
    runs = {f"a_rather_long_name_of_run_{i}": make_rows(1 + i / 5, steps=20) for i in range(12)}
    figure = scaling_laws.draw_runs(runs)
    figure.canvas.draw()
    (legend,) = figure.legends
    box, size = legend.get_window_extent(), figure.bbox
    assert box.x0 >= 0 and box.x1 <= size.width and box.y0 >= 0
    assert all(box.y1 <= panel.get_window_extent().y0 for panel in figure.axes)
    assert all(panel.get_window_extent().height > 0.3 * size.height for panel in figure.axes)
    assert len({line.get_color() for line in legend.get_lines()}) == 12


# -- the runs' names


@pytest.mark.parametrize(
    "paths, labels",
    [
        (["/x/out/gpt2_btt/log.jsonl"], ["gpt2_btt"]),
        (["/out/gpt2_btt/log.jsonl", "/out/gpt2_dense/log.jsonl"], ["btt", "dense"]),
        (["/out/btt/run/log.jsonl", "/out/dense/run/log.jsonl"], ["btt", "dense"]),
        (["/a/lr_1e-3_seed_1/log.jsonl", "/a/lr_2e-3_seed_1/log.jsonl"], ["1e-3", "2e-3"]),
        (["/out/run/log.jsonl", "/out/run_2/log.jsonl"], ["run", "run_2"]),
        (["/out/run/log.jsonl", "/out/run.1/log.jsonl"], ["run", "run.1"]),
        (["/out/run_/log.jsonl", "/out/run_2/log.jsonl"], ["run_", "run_2"]),
        (["/out/a/x/log.jsonl", "/out/b/y/log.jsonl"], ["x", "y"]),
        (["/out/a/x/log.jsonl", "/out/a/y/log.jsonl", "/out/b/y/log.jsonl"], ["a/x", "a/y", "b/y"]),
        (["/out/a.jsonl", "/out/b/log.jsonl"], ["a.jsonl", "b"]),
        (["/out/a_b/log.jsonl", "/out/a_b_b/log.jsonl"], ["b", "b_b"]),
    ],
)
def test_names_are_the_shortest_part_that_differs(paths, labels):
    assert scaling_laws.run_labels(paths) == labels


# -- the command


def test_the_command_draws_a_picture_and_prints_a_table(folder, capsys):
    write_run(folder / "out" / "one", make_rows(1.0))
    path = write_run(folder / "out" / "two", make_rows(2.0, steps=60))
    scaling_laws.main(["plot", "out/one", path, "out/two/"])  # a folder, a log, and the same run again
    head, one, two, drawn = capsys.readouterr().out.splitlines()
    assert drawn == "drawn: runs.png"
    assert (folder / "runs.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert sorted(os.listdir(folder)) == ["out", "runs.png"]
    assert head.split("  ")[0] == "run" and head.endswith("final loss  final val loss  best val loss")
    assert one.split() == ["one", "100", "6,400", "1e+08", "25.0", "2.0300", "2.1100", "2.1100"]
    assert two.split() == ["two", "60", "3,840", "1.2e+08", "30.0", "2.0333", "2.1333", "2.1333"]


def test_the_table_shows_the_best_and_the_last_loss(folder, capsys):
    rows = [{"step": step, "val_loss": loss} for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0))]
    write_run(folder / "a", rows)
    scaling_laws.main(["plot", "a", "--png=x.png"])
    assert capsys.readouterr().out.splitlines()[1].split() == ["a", "3", "2.0000", "1.0000"]


def test_labels_and_png_set_the_names(folder, capsys):
    for name in "ab":
        write_run(folder / name, make_rows())
    scaling_laws.main(["plot", "a", "b", "--labels=rank 1, rank 4", "--png=other.png", "--key=val_loss"])
    _, first, second, drawn = capsys.readouterr().out.splitlines()
    assert first.startswith("rank 1") and second.startswith("rank 4") and drawn == "drawn: other.png"
    assert (folder / "other.png").exists() and not (folder / "runs.png").exists()


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "lab.scaling_laws: say what to do, plot"),
        (["polt"], "lab.scaling_laws polt: say what to do, plot"),
        (["plot"], "plot: which runs?"),
        (["plot", "nowhere"], "nowhere does not exist: give the folder of a run, or its log.jsonl"),
        (["plot", "empty"], "empty/log.jsonl does not exist"),
        (["plot", "junk.jsonl"], "junk.jsonl has no rows: leave it out"),
        (["plot", "good", "trained", "--key=val_loss"], "trained/log.jsonl has no val_loss: leave it out, or take --key=loss"),
        (["plot", "good", "--pgn=x.png"], "unknown option --pgn: did you mean 'png'?"),
        (["plot", "good", "--key=lss"], "give one of 'both', 'loss', 'val_loss'"),
        (["plot", "good", "--png"], "--png needs a value"),
        (["plot", "good", "trained", "--labels=a"], "labels='a': give 2, one for each run, all different"),
        (["plot", "good", "trained", "--labels=a,a"], "labels='a,a': give 2"),
        (["plot", "good", "--png=no/folder.png"],
         "no/folder.png cannot be written (No such file or directory): give another --png"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(folder, argv, message):
    (folder / "empty").mkdir()
    (folder / "junk.jsonl").write_text('{"loss": 1}\n{"step": 1, "lo')
    write_run(folder / "good", make_rows())
    write_run(folder / "trained", make_rows(validation=False))
    with pytest.raises(ConfigError) as error:
        scaling_laws.main(argv)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (folder / "runs.png").exists()


def test_plot_works_as_a_command(folder):
    path = write_run(folder / "run", make_rows())
    done = run_script("lab.scaling_laws", "plot", path, f"--png={folder / 'x.png'}")
    assert done.returncode == 0 and (folder / "x.png").exists(), done.stderr
    wrong = run_script("lab.scaling_laws", "plot", folder / "nothing")
    assert wrong.returncode == 1 and wrong.stderr.count("\n") == 1 and wrong.stderr.startswith("error: ")
    options = run_script("lab.scaling_laws", "plot", "--help").stdout
    assert all(f"--{name}=" in options for name in ("png", "key", "labels"))


def test_logs_are_drawn_without_torch(folder):
    path = write_run(folder / "run", make_rows())
    argv = ["plot", path, f"--png={folder / 'x.png'}"]
    code = f"import sys; from lab import pages, scaling_laws; pages.pages(); scaling_laws.main({argv!r}); assert 'torch' not in sys.modules"
    done = run_script("-c", code)
    assert done.returncode == 0 and (folder / "x.png").exists(), done.stderr
