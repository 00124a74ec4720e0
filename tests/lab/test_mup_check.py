"""Tests the experiments that check muP, the coordinate check and the best learning rate, with and without muP."""

import json
import math

import pytest
import torch

from configurator import ConfigError
from lab import mup_check
from lab.mup_check import (
    CoordsConfig,
    DepthConfig,
    LandscapeConfig,
    best_lrs,
    coordinate_check,
    coordinates,
    depth_check,
    draw_landscape,
    kind_of,
    largest_spread,
    lr_landscape,
    parse_lrs,
    parse_structure,
    parse_structures,
    spreads_of,
)
from model import GPT
from options import GPTConfig

# -- structures and rates as text


def test_structures_are_parsed_with_and_without_options():
    dense, low_rank, btt = parse_structures("dense; low_rank --rank=width//4 ;btt --rank 2 --normalize=False")
    assert (dense.options, low_rank.options) == ({}, {"rank": "width//4"})
    assert str(btt) == "btt, rank=2, normalize=False"
    config = btt.config(64, n_head=2)
    assert (config.structure, config.d_model, config.rank, config.normalize) == ("btt", 64, 2, False)
    assert list(map(str, parse_structures("low_rank; btt"))) == [
        "low_rank, rank=width/4, structured_layers=attn,ffn",
        "btt, rank=2",
    ]


def test_options_may_be_fractions_of_the_width_and_tuples():
    low_rank = parse_structure("low_rank --rank=width/4 --structured_layers='attn ffn'")
    assert [low_rank.config(width, n_head=2).rank for width in (64, 128)] == [16, 32]
    assert low_rank.config(64, n_head=2).structured_layers == ("attn", "ffn")
    assert parse_structure("low_rank --rank=width").config(64, n_head=2).rank == 64
    assert parse_structure("low_rank --rank=sqrt(width)").config(128, n_head=2).rank == 11
    for theta in ("'.5 .25 .25 .25 .5 .25 0'", ".5,.25,.25,.25,.5,.25,0"):
        einsum = parse_structure(f"einsum --theta={theta}").config(64, n_head=2)
        assert einsum.theta == (0.5, 0.25, 0.25, 0.25, 0.5, 0.25, 0)
    (mixed,) = parse_structures("""btt --overrides="{'lm_head': 'dense'}" """)
    assert mixed.config(64, n_head=2).overrides == {"lm_head": "dense"}


@pytest.mark.parametrize(
    "text, named",
    [
        (" ; ", "names none"),
        ("dense; --rank=2", "begin with its name"),
        ("btt rank=2", "'rank=2' is not an option, write each as --key=value"),
        ("btt --rnak=2", "did you mean 'rank'"),
        ("btt --rank='2", "close the quotes"),
        ("btt --rank=width/0", "no fraction of the width"),
        ("btt --rank=width*2", "no fraction of the width"),
        ("btt --rank=two", "a whole number"),
        ("btt --d_model=32", "--d_model"),
        ("bttt", "bttt"),
        ("low_rank --rank=width/2", "rank <= 96"),  # the head has 96 outputs
    ],
)
def test_mistakes_in_structures_are_one_line(text, named):
    config = CoordsConfig(widths=(64, 256))
    with pytest.raises(ConfigError) as error:
        for structure in parse_structures(text):
            config.models(structure, vocab_size=96)
    assert named in str(error.value) and "\n" not in str(error.value)


def test_rates_may_be_numbers_powers_and_ranges():
    assert parse_lrs(("2**-12..2**-9",)) == (2**-12, 2**-11, 2**-10, 2**-9)
    assert parse_lrs((1e-3, "2**-7", 1e-4)) == (1e-4, 1e-3, 2**-7)
    assert parse_lrs(("1e-3..5e-3",)) == pytest.approx((1e-3, 2e-3, 4e-3))
    for mistake in (("2**-9..2**-12",), ("1..2..3",), ("fast", 1e-3), (0.0, 1e-3), (1e-3,)):
        with pytest.raises(ConfigError, match="lrs"):
            parse_lrs(mistake)


@pytest.mark.parametrize(
    "options, named",
    [
        (dict(widths=(64,)), "widths"),
        (dict(widths=(64, "wide")), "widths"),
        (dict(steps=0), "steps=0"),
        (dict(lr=0.0), "lr=0"),
    ],
)
def test_impossible_options_are_refused(options, named):
    with pytest.raises(ConfigError, match=named):
        CoordsConfig(**options)


