"""Ranks together: one run of two Gloo processes for everything; the single process in place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from image_classification.config import ConfigError
from image_classification.distributed import Distributed
from image_classification.joining import DistributedConfig, setup_distributed
from image_classification.peers import PeerError, peer_loss

ROOT = Path(__file__).resolve().parent.parent
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "CUDA_VISIBLE_DEVICES")

# Each rank writes what it saw to DIRECTORY/rank_N.json.
SCRIPT = """
import dataclasses, json, os, sys, time
from pathlib import Path
import torch
from image_classification.config import ConfigError, check
from image_classification.agreement import agreed, shared_file
from image_classification.checkpoint import CheckpointConfig
from image_classification.config import section
from image_classification.joining import DistributedConfig, setup_distributed

folder = Path(sys.argv[1])


@dataclasses.dataclass(frozen=True)
class Job:
    checkpoint: CheckpointConfig = section(CheckpointConfig)


seen = {}
with setup_distributed(DistributedConfig(device="cpu", dist_timeout=2)) as distributed:
    rank = distributed.rank
    d = distributed
    seen["place"] = [rank, d.local_rank, d.world_size, d.backend, d.is_main]
    sums = distributed.all_reduce_sum(
        torch.tensor([2**53 + 1, -(2**40) - rank]),                 # not exact as float64
        torch.tensor([[0.1], [1e-300 * (rank + 1)]], dtype=torch.float64),
        torch.tensor(1.5, dtype=torch.float16),
        torch.tensor([True, rank == 1]),
        torch.empty(0),
    )
    seen["sums"] = [t.tolist() for t in sums]
    seen["dtypes"] = [str(t.dtype) for t in sums]
    seen["broadcast"] = distributed.broadcast_object({"keep": [1, 2.5, None, "é"]} if rank == 0 else None)
    seen["broadcast1"] = distributed.broadcast_object([rank] if rank == 1 else None, source=1)
    seen["gathered"] = distributed.gather_objects("x" * (10 * rank))
    try:
        distributed.broadcast_object({1, 2} if rank == 0 else None)
    except TypeError as error:
        seen["not_json"] = str(error)
    distributed.check_agreement("the widths", {"b": 1, "a": [2]} if rank == 0 else {"a": [2], "b": 1})
    try:
        distributed.check_agreement("the widths", f"digest of {rank}")
    except RuntimeError as error:
        seen["disagreement"] = str(error)
    with distributed.main_process_first():
        seen["existed"] = (folder / "made").exists()
        if rank == 0:
            time.sleep(0.3)
        (folder / "made").touch()
    try:
        with distributed.main_process_first("making the cache"):
            if rank == 0:
                raise OSError("disk full")
            seen["entered"] = True
    except (OSError, RuntimeError) as error:
        seen["first_failed"] = f"{type(error).__name__}: {error}"
    try:
        with distributed.main_process_first("reading the cache"):
            if rank == 1:
                raise OSError("no such file")
    except (OSError, RuntimeError) as error:
        seen["second_failed"] = f"{type(error).__name__}: {error}"
    # Rank 0 takes longer than the clock of a collective allows.
    seen["decided"] = distributed.decide_on_main(lambda: (time.sleep(3), ["by", rank])[1])
    with distributed.main_process_first("something long"):
        if rank == 0:
            time.sleep(3)
    try:
        distributed.decide_on_main(lambda: 1 / 0)
    except Exception as error:
        seen["undecided"] = f"{type(error).__name__}: {error}"
    # Rank 1 has another file under a name, and none under another; then it is started with another setting.
    own = folder / f"node_{rank}" / "file"
    if rank == 0:
        own.parent.mkdir()
        own.write_text("of rank 0")
    distributed.barrier()
    mine = shared_file(folder / "node_0" / "file", distributed)
    seen["same_file"] = mine == folder / "node_0" / "file"
    os.chdir(own.parent if rank == 0 else folder)
    found = shared_file(Path("file"), distributed)
    seen["sent"] = [found.read_text(), found == Path("file")]
    seen["nowhere"] = str(shared_file(Path("nowhere"), distributed))
    try:
        agreed(Job(checkpoint=CheckpointConfig(workspace=Path(f"{rank}"), checkpoint_interval=rank)), distributed)
    except ConfigError as error:
        seen["settings"] = str(error)
    distributed.check_on_main(lambda: None)
    try:
        distributed.check_on_main(lambda: check(False, f"--flag of rank {rank}"))
    except ConfigError as error:
        seen["checked"] = str(error)
    try:
        distributed.check_on_main(lambda: open("/nowhere/at/all"))
    except ConfigError as error:
        seen["opened"] = str(error)
    distributed.barrier()
