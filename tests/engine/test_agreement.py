"""Tests that ranks with different options, code, data or world sizes all end with one line; real processes, gloo."""

import os
import re
import shutil
from dataclasses import fields

import numpy as np
import pytest
import torch

from configurator import read_config_file
from conftest import run_forked, run_script
from engine.agreement import MAY_DIFFER, describe_array, facts_of_run, first_difference
from engine.parallel import ranks
from options import TrainConfig

SCRIPT = """
import os, sys, types
import configurator, train
configurator.time = types.SimpleNamespace(sleep=lambda seconds: None)  # rank 1 does not wait for rank 0 to print
words = sys.argv[1:]
if os.environ["RANK"] == "0":
    words.pop()  # the last word is for rank 1 only
try:
    train.main(words)
except SystemExit as error:
    print("ended", error, flush=True)
    raise
"""


@pytest.fixture
def start_differing(tmp_path, tiny):
    """start_differing(word) -> how two ranks ended, of which only the second was given this word."""
    script = tmp_path / "differing.py"
    script.write_text(SCRIPT)
    return lambda word: run_forked(str(script), *tiny, word, processes=2)


def check_ended(done, difference):
    assert done.returncode == 1 and done.stdout.count("ended") == 2
    said = [line for line in done.stderr.splitlines() if difference in line]
    assert len(said) == 2 and said[0].startswith("error: "), done.stderr  # rank 0 and rank 1
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 2, done.stderr


@pytest.mark.parametrize(
    "word, difference",
    [
        ("--lr=5e-5", "rank 1 has --lr=5e-05, rank 0 has --lr=0.005"),
        ("--resume", "rank 1 has --resume=True, rank 0 has --resume=False"),
        ("--shard=fsdp", "rank 1 has --shard='fsdp', rank 0 has --shard='none'"),
    ],
)
def test_another_option_on_one_rank_ends_all(start_differing, word, difference):
    check_ended(start_differing(word), difference)


def test_other_data_on_one_rank_ends_all(start_differing, char_data, tmp_path):
    folder = shutil.copytree(char_data, tmp_path / "other")
    with open(folder / "train.bin", "r+b") as file:
        file.seek(1000)
        file.write(b"other text")
    check_ended(start_differing(f"--data_dir={folder}"), "rank 1 has data with train_fingerprint ")


def test_the_same_data_in_another_folder_is_accepted(start_differing, char_data, tmp_path):
    done = start_differing(f"--data_dir={shutil.copytree(char_data, tmp_path / 'copy')}")
    assert done.returncode == 0, done.stderr


def test_every_option_and_the_code_are_compared(tmp_path):
    config = TrainConfig(structure="dense")
    facts = facts_of_run({field.name: getattr(config, field.name) for field in fields(config)}, torch.device("cpu"))
    assert {f"--{field.name}" for field in fields(config)} - facts.keys() == {f"--{name}" for name in MAY_DIFFER} - {
        "--device",
        "--workers",
    }
    assert facts["--device"] == "cpu" and facts["--seed"] == 1337
    assert {"train.py", os.path.join("engine", "agreement.py"), "torch", "Python"} <= facts.keys()
    assert not any(name.startswith("tests") for name in facts)
    path = tmp_path / "own.py"
    for contents in (
        "def bands(): return 2",
        "def bands(): return 3",
    ):  # a user's own structure: its code differs, no option does
        path.write_text(contents)
        read_config_file(str(path))
        facts, before = facts_of_run({}, torch.device("cpu")), facts
    assert facts[str(path)] != before[str(path)]


def test_the_first_difference_names_ranks_and_both_values():
    same = {"--lr": 0.1, "--theta": [1, 2], "train.py": "CRC 00000000"}
    assert first_difference([same, dict(same), dict(same)]) is None
    others = [same, {**same, "train.py": "CRC 1"}, {**same, "--lr": 0.2}, {**same, "--lr": 0.2}]
    assert first_difference(others) == "ranks 2, 3 have --lr=0.2, rank 0 has --lr=0.1"
    assert first_difference(others[:2]) == "rank 1 has train.py CRC 1, rank 0 has train.py CRC 00000000"
    without = {"--lr": 0.1, "--theta": [1, 2]}
    assert "rank 1 has train.py missing" in first_difference([same, without])


