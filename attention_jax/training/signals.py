"""Stopping a run from outside without losing a step."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Gives a list that the first SIGINT or SIGTERM is put into; the second one ends at once.

    Of several processes all must get the signal, as a cluster sends it: they save together.
    """
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught  # signals come to the main thread, and only it may handle them
        return

    def handle(number: int, frame: object) -> None:
        if caught:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        caught.append(number)
        print('Stopping after this step; once more to stop at once', file=sys.stderr, flush=True)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
