"""Ctrl-C, SIGTERM and SIGHUP, which ask a run to end."""

import signal
import time


class StopSignal:
    """The first of these signals sets `asked`: the loop ends after the step in progress, and saves if the run saves at all.

    A second Ctrl-C raises SystemExit(130) wherever the main thread is, in a long evaluation, say.
    say     prints a line
    saving  whether the run saves when it ends: for the line alone
    """

    def __init__(self, say, saving=True):
        self.asked, self.say, self.what = False, say, "saving" if saving else "ending"
        self.interrupted = None  # when Ctrl-C was pressed first
        for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if name != signal.SIGHUP or signal.getsignal(name) != signal.SIG_IGN:  # nohup ignores it on purpose
                signal.signal(name, self._ask)

    def _ask(self, name, _):
        if name == signal.SIGINT:
            now = time.monotonic()
            if self.interrupted is not None and now - self.interrupted > 0.2:  # `timeout` sends a signal twice at once
                self.say("\nstopped at once: --resume continues from the last checkpoint", flush=True)
                raise SystemExit(130)
            self.interrupted = self.interrupted or now
        if not self.asked:
            again = "; Ctrl-C again ends at once" if name == signal.SIGINT else ""
            self.say(f"\nasked to stop: {self.what} after this step{again}", flush=True)
        self.asked = True
