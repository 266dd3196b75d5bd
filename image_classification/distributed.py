"""Processes that train together: process group, exact reductions, broadcast, rank-0 helpers, agreement.

Everything also works in a single process, without a process group: reductions return their input.
Objects travel between ranks as JSON, never as pickles, and on the host: beside NCCL there is a Gloo group for them.
Work of one rank that the others wait for (`decide_on_main`, `main_process_first`) may take hours: they wait at the
store of the process group, which has no clock, and not in a collective, which gives up after `--dist-timeout`.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

from image_classification.affinity import Affinity, bind_to_gpu
from image_classification.config import ConfigError, SettingError, check, flag
from image_classification.exit_codes import EXIT_PEER, EXIT_SAVED
from image_classification.plain_data import PlainValue

__all__ = [
    "EXIT_PEER",
    "EXIT_SAVED",
    "Distributed",
    "DistributedConfig",
    "PeerError",
    "peer_loss",
    "setup_distributed",
]

T = TypeVar("T")

_LOW_BITS = 32
_POLL_SECONDS = 0.05, 1.0  # between two looks at the store, at first and at most
_FAILED = b"failed"
_num_waits = itertools.count()  # all ranks wait for the same things in the same order
#: What Gloo, NCCL and the store of the process group say when the other end has gone.
_PEER_GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "remote process exited",
    "Broken pipe",
    "Did the remote server shutdown",
)
#: What Gloo and NCCL say when the other end is there and does not answer.
_PEER_SILENT = ("Timed out waiting", "Watchdog caught collective operation timeout", "timed out after")


class PeerError(RuntimeError):
    """Another rank failed and has said why; this one stops with it."""


def peer_loss(error: Exception) -> str | None:
    """What to tell people when an error only means that another rank failed; None for any other error."""
    if isinstance(error, PeerError):
        return str(error)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not isinstance(error, RuntimeError):
        return None
    for kinds, what in ((_PEER_GONE, "ended"), (_PEER_SILENT, "gave no answer within --dist-timeout")):
        said = next((words for words in kinds if words in str(error)), None)
        if said is not None:
            return f"another rank {what}, and this one cannot go on without it ({said})"
    return None


#: Where to compute; auto is the GPU if there is one.
DeviceName = Literal["auto", "cuda", "cpu"]


@dataclasses.dataclass(kw_only=True)
class DistributedConfig:
    """How processes find their device and each other. Ranks come from the launcher's environment."""

    device: DeviceName = flag(
        "auto", "--device", help="Where to compute; auto takes the GPU if there is one."
    )
    dist_backend: Literal["auto", "nccl", "gloo"] = flag(
        "auto",
        "--dist-backend",
        help="Library that connects the processes; auto takes NCCL on GPUs and Gloo on CPUs.",
    )
    dist_timeout: float = flag(
        600.0, "--dist-timeout", help="Seconds after which a rank that waits for the others gives up."
    )

    gpu_affinity: Affinity = flag(
        "none",
        "--gpu-affinity",
        help="Keep each process on CPU cores near its GPU: all (socket), or a share of its own (socket-unique).",
    )

    def __post_init__(self) -> None:
        check(
            self.gpu_affinity == "none" or self.device != "cpu",
            f"--gpu-affinity {self.gpu_affinity} binds processes to GPUs and --device cpu has none: leave one out",
        )
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
        host_group: Carries objects from host to host; None where the process group itself does.
        notes: What was decided about this process; to be logged once.
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
        """The place among the ranks of the process group that other code has made; a single process without one.

        Collective, where that group is one of NCCL.
        """
        if not dist.is_available() or not dist.is_initialized():
            return cls(device=device)
        local = int(os.environ.get("LOCAL_RANK", device.index or 0))
        backend = str(dist.get_backend())
        return cls(dist.get_rank(), local, dist.get_world_size(), device, backend, _host_group(backend))

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

    def sum_on_hosts(self, number: int) -> int:
        """A number that the host knows, summed over all ranks. Collective; no host waits for its device."""
        total = torch.tensor([number])
        if self.is_distributed:
            dist.all_reduce(total, group=self.host_group)
        return int(total)

    def broadcast_object(self, value: object = None, source: int = 0) -> PlainValue:
        """Send a JSON-able object from one rank to all; the source too gets what JSON makes of it.

        Raises:
            TypeError: On every rank, when the source's object is not made of dict (string keys), list, str,
                int, float, bool and None.
        """
        payload = _encode(value) if self.rank == source else b""
        return _decode(self.broadcast_bytes(payload, source), source)

    def broadcast_tensors(self, tensors: Sequence[torch.Tensor], source: int = 0) -> None:
        """Overwrite tensors by those of one rank, in one collective call per dtype.

        Args:
            tensors: Any shapes and dtypes, the same ones on every rank; they are changed in place.
            source: The rank whose values all get.
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
        """Let rank 0 alone find something out, however long it takes, and tell all ranks. Collective.

        Args:
            decide: Returns a JSON-able value. Raises ValueError (`ConfigError` among them) or OSError where something
                is wrong.

        Returns:
            What rank 0's `decide` returned.

        Raises:
            ConfigError: On every rank, with that message.
            PeerError: On the other ranks, where `decide` failed otherwise.
        """
        if not self.is_distributed:
            result: T = _outcome(_attempt(decide))
            return result
        key = f"lucidprune/decided/{next(_num_waits)}"
        store = _store()
        if self.is_main:
            said = _FAILED
            try:
                said = _encode(_attempt(decide))
            finally:
                store.set(key, said)
        else:
            _wait_until(lambda: store.check([key]), "it decided")
            said = store.get(key)
        if said == _FAILED:
            raise PeerError("rank 0 failed; see its messages")
        decided: T = _outcome(_decode(said, 0))
        return decided

    def check_on_main(self, run: Callable[[], None]) -> None:
        """As `decide_on_main`, for a check that finds nothing but faults."""
        self.decide_on_main(run)

    def gather_objects(self, value: object) -> list[PlainValue]:
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

    def broadcast_bytes(self, payload: bytes, source: int = 0) -> bytes:
        """One rank's byte string, of any length, for all ranks; the others' is not looked at."""
        if not self.is_distributed:
            return payload
        length = torch.tensor([len(payload)])
        dist.broadcast(length, source, group=self.host_group)
        mine = self.rank == source
        buffer = _to_tensor(payload) if mine else torch.zeros(int(length), dtype=torch.uint8)
        dist.broadcast(buffer, source, group=self.host_group)
        return bytes(buffer.numpy())

    def _all_gather_bytes(self, payload: bytes) -> list[bytes]:
        """Every rank's byte string, of any length, for all ranks."""
        if not self.is_distributed:
            return [payload]
        length = torch.tensor([len(payload)])
        lengths = [torch.empty_like(length) for _ in range(self.world_size)]
        dist.all_gather(lengths, length, group=self.host_group)
        sizes = [int(n) for n in lengths]
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(payload)] = _to_tensor(payload)
        buffers = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(buffers, padded, group=self.host_group)
        return [bytes(buffer[:size].numpy()) for buffer, size in zip(buffers, sizes, strict=True)]

    def check_agreement(self, name: str, digest: str | Sequence[object] | Mapping[str, object]) -> None:
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

        For work that leaves a file which the others only read, on shared and on local disks alike. It may take as long
        as it needs.

        Raises:
            PeerError: On the other ranks, when the block failed on one before or beside them.
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
        prefix = f"lucidprune/first/{next(_num_waits)}"
        store = _store()
        failed = f"{prefix}/failed"

        def wait_for(ranks: list[int]) -> None:
            done = [f"{prefix}/{rank}" for rank in ranks]
            _wait_until(lambda: store.check([failed]) or not done or store.check(done), what)
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
    notes = _bind(config, device, local_rank, local_world_size)
    if world_size == 1:
        return Distributed(device=device, notes=notes)
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
    return Distributed(rank, local_rank, world_size, device, backend, _host_group(backend), notes)


