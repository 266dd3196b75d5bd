"""score-casm, eval-casm, plot-casm and `--method casm`: figures by hand, one's own architecture, clear errors."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from explainers.__main__ import main
from explainers.casm import Casm, eval_casm, save_casm
from explainers.casm.interface import CasmInterface, checked_answer, load_interface
from explainers.casm.score import as_mask, baseline_rectangle
from explainers.measures.localization import Rectangle, box_figures, object_rectangle
from image_classification.config import ConfigError
from image_classification.models import create_model
from tests.support.explained import make_images, randomise, save_network

pytestmark = pytest.mark.usefixtures("small_cache")
OWN = Path(__file__).resolve().parents[1] / "support" / "own_architecture.py"
DATA = "shapes:train=24,val=20,seed=5"
COMMON = ["-b", "8", "--data-backend", "pytorch", "-j", "0", "--device", "cpu"]


def made_casm(num_classes: int = 12) -> Casm:
    torch.manual_seed(2)
    model = randomise(create_model("resnet20", num_classes=num_classes), make_images(8, 48))
    return Casm.for_classifier(model, 48, width=4).eval()


@pytest.fixture(scope="module")
def casms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("casms")
    save_casm(folder / "one.pth.tar", made_casm())
    return folder


def rows_of(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["rows"]


def test_score_writes_figures_of_masks_and_baselines(
    casms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--casms-path",
        str(casms),
        "--log-path",
        str(tmp_path / "logs"),
        "--save-to-file",
        "--json",
        str(tmp_path / "all.json"),
    ]
    assert main(["score-casm", DATA, *words, *COMMON]) == 0
    rows = rows_of(tmp_path / "all.json")
    assert [(row["casm"], row["mask"]) for row in rows] == [
        ("one.pth.tar", m) for m in ("casm", "max", "centre")
    ]
    assert rows == rows_of(tmp_path / "logs" / "one.pth.tar.json")
    assert all(row["images"] == 20 for row in rows)
    ours, whole, centre = rows
    assert whole["mask_mean"] == 1
    assert whole["mask_entropy"] == 0
    assert centre["mask_mean"] == pytest.approx((34 / 48) ** 2)
    for row in rows:
        assert 0 <= row["le"] <= row["om"] <= 1
        assert row["f1a"] <= row["f1"]
        assert row["top1"] == ours["top1"]
    assert "centre" in capsys.readouterr().out


def test_score_casm_uses_the_interface_of_another_architecture(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "box.pt").write_text("7")
    words = [
        "--casms-path",
        str(tmp_path / "models"),
        "--interface",
        str(OWN),
        "--json",
        str(tmp_path / "f.json"),
    ]
    assert main(["score-casm", DATA, *words, *COMMON]) == 0
    own, _, centre = rows_of(tmp_path / "f.json")
    # its box is the baseline's: 33 of 224 pixels are 7 of 48
    assert (own["le"], own["images"]) == (centre["le"], 20)
    assert own["mask_mean"] == pytest.approx(0.1 + 0.7 * (34 / 48) ** 2)
    assert own["saliency"] is None
    assert own["top1"] == pytest.approx(2 / 20)  # two images of the first class among 20 of 12 classes
    assert main(["score-casm", DATA, *words, *COMMON, "--not-normalize"]) == 0


def test_our_casms_follow_the_interface(casms: Path) -> None:
    interface = CasmInterface(torch.device("cpu"))
    model = interface.load_model(str(casms / "one.pth.tar"))
    images, targets = make_images(5, 48), np.array([0, 1, 2, 3, 4])
    masks, blocks, correct = interface.get_masks_and_check_predictions(images.numpy(), targets, model)
    with torch.no_grad():
        logits, expected = model(images)
    np.testing.assert_array_equal(masks, expected[:, 0].numpy())
    assert correct.tolist() == (logits.argmax(1).numpy() == targets).tolist()
    checked, found, _ = checked_answer((masks, blocks, correct), 5, (48, 48), "x")
    for mask, rectangle in zip(checked, found, strict=True):
        assert rectangle == object_rectangle(mask.astype(np.float32))


def test_baselines_by_hand() -> None:
    assert baseline_rectangle("max", (224, 224)) == Rectangle(0, 0, 224, 224)
    centre = baseline_rectangle("centre", (224, 224))
    assert centre == Rectangle(33, 33, 191, 191)
    box = np.array([[50.0, 50.0, 150.0, 150.0]])
    figures = box_figures(as_mask(centre, (224, 224)), box, centre)
    precision, recall = 100**2 / 158**2, 1.0
    assert figures.f1 == pytest.approx(2 * precision * recall / (precision + recall), rel=1e-5)
    assert figures.best_iou == pytest.approx(100**2 / 158**2)
    assert not figures.located
    # a constant mask has no rectangle of its own; the given one counts
    assert box_figures(np.ones((224, 224)), np.array([[0, 0, 224, 200.0]]), Rectangle(0, 0, 224, 224)).located


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "load_model.* get_masks_and_check_predictions"),
        ("def load_model(path): return 1", "get_masks_and_check_predictions"),
        ("import nothing_of_the_kind", "'nothing_of_the_kind'"),
    ],
)
def test_files_without_an_interface_are_refused(source: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(source)
    with pytest.raises(ConfigError, match=rf"interface=.*own\.py.*{message}"):
        load_interface(path)
    with pytest.raises(ConfigError, match=r"interface=.*nowhere\.py"):
        load_interface(tmp_path / "nowhere.py")


def test_an_interface_may_define_dataclasses(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(
        "from __future__ import annotations\nimport dataclasses\n@dataclasses.dataclass\nclass Model:\n    width: int\n"
        "def load_model(path): return Model(3)\ndef get_masks_and_check_predictions(images, targets, model): ...\n"
    )
    assert load_interface(path).load_model("x").width == 3


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (np.zeros(3), "masks, rectangles.* correct"),
        ((np.zeros((2, 4, 5)), np.zeros((2, 4, 4)), np.zeros(2)), r"masks .*\(2, 4, 5\)"),
        ((np.zeros((2, 4, 4)), np.zeros((2, 4)), np.zeros(2)), r"rectangles .*\(2, 4\)"),
        ((np.zeros((2, 4, 4)), np.zeros((2, 4, 4)), np.zeros(3)), r"correct .*\(3,\)"),
        ((np.full((2, 4, 4), 1.5), np.zeros((2, 4, 4)), np.zeros(2)), r"masks .*\[0, 1\]"),
        ((np.full((2, 4, 4), np.nan), np.zeros((2, 4, 4)), np.zeros(2)), "masks .*NaN"),
    ],
)
def test_answers_of_the_wrong_form(answer: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        checked_answer(answer, 2, (4, 4), "own")


def test_eval_asks_all_classifiers_about_all_images(casms: Path, tmp_path: Path) -> None:
    (tmp_path / "nets").mkdir()
    save_network(tmp_path / "nets" / "other.pth.tar")
    words = [
        "--casms-path",
        str(casms),
        "--resnets-path",
        str(tmp_path / "nets"),
        "--json",
        str(tmp_path / "f.json"),
    ]
    assert main(["eval-casm", DATA, *words, *COMMON]) == 0
    rows = rows_of(tmp_path / "f.json")
    figures = {(row["casm"], row["images"], row["classifier"]): row for row in rows}
    assert len(figures) == (1 + 5 * 3) * 2
    for classifier in ("one.pth.tar", "other.pth.tar"):
        whole, black = figures["–", "whole", classifier], figures["zeros", "masked in", classifier]
        same = {name: whole[name] for name in ("top1", "top5", "loss", "entropy")}
        for source, kind in (("zeros", "masked out"), ("zeros", "inpainted"), ("ones", "masked in")):
            assert {name: figures[source, kind, classifier][name] for name in same} == pytest.approx(
                same, rel=1e-5
            )
        assert figures["ones", "masked out", classifier]["loss"] == pytest.approx(black["loss"], rel=1e-5)
        assert figures["random grid", "masked in", classifier]["loss"] != pytest.approx(
            whole["loss"], rel=1e-3
        )


def test_images_are_inpainted_while_others_are_judged(
    casms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host fills the first batch's holes only once the device has been asked about its eleven other kinds."""
    cv2 = pytest.importorskip("cv2")
    judged, all_judged, beside = [], threading.Event(), []
    real_inpaint, real_count = cv2.inpaint, eval_casm.topk_correct

    def inpaint(*arguments: Any) -> Any:
        beside.append(all_judged.wait(20))
        return real_inpaint(*arguments)

    def count(*arguments: Any) -> Any:
        judged.append(arguments)
        if len(judged) == 2 * 11:  # top-1 and top-5
            all_judged.set()
        return real_count(*arguments)

    monkeypatch.setattr(cv2, "inpaint", inpaint)
    monkeypatch.setattr(eval_casm, "topk_correct", count)
    words = ["--casms-path", str(casms), "--json", str(tmp_path / "f.json"), *COMMON]
    assert main(["eval-casm", DATA, *words]) == 0
    assert len(beside) == 20 * 5
    assert all(beside)


