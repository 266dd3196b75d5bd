"""Background work alongside training: one task at a time, in a thread, on data that is no longer modified."""

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
    """Runs tasks one after the other, in the order of submission.

    The error of a failed task is raised by the next call of any method, on the caller's thread. If the process forks
    (loader workers do), the fork waits for the running task, since a child would inherit locks that nobody releases.
    """

    def __init__(self) -> None:
        _alive.add(self)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Wait for the previous task, then start this one.

        Raises:
            Exception: The error of the previous task.
        """
        self.finish()

        def run() -> None:
            try:
                work()
            except BaseException as error:  # raised again by `check`, on the caller's thread
                self._error = error

        self._thread = threading.Thread(
            target=run, name="background"
        )  # not a daemon: Python waits for it at exit
        self._thread.start()

    def check(self) -> None:
        """Raise the error of a failed task, without waiting."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def finish(self) -> None:
        """Wait for the last task.

        Raises:
            Exception: The error of the last task.
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
        """Wait on exit for work started inside the block; an error raised inside takes precedence over one of the
        work.
        """
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
    """Copy nested dicts, lists and tuples of tensors and plain data to the host.

    Tensors that share memory are copied once and share memory in the copy, so tied weights are stored once.
    """
    copies: dict[tuple[object, ...], Tensor] = {}

    def copied(part: PlainValue) -> PlainValue:
        if isinstance(part, Tensor):
            return _copied_once(part.detach(), copies)
        if isinstance(part, dict):
            same = copy.copy(part)  # with the metadata that PyTorch attaches to a state dict
            same.update({key: copied(item) for key, item in part.items()})
            return same
        if isinstance(part, tuple) and hasattr(part, "_fields"):  # a named tuple
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
