"""Processes that a sweep or a search starts, none of which outlives it: neither Ctrl-C, SIGTERM, SIGHUP nor SIGKILL leaves one.

Imports nothing of the project.
"""

import ctypes
import os
import signal
import subprocess
import sys

PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded here: between fork and exec little is safe


def start_child(words, output, env):
    """Start a command -> subprocess.Popen. It gets SIGTERM when this process dies, however that happens; on Linux only.

    output: a file for its stdout and stderr.
    """
    parent = os.getpid()

    def die_with_parent():
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it has died already
            os._exit(1)

    return subprocess.Popen(
        words, stdout=output, stderr=subprocess.STDOUT, env=env, preexec_fn=LIBC and die_with_parent
    )


def stop_as_by_ctrl_c():
    """From now on SIGTERM and SIGHUP (a terminal that is closed) raise KeyboardInterrupt; nohup's choice stands."""
    for name in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(name) != signal.SIG_IGN:
            signal.signal(name, signal.default_int_handler)


def ignore_signals():
    """Let a second Ctrl-C not interrupt the wait for children that are ending."""
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)


def stop_children(processes, seconds=60):
    """Ask them to save and end, all at once, and wait; SIGKILL to those that take longer than so many seconds."""
    for process in processes:
        process.send_signal(signal.SIGINT)
    for process in processes:
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
