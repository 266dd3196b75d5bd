"""Compression that keeps the explanations, from the command line: teacher, three compressions, and what goes wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.commands import run_here, shortened, status_of
from support.voc import annotation_xml, write_devkit

import main
from explainers.__main__ import main as explainers_main
from image_classification.cli import parse_config
from image_classification.models import create_model, read_safely
from image_classification.observe.json_report import read_report

TEACHER = """python main.py VOC2012 --arch vgg16_bn --multi-label --pretrained-weights imagenet.pth --new-head \
  --batch-size 64 --lr 1e-3 --momentum 0.9 --weight-decay 1e-4"""
STUDENT = """python main.py VOC2012 --arch vgg16_bn_x8 --multi-label --teacher t.pth.tar --distill logit --match swa \
  --match-weight 100"""
ONE_SHOT = """python main.py VOC2012 --arch vgg16_bn --multi-label --pretrained-weights t.pth.tar --teacher t.pth.tar \
  --one-shot-pruning 0.3 --match swa --stochastic --drop-percent 0.3"""
PUBLISHED_RATES = """ --pruning-criterion magnitude --prune-rate features.0 --prune-rate features.2[47] \
  --prune-rate features.3[047] --prune-rate features.40"""
UNSTRUCTURED = """python main.py VOC2012 --arch vgg16_bn --multi-label --pretrained-weights t.pth.tar \
  --teacher t.pth.tar --unstructured-pruning 0.2 --rounds 16 --match swa --epochs 16"""
ITERATIVE = """python main.py VOC2012 --arch vgg16_bn --multi-label --pretrained-weights t.pth.tar --iterative_pruning \
  --pruning_delta 0.25 --teacher t.pth.tar --match swa"""


@pytest.mark.parametrize(
    "command", [TEACHER, STUDENT, ONE_SHOT, ONE_SHOT + PUBLISHED_RATES, UNSTRUCTURED, ITERATIVE]
)
def test_every_word_is_understood(command: str, tmp_path: Path) -> None:
    (tmp_path / "t.pth.tar").touch()
    words = command.replace("t.pth.tar", str(tmp_path / "t.pth.tar")).split()[2:]
    configs = parse_config(main.MainConfig, words)
    assert configs.loss.multi_label
    distill = configs.distill
    assert distill.active == (command is not TEACHER)
    if distill.active:
        assert (distill.match, distill.match_weight) == ("swa", 100.0)
    assert distill.stochastic == command.startswith(ONE_SHOT)
    assert configs.unstructured.active == (command is UNSTRUCTURED)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small ResNet-20 teacher for VOC's classes, and the devkit that it was trained on."""
    folder = tmp_path_factory.mktemp("preserve")
    write_devkit(folder)
    words = small(folder, "teacher", "--epochs", "1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUCIDPRUNE_CACHE", str(folder / "cache"))
        assert main.main(words) == 0
    return folder


def small(folder: Path, name: str, *more: object, arch: str = "resnet20") -> list[str]:
    """The words of a training on the small devkit."""
    settings = {
        "--arch": arch,
        "--batch-size": 6,
        "--image-size": 32,
        "--workers": 1,
        "--device": "cpu",
        "--lr": 0.01,
        "--data-backend": "pytorch",
        "--workspace": folder / name,
        "--raport-file": "report.json",
        "--print-freq": 1,
    }
    words = [str(word) for pair in settings.items() for word in pair]
    return [str(folder), "--multi-label", *words, *map(str, more)]


Attempt = Callable[..., tuple[int, str]]