(folder / f"rank_{rank}.json").write_text(json.dumps(seen))
"""

DYING = """
import os, sys, time
import torch
from image_classification.joining import DistributedConfig, setup_distributed
distributed = setup_distributed(DistributedConfig(device="cpu", dist_timeout=30))
distributed.barrier()
if distributed.rank == 1:
    os._exit(0)
begin = time.monotonic()
try:
    distributed.all_reduce_sum(torch.ones(1))
except RuntimeError:
    print("peer lost", flush=True)
distributed.close()
print("closed after", time.monotonic() - begin, flush=True)
"""


@pytest.fixture(scope="module")
def free_port():
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start_rank(rank: int, code: str, port: int, *arguments: object) -> subprocess.Popen[str]:
    environment = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.fixture(scope="module")
def seen(tmp_path_factory, free_port):
    folder = tmp_path_factory.mktemp("ranks")
    ranks = [start_rank(rank, SCRIPT, free_port, folder) for rank in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], outputs
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.multiprocess
class TestTwoRanks:
    def test_place(self, seen):
        assert [entry["place"] for entry in seen] == [[0, 0, 2, "gloo", True], [1, 1, 2, "gloo", False]]

    def test_sums_are_exact_and_equal_on_all_ranks(self, seen):
        assert seen[0]["sums"] == seen[1]["sums"]
        integers, floats, half, booleans, nothing = seen[0]["sums"]
        assert integers == [2**54 + 2, -(2**41) - 1]
        assert floats == [[0.2], [3e-300]]
        assert half == 3.0
        assert booleans == [2, 1]
        assert nothing == []
        assert seen[0]["dtypes"] == [
            "torch.int64",
            "torch.float64",
            "torch.float64",
            "torch.int64",
            "torch.float64",
        ]

    def test_objects_travel(self, seen):
        for entry in seen:
            assert entry["broadcast"] == {"keep": [1, 2.5, None, "é"]}
            assert entry["broadcast1"] == [1]
            assert entry["gathered"] == ["", "x" * 10]

    def test_object_that_is_not_json_is_an_error_on_every_rank(self, seen):
        assert all("rank 0 cannot send its object as JSON" in entry["not_json"] for entry in seen)

    def test_disagreement_names_who_differs_on_every_rank(self, seen):
        for entry in seen:
            assert "disagree about the widths" in entry["disagreement"]
            assert "rank 1: " in entry["disagreement"]

    def test_rank_0_goes_first(self, seen):
        assert [entry["existed"] for entry in seen] == [False, True]

    def test_failure_of_one_stage_is_told_to_all(self, seen):
        assert seen[0]["first_failed"] == "OSError: disk full"
        assert seen[1]["first_failed"].startswith("PeerError: making the cache failed on rank 0")
        assert "entered" not in seen[1]
        assert seen[0]["second_failed"].startswith("PeerError: reading the cache failed on rank 1")
        assert seen[1]["second_failed"] == "OSError: no such file"

    def test_rank_0_decides_without_a_clock(self, seen):
        assert [entry["decided"] for entry in seen] == [["by", 0]] * 2
        told = [entry["undecided"] for entry in seen]
        assert told == ["ZeroDivisionError: division by zero", "PeerError: rank 0 failed; see its messages"]

    def test_files_are_those_of_rank_0(self, seen):
        assert [entry["same_file"] for entry in seen] == [True, True]
        assert [entry["sent"] for entry in seen] == [["of rank 0", True], ["of rank 0", False]]
        assert [entry["nowhere"] for entry in seen] == ["nowhere", "nowhere"]

    def test_other_settings_are_refused_by_all(self, seen):
        for entry in seen:
            assert entry["settings"] == (
                "rank 1 was started with `checkpoint_interval` 1 (rank 0: 0): give all ranks the same command line and "
                "recipes"
            )

    def test_what_a_check_on_rank_0_found_is_told_by_all(self, seen):
        assert [entry["checked"] for entry in seen] == ["--flag of rank 0"] * 2
        assert all("/nowhere/at/all" in entry["opened"] for entry in seen)


def test_the_end_of_another_rank_is_told_from_other_errors(monkeypatch):
    gone = RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:43190")
    assert peer_loss(PeerError("opening failed on 1 rank(s)")) == "opening failed on 1 rank(s)"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert (
        peer_loss(gone)
        == "another rank ended, and this one cannot go on without it (Connection closed by peer)"
    )
    silent = RuntimeError("[unbound_buffer.cc:78] Timed out waiting 2000ms for recv operation to complete")
    assert "gave no answer within --dist-timeout" in str(peer_loss(silent))
    assert peer_loss(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    monkeypatch.delenv("WORLD_SIZE")
    assert peer_loss(gone) is None, "a single process has no other ranks"


@pytest.mark.multiprocess
def test_leaving_does_not_hang_when_a_peer_died(free_port):
    ranks = [start_rank(rank, DYING, free_port) for rank in range(2)]
    output = ranks[0].communicate(timeout=90)[0]
    ranks[1].communicate(timeout=90)
    assert ranks[0].returncode == 0, output
    assert "peer lost" in output
    assert float(output.split("closed after")[1].split()[0]) < 15


@pytest.fixture
def environment(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_single_process_has_no_group_and_everything_works(environment):
    distributed = setup_distributed(DistributedConfig(device="cpu"))
    assert distributed == Distributed()
    assert distributed.is_main
    assert not distributed.is_distributed
    source = torch.tensor([3], dtype=torch.int32)
    (total,) = distributed.all_reduce_sum(source)
    assert total.dtype == torch.int64
    total += 1
    assert source.item() == 3  # a copy
    assert distributed.broadcast_object({"a": (1, 2)}) == {
        "a": [1, 2]
    }  # what JSON makes of it, as with ranks
    assert distributed.gather_objects(5) == [5]
    distributed.check_agreement("nothing", "digest")
    with distributed.main_process_first():
        distributed.barrier()
    with pytest.raises(OSError, match="disk"), distributed.main_process_first():
        raise OSError("disk")
    assert distributed.close()


def test_launcher_with_one_process_needs_no_group(environment):
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        environment.setenv(name, value)
    assert not setup_distributed(DistributedConfig(device="cpu")).is_distributed


def test_incomplete_environment_is_an_error(environment):
    environment.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"RANK, LOCAL_RANK: .*multiproc"):
        setup_distributed(DistributedConfig())


def test_more_processes_than_gpus_is_an_error(environment):
    environment.setattr(torch.cuda, "device_count", lambda: 2)
    environment.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    for name, value in (("RANK", "2"), ("LOCAL_RANK", "2"), ("WORLD_SIZE", "4"), ("LOCAL_WORLD_SIZE", "4")):
        environment.setenv(name, value)
    with pytest.raises(ConfigError, match=r"--nproc_per_node 4 .*CUDA_VISIBLE_DEVICES=0,1"):
        setup_distributed(DistributedConfig())


def test_gpu_asked_for_and_absent_is_an_error(environment):
    environment.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match="--device cuda"):
        setup_distributed(DistributedConfig(device="cuda"))
    assert setup_distributed(DistributedConfig()).device.type == "cpu"


def test_nccl_without_gpus_is_an_error(environment):
    with pytest.raises(ConfigError, match="--dist-backend nccl"):
        DistributedConfig(device="cpu", dist_backend="nccl")
    environment.setattr(torch.cuda, "device_count", lambda: 0)
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2")):
        environment.setenv(name, value)
    with pytest.raises(ConfigError, match="--dist-backend gloo"):
        setup_distributed(DistributedConfig(dist_backend="nccl"))


def test_timeout_must_be_positive():
    with pytest.raises(ConfigError, match="--dist-timeout 0"):
        DistributedConfig(dist_timeout=0)