def test_mistakes_for_the_landscape_are_refused(char_data, tmp_path):
    with pytest.raises(ConfigError, match="warmup_steps=10"):
        LandscapeConfig(steps=10, warmup_steps=10)
    with pytest.raises(ConfigError, match="give the rank once"):
        lr_landscape(LandscapeConfig(structure="btt --rank=2", rank=2, data_dir=char_data))
    with pytest.raises(ConfigError, match="vocab_size=64"):
        lr_landscape(LandscapeConfig(vocab_size=64, block_size=32, data_dir=char_data))
    with pytest.raises(ConfigError, match="data_dir"):
        lr_landscape(LandscapeConfig(data_dir=str(tmp_path)))
    with pytest.raises(ConfigError, match="coords or depth or lr_landscape"):
        mup_check.main(["cords"])


# -- the coordinate check; tests/test_optim.py applies it to dense, low-rank and BTT


def test_the_largest_spread_is_that_of_the_worst_layer():
    assert largest_spread({"a": [1, 2, 1.5], "b": [3, 3, 1]}) == 3
    assert largest_spread({"a": [0, 0]}) == 1  # a layer that has not learned yet
    assert largest_spread({"a": [1, math.nan]}) == math.inf


def test_outputs_keep_their_size_for_an_einsum_without_a_name():
    structure = parse_structure("einsum --theta=.5,.25,.25,.25,.5,.25,0 --structured_layers=attn,ffn")
    measured = coordinate_check(structure, CoordsConfig(widths=(64, 256), seeds=2))
    assert spreads_of(measured)["rms"]["with"] < 2
    assert largest_spread(measured["rms"]["without"]) > 3
    for what in ("rms", "change"):
        for name, values in measured[what]["with"].items():
            assert values[0] == measured[what]["without"][name][0]  # the narrowest model has the same rates either way


@pytest.mark.parametrize("structure", ["dense", "btt --rank=2", "btt --rank=2 --moe=linear --num_experts=4"])
def test_updates_keep_their_size_over_widths_with_mup_only(structure):
    """Compares the change of every kind of layer, of the logits of attention and routers, and of blocks and head."""
    measured = coordinate_check(parse_structure(structure), CoordsConfig(widths=(32, 128), seeds=2, block_size=16))
    kinds = {kind_of(name) for name in measured["change"]["with"]}
    assert kinds > {"embedding", "attn.q", "attn.k", "attn.v", "attn.logits", "ffn.up", "ffn.down", "block", "lm_head"}
    assert ("router" in kinds) == ("moe" in structure)
    ends = {
        name: values for name, values in measured["change"]["with"].items() if kind_of(name) in ("block", "lm_head")
    }
    assert largest_spread(ends) < 1.6
    assert spreads_of(measured)["change"]["with"] < (4 if "moe" in structure else 2.2)
    if structure == "dense":
        assert spreads_of(measured)["change"]["without"] > 2.7


