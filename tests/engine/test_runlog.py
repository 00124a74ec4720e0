"""Tests what a run prints and logs: the model's table against the model itself, plan, progress, log and summary."""

import io
import json
import math
import os
import re
from types import SimpleNamespace

import pytest
import torch

from configurator import ConfigError, RunFailed
from einsum_linear import make_linear
from engine import runlog
from lab.structures import measured_rank
from model import GPT
from optim import lr_multipliers, make_optimizers
from options import GPTConfig, RunConfig, TrainConfig

# -- the table

SMALL = dict(vocab_size=96, n_layer=3, n_head=2, d_model=36, block_size=32)
MODELS = {
    "btt": dict(rank=2),
    "gpt2": dict(structure="dense", parametrization="standard", bias=True),
    "standard btt": dict(parametrization="standard", structured_layers=("attn.q", "ffn", "lm_head")),
    "overrides": dict(overrides={"attn.q": "dense", "ffn": {"rank": 3}}, bias=True),
    "embed": dict(d_embed=18, structured_layers=("embed", "attn"), structure="low_rank", rank=4),
    "three cores": dict(structure="tt", num_cores=3, d_model=64, vocab_size=64, n_head=4),
    "einsum": dict(structure="einsum", theta=(0.5, 0.25, 0.25, 0.25, 0.5, 0.25, 0), d_model=64, n_head=4),
}


def make_model(name, **more):
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**SMALL, **MODELS[name], **more}))


def read_table(model, lr=2e-3):
    """Parse the printed table of a model -> {layer: its cells by column}."""
    head, rule, *lines = runlog.model_table(model, lr_multipliers(model), lr)
    assert set(rule) == {"-"} and set(lines.pop(-2)) == {"-"}
    start = {name: head.index(name) for name in ("structure", "sizes", "init std")}
    end = {name: head.index(name) + len(name) for name in ("parameters", "FLOPs a token")}
    rows = {}
    if "rank" in head.split():  # blank out the cells of this column, such as "4 of 18"
        ranks = [re.search(r"  +([\d,]+ of [\d,]+)  ", line) for line in lines]
        lines = [line if r is None else line.replace(r[1], " " * len(r[1]), 1) for line, r in zip(lines, ranks)]
    for line in lines:
        line = line.ljust(len(rule))
        sizes = line[start["sizes"] : end["parameters"]]
        parameters = "" if sizes[-1] == " " else sizes.split()[-1]
        cells = dict(
            structure=line[start["structure"] : start["sizes"]].strip(),
            sizes=sizes.removesuffix(parameters).strip(),
            parameters=parameters if parameters == "tied" else number(parameters),
            flops=number(line[end["parameters"] : end["FLOPs a token"]]),
            rates=[float(word) for word in line[end["FLOPs a token"] : start["init std"]].split()],
            stds=[float(word) for word in line[start["init std"] :].split()],
        )
        name = line[: start["structure"]].strip()
        assert name not in rows
        rows[name] = cells
    return rows


def number(text):
    return int(text.replace(",", "")) if text.strip() else 0


def layers_of(model, label):
    """The layers that a row stands for, given its label such as "3 x attn.q"."""
    count, _, role = label.rpartition(" x ")
    owners = model.blocks if count else [model]
    assert count in ("", str(len(model.blocks)))
    return [owner.get_submodule(role) for owner in owners]


def layer_rows(model):
    """(label, cells) for the rows of layers: those that name a structure."""
    rows = read_table(model)
    roles = {label: row for label, row in rows.items() if row["structure"]}
    assert len(roles) == 7 + (model.config.d_embed is not None)
    return roles.items()


@pytest.mark.parametrize("name", MODELS)
def test_the_totals_equal_those_of_the_model(name):
    model = make_model(name)
    *rows, total = read_table(model).values()
    unique = {id(parameter): parameter.numel() for parameter in model.parameters()}
    assert total["parameters"] == sum(unique.values())
    assert total["flops"] == model.flops_per_token()
    assert sum(row["parameters"] for row in rows if row["parameters"] != "tied") == total["parameters"]
    assert sum(row["flops"] for row in rows) == total["flops"]


