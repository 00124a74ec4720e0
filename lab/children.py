"""The processes that a sweep or a search starts. None outlives it, whether Ctrl-C, SIGTERM, SIGHUP or SIGKILL ends it."""

import ctypes
import os
import signal
import subprocess
import sys

PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # here, since little is safe between fork and exec


def start_child(words, output, env):
    """Start a command -> subprocess.Popen. On Linux it gets SIGTERM when this process dies, however that happens.

    words   the command, as a list of words
    output  an open file for its stdout and stderr
    env     its environment, a dict
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
    """Let SIGTERM and SIGHUP (a closed terminal) raise KeyboardInterrupt from now on, unless nohup ignores them."""
    for name in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(name) != signal.SIG_IGN:
            signal.signal(name, signal.default_int_handler)


def ignore_signals():
    """Ignore Ctrl-C, SIGTERM and SIGHUP from now on, while children end."""
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)


def stop_children(processes, seconds=60):
    """Ask all processes to save and end, and wait; those that take longer than so many seconds get SIGKILL."""
    for process in processes:
        process.send_signal(signal.SIGINT)
    for process in processes:
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
