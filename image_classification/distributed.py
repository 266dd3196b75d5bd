"""Processes that train together: process group, exact reductions, broadcast, rank-0 helpers, agreement.

Everything works in a single process too, without a process group: reductions return their input, rank 0 is
alone. Objects travel between ranks as JSON, never as pickles.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from image_classification.config import ConfigError, check, flag

EXIT_SAVED = 75
"""Exit code of a process that was asked to stop (SIGTERM, SIGUSR1), saved and wants to be started
again: EX_TEMPFAIL of sysexits.h, "try again later". `multiproc.py` hands it on; the Slurm and Kubernetes
files start the job again."""

EXIT_PEER = 69
"""Exit code of a process that stops because another rank failed: EX_UNAVAILABLE of sysexits.h. `multiproc.py` looks
for the rank that failed by itself."""

_LOW_BITS = 32
#: What Gloo, NCCL and the store of the process group say when the other end has gone.
_PEER_GONE = ("Connection closed by peer", "Connection reset by peer", "remote process exited", "Broken pipe",
              "Did the remote server shutdown")  # fmt: skip


class PeerError(RuntimeError):
    """Another rank failed and has said why; this one stops with it."""


def peer_loss(error: Exception) -> str | None:
    """What to tell people when an error only means that another rank failed; None for any other error."""
    if isinstance(error, PeerError):
        return str(error)
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    gone = next((words for words in _PEER_GONE if several and words in str(error)), None)
    return None if gone is None else f"another rank ended, and this one cannot go on without it ({gone})"


@dataclasses.dataclass(kw_only=True)
class DistributedConfig:
    """How processes find their device and each other. Ranks come from the launcher's environment."""

    device: str = flag(
        "auto",
        "--device",
        help="Where to compute; auto takes the GPU if there is one.",
        choices=("auto", "cuda", "cpu"),
    )
    dist_backend: str = flag(
        "auto",
        "--dist-backend",
        help="Library that connects the processes; auto takes NCCL on GPUs and Gloo on CPUs.",
        choices=("auto", "nccl", "gloo"),
    )
    dist_timeout: float = flag(
        600.0, "--dist-timeout", help="Seconds after which a rank that waits for the others gives up."
    )

    def __post_init__(self) -> None:
        check(self.dist_timeout > 0, f"--dist-timeout {self.dist_timeout}: must be more than 0 seconds")
        check(
            not (self.device == "cpu" and self.dist_backend == "nccl"),
            "--dist-backend nccl needs GPUs and --device cpu has none: use --dist-backend gloo",
        )