@pytest.mark.parametrize("name", MODELS)
def test_each_row_has_the_parameters_and_flops_of_its_layers(name):
    model = make_model(name)
    for label, row in layer_rows(model):
        cores = [core for layer in layers_of(model, label) for core in layer.cores]
        if row["parameters"] != "tied":
            assert row["parameters"] == sum(core.numel() for core in cores)
        if row["structure"] == "dense":
            assert row["flops"] == 2 * sum(core.numel() for core in cores)
            shapes = [tuple(cores[0].shape[::-1])]
        else:
            shapes = [tuple(core.shape) for core in layers_of(model, label)[0].cores]
        assert row["sizes"] == " ".join(str(shape).replace(" ", "") for shape in shapes)
    config, rows = model.config, read_table(model)
    head_size = config.d_model // config.n_head
    assert rows["3 x attention"]["flops"] == 3 * 2 * 2 * config.block_size * config.n_head * head_size
    bias = 36 * (3 * 2 + 1) if config.bias else 0
    if config.d_model == 36:
        qk = 2 * 3 * head_size * (1 + config.bias) if config.parametrization == "mup" else 0
        assert rows["norms"]["parameters"] == 36 * (3 * 2 + 1) + bias + qk
    if config.bias:
        assert rows["biases"]["parameters"] == 3 * (36 * 4 + 4 * 36 + 36)
    tables = [m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    assert rows["embeddings"]["parameters"] == sum(weight.numel() for weight in tables)
    assert rows["embeddings"]["sizes"] == " ".join(f"({len(w)},{w.shape[1]})" for w in tables)


def test_overrides_show_in_the_rows_of_their_layers():
    model = make_model("overrides")
    rows = read_table(model)
    structures = {label.removeprefix("3 x "): row["structure"] for label, row in layer_rows(model)}
    assert structures.pop("attn.q") == "dense" and set(structures.values()) == {"btt"}
    assert rows["3 x ffn.up"]["sizes"] == "(6,6,36) (12,18,12)"  # rank 3
    assert rows["3 x attn.k"]["sizes"] == "(6,6,6) (6,6,6)"  # rank 1


def table_lines(**options):
    """The lines of a GPT's table, and its rows by their label."""
    with torch.device("meta"):
        model = GPT(GPTConfig(**{**dict(block_size=32, vocab_size=96, n_layer=1, n_head=1, d_model=64), **options}))
    lines = runlog.model_table(model, lr_multipliers(model), 1e-3)
    return lines, {line.split("  ")[0]: line for line in lines}


def test_the_rank_is_shown_where_it_is_not_full():
    lines, rows = table_lines(structure="low_rank", rank=16)
    assert "rank" in lines[0].split() and "16 of 64" in rows["attn.q"] and "16 of 64" in rows["ffn.up"]
    lines, rows = table_lines(
        structure="einsum", theta=(0.5, 0.25, 0.25, 0.25, 0.5, 0.25, 0), d_model=66, vocab_size=96
    )
    measured = measured_rank(make_linear(66, 66, "einsum", (0.5, 0.25, 0.25, 0.25, 0.5, 0.25, 0), normalize=False))
    assert measured < 66 and f"{measured} of 66" in rows["attn.q"]
    lines, rows = table_lines(structure="low_rank", rank=3, moe="linear", structured_layers=("ffn",))
    assert "6 of 64" in rows["ffn.up"] and "of 64" not in rows["attn.q"].replace("2 of 8", "")  # two experts per token
    lines, rows = table_lines(structure="kronecker")
    assert "rank" not in lines[0].split()


def test_a_structure_that_costs_more_than_dense_layers_is_noted_once():
    lines, _ = table_lines(structure="tt", rank=16)
    (note,) = [line for line in lines if line.startswith("note")]
    layer = make_linear(64, 64, "tt", rank=16)
    share = layer.flops_per_token / (2 * 64 * 64)
    assert (
        share > 1
        and note.startswith("note: tt: ")
        and float(re.search(r"costs ([\d.]+) times", note)[1]) >= share - 0.01
    )
    for options in (dict(structure="btt", rank=2), dict(structure="dense"), dict(structure="dense", moe="linear")):
        assert not [line for line in table_lines(**options)[0] if line.startswith("note")]


def test_only_a_tied_head_is_marked():
    tied = [name for name in MODELS if read_table(make_model(name))["lm_head"]["parameters"] == "tied"]
    assert tied == ["gpt2"]


@pytest.mark.parametrize("name", MODELS)
def test_learning_rates_equal_those_in_the_optimizer(name):
    model = make_model(name)
    groups = make_optimizers(model, RunConfig(lr=2e-3, weight_decay=0.0)).param_groups
    rate = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    for label, row in layer_rows(model):
        for layer in layers_of(model, label):
            assert row["rates"] == pytest.approx([rate[id(core)] for core in layer.cores], rel=5e-3)
    for label, part in (("norms", "norm"), ("gains", ".gains"), ("embeddings", "token_embedding")):
        rates = [rate[id(parameter)] for key, parameter in model.named_parameters() if part in key]
        assert not rates or read_table(model)[label]["rates"] == [pytest.approx(rates[0])]


@pytest.mark.parametrize("name", MODELS)
def test_initial_deviations_equal_those_of_a_new_model(name):
    model = make_model(name, d_model=256, n_head=4, vocab_size=1024)
    zeros = 0
    for label, row in layer_rows(model):
        per_core = list(zip(*(layer.cores for layer in layers_of(model, label))))
        assert len(row["stds"]) == len(per_core)
        for std, cores in zip(row["stds"], per_core):
            entries = torch.cat([core.flatten() for core in cores])
            error = 4 / math.sqrt(2 * len(entries)) + 0.005  # four standard errors of the estimate, and three digits
            assert std == pytest.approx(entries.std().item(), rel=error), label
        zeros += row["stds"][-1] == 0
    assert zeros == {"gpt2": 0, "standard btt": 2}.get(name, 3)  # attn.proj, ffn.down and lm_head start at 0 under muP
    assert read_table(model)["embeddings"]["stds"] == pytest.approx(
        [model.token_embedding.weight.std().item()], rel=0.02
    )


def test_a_parameter_of_another_kind_is_counted():
    model = make_model("btt")
    model.temperature = torch.nn.Parameter(torch.ones(5))
    rows = read_table(model)
    assert rows["others"]["parameters"] == 5
    assert rows["total"]["parameters"] == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("options", [dict(rank=4), MODELS["gpt2"], dict(structure="dense"), dict(structure="monarch")])
def test_the_table_of_gpt2_fits_a_screen(options):
    with torch.device("meta"):
        model = GPT(GPTConfig(**options))
    lines = runlog.model_table(model, lr_multipliers(model), 2e-3)
    assert len(lines) <= 16 and max(map(len, lines)) <= 120
    assert any(line.startswith("12 x attn.proj ") for line in lines)


# -- the plan


def plan_config(**more):
    options = dict(
        max_steps=1000, batch_tokens=4096, micro_batch=16, block_size=32, lr=2e-3, warmup_steps=200, shard="none"
    )
    return SimpleNamespace(**options | more)


def test_the_plan_equals_figures_by_hand():
    model = make_model("gpt2")
    parameters, flops = sum(p.numel() for p in model.parameters()), 3 * model.flops_per_token()
    peak = flops * 4096 * 1000 / (0.4 * 2 * 11_520)  # so that two of these GPUs take 3 h 12 min at 40% MFU
    lines = runlog.plan(plan_config(), model, 2, 4, "Some GPU", torch.bfloat16, peak)
    text = "\n".join(lines)
    assert text.startswith(f"{parameters / 1e3:.1f}k parameters, {flops / 1e3:.0f}k FLOPs a token in training")
    assert f"1,000 steps x 4,096 tokens = 4.10M tokens, {4096e3 * flops:.3g} FLOPs" in text
    assert "2 processes x 4 micro-steps x 16 sequences of 32 tokens, Some GPU, bfloat16" in text
    assert lines[-1] == "at 40% MFU about 3 h 12 min, 356 tokens/s"


def test_the_plan_of_a_resumed_run_covers_the_remaining_steps():
    model = make_model("btt")
    peak = 3 * model.flops_per_token() * 4096 * 1000 / (0.4 * 11_520)
    lines = runlog.plan(plan_config(), model, 1, 1, "Some GPU", "float16", peak, first_step=750)
    assert lines[1].startswith("steps 750 to 1,000 x 4,096 tokens = 1.02M tokens")
    assert lines[2].startswith("1 process x 1 micro-step x 16 sequences") and lines[2].endswith("float16")
    assert lines[3].startswith("at 40% MFU about 48 min,")


@pytest.mark.parametrize(
    "options, world, note",
    [
        (dict(warmup_steps=1000), 1, "note: warmup_steps=1000 of max_steps=1000: the rate rises to the end, to 0.002 of lr=0.002"),
        (dict(warmup_steps=4000), 1, "note: warmup_steps=4000 of max_steps=1000: the rate rises to the end, to 0.0005 of lr=0.002"),
        (dict(warmup_steps=999), 1, None),
        (dict(shard="fsdp"), 1, "note: shard=fsdp does nothing with one process: there is no other to share with"),
        (dict(shard="fsdp"), 2, None),
    ],
)  # fmt: skip
def test_the_plan_notes_options_without_effect(options, world, note):
    lines = runlog.plan(plan_config(**options), make_model("btt"), world, 1, "Some CPU", torch.float32, None)
    assert lines[3:] == ([note] if note else [])


def test_no_time_is_estimated_for_an_unknown_device():
    lines = runlog.plan(plan_config(), make_model("btt"), 1, 1, "Some CPU", torch.float32, None)
    assert len(lines) == 3 and "MFU" not in "".join(lines)


@pytest.mark.parametrize(
    "seconds, text",
    [(0.4, "0 s"), (59.4, "59 s"), (60, "1 min"), (3599, "1 h 0 min"), (11_520, "3 h 12 min"), (180_000, "2 d 2 h")],
)
def test_durations_are_written_in_suitable_units(seconds, text):
    assert runlog.duration(seconds) == text


@pytest.mark.parametrize(
    "number, text", [(7, "7"), (999.4, "999"), (999.6, "1.00k"), (67_113_314, "67.1M"), (124_475_904, "124M"), (9e12, "9.00T")]
)  # fmt: skip
def test_large_numbers_are_shortened(number, text):
    assert runlog.short(number) == text


# -- progress


class Stream(io.StringIO):
    """Stands in for standard output: records what was flushed, and may claim to be a terminal."""

    def __init__(self, terminal):
        super().__init__()
        self.terminal, self.flushed = terminal, 0

    def isatty(self):
        return self.terminal

    def flush(self):
        self.flushed = len(self.getvalue())

    def screen(self):
        """The lines that a terminal would show: after a carriage return, text overwrites the line from its beginning."""
        lines = []
        for line in self.getvalue().split("\n"):
            shown = ""
            for text in line.split("\r"):
                shown = text + shown[len(text) :]
            lines.append(shown.rstrip())
        return lines


@pytest.fixture
def standard_output(monkeypatch):
    """A function that replaces sys.stdout by a Stream. The test calls it, as pytest replaces sys.stdout before that."""

    def put(terminal):
        stream = Stream(terminal)
        monkeypatch.setattr("sys.stdout", stream)
        monkeypatch.setenv("COLUMNS", "100")
        return stream

    return put


def row_at(step, **more):
    return {"step": step, "tokens": 100 * step, "loss": 4.0 - step / 100, "tokens_per_second": 50.0, **more}


def test_in_a_pipe_progress_is_one_line_per_row(standard_output):
    stdout = standard_output(terminal=False)
    progress, rows = runlog.Progress(100), [row_at(10), row_at(20, mfu=0.5, val_loss=3.5)]
    progress.step(9)
    assert stdout.getvalue() == ""
    for row in rows:
        progress.row(row)
        assert stdout.flushed == len(stdout.getvalue())
    progress.step(21)
    progress.say("a", "b", sep="\n")
    progress.close()
    # 2 seconds per step, by the figures in the rows
    lines = [runlog.progress_line(row, 100, 2 * (100 - row["step"])) for row in rows]
    assert stdout.getvalue().splitlines() == [*lines, "a", "b"]
    assert lines[0] == "step  10/100 | loss 3.9000 | 0.1k tokens/s | ETA 03:00"
    assert lines[1] == "step  20/100 | loss 3.8000 | 0.1k tokens/s | MFU 50.0% | ETA 02:40 | val loss 3.5000"


def test_a_given_time_left_is_printed(standard_output):
    stdout = standard_output(terminal=False)
    progress = runlog.Progress(100)
    progress.row(row_at(10), 59)
    progress.row({"step": 0, "tokens": 0, "val_loss": 5.0})
    assert stdout.getvalue().splitlines()[0].endswith("ETA 00:59")
    assert stdout.getvalue().splitlines()[1] == "step   0/100 | val loss 5.0000"


def test_on_a_terminal_there_is_a_bar_and_messages_stay_whole(standard_output):
    stdout = standard_output(terminal=True)
    progress = runlog.Progress(40)
    progress.say("before")
    progress.row({"step": 0, "tokens": 0, "val_loss": 5.0})
    for step in range(1, 41):
        progress.step(step)
        if step % 10 == 0:
            progress.bar.refresh()  # by itself it waits for a tenth of a second
            progress.row(row_at(step, mfu=0.25, **({"val_loss": 3.0} if step == 20 else {})))
        if step == 25:
            progress.say("first", "second", sep="\n")
    bar = progress.bar
    progress.close()
    progress.row(row_at(40))
    evaluated = runlog.progress_line(row_at(20, mfu=0.25, val_loss=3.0), 40, 40)
    *above, last, after, end = stdout.screen()
    assert above == ["before", "step  0/40 | val loss 5.0000", evaluated, "first", "second"]
    assert re.fullmatch(r"step 40/40 \|[█#]+\| 100%, loss 3.6000 \| 0.1k tokens/s \| MFU 25.0%", last)
    assert (after, end) == (runlog.progress_line(row_at(40), 40, 0), "") and len(
        last
    ) <= 100  # after close(), rows are plain lines
    assert (bar.total, bar.initial, bar.n) == (40, 0, 40)


def test_the_bar_counts_down_the_time_left_between_rows(standard_output):
    stdout = standard_output(terminal=True)
    progress = runlog.Progress(100)
    progress.row(row_at(10))
    for step in range(11, 31):
        progress.step(step)
    progress.bar.refresh()
    assert stdout.screen()[-1].startswith("step 30/100 |") and stdout.screen()[-1].endswith("ETA 02:20")
    progress.close()


@pytest.mark.parametrize("given", [None, 60])
def test_the_bar_of_a_resumed_run_begins_at_its_step(standard_output, given):
    standard_output(terminal=True)
    progress = runlog.Progress(100, given)
    progress.step(61)
    assert (progress.bar.initial, progress.bar.n) == (60, 61)
    progress.close()


def test_rows_without_an_evaluation_leave_no_line_on_a_terminal(standard_output):
    stdout = standard_output(terminal=True)
    progress = runlog.Progress(100)
    for step in range(1, 101):
        progress.step(step)
        progress.row(row_at(step))
    progress.close()
    assert len(stdout.screen()) == 2 and stdout.screen()[0].startswith("step 100/100")


def test_silent_prints_nothing(capsys):
    silent = runlog.Silent()
    for call in (
        lambda: silent.say("x", sep="\n"),
        lambda: silent.row(row_at(1)),
        lambda: silent.step(1),
        silent.close,
    ):
        call()
    assert capsys.readouterr() == ("", "")


def test_a_time_left_of_more_than_a_day_is_in_hours():
    assert runlog.progress_line({"step": 1}, 10, 100 * 3600 + 62).endswith("ETA 100:01:02")
    assert runlog.progress_line({"step": 1}, 10, 62).endswith("ETA 01:02")


# -- the log


def write_log(folder, rows):
    """Write rows to the log of a folder -> its path."""
    log = runlog.RunLog(str(folder))
    for row in rows:
        log.write(row)
    return log.path


def test_a_log_is_read_back_and_a_resumed_one_is_cut_at_its_step(tmp_path):
    rows = [row_at(step) for step in range(1, 6)]
    path = write_log(tmp_path, rows)
    assert runlog.read_log(path) == rows
    runlog.RunLog(str(tmp_path), resume_step=3).write(row_at(9))
    assert [row["step"] for row in runlog.read_log(path)] == [1, 2, 3, 9]
    runlog.RunLog(str(tmp_path))
    assert runlog.read_log(path) == [] and os.listdir(tmp_path) == ["log.jsonl"]


@pytest.mark.parametrize(
    "junk", [b'{"step": 3, "lo', b"7", b'[{"step": 3}]', b'{"loss": 1.0}', b'{"step": "3"}', b"\xff\xfe\x00", b"", b"null"]
)  # fmt: skip
def test_lines_that_are_no_rows_are_left_out(tmp_path, junk):
    path = write_log(tmp_path, [row_at(1), row_at(2)])
    with open(path, "ab") as file:
        file.write(junk)
    assert runlog.read_log(path) == [row_at(1), row_at(2)]
    runlog.RunLog(str(tmp_path), resume_step=5).write(row_at(4))  # it is not appended to the torn line
    assert [row["step"] for row in runlog.read_log(path)] == [1, 2, 4]


def test_a_missing_log_has_no_rows(tmp_path):
    assert runlog.read_log(str(tmp_path / "log.jsonl")) == []


ROW = {
    "step": 10, "tokens": 2560, "flops": 1.5e9, "seconds": 1.25, "loss": 2.5, "val_loss": 2.75, "lr": 0.01, "grad_norm": 0.5,
    "tokens_per_second": 2048.0, "mfu": 0.25, "aux_loss": 1.0, "top1": 0.5, "top5": 0.75,
    "moe": {"blocks.0.ffn.up": {"load": [0.5, 0.5], "token_entropy": 0.1, "mean_entropy": 0.6}},
}  # fmt: skip
HOSTILE = [
    "null", "true", '"3"', '""', "[]", "[1]", "{}", '{"a": 1}', "-1", "1e999", "-1e999", "NaN", "1" * 400, "1" * 5000,
    "[" * 5000, "1e308", '{"a": {"load": []}}', '{"a": {"load": ["x"], "token_entropy": 1, "mean_entropy": 1}}',
    '{"a": {"load": [1], "token_entropy": null, "mean_entropy": 1}}', "0", "0.5",
]  # fmt: skip


@pytest.mark.parametrize("key", ROW)
def test_any_value_in_a_log_is_read_or_refused_in_one_line(tmp_path, key):
    """Whatever is read, the summary can show. NaN is allowed only for the losses and norms of a run that diverged."""
    path, refused = str(tmp_path / "log.jsonl"), []
    for value in HOSTILE:
        with open(path, "w") as file:
            file.write(json.dumps(ROW) + "\n")
            file.write(json.dumps({**ROW, key: "HERE"}).replace('"HERE"', value) + "\n")
        try:
            lines = runlog.summary_of_run(path, TrainConfig(out_dir=str(tmp_path), max_steps=20))
            assert lines and all("\n" not in line for line in lines)
        except ConfigError as error:
            refused.append(value)
            assert (
                str(error).startswith(f"{path}: line 2 has {key}=") and "\n" not in str(error) and len(str(error)) < 300
            )
    may_diverge = key in ("loss", "val_loss", "aux_loss", "grad_norm")
    assert key == "step" or {"null", "true", '"3"', "[1]"} <= set(refused)
    assert ("NaN" in refused) == (key != "step" and not may_diverge)


@pytest.mark.parametrize("what", ["pipe", "folder", "unreadable"])
def test_a_log_that_cannot_be_read_is_one_line(tmp_path, monkeypatch, what):
    path = str(tmp_path / "log.jsonl")
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        os.mkdir(path)
    else:
        open(path, "w").close()
        monkeypatch.setattr(
            "builtins.open", lambda *args, **how: (_ for _ in ()).throw(OSError(5, "Input/output error"))
        )
    with pytest.raises(ConfigError, match=r"log.jsonl (cannot be read|is not a regular file)"):
        runlog.read_log(path)


@pytest.mark.parametrize(
    "text", ["", "[", "[" * 9000, "7", "null", "[]", '{"a": 1', '{"a": ' + "1" * 5000 + "}", "\x00"]
)
def test_damaged_options_are_one_line(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"config.json cannot be read, it holds no options: remove it"):
        runlog.read_config_json(str(path))
    path.write_text('{"lr": 0.1}')
    assert runlog.read_config_json(str(path)) == {"lr": 0.1}


full_disk = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")


@full_disk
def test_a_full_disk_is_one_line(tmp_path):
    log = runlog.RunLog(str(tmp_path))
    os.remove(log.path)
    os.symlink("/dev/full", log.path)
    with pytest.raises(RunFailed) as error:
        log.write(row_at(1))
    assert (
        str(error.value) == f"{log.path} cannot be written (No space left on device): make room or give another out_dir"
    )


@full_disk
def test_a_full_disk_when_the_log_is_opened(tmp_path):
    path = write_log(tmp_path, [row_at(1)])
    os.symlink("/dev/full", path + ".part")
    with pytest.raises(RunFailed, match=r"log.jsonl cannot be written \(No space left on device\): make room"):
        runlog.RunLog(str(tmp_path), resume_step=1)
    assert runlog.read_log(path) == [row_at(1)]  # the old log is unchanged


def test_a_missing_folder_for_the_log_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere/log.jsonl cannot be written \(No such file or directory\)"):
        runlog.RunLog(str(tmp_path / "nowhere"))


def test_a_missing_wandb_is_one_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        runlog.start_wandb("project", {}, None)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("rows", [[], [row_at(1), row_at(2, val_loss=3.0)]])
def test_the_picture_is_a_png(tmp_path, rows):
    png = tmp_path / "loss.png"
    runlog.plot_loss(write_log(tmp_path, rows), str(png))
    assert png.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and png.stat().st_size > 5000
    assert sorted(os.listdir(tmp_path)) == ["log.jsonl", "loss.png"]


def test_the_pictures_title_names_the_run_and_its_best_loss(tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(runlog, "save_figure", lambda figure, path: titles.append(figure.axes[0].get_title()))
    runlog.plot_loss(write_log(tmp_path, [row_at(1, val_loss=4.0), row_at(2, val_loss=3.0), row_at(3)]), "loss.png")
    runlog.plot_loss(write_log(tmp_path, [row_at(1)]), "loss.png")
    assert titles == [f"{tmp_path.name}: validation loss 3.0000 at step 2", tmp_path.name]


def test_two_processes_may_draw_one_picture(tmp_path, monkeypatch):
    """Each writes to a file of its own, of which nothing is left even if the writing fails."""
    png, names = str(tmp_path / "a.png"), []
    for pid in (1, 2):
        monkeypatch.setattr(os, "getpid", lambda pid=pid: pid)
        with runlog.whole_file(png) as part:
            names.append(part)
            open(part, "w").close()
    assert names[0] != names[1] and os.listdir(tmp_path) == ["a.png"]
    with pytest.raises(ValueError), runlog.whole_file(png) as part:
        open(part, "w").close()
        raise ValueError
    assert os.listdir(tmp_path) == ["a.png"]


# -- the summary


def run_rows():
    first = {"step": 0, "tokens": 0, "flops": 0, "seconds": 0.0, "val_loss": 4.5}
    validation = {20: 3.25, 40: 3.0, 60: 3.125}
    speeds = [10.0, 500.0, 400.0, 450.0, 600.0, 300.0]
    return [first] + [
        {
            "step": 10 * (i + 1), "tokens": 1000 * (i + 1), "flops": 2_000_000 * (i + 1), "seconds": 30.0 * (i + 1),
            "loss": 4.0 - i / 8, "tokens_per_second": speed, "mfu": speed / 1000,
            **({"val_loss": validation[10 * (i + 1)]} if 10 * (i + 1) in validation else {}),
        }
        for i, speed in enumerate(speeds)
    ]  # fmt: skip


def parse_summary(lines):
    return dict(line.split(maxsplit=1) if not line.startswith("val loss") else line.split("  ", 1) for line in lines)


def summary_of(rows, tmp_path, max_steps=60, **more):
    lines = runlog.summary_of_run(rows, SimpleNamespace(max_steps=max_steps, out_dir=str(tmp_path)), **more)
    assert len(lines) <= 20
    return {name: text.strip() for name, text in parse_summary(lines).items()}


def test_the_summary_equals_the_figures_of_the_rows(tmp_path):
    path = write_log(tmp_path, run_rows())
    for name in ("ckpt.pt", "loss.png"):
        (tmp_path / name).touch()
    assert summary_of(path, tmp_path, memory=12.34) == {
        "steps": "60 of 60",
        "tokens": "6,000",
        "FLOPs": "1.2e+07",
        "training": "180.0 s, which are 3 min",
        "speed": "425 tokens/s, MFU 42.5% (medians)",
        "val loss": "4.5000 first, 3.1250 last, 3.0000 best at step 40",
        "loss": "3.3750 last",
        "memory": "12.3 GiB at most",
        "checkpoint": f"{tmp_path}/ckpt.pt",
        "log": f"{tmp_path}/log.jsonl",
        "picture": f"{tmp_path}/loss.png",
        "sample": f"python sample.py --out_dir={tmp_path}",
    }
    assert summary_of(run_rows(), tmp_path)["steps"] == "60 of 60"  # the rows themselves work like their file


def test_the_summary_leaves_out_what_is_unknown(tmp_path):
    rows = [{"step": 5, "tokens": 500, "flops": 10, "seconds": 2.0, "loss": 3.0}]
    assert set(summary_of(rows, tmp_path, max_steps=5)) == {"steps", "tokens", "FLOPs", "training", "loss"}
    assert runlog.summary_of_run([], SimpleNamespace(max_steps=5, out_dir="out/x")) == ["out/x: nothing logged"]


@pytest.mark.parametrize(
    "argv, environment, command",
    [
        (["train.py", "a.py", "--lr=1"], {}, "python train.py a.py --lr=1 --resume"),
        (["train.py", "--resume", "--overrides={'a': 1}"], {}, """python train.py '--overrides={'"'"'a'"'"': 1}' --resume"""),
        (["train.py", "a.py"], {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"},
         "torchrun --standalone --nproc_per_node=8 train.py a.py --resume"),
        (["train.py"], {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, "on every machine the same command with --resume"),
        (["pytest"], {}, "the same command with --resume"),
    ],
)  # fmt: skip
def test_the_summary_of_an_unfinished_run_has_the_command_to_resume_it(
    tmp_path, monkeypatch, argv, environment, command
):
    monkeypatch.setattr("sys.argv", argv)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert "resume" not in summary_of(run_rows(), tmp_path, max_steps=61)  # nothing was saved
    (tmp_path / "ckpt.pt").touch()
    assert summary_of(run_rows(), tmp_path, max_steps=61)["resume"] == command
    assert "resume" not in summary_of(run_rows(), tmp_path, max_steps=60)


def test_a_sharded_checkpoint_is_found(tmp_path):
    (tmp_path / "ckpt.dcp").mkdir()
    found = summary_of(run_rows(), tmp_path)
    assert found["checkpoint"] == f"{tmp_path}/ckpt.dcp" and "sample" in found
