"""Communication among ranks: exact reductions, broadcast, rank-0 helpers, agreement.

Everything also works in a single process, without a process group: reductions return their input. Objects are sent
between ranks as JSON, never as pickles, and on the host: next to NCCL there is a Gloo group for them. Work of one rank
that the others wait for (`decide_on_main`, `main_process_first`) may take hours: they wait at the store of the process
group, which has no timeout, and not in a collective, which fails after `--dist-timeout`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from image_classification import store_waits
from image_classification.host_messages import attempt, bytes_tensor, decode, encode, outcome
from image_classification.peers import PeerError
from image_classification.plain_data import PlainValue

T = TypeVar("T")

_LOW_BITS = 32
_FAILED = b"failed"


@dataclasses.dataclass(frozen=True)
class Distributed:
    """This process's place among the ranks, from `setup_distributed`. As a context manager it leaves the group on exit.

    Attributes:
        rank: Number of this process over all nodes, 0 … world_size − 1.
        local_rank: Number of this process on its node, also the number of its GPU.
        world_size: Number of processes; with 1 there is no process group.
        device: Device of this process.
        backend: "nccl", "gloo", or "none" in a single process.
        host_group: Group for objects on the host; None if the process group itself carries them.
        notes: Decisions about this process, to be logged once.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    backend: str = "none"
    host_group: dist.ProcessGroup | None = dataclasses.field(default=None, compare=False, repr=False)
    notes: tuple[str, ...] = ()

    @classmethod
    def of_process_group(cls, device: torch.device) -> Distributed:
        """Return the place in a process group created by other code; a single process if there is none.

        Collective if that group uses NCCL.
        """
        if not dist.is_available() or not dist.is_initialized():
            return cls(device=device)
        local = int(os.environ.get("LOCAL_RANK", device.index or 0))
        backend = str(dist.get_backend())
        return cls(dist.get_rank(), local, dist.get_world_size(), device, backend, host_group_of(backend))

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    @property
    def is_distributed(self) -> bool:
        """Whether there is a process group, that is, more than one process."""
        return self.world_size > 1

    def __enter__(self) -> Distributed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def barrier(self) -> None:
        """Wait until every rank has reached this point."""
        if self.is_distributed:
            dist.barrier(device_ids=[self.local_rank] if self.backend == "nccl" else None)

    def all_reduce_sum(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Sum tensors over all ranks in one collective call, without a host sync.

        Floating tensors are summed as float64. Integers and booleans are summed exactly: each is split into two halves
        of 32 bits, whose float64 sums are exact for up to 2²⁰ ranks.

        Args:
            tensors: Any shapes and real dtypes, the same ones on every rank; unchanged.

        Returns:
            New tensors of the same shapes and devices, float64 or int64, equal on all ranks.
        """
        wide = [t.detach().to(torch.float64 if t.is_floating_point() else torch.int64) for t in tensors]
        if not self.is_distributed:
            return tuple(t.clone() for t in wide)
        parts: list[torch.Tensor] = []
        for tensor in wide:
            flat = tensor.to(self.device).flatten()
            halves = [flat] if flat.is_floating_point() else [flat >> _LOW_BITS, flat & (2**_LOW_BITS - 1)]
            parts += [half.to(torch.float64) for half in halves]
        packed = torch.cat(parts)
        dist.all_reduce(packed)
        summed = list(packed.split([len(part) for part in parts]))
        results = []
        for tensor in wide:
            total = summed.pop(0)
            if not tensor.is_floating_point():
                total = (total.to(torch.int64) << _LOW_BITS) + summed.pop(0).to(torch.int64)
            results.append(total.reshape(tensor.shape).to(tensor.device))
        return tuple(results)

    def sum_on_hosts(self, number: int) -> int:
        """Return a number known to the host, summed over all ranks. Collective, without a host sync."""
        total = torch.tensor([number])
        if self.is_distributed:
            dist.all_reduce(total, group=self.host_group)
        return int(total)

    def broadcast_object(self, value: object = None, source: int = 0) -> PlainValue:
        """Broadcast a JSON-able object from one rank; the source too gets it after the JSON round trip.

        Raises:
            TypeError: On every rank, when the source's object is not made of dict (string keys), list, str,
                int, float, bool and None.
        """
        payload = encode(value) if self.rank == source else b""
        return decode(self.broadcast_bytes(payload, source), source)

    def broadcast_tensors(self, tensors: Sequence[torch.Tensor], source: int = 0) -> None:
        """Overwrite tensors with those of one rank, in place, in one collective call per dtype.

        Args:
            tensors: Any shapes and dtypes, the same ones on every rank; they are changed in place.
            source: The rank whose values are sent.
        """
        if not self.is_distributed:
            return
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            alike = [tensor for tensor in tensors if tensor.dtype == dtype]
            packed = torch.cat([tensor.detach().reshape(-1).to(self.device) for tensor in alike])
            dist.broadcast(packed, source)
            with torch.no_grad():
                for tensor, part in zip(alike, packed.split([t.numel() for t in alike]), strict=True):
                    tensor.copy_(part.view(tensor.shape))

    def decide_on_main(self, decide: Callable[[], T]) -> T:
        """Run `decide` on rank 0 alone, however long it takes, and send the result to all ranks. Collective.

        Args:
            decide: Returns a JSON-able value. Raises ValueError (such as `ConfigError`) or OSError if something is
                wrong.

        Returns:
            The result of rank 0's `decide`.

        Raises:
            ConfigError: On every rank, with that message.
            PeerError: On the other ranks, if `decide` failed in another way.
        """
        if not self.is_distributed:
            result: T = outcome(attempt(decide))
            return result
        key = f"lucidprune/decided/{next(store_waits.num_waits)}"
        store = store_waits.store()
        if self.is_main:
            said = _FAILED
            try:
                said = encode(attempt(decide))
            finally:
                store.set(key, said)
        else:
            store_waits.wait_until(lambda: store.check([key]), "it decided")
            said = store.get(key)
        if said == _FAILED:
            raise PeerError("rank 0 failed; see its messages")
        decided: T = outcome(decode(said, 0))
        return decided

    def check_on_main(self, run: Callable[[], None]) -> None:
        """Run a check on rank 0 as `decide_on_main` does; it returns nothing and only raises errors."""
        self.decide_on_main(run)

    def gather_objects(self, value: object) -> list[PlainValue]:
        """Collect one JSON-able object per rank; every rank gets the list, in the order of ranks.

        Raises:
            TypeError: On every rank, when one of the objects is not JSON-able.
        """
        return [decode(payload, rank) for rank, payload in enumerate(self._all_gather_bytes(encode(value)))]

    def gather_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Concatenate a tensor's rows over all ranks, in the order of ranks.

        Args:
            rows: (n, …) on any device; n may differ between ranks and be 0, the other dimensions are equal (a rank
                without rows may have any).

        Returns:
            (Σ n, …) on this rank's device, equal on all ranks.
        """
        if not self.is_distributed:
            return rows
        shapes = self.gather_objects(list(rows.shape))
        lengths = [shape[0] for shape in shapes]
        trailing = next((shape[1:] for shape in shapes if shape[0]), shapes[0][1:])
        padded = torch.zeros(max(lengths), *trailing, dtype=rows.dtype, device=self.device)
        if len(rows):
            padded[: len(rows)] = rows
        buffers = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(buffers, padded)
        return torch.cat([buffer[:length] for buffer, length in zip(buffers, lengths, strict=True)])

    def broadcast_bytes(self, payload: bytes, source: int = 0) -> bytes:
        """Return one rank's byte string, of any length, on all ranks; the argument of the others is ignored."""
        if not self.is_distributed:
            return payload
        length = torch.tensor([len(payload)])
        dist.broadcast(length, source, group=self.host_group)
        mine = self.rank == source
        buffer = bytes_tensor(payload) if mine else torch.zeros(int(length), dtype=torch.uint8)
        dist.broadcast(buffer, source, group=self.host_group)
        return bytes(buffer.numpy())

    def _all_gather_bytes(self, payload: bytes) -> list[bytes]:
        """Return every rank's byte string, of any length, on all ranks."""
        if not self.is_distributed:
            return [payload]
        length = torch.tensor([len(payload)])
        lengths = [torch.empty_like(length) for _ in range(self.world_size)]
        dist.all_gather(lengths, length, group=self.host_group)
        sizes = [int(n) for n in lengths]
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(payload)] = bytes_tensor(payload)
        buffers = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(buffers, padded, group=self.host_group)
        return [bytes(buffer[:size].numpy()) for buffer, size in zip(buffers, sizes, strict=True)]

    def check_agreement(self, name: str, digest: str | Sequence[object] | Mapping[str, object]) -> None:
        """Check that all ranks hold the same value.

        Args:
            name: What is compared, for the message.
            digest: A digest, or any JSON-able value, which is then hashed.

        Raises:
            RuntimeError: On every rank; the message names the ranks that differ from the majority.
        """
        text = digest if isinstance(digest, str) else json.dumps(digest, sort_keys=True)
        values = self.gather_objects(hashlib.sha256(text.encode()).hexdigest())
        majority = max(values, key=values.count)  # the first of several: rank 0's in a tie
        differing = [rank for rank, value in enumerate(values) if value != majority]
        if differing:
            shown = ", ".join(f"rank {rank}: {values[rank][:12]}" for rank in differing)
            others = f"the other {len(values) - len(differing)}: {majority[:12]}"
            raise RuntimeError(
                f"the ranks disagree about {name} ({shown}; {others}). They no longer train the same "
                "network: stop the job and resume from the last checkpoint"
            )

    @contextmanager
    def main_process_first(self, what: str = "preparation") -> Iterator[None]:
        """Run a block on rank 0, then on the first rank of every other node, then on all the rest.

        For work that creates a file which the others only read, on shared or local disks. It may take any time.

        Raises:
            PeerError: On the other ranks, if the block failed on a rank that ran before or with them.
        """
        if not self.is_distributed:
            yield
            return
        if self.is_main:
            stage = 0
        elif self.local_rank == 0:
            stage = 1
        else:
            stage = 2
        stages = self.gather_objects(stage)
        prefix = f"lucidprune/first/{next(store_waits.num_waits)}"
        store = store_waits.store()
        failed = f"{prefix}/failed"

        def wait_for(ranks: list[int]) -> None:
            done = [f"{prefix}/{rank}" for rank in ranks]
            store_waits.wait_until(lambda: store.check([failed]) or not done or store.check(done), what)
            if store.check([failed]):
                raise PeerError(f"{what} failed on {store.get(failed).decode()}; see its messages")

        try:
            wait_for([rank for rank, earlier in enumerate(stages) if earlier < stage])
            yield
        except PeerError:
            raise
        except BaseException:
            store.set(failed, f"rank {self.rank}")
            raise
        store.set(f"{prefix}/{self.rank}", "done")
        wait_for([rank for rank, later in enumerate(stages) if later >= stage])

    def close(self, timeout: float = 10.0) -> bool:
        """Leave the process group. Never hangs, even when another rank is dead.

        Args:
            timeout: Seconds to wait; NCCL may block forever on a communicator whose peer is gone.

        Returns:
            Whether the group was left in time.
        """
        if not (self.is_distributed and dist.is_initialized()):
            return True
        leaving = threading.Thread(target=dist.destroy_process_group, daemon=True)
        leaving.start()
        leaving.join(timeout)
        return not leaving.is_alive()


def host_group_of(backend: str) -> dist.ProcessGroup | None:
    """Create a Gloo group of all ranks if the process group cannot carry host data; collective."""
    if backend != "nccl":
        return None
    default = dist.distributed_c10d._get_default_group()
    if _HOST_GROUPS.get("of") is not default:
        _HOST_GROUPS.update({"of": default, "group": dist.new_group(backend="gloo")})
    group: dist.ProcessGroup = _HOST_GROUPS["group"]
    return group


#: The last process group of NCCL and the Gloo group created for it: all pruners of a job share one.
_HOST_GROUPS: dict[str, Any] = {}
