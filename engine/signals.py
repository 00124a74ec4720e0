"""Ctrl-C and SIGTERM, which ask a run to end."""

import signal


class StopSignal:
    """Ctrl-C and SIGTERM set `asked`: the loop ends, and saves where it does so, after the step in progress.

    say     prints a line
    saving  whether the run saves when it ends: for the line alone
    """

    def __init__(self, say, saving=True):
        self.asked, self.say, self.what = False, say, "saving" if saving else "ending"
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, self._ask)

    def _ask(self, *_):
        if not self.asked:
            self.say(f"\nasked to stop: {self.what} after this step", flush=True)
        self.asked = True
