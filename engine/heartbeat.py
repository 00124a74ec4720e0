"""Join the processes of a run, and end the run when one of them hangs, with its rank in the message.

    with init_distributed(device, timeout=600) as watchdog:
        for step in range(max_steps):
            watchdog.beat(step)  # here, and wherever else the main thread advances: the same places on every rank
        watchdog.stop()  # after the last collective, before destroy_process_group

The ranks wait for each other in every step, so one that hangs stops them all, for good and in silence. Each rank posts
its count of beats in a store that all share. A rank that is stuck for `timeout` seconds looks for the one to blame:
one that no longer posts (stopped, dead, swapped out), or else the one behind the others. One line on stderr names it,
all ranks end with status 1, and torchrun restarts them or ends. A rank that cannot end itself (SIGSTOP) gets SIGKILL
from torchrun 30 s later. A run of one process is watched too: a disk, a pipe or a worker may hang it.

If torchrun is killed (SIGKILL), the watchdog sends the ranks that it leaves behind SIGTERM: they save and end.
"""

import atexit
import json
import math
import os
import signal
import sys
import threading
import time
import uuid
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch.distributed as dist

from configurator import ConfigError
from engine.agreement import check_options_of_ranks, facts_of_run
from engine.parallel import ranks
from text_files import first_line

# ---------------------------------------------------------------------------------------
# Joining


def init_distributed(device, timeout=600.0, options=None):
    """Join the process group that torchrun's environment describes (NCCL on CUDA, otherwise gloo) -> a running Watchdog.

    timeout: seconds without a beat after which a rank counts as hung, more than 0. The group's own timeout, and the
    time that ranks wait here for each other, is 2 * timeout + 60 s: the watchdog, which knows who hangs, speaks first.
    options: {name: value}, to be the same on all ranks; None: they are not compared.
    ConfigError on every rank where ranks differ, SystemExit with one line where a rank does not come.
    One process has no group, only the watchdog.
    """
    rank, _, world = ranks()
    limit = timedelta(seconds=2 * timeout + 60)
    if world == 1:
        watchdog = Watchdog(timeout=timeout, restarts=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            watchdog.run = _id_of_run(_open_store(rank, limit))
        return watchdog
    store = _open_store(rank, limit)
    attempt, restarts = _join(store, rank, world, limit.total_seconds())
    # A clone has its own connection: on a shared one, a call that waits in one thread would block the other thread.
    watchdog = Watchdog(dist.PrefixStore(f"{attempt}/watchdog", store.clone()), rank, world, timeout, restarts)
    watchdog.run = _id_of_run(store)
    try:
        if options is not None:
            agreement = dist.PrefixStore(f"{attempt}/agreement", store)
            check_options_of_ranks(agreement, rank, world, facts_of_run(options, device))
        backend, device_id = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        store = dist.PrefixStore(f"{attempt}/group", store)
        dist.init_process_group(backend, timeout=limit, store=store, rank=rank, world_size=world, device_id=device_id)
    except BaseException:
        watchdog.close()
        raise
    return watchdog


def _open_store(rank, limit):
    """The store at MASTER_ADDR and MASTER_PORT: torchrun's, or one that rank 0 makes.

    It waits for rank 0 alone, unlike torch's own rendezvous: _join tells who is missing.
    """
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ConfigError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}, but MASTER_ADDR={host} and MASTER_PORT={port or None} are no address: "
            "start with torchrun, or set them to the address of rank 0's machine and a free port there"
        )
    has_store = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        return dist.TCPStore(
            host, int(port), is_master=has_store, timeout=limit, wait_for_workers=False, multi_tenant=True
        )
    except RuntimeError as error:
        raise SystemExit(f"error: rank {rank} cannot reach the store at {host}:{port} ({first_line(error)})") from None


def _id_of_run(store):
    """The same on all ranks, and after every restart by torchrun, whose store lives as long as it does; never used before."""
    return store.compare_set("run", "", uuid.uuid4().hex).decode()


