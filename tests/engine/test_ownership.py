"""Tests that one process owns a folder, with real processes: refusals, deaths, missing locks, damaged lock files."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from configurator import ConfigError
from conftest import environment
from engine import ownership

OWNER = """
import sys, time
from engine import ownership
run = ownership.own_folder(sys.argv[1], "give another --out", run=sys.argv[2])
ownership.name_run(sys.argv[1], sys.argv[2])
print("owns it after", run, flush=True)
time.sleep(600)
"""


@pytest.fixture
def start():
    """start(folder, run) -> a process that owns the folder until it is killed, or is refused. By default `run` is new."""
    processes = []

    def start(folder, run=None):
        run = run or f"run {len(processes)}"
        words = [sys.executable, "-c", OWNER, str(folder), run]
        how = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(None))
        processes.append(subprocess.Popen(words, **how))
        processes[-1].run = run
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_of_eight_at_once_one_owns_the_folder_until_it_dies(start, tmp_path):
    folder = tmp_path / "runs" / "run"
    processes = [start(folder) for _ in range(8)]
    ended = time.monotonic() + 60
    while sum(process.poll() is not None for process in processes) < 7 and time.monotonic() < ended:
        time.sleep(0.01)
    (owner,) = [process for process in processes if process.poll() is None]
    line = f"error: {folder} is in use by process {owner.pid} on {socket.gethostname()}: wait for its end, or give another --out\n"
    for process in processes:
        if process is not owner:
            assert (process.returncode, process.communicate()[1]) == (1, line)
    with pytest.raises(ConfigError, match=f"process {owner.pid} on .*: wait for its end, or take another"):
        ownership.own_folder(folder, "take another", run="ours")
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert ownership.own_folder(folder, "") == owner.run
    ownership.name_run(folder, "ours")
    assert ownership.own_folder(folder, "") == "ours"  # this process owns it already
    refused = start(folder)
    assert f"process {os.getpid()} on" in refused.communicate()[1]
    ownership.release_folder(folder)
    assert start(folder).stdout.readline() == "owns it after ours\n"


def test_wait_until_free_waits_for_the_owner_or_its_time_limit(start, tmp_path):
    other = start(tmp_path)
    other.stdout.readline()
    begun = time.monotonic()
    ownership.wait_until_free(tmp_path, seconds=0.3)
    assert time.monotonic() - begun > 0.25
    threading.Timer(0.3, other.kill).start()
    ownership.wait_until_free(tmp_path, seconds=60)
    assert os.path.realpath(tmp_path / ownership.LOCK) not in ownership._held and time.monotonic() - begun < 30
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        ownership.wait_until_free(tmp_path / "file" / "run", seconds=60)


def test_a_run_waits_for_its_own_earlier_attempt(start, tmp_path):
    earlier = start(tmp_path, "same")
    assert earlier.stdout.readline() == "owns it after None\n"
    threading.Timer(0.3, earlier.kill).start()
    begun = time.monotonic()
    assert ownership.own_folder(tmp_path, "", run="same") == "same"
    assert time.monotonic() - begun > 0.25
    ownership.release_folder(tmp_path)
    again = start(tmp_path, "same")
    again.stdout.readline()
    with pytest.raises(ConfigError, match=f"process {again.pid} on"):
        ownership.own_folder(tmp_path, "", run="same", patience=0.2)


def test_a_replaced_folder_is_locked_anew(tmp_path):
    folder = tmp_path / "run"
    ownership.own_folder(folder, "")
    ownership.name_run(folder, "first")
    os.rename(folder, tmp_path / "moved")
    assert ownership.own_folder(folder, "") is None
    ownership.release_folder(folder)


def test_a_file_system_without_locks_is_noted(tmp_path, monkeypatch):
    def no_locks(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    said = []
    monkeypatch.setattr(fcntl, "lockf", no_locks)
    assert ownership.own_folder(tmp_path, "", said.append) is None
    assert said == [
        f"note: the file system of {tmp_path} has no locks (No locks available): let no other run write there"
    ]
    ownership.release_folder(tmp_path)


NOT_OURS = [b"", b"[", b"[" * 4000, b"null", b"7", b"\xff\xfe", b'{"pid": "1", "host": "h", "run": null}',
            b'{"pid": 1, "host": 7}', b'{"pid": 1e999, "host": "h", "run": {}}']  # fmt: skip


@pytest.mark.parametrize("content", NOT_OURS)
def test_a_lock_file_may_hold_anything(start, tmp_path, content):
    (tmp_path / ownership.LOCK).write_bytes(content)
    assert ownership.own_folder(tmp_path, "") is None
    ownership.name_run(tmp_path, "ours")
    # Opening and closing the file again would release the lock.
    descriptor = ownership._held[os.path.realpath(tmp_path / ownership.LOCK)]
    ours = {"host": socket.gethostname(), "pid": os.getpid(), "run": "ours"}
    assert json.loads(os.pread(descriptor, 1000, 0)) == ours
    if content == NOT_OURS[1]:  # while it is locked
        os.ftruncate(descriptor, os.pwrite(descriptor, content, 0))
        assert "is in use by another process: wait for its end, or give" in start(tmp_path).communicate()[1]
    ownership.release_folder(tmp_path)


def test_a_lock_file_that_is_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / ownership.LOCK)
    with pytest.raises(ConfigError, match="run.lock is no regular file: remove it"):
        ownership.own_folder(tmp_path, "")