def _bind(
    config: DistributedConfig, device: torch.device, local_rank: int, local_world_size: int
) -> tuple[str, ...]:
    """`--gpu-affinity`, before threads and workers are made that inherit it."""
    if config.gpu_affinity == "none":
        return ()
    if device.type != "cuda":
        return (f"--gpu-affinity {config.gpu_affinity} has no effect: there is no GPU",)
    return (bind_to_gpu(config.gpu_affinity, device, local_rank, local_world_size),)


def _host_group(backend: str) -> dist.ProcessGroup | None:
    """A Gloo group of all ranks where the process group cannot carry what lies on the host; collective."""
    if backend != "nccl":
        return None
    default = dist.distributed_c10d._get_default_group()
    if _HOST_GROUPS.get("of") is not default:
        _HOST_GROUPS.update({"of": default, "group": dist.new_group(backend="gloo")})
    group: dist.ProcessGroup = _HOST_GROUPS["group"]
    return group


#: The last process group of NCCL and the Gloo group that was made for it: all pruners of a job share one.
_HOST_GROUPS: dict[str, Any] = {}


def _store() -> Any:
    """The key-value store through which the ranks have found each other."""
    return dist.distributed_c10d._get_default_store()


def _wait_until(reached: Callable[[], bool], what: str) -> None:
    """Ask again and again, without a limit of time; a store that has gone means that its rank has.

    Raises:
        PeerError: The store is gone.
    """
    pause, longest = _POLL_SECONDS
    try:
        while not reached():
            time.sleep(pause)
            pause = min(2 * pause, longest)
    except RuntimeError as error:
        raise PeerError(f"another rank ended before {what} ({error})") from error


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


def _to_tensor(payload: bytes) -> torch.Tensor:
    return (
        torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        if payload
        else torch.zeros(0, dtype=torch.uint8)
    )


def _attempt(decide: Callable[[], object]) -> list[PlainValue]:
    """[value], or [None, what is wrong] with the parts of a `SettingError` or the message of another error."""
    try:
        return [decide()]
    except SettingError as error:
        return [None, [error.setting, str(error.value), error.problem]]
    except (ValueError, OSError) as error:
        return [None, [str(error)]]


def _outcome(attempt: list[PlainValue]) -> PlainValue:
    """The value of `_attempt`, or its error raised."""
    if len(attempt) == 1:
        return attempt[0]
    raise SettingError(*attempt[1]) if len(attempt[1]) == 3 else ConfigError(attempt[1][0])


def _encode(value: object) -> bytes:
    """JSON, or the reason why there is none: the other ranks wait in the collective and need to know."""
    try:
        return json.dumps(["", value]).encode()
    except (TypeError, ValueError) as error:
        return json.dumps([str(error), None]).encode()


def _decode(payload: bytes, rank: int) -> PlainValue:
    problem, value = json.loads(payload)
    if problem:
        raise TypeError(f"rank {rank} cannot send its object as JSON: {problem}")
    return value