def _join(store, rank, world, seconds):
    """Agree on the number of this attempt, 1 for the first -> attempt, restarts before it; the same on all ranks.

    torchrun's store outlives a restart, so keys carry the attempt: a rank that found the address of a dead rank would fail.
    TORCHELASTIC_RESTART_COUNT does not serve, because each node counts its own failures only. So rank 0 counts, and answers
    each rank's random question, which no earlier attempt can have asked.
    """
    if rank != 0:
        question = uuid.uuid4().hex
        store.set(f"question/{rank}", question)
        try:
            attempt, restarts, world_of_first = json.loads(store.get(f"answer/{question}"))
        except RuntimeError as error:
            raise SystemExit(f"error: rank {rank} heard nothing from rank 0 within {seconds:g} s: {error}") from None
        store.set(f"{attempt}/joined/{rank}", str(world))
        _check_world(rank, world, world_of_first)
        return attempt, restarts
    attempt, missing, deadline = store.add("attempts", 1), list(range(1, world)), time.monotonic() + seconds
    restarts = max(attempt - 1, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))
    while missing:
        for other in missing:
            if store.check([f"question/{other}"]):  # perhaps an old attempt's, so look again until the rank has joined
                question = store.get(f"question/{other}").decode()
                store.set(f"answer/{question}", json.dumps([attempt, restarts, world]))
        time.sleep(0.02)
        for other in [other for other in missing if store.check([f"{attempt}/joined/{other}"])]:
            missing.remove(other)
            _check_world(other, int(store.get(f"{attempt}/joined/{other}")), world)
        if missing and time.monotonic() > deadline:
            raise SystemExit(f"error: {_names(missing)} did not come within {seconds:g} s")
    return attempt, restarts


def _check_world(rank, world, world_of_first):
    if world != world_of_first:
        raise ConfigError(
            f"rank {rank} has WORLD_SIZE={world}, rank 0 has WORLD_SIZE={world_of_first}: "
            "start all ranks with the same number of nodes and processes"
        )


# ---------------------------------------------------------------------------------------
# Watching


