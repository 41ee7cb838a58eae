"""Ctrl-C and SIGTERM as a request: the micro-batch under way is finished, and the steps before its step are saved.

A step of a large batch may take minutes, and torchrun kills its workers 30 s after it has passed the signal on (from
torch 2.14 on, as many as its --shutdown-timeout says). Sequences, masks and dropout come from the step's number, so a
step that was given up is taken again as if it had not begun.
"""

import signal
import threading
from collections.abc import Callable
from typing import Any


class StopRequest:
    """`signal` is the signal this rank got, or 0; `agreed` is for the loop to set once every rank knows.

    A second Ctrl-C stops at once, in one process only: torchrun passes on to its workers the signal that the terminal
    has already sent them.
    """

    def __init__(self, one_process: bool, say: Callable[[str], None]):
        self.signal = 0
        self.agreed: float = False
        self._one_process, self._say = one_process, say
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: object) -> None:
        if self.signal and number == signal.SIGINT and self._one_process:
            raise KeyboardInterrupt
        if not self.signal:
            again = " (Ctrl-C again: stop at once)" if self._one_process else ", if torchrun waits so long"
            self._say(f"{signal.Signals(number).name}: finishing this micro-batch, then saving{again}")
        self.signal = number