@pytest.fixture
def attempt(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Attempt:
    """Runs a student's training in this process: exit code, and what was printed."""
    monkeypatch.setenv("LUCIDPRUNE_CACHE", str(tmp_path / "cache"))

    def begin(*more: object, root: Path = teacher, arch: str = "resnet20") -> tuple[int, str]:
        capfd.readouterr()
        words = small(root, "unused", *more, "--workspace", tmp_path / "run", arch=arch)
        try:
            code = main.main(words)
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capfd.readouterr()
        assert "Traceback" not in err, err
        return code, out + err

    return begin


def checkpoint(teacher: Path) -> Path:
    return teacher / "teacher" / "checkpoint.pth.tar"


def logged(workspace: Path, key: str) -> list[float]:
    entries = [e["data"] for e in read_report(workspace / "report.json") if e["type"] == "LOG"]
    return [data[key] for data in entries if key in data]


# ------------------------------------------------------------------ each flag has its effect


def test_match_and_distillation_flags(attempt: Attempt, teacher: Path, tmp_path: Path) -> None:
    given = ("--teacher", checkpoint(teacher), "--epochs", 1, "--training-only", "--prof", 1)
    seen: dict[str, Any] = {}
    for name, words in {
        "swa": ("--match", "swa"),
        "ewa": ("--match", "ewa"),
        "gradcam": ("--match", "gradcam"),
        "attention": ("--match", "attention"),
        "light": ("--match", "swa", "--match-weight", 1),
        "layers": ("--match", "swa", "--match-layer", "layer2", "--match-layer", "layer3=layer3"),
        "stochastic": ("--match", "swa", "--stochastic", "--drop-percent", 0.5),
        "logit": ("--distill", "logit"),
        "cool": ("--distill", "logit", "--distill-temperature", 1),
        "heavy": ("--distill", "logit", "--distill-weight", 0.9),
    }.items():
        code, text = attempt(*given, *words)
        assert code == 0, text
        key = "train.distill_loss" if "--distill" in words else "train.match_loss"
        first = {k: logged(tmp_path / "run", k)[0] for k in ("train.loss", "train.task_loss", key)}
        seen[name] = first["train.loss"], first["train.task_loss"], first[key]
        assert "learning from" in text
    # The first step's parts: weights have not moved yet, so only the flags tell the runs apart.
    parts = {name: values[2] for name, values in seen.items()}
    assert (
        len({round(parts[n], 9) for n in ("swa", "ewa", "gradcam", "attention", "layers", "stochastic")}) == 6
    )
    assert parts["light"] == pytest.approx(parts["swa"], rel=1e-3)
    assert seen["swa"][0] == pytest.approx(seen["swa"][1] + 100 * parts["swa"], rel=1e-3)
    assert seen["light"][0] == pytest.approx(seen["light"][1] + parts["light"], rel=1e-3)
    assert parts["cool"] != pytest.approx(parts["logit"], rel=1e-3)
    assert seen["heavy"][0] == pytest.approx(0.1 * seen["heavy"][1] + 0.9 * parts["heavy"], rel=1e-3)
    assert seen["logit"][0] == pytest.approx(0.5 * seen["logit"][1] + 0.5 * parts["logit"], rel=1e-3)


def test_plain_weights_need_the_teachers_architecture(attempt: Attempt, tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = tmp_path / "plain.pth"
    torch.save(create_model("resnet20", num_classes=20).state_dict(), plain)
    code, text = attempt("--teacher", plain, "--match", "ewa", "--epochs", 1)
    assert code == 2
    assert f"--teacher {plain}" in text
    assert "does not say its architecture: give --teacher-arch" in text
    code, text = attempt("--teacher", plain, "--teacher-arch", "resnet20", "--match", "ewa", "--epochs", 1)
    assert code == 0, text


def test_another_architecture_as_teacher(attempt: Attempt, teacher: Path) -> None:
    code, text = attempt(
        "--teacher", checkpoint(teacher), "--match", "swa", "--epochs", 1, arch="vgg11_bn_cifar_x8"
    )
    assert code == 0, text
    assert "as layer3" in text  # the student's layer has another name


# ------------------------------------------------------------------ what goes wrong, before training


def test_teacher_of_other_classes(attempt: Attempt, tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(create_model("resnet20", num_classes=8).state_dict(), tmp_path / "eight.pth")
    code, text = attempt("--teacher", tmp_path / "eight.pth", "--teacher-arch", "resnet20", "--match", "swa")
    assert code == 2
    assert f"--teacher {tmp_path / 'eight.pth'}" in text
    assert "8" in text
    assert "20" in text
    assert "train.loss" not in text


def test_teacher_checkpoint_of_other_classes(attempt: Attempt, tmp_path: Path) -> None:
    from pruning.files.saved_network import save_pruned

    save_pruned(tmp_path / "eight.pth.tar", create_model("resnet20", num_classes=8))
    code, text = attempt("--teacher", tmp_path / "eight.pth.tar", "--match", "swa")
    assert code == 2
    assert "eight.pth.tar has 8 classes, the student 20: give a teacher that was trained on" in text
    assert "train.loss" not in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--match", "swa", "--match-layer", "layer9"],
            "--match swa, --match-layer layer9=layer9: there is no layer",
        ),
        (["--match", "swa", "--match-layer", "fc"], r"--match-layer fc=fc: layer 'fc' gives"),
        (["--match", "swa", "--compile"], "--match swa and --compile exclude each other"),
        (["--match", "swa", "--evaluate"], "--teacher has no effect with --evaluate"),
        (["--match", "sws"], "--match"),
    ],
)
def test_settings_that_cannot_work(attempt: Attempt, teacher: Path, words: list[str], message: str) -> None:
    code, text = attempt("--teacher", checkpoint(teacher), "--epochs", 1, *words)
    assert code != 0
    assert message in text
    assert "train.loss" not in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--epochs", "5", "--rounds", "2"],
            "--epochs 5 cannot be divided among --rounds 2: --epochs 6 gives each 3",
        ),
        (["--epochs", "4", "--rounds", "2", "--rewind", "3"], "--rewind 3: a round has 2 epochs"),
        (
            ["--one-shot-pruning", "0.3"],
            "--unstructured-pruning holds single weights at zero and cannot follow",
        ),
        (["--iterative-pruning"], "--unstructured-pruning holds single weights at zero"),
        (["--evaluate"], "--unstructured-pruning has no effect with --evaluate"),
    ],
)
def test_rounds_that_cannot_work(attempt: Attempt, words: list[str], message: str) -> None:
    code, text = attempt("--unstructured-pruning", "0.2", *words)
    assert code == 2
    assert message in text


