"""Chooses a process's device and joins the process group, by flags and the launcher's environment."""

from __future__ import annotations

import dataclasses
import datetime
import os
from typing import Literal

import torch
import torch.distributed as dist

from image_classification.affinity import Affinity, bind_to_gpu
from image_classification.config import ConfigError, check, flag
from image_classification.distributed import Distributed, host_group_of
from image_classification.host_memory import keep_freed_memory

#: Device to compute on; auto is the GPU if there is one.
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


def setup_distributed(config: DistributedConfig) -> Distributed:
    """Choose this process's device and join the others.

    Reads RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE, which `multiproc.py` and torchrun set. Without them, or
    with a world of one, there is no process group.

    Raises:
        ConfigError: The requested GPU does not exist, there are more processes than GPUs, NCCL has no GPU, or the
            variables are incomplete.
    """
    rank, local_rank, world_size, local_world_size = _read_environment()
    device = _choose_device(config, local_rank, local_world_size)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
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
    return Distributed(rank, local_rank, world_size, device, backend, host_group_of(backend), notes)


def _bind(
    config: DistributedConfig, device: torch.device, local_rank: int, local_world_size: int
) -> tuple[str, ...]:
    """Apply `--gpu-affinity`, before threads and workers are created that inherit it."""
    if config.gpu_affinity == "none":
        return ()
    if device.type != "cuda":
        return (f"--gpu-affinity {config.gpu_affinity} has no effect: there is no GPU",)
    return (bind_to_gpu(config.gpu_affinity, device, local_rank, local_world_size),)


def _read_environment() -> tuple[int, int, int, int]:
    """Return (rank, local rank, world size, number of processes on this node) from the launcher's environment."""
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
