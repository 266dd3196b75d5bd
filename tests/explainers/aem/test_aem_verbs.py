"""The verbs of amortised explanations, from a network to its masks: what they write, and what they refuse."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.commands import ROOT
from support.jobs import assert_same_training, checkpoint, validation
from torch import nn

from explainers.__main__ import main
from explainers.aem import load_selector
from explainers.aem.evaluate_selector import as_json
from explainers.aem.predictor import load_predictor
from explainers.aem.saved_selector import load_black_box
from explainers.differentiable.explanation import network_digest
from image_classification.models import capture_structure, create_model, load_weights
from image_classification.observe.json_report import read_report
from tests.support.explained import make_images, randomise

DATA = "shapes:train=120,val=24,seed=5"
COMMON = ["--data-backend", "pytorch", "-j", "0", "--device", "cpu", "--image-size", "32"]
TRAINING = [
    *COMMON,
    "-b",
    "16",
    "--calibration-size",
    "24",
    "--evaluation-interval",
    "4",
    "--print-freq",
    "2",
]


def save_network(path: Path, num_classes: int = 12, seed: int = 1, arch: str = "resnet20") -> Path:
    torch.manual_seed(seed)
    model = randomise(create_model(arch, num_classes=num_classes, image_size=32), make_images(8, 32), seed)
    content = {
        "format": "lucidprune",
        "version": 1,
        "arch": arch,
        "structure": capture_structure(model).to_plain(),
        "state_dict": model.state_dict(),
    }
    torch.save(content, path)
    return path


class Place:
    """A network, what its explainers need on the command line, and folders."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.network = save_network(folder / "network.pth.tar")
        self.model_words = ["--arch", "resnet20", "--pretrained-weights", str(self.network)]

    def train(self, verb: str, workspace: str, *words: str, data: str = DATA) -> int:
        out = ["--workspace", str(self.folder / workspace)]
        return main([verb, data, *self.model_words, *TRAINING, *out, *words])

    def best(self, workspace: str) -> Path:
        return self.folder / workspace / "model_best.pth.tar"

    def last(self, workspace: str) -> Path:
        return self.folder / workspace / "checkpoint.pth.tar"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Both explainers trained for two short epochs."""
    folder = tmp_path_factory.mktemp("aem")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUCIDPRUNE_CACHE", str(folder / "cache"))
        place = Place(folder)
        assert place.train("train-predictor", "q", "--epochs", "2") == 0
        words = ["--predictor", str(place.best("q")), "--epochs", "2", "--tensorboard"]
        assert place.train("train-selector", "g", *words) == 0
    return place


@pytest.fixture(autouse=True)
def cache(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUCIDPRUNE_CACHE", str(place.folder / "cache"))


def test_training_writes_files_that_know_what_they_explain(place: Place) -> None:
    digest = network_digest(load_black_box(place.best("g")))
    predictor, record = load_predictor(place.best("q"))
    explanation = load_selector(place.best("g"))
    assert record.digest == explanation.digest == digest
    assert load_weights(place.network).state["fc.weight"].equal(load_black_box(place.best("g")).fc.weight)
    assert record.kind == explanation.design.kind == "rbf"
    assert record.geometry == explanation.design.geometry
    assert record.geometry.image_size == 32
    assert explanation.taps == ("layer1", "layer2", "layer3")
    assert not predictor.training
    assert network_digest(predictor) != digest
    best = checkpoint(place.folder / "g", "model_best.pth.tar")
    assert best["callbacks"]["selector"]["figures"]["agreement"] == best["best_prec1"]
    assert explanation.figures["samples"] == 24


def test_reports_have_figures_and_parts_of_the_loss(place: Place) -> None:
    report = place.folder / "g" / "experiment_raport.json"
    keys = {key for entry in read_report(report) if entry["type"] == "LOG" for key in entry["data"]}
    wanted = {f"{prefix}.{name}" for prefix in ("held_out", "val") for name in ("kl", "agreement", "area")}
    assert wanted | {"train.kl", "train.area", "train.tv", "train.loss"} <= keys
    assert "val.top1" not in keys
    assert len(validation(report, "val.kl")) == 2
    assert len(validation(report, "held_out.kl")) == 4  # 6 iterations an epoch: after 4, 6, 8 and 12
    losses = [
        entry["data"]
        for entry in read_report(report)
        if entry["type"] == "LOG" and len(entry["step"]) == 2 and "train.kl" in entry["data"]
    ]
    for data in losses:
        total = data["train.kl"] + 0.2 * data["train.area"] + 1e-3 * data["train.tv"]
        assert data["train.loss"] == pytest.approx(total, rel=1e-3)


def test_tensorboard_shows_masks_over_training(place: Place) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = place.folder / "g" / "tensorboard"
    events = event_accumulator.EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    assert [event.step for event in events.Images("masks/fixed_images")] == [0, 4, 8, 12]


@pytest.mark.parametrize("verb", ["train-predictor", "train-selector"])
def test_a_resumed_run_ends_bit_for_bit_as_one_that_was_not_interrupted(place: Place, verb: str) -> None:
    name = {"train-predictor": "q", "train-selector": "g"}[verb]
    words = ["--epochs", "2"]
    if verb == "train-selector":
        words += ["--predictor", str(place.best("q"))]
    assert place.train(verb, f"{name}-resumed", *words, "--run-epochs", "1") == 0
    assert checkpoint(place.folder / f"{name}-resumed")["epoch"] == 1
    assert place.train(verb, f"{name}-resumed", *words, "--resume", "auto") == 0
    for file in ("checkpoint.pth.tar", "model_best.pth.tar"):
        first, second = (checkpoint(place.folder / folder, file) for folder in (name, f"{name}-resumed"))
        assert_same_training(first, second)
    # in the middle of an epoch: from the checkpoint that the judge wrote
    middle = place.folder / f"{name}-middle.pth.tar"
    payload = checkpoint(place.folder / name, "model_best.pth.tar")
    torch.save(payload, middle)
    assert place.train(verb, f"{name}-again", *words, "--resume", str(middle)) == 0
    assert_same_training(checkpoint(place.folder / name), checkpoint(place.folder / f"{name}-again"))


def test_amp_light_decoder_and_hard_samples(place: Place) -> None:
    words = [
        "--epochs",
        "1",
        "--amp",
        "--decoder",
        "light",
        "--hard-samples",
        "--num-scales",
        "2",
        "--predictor",
    ]
    assert place.train("train-selector", "light", *words, str(place.best("q"))) == 0
    explanation = load_selector(place.best("light"))
    assert explanation.design.decoder == "light"
    assert explanation.taps == ("layer2", "layer3")


def test_real_x_from_end_to_end(place: Place, tmp_path: Path) -> None:
    assert place.train("train-predictor", "qx", "--epochs", "1", "--selector-type", "real-x") == 0
    assert place.train("train-selector", "gx", "--epochs", "1", "--predictor", str(place.best("qx"))) == 0
    explanation = load_selector(place.best("gx"))
    assert explanation.design.kind == "real-x"
    assert explanation.size == 32 * 32
    page = tmp_path / "page.png"
    assert main(["visualize", DATA, "--selector", str(place.best("gx")), "-o", str(page), *COMMON]) == 0
    assert page.is_file()


def test_a_pruned_network_can_be_explained(place: Place, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model("resnet20", num_classes=12, image_size=32, widths={"layer2.0.conv1": 11})
    content = {
        "format": "lucidprune",
        "version": 1,
        "arch": "resnet20",
        "structure": capture_structure(model).to_plain(),
        "state_dict": model.state_dict(),
    }
    torch.save(content, tmp_path / "pruned.pth.tar")
    words = ["--pretrained-weights", str(tmp_path / "pruned.pth.tar"), "--epochs", "1", "--prof", "2"]
    assert place.train("train-predictor", "pruned", *words) == 0
    predictor, _ = load_predictor(place.last("pruned"))
    assert predictor.layer2[0].conv1.out_channels == 11


@pytest.mark.parametrize("verb", ["train-predictor", "train-selector"])
def test_prof_shortens_judging_too(place: Place, verb: str) -> None:
    words = ["--predictor", str(place.best("q"))] if verb == "train-selector" else []
    assert place.train(verb, f"short-{verb}", "--epochs", "1", "--prof", "1", *words) == 0
    report = place.folder / f"short-{verb}" / "experiment_raport.json"
    logged = [entry["data"] for entry in read_report(report) if entry["type"] == "LOG"]
    for split in ("held_out", "val"):  # 24 images each, 16 a batch
        assert {data[f"{split}.samples"] for data in logged if f"{split}.samples" in data} == {16.0}


def test_figures_of_a_selector(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--selector", str(place.best("g")), "--predictor", str(place.best("q"))]
    assert main(["evaluate-selector", DATA, *words, *COMMON, "--json", str(tmp_path / "f.json")]) == 0
    figures = json.loads((tmp_path / "f.json").read_text())["figures"]
    assert set(figures) == {
        "kl",
        "agreement",
        "area",
        "samples",
        "on_object",
        "within_object",
        "auc",
        "objects",
        "width",
    }
    assert figures["samples"] == figures["objects"] == 24
    assert figures["within_object"] >= figures["on_object"]
    assert "on_object" in capsys.readouterr().out
    # the last epoch's validation measured the last selector, here the best one is asked; both count 24 images
    assert main(["evaluate-selector", DATA, *words[:2], *COMMON, "-n", "10"]) == 0
    assert "agreement" not in capsys.readouterr().out


def test_undefined_figures_are_null_in_json() -> None:
    assert json.loads(as_json({"kl": 0.5, "auc": math.nan}, {}))["figures"] == {"kl": 0.5, "auc": None}


def test_the_selector_is_an_attribution_method(place: Place, tmp_path: Path) -> None:
    words = ["--checkpoint", str(place.network), "--method", "selector", "--selector", str(place.best("g"))]
    words += ["--metric", "point", "--metric", "auc", "--json", str(tmp_path / "f.json")]
    assert main(["localize", DATA, *words, *COMMON]) == 0
    (row,) = json.loads((tmp_path / "f.json").read_text())["rows"]
    assert row["method"] == "selector"
    assert row["counts"]["pairs"] == 24


def test_a_page_of_masks(place: Place, tmp_path: Path) -> None:
    page = tmp_path / "pages" / "masks.png"
    words = ["--selector", str(place.best("g")), "--predictor", str(place.best("q")), "--num-images", "3"]
    assert main(["visualize", DATA, *words, *COMMON, "--output", str(page)]) == 0
    published = ["--binarised", "--explain", "label", "--output", str(tmp_path / "masks.pdf")]
    assert main(["visualize", DATA, *words, *COMMON, *published]) == 0
    assert (tmp_path / "masks.pdf").read_bytes().startswith(b"%PDF")
    with Image.open(page) as image:
        width, height = image.size
        assert 0.9 < height / width < 1.3  # three rows of three
        # centre and width are drawn in a colour that images do not have
        assert sum(pixel == (255, 79, 216) for pixel in image.convert("RGB").get_flattened_data()) > 50


def refused(
    place: Place, capsys: pytest.CaptureFixture[str], verb: str, *words: str, data: str = DATA
) -> str:
    """The error of a command that must end before anything trains."""
    workspace = place.folder / "refused"
    try:
        code = place.train(verb, "refused", *words, data=data)
    except SystemExit as stop:  # the parser's own
        code = int(str(stop.code))
    assert code != 0
    assert not (workspace / "checkpoint.pth.tar").exists()
    return capsys.readouterr().err


def test_a_selector_needs_a_predictor_of_the_same_network(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--predictor is missing" in refused(place, capsys, "train-selector")
    assert "no such file" in refused(place, capsys, "train-selector", "--predictor", "none.pth.tar")
    message = refused(place, capsys, "train-selector", "--predictor", str(place.network))
    assert "holds no predictor" in message
    good = ["--predictor", str(place.best("q"))]
    other = save_network(place.folder / "other.pth.tar", seed=7)
    message = refused(place, capsys, "train-selector", *good, "--pretrained-weights", str(other))
    assert "other weights" in message
    deeper = save_network(place.folder / "deeper.pth.tar", arch="resnet32")
    words = [*good, "--arch", "resnet32", "--pretrained-weights", str(deeper)]
    assert "imitates resnet20, not resnet32" in refused(place, capsys, "train-selector", *words)
    message = refused(place, capsys, "train-selector", *good, "--image-size", "40")
    assert "give --image-size 32" in message
    message = refused(place, capsys, "train-selector", *good, "--selector-type", "real-x")
    assert "judges rbf masks, not real-x masks" in message


def test_other_classes_are_refused(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    three = save_network(place.folder / "three.pth.tar", num_classes=3)
    words = ["--pretrained-weights", str(three)]
    assert "3 classes" in refused(place, capsys, "train-predictor", *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-scales", "4", "--selector-type", "real-x"], "4 are needed"),
        (["--num-scales", "3"], "--num-scales has no effect"),
        (["--mask-widths", "9", "4"], "error: --mask-widths: mask widths 9.0 to 4.0"),
        (["--mask-travel", "17"], "error: --mask-travel: travel 17.0"),
        (["--initial-width", "-1"], "error: --initial-width: initial width -1.0"),
        (["--selector-type", "real-x", "--mask-travel", "9"], "--mask-travel has no effect"),
        (["--temperature", "0"], "--temperature"),
        (["--label-smoothing", "0.1"], "--label-smoothing"),
        (["--new-head"], "--new-head"),
        (["--evaluate"], "evaluate-selector"),
        (["--use-ema", "0.99"], "--use-ema"),
        (["--selector-type", "rbff"], "rbf"),
        (["--evaluation-interval", "0"], "--evaluation-interval"),
    ],
)
def test_flags_that_cannot_be_used_are_refused(
    place: Place, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert message in refused(place, capsys, "train-predictor", *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-scales", "7"], "7 are needed"),
        (["--num-scales", "1"], "--num-scales 1"),
        (["--lamda", "-1"], "--lamda -1"),
        (["--smoothness-loss-coeff", "-1"], "--smoothness-loss-coeff"),
        (["--alpha", "0"], "--alpha"),
    ],
)
def test_selector_flags_that_cannot_be_used_are_refused(
    place: Place, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert message in refused(place, capsys, "train-selector", "--predictor", str(place.best("q")), *words)


def test_missing_weights_are_refused(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train-predictor", DATA, "--arch", "resnet20", *TRAINING]) != 0
    assert "--pretrained-weights is missing" in capsys.readouterr().err


def test_a_resume_with_other_settings_is_refused(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--epochs", "2", "--resume", str(place.last("q"))]
    assert place.train("train-predictor", "q-other", *words, "--mask-widths", "4", "5") == 2
    assert "--resume: the checkpoint's predictor has geometry" in capsys.readouterr().err
    assert place.train("train-selector", "g-other", *words, "--predictor", str(place.best("q"))) == 2
    assert "not one of a selector's training" in capsys.readouterr().err
    words[-1] = str(place.last("g"))
    assert place.train("train-predictor", "q-other", *words) == 2
    assert "not one of a predictor's training" in capsys.readouterr().err
    words[-1] = str(place.last("q"))
    assert place.train("train-predictor", "q-other", *words, "--best-by", "kl") == 2
    assert "give --best-by agreement" in capsys.readouterr().err


def test_files_of_other_data_are_refused(
    place: Place, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / "set" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "set" / name / "x.png")
    words = [str(tmp_path / "set"), "--selector", str(place.best("g")), *COMMON]
    assert main(["visualize", *words, "-o", str(tmp_path / "p.png")]) == 2
    assert "12 classes, but the data has 2" in capsys.readouterr().err
    assert main(["evaluate-selector", DATA, "--selector", str(place.best("q")), *COMMON]) == 2
    assert "holds no selector" in capsys.readouterr().err
    words = ["--checkpoint", str(place.network), "--method", "selector"]
    with pytest.raises(SystemExit, match="2"):
        main(["localize", DATA, *words, *COMMON])
    assert "error: --selector" in capsys.readouterr().err


@pytest.mark.multiprocess
@pytest.mark.slow
def test_two_ranks_train_and_agree(place: Place, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["train-selector", DATA, *place.model_words, *TRAINING, "-b", "8", "--epochs", "1"]
    words += ["--predictor", str(place.best("q")), "--workspace", str(tmp_path)]
    processes = []
    for rank in range(2):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        environment = os.environ | ranks | {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "explainers", *words]
        processes.append(subprocess.Popen(command, cwd=ROOT, env=environment))
    assert [process.wait(timeout=240) for process in processes] == [0, 0]
    saved = checkpoint(tmp_path)
    assert saved["world_size"] == 2
    figures = validation(tmp_path / "experiment_raport.json", "val.samples")
    assert figures == [24.0]
    explanation = load_selector(tmp_path / "model_best.pth.tar")
    assert isinstance(explanation.selector, nn.Module)
    assert explanation.figures["samples"] == 24
