"""Tests options from dataclasses, files and the command line against expected values, and one line per mistake."""

import importlib
import os
import re
import subprocess
import sys
from dataclasses import dataclass, fields
from typing import Literal

import pytest

from configurator import (
    ConfigError,
    RunFailed,
    UnusedOption,
    as_script,
    help_text,
    load_config,
    read_config_file,
    split_configs,
    split_options,
)
from conftest import ROOT


@dataclass
class Options:
    lr: float = 1e-3  # learning rate, per update
    steps: int = 10  # updates
    name: str = "run"  # of the run
    compile: bool = False  # faster
    maybe: int | None = None  # or not
    speed: bool | None = None  # None: found out
    graph: bool | Literal["blocks"] | None = None  # or by name
    schedule: Literal["cosine", "constant"] = "cosine"  # shape
    theta: tuple | None = None  # seven exponents
    layers: tuple = ("attn",)  # which
    table: dict | None = None  # of roles


@pytest.fixture
def config_file(tmp_path):
    def write(text, name="config.py"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


@pytest.mark.parametrize(
    "argv, key, value",
    [
        (["--lr=3e-4"], "lr", 3e-4),
        (["--lr", "1"], "lr", 1.0),
        (["--steps=10_000"], "steps", 10_000),
        (["--steps=1e4"], "steps", 10_000),
        (["--name=a=b"], "name", "a=b"),
        (["--name", "two words"], "name", "two words"),
        (["--name=None"], "name", "None"),
        (["--name=12"], "name", "12"),
        (["--compile"], "compile", True),
        (["--compile", "--steps=3"], "compile", True),
        (["--compile", "False"], "compile", False),
        (["--compile=false"], "compile", False),
        (["--speed"], "speed", True),
        (["--graph"], "graph", True),
        (["--graph=blocks"], "graph", "blocks"),
        (["--graph=None"], "graph", None),
        (["--speed=None"], "speed", None),
        (["--maybe=None"], "maybe", None),
        (["--maybe", "4"], "maybe", 4),
        (["--schedule=constant"], "schedule", "constant"),
        (["--theta=(.5, 0, .5, 0, .5, .5, 0)"], "theta", (0.5, 0, 0.5, 0, 0.5, 0.5, 0)),
        (["--theta=[1, 0]"], "theta", (1, 0)),
        (["--theta=.5,0"], "theta", (0.5, 0)),
        (["--theta", ".5", "0", ".5", "--steps=3"], "theta", (0.5, 0, 0.5)),
        (["--theta", ".5 0"], "theta", (0.5, 0)),
        (["--layers=attn,ffn"], "layers", ("attn", "ffn")),
        (["--layers=()"], "layers", ()),
        (["--table={'attn.q': 'dense'}"], "table", {"attn.q": "dense"}),
    ],
)
def test_values_are_parsed_to_the_type_of_their_option(argv, key, value):
    got = getattr(load_config(Options, argv), key)
    assert got == value and type(got) is type(value)


def test_later_files_win_and_the_command_line_wins_over_all(config_file):
    first = config_file("import math\nlr = 1e-2 * math.pi\nsteps = 8 * 1024\n_private = 1\n", "a.py")
    second = config_file("steps = 5\nname = 'b'\n", "b.py")
    config = load_config(Options, ["--name=flag", first, second])
    assert (round(config.lr, 6), config.steps, config.name) == (0.031416, 5, "flag")


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--stepz=3"], ["stepz", "steps"]),
        (["--steps=3.5"], ["steps", "3.5", "whole number"]),
        (["--steps=many"], ["steps", "'many'", "whole number"]),
        (["--steps=True"], ["steps", "True"]),
        (["--lr=fast"], ["lr", "number"]),
        (["--compile=1"], ["compile", "True or False"]),
        (["--graph=block"], ["graph='block'", "True or False or one of 'blocks' or None"]),
        (["--schedule=linear"], ["schedule", "linear", "cosine", "constant"]),
        (["--theta=.5"], ["theta", "tuple"]),
        (["--lr"], ["lr", "needs a value"]),
        (["--lr", "--steps=3"], ["lr", "needs a value"]),
        (["nothing.py"], ["nothing.py", "does not exist"]),
        (["steps=3"], ["steps=3", "--key=value"]),
    ],
)
def test_mistakes_name_option_value_and_remedy(argv, words):
    with pytest.raises(ConfigError) as caught:
        load_config(Options, argv)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message
    assert caught.value.code == f"error: {message}"  # Python prints it and exits with status 1


