"""CPU affinity: keeps a process, with its memory, copies and data workers, on the cores near its GPU.

A process that migrates to another socket reads its batches through the link between the sockets. The cores are those
that NVML reports for the GPU; data workers inherit the choice.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch

from image_classification.nvml import open_gpu

Affinity = Literal["none", "socket", "socket-unique"]
_WORD_BITS = 64


def bind_to_gpu(mode: Affinity, device: torch.device, local_rank: int, local_world_size: int) -> str:
    """Restrict this process to cores near its GPU; return a sentence on what was done, or why nothing was.

    Args:
        mode: "socket": all cores near the GPU; "socket-unique": a share of them, disjoint from those of the other
            processes of this node whose GPUs are near the same cores.
        device: The GPU.
        local_rank: Index of this process on its node, and of its GPU.
        local_world_size: Number of processes on this node.
    """
    allowed = os.sched_getaffinity(0)
    near = {rank: _cores_near(torch.device("cuda", rank)) & allowed for rank in range(local_world_size)}
    if not near[local_rank]:
        return (
            f"--gpu-affinity {mode}: NVML names no core near {device} that is free to use: nothing is bound"
        )
    cores = near[local_rank]
    if mode == "socket-unique":
        cores = _share(near, local_rank)
        if not cores:
            return f"--gpu-affinity {mode}: more processes than cores near {device}: nothing is bound; use socket"
    os.sched_setaffinity(0, cores)
    return f"--gpu-affinity {mode}: bound to CPU cores {_ranges(cores)}"


def _cores_near(device: torch.device) -> set[int]:
    """Return the cores of the GPU's socket according to NVML; none if it does not report them."""
    opened = open_gpu(device)
    if opened is None:
        return set()
    nvml, handle = opened
    num_words = ((os.cpu_count() or 1) + _WORD_BITS - 1) // _WORD_BITS
    try:
        words = list(nvml.nvmlDeviceGetCpuAffinity(handle, num_words))
    except nvml.NVMLError:
        return set()
    finally:
        nvml.nvmlShutdown()
    return {
        index * _WORD_BITS + bit
        for index, word in enumerate(words)
        for bit in range(_WORD_BITS)
        if word >> bit & 1
    }


def _share(near: Mapping[int, set[int]], local_rank: int) -> set[int]:
    """Return this process's share of the physical cores near several processes: whole cores, siblings included."""
    sharing = [rank for rank, cores in sorted(near.items()) if cores == near[local_rank]]
    physical = sorted({_siblings(core) & frozenset(near[local_rank]) for core in near[local_rank]}, key=min)
    each = len(physical) // len(sharing)
    begin = sharing.index(local_rank) * each
    return set().union(*physical[begin : begin + each])


def _siblings(core: int) -> frozenset[int]:
    """Return the hardware threads of a core's physical core; the core itself if the system does not report them."""
    place = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
    try:
        listed = place.read_text().strip().split(",")
    except OSError:
        return frozenset({core})
    found = {core}
    for part in listed:
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)


def _ranges(cores: set[int]) -> str:
    """Format {0, 1, 2, 8} as "0-2,8"."""
    runs: list[list[int]] = []
    for core in sorted(cores):
        if runs and core == runs[-1][-1] + 1:
            runs[-1].append(core)
        else:
            runs.append([core])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
