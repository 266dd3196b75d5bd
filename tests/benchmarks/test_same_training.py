"""benchmarks/same_training.py: what it calls equal, how it names a difference, whether its table of jobs is sound."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.same.comparing import Comparison, compare_folders, same_value, tensor_difference
from benchmarks.same.jobs import JOBS
from benchmarks.same_training import chosen, fingerprint


def line(step: list[int] | str, **data: float) -> str:
    entry = {"timestamp": "1", "type": "LOG", "step": step, "data": data}
    return json.dumps(entry)


def write(folder: Path, loss: float = 2.5, momentum: float = 0.25, **more: Any) -> Path:
    """What a job leaves: a report, a checkpoint, a table."""
    folder.mkdir()
    keys = {"train.loss": loss, "train.total_ips": np.random.default_rng().random()}
    lines = [line("PARAMETER", lr=loss), line([0, 0], **{"train.loss": 3.0}), line([0, 1], **keys)]
    (folder / "experiment_raport.json").write_text("\n".join(lines))
    state = {0: {"momentum_buffer": torch.tensor([[0.5, momentum]])}}
    checkpoint = {
        "state_dict": {"w": torch.ones(3)},
        "optimizer": {"state": state},
        "config": {"workspace": str(folder)},
        **more,
    }
    torch.save(checkpoint, folder / "checkpoint.pth.tar")
    (folder / "figures.json").write_text(json.dumps({"rows": [{"auc": 0.5, "seconds_per_batch": loss}]}))
    np.save(folder / "map.npy", np.zeros((2, 2), np.float32))
    (folder / "log.txt").write_text(str(folder))
    return folder


def test_equal_runs_are_counted(tmp_path: Path) -> None:
    found = compare_folders(write(tmp_path / "a"), write(tmp_path / "b"))
    assert found.differences == []
    assert (found.steps, found.tensors, found.numbers) == (2, 3, 3)


def test_the_first_difference_is_the_earliest_and_is_named(tmp_path: Path) -> None:
    changed = write(tmp_path / "b", loss=math.nextafter(2.5, 3), momentum=0.26)
    found = compare_folders(write(tmp_path / "a"), changed)
    assert found.differences == [
        "experiment_raport.json: [0, 1].train.loss[0] 2.5 became 2.5000000000000004",
        "checkpoint.pth.tar: optimizer.state.0.momentum_buffer 1 of 2 values differ by at most 0.01, the first at "
        "[0, 1]: 0.25 became 0.25999999046325684",
    ]


def test_missing_keys_and_files_are_differences(tmp_path: Path) -> None:
    base, head = write(tmp_path / "a", epoch=1), write(tmp_path / "b", ema=None)
    (head / "map.npy").unlink()
    (head / "new.json").write_text("{}")
    assert compare_folders(base, head).differences == [
        "checkpoint.pth.tar: epoch is missing from HEAD",
        "checkpoint.pth.tar: ema is missing from BASE",
        "map.npy is missing from HEAD",
        "new.json is missing from BASE",
    ]


@pytest.mark.parametrize(
    "key",
    ["train.total_ips", "val.compute_latency_at99", "pruning.seconds.score", "process.memory_gib", "config"],
)
def test_times_hosts_and_flags_are_ignored(key: str) -> None:
    comparison = Comparison()
    comparison.compare("", [{key: 1.0}], [{key: 2.0}])
    comparison.compare("", [{key: 1.0}], [{}])
    assert comparison.differences == []


@pytest.mark.parametrize(
    ("base", "head", "same"),
    [
        (math.nan, math.nan, True),
        (0.0, -0.0, False),
        (1, 1.0, False),
        (1, True, False),
        ("a", "a", True),
        (None, None, True),
    ],
)
def test_plain_values_are_the_same_to_the_bit(base: Any, head: Any, same: bool) -> None:
    assert same_value(base, head) is same


def test_tensors_are_the_same_to_the_bit() -> None:
    values = torch.tensor([math.nan, 0.0, 1.0])
    assert tensor_difference(values, values.clone()) is None
    assert tensor_difference(torch.ones(1).expand(3), torch.ones(3)) is None
    assert tensor_difference(torch.zeros(0), torch.zeros(0)) is None
    assert tensor_difference(torch.tensor(1), torch.tensor(2)) is not None
    assert "1 of 3 values" in str(tensor_difference(values, torch.tensor([math.nan, -0.0, 1.0])))
    assert tensor_difference(torch.ones(2), torch.ones(3)) == "(2,) torch.float32 became (3,) torch.float32"
    assert "torch.float64" in str(tensor_difference(torch.ones(2), torch.ones(2).double()))


def test_jobs_need_what_stands_above_them() -> None:
    above: set[str] = set()
    for job in JOBS:
        named = {word.split("/")[1] for step in job.steps for word in step.split() if word.startswith("../")}
        assert named == set(job.needs), job.name
        assert named | {job.same_as or "plain"} <= above | {"plain"}, job.name
        assert job.name not in above
        above.add(job.name)


def test_a_chosen_job_brings_what_it_needs() -> None:
    assert [job.name for job in chosen(["resumed"])] == ["pruned", "stopped", "resumed"]
    assert {"plain", "predictor", "selector"} < {job.name for job in chosen(["saliency"])}
    assert chosen([]) == list(JOBS)


def test_jobs_have_fingerprints_of_their_own() -> None:
    by_name = {job.name: job for job in JOBS}
    assert len({fingerprint(job, by_name) for job in JOBS}) == len(JOBS)
