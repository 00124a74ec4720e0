"""Tests how signals end a run, that lost output does not, and the lines for what a machine lacks; real signals, files."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import train
from configurator import ConfigError, RunFailed
from conftest import ROOT, environment, read_rows
from engine import checkpoint
from engine.device import choose_device
from engine.runlog import RunLog, read_log
from engine.screen import LosableStream, losable_output
from engine.signals import StopSignal

# ---------------------------------------------------------------------------------------
# Signals


@pytest.mark.parametrize("name", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_each_of_three_signals_asks_a_run_to_stop(name):
    said = []
    stop = StopSignal(lambda text, **how: said.append(text))
    assert not stop.asked
    os.kill(os.getpid(), name)
    assert stop.asked and len(said) == 1 and "saving after this step" in said[0]
    assert ("Ctrl-C again" in said[0]) == (name == signal.SIGINT)


def test_a_second_ctrl_c_ends_the_run_at_once_but_one_signal_delivered_twice_does_not(monkeypatch):
    stop, now = StopSignal(lambda text, **how: None), [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    os.kill(os.getpid(), signal.SIGINT)
    now[0] += 0.01  # `timeout` sends the signal to the process and to its group
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)  # a cluster may send SIGTERM several times
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.asked
    now[0] += 1
    with pytest.raises(SystemExit) as ended:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
    assert ended.value.code == 130


def test_a_run_under_nohup_outlives_its_terminal():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopSignal(print)
    os.kill(os.getpid(), signal.SIGHUP)
    assert not stop.asked


# ---------------------------------------------------------------------------------------
# Output

PRINTING = """
import sys
from engine.screen import losable_output
with losable_output():
    for number in range(3):
        print("line", number, "\\u00e9", flush=number == 1)
open(sys.argv[1], "w").write("to the end")
"""


@pytest.mark.parametrize(
    "redirection, said",
    [
        (">/dev/full", "note: stdout cannot be written (No space left on device): the run continues without it\n"),
        ("| true", "note: stdout cannot be written (Broken pipe): the run continues without it\n"),
        (">&-", ""),
        (">&- 2>&-", ""),
        (">/dev/full 2>/dev/full", ""),
        (">/dev/null", ""),
    ],
)
def test_a_process_whose_output_is_lost_runs_to_its_end(tmp_path, redirection, said):
    end, delay = tmp_path / "end", "sleep 0.5; " * ("|" in redirection)  # until the pipe's reader has ended
    line = f"({delay}exec {sys.executable} -c '{PRINTING}' {end}) {redirection}"
    env = environment({"PYTHONIOENCODING": "ascii"})
    done = subprocess.run(["bash", "-o", "pipefail", "-c", line], cwd=ROOT, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, said) and end.read_text() == "to the end"


def test_a_run_without_stdout_trains_to_its_end(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)  # as Python has it where stdout is closed
    train.main([*tiny, "--max_steps=2"])
    assert read_rows(tmp_path / "run")[-1]["step"] == 2


def test_characters_that_cannot_be_encoded_are_escaped_and_the_streams_are_restored(monkeypatch, tmp_path):
    before = sys.stdout
    ascii_only = open(tmp_path / "out", "w", encoding="ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    with losable_output():
        print("läuft")
        assert not sys.stdout.isatty()
    assert sys.stdout is ascii_only and (tmp_path / "out").read_text() == "l\\xe4uft\n"
    monkeypatch.undo()
    assert sys.stdout is before


def test_a_print_from_a_signal_handler_in_the_middle_of_a_print_is_lost():
    class Busy:
        def write(self, text):
            raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stdout>'>")

    assert LosableStream("stdout", Busy()).write("text") == 4


# ---------------------------------------------------------------------------------------
# Memory, files, devices


@pytest.mark.parametrize("error", ["torch", "python"])
def test_running_out_of_memory_on_a_cpu_is_one_line(tiny, monkeypatch, error):
    def forward(*args):
        if error == "python":
            raise MemoryError
        torch.empty(2**60, dtype=torch.uint8)  # more than any machine has

    monkeypatch.setattr(train.GPT, "forward", forward)
    with pytest.raises(RunFailed, match="CPU out of memory with micro_batch=4 .*lower micro_batch.*no checkpoint"):
        train.main(tiny)


def test_a_fifo_in_place_of_a_file_is_refused_without_waiting(tiny, tmp_path):
    out_dir = tmp_path / "run"
    out_dir.mkdir()
    os.mkfifo(out_dir / "log.jsonl")
    for read in (lambda: read_log(out_dir / "log.jsonl"), lambda: RunLog(out_dir, resume_step=3)):
        with pytest.raises(ConfigError, match="log.jsonl is not a regular file: remove it"):
            read()
    os.mkfifo(out_dir / "ckpt.pt")
    said = []
    with pytest.raises(RunFailed, match="no whole checkpoint"):
        checkpoint.load(out_dir, say=said.append)
    assert "ckpt.pt is not a regular file" in said[0]
    (out_dir / "ckpt_prev.dcp").mkdir()
    os.mkfifo(out_dir / "ckpt_prev.dcp" / "manifest.json")
    with pytest.raises(RunFailed, match="no whole checkpoint"):
        checkpoint.load(out_dir, say=said.append)


def test_a_missing_or_busy_device_is_one_line(monkeypatch):
    for name in ("tpu", "cuda:x", "cuda:-2", ""):
        with pytest.raises(ConfigError, match=f"device='{name}' is unknown: auto, cuda, cpu or mps"):
            choose_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="device=cuda:7: there is no GPU 7, torch sees 2: take --device=cuda$"):
        choose_device("cuda:7")
    with pytest.raises(ConfigError, match="there is no GPU 2, torch sees 2: lower --nproc_per_node to 2"):
        choose_device("cuda", local_rank=2)

    def busy(device):
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable\nmore lines")

    monkeypatch.setattr(torch.cuda, "set_device", busy)
    with pytest.raises(ConfigError, match=r"GPU 1 cannot be used \(CUDA error: all .* unavailable\): take") as caught:
        choose_device("cuda:1")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["0", "-1", "1e400", "1e7", "inf", "nan", "None"])
def test_a_timeout_that_no_clock_can_count_is_one_line(tiny, text):
    with pytest.raises(ConfigError, match="timeout="):
        train.main([*tiny, f"--timeout={text}"])
