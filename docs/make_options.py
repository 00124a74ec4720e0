"""docs/options.md, from the dataclasses that hold the options.

    python docs/make_options.py

A field's comment is what it means. The source is read, not imported: this takes no torch and a fraction of a second.
"""

import ast
import functools
import pathlib
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "options.md"

# Command: the classes whose fields are its options, as MODULE.CLASS.
COMMANDS = {
    "train": ["options.TrainConfig"],
    "sample": ["sample.SampleConfig"],
    "prepare_owt": ["prepare_owt.PrepareConfig"],
    "einsum_linear": ["lab.structures.StructuresConfig"],
    "vision.train": ["vision.train.ImageTrainConfig"],
    "vision.regression": ["vision.regression.RegressionConfig"],
    "vision.data": ["vision.data.PixelsConfig"],
    "lab.sweep": ["lab.sweep.SweepConfig"],
    "lab.scaling_laws plot": ["lab.scaling_laws.PlotConfig"],
    "lab.scaling_laws fit": ["lab.scaling_laws.FitConfig"],
    "lab.scaling_laws rates": ["lab.scaling_laws.RatesConfig"],
    "lab.coverage": ["lab.coverage.CoverageConfig"],
    "lab.search": ["lab.search.SearchConfig"],
    "lab.convert": ["lab.convert.ConvertConfig"],
    "lab.mup_check coords": ["lab.mup_check.CoordsConfig"],
    "lab.mup_check depth": ["lab.mup_check.DepthConfig"],
    "lab.mup_check lr_landscape": ["lab.mup_check.LandscapeConfig"],
    "lab.bench step": ["lab.bench_options.StepConfig"],
    "lab.bench image_step": ["vision.train.ImageTrainConfig", "lab.bench_options.TimingConfig"],
    "lab.bench layers": ["lab.bench_options.LayersConfig"],
    "lab.bench mixtures": ["lab.bench_options.MixturesConfig"],
    "lab.bench sample": ["lab.bench_options.SampleBenchConfig"],
    "lab.bench data": ["lab.bench_options.DataBenchConfig"],
    "lab.bench images": ["vision.train.ImageTrainConfig"],
}


class OptionsClass(NamedTuple):
    """A dataclass of options, as its source has it."""

    name: str  # MODULE.CLASS
    bases: list  # the same, of those among its bases that hold options
    own: dict  # {option: (default, as in the source, and what it means)}
    removed: set  # inherited fields that are no options here: those made a ClassVar


def main():
    PAGE.write_text(page(), encoding="utf-8")


def page():
    """The text of docs/options.md."""
    lines = [
        "# Options", "",
        "Made by `python docs/make_options.py` from the comments in the code. `--help` behind a command prints the same.",
        "Options are Python assignments in config files, then `--key=value`; later ones win.", "",
        "| command | its options |", "|---|---|",
    ]  # fmt: skip
    shown = []
    for command, names in COMMANDS.items():
        classes = list(dict.fromkeys(each for name in names for each in [name, *ancestors(name)]))
        classes = [name for name in classes if read_class(name).own]
        shown += [name for name in classes if name not in shown]
        lines.append(f"| `{invocation(command)}` | {', '.join(f'[{name}](#{anchor(name)})' for name in classes)} |")
    lines += ["", "Where two classes of a command have an option, the first named has its default."]
    for name in shown:
        here = read_class(name)
        lines += ["", f"## {name}", ""]
        if here.removed:
            lines += [f"Without {', '.join(f'`{option}`' for option in sorted(here.removed))}.", ""]
        lines += ["| option | default | meaning |", "|---|---|---|"]
        lines += [f"| `{option}` | `{cell(default)}` | {cell(text)} |" for option, (default, text) in here.own.items()]
    return "\n".join(lines) + "\n"


def invocation(command):
    script, *words = command.split()
    return " ".join(["python", f"-m {script}" if "." in script else f"{script}.py", *words])


def options_of(command):
    """The options of a command of COMMANDS, a set of names."""
    return set().union(*(all_fields(name) for name in COMMANDS[command]))


def all_fields(name):
    here = read_class(name)
    return set().union(*map(all_fields, here.bases)) - here.removed | set(here.own)


def ancestors(name):
    """The classes that `name` inherits options from, nearest first."""
    return [each for base in read_class(name).bases for each in [base, *ancestors(base)]]


@functools.cache
def read_class(name):
    module, _, class_name = name.rpartition(".")
    source, tree = read_module(module)
    (node,) = (each for each in tree.body if isinstance(each, ast.ClassDef) and each.name == class_name)
    bases = [resolve(tree, module, ast.unparse(base)) for base in node.bases]
    own, removed, lines = {}, set(), source.splitlines()
    for field in node.body:
        if not isinstance(field, ast.AnnAssign):
            continue
        if "ClassVar" in ast.unparse(field.annotation):
            removed |= {field.target.id} if field.value is None else set()
        else:
            comment = lines[field.target.lineno - 1].partition("  # ")[2]
            own[field.target.id] = (ast.unparse(field.value), comment.strip())
    return OptionsClass(name, [base for base in bases if base], own, removed)


@functools.cache
def read_module(module):
    source = (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
    return source, ast.parse(source)


def resolve(tree, module, written):
    """MODULE.CLASS of a base as it is written in `module`, or None where it is not the project's."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == written:
            return f"{module}.{written}"
        if isinstance(node, ast.ImportFrom) and written in [alias.asname or alias.name for alias in node.names]:
            return f"{node.module}.{written}"
        if isinstance(node, ast.Import) and written.rpartition(".")[0] in [alias.name for alias in node.names]:
            return written
    return None


def cell(text):
    return text.replace("|", "\\|")


def anchor(name):
    return name.lower().replace(".", "")


if __name__ == "__main__":
    main()
