"""Ranks without processes: threads that meet in collectives, which are recorded.

    with simulated_ranks(2) as ranks:
        results = ranks.run(job)          # job(distributed) on every rank
    ranks.calls                           # collectives per rank: kind, shape, dtype

Everything above `torch.distributed` is real. One thread runs at a time, until it waits for the others, so that global
state (random state, switches) stays in order. If ranks meet in different collectives, or one has ended while others
wait, all of them fail with the names of both: cases that would hang under NCCL, or add up unrelated tensors.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor

from image_classification.distributed import Distributed

T = TypeVar("T")
_PATIENCE = 60.0


class CollectiveMismatchError(AssertionError):
    """The ranks are in different collectives."""


class SimulatedRanks:
    """The meeting point of the ranks.

    Attributes:
        calls: Collectives of each rank, in order.
        altered: (rank, result of a reduction) → the result that this rank gets, to simulate inexact reductions.
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.calls: list[list[str]] = [[] for _ in range(world_size)]
        self.altered: Callable[[int, Tensor], Tensor] = lambda rank, total: total
        self._turn = threading.Condition()
        self._here = threading.local()
        self._waiting: dict[int, tuple[str, Any]] = {}
        self._ended: set[int] = set()
        self._met: list[Any] = []
        self._meetings = 0
        self._store: dict[str, bytes] = {}
        self._failure: str | None = None

    def run(self, job: Callable[[Distributed], T]) -> list[T]:
        """Run a job on every rank and return the results.

        Raises:
            Exception: The first error that is not a mismatch; else the mismatch.
        """
        results: list[Any] = [None] * self.world_size
        errors: list[Exception] = []

        def on(rank: int) -> None:
            self._here.rank = rank
            with self._turn:
                try:
                    results[rank] = job(Distributed(rank, rank, self.world_size, backend="gloo"))
                except Exception as error:
                    errors.append(error)
                finally:
                    self._ended.add(rank)
                    self._turn.notify_all()

        threads = [threading.Thread(target=on, args=(rank,), daemon=True) for rank in range(self.world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        errors.sort(key=lambda error: isinstance(error, CollectiveMismatchError))
        if errors:
            raise errors[0]
        return results

    def _meet(self, call: str, value: Any) -> list[Any]:
        """Wait for all ranks and return the values of all."""
        rank = self._here.rank
        self.calls[rank].append(call)
        self._waiting[rank] = call, value
        meeting = self._meetings
        if len(self._waiting) == self.world_size:
            if len({name for name, _ in self._waiting.values()}) > 1:
                self._failure = f"the ranks are in different collectives: {self._names()}"
            self._met = [self._waiting[number][1] for number in range(self.world_size)]
            self._meetings += 1
            self._waiting = {}
            self._turn.notify_all()
        self._wait(lambda: self._meetings > meeting)
        return self._met

    def _wait(self, reached: Callable[[], bool], what: str = "") -> None:
        while not reached() and self._failure is None:
            if self._ended - {self._here.rank}:
                self._failure = f"rank {min(self._ended)} has ended while others wait: {self._names()} {what}"
                break
            if not self._turn.wait(_PATIENCE):
                self._failure = f"nothing has happened for {_PATIENCE} s: {self._names()} {what}"
        if self._failure is not None:
            self._turn.notify_all()
            raise CollectiveMismatchError(self._failure)

    def _names(self) -> str:
        return ", ".join(f"rank {rank}: {name}" for rank, (name, _) in sorted(self._waiting.items()))

    # ------------------------------------------------------------------ in place of torch.distributed

    def all_reduce(self, tensor: Tensor, op: Any = None, group: Any = None, async_op: bool = False) -> Any:
        """Reduce by sum or maximum."""
        values = torch.stack(
            self._meet(_name("all_reduce", tensor, op, group and "on hosts"), tensor.clone())
        )
        total = values.amax(0) if op == torch.distributed.ReduceOp.MAX else values.sum(0)
        tensor.copy_(self.altered(self._here.rank, total))
        return mock.Mock(**{"is_completed.return_value": True}) if async_op else None

    def broadcast(self, tensor: Tensor, src: int = 0, group: Any = None) -> None:
        """Broadcast rank `src`'s values."""
        tensor.copy_(self._meet(_name("broadcast", tensor, src, group and "on hosts"), tensor.clone())[src])

    def all_gather(self, parts: Sequence[Tensor], tensor: Tensor, group: Any = None) -> None:
        """Gather all ranks' values."""
        for part, value in zip(
            parts, self._meet(_name("all_gather", tensor, group and "on hosts"), tensor.clone()), strict=True
        ):
            part.copy_(value)

    def barrier(self, device_ids: Any = None) -> None:
        """Wait for all ranks."""
        self._meet("barrier", None)

    def _get_store(self) -> Any:
        store = mock.Mock()
        store.set = self._set
        store.get = lambda key: self._store[key]
        store.check = lambda keys: all(key in self._store for key in keys)
        return store

    def _set(self, key: str, value: bytes | str) -> None:
        self._store[key] = value.encode() if isinstance(value, str) else value
        self._turn.notify_all()

    def _next_wait(self) -> int:
        """Return the number of this rank's next wait at the store."""
        self._here.waits = getattr(self._here, "waits", -1) + 1
        return int(self._here.waits)


class _Waits:
    """Iterator whose `next` is the rank's own count."""

    def __init__(self, ranks: SimulatedRanks) -> None:
        self._ranks = ranks

    def __next__(self) -> int:
        return self._ranks._next_wait()


def _compile_again() -> None:
    """Undo `uncompiled`, if anything has imported what it switches."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.set_stance("default")


def _name(kind: str, tensor: Tensor, *more: object) -> str:
    words = [str(word) for word in more if word is not None]
    return " ".join([kind, str(tensor.dtype).removeprefix("torch."), str(list(tensor.shape)), *words])


@contextlib.contextmanager
def simulated_ranks(world_size: int) -> Iterator[SimulatedRanks]:
    """Replace collectives of `torch.distributed` by threads that meet, inside the block."""
    ranks = SimulatedRanks(world_size)
    ours = "image_classification.store_waits"
    with contextlib.ExitStack() as stack:
        for name in ("all_reduce", "broadcast", "all_gather", "barrier"):
            stack.enter_context(mock.patch(f"torch.distributed.{name}", getattr(ranks, name)))
        stack.enter_context(mock.patch(f"{ours}.store", ranks._get_store))
        stack.enter_context(mock.patch(f"{ours}.wait_until", ranks._wait))
        stack.enter_context(mock.patch(f"{ours}.num_waits", _Waits(ranks)))
        # Threads that take turns do not leave such switches in the order in which they entered them.
        stack.callback(_compile_again)
        for product in (torch.backends.cuda.matmul, torch.backends.cudnn.conv):
            stack.callback(setattr, product, "fp32_precision", product.fp32_precision)
        yield ranks