def test_plot_draws_pages_of_seven(casms: Path, tmp_path: Path) -> None:
    words = ["--casm-path", str(casms / "one.pth.tar"), "--plots-path", str(tmp_path / "plots"), "-n", "10"]
    assert main(["plot-casm", DATA, *words, *COMMON]) == 0
    pages = sorted((tmp_path / "plots").glob("*.png"))
    # batches of 8 and 2, pages of at most 7
    assert [page.name for page in pages] == ["page-000000.png", "page-000007.png", "page-000008.png"]
    sizes = set()
    for page in pages:
        with Image.open(page) as image:
            sizes.add(image.size)
    assert len(sizes) == 1


def test_casm_is_an_attribution_method(casms: Path, tmp_path: Path) -> None:
    net = save_network(tmp_path / "net.pth.tar")
    casm = ["--method", "casm", "--casm-path", str(casms / "one.pth.tar")]
    words = [*casm, "--metric", "boxes", "--json", str(tmp_path / "f.json")]
    assert main(["localize", DATA, "--checkpoint", net, *words, *COMMON]) == 0
    (row,) = rows_of(tmp_path / "f.json")
    assert row["method"] == "casm"
    assert row["counted"]["f1"] == 20
    out = tmp_path / "maps"
    assert (
        main(["attribute", DATA, "--checkpoint", net, *casm, "--output", str(out), "-n", "2", *COMMON]) == 0
    )
    heatmap = np.load(next((out / "casm").rglob("*.npy")))
    assert heatmap.shape == (48, 48)
    assert 0 < heatmap.min() < heatmap.max() < 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["score-casm", DATA], "--casms-path is missing"),
        (["score-casm", DATA, "--casms-path", "nowhere"], "--casms-path nowhere: there is no such folder"),
        (["score-casm", DATA, "--casms-path", "{tmp}/nets"], "holds no saliency mapping"),
        (["score-casm", DATA, "--casms-path", "{tmp}/ten"], "has 10 classes, but"),
        (["score-casm", DATA, "--casms-path", "{casms}", "--save-to-file"], "belong together"),
        (["score-casm", DATA, "--casms-path", "{casms}", "--not-normalize"], "--not-normalize is for"),
        (
            ["score-casm", DATA, "--casms-path", "{casms}", "--json", "/proc/none/f.json"],
            "--json /proc/none cannot",
        ),
        (
            ["score-casm", DATA, "--casms-path", "{casms}", "--log-path", "/proc/l", "--save-to-file"],
            "--log-path /proc/l cannot",
        ),
        (
            ["score-casm", DATA, "--casms-path", "{casms}", "--annotation-path", "{tmp}/nets"],
            ".xml is missing",
        ),
        (
            ["score-casm", DATA, "--casms-path", "{casms}", "--mixup", "0.2"],
            "unrecognized argument '--mixup'",
        ),
        (
            ["eval-casm", DATA, "--casms-path", "{casms}", "--resnets-path", "nowhere"],
            "--resnets-path nowhere",
        ),
        (
            ["eval-casm", DATA, "--casms-path", "{casms}", "--resnets-path", "{tmp}/none"],
            "no checkpoint in it",
        ),
        (["eval-casm", DATA, "--casms-path", "{casms}", "--arch", "resnet50"], "give the folder"),
        (
            [
                "eval-casm",
                DATA,
                "--casms-path",
                "{casms}",
                "--resnets-path",
                "{tmp}/nets",
                "--arch",
                "resnet56",
            ],
            "holds resnet20, not --arch resnet56",
        ),
        (["eval-casm", "shapes-multi:train=24,val=20", "--casms-path", "{casms}"], "several labels"),
        (["plot-casm", DATA, "--casm-path", "{casms}/one.pth.tar"], "--plots-path is missing"),
        (["plot-casm", DATA, "--casm-path", "nowhere.pth", "--plots-path", "{tmp}/p"], "nowhere.pth"),
        (["plot-casm", DATA, "--casm-path", "x", "--plots-path", "/proc/p"], "--plots-path /proc/p cannot"),
        (["plot-casm", DATA, "--casm-path", "x", "--plots-path", "p", "--columns", "0"], "--columns 0"),
        (["localize", DATA, "--checkpoint", "{tmp}/nets/n.pth.tar", "--method", "casm"], "--casm-path"),
        (
            ["localize", DATA, "--checkpoint", "{tmp}/nets/n.pth.tar", "--casm-path", "x"],
            "--casm-path has no effect",
        ),
        (
            ["localize", DATA, "--checkpoint", "{tmp}/nets/n.pth.tar", "--auto-augment", "autoaugment"],
            "unrecognized",
        ),
        (
            ["attribute", DATA, "--checkpoint", "{tmp}/nets/n.pth.tar", "--calibration-size", "4"],
            "unrecognized",
        ),
    ],
)
def test_impossible_requests_are_refused(
    words: list[str], message: str, casms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("nets", "ten", "none"):
        (tmp_path / name).mkdir()
    save_network(tmp_path / "nets" / "n.pth.tar")
    save_casm(tmp_path / "ten" / "ten.pth.tar", made_casm(10))
    words = [word.format(tmp=tmp_path, casms=casms) for word in words]
    try:
        status = main([*words, *COMMON])
    except SystemExit as stopped:
        status = int(str(stopped.code))
    assert status == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown


def test_missing_opencv_is_reported_at_the_start(
    casms: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert main(["eval-casm", DATA, "--casms-path", str(casms), *COMMON]) == 2
    assert "lucidprune[inpaint]" in capsys.readouterr().err
