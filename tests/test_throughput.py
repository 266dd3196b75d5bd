"""`python -m image_classification throughput`: real trainings in miniature, and what is made of their reports."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest
from support.commands import run

from image_classification import throughput
from image_classification.throughput import Measured, add_efficiency, fill_in, table

COMMAND = "python -m image_classification throughput shapes:train=96,val=12 --device cpu --arch resnet20 --batch-size 4"


@pytest.mark.multiprocess
@pytest.mark.slow
def test_figures_of_every_combination(tmp_path: Path) -> None:
    words = [
        sys.executable,
        *COMMAND.split()[1:],
        "--image-size",
        "32",
        "--gpus",
        "2",
        "1",
        "--iterations",
        "8",
    ]
    words += ["--workers", "1", "--json", str(tmp_path / "t.json")]
    done = run(words, tmp_path / "cache", timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "t.json").read_text())
    rows = report["rows"]
    assert [(row["backend"], row["processes"]) for row in rows] == [
        ("synthetic", 1),
        ("synthetic", 2),
    ]
    for row in rows:
        assert row["ips"] > 0
        assert 0 <= row["waiting"] < 1
        assert row["memory_gib"] > 0
        assert (row["efficiency"] is None) == (row["processes"] == 1)
        assert row["problem"] is None
    assert rows[1]["efficiency"] == pytest.approx(rows[1]["ips"] / 2 / rows[0]["ips"])
    assert len([line for line in done.stdout.splitlines() if line.startswith("|")]) == 4
    assert report["environment"]["torch"]


def test_what_cannot_be_measured_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    monkeypatch.setenv("LUCIDPRUNE_CACHE", str(tmp_path))
    parser = argparse.ArgumentParser()
    throughput.declare(parser)
    words = ["nowhere", "--backends", "pytorch", "--device", "cpu", "--iterations", "8"]
    assert throughput.run(parser.parse_args(words)) == 1
    assert "'nowhere' does not exist" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"--iterations 2\b.*\b8\b"):
        throughput.run(parser.parse_args(["--iterations", "2"]))
    with pytest.raises(ValueError, match="data_backend='dali'"):
        throughput.run(parser.parse_args(["--backends", "dali"]))


def entries(ips: float, data: float, compute: float) -> list[dict]:
    epoch = {"train.total_ips": ips, "train.data_time": data, "train.compute_time": compute}
    window = {"process.memory_gib": 2.0, "train.joules_per_image": 0.5}
    return [{"step": [0, 9], "data": window}, {"step": [0], "data": epoch}]


def test_efficiency_waiting_and_table() -> None:
    rows = [
        Measured(processes=n, backend="synthetic", precision=p) for p in ("fp32", "bf16") for n in (1, 2, 8)
    ]
    for row, ips in zip(rows, (100, 190, 640, 300, 600, 1200), strict=True):
        fill_in(row, entries(ips, 0.1, 0.3))
    add_efficiency(rows)
    assert [row.efficiency for row in rows] == [None, 0.95, 0.8, None, 1.0, 0.5]
    assert rows[0].waiting == 0.25
    assert "| 8 | synthetic | fp32 | 640.0 | 80.0% | 25.0% | 2.0 GiB | 0.500 |" in table(rows)
    gpu = Measured(processes=1, backend="x", precision="fp32")
    fill_in(gpu, [*entries(1.0, 0.0, 1.0), {"step": [], "data": {"gpu.peak_memory_gib": 7.0}}])
    assert gpu.memory_gib == 7.0
    few = Measured(processes=1, backend="x", precision="fp32")
    fill_in(few, [{"step": [0, 0], "data": {}}, {"step": [0], "data": {}}])
    assert "raise --iterations" in str(few.problem)