@pytest.mark.parametrize(
    "text, words",
    [("stepz = 1", ["stepz", "steps"]), ("steps = 'x'", ["steps"]), ("steps = 1/0", ["ZeroDivisionError"])],
)
def test_mistakes_in_a_file_name_the_file(config_file, text, words):
    path = config_file(text)
    with pytest.raises(ConfigError) as caught:
        load_config(Options, [path])
    assert path in str(caught.value) and all(word in str(caught.value) for word in words)


def test_only_rank_0_prints_an_error(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert ConfigError("text").code == RunFailed("text").code == 1


def test_a_failed_run_ends_like_a_mistake_but_is_another_exception(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    for kind, other, builtin in ((ConfigError, RunFailed, ValueError), (RunFailed, ConfigError, RuntimeError)):
        with pytest.raises(builtin, match="^text$") as caught:
            raise kind("text")
        assert caught.value.code == "error: text" and isinstance(caught.value, SystemExit)
        assert not isinstance(caught.value, other)


def test_help_lists_every_option_with_default_and_comment(capsys):
    with pytest.raises(SystemExit) as caught:
        load_config(Options, ["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    for line in ("--lr=0.001", "learning rate, per update", "--layers=('attn',)", "of roles"):
        assert line in out


@pytest.mark.parametrize(
    "where",
    ["options.TrainConfig", "vision.train.ImageTrainConfig", "vision.regression.RegressionConfig", "vision.data.PixelsConfig",
     "prepare_owt.PrepareConfig", "sample.SampleConfig", "lab.convert.ConvertConfig", "lab.search.SearchConfig",
     "lab.sweep.SweepConfig", "lab.structures.StructuresConfig", "lab.coverage.CoverageConfig",
     "lab.mup_check.CoordsConfig",
     "lab.mup_check.LandscapeConfig", "lab.scaling_laws.PlotConfig", "lab.scaling_laws.FitConfig",
     "lab.scaling_laws.RatesConfig", "lab.bench_options.StepConfig",
     "lab.bench_options.SampleBenchConfig", "lab.bench_options.DataBenchConfig", "lab.bench_options.LayersConfig",
     "lab.bench_options.MixturesConfig"],
)  # fmt: skip
def test_help_explains_every_option(where):
    """Inherited options are included; a field that spans several lines would lose its comment."""
    module, _, name = where.rpartition(".")
    Config = getattr(importlib.import_module(module), name)
    lines = help_text(Config).splitlines()
    hidden = getattr(Config, "hidden", ())
    assert not any(line.startswith(f"  --{name}=") for line in lines for name in hidden)
    for name in [field.name for field in fields(Config) if field.name not in hidden]:
        line = next(line for line in lines if line.startswith(f"  --{name}="))
        assert re.search(r"=\S.* \w", line), f"{name} has no comment"


def test_an_uncaught_ctrl_c_is_one_line(capsys):
    def interrupted(words):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        as_script(interrupted)
    assert end.value.code == 130 and capsys.readouterr().err == "stopped\n"


def test_a_config_file_may_define_functions_and_classes_which_are_no_options(config_file):
    path = config_file(
        "import math\nfrom math import pi\ndef f(): return g()\ndef g(): return pi\nclass C: made = f()\nlr = f()\n"
    )
    assert read_config_file(path) == {"pi": 3.141592653589793, "lr": 3.141592653589793}
    function = sys.modules["config_file_" + re.sub(r"\W", "_", path)].f
    assert (
        function() and importlib.import_module(function.__module__).f is function
    )  # torch.compile looks it up like this


@pytest.mark.parametrize(
    "text, configs",
    [
        ("", []),
        ("config/a.py --rank=2;config/b.py", [["config/a.py", "--rank=2"], ["config/b.py"]]),
        (" --a='x;y' ; ;--t \".5 0\" #;", [["--a=x;y"], ["--t", ".5 0", "#"]]),
        ("--overrides=\"{'ffn': 'btt'}\"", [["--overrides={'ffn': 'btt'}"]]),
    ],
)
def test_several_configs_in_one_option_are_split_like_a_shells_words(text, configs):
    assert split_configs("against", text) == configs


def test_several_options_in_one_option_are_parsed():
    got = split_options("common", "--a=1 --b 2.5 --c --d='x y' --e=None --f=2024-05 --g='{\"h\": 1}'")
    assert got == {"a": 1, "b": 2.5, "c": True, "d": "x y", "e": None, "f": "2024-05", "g": {"h": 1}}
    for text, message in (("a=1", "'a=1' is not an option, write each as --key=value"), ("--a='1", "close the quotes")):
        with pytest.raises(ConfigError, match=f"common=.*{message}"):
            split_options("common", text)


@dataclass
class Structured:
    kind: str = "dense"
    rank: int = 1
    folder: str | None = None
    plot: bool | str = False

    elsewhere = {"n_rank": "rank"}

    def __post_init__(self):
        if self.kind == "dense" and self.rank != 1:
            raise UnusedOption("rank", self.rank, " with kind='dense'", "make it 1")


def test_an_option_without_effect_is_dropped_from_a_file_and_refused_on_the_command_line(tmp_path, capsys):
    path = tmp_path / "btt.py"
    path.write_text("kind = 'btt'\nrank = 2\n")
    assert load_config(Structured, [str(path)]).rank == 2
    assert load_config(Structured, [str(path), "--kind=dense"]).rank == 1
    assert capsys.readouterr().out == "note: rank=2 with kind='dense': left out\n"
    for words in (["--rank=2"], [str(path), "--kind=dense", "--rank=2"], [str(path), "--kind=dense", "--rank=3"]):
        with pytest.raises(UnusedOption, match=r"rank=\d with kind='dense': make it 1"):
            load_config(Structured, words)


def test_text_options_keep_text_that_looks_like_a_literal():
    config = load_config(Structured, ["--kind=btt", "--folder=2024", "--plot=3.png"])
    assert config.folder == "2024" and config.plot == "3.png"
    assert load_config(Structured, ["--folder=None", "--plot"]) == Structured(folder=None, plot=True)


def test_option_names_of_other_projects_are_answered_with_the_name_here():
    with pytest.raises(ConfigError, match="unknown option --n_rank: here it is rank"):
        load_config(Structured, ["--n_rank=2"])
    for theirs, ours in (("learning_rate", "lr"), ("n_embd", "d_model"), ("dataset", "data_dir")):
        with pytest.raises(ConfigError, match=f"--{theirs}: here it is {ours}"):
            load_config(importlib.import_module("train").TrainConfig, [f"--{theirs}=1"])


WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = None
sys.argv = sys.argv[1:]
if sys.argv[0].endswith(".py"):
    runpy.run_path(sys.argv[0], run_name="__main__")
else:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    "words, line",
    [
        ("train.py --help", "Train a structured GPT"),
        ("train.py --dmodel=3", "error: unknown option --dmodel"),
        ("train.py --d_model=97 --n_head=1", "error: attn.q: d_in=97 has no factorisation"),
        ("train.py --moe=linear --structure=kronecker", "error: attn.q: structure='kronecker' cannot be a mixture"),
        ("vision.train --help", "Train a structured MLP"),
        ("vision.train --model=vit --n_head=1 --structured_layers=attn --d_model=97", "error: attn.q: d_in=97"),
        ("vision.regression --d_model=0", "error: d_model=0"),
        ("einsum_linear.py --theta=.5,0,.5,0,.5,.5,1", "error: rank 1024 is too large for the blocks"),
        ("sample.py --temperature=-1", "error: temperature=-1.0: make it at least 0"),
        ("prepare_owt.py --tokenizer=words", "error: --tokenizer='words' is unknown"),
        ("vision.data --image_size=0", "error: image_size=0"),
        ("lab.bench --help", "Time layers, mixtures"),
        ("lab.bench step --stepz=3", "error: unknown option --stepz"),
        ("lab.bench mixtures --tokens=x", "error: --tokens='x' has the wrong type"),
        ("lab.convert --source=gpt2", "error: out_dir='' and export=''"),
        ("lab.mup_check lr_landscape --steps=0", "error: steps=0"),
        ("lab.mup_check depth --n_layers=3,", "error: n_layers=(3,)"),
        ("lab.search --rank=2", "error: --rank is set by each trial"),
        ("lab.search --trials=0", "error: trials=0"),
    ],
)
def test_mistakes_are_answered_before_torch_is_imported(words, line):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *words.split()], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.stdout + done.stderr).startswith(line), done.stdout + done.stderr
    assert done.returncode == (0 if "--help" in words else 1)


def test_a_pipe_that_closes_early_is_no_error():
    done = subprocess.run(
        f"{sys.executable} train.py --help | head -1", shell=True, cwd=ROOT, capture_output=True, text=True
    )
    assert done.stderr == "" and done.stdout.startswith("Train a structured GPT"), done.stderr


OUTPUT = "from configurator import as_script; as_script(lambda words: print(words[0]))"


@pytest.mark.parametrize(
    "output, encoding, status, said",
    [
        ("> /dev/full", "utf-8", 1, "error: stdout cannot be used (No space left on device)\n"),
        (">&-", "utf-8", 0, ""),
        ("", "ascii", 0, "\\xe4\n"),
        ("| cat", "utf-8", 0, "ä\n"),
    ],
)
def test_output_that_is_lost_or_has_few_characters_is_no_traceback(output, encoding, status, said):
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{sys.executable} -c '{OUTPUT}' ä {output}"], cwd=ROOT, text=True,
        capture_output=True, env={**os.environ, "PYTHONIOENCODING": encoding, "LC_ALL": "C.UTF-8"},
    )  # fmt: skip
    assert (done.returncode, done.stdout + done.stderr) == (status, said)