def test_descriptions_of_arrays_differ_with_length_and_content():
    small, large = np.arange(100), np.zeros(5_000_000, np.uint8)
    changed, later = small.copy(), large.copy()
    changed[50], later[-1] = 0, 1
    descriptions = [describe_array(array) for array in (small, changed, small[:99], large, later, large[:-1])]
    assert len(set(descriptions)) == 6 and descriptions[0].startswith("800 bytes, CRC ")
    assert describe_array(large) == describe_array(large.copy())


def test_a_mistake_on_another_machine_is_printed_there(tiny):
    """Before the ranks have joined: the first rank of each machine prints it."""
    env = {"RANK": "9", "LOCAL_RANK": "0", "WORLD_SIZE": "16"}
    done = run_script("train.py", *tiny, "--n_head=5", env=env)
    assert done.returncode == 1 and done.stderr.count("error: rank 9: ") == done.stderr.count("\n") == 1


def test_a_mistake_of_one_rank_alone_is_printed_unless_torchrun_ends_it_first(tmp_path, processes=2):
    """A config file that fails on rank 1 only: on both, rank 0 speaks for all."""
    (tmp_path / "config.py").write_text("import os\nif int(os.environ['RANK']) >= int(os.environ['FIRST']): exit()\n")
    code = "import configurator; configurator.as_script(lambda words: configurator.read_config_file(words[0]))"
    (tmp_path / "script.py").write_text(code)
    for first, rank in (("1", "rank 1: "), ("0", "")):
        done = run_script(tmp_path / "script.py", tmp_path / "config.py", env={"FIRST": first}, processes=processes)
        said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        line = f"error: {rank}config file {tmp_path}/config.py does not run: it calls exit()"
        assert done.returncode == 1 and said == [line], done.stderr


JOIN = """
import os, torch
from engine.heartbeat import init_distributed
os.environ["WORLD_SIZE"] = os.environ["WORLDS"].split()[int(os.environ["RANK"])]
try:
    init_distributed(torch.device("cpu"), timeout=5)
except SystemExit as error:
    print(error, flush=True)
    raise
"""


@pytest.mark.parametrize("worlds", ["2 3", "3 2"])
def test_different_world_sizes_end_all_ranks(tmp_path, monkeypatch, worlds):
    script = tmp_path / "join.py"
    script.write_text(JOIN)
    monkeypatch.setenv("WORLDS", worlds)
    done = run_forked(str(script), processes=2)
    first, second = worlds.split()
    line = (
        f"rank 1 has WORLD_SIZE={second}, rank 0 has WORLD_SIZE={first}: start all ranks with the same number of nodes"
    )
    assert done.returncode == 1 and done.stdout.count(line) == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "variables, words",
    [
        (dict(RANK="abc"), "RANK=abc"),
        (dict(RANK="-1"), "RANK=-1"),
        (dict(WORLD_SIZE="2"), "WORLD_SIZE=2 without RANK"),
        (dict(WORLD_SIZE="0", RANK="0"), "WORLD_SIZE=0"),
        (dict(WORLD_SIZE="2", RANK="2"), "RANK=2"),
        (dict(RANK="1"), "RANK=1, LOCAL_RANK=0, WORLD_SIZE=1"),
        (dict(WORLD_SIZE="two", LOCAL_RANK="x"), "LOCAL_RANK=x, WORLD_SIZE=two"),
    ],
)
def test_variables_that_torchrun_would_not_set_are_refused(monkeypatch, variables, words):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert ranks() == (0, 0, 1)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=re.escape(words)) as raised:
        ranks()
    assert "torchrun" in str(raised.value) and raised.value.code != 0


@pytest.mark.parametrize("port", [None, "abc", "70000"])
def test_an_invalid_port_is_refused(monkeypatch, port):
    from engine.heartbeat import init_distributed

    for name, value in dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=port).items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=f"MASTER_PORT={port}.* torchrun"):
        init_distributed(torch.device("cpu"), timeout=1)
