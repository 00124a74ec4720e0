"""Tests that a user's own structure, in one file with an option of its own, works wherever the project's own do."""

import functools
import json

import pytest
import torch

import sample
import theta
import train
from configurator import ConfigError, UnusedOption, load_config
from conftest import losses, run_forked
from einsum_linear import CoreLinear, make_linear
from lab import bench, scaling_laws, sweep
from model import GPT
from options import STRUCTURE_FIELDS, GPTConfig

# A file as a user would write it, with a layer that is no einsum of two cores.
BANDED = '''
import functools
import torch
import theta
from einsum_linear import CoreLinear

class Banded(CoreLinear):
    """y = W x with W zero but for `bands` (cyclic) diagonals: one core (1, bands, max(d_in, d_out))."""

    def __init__(self, d_in, d_out, bands, **kwargs):
        self.bands, self.width = bands, max(d_in, d_out)
        super().__init__(d_in, d_out, [(1, bands, self.width)], **kwargs)
        self.flops_per_token = 2 * bands * self.width

    def indices(self):
        i = torch.arange(self.width, device=self.cores[0].device)
        return i % self.out_features, (i + torch.arange(self.bands, device=i.device)[:, None]) % self.in_features

    def product(self, x):
        rows, columns = self.indices()
        values = (x.reshape(-1, self.in_features)[:, columns] * self.effective_cores()[0][0].to(x.dtype)).sum(1)
        return values.new_zeros(len(values), self.out_features).index_add(1, rows, values)

def banded(d_in, d_out, options):
    return functools.partial(Banded, d_in, d_out, options["bands"])

theta.STRUCTURES["banded"] = theta.Structure(banded, options={"bands": 4})
'''


@pytest.fixture
def own_file(tmp_path):
    """The path of my_structures.py; its structures are removed from this process afterwards."""
    before = dict(theta.STRUCTURES)
    path = tmp_path / "my_structures.py"
    path.write_text(BANDED)
    yield str(path)
    remove_structures(before)


def remove_structures(before=None):
    """Remove all structures but those of the project (or of `before`), as in a new process."""
    for name in theta.STRUCTURES.keys() - (before or PROJECTS):
        del theta.STRUCTURES[name]


PROJECTS = set(theta.STRUCTURES)
SHORT = ["--max_steps=6", "--eval_interval=3", "--warmup_steps=1"]
OPTIONS = ["--structure=banded", "--structure_options={'bands': 3}"]


def test_structure_fields_have_the_defaults_of_the_structures():
    for name, default in theta.all_options().items():
        assert name in theta.ALIGNMENT or STRUCTURE_FIELDS[name] == default


def test_an_own_structure_is_trained_sampled_and_resumed(own_file, tiny, tmp_path, capsys):
    overrides = "--overrides={'ffn.down': {'structure': 'banded', 'bands': 5}, 'lm_head': 'dense'}"
    words = [own_file, *tiny, *OPTIONS, overrides, "--schedule=constant"]
    train.main([*words, f"--out_dir={tmp_path / 'whole'}"])
    table = capsys.readouterr().out
    assert "(1,3,144)" in table and "(1,5,144)" in table  # cores of ffn.up and ffn.down
    whole = losses(tmp_path / "whole")
    assert whole[20] < whole[1]
    train.main([*words, "--max_steps=10"])
    done = run_forked("train.py", *words, "--resume")  # in a process that has not loaded the file
    assert done.returncode == 0 and losses(tmp_path / "run") == whole, done.stdout + done.stderr
    sample.main([own_file, f"--out_dir={tmp_path / 'run'}", "--device=cpu", "--max_new_tokens=3", "--num_samples=1"])
    remove_structures()
    with pytest.raises(
        ConfigError, match="structure='banded' is unknown: choose one of .*, or name the file that adds it"
    ):
        sample.main([f"--out_dir={tmp_path / 'run'}", "--device=cpu"])


def test_an_own_structure_is_benchmarked(own_file, tiny, capsys):
    against = f"{own_file} {' '.join(tiny)} --structure=banded --structure_options=\"{{'bands': 2}}\"; {' '.join(tiny)}"
    timing = ["--steps=1", "--parts=False"]
    bench.main(["step", own_file, *tiny, *OPTIONS, *timing, f"--against={against}"])
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("parameters")).split()
    three, two, btt = (int(cell.replace(",", "")) for cell in row[1:4])
    # Two blocks, each with q, k, v, proj of width 36 and up, down of width 144, and a head of width max(36, 96).
    assert three - two == 2 * (4 * 36 + 2 * 144) + 96 and btt > three


def test_runs_of_an_own_structure_are_fitted(own_file, tiny, tmp_path):
    runs = []
    for width in (36, 72):
        for number, structure in enumerate((["--structure=dense"], OPTIONS)):
            runs.append(str(tmp_path / f"{width}_{number}"))
            train.main([own_file, *tiny, *SHORT, *structure, f"--d_model={width}", f"--out_dir={runs[-1]}"])
    words = ["fit", *runs, f"--out={tmp_path / 'fit'}", "--samples=5", "--costs=flops"]
    remove_structures()
    with pytest.raises(ConfigError, match="structure='banded' is unknown"):
        scaling_laws.main(words)
    scaling_laws.main([*words, own_file])
    groups = json.loads((tmp_path / "fit" / "fit.json").read_text())["groups"]
    assert groups == {"dense": [0, 1, 1], "banded, bands=3": None}