@pytest.mark.parametrize(
    "error, line",
    [
        (MemoryError(), r"out of memory \(Python objects\): make sizes smaller"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: 64 bytes"),
            r"out of memory \(Default.*: make sizes",
        ),
        (PermissionError(13, "Permission denied", "a/b"), r"a/b cannot be used \(Permission denied\)"),
    ],
)
def test_what_no_script_foresees_is_one_line(error, line):
    def failing(words):
        raise error

    with pytest.raises(RunFailed, match=line):
        as_script(failing)
    with pytest.raises(RuntimeError, match="^another$"):
        error = RuntimeError("another")  # a mistake of ours keeps its traceback
        as_script(failing)


@pytest.mark.parametrize(
    "text", ["exit()", "raise SystemExit(0)", "import sys; sys.exit('why')", "raise GeneratorExit"]
)
def test_a_config_file_that_exits_is_a_mistake(config_file, text):
    with pytest.raises(
        ConfigError, match="config.py does not run: (it calls exit\\(\\)|SystemExit: why|GeneratorExit: )$"
    ):
        load_config(Options, [config_file(text)])


def test_every_message_is_one_printable_line_of_some_length():
    message = ConfigError("a\nb\x1b[31m\udcff\0 ä").message
    assert message == r"a b\x1b[31m\udcff\x00 ä"
    assert len(ConfigError("x" * 10_000).message) < 2000 and ConfigError("x" * 1999).message == "x" * 1999


