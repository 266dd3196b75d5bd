"""`python -m explainers`: what it writes and prints, the same over ranks, and clear words for what cannot be done."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from explainers.__main__ import main
from explainers.verbs.attribution_job import distinct_names
from image_classification.data.single_image import pixels_of
from image_classification.models import arch_info, model_for_weights
from image_classification.models.factory import remember_class_names
from pruning.files.saved_network import save_pruned
from tests.support.explained import save_network

pytestmark = pytest.mark.usefixtures("small_cache")
ROOT = Path(__file__).resolve().parents[2]
DATA = "shapes:train=24,val=20,seed=5"
COMMON = ["-b", "8", "--data-backend", "pytorch", "-j", "0", "--device", "cpu"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    return save_network(tmp_path / "network.pth.tar")


def test_attribute_writes_maps_overlays_and_pages(checkpoint: str, tmp_path: Path) -> None:
    out = tmp_path / "maps"
    words = ["--method", "gradcam", "--method", "lrp", "--output", str(out), "-n", "10", "--rows", "4"]
    assert main(["attribute", DATA, "--checkpoint", checkpoint, *words, *COMMON]) == 0
    for method in ("gradcam", "lrp"):
        arrays = sorted((out / method).rglob("*.npy"))
        images = sorted((out / method).rglob("*.png"))
        assert len(arrays) == len(images) == 10
        assert np.load(arrays[0]).shape == (48, 48)
        with Image.open(images[0]) as image:
            assert image.size == (48, 48)
    # batches of 8, then 2; pages of at most 4, named by their first image
    assert [page.name for page in sorted(out.glob("page-*.png"))] == [
        "page-000000.png",
        "page-000004.png",
        "page-000008.png",
    ]


def test_attribute_without_files_and_for_labels(checkpoint: str, tmp_path: Path) -> None:
    out = tmp_path / "maps"
    words = ["--output", str(out), "-n", "3", "--no-files", "--explain", "label"]
    assert main(["attribute", DATA, "--checkpoint", checkpoint, *words, *COMMON]) == 0
    assert [path.name for path in out.iterdir()] == ["page-000000.png"]


def test_flags_of_integrated_gradients_change_the_maps(checkpoint: str, tmp_path: Path) -> None:
    maps = {}
    for name, flags in {
        "plain": [],
        "positive": ["--ig-sign", "positive"],
        "absolute": ["--ig-sign", "absolute"],
        "smooth": ["--ig-smooth", "0.05"],
    }.items():
        words = ["--method", "ig", "--ig-steps", "2", "--output", str(tmp_path / name), "-n", "2", *flags]
        assert main(["attribute", DATA, "--checkpoint", checkpoint, *words, *COMMON]) == 0
        maps[name] = np.stack([np.load(path) for path in sorted((tmp_path / name).rglob("*.npy"))])
    plain = maps["plain"]
    assert (plain < 0).any()
    np.testing.assert_allclose(maps["positive"], plain.clip(0), atol=1e-7)
    np.testing.assert_allclose(maps["absolute"], abs(plain), atol=1e-7)
    assert np.ptp(maps["smooth"]) < 0.5 * np.ptp(plain)
    np.testing.assert_allclose(maps["smooth"].sum(), plain.sum(), rtol=0.2, atol=0.02 * abs(plain).sum())


def localize_rows(path: Path) -> list[dict]:
    return json.loads(path.read_text())["rows"]


def test_localize_compares_methods_and_networks(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pruned = save_network(tmp_path / "pruned.pth.tar", widths={"layer1.0.conv1": 5, "layer3.1.conv1": 17})
    words = ["--method", "gcam", "--method", "centre", "--metric", "point", "--metric", "boxes"]
    words += ["--json", str(tmp_path / "figures" / "f.json")]
    assert main(["localize", DATA, "--checkpoint", checkpoint, "--checkpoint", pruned, *words, *COMMON]) == 0
    rows = localize_rows(tmp_path / "figures" / "f.json")
    assert [(row["network"], row["method"]) for row in rows] == [
        ("network.pth.tar", "gcam"),
        ("network.pth.tar", "centre"),
        ("pruned.pth.tar", "gcam"),
        ("pruned.pth.tar", "centre"),
    ]
    for row in rows:
        assert row["counts"]["images"] == row["counts"]["pairs"] == row["counted"]["f1"] == 20
        assert set(row["figures"]) == {"point", "point_15px", "auc", "f1", "f1a", "le", "om"}
    shown = capsys.readouterr().out
    assert "pruned.pth.tar" in shown
    assert "centre" in shown


@pytest.mark.multiprocess
@pytest.mark.parametrize("verb", ["localize", pytest.param("score-casm", marks=pytest.mark.slow)])
def test_all_ranks_say_what_ground_truth_lacks(checkpoint: str, tmp_path: Path, verb: str) -> None:
    """It is looked at on rank 0 only."""
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            Image.new("RGB", (40, 40)).save(tmp_path / "data" / split / name / "1.png")
    file = ["--checkpoint", checkpoint] if verb == "localize" else ["--casms-path", str(tmp_path)]
    words = [verb, str(tmp_path / "data"), *file, "--device", "cpu", "--image-size", "32"]
    launcher = [
        "multiproc.py",
        "--nproc_per_node",
        "2",
        "--log-dir",
        str(tmp_path / "logs"),
        "-m",
        "explainers",
    ]
    job = subprocess.run(
        [sys.executable, *launcher, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    what = "pixel masks" if verb == "localize" else "boxes"
    told = f"python -m explainers {verb}: error: the split 'val' has no {what}"
    logs = [(tmp_path / "logs" / f"rank_{rank}.log").read_text() for rank in range(2)]
    assert all(log.count(told) == 1 for log in logs), logs
    assert "Traceback" not in "".join(logs)
    assert job.returncode == 2
    assert job.stderr.splitlines()[-1].endswith("ended with exit code 2; stopping")


@pytest.mark.multiprocess
@pytest.mark.slow
def test_two_ranks_count_what_one_counts(checkpoint: str, tmp_path: Path, cache: Path) -> None:
    words = ["localize", DATA, "--checkpoint", checkpoint, "--method", "centre", "--method", "lrp", *COMMON]
    words += ["--metric", "point", "--metric", "auc", "--metric", "energy", "-n", "19", "-b", "3"]
    assert main([*words, "--json", str(tmp_path / "one.json")]) == 0
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(2):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        environment = os.environ | place | {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "explainers", *words, "--json", str(tmp_path / "two.json")]
        processes.append(subprocess.Popen(command, cwd=ROOT, env=environment))
    assert [process.wait(240) for process in processes] == [0, 0]
    for one, two in zip(
        localize_rows(tmp_path / "one.json"), localize_rows(tmp_path / "two.json"), strict=True
    ):
        assert one["counts"] == two["counts"]
        assert one["counted"] == two["counted"]
        for name, value in one["figures"].items():
            assert two["figures"][name] == (None if value is None else pytest.approx(value, rel=1e-5))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["localize", DATA], "--checkpoint is missing"),
        (["localize", DATA, "--checkpoint", "nowhere.pth"], "nowhere.pth: there is no such file"),
        (["localize", DATA, "--checkpoint", "{net}", "--metric", "aucc"], "did you mean auc"),
        (["localize", DATA, "--checkpoint", "{net}", "--method", "lpr"], "did you mean lrp"),
        (
            ["localize", DATA, "--checkpoint", "{net}", "--layer", "layer2", "--method", "lrp"],
            "--layer has no effect",
        ),
        (["localize", DATA, "--checkpoint", "{net}", "--ig-smooth", "0.02"], "--ig-smooth has no effect"),
        (["localize", DATA, "--checkpoint", "{net}", "--ig-sign", "positive"], "--ig-sign has no effect"),
        (
            ["localize", DATA, "--checkpoint", "{net}", "-m", "ig", "--ig-smooth", "2"],
            "--ig-smooth 2.0: give",
        ),
        (["localize", DATA, "--checkpoint", "{net}", "--layer", "layer9"], "no layer 'layer9'"),
        (
            ["localize", DATA, "--checkpoint", "{net}", "--arch", "resnet56"],
            "holds resnet20, not --arch resnet56",
        ),
        (["localize", DATA, "--checkpoint", "{ten}"], "has 10 classes, but"),
        (["localize", "nowhere", "--checkpoint", "{net}"], "does not exist"),
        (
            ["localize", DATA, "--checkpoint", "{net}", "--json", "/proc/none/f.json"],
            "--json /proc/none cannot be",
        ),
        (
            ["localize", DATA, "--checkpoint", "{net}", "--annotation-path", "nowhere"],
            "--annotation-path nowhere",
        ),
        (
            ["attribute", DATA, "--checkpoint", "{net}", "--output", "/proc/maps"],
            "--output /proc/maps cannot be",
        ),
        (["attribute", DATA, "--checkpoint", "{net}", "--checkpoint", "{ten}"], "explains one network"),
        (["attribute", DATA, "--checkpoint", "{net}", "-n", "0"], "--num-images 0"),
        (["localise"], "did you mean localize"),
    ],
)
def test_impossible_requests_are_refused(
    words: list[str], message: str, checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ten = save_network(tmp_path / "ten.pth.tar", num_classes=10)
    words = [word.format(net=checkpoint, ten=ten) for word in words]
    try:
        status = main([*words, *(COMMON if len(words) > 1 else ())])
    except SystemExit as stopped:
        status = int(str(stopped.code))
    assert status == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert "attribute" in shown
    assert "localize" in shown
    assert main([]) == 2


def test_names_of_checkpoints_tell_them_apart() -> None:
    assert distinct_names(["runs/a/best.pth", "runs/b/best.pth"]) == ["a/best.pth", "b/best.pth"]
    assert distinct_names(["runs/a.pth", "b.pth"]) == ["a.pth", "b.pth"]
    assert distinct_names(["a.pth", "a.pth"]) == ["a.pth#1", "a.pth#2"]


def test_localize_by_the_published_protocol(checkpoint: str, tmp_path: Path) -> None:
    words = ["localize", DATA, "--checkpoint", checkpoint, "--published", "--pot", "0.2", *COMMON]
    assert main([*words, "--json", str(tmp_path / "f.json")]) == 0
    rows = localize_rows(tmp_path / "f.json")
    assert [row["method"] for row in rows] == ["gradcam", "lrp", "ebp", "rap"]
    for row in rows:
        assert row["counts"]["images"] == 4  # of 20
        assert set(row["figures"]) == {"point", "point_15px", "auc"}
    for more in (["--method", "lrp"], ["--metric", "energy"]):
        with pytest.raises(SystemExit):
            main([*words, *more])


def test_classify_names_what_image_files_show(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An image of another size than the network's, prepared as its input says."""
    model = model_for_weights(None, checkpoint).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    names = [f"kind {index}" for index in range(12)]
    (tmp_path / "names.txt").write_text("\n".join(names))
    words = ["classify", str(tmp_path / "a.png"), "--checkpoint", checkpoint, "--top", "3"]
    words += ["--class-names", str(tmp_path / "names.txt"), "--json", str(tmp_path / "f.json")]
    assert main([*words, "--output", str(tmp_path / "page.png")]) == 0
    assert "kind" in capsys.readouterr().out
    (said,) = json.loads((tmp_path / "f.json").read_text()).values()
    with torch.no_grad():
        image = pixels_of(tmp_path / "a.png", arch_info("resnet20").network_input)
        expected = model(image[None]).softmax(1)[0].topk(3)
    assert [entry["name"] for entry in said] == [names[index] for index in expected.indices.tolist()]
    assert [entry["probability"] for entry in said] == pytest.approx(expected.values.tolist(), abs=1e-5)
    with Image.open(tmp_path / "page.png") as page:
        assert min(page.size) > 100
    (tmp_path / "names.txt").write_text("one")
    assert main(words) == 2
    assert "--class-names" in capsys.readouterr().err
    # A network that knows its classes is asked by name without a list.
    remember_class_names(model, [f"sort {index}" for index in range(12)])
    save_pruned(tmp_path / "named.pth.tar", model)
    assert main([*words[:2], "--checkpoint", str(tmp_path / "named.pth.tar")]) == 0
    assert "sort" in capsys.readouterr().out