class Watchdog:
    """Ends this process when its main thread, or another rank's, makes no progress for `timeout` seconds.

    store: shared by all ranks, new in this attempt, used by this object alone; None: there is one process.
    timeout: in seconds; inf: this object does nothing.
    restarts: how often torchrun has restarted the group, the same on all ranks.
    run: the run's id, the same on all ranks and after a restart by torchrun.
    """

    def __init__(self, store=None, rank=0, world=1, timeout=math.inf, restarts=0):
        self.store, self.rank, self.world, self.timeout, self.restarts = store, rank, world, timeout, restarts
        self.run = uuid.uuid4().hex
        self._place = (-1, 0)  # step, beats in it: where the main thread is
        self._signs = 0  # of life, between beats
        self._stuck = (self._mark(), 0.0)  # where it was when last looked at, for how many seconds
        self._pauses = self._rounds = 0  # open paused() blocks; talks with the store
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._tick = min(1.0, timeout / 10)
        self._stopped, self._finished = threading.Event(), False
        self._threads = []
        if timeout == math.inf:
            return
        if store is not None:
            self._post()  # at once, so that a rank that dies before its first tick is missed too
        # Two threads, because a talk with the store can hang too.
        for run in (self._measure, self._talk) if store is not None else (self._measure,):
            self._threads.append(threading.Thread(target=run, daemon=True))
            self._threads[-1].start()
        atexit.register(self.close)  # the interpreter's end aborts on a thread that is inside C++

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def beat(self, step=None):
        """The main thread advances; takes 0.1 us. All ranks beat at the same places: the one behind is the one that hangs.

        step: a number that grows. A new one starts the count of beats again, so that an uneven one no longer matters.
        """
        last, count = self._place
        self._place = (last, count + 1) if step is None or step == last else (step, 0)

    def show_life(self):
        """The main thread is at work between two beats, on what other ranks wait for. It may show life as often as it likes."""
        self._signs += 1

    @contextmanager
    def paused(self):
        """In this block no beats are due on this rank, and it is not blamed; the group's timeout holds all the same."""
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1

    def stop(self):
        """Stop watching this rank, after its last collective. Returns when all ranks have come here, or one has failed.

        Not before: a rank that ends closes connections, and gloo may let a rank hang that is still inside the collective.
        """
        self._finished = True
        self.close()
        deadline = time.monotonic() + 2 * self.timeout + 60  # as long as the group lets a collective wait
        while not self._all_finished() and time.monotonic() < deadline:
            time.sleep(0.02)

    def close(self):
        """Stop watching, at once."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(timeout=5)
        atexit.unregister(self.close)

    def _all_finished(self):
        """Whether no rank is inside a collective any more; also where the store is gone, for then the run is over."""
        if self.store is None or any(thread.is_alive() for thread in self._threads):
            return True
        try:
            posts = self.store.multi_get([str(rank) for rank in range(self.world)])
        except RuntimeError:
            return True
        return all(json.loads(post)[1] == math.inf for post in posts)

    def _measure(self):
        """Thread: for how long the main thread has been stuck. Ends a stuck rank that has no store to talk to."""
        rounds, deaf, before = 0, 0.0, time.monotonic()
        while not self._stopped.wait(self._tick):
            now, mark = time.monotonic(), self._mark()
            # Time in which this process did not run (SIGSTOP, a preempted job) is not held against it.
            elapsed, before = min(now - before, self.timeout / 10), now
            seen, idle = self._stuck
            if idle >= self.timeout / 2 and _in_debugger():
                elapsed = 0.0
            self._stuck = mark, (0.0 if self._pauses or mark != seen else idle + elapsed)
            deaf = 0.0 if rounds != self._rounds else deaf + elapsed
            rounds = self._rounds
            if self._launcher is not None and os.getppid() != self._launcher:
                self._outlive_launcher()
            if self._idle() >= self.timeout and self.store is None:
                step, place = self._place[0], _main_thread_at()
                where = f"at step {step}, {place}" if step >= 0 else f"at the start, {place}"
                self._end([0], f"error: no progress for {self.timeout:g} s ({where}): ended; {self._remedy()}")
            if self._idle() >= self.timeout and deaf >= self.timeout / 2:
                stuck = f"rank {self.rank} made no progress for {self.timeout:g} s"
                self._end([], f"error: {stuck}, and the rendezvous store cannot be reached: ended")

    def _outlive_launcher(self):
        """torchrun is gone, and nobody else will stop these processes: ask them to save and end. Before training they just end."""
        self._launcher = None
        if self.rank == 0:
            _print_error("torchrun has ended without its processes: asking them to stop")
        os.kill(os.getpid(), signal.SIGTERM)

    def _talk(self):
        """Thread: posts where this rank is, obeys the verdict of another rank, or reaches one itself."""
        heard = {}
        try:
            while not self._stopped.wait(self._tick):
                self._post()
                if self.store.check(["verdict"]):
                    self._end(json.loads(self.store.get("verdict"))[1])
                if self._idle() < self.timeout / 2:
                    heard.clear()
                else:
                    self._judge(heard)
                self._rounds += 1
            if self._finished:
                self._place = (math.inf, 0)
                self._post()
        except RuntimeError:
            pass  # the store is gone: rank 0 or torchrun has ended. If that leaves this rank stuck, _measure notices

    def _mark(self):
        """Changes with every sign of life of the main thread."""
        return self._place, self._signs

    def _idle(self):
        """Seconds since the last sign of life; 0 where one came after the last look, which makes the count out of date."""
        mark, seconds = self._stuck
        return seconds if mark == self._mark() else 0.0

    def _post(self):
        idle = self._idle()
        where = _main_thread_at() if idle >= self.timeout / 2 else ""
        self.store.set(str(self.rank), json.dumps([self._rounds, *self._place, idle, where]))

    def _judge(self, heard):
        """Collect posts in `heard` ({rank: (post, seconds this rank was idle when it came)}). At the timeout, find who hangs, and end."""
        keys = [str(rank) for rank in range(self.world)]
        if not self.store.check(keys):
            return  # a rank is only just starting
        idle = self._idle()
        for rank, post in enumerate(self.store.multi_get(keys)):
            if rank not in heard or heard[rank][0] != post:
                heard[rank] = (post, idle)
        posts = {rank: json.loads(post) for rank, (post, _) in heard.items()}
        silent = {rank for rank, (_, came) in heard.items() if idle - came >= 0.4 * self.timeout}
        hung = find_hung(posts, silent, self.timeout) if idle >= self.timeout else []
        if hung and self._idle() >= self.timeout:  # still: a post that came since may have let this rank advance
            verdict = json.dumps([self.rank, hung])
            first = self.store.compare_set("verdict", "", verdict).decode()
            self._end(json.loads(first)[1], self._message(hung, posts, silent) if first == verdict else None)

    def _message(self, hung, posts, silent):
        """One line: who hangs, and where every rank is, those to blame first."""
        places = {}
        for rank in sorted(posts, key=lambda rank: rank not in hung):
            _, step, _, _, where = posts[rank]
            if step == math.inf:
                continue  # it has finished
            place = "at the start" if step < 0 else f"at step {step}"
            place = "stopped or dead" if rank in silent else f"{place}, {where}" if where else place
            places.setdefault(place, []).append(rank)
        places = "; ".join(f"{_names(ranks)} {place}" for place, ranks in places.items())
        who = "no rank made" if len(hung) == self.world else f"{_names(hung)} made no"
        return f"error: {who} progress for {self.timeout:g} s ({places}): ended; {self._remedy()}"

    def _remedy(self):
        return f"raise --timeout={self.timeout:g} if a step may take that long"

    def _end(self, hung, message=None):
        """End this process. The ranks to blame, `hung`, end first, as torchrun blames the first to end."""
        sys.excepthook = lambda *error: None  # the main thread's "connection closed by peer" would only distract
        if message:
            _print_error(message)
        if self.store is not None:
            time.sleep(self._tick * (2 if self.rank in hung else 4))  # within one tick all ranks know the verdict
        os._exit(1)  # the main thread may never come back from C++


def find_hung(posts, silent, timeout):
    """Ranks to blame when one is stuck, or [] while those it waits for are at work.

    posts: {rank: [round, step, beats in it, seconds idle, where]}, step inf: finished. silent: ranks that post no more.
    """
    at = {rank: tuple(post[1:3]) for rank, post in posts.items() if post[1] < math.inf}
    if silent & set(at):
        return sorted(silent & set(at))
    behind = [rank for rank in at if at[rank] == min(at.values())]
    return behind if all(posts[rank][3] >= timeout for rank in behind) else []


def _main_thread_at():
    """'data.py:88 in train_batch': the innermost line of the main thread in code outside Python and its packages."""
    frame, installed = sys._current_frames()[threading.main_thread().ident], (sys.prefix, sys.base_prefix, "<")
    while frame.f_back and frame.f_code.co_filename.startswith(installed):
        frame = frame.f_back
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} in {frame.f_code.co_name}"


def _in_debugger():
    """Whether the main thread waits for commands of pdb, or of an editor's debugger."""
    frame = sys._current_frames()[threading.main_thread().ident]
    while frame is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] in ("pdb", "bdb", "pydevd", "debugpy"):
            return True
        frame = frame.f_back
    return False


def _print_error(line):
    with suppress(OSError, ValueError):  # nobody reads stderr any more
        print(line, file=sys.stderr, flush=True)


def _names(ranks):
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