@pytest.mark.parametrize(
    "word, message",
    [
        ("--lr=1e400", "--lr=inf is not finite: give another number"),
        ("--lr=-1e400", "--lr=-inf is not finite"),
        (
            "--steps=9223372036854775808",
            "--steps=9223372036854775808 does not fit in 64 bits: give a number between -2^63 and 2^63",
        ),
        ("--lr=1" + "0" * 400, "--lr=(a number of 1329 bits) does not fit in 64 bits"),
        ("--theta=(1, 1e400)", "--theta=inf is not finite"),
        ("--table={'a': {'b': [1e400]}}", "--table=inf is not finite"),
        ("--steps={[]: 1}", "has the wrong type: give a whole number"),
        ("--steps=" + "-" * 100_000 + "1", "has the wrong type: give a whole number"),
    ],
)
def test_numbers_are_finite_and_fit_64_bits(word, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(Options, [word])
    assert load_config(Options, ["--steps=9223372036854775807"]).steps == 2**63 - 1


def test_each_call_reads_options_anew(tmp_path):
    """Each call reads a changed file again and makes a new object; only within a script is the first result reused."""
    path = tmp_path / "some.py"
    path.write_text("kind = 'btt'\nrank = 2\n")
    first = load_config(Structured, [str(path)])
    first.rank = 7
    path.write_text("kind = 'btt'\nrank = 3\n")
    assert load_config(Structured, [str(path)]).rank == 3 and load_config(Structured, [str(path)]) is not first
