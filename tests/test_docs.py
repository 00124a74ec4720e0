"""Tests the pages against the code: links, files, commands and options exist, and imported packages are declared."""

import ast
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib

import pytest

from configurator import help_text
from conftest import ROOT
from docs import make_options

ROOT = pathlib.Path(ROOT)
RESULTS = [path for path in sorted(ROOT.glob("results/**/*.md")) if path.name != "table.md"]  # a fit writes table.md
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md")), *RESULTS]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 170


@each_page
def test_links_lead_somewhere(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if target.startswith(("http://", "https://")):
            continue
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{target} does not exist"
        if anchor and there.suffix == ".md":
            assert anchor in anchors(there.read_text()), f"{target}: no such heading"


def anchors(text):
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# Files that a page may name although they are not in the tree: a run, a command or a user makes them.
MADE = re.compile(
    r"(out|data|runs?|my_\w+|wandb|hf_folder)/|\.venv|(log|ckpt\w*|train|val|meta|config|search|fit|before|loss|experts)\.(jsonl|png|pt|bin|json|md)"
    r"|table\.md|lr\.png|coords\.png|runs\.png|ckpt\.pt|vocab\.bpe|encoder\.json|my_text\.txt|baseline\.json|lr_landscape\.png"
)


@each_page
def test_files_that_a_page_names_exist(page):
    """Checks all words in `code` and in commands that look like a file of the project."""
    text = page.read_text()
    named = set(re.findall(r"`([\w./-]+\.(?:py|sh|md|json|txt|log|png|xz|cff|toml))`", text))
    for words in commands(text):
        named |= {word for word in words if re.fullmatch(r"[\w./-]+\.(py|sh)", word)}
    for name in sorted(named):
        if not MADE.match(name):
            places = (page.parent / name, ROOT / name, ROOT / "tests" / name, ROOT / "vision" / name)
            assert any(place.exists() for place in places), f"{name} does not exist"


def commands(text):
    """The words of each command in a page's indented blocks. A \\ at the end joins lines; comments are left out."""
    lines = re.findall(r"^ {4}(\S.*)$", text.replace("\\\n", " "), re.MULTILINE)
    found, variables = [], {}
    for line in lines:
        line = re.sub(r"\s+# .*", "", line)
        for name, value in variables.items():
            line = re.sub(rf"\${name}\b", lambda _, value=value: value, line)
        for part in re.split(r"""&& |\| |; (?=(?:[^"]*"[^"]*")*[^"]*$)""", line):  # a ; within quotes separates nothing
            words = split(part)
            assigned = [word.partition("=") for word in words if re.match(r"[A-Z]=", word)]
            variables |= {name: value for name, _, value in assigned}
            if words and not assigned and re.match(r"(\w+=\S+ )*(python|torchrun|sbatch)", part):
                found.append(words)
    return found


def split(line):
    try:
        return shlex.split(line, comments=True)
    except ValueError:  # an argument whose quotes are not closed
        return line.split()


def invocation(words):
    """(key of make_options.COMMANDS, its arguments), or None if the words run no script of the project."""
    words = list(words)
    if "slurm.sh" in words:  # like slurm.sh: the first word may be a script
        words = words[words.index("slurm.sh") + 1 :]
        words = words if (ROOT / words[0]).is_file() and "config" not in words[0] else ["train.py", *words]
    for at, word in enumerate(words):
        if word == "-m" and words[at + 1] != "venv":
            script, rest = words[at + 1], words[at + 2 :]
            assert (ROOT / f"{script.replace('.', '/')}.py").is_file(), f"{shlex.join(words)}: no such module"
        elif word.endswith(".py") and not word.startswith("-"):
            script, rest = word.removesuffix(".py").replace("/", "."), words[at + 1 :]
        else:
            continue
        if script.split(".")[0] in ("results", "tests", "docs"):  # scripts without a dataclass of options
            return None
        return (f"{script} {rest[0]}", rest[1:]) if script in WITH_COMMANDS and rest else (script, rest)
    return None


WITH_COMMANDS = {command.split()[0] for command in make_options.COMMANDS if " " in command}


@each_page
def test_commands_name_options_that_exist(page):
    for words in commands(page.read_text()):
        called = invocation(words)
        if called is None:
            continue
        command, arguments = called
        assert command in make_options.COMMANDS, f"{shlex.join(words)}: no such command"
        options = make_options.options_of(command)
        for word in arguments:
            if word.startswith("--") and word != "--help":
                assert word[2:].partition("=")[0] in options, f"{shlex.join(words)}: {command} has no option {word}"
            elif word.endswith(".py") and not MADE.match(word):
                assert (ROOT / word).is_file(), f"{shlex.join(words)}: {word} does not exist"


def test_the_commands_of_readme_are_found():
    """So the checks above do check something."""
    found = [invocation(words) for words in commands((ROOT / "README.md").read_text())]
    assert len([each for each in found if each]) >= 15
    assert ("train", ["config/gpt2_btt.py", "--resume"]) in found
    assert invocation(split("torchrun --nproc_per_node=8 -m lab.bench step config/x.py")) == (
        "lab.bench step",
        ["config/x.py"],
    )


def test_the_options_page_is_up_to_date():
    assert make_options.PAGE.read_text() == make_options.page(), "run: python docs/make_options.py"


def test_the_options_page_says_the_same_as_help():
    """Checks two dataclasses of options; tests/test_configurator.py checks the help of all commands."""
    from options import GPTConfig
    from vision.options import ImageConfig

    for Config in (GPTConfig, ImageConfig):
        name = f"{Config.__module__}.{Config.__name__}"
        said = dict(re.findall(r"^  --(\w+)=.*?  +(.*)$|^", help_text(Config), re.MULTILINE))
        said.pop("", None)
        assert said.keys() <= make_options.all_fields(name) and len(said) > 20
        for option, (_, text) in make_options.read_class(name).own.items():
            assert said.get(option, text) == text


def test_the_options_page_has_every_command():
    """Every dataclass that a file hands to load_config belongs to a command."""
    listed = {name for names in make_options.COMMANDS.values() for name in names}
    for path in [*ROOT.glob("*.py"), *ROOT.glob("lab/*.py"), *ROOT.glob("vision/*.py")]:
        module, source = ".".join(path.relative_to(ROOT).with_suffix("").parts), path.read_text()
        for name in set(re.findall(r"load_config(?:, |\()(\w+)", source)) - {"GPTConfig"}:
            if re.search(rf"^class {name}\b", source, re.MULTILINE):
                assert f"{module}.{name}" in listed, f"docs/make_options.py lacks {module}.{name}"


# ---------------------------------------------------------------------------------------
# Declared packages are those imported

PACKAGE_OF = {"PIL": "pillow", "sklearn": "scikit-learn", "tiktoken_ext": "tiktoken"}
WITHOUT_IMPORT = {"pytest-xdist", "ruff", "cmaes"}  # a plugin, a command, and a package that optuna imports
UNDECLARED = {"torchvision"}  # the option that needs it explains how to install it


def imported_packages(*patterns, nodes=None):
    """The packages that these files import, without the project's and Python's own.

    nodes(tree) gives the statements that count; by default all do.
    """
    files = [path for pattern in patterns for path in ROOT.glob(pattern)]
    ours = {path.stem for pattern in ("*.py", "tests/**/*.py") for path in ROOT.glob(pattern)}
    ours |= {path.parent.name for path in ROOT.glob("*/__init__.py")} | {"docs"}
    found = set()
    for path in files:
        for node in (nodes or statements)(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for name in {name.partition(".")[0] for name in names} - ours - set(sys.stdlib_module_names):
                found.add(PACKAGE_OF.get(name, name))
    return found


def statements(tree):
    """Every statement of a file, those within functions included."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        for name in ("body", "orelse", "finalbody", "handlers"):
            inner = getattr(node, name, [])
            waiting += inner if isinstance(inner, list) else []


def package_names(requirements):
    return {re.match(r"[\w-]+", line)[0].lower() for line in requirements} - {"nanoeinsum"}


def test_declared_packages_are_those_imported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    in_project = package_names([*project["dependencies"], *(each for extra in extras.values() for each in extra)])
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pinned = package_names([line for line in lines if line and not line.startswith("#")])
    imported = imported_packages("*.py", "kernels/*.py", "engine/*.py", "lab/*.py", "vision/*.py", "tests/**/*.py")
    wanted = imported - UNDECLARED
    assert in_project - WITHOUT_IMPORT == wanted and pinned - WITHOUT_IMPORT == wanted
    assert in_project & pinned >= WITHOUT_IMPORT


def test_a_gpt_trains_without_extras():
    """Every package that files in the root and in engine/ import at the top is a dependency, not an extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    imported = imported_packages("*.py", "engine/*.py", nodes=lambda tree: tree.body)
    assert imported <= package_names(project["dependencies"])


def test_pyproject_names_every_module_and_package():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert set(setup["py-modules"]) == {path.stem for path in ROOT.glob("*.py")}
    assert set(setup["packages"]) == {path.parent.name for path in ROOT.glob("*/__init__.py")}


def test_packed_logs_hold_runs():
    """Each unpacks to a folder named like its study, with the two files of every run that a fit reads."""
    archives = sorted(ROOT.glob("results/**/*.tar.xz"))
    assert len(archives) >= 11
    for path in archives:
        listed = subprocess.run(["tar", "tf", path], capture_output=True, text=True, check=True).stdout.split()
        runs = {name.rpartition("/")[0] for name in listed if name.endswith("log.jsonl")}
        assert runs and {f"{run}/config.json" for run in runs} <= set(listed)
        assert {name.partition("/")[0] for name in listed} == {path.name.removesuffix(".tar.xz")}


# ---------------------------------------------------------------------------------------
# Scripts beside the results


def test_scripts_of_results_import_names_that_exist():
    """They need GPUs or minutes, so no other test runs them all. baseline.py is left out: it is for an old commit."""
    scripts = [path for path in ROOT.glob("results/**/*.py") if path.name != "baseline.py"]
    assert len(scripts) >= 6
    for path in scripts:
        for node in statements(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and (file := module_file(node.module)):
                missing = {alias.name for alias in node.names} - names_defined(file)
                assert not missing, f"{path.name} imports {missing} from {node.module}"


def module_file(module):
    file = ROOT / f"{module.replace('.', '/')}.py"
    return file if file.is_file() else ROOT / module if (ROOT / module / "__init__.py").is_file() else None


def names_defined(file):
    """The names at a module's top level, or the modules of a package."""
    if file.is_dir():
        return {path.stem for path in file.glob("*.py")}
    names = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)}
    return names


# What shows each item of "What can go wrong", by its heading: faults of tests/faults.py, and tests.
SHOWN_BY = {
    "Kills": "kills kills_fsdp rank_killed_writing ckpt_bit ckpt_key ckpt_chunk ckpt_nan"
    " test_a_save_killed_at_any_stage_leaves_a_whole_checkpoint",
    "Signals": "test_sigterm_and_sigint_save_and_end_the_run_cleanly hangup interrupted_twice launcher_killed asked_to_save"
    " asked_to_save_ddp"
    " test_a_run_under_nohup_outlives_its_terminal",
    "Two runs in one folder": "together SIGKILL test_a_run_in_the_folder_of_a_living_one_is_refused"
    " test_a_file_system_without_locks_is_noted folder_above test_only_a_runs_own_files_are_set_aside",
    "Hangs and restarts": "restarted_early hang hang_alone hang_writing test_a_debugger_may_wait_for_its_user",
    "Mistakes": "ranks_differ test_other_data_on_one_rank_ends_all test_every_option_and_the_code_are_compared nodes_apart",
    "Numbers": "nan val_nan all_nan test_a_signal_does_not_make_a_run_save_non_finite_weights",
    "Files": "read_errors read_error test_a_failed_read_is_retried_and_not_taken_for_damage"
    " data_cut data_cut_ddp data_replaced"
    " stdout_full stdout_unread stdout_ascii test_a_run_without_stdout_trains_to_its_end ckpt_evil ckpt_evil_fsdp"
    " test_code_in_a_file_is_not_run test_code_in_a_directory_is_not_run",
    "Hostile values": "test_cases_that_failed_once test_programs_in_the_place_of_config_and_sweep_files"
    " test_texts_in_the_place_of_any_option",
}


def test_what_can_go_wrong_is_what_tests_show():
    text = (ROOT / "docs/running.md").read_text().partition("## What can go wrong")[2].partition("\n## ")[0]
    assert re.findall(r"^\*\*(.+?)\.\*\*", text, re.MULTILINE) == list(SHOWN_BY)
    sources = {path: path.read_text() for path in ROOT.glob("tests/**/*.py") if path.name != "test_docs.py"}
    tests = {name for source in sources.values() for name in re.findall(r"^def (test_\w+)", source, re.MULTILINE)}
    faults = set(re.findall(r'"(\w+)"', sources[ROOT / "tests/faults.py"].partition("def table(")[2]))
    for name in " ".join(SHOWN_BY.values()).split():
        assert name in (tests if name.startswith("test_") else faults), f"there is no {name}"


def test_names_to_edit_exist():
    """In README's table "To change X, edit Y", every name in backticks after a file is in that file."""
    table = (ROOT / "README.md").read_text().partition("## To change X, edit Y")[2].partition("## ")[0]
    pairs = [
        (path, name)
        for path, rest in re.findall(r"\]\(([\w/]+\.py)\)((?:[^\[|]|\[(?!\w))*)", table)
        for name in re.findall(r"`(\w+(?:\.\w+)?)`", rest)
    ]
    assert ("optim.py", "make_optimizers") in pairs and ("model.py", "FFN.forward") in pairs
    for path, name in pairs:
        owner, _, method = name.rpartition(".")
        source = (ROOT / path).read_text()
        assert not owner or re.search(rf"^class {owner}\b", source, re.MULTILINE), f"{path} has no {owner}"
        found = re.search(rf"^\s*(?:def|class) {method}\b|^{method} = ", source, re.MULTILINE)
        assert found, f"{path} has no {name}"
