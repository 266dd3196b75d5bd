"""Signals: SIGTERM and SIGUSR1 request to save and stop, agreed on by all ranks without stalling the device.

This applies during training (`StopSignals`). Before and after training there is nothing to save: the signals and Ctrl-C
then end the job at once, with a message (`stopping_at_once`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType

import torch
import torch.distributed as dist
from torch import Tensor

from image_classification.distributed import Distributed

#: Number of optimizer steps between two agreements. Ranks may receive the signal at different iterations.
POLL_INTERVAL = 8

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequested(Exception):  # noqa: N818 - a request, not an error
    """The run was asked to stop.

    Args:
        message: What stopped it, and where.
        saved: Whether its state was saved, so that it can be resumed.
    """

    def __init__(self, message: str, *, saved: bool) -> None:
        super().__init__(message)
        self.saved = saved


class StoppedAtOnce(KeyboardInterrupt):
    """A signal arrived while there was nothing to save.

    Args:
        number: The signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(
            f"stopped by {signal.Signals(number).name} outside training: nothing is lost, no checkpoint was needed; "
            "the same command starts again"
        )
        self.number = signal.Signals(number)


@contextlib.contextmanager
def stopping_at_once() -> Iterator[Callable[[], None]]:
    """Make SIGTERM, SIGUSR1 and Ctrl-C raise `StoppedAtOnce` inside the block, except within `StopSignals`.

    Yields a function to call once it is clear how the job ends: SIGTERM and SIGUSR1 are ignored from then on, since
    the launcher may send them to a rank that has just told its error.
    """
    decided = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield decided.set
        return
    owner = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() == owner:
            if decided.is_set() and number in _SIGNALS:
                return
            raise StoppedAtOnce(number)
        signal.signal(number, signal.SIG_DFL)  # a forked worker, which inherited this handler
        signal.raise_signal(number)

    # Ctrl-C may be disabled, as shells do for background jobs.
    numbers = [n for n in (*_SIGNALS, signal.SIGINT) if signal.getsignal(n) not in (signal.SIG_IGN, None)]
    previous = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield decided.set
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class StopSignals:
    """Context manager that turns the signals into a flag and restores the old handlers afterwards.

    Inside, Ctrl-C is a plain KeyboardInterrupt.

    With several ranks, each `poll` at a multiple of `POLL_INTERVAL` reads the agreement started at the previous one and
    starts the next, so the answer is the same on all ranks without waiting.
    """

    def __init__(self, distributed: Distributed) -> None:
        self.distributed = distributed
        self.received: str | None = None
        self._previous: dict[signal.Signals, signal._HANDLER] = {}
        self._pending: tuple[dist.Work, Tensor, torch.cuda.Event | None] | None = None

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._previous[number] = signal.signal(number, self._receive)
            if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
                self._previous[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name

    def poll(self, iteration: int) -> bool:
        """Whether all ranks stop after this iteration. Called by all ranks for every iteration."""
        if self.distributed.world_size == 1:
            return self.received is not None
        if iteration % POLL_INTERVAL:
            return False
        agreed = self._read()
        self._start()
        return agreed

    def _start(self) -> None:
        flag = torch.tensor([int(self.received is not None)], device=self.distributed.device)
        work = dist.all_reduce(flag, dist.ReduceOp.MAX, async_op=True)
        if flag.device.type != "cuda":
            self._pending = (work, flag, None)
            return
        work.wait()  # orders the stream, does not block the host
        host = torch.empty(1, dtype=flag.dtype, pin_memory=True).copy_(flag, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending = (work, host, event)

    def _read(self) -> bool:
        if self._pending is None:
            return False
        work, flag, event = self._pending
        if event is None:
            work.wait()
        else:
            event.synchronize()
        return bool(flag.item())
