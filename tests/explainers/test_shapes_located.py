"""What a trained network's maps find on `shapes`, where the objects are known: more than the centre of the image."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from explainers.__main__ import main as explainers_main
from main import main as train

DATA = "shapes:train=4000,val=250"
METHODS = ("gradcam", "lrp", "ebp", "rap", "ig")


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """Figures of all methods and of the centre, for a network that has learned what it is about."""
    folder = tmp_path_factory.mktemp("shapes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUCIDPRUNE_CACHE", str(folder / "cache"))
        words = [DATA, "--workers", "1", "--image-size", "32", "--device", "cpu"]
        learning = [
            "--epochs",
            "6",
            "--lr",
            "0.1",
            "--warmup",
            "1",
            "--lr-schedule",
            "cosine",
            "-b",
            "64",
            "--amp",
        ]
        assert train([*words, "--arch", "resnet20", *learning, "--workspace", str(folder / "run")]) == 0
        methods = [word for name in (*METHODS, "centre") for word in ("--method", name)]
        looking = [
            "--metric",
            "point",
            "--metric",
            "auc",
            "--ig-steps",
            "8",
            "--ig-sign",
            "positive",
            "--ig-smooth",
            "0.02",
        ]
        checkpoint = ["--checkpoint", str(folder / "run" / "checkpoint.pth.tar")]
        found = folder / "found.json"
        assert (
            explainers_main(["localize", *words, *checkpoint, *methods, *looking, "--json", str(found)]) == 0
        )
    rows = json.loads(Path(found).read_text())["rows"]
    assert all(row["counts"]["predicted"] >= 200 for row in rows), (
        "the network has not learned enough to be asked"
    )
    return {row["method"]: row["figures"] for row in rows}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_maps_of_a_trained_network_beat_the_centre(method: str, figures: dict[str, dict[str, float]]) -> None:
    for figure in ("point", "auc"):
        assert figures[method][figure] > figures["centre"][figure] + 0.02, figures
