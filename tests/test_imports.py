"""Tests that files import from lower layers only, against the order in LAYERS: each can be read with those below it."""

import ast
import pathlib

from conftest import ROOT

# Lowest first. A file of a layer may import from its own folder and from lower layers.
LAYERS = (
    "configurator", "theta", "options", "kernels", "einsum_linear", "text_files", "data", "moe", "prepare_owt", "model",
    "generate", "optim", "engine", "sample", "train", "vision.options", "vision", "lab",
)  # fmt: skip


def layer_of(module):
    names = (".".join(module.split(".")[:depth]) for depth in (2, 1))
    return next((LAYERS.index(name) for name in names if name in LAYERS), None)


def test_files_import_downwards_only():
    root = pathlib.Path(ROOT)
    files = [path for folder in (".", "kernels", "engine", "vision", "lab") for path in (root / folder).glob("*.py")]
    for path in files:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        here = layer_of(module)
        assert here is not None, f"{module} has no layer"
        for node in ast.parse(path.read_text()).body:  # imports within functions may go upwards
            for name in imported_names(node):
                there = layer_of(name)
                assert there is None or there < here or name.split(".")[0] == module.split(".")[0], (
                    f"{module} imports {name}"
                )


def imported_names(node):
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return []
