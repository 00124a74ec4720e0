"""What a run prints may be lost, and the run continues: the disk is full, the pipe's reader has ended, the terminal is closed."""

import os
import sys
from contextlib import contextmanager, suppress


@contextmanager
def losable_output():
    """In this block writing to sys.stdout and sys.stderr raises nothing: characters without an encoding are escaped, and
    a stream that cannot be written is given up, with one line on the other.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (LosableStream(name, getattr(sys, name)) for name in ("stdout", "stderr"))
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, LosableStream):
                stream.flush()
        sys.stdout, sys.stderr = before


class LosableStream:
    """A text stream that writes to another for as long as that can be written. stream: None where it was closed at the start."""

    def __init__(self, name, stream):
        self.name, self.stream = name, stream or open(os.devnull, "w")
        with suppress(AttributeError):  # of a stream that takes all characters
            self.stream.reconfigure(errors="backslashreplace")

    def write(self, text):
        self._attempt(self.stream.write, text)
        return len(text)

    def flush(self):
        self._attempt(self.stream.flush)

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def _attempt(self, act, *args):
        try:
            act(*args)
        except RuntimeError:
            pass  # a signal's handler that prints while the same stream is being written: that line is lost
        except (OSError, ValueError) as error:
            self._give_up(error)

    def _give_up(self, error):
        null = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(null, self.stream.fileno())  # what it still holds is flushed there, and that at exit too
            os.close(null)
        except (OSError, ValueError):
            self.stream = open(null, "w")
        if self.name == "stdout":
            reason = getattr(error, "strerror", None) or error
            print(
                f"note: stdout cannot be written ({reason}): the run continues without it", file=sys.stderr, flush=True
            )
