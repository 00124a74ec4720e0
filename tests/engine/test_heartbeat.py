"""Tests that a hanging rank ends the run and is named, and that slow ranks are left alone; real processes, gloo."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from conftest import environment, run_forked
from engine.heartbeat import Watchdog, find_hung

TIMEOUT = 3  # seconds without a beat; the start of the processes does not count
SCRIPT = f"""
import os, signal, sys, time
import torch
import torch.distributed as dist
from engine.heartbeat import init_distributed

def act(step):
    if what == "sleep" and rank == 1 and step == 5:
        time.sleep(1000)
    if what == "sleep_once" and rank == 1 and step == 5 and watchdog.restarts == 0:
        time.sleep(1000)
    if what.startswith("stop") and what.endswith(str(rank)) and step == 5:
        os.kill(os.getpid(), signal.SIGSTOP)
    if what == "works" and step == 5:
        if rank == 0:
            for piece in range(10):
                time.sleep({TIMEOUT} / 5)
                watchdog.show_life()
        watchdog.beat()
    if what == "hangs_in_work" and step == 5:
        if rank == 0:
            time.sleep(1000)
        watchdog.beat()
    if what == "slow" and rank == 1 and step < 2:
        time.sleep({TIMEOUT} / 2)
    if what == "slow" and rank == 1 and step == 5:
        with watchdog.paused():
            time.sleep({TIMEOUT} * 1.4)

what, rank = sys.argv[1], int(os.environ["RANK"])
print("pid", os.getpid(), flush=True)
watchdog = init_distributed(torch.device("cpu"), timeout={TIMEOUT})
for step in range(10):
    watchdog.beat(step)
    act(step)
    watchdog.beat()
    dist.all_reduce(torch.ones(1))
if what == "late" and rank == 0:
    time.sleep(2)  # as if it were still in the last collective
    print("late", time.monotonic(), flush=True)
watchdog.stop()
print("left", time.monotonic(), flush=True)
dist.destroy_process_group()
print(f"rank {{rank}} through after {{watchdog.restarts}} restarts\\n", end="", flush=True)  # a single write keeps the line whole
"""


@pytest.fixture
def torchrun(tmp_path):
    """torchrun(what) -> exit status, stdout, stderr, seconds; it checks that no process is left."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    def run(what, *options):
        started = time.monotonic()
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *options]
        done = subprocess.run(
            [*launcher, str(script), what], capture_output=True, text=True, timeout=100, env=environment({})
        )
        seconds = time.monotonic() - started
        assert not [pid for pid in re.findall(r"pid (\d+)", done.stdout) if os.path.exists(f"/proc/{pid}")]
        return done.returncode, done.stdout, done.stderr, seconds

    return run


@pytest.fixture
def start_ranks(tmp_path):
    """start_ranks(what) -> two processes without torchrun; rank 0 hosts the store."""
    script, processes = tmp_path / "script.py", []
    script.write_text(SCRIPT)

    def start(what):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
        for rank in range(2):
            env = environment({**address, "RANK": str(rank)})
            processes.append(subprocess.Popen(
                [sys.executable, str(script), what], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
            ))  # fmt: skip
        return processes

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def error_lines(stderr):
    return [line for line in stderr.splitlines() if line.startswith("error:")]


def test_a_rank_that_sleeps_ends_the_run_and_is_named(torchrun):
    status, _, stderr, seconds = torchrun("sleep")
    assert status != 0
    assert seconds < TIMEOUT + 60  # the start of three Python processes included
    (line,) = error_lines(stderr)
    assert line.startswith(f"error: rank 1 made no progress for {TIMEOUT} s (rank 1 at step 5, script.py:")
    assert "in act; rank 0 at step 5, script.py:" in line and f"--timeout={TIMEOUT}" in line
    assert "Connection closed by peer" not in stderr
    assert re.search(r"Root Cause.*?rank +: 1 ", stderr, re.S), stderr


def test_a_hang_in_the_first_attempt_only_is_restarted(torchrun):
    status, stdout, stderr, _ = torchrun("sleep_once", "--max-restarts=1")
    assert status == 0, stderr
    assert len(error_lines(stderr)) == 1 and "rank 1 made no progress" in stderr
    assert "rank 0 through after 1 restarts" in stdout and "rank 1 through after 1 restarts" in stdout


def test_slow_steps_and_a_long_pause_do_not_end_the_run(torchrun):
    status, stdout, stderr, seconds = torchrun("slow")
    assert status == 0, stderr
    assert stdout.count("through after 0 restarts") == 2
    assert seconds > 2.4 * TIMEOUT
    assert stderr == ""


def test_a_rank_that_works_while_others_wait_is_not_ended_as_long_as_it_shows_life(torchrun):
    status, stdout, stderr, seconds = torchrun("works")
    assert status == 0 and stderr == "", stderr
    assert seconds > 2 * TIMEOUT and stdout.count("through after 0 restarts") == 2


