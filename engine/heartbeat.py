"""Join the processes of a run, and end the run when one of them hangs, with its rank in the message.

    watchdog = init_distributed(device, timeout=600)
    for step in range(max_steps):
        watchdog.beat(step)  # here, and wherever else the main thread gets on: the same places on every rank
    watchdog.stop()  # behind the last collective, before destroy_process_group

The ranks wait for each other in every step, so that one which hangs stops them all, for good and in silence.
Each posts its count of beats in a store that all share. A rank that is stuck for `timeout` seconds looks for the
one to blame: one that no longer posts (stopped, dead, swapped out), else the one behind the others. One line on
stderr names it, all ranks end with status 1, and torchrun restarts them, or ends. A rank that cannot end itself
(SIGSTOP) gets SIGKILL from torchrun 30 s later.
"""

import atexit
import json
import math
import os
import sys
import threading
import time
import uuid
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist


def init_distributed(device, timeout=600.0):
    """Join the process group that torchrun's environment describes (NCCL on CUDA, else gloo) -> a running Watchdog.

    timeout: seconds without a beat after which a rank counts as hung, more than 0. The group's own timeout, and the
    time that ranks wait here for each other, is 2 * timeout + 60 s: the watchdog, which knows who hangs, speaks first.
    SystemExit with one line where a rank does not come. One process: no group, and a Watchdog that does nothing.
    """
    limit = timedelta(seconds=2 * timeout + 60)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        watchdog = Watchdog(timeout=timeout, restarts=restarts)
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            watchdog.run = _id_of_run(next(dist.rendezvous("env://", timeout=limit))[0])
        return watchdog
    store, rank, world = next(dist.rendezvous("env://", timeout=limit))
    attempt, restarts = _join(store, rank, world, limit.total_seconds())
    # A clone has its own connection: on a shared one, a call that waits in one thread would block the other thread.
    watchdog = Watchdog(dist.PrefixStore(f"{attempt}/watchdog", store.clone()), rank, world, timeout, restarts)
    watchdog.run = _id_of_run(store)
    backend, device_id = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    store = dist.PrefixStore(f"{attempt}/group", store)
    dist.init_process_group(backend, timeout=limit, store=store, rank=rank, world_size=world, device_id=device_id)
    return watchdog


def _id_of_run(store):
    """The same on all ranks, and after every restart by torchrun, whose store lives as long as it does; never used before."""
    return store.compare_set("run", "", uuid.uuid4().hex).decode()


def _join(store, rank, world, seconds):
    """Agree on the number of this attempt, 1 for the first -> attempt, restarts before it; the same on all ranks.

    torchrun's store outlives a restart, so keys must carry the attempt: who finds the address of a dead rank fails.
    TORCHELASTIC_RESTART_COUNT will not do, for each node counts its own failures only. So rank 0 counts, and answers
    each rank's random question, which no earlier attempt can have asked.
    """
    if rank != 0:
        question = uuid.uuid4().hex
        store.set(f"question/{rank}", question)
        try:
            attempt, restarts = json.loads(store.get(f"answer/{question}"))
        except RuntimeError as error:
            raise SystemExit(f"error: rank {rank} heard nothing of rank 0 within {seconds:g} s: {error}") from None
        store.set(f"{attempt}/joined/{rank}", "")
        return attempt, restarts
    attempt, missing, deadline = store.add("attempts", 1), list(range(1, world)), time.monotonic() + seconds
    restarts = max(attempt - 1, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))
    while missing:
        for other in missing:
            if store.check([f"question/{other}"]):  # perhaps an old attempt's, so look again until the rank has joined
                question = store.get(f"question/{other}").decode()
                store.set(f"answer/{question}", json.dumps([attempt, restarts]))
        time.sleep(0.02)
        missing = [other for other in missing if not store.check([f"{attempt}/joined/{other}"])]
        if missing and time.monotonic() > deadline:
            raise SystemExit(f"error: {_names(missing)} did not come within {seconds:g} s")
    return attempt, restarts


