"""SIGTERM and SIGUSR1 as a request to save and stop, agreed upon by all ranks without stalling the device."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from image_classification.distributed import Distributed

#: Optimizer steps between two agreements. Ranks may receive the signal at different iterations.
POLL_INTERVAL = 8

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequested(Exception):  # noqa: N818 - a request, not an error
    """The run was asked to stop and has saved its state."""


class StopSignals:
    """Context manager that turns the signals into a flag and restores the old handlers afterwards.

    With several ranks, each `poll` at a multiple of `POLL_INTERVAL` reads the agreement started at the one before
    and starts the next, so the answer is the same on all ranks and costs no wait.
    """

    def __init__(self, distributed: Distributed) -> None:
        self.distributed = distributed
        self.received: str | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._pending: tuple[Any, Tensor, torch.cuda.Event | None] | None = None

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._previous[number] = signal.signal(number, self._receive)
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