def _unlink(root: Path) -> None:
    next((root / "VOCdevkit/VOC2012/Annotations").glob("*.xml")).unlink()


def _annotate(objects: list) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        next((root / "VOCdevkit/VOC2012/Annotations").glob("*.xml")).write_text(annotation_xml(objects))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_unlink, ".xml is missing"),
        (_annotate([]), ".xml annotates no object"),
        (_annotate([("gnu", (1, 1, 9, 9), 0)]), ".xml has objects of unknown classes: gnu"),
    ],
)
def test_damaged_devkit(attempt: Attempt, tmp_path: Path, damage: Callable, message: str) -> None:
    write_devkit(tmp_path / "damaged")
    damage(tmp_path / "damaged")
    code, text = attempt("--epochs", 1, root=tmp_path / "damaged")
    assert code == 2
    assert message in text


# ------------------------------------------------------------------ before and after


def test_compare(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LUCIDPRUNE_CACHE", str(tmp_path / "cache"))
    original = checkpoint(teacher)
    words = f"""--epochs 1 --pretrained-weights {original} --teacher {original} --match swa --one-shot-pruning 0.3
        --prune-rate layer3.*=0.5 --calibration-batches 1 --pruning-criterion magnitude"""
    assert main.main(small(teacher, "pruned", *words.split())) == 0
    same = compared(teacher, original, tmp_path / "same")
    assert [row["method"] for row in same["methods"]] == ["gradcam", "lrp", "ebp", "rap"]
    for row in same["methods"]:
        assert row["pairs"] == 8  # 6 images, every other one with two classes, one of them difficult
        assert row["original"] == row["pruned"]
        for similarity, value in row["moved"].items():
            assert value is None or value == pytest.approx(1), similarity
    assert same["prediction"]["original"] == same["prediction"]["pruned"]
    assert same["prediction"]["original"].keys() == {"map", "f1", "f1_macro", "map_images", "f1_images"}
    pruned = compared(teacher, teacher / "pruned" / "checkpoint.pth.tar", tmp_path / "pruned")
    moved = [row["moved"]["rank_correlation"] for row in pruned["methods"]]
    assert all(value < 0.99 for value in moved if value is not None)
    assert any(value is not None for value in moved)
    assert "explanations: original → pruned" in capsys.readouterr().out


def compared(teacher: Path, other: Path, output: Path) -> Any:
    """What `compare` says of the teacher and another network; its gallery shows something."""
    figures, gallery = output.with_suffix(".json"), output.with_suffix(".png")
    words = f"""compare {checkpoint(teacher)} {other} {teacher} --image-size 32 --batch-size 4 --workers 1
        --device cpu --json {figures} --gallery {gallery} --rows 2"""
    assert explainers_main(words.split()) == 0
    assert gallery.stat().st_size > 10_000
    return json.loads(figures.read_text())


def test_compare_says_what_is_missing(teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["compare", str(checkpoint(teacher))], "PRUNED is missing"),
        (
            ["compare", "/no/such", str(checkpoint(teacher)), str(teacher)],
            "ORIGINAL /no/such: there is no such file",
        ),
        (
            ["compare", *[str(checkpoint(teacher))] * 2, str(teacher), "--rows", "3"],
            "--rows has no effect without",
        ),
        (
            ["compare", *[str(checkpoint(teacher))] * 2, str(teacher), "--gallery", "maps.xyz"],
            "--gallery maps.xyz: ",
        ),
        (["compare", *[str(checkpoint(teacher))] * 2, str(teacher), "--json", str(teacher)], "is a folder"),
    ):
        assert status_of(explainers_main, words) == 2
        assert message in capsys.readouterr().err