class Watchdog:
    """Ends this process when its main thread, or another rank's, makes no beat for `timeout` seconds.

    store: shared by all ranks, new in this attempt, used by this object alone; None: one process, not watched.
    restarts: how often torchrun has restarted the group, the same on all ranks.
    run: the run's id, the same on all ranks and after a restart by torchrun.
    """

    def __init__(self, store=None, rank=0, world=1, timeout=600.0, restarts=0):
        self.store, self.rank, self.world, self.timeout, self.restarts = store, rank, world, timeout, restarts
        self.run = uuid.uuid4().hex
        self._at = (-1, 0)  # step, beats in it: where the main thread is
        self._stuck = (self._at, 0.0)  # where it was when last looked at, for how many seconds
        self._pauses = self._rounds = 0  # open paused() blocks; talks with the store
        self._tick = min(1.0, timeout / 10)
        self._stopped, self._through = threading.Event(), False
        self._threads = []
        if store is not None:
            self._post(self._at)  # at once, so that a rank that dies before its first tick is missed too
            for run in (self._measure, self._talk):  # two, because a talk with the store can hang too
                self._threads.append(threading.Thread(target=run, daemon=True))
                self._threads[-1].start()
            atexit.register(self._halt)  # the interpreter's end aborts on a thread that is inside C++

    def beat(self, step=None):
        """The main thread gets on; 0.1 us. All ranks beat at the same places: who is behind is who hangs.

        step: a number that grows. With a new one beats are counted anew, so that an uneven one matters no longer.
        """
        last, count = self._at
        self._at = (last, count + 1) if step is None or step == last else (step, 0)

    @contextmanager
    def paused(self):
        """In this block no beats are due on this rank, and it is not blamed; the group's timeout holds all the same."""
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1

    def stop(self):
        """This rank is through with its last collective, and no longer watched; returns when all are, or one has failed.

        Not before: a rank that ends closes connections, and gloo may let one hang that is still inside the collective.
        """
        self._through = True
        self._halt()
        deadline = time.monotonic() + 2 * self.timeout + 60  # as long as the group lets a collective wait
        while not self._all_through() and time.monotonic() < deadline:
            time.sleep(0.02)

    def _halt(self):
        self._stopped.set()
        for thread in self._threads:
            thread.join(timeout=5)

    def _all_through(self):
        """Whether no rank is inside a collective any more; also where the store is gone, for then the run is over."""
        if self.store is None or any(thread.is_alive() for thread in self._threads):
            return True
        try:
            posts = self.store.multi_get([str(rank) for rank in range(self.world)])
        except RuntimeError:
            return True
        return all(json.loads(post)[1] == math.inf for post in posts)

    def _measure(self):
        """Thread: how long the main thread has been stuck. Ends a stuck rank that cannot talk to the store either."""
        rounds, deaf, before = 0, 0.0, time.monotonic()
        while not self._stopped.wait(self._tick):
            now, at = time.monotonic(), self._at
            # Time in which this process did not run (SIGSTOP, a preempted job) is not held against it.
            elapsed, before = min(now - before, self.timeout / 10), now
            seen, idle = self._stuck
            self._stuck = at, (0.0 if self._pauses or at != seen else idle + elapsed)
            deaf = 0.0 if rounds != self._rounds else deaf + elapsed
            rounds = self._rounds
            if self._idle() >= self.timeout and deaf >= self.timeout / 2:
                stuck = f"rank {self.rank} made no progress for {self.timeout:g} s"
                self._end([], f"error: {stuck}, and the rendezvous store cannot be reached: ended")

    def _talk(self):
        """Thread: posts where this rank is, obeys another's verdict, finds its own."""
        heard = {}
        try:
            while not self._stopped.wait(self._tick):
                self._post(self._at)
                if self.store.check(["verdict"]):
                    self._end(json.loads(self.store.get("verdict"))[1])
                if self._idle() < self.timeout / 2:
                    heard.clear()
                else:
                    self._judge(heard)
                self._rounds += 1
            if self._through:
                self._post((math.inf, 0))
        except RuntimeError:
            pass  # the store is gone: rank 0 or torchrun has ended. Should that leave this rank stuck, _measure sees it

    def _idle(self):
        """Seconds since the main thread last got on; 0 where it did after it was looked at, for then what was counted is old."""
        at, seconds = self._stuck
        return seconds if at == self._at else 0.0

    def _post(self, at):
        idle = self._idle()
        where = _main_thread_at() if idle >= self.timeout / 2 else ""
        self.store.set(str(self.rank), json.dumps([self._rounds, *at, idle, where]))

    def _judge(self, heard):
        """Collect posts in `heard` ({rank: (post, idle seconds here when it came)}); at the timeout, end who hangs."""
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
        if hung and self._idle() >= self.timeout:  # still: what others posted since may be that this rank got on
            verdict = json.dumps([self.rank, hung])
            first = self.store.compare_set("verdict", "", verdict).decode()
            self._end(json.loads(first)[1], self._message(hung, posts, silent) if first == verdict else None)

    def _message(self, hung, posts, silent):
        """One line: who hangs, and where every rank is, those to blame first."""
        places = {}
        for rank in sorted(posts, key=lambda rank: rank not in hung):
            _, step, _, _, where = posts[rank]
            if step == math.inf:
                continue  # that one is through
            place = "at the start" if step < 0 else f"at step {step}"
            place = "stopped or dead" if rank in silent else f"{place}, {where}" if where else place
            places.setdefault(place, []).append(rank)
        places = "; ".join(f"{_names(ranks)} {place}" for place, ranks in places.items())
        who = "no rank made" if len(hung) == self.world else f"{_names(hung)} made no"
        remedy = f"raise --timeout={self.timeout:g} if a step may take that long"
        return f"error: {who} progress for {self.timeout:g} s ({places}): ended; {remedy}"

    def _end(self, hung, message=None):
        """End this process, where `hung` are the ranks to blame: they first, as torchrun blames the first to end."""
        sys.excepthook = lambda *error: None  # the main thread's "connection closed by peer" would only distract
        if message:
            print(message, file=sys.stderr, flush=True)
        time.sleep(self._tick * (2 if self.rank in hung else 4))  # within one tick all ranks know the verdict
        os._exit(1)  # the main thread may never come back from C++


def find_hung(posts, silent, timeout):
    """Ranks to blame when one is stuck, or [] while those it waits for get on.

    posts: {rank: [round, step, beats in it, seconds idle, where]}, step inf: through. silent: ranks that post no more.
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


def _names(ranks):
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
