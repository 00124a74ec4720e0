"""A fixed part of fuzz.py: cases that failed once, and its programs and texts where they are read, without what follows."""

from dataclasses import fields

import pytest
from fuzz import PROGRAMS, TEXTS, run_cases

from configurator import ConfigError, load_config
from lab.sweep import read_sweep
from options import TrainConfig

FAILED_ONCE = [
    ["bench_draw", {}, [["layers.json", "field", 0.8, "remove", 29]]],
    ["bench_draw", {}, [["layers.json", "fifo", 0.5, 5]]],
    ["sweep", {}, [["sweep.py", "fifo", 0.5, 5]]],
    ["sweep", {}, [["sweep.py", "program", "exit()"]]],
    ["config_file", {}, [["config.py", "fifo", 0.5, 5]]],
    ["config_file", {}, [["config.py", "program", "exit()"]]],
    ["structures", {"d_in": "9223372036854775807"}, []],
    ["structures", {"plot": "\udcff.png"}, []],
    ["coords", {"n_layer": "65537"}, []],
    ["coords", {"widths": "[[[]]]"}, []],
    ["depth", {"n_layers": "[[[]]]"}, []],
    ["prepare", {"max_document": "9223372036854775807"}, []],
    ["nanogpt", {}, [["nanogpt/meta.json", "field", 0.2419358366085933, "value", 14]]],
    ["train", {"overrides": "{[]: 1}"}, []],
]


def test_cases_that_failed_once():
    count, failures = run_cases(seconds=240, seed=1, cases=FAILED_ONCE)
    assert not failures and count == len(FAILED_ONCE), failures


@pytest.mark.parametrize("read", [lambda path: load_config(TrainConfig, [path]), read_sweep])
def test_programs_in_the_place_of_config_and_sweep_files(tmp_path, monkeypatch, read):
    """KeyboardInterrupt, which as_script answers, aside."""
    monkeypatch.chdir(tmp_path)
    refused = 0
    for number, text in enumerate(program for program in PROGRAMS if "KeyboardInterrupt" not in program):
        path = f"{number}.py"
        (tmp_path / path).write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            read(path)
        except ConfigError as error:
            refused += 1
            assert "\n" not in error.message and len(error.message) < 2000
    assert refused > len(PROGRAMS) // 2


def test_texts_in_the_place_of_any_option():
    refused, names = 0, [field.name for field in fields(TrainConfig)]
    for number, name in enumerate(names):
        for text in TEXTS[number % 5 :: 5]:
            try:
                load_config(TrainConfig, [f"--{name}={text}"])
            except ConfigError as error:
                refused += 1
                assert "\n" not in error.message and len(error.message) < 2000
    assert refused > len(names) * len(TEXTS) // 10
