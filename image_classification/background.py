"""Work that runs alongside training: one piece at a time, in a thread, on data that nobody changes any more."""

from __future__ import annotations

import contextlib
import copy
import os
import threading
import weakref
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from image_classification.plain_data import PlainValue


class Background:
    """Runs pieces of work in the order in which they come; the next waits until the one before has ended.

    The error of a piece that fails is raised by the next call of anything here, on the caller's thread. Where the
    process forks (workers of a loader do that), the fork waits for the piece: a child would inherit locks that nobody
    releases.
    """

    def __init__(self) -> None:
        _alive.add(self)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Wait for the piece before, then begin with this one.

        Raises:
            Exception: What the piece before failed with.
        """
        self.finish()

        def run() -> None:
            try:
                work()
            except BaseException as error:  # raised again by `check`, on the caller's thread
                self._error = error

        self._thread = threading.Thread(
            target=run, name="background"
        )  # no daemon: Python waits for it at exit
        self._thread.start()

    def check(self) -> None:
        """Without waiting: raise what a piece has failed with."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def finish(self) -> None:
        """Wait for the last piece.

        Raises:
            Exception: What it failed with.
        """
        self._wait()
        self.check()

    def _wait(self) -> None:
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
            self._thread = None

    @contextlib.contextmanager
    def finished(self) -> Iterator[None]:
        """What was started inside has ended at the end; an error from inside comes before one of the work."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(Exception):
                self.finish()
            raise
        self.finish()


_alive: weakref.WeakSet[Background] = weakref.WeakSet()


def _wait_for_all() -> None:
    for background in list(_alive):
        background._wait()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_wait_for_all)


def snapshot(value: PlainValue) -> PlainValue:
    """A copy, on the host, of nested dicts, lists and tuples of tensors and plain data.

    Tensors that are the same memory are copied once and stay the same memory: tied weights take their place once.
    """
    copies: dict[tuple[object, ...], Tensor] = {}

    def copied(part: PlainValue) -> PlainValue:
        if isinstance(part, Tensor):
            return _copied_once(part.detach(), copies)
        if isinstance(part, dict):
            same = copy.copy(part)  # with what PyTorch notes on a state dict
            same.update({key: copied(item) for key, item in part.items()})
            return same
        if isinstance(part, tuple) and hasattr(part, "_fields"):  # a named one
            return type(part)(*map(copied, part))
        if isinstance(part, (list, tuple)):
            return type(part)(map(copied, part))
        return part

    return copied(value)


def _copied_once(tensor: Tensor, copies: dict[tuple[object, ...], Tensor]) -> Tensor:
    place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
    if not tensor.numel() or place not in copies:
        copies[place] = torch.empty_like(tensor, device="cpu").copy_(tensor)
    return copies[place]