def test_a_sweep_gives_the_file_to_its_runs_and_to_the_fit(own_file, tmp_path, monkeypatch):
    path = tmp_path / "bands.py"
    path.write_text(
        f"config = {own_file!r}\nfit = '--by=structure_options'\n"
        "runs = [dict(structure='banded', structure_options={'bands': b}) for b in (2, 3)]\n"
    )
    plan, called = sweep.read_sweep(str(path)), []
    assert list(plan.runs) == ["structure_optionsbands.2", "structure_optionsbands.3"]
    words = sweep.command_of(plan, "structure_optionsbands.3")
    assert load_config(train.TrainConfig, words[3:]).structure_options == {"bands": 3}
    monkeypatch.setattr(
        sweep.subprocess, "run", lambda words: called.append(words) or type("Done", (), {"returncode": 0})
    )
    assert (
        sweep.fit_runs(plan, str(tmp_path)) == 0 and own_file in called[0] and called[0][-1] == "--by=structure_options"
    )


def test_an_own_structure_is_searched(own_file, tiny, tmp_path, monkeypatch):
    search = pytest.importorskip("lab.search")
    words = [word for word in tiny if not word.startswith("--out_dir")]
    choices = "--choices={'structure': ('banded', 'btt'), 'bands': (2, 3, 9), 'rank': 2}"
    words = [own_file, *words, choices, f"--out={tmp_path / 'search'}", *SHORT]
    search.main([*words, "--trials=1"])
    rows = json.loads((tmp_path / "search" / "search.json").read_text())
    kinds = [row["structure"] for row in rows if row["state"] == "complete"]
    assert len(kinds) == 1 and set(kinds) <= {"banded, bands=2", "banded, bands=3", "banded, bands=9", "btt, rank=2"}
    table = (tmp_path / "search" / "table.md").read_text()
    assert all(kind in table for kind in kinds)
    assert all(own_file in row["command"] for row in rows)
    for wrong, message in (
        ("{'structure': 'banned'}", "structure='banned' is unknown"),
        ("{'structure': 'btt', 'bnds': 3}", "choices: 'bnds' is no option of a structure, choose from"),
        ("{'bands': (2, 3)}", "name the structure"),
        ("{'structure': 'banded', 'bands': ()}", "bands has no values"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(search.SearchConfig, [own_file, *tiny[:1], f"--choices={wrong}"])


def test_options_that_do_not_fit_the_structure_are_one_line(own_file):
    shape = dict(n_layer=1, n_head=2, d_model=16, vocab_size=96)
    load_config(train.TrainConfig, [own_file, "--structure=banded"])
    with pytest.raises(UnusedOption, match="structure_options={'bands': 4} with structure='btt', which has no bands"):
        GPTConfig(**shape, structure="btt", structure_options={"bands": 4})
    with pytest.raises(ConfigError, match="structure_options: rank is a command-line option: give --rank"):
        GPTConfig(**shape, structure="banded", structure_options={"rank": 4})
    with pytest.raises(ConfigError, match="bands=3.*structure='btt', which has none: make it 4, or take banded"):
        make_linear(16, 16, "btt", bands=3)
    with pytest.raises(ConfigError, match="stripes=3: no structure has this option"):
        make_linear(16, 16, "banded", stripes=3)
    theta.STRUCTURES["wide"] = theta.Structure(theta.dense, options={"bands": 5})
    with pytest.raises(
        ConfigError, match="structure 'wide' has the default bands=5, another has 4: make them equal, or rename one"
    ):
        make_linear(16, 16, "wide")


class Plain(torch.nn.Module):
    """A layer that is not derived from CoreLinear."""

    def __init__(self, d_in, d_out, **kwargs):
        super().__init__()


class Uncounted(CoreLinear):
    """A layer without flops_per_token."""

    def __init__(self, d_in, d_out, **kwargs):
        super().__init__(d_in, d_out, [(1, d_in, d_out)], **kwargs)


class WithoutInputFn(Uncounted):
    """A layer whose forward lacks input_fn, the function applied before the matrix."""

    flops_per_token = 0

    def forward(self, x):
        return self.finish(x.flatten(0, -2) @ self.cores[0][0], x)


class ProductOnly(Uncounted):
    flops_per_token = 0

    def product(self, x):
        return x.reshape(-1, self.in_features) @ self.cores[0][0]


@pytest.mark.parametrize(
    "layer, message",
    [
        (Plain, "Plain is not a CoreLinear: derive it from einsum_linear.CoreLinear"),
        (Uncounted, "Uncounted has no flops_per_token: set it"),
        (
            WithoutInputFn,
            "WithoutInputFn.forward takes no `input_fn`.*: write forward.self, x, input_fn=None., or leave forward out",
        ),
    ],
)
def test_a_layer_that_a_model_cannot_use_is_refused_in_one_line(monkeypatch, layer, message):
    structure = theta.Structure(lambda d_in, d_out, options: functools.partial(layer, d_in, d_out))
    monkeypatch.setitem(theta.STRUCTURES, "mine", structure)
    with pytest.raises(ConfigError, match=f"structure='mine': {message}") as caught:
        GPT(GPTConfig(n_layer=1, n_head=2, d_model=16, vocab_size=96, structure="mine"))
    assert "\n" not in str(caught.value)


def test_a_layer_that_defines_only_its_product_works(monkeypatch):
    structure = theta.Structure(lambda d_in, d_out, options: functools.partial(ProductOnly, d_in, d_out))
    monkeypatch.setitem(theta.STRUCTURES, "mine", structure)
    model = GPT(GPTConfig(n_layer=1, n_head=2, d_model=16, vocab_size=96, structure="mine", normalize=False))
    ffn, x = model.blocks[0].ffn, torch.randn(3, 16)
    ffn.down.cores[0].data.normal_()
    want = torch.nn.functional.gelu(x @ ffn.up.cores[0][0], approximate="tanh") @ ffn.down.cores[0][0]
    torch.testing.assert_close(ffn(x), want)
