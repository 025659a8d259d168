"""SIGTERM and Ctrl-C as a wish to stop after the current step, not as sudden death."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class TrainingInterrupted(Exception):
    """A signal stopped the run between two steps, after a whole checkpoint was written.

    `signum` is the signal, `step` the last step done, `checkpoint` the newest whole one's folder
    (None if there is none: the signal came after the end of a run that saves nothing). A command
    should print the message and exit with `exit_code` (143 for SIGTERM, 130 for Ctrl-C).
    """

    def __init__(self, signum: int, step: int, checkpoint: str | None) -> None:
        super().__init__(signum, step, checkpoint)
        self.signum, self.step, self.checkpoint = signum, step, checkpoint

    @property
    def exit_code(self) -> int:
        return 128 + self.signum

    def __str__(self) -> str:
        stopped = f"stopped by {signal.Signals(self.signum).name} after step {self.step}"
        if self.checkpoint is None:
            return f"{stopped}, no checkpoint was asked for"
        return f"{stopped}; {self.checkpoint} is whole: run the same command again to resume there"


class StopSignals:
    """While entered, the first SIGTERM or SIGINT sets `received`; a second one kills at once.

    Only the main thread can take signals: entered elsewhere, this does nothing.
    """

    def __init__(self) -> None:
        self.received = 0
        self._owner = os.getpid()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for signum in _SIGNALS:
                self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        # Data loader workers inherit the handler: Ctrl-C reaches them too, and the step that is
        # to be finished still needs them.
        if os.getpid() != self._owner:
            return
        if self.received:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
        self.received = signum
        name = signal.Signals(signum).name
        message = f"\n{name}: finishing this step and saving; once more stops at once\n"
        os.write(2, message.encode())  # print() is not safe in the middle of another print()