def test_a_rank_that_hangs_while_others_wait_is_named_and_torchrun_blames_it(torchrun):
    status, _, stderr, seconds = torchrun("hangs_in_work")
    assert status != 0 and seconds < TIMEOUT + 60
    (line,) = error_lines(stderr)
    assert line.startswith(f"error: rank 0 made no progress for {TIMEOUT} s (rank 0 at step 5, script.py:")
    assert re.search(r"Root Cause.*?rank +: 0 ", stderr, re.S), stderr


def test_no_rank_leaves_before_all_have_finished(start_ranks):
    """A rank that ends closes its connections, and with gloo a rank still in the last collective may then hang."""
    outputs = [process.communicate(timeout=60)[0] for process in start_ranks("late")]
    late = float(re.search(r"late (.*)", outputs[0])[1])  # all processes share this clock
    assert all(float(re.search(r"left (.*)", output)[1]) >= late for output in outputs)


def test_a_stopped_rank_is_named_by_the_other(start_ranks):
    processes = start_ranks("stop1")
    _, stderr = processes[0].communicate(timeout=60)
    assert processes[0].returncode == 1
    (line,) = error_lines(stderr)
    start = f"error: rank 1 made no progress for {TIMEOUT} s (rank 1 stopped or dead; rank 0 at step 5, script.py:"
    assert line.startswith(start)
    processes[1].send_signal(signal.SIGCONT)  # it wakes up, finds the run ended, and ends by itself
    assert processes[1].wait(timeout=30) != 0


def test_a_rank_whose_store_is_gone_ends_itself(start_ranks):
    processes = start_ranks("stop0")
    _, stderr = processes[1].communicate(timeout=60)
    assert processes[1].returncode == 1
    (line,) = error_lines(stderr)
    assert line.startswith(f"error: rank 1 made no progress for {TIMEOUT} s, and the rendezvous store cannot")
    assert "Traceback" not in stderr


def test_find_hung_names_the_ranks_that_are_behind_or_silent():
    def post(step, count, idle):
        return [1, step, count, idle, ""]

    assert find_hung({0: post(5, 1, 9), 1: post(5, 0, 9)}, set(), 8) == [1]  # it is behind
    assert find_hung({0: post(6, 0, 9), 1: post(5, 3, 9)}, set(), 8) == [1]  # it is a step behind
    assert (
        find_hung({0: post(5, 1, 9), 1: post(5, 0, 7)}, set(), 8) == []
    )  # it is behind, but has not been idle for long enough
    assert find_hung({0: post(5, 1, 9), 1: post(5, 1, 9)}, set(), 8) == [0, 1]  # it may be either
    assert find_hung({0: post(5, 0, 9), 1: post(5, 1, 2)}, {1}, 8) == [1]  # it has stopped posting
    assert find_hung({0: post(5, 0, 9), 1: post(float("inf"), 0, 9)}, {1}, 8) == [0]  # rank 1 has finished


def test_a_sign_of_life_ends_a_long_wait_at_once():
    """Not only when the wait is next measured: by then other ranks may have finished, and this one would be blamed."""
    for sign_of_life in (lambda watchdog: watchdog.beat(0), Watchdog.show_life):
        watchdog = Watchdog()
        watchdog._stuck = watchdog._mark(), 5.0
        assert watchdog._idle() == 5
        sign_of_life(watchdog)
        assert watchdog._idle() == 0


@pytest.fixture
def alone(tmp_path):
    """alone(code) -> how a single process ended that ran this code with a watchdog of 0.5 s."""

    def run(code):
        script = tmp_path / "alone.py"
        head = "import pdb, sys, time, torch; from engine.heartbeat import init_distributed\n"
        script.write_text(f"{head}with init_distributed(torch.device('cpu'), timeout=0.5) as watchdog:\n    {code}\n")
        return run_forked(str(script))

    return run


def test_a_single_process_is_watched(alone):
    done = alone("watchdog.beat(3); time.sleep(100)")
    assert done.returncode == 1
    line = "error: no progress for 0.5 s (at step 3, alone.py:3 in <module>): ended; raise --timeout=0.5 if"
    assert done.stderr.startswith(line) and done.stderr.count("\n") == 1


def test_a_single_process_is_not_ended_while_it_advances_pauses_or_has_stopped_the_watchdog(alone):
    works = "[(time.sleep(0.1), watchdog.beat(step)) for step in range(10)]"
    pauses = "context = watchdog.paused(); context.__enter__(); time.sleep(1); context.__exit__(None, None, None)"
    done = alone(f"{works}; {pauses}; watchdog.stop(); time.sleep(1); print('end')")
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


def test_a_debugger_may_wait_for_its_user(alone):
    user = "type('', (), {'readline': lambda self: time.sleep(1.5) or 'continue'})()"
    done = alone(f"pdb.Pdb(stdin={user}, stdout=sys.stdout).set_trace()\n    print('end')")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.endswith("end\n"), done.stderr