# ------------------------------------------------------------------ the commands, one after the other


@pytest.mark.slow
def test_the_commands_run_at_a_small_size(tmp_path: Path) -> None:
    write_devkit(tmp_path / "voc")
    torch.manual_seed(0)
    torch.save(create_model("vgg16_bn_x8", num_classes=1000).state_dict(), tmp_path / "imagenet.pth")
    files = {
        "VOC2012": str(tmp_path / "voc"),
        "imagenet.pth": str(tmp_path / "imagenet.pth"),
        "--arch vgg16_bn ": "--arch vgg16_bn_x8 ",
        "t.pth.tar": str(tmp_path / "teacher" / "checkpoint.pth.tar"),
    }
    commands = {
        "teacher": TEACHER,
        "student": STUDENT,
        "one-shot": ONE_SHOT,
        "rates": ONE_SHOT + PUBLISHED_RATES,
        "unstructured": UNSTRUCTURED,
        "iterative": ITERATIVE + " --pruning_step 1",
    }
    for name, command in commands.items():
        words = shortened(command, files, tmp_path / name)
        if "magnitude" in command or "one-shot" in command or "iterative" in command:
            words += ["--calibration-batches", "1"]
        result = run_here(words, tmp_path / "cache")
        assert result.returncode == 0, f"{name}:\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    rates = read_safely(tmp_path / "rates" / "checkpoint.pth.tar")
    assert rates["state_dict"]["features.0.weight"].shape[0] == math.floor(0.7 * 8)
    assert rates["state_dict"]["features.14.weight"].shape[0] == 32
    sparse = read_safely(tmp_path / "unstructured" / "checkpoint.pth.tar")
    assert sparse["callbacks"]["unstructured"]["completed"] == 1
