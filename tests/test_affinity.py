"""Processes on the cores near their GPUs, with a pynvml of our own and a machine of sixteen hardware threads."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch

from image_classification import affinity
from image_classification.affinity import bind_to_gpu
from image_classification.config import ConfigError
from image_classification.joining import DistributedConfig

#: Two sockets of four cores with two threads each: core c and c + 8 are one. GPUs 0 to 2 are on the first.
SOCKETS = ({0, 1, 2, 3, 8, 9, 10, 11}, {4, 5, 6, 7, 12, 13, 14, 15})
PLACE = {0: 0, 1: 0, 2: 0, 3: 1}


class Machine:
    """What this process may use, and what it was bound to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.allowed, self.bound = set(range(16)), set[int]()
        nvml = types.ModuleType("pynvml")

        def cores(handle: str, num_words: int) -> list[int]:
            mask = sum(1 << core for core in SOCKETS[PLACE[int(handle[-1])]])
            return [mask] + [0] * (num_words - 1)

        settings = {
            "NVMLError": RuntimeError,
            "nvmlInit": lambda: None,
            "nvmlShutdown": lambda: None,
            "nvmlDeviceGetHandleByUUID": lambda name: name,
            "nvmlDeviceGetCpuAffinity": cores,
        }
        for name, value in settings.items():
            setattr(nvml, name, value)
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        monkeypatch.setattr(
            torch.cuda,
            "get_device_properties",
            lambda device: types.SimpleNamespace(uuid=f"uuid-{device.index}"),
        )
        monkeypatch.setattr(affinity.os, "sched_getaffinity", lambda pid: set(self.allowed))
        monkeypatch.setattr(
            affinity.os, "sched_setaffinity", lambda pid, cores: setattr(self, "bound", set(cores))
        )
        real = Path.read_text

        def read_text(path: Path, *args: object, **kwargs: object) -> str:
            if path.name != "thread_siblings_list":
                return real(path)
            core = int(path.parts[-3][3:]) % 8
            return f"{core},{core + 8}\n"

        monkeypatch.setattr(Path, "read_text", read_text)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def test_all_cores_of_the_socket(machine: Machine) -> None:
    told = bind_to_gpu("socket", torch.device("cuda", 3), 3, 4)
    assert machine.bound == SOCKETS[1]
    assert "4-7,12-15" in told


def test_shares_are_whole_cores_and_disjoint(machine: Machine) -> None:
    shares = []
    for rank in range(4):
        bind_to_gpu("socket-unique", torch.device("cuda", rank), rank, 4)
        shares.append(machine.bound)
    assert shares == [{0, 8}, {1, 9}, {2, 10}, SOCKETS[1]]


def test_only_cores_that_the_process_has(machine: Machine) -> None:
    """A batch system's share is never left."""
    machine.allowed = {2, 3, 10, 11, 12}
    bind_to_gpu("socket", torch.device("cuda", 0), 0, 1)
    assert machine.bound == {2, 3, 10, 11}


@pytest.mark.parametrize(("allowed", "why"), [({5, 6}, "no core"), ({0, 8}, "more processes")])
def test_where_it_cannot_be_it_says_so(machine: Machine, allowed: set[int], why: str) -> None:
    machine.allowed = allowed
    told = bind_to_gpu("socket-unique", torch.device("cuda", 0), 0, 3)
    assert why in told
    assert not machine.bound


def test_no_gpu_no_affinity() -> None:
    with pytest.raises(ConfigError, match="--gpu-affinity"):
        DistributedConfig(device="cpu", gpu_affinity="socket")
