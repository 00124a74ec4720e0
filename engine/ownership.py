"""One writer to a folder: a lock that a process holds, and that the system releases when the process dies.

    run = own_folder("out/run", "give another out_dir")  # ConfigError while another process holds it
    name_run("out/run", "5f0c…")                         # what the next caller of own_folder gets

The lock is a POSIX record lock on the file run.lock in the folder. It holds across machines that share a file system
with such locks (NFS, or Lustre mounted with flock), and children do not inherit it. The file names the lock's holder and
the run in the folder.
"""

import errno
import fcntl
import json
import os
import socket
import stat
import time
from contextlib import contextmanager, suppress

from configurator import ConfigError
from engine.runlog import writing

LOCK = "run.lock"
TAKEN = {errno.EACCES, errno.EAGAIN}
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}  # of file systems that have none

# {real path of a lock file: its descriptor}. The system releases a process's lock on a file when the process closes any
# descriptor of that file: so nothing else may open it.
_held = {}


def own_folder(folder, another, say=print, run=None, patience=120.0):
    """Make the folder and lock it for this process -> the id of the run in it, None if it names none.

    another   the remedy if the folder is taken, such as "give another out_dir"
    say       prints a line: a note if the file system has no locks
    run       the id of this run; if the holder is an earlier attempt of it, wait up to `patience` seconds for its end
    ConfigError that names the holder if another process has the lock, OSError if the folder cannot be written.
    """
    os.makedirs(folder, exist_ok=True)
    path = os.path.realpath(os.path.join(folder, LOCK))
    if path in _held and os.path.exists(path) and os.path.samestat(os.fstat(_held[path]), os.stat(path)):
        return read_holder(_held[path]).get("run")
    release_folder(folder)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ConfigError(f"{path} is no regular file: remove it")
        deadline = time.monotonic() + patience
        while not try_lock(descriptor, folder, say):
            holder = living_holder(descriptor)
            if run is None or holder.get("run") != run or time.monotonic() > deadline:
                who = "process {pid} on {host}".format(**holder) if holder else "another process"
                raise ConfigError(f"{folder} is in use by {who}: wait for its end, or {another}")
            time.sleep(0.1)
        before = read_holder(descriptor).get("run")
        write_holder(descriptor, before)
    except BaseException:
        os.close(descriptor)
        raise
    _held[path] = descriptor
    return before


@contextmanager
def owning(folder, another):
    """Own the folder in this block. Arguments as of own_folder. All errors are one line, those of `writing` too."""
    with writing(folder, another):
        own_folder(folder, another)
    try:
        yield
    finally:
        release_folder(folder)


def wait_until_free(folder, seconds):
    """Make the folder, and while another process owns it wait, up to so many seconds. OSError if it cannot be written."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with suppress(ConfigError):
            own_folder(folder, "")
            return release_folder(folder)
        time.sleep(0.2)


def name_run(folder, run):
    """Write the id of the run that the folder now holds, into a folder that this process owns."""
    write_holder(_held[os.path.realpath(os.path.join(folder, LOCK))], run)


def release_folder(folder):
    """Give up the lock on the folder, if this process holds it."""
    descriptor = _held.pop(os.path.realpath(os.path.join(folder, LOCK)), None)
    if descriptor is not None:
        os.close(descriptor)


def try_lock(descriptor, folder, say):
    """Try to lock the file -> whether this process has the lock now; True, with a note, if the file system has no locks."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in TAKEN:
            return False
        if error.errno not in NO_LOCKS:
            raise
        say(f"note: the file system of {folder} has no locks ({error.strerror}): let no other run write there")
    return True


def read_holder(descriptor):
    """{"host": …, "pid": …, "run": …} from a lock file; {} if it holds anything else."""
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
    except (ValueError, RecursionError):
        return {}
    kinds = {"host": str, "pid": int, "run": (str, type(None))}
    fits = isinstance(holder, dict) and all(isinstance(holder.get(key), kind) for key, kind in kinds.items())
    return holder if fits else {}


def living_holder(descriptor, seconds=1.0):
    """read_holder of a lock that another process holds; if it has only just taken it, wait for it to write its name."""
    deadline = time.monotonic() + seconds
    while True:
        holder = read_holder(descriptor)
        here = holder.get("host") == socket.gethostname()
        if holder and (not here or is_alive(holder["pid"])):
            return holder
        if time.monotonic() > deadline:
            return {}
        time.sleep(0.02)


def write_holder(descriptor, run):
    """Write the names of this process and the run over what the file holds, which works on a full disk too."""
    text = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "run": run}).encode()
    os.pwrite(descriptor, text, 0)
    os.ftruncate(descriptor, len(text))


def is_alive(pid):
    """Whether this machine has such a process."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        pass
    return True