@dataclasses.dataclass(frozen=True)
class Distributed:
    """This process's place among the ranks, from `setup_distributed`. As a context it leaves the group.

    Attributes:
        rank: Number of this process over all nodes, 0 … world_size − 1.
        local_rank: Number of this process on its node, also the number of its GPU.
        world_size: Number of processes; with 1 there is no process group.
        device: Where this process computes.
        backend: "nccl", "gloo", or "none" in a single process.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    backend: str = "none"

    @classmethod
    def of_process_group(cls, device: torch.device) -> Distributed:
        """The place among the ranks of the process group that somebody else has made; a single process without one."""
        if not dist.is_available() or not dist.is_initialized():
            return cls(device=device)
        local = int(os.environ.get("LOCAL_RANK", device.index or 0))
        return cls(dist.get_rank(), local, dist.get_world_size(), device, str(dist.get_backend()))

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and speaks."""
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
        """Wait until every rank has come here."""
        if self.is_distributed:
            dist.barrier(device_ids=[self.local_rank] if self.backend == "nccl" else None)

    def all_reduce_sum(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Sum tensors over all ranks, all in one collective call, without a host synchronisation.

        Floating tensors are summed as float64. Integers and booleans are summed exactly: each is split into
        two halves of 32 bits, whose float64 sums are exact for up to 2²⁰ ranks.

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

    def broadcast_object(self, value: Any = None, source: int = 0) -> Any:
        """Send a JSON-able object from one rank to all; the source too gets what JSON makes of it.

        Raises:
            TypeError: On every rank, when the source's object is not made of dict (string keys), list, str,
                int, float, bool and None.
        """
        payload = _encode(value) if self.rank == source else b""
        return _decode(self._broadcast_bytes(payload, source), source)

    def check_on_main(self, run: Callable[[], None]) -> None:
        """Run a check on rank 0, and let all ranks know what it found. Collective.

        Args:
            run: Raises ValueError (`ConfigError` among them) or OSError where something is wrong.

        Raises:
            ConfigError: On every rank, with that message.
        """
        problem = None
        if self.is_main:
            try:
                run()
            except (ValueError, OSError) as error:
                problem = str(error)
        problem = self.broadcast_object(problem)
        if problem is not None:
            raise ConfigError(problem)

    def gather_objects(self, value: Any) -> list[Any]:
        """Collect one JSON-able object per rank; every rank gets the list, in the order of ranks.

        Raises:
            TypeError: On every rank, when one of the objects is not JSON-able.
        """
        return [_decode(payload, rank) for rank, payload in enumerate(self._all_gather_bytes(_encode(value)))]

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

    def _broadcast_bytes(self, payload: bytes, source: int) -> bytes:
        """One rank's byte string, of any length, for all ranks."""
        if not self.is_distributed:
            return payload
        length = torch.tensor([len(payload)], device=self.device)
        dist.broadcast(length, source)
        buffer = torch.zeros(int(length), dtype=torch.uint8, device=self.device)
        if self.rank == source:
            buffer = self._to_tensor(payload)
        dist.broadcast(buffer, source)
        return bytes(buffer.cpu().numpy())

    def _all_gather_bytes(self, payload: bytes) -> list[bytes]:
        """Every rank's byte string, of any length, for all ranks."""
        if not self.is_distributed:
            return [payload]
        length = torch.tensor([len(payload)], device=self.device)
        lengths = [torch.empty_like(length) for _ in range(self.world_size)]
        dist.all_gather(lengths, length)
        sizes = [int(n) for n in lengths]
        padded = torch.zeros(max(sizes), dtype=torch.uint8, device=self.device)
        padded[: len(payload)] = self._to_tensor(payload)
        buffers = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(buffers, padded)
        return [bytes(buffer[:size].cpu().numpy()) for buffer, size in zip(buffers, sizes, strict=True)]

    def _to_tensor(self, payload: bytes) -> torch.Tensor:
        return torch.frombuffer(bytearray(payload), dtype=torch.uint8).to(self.device)

    def check_agreement(self, name: str, digest: str | Sequence[Any] | dict[str, Any]) -> None:
        """Make sure that all ranks hold the same value.

        Args:
            name: What is compared, for the message.
            digest: A digest, or any JSON-able value, which is then hashed.

        Raises:
            RuntimeError: On every rank; the message names the ranks that differ from the majority.
        """
        text = digest if isinstance(digest, str) else json.dumps(digest, sort_keys=True)
        values = self.gather_objects(hashlib.sha256(text.encode()).hexdigest())
        majority = max(values, key=values.count)  # the first of several: rank 0's when none leads
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

        For work that leaves a file which the others only read, on shared and on local disks alike.

        Raises:
            PeerError: On the other ranks, when the block failed on one before or beside them.
        """
        stage = 0 if self.is_main else 1 if self.local_rank == 0 else 2
        for earlier in range(stage):
            self._join_stage(False, earlier, what)
        failed = True
        try:
            yield
            failed = False
        finally:
            if failed:
                self._count_failures(True)
        for later in range(stage, 3):
            self._join_stage(False, later, what)

    def _join_stage(self, failed: bool, stage: int, what: str) -> None:
        num_failed = self._count_failures(failed)
        if num_failed:
            raise PeerError(
                f"{what} failed on {num_failed} rank(s) in stage {stage + 1} of 3; see their messages"
            )

    def _count_failures(self, failed: bool) -> int:
        (count,) = self.all_reduce_sum(torch.tensor(int(failed), device=self.device))
        return int(count)

    def close(self, timeout: float = 10.0) -> bool:
        """Leave the process group. Never hangs, even when another rank is dead.

        Args:
            timeout: Seconds to wait; NCCL may block for ever on a communicator whose peer has gone.

        Returns:
            Whether the group was left in time.
        """
        if not (self.is_distributed and dist.is_initialized()):
            return True
        leaving = threading.Thread(target=dist.destroy_process_group, daemon=True)
        leaving.start()
        leaving.join(timeout)
        return not leaving.is_alive()


def setup_distributed(config: DistributedConfig) -> Distributed:
    """Choose this process's device and join the others.

    Reads RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE, which `multiproc.py` and torchrun set. Without
    them, or with a world of one, there is no process group.

    Raises:
        ConfigError: The GPU asked for does not exist, there are more processes than GPUs, NCCL has no GPU, or
            the variables are incomplete.
    """
    rank, local_rank, world_size, local_world_size = _read_environment()
    device = _choose_device(config, local_rank, local_world_size)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size == 1:
        return Distributed(device=device)
    backend = config.dist_backend
    if backend == "auto":
        backend = "nccl" if device.type == "cuda" else "gloo"
    check(
        backend != "nccl" or device.type == "cuda",
        "--dist-backend nccl needs a GPU per process and there is none here: use --dist-backend gloo",
    )
    dist.init_process_group(
        backend,
        timeout=datetime.timedelta(seconds=config.dist_timeout),
        device_id=device if backend == "nccl" else None,
    )
    return Distributed(rank, local_rank, world_size, device, backend)


def _read_environment() -> tuple[int, int, int, int]:
    """(rank, local rank, world size, number of processes on this node) as the launcher says."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    missing = [name for name in names if name not in os.environ]
    if "RANK" in missing and "WORLD_SIZE" in missing:
        return 0, 0, 1, 1
    if missing:
        raise ConfigError(
            f"of {', '.join(names)} the environment lacks {', '.join(missing)}: start with "
            "`python ./multiproc.py --nproc_per_node N ./main.py …`, or unset them to run one process"
        )
    rank, local_rank, world_size = (int(os.environ[name]) for name in names)
    return rank, local_rank, world_size, int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1))


def _choose_device(config: DistributedConfig, local_rank: int, local_world_size: int) -> torch.device:
    num_gpus = torch.cuda.device_count() if config.device != "cpu" else 0
    if config.device == "cpu" or (config.device == "auto" and num_gpus == 0):
        return torch.device("cpu")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    note = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible})"
    check(num_gpus > 0, f"--device cuda: no GPU is visible{note}; use --device cpu or install the driver")
    check(
        local_rank < num_gpus,
        f"--nproc_per_node {local_world_size} needs as many GPUs and {num_gpus} are visible here{note}: "
        f"start at most {num_gpus} processes, or add --device cpu",
    )
    return torch.device("cuda", local_rank)


def _encode(value: Any) -> bytes:
    """JSON, or the reason why there is none: the other ranks wait in the collective and must learn it."""
    try:
        return json.dumps(["", value]).encode()
    except (TypeError, ValueError) as error:
        return json.dumps([str(error), None]).encode()


def _decode(payload: bytes, rank: int) -> Any:
    problem, value = json.loads(payload)
    if problem:
        raise TypeError(f"rank {rank} cannot send its object as JSON: {problem}")
    return value
