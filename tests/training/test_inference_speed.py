"""The inference benchmark: a row per batch size, figures that belong together, pruned checkpoints too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from image_classification.__main__ import main
from image_classification.inference_speed import measure_speed
from image_classification.models import create_model
from image_classification.precision import Precision, PrecisionConfig


def test_figures_belong_together() -> None:
    model = create_model("resnet20", num_classes=10)
    precision = Precision(PrecisionConfig(memory_format="nhwc", amp=True), torch.device("cpu"))
    row = measure_speed(precision.place(model), 2, 16, precision, num_batches=8, num_warmup=1)
    assert row.ips == pytest.approx(2 / row.mean)
    assert 0 < row.p50 <= row.p95 <= row.p99 <= row.slowest
    assert min(row.p50, row.mean) <= row.slowest


def test_the_verb_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "speed.json"
    words = "benchmark --arch resnet20 --batch-sizes 1 3 --image-size 16 --num-batches 2 --device cpu"
    assert main([*words.split(), "--json", str(report)]) == 0
    assert "images/s" in capsys.readouterr().out
    content = json.loads(report.read_text())
    assert [row["batch_size"] for row in content["rows"]] == [1, 3]
    assert torch.__version__.startswith(content["environment"]["torch"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give --arch, --checkpoint, or both"),
        (["--arch", "resnet20", "--batch-sizes", "0"], "--batch-sizes"),
        (["--arch", "resnet20", "--num-batches", "0"], "--num-batches"),
        (["--checkpoint", "absent.pth"], "absent.pth does not exist"),
    ],
)
def test_unusable_arguments(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", *words]) == 2
    assert message in capsys.readouterr().err