def test_coordinates_equal_what_the_layers_compute():
    torch.manual_seed(0)
    config = GPTConfig(block_size=6, vocab_size=12, n_layer=2, n_head=2, d_model=16, moe="linear", num_experts=4)
    model, idx = GPT(config), torch.randint(12, (3, 6))
    values = coordinates(model, idx)
    block = model.blocks[1]
    x = block.attn_norm(values["blocks.0"])
    torch.testing.assert_close(values["blocks.1.attn.q"], block.attn.q(x))
    torch.testing.assert_close(values["blocks.1.attn.q.router"], x @ block.attn.q.router.weight.T)
    up = torch.nn.functional.gelu(values["blocks.1.ffn.up"], approximate="tanh")
    torch.testing.assert_close(values["blocks.1.ffn.down.router"], up @ block.ffn.down.router.weight.T)
    q, k = (
        norm(values[f"blocks.1.attn.{name}"].view(3, 6, 2, 8))
        for norm, name in ((block.attn.q_norm, "q"), (block.attn.k_norm, "k"))
    )
    logits = torch.stack(
        [(q[:, t] * k[:, s]).sum(-1) for t in range(6) for s in range(t + 1)], -1
    )  # (B, nh, pairs), with scale 8 / d_head = 1
    torch.testing.assert_close(values["blocks.1.attn.logits"], logits.double(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(values["lm_head"], model(idx)[0])
    torch.testing.assert_close(values["token_embedding"], model.token_embedding.weight[idx])


def test_the_change_keeps_its_size_over_depths_with_completep_only(capsys, tmp_path):
    config = DepthConfig(n_layers=(3, 24), width=32, block_size=16, seeds=1, steps=10, device="cpu")
    usual, complete = (depth_check(parse_structure(f"dense --depth_exponent={e}"), config)["block"] for e in (0.5, 1))
    assert usual[0] == complete[0]  # the same model at 3 layers
    assert usual[1] > 1.15 * usual[0] and complete[1] < 1.05 * complete[0]
    path = tmp_path / "depth.json"
    mup_check.main(["depth", "--structures=btt", "--n_layers=2,3", "--width=16", "--steps=1", f"--json={path}"])
    (row,) = json.loads(path.read_text())
    assert row["n_layers"] == [2, 3] and len(row["change"]["block"]) == 2 and "last block" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="n_layers"):
        DepthConfig(n_layers=(3,))


def test_branches_are_scaled_by_the_depth():
    def scale(**options):
        return GPT(GPTConfig(block_size=4, vocab_size=8, n_head=1, d_model=4, **options)).blocks[0].branch_scale

    assert [scale(n_layer=12, depth_exponent=exponent) for exponent in (0, 0.5, 1)] == [1, 0.5, 0.25]
    assert scale(n_layer=12, parametrization="standard", structure="dense") == 1
    with pytest.raises(ConfigError, match="depth_exponent=1.0 with parametrization='standard'"):
        GPTConfig(parametrization="standard", depth_exponent=1.0)


def test_coords_writes_its_picture_and_rows(tmp_path, capsys):
    files = {name: tmp_path / "new" / f"coords.{name}" for name in ("png", "json")}
    mup_check.main(
        ["coords", "--structures=dense; btt --rank=2", "--widths=16,32", "--steps=2", "--seeds=1", "--device=cpu"]
        + [f"--{name}={path}" for name, path in files.items()]
    )
    rows = json.loads(files["json"].read_text())
    assert [(row["structure"], row["what"], row["multipliers"]) for row in rows] == [
        (structure, f"coordinate check: {what}", kind)
        for structure in ("dense", "btt, rank=2")
        for what in ("rms", "change")
        for kind in ("with", "without")
    ]
    assert rows[0]["torch"] == torch.__version__ and rows[0]["device"] and rows[0]["widths"] == [16, 32]
    assert rows[0]["largest_spread"] >= 1 and len(rows[0]["rms"]["blocks.1.ffn.up"]) == 2
    assert files["png"].read_bytes()[:4] == b"\x89PNG"
    assert "btt, rank=2" in capsys.readouterr().out


# -- loss against learning rate

SMALL = dict(n_layer=1, n_head=2, block_size=8, batch_rows=32, steps=30, warmup_steps=3, device="cpu")


@pytest.mark.parametrize(
    "structure, narrow, wide, lrs",
    [
        ("dense", 16, 128, "2**-12..2**-7"),
        # With the cap on the RMS of cores, high rates do a narrow layer no harm, and its curve has no clear minimum.
        # A core's fan-in grows with the root of the width, so one width is 16 times the other.
        ("btt --rank=2 --normalize=False", 16, 256, "2**-13..2**-8"),
    ],
    ids=["dense", "btt"],
)
def test_the_best_rate_stays_the_same_over_widths_under_mup_only(char_data, structure, narrow, wide, lrs):
    config = LandscapeConfig(
        structure=structure, widths=(narrow, wide), seeds=1, lrs=(lrs,), data_dir=char_data, **SMALL
    )
    losses, initial = lr_landscape(config, say=lambda *args, **kwargs: None)
    assert initial == pytest.approx(math.log(96))  # the head starts at zero
    assert losses["with"][narrow] == losses["without"][narrow]
    steps_apart = {}  # from the narrow model's best rate to the wide one's, in doublings
    for kind in ("with", "without"):
        best = best_lrs(losses[kind], config.lrs)
        steps_apart[kind] = round(math.log2(best[wide][0] / best[narrow][0]))
    assert abs(steps_apart["with"]) <= 1
    assert steps_apart["without"] <= -2


def test_diverged_runs_are_never_best_and_are_drawn_at_the_initial_loss(tmp_path):
    losses = {16: [2.0, math.nan, 1.5], 32: [math.nan, 9.0, math.inf], 64: [math.nan] * 3}
    lrs = (0.1, 0.2, 0.4)
    best = best_lrs(losses, lrs)
    assert best[16] == (0.4, 1.5) and best[32] == (0.2, 9.0) and best[64][0] is None
    draw_landscape({"with": losses, "without": losses}, lrs, 4.5, "btt", str(tmp_path / "lr.png"))
    assert (tmp_path / "lr.png").stat().st_size > 0


def test_lr_landscape_writes_its_picture_and_rows(char_data, tmp_path, capsys):
    options = {**SMALL, "steps": 3, "warmup_steps": 1, "lrs": "2**-9,1e30"}  # the second rate makes numbers non-finite
    mup_check.main(
        ["lr_landscape", "--structure=dense", "--widths=16,32", f"--data_dir={char_data}"]
        + [f"--{name}={value}" for name, value in options.items()]
        + [f"--{name}={tmp_path / f'lr.{name}'}" for name in ("png", "json")]
    )
    rows = json.loads((tmp_path / "lr.json").read_text())
    assert len(rows) == 2 * 2 * 2
    assert {row["lr"]: row["loss"] is None for row in rows} == {2**-9: False, 1e30: True}
    assert all(row["best"] == (row["lr"] == 2**-9) for row in rows)
    assert rows[0]["dtype"] == "float32" and rows[0]["initial_loss"] == pytest.approx(math.log(96))
    assert (tmp_path / "lr.png").read_bytes()[:4] == b"\x89PNG"
    out = capsys.readouterr().out
    assert "6/6 | width 32 | without muP" in out and "2**-9" in out.splitlines()[-1]


def test_rows_are_written_run_by_run_and_an_estimate_is_printed_first(char_data, tmp_path, monkeypatch, capsys):
    """A check that is interrupted leaves the rows of its finished runs, and the picture of the finished width."""
    calls, done, drawn = [], mup_check.train_model, []

    def train(model, optimizer, lr, warmup_steps, batches, autocast):
        if len(batches) == 3:
            calls.append(lr)
            if len(calls) == 4:
                raise KeyboardInterrupt
        return done(model, optimizer, lr, warmup_steps, batches, autocast)

    monkeypatch.setattr(mup_check, "train_model", train)
    monkeypatch.setattr(mup_check, "draw_landscape", lambda losses, *rest: drawn.append(losses))
    options = {**SMALL, "steps": 3, "warmup_steps": 1, "lrs": "2**-9,2**-8", "widths": "16,32"}
    words = [f"--{name}={value}" for name, value in options.items()]
    with pytest.raises(KeyboardInterrupt):
        mup_check.main(
            [
                "lr_landscape",
                f"--data_dir={char_data}",
                *words,
                f"--json={tmp_path}/lr.json",
                f"--png={tmp_path}/lr.png",
            ]
        )
    rows = json.loads((tmp_path / "lr.json").read_text())
    seen = [(row["width"], row["multipliers"], row["lr"]) for row in rows]
    narrow = [(16, kind, lr) for kind in ("with", "without") for lr in (2**-9, 2**-8)]
    assert sorted(seen) == sorted([*narrow, (32, "with", 2**-9)])
    assert len(drawn) == 1 and {kind: list(of) for kind, of in drawn[0].items()} == {"with": [16], "without": [16]}
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("6 runs of 3 steps on ") and ": about " in said[0]
    assert said[3].startswith("3/6 | width 32") and said[3].endswith("left")


def test_the_landscape_with_mup_alone_trains_only_the_runs_with_mup(char_data):
    options = dict(
        widths=(16, 32), lrs=("2**-9", "2**-8"), data_dir=char_data, **{**SMALL, "steps": 2, "warmup_steps": 1}
    )
    both, alone = (
        lr_landscape(LandscapeConfig(structure="dense", without=each, **options), say=lambda *args, **kwargs: None)[0]
        for each in (True, False)
    )
    assert list(alone) == ["with"] and alone["with"] == both["with"] and both["without"][32] != both["with"][32]


def test_the_default_sizes_of_the_landscape_fit_the_device(monkeypatch):
    small = LandscapeConfig(device="cpu")
    assert (small.widths, small.steps, small.warmup_steps) == ((64, 128, 256), 100, 10)
    assert LandscapeConfig(device="cpu", steps=7, batch_rows=3).steps == 7
    monkeypatch.setattr("engine.device.choose_device", lambda name: torch.device("cuda"))
    large = LandscapeConfig()
    assert (large.widths, large.steps, large.batch_rows) == ((64, 128, 256, 512), 300, 128)


@pytest.mark.parametrize("option", ["png", "json"])
def test_files_that_cannot_be_written_are_refused_before_the_work(tmp_path, option):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=f"file/a cannot be written .*: give another --{option}"):
        mup_check.main(["coords", f"--{option}={tmp_path}/file/a"])
    with pytest.raises(ConfigError, match=f"cannot be written .Is a directory.: give another --{option}"):
        mup_check.main(["coords", f"--{option}={tmp_path}"])


def test_a_single_width_gets_its_best_rate(char_data, tmp_path, capsys):
    options = {**SMALL, "steps": 3, "warmup_steps": 1, "lrs": "2**-9,1e30", "widths": "16,"}
    words = [f"--{name}={value}" for name, value in options.items()]
    words += [f"--{name}={tmp_path / f'lr.{name}'}" for name in ("png", "json")]
    mup_check.main(["lr_landscape", "--structure=dense", f"--data_dir={char_data}", *words])
    rows = json.loads((tmp_path / "lr.json").read_text())
    assert [(row["lr"], row["multipliers"], row["best"]) for row in rows] == [
        (2**-9, "with", True),
        (1e30, "with", False),
    ]
    assert "2/2 | width 16" in (out := capsys.readouterr().out) and "without" not in out
    assert (tmp_path / "lr.png").stat().st_size > 0
