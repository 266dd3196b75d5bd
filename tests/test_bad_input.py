"""Bad input, through the command line: each has its message and exit code, and no traceback reaches the user."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.images import smooth_image, write_jpegs, write_png16

import main
from image_classification.checkpoint_format import sealed
from image_classification.data.backends import dali
from image_classification.models import create_model, read_safely
from image_classification.observe.json_report import read_report
from image_classification.workspace_lock import WorkspaceLock

BACKENDS = [
    "pytorch",
    "resident",
    pytest.param(
        "dali-cpu", marks=pytest.mark.skipif(not dali.is_available(), reason="DALI is not installed")
    ),
]
NAME = "checkpoint.pth.tar"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUCIDPRUNE_CACHE", str(tmp_path / "cache"))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def write_classes(root: Path, *, classes: int = 4, train: int = 8, val: int = 2) -> Path:
    for split, count in (("train", train), ("val", val)):
        for number in range(classes):
            folder = root / split / f"class{number}"
            folder.mkdir(parents=True)
            write_jpegs(folder, [(40 + 3 * i, 50 + 2 * number) for i in range(count)])
    return root


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four classes of 8 training and 2 validation images; tests do not change it."""
    return write_classes(tmp_path_factory.mktemp("good"))


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy of the good data that a test may damage."""
    return Path(shutil.copytree(good, tmp_path / "data"))


Attempt = Callable[..., tuple[int, str]]


@pytest.fixture
def attempt(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Attempt:
    """Runs `main.py DATA FLAGS` in this process: exit code, and everything that was printed."""

    def run(data: object, *words: object, backend: str = "pytorch") -> tuple[int, str]:
        capfd.readouterr()
        settings = {
            "--arch": "resnet20",
            "--epochs": "1",
            "--batch-size": "8",
            "--image-size": "32",
            "--device": "cpu",
            "--workers": "1",
            "--data-backend": backend,
            "--workspace": str(tmp_path / "workspace"),
            "--lr": "0.01",
        }
        given = [str(word) for word in words]
        defaults = [word for flag in settings.items() if flag[0] not in given for word in flag]
        try:
            code = main.main([str(data), *defaults, *given])
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capfd.readouterr()
        return code, out + err

    return run


def assert_told(result: tuple[int, str], pattern: str, code: int = 2) -> None:
    """The exit code, one line that says what is wrong, and no traceback."""
    got, text = result
    assert "Traceback" not in text, text
    assert got == code, text
    lines = [line for line in text.splitlines() if line.startswith("error:") or "main.py: error:" in line]
    assert len(lines) == 1, text
    assert re.search(pattern, lines[0]), text


def test_the_good_data_trains(attempt: Attempt, good: Path, tmp_path: Path) -> None:
    code, text = attempt(good)
    assert code == 0, text
    assert read_safely(tmp_path / "workspace" / NAME)["iteration"] == 4


# ------------------------------------------------------------------ the data set


def test_missing_data(attempt: Attempt, tmp_path: Path) -> None:
    assert_told(attempt(tmp_path / "absent"), r"absent' does not exist; known layouts: class folders")


def test_unknown_layout(attempt: Attempt, tmp_path: Path) -> None:
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "notes.txt").write_text("nothing")
    assert_told(attempt(tmp_path / "odd"), r"DATA: .*odd holds no data set that is known here; known layouts")
    write_jpegs(tmp_path / "odd", [(40, 40)])
    assert_told(attempt(tmp_path / "odd"), r"has 1 images but neither splits nor class folders")


def test_a_file_that_is_not_an_archive_is_refused(attempt: Attempt, tmp_path: Path) -> None:
    (tmp_path / "set.tar.gz").write_bytes(b"not an archive")
    assert_told(attempt(tmp_path / "set.tar.gz"), r"set\.tar\.gz")


def test_empty_class_folder(attempt: Attempt, folder: Path) -> None:
    for path in (folder / "train" / "class2").iterdir():
        path.unlink()
    assert_told(attempt(folder), r"DATA: 1 of 4 class folders in .*train have no images: class2")


def test_splits_with_different_classes(attempt: Attempt, folder: Path) -> None:
    (folder / "val" / "class3").rename(folder / "val" / "other")
    assert_told(attempt(folder), r"have different classes .*only in train/: class3; only in val/: other")


def test_missing_validation_split(attempt: Attempt, folder: Path) -> None:
    shutil.rmtree(folder / "val")
    assert_told(attempt(folder), r"has train/ but no validation split")


def test_fewer_images_than_a_batch(attempt: Attempt, good: Path) -> None:
    assert_told(attempt(good, "--batch-size", 64), r"--batch-size")
    result = attempt(good, "--batch-size", 8, "--optimizer-batch-size", 64)
    assert_told(result, r"--optimizer-batch-size 64: the training set has 32 images")


def test_calibration_split_that_is_too_large(attempt: Attempt, good: Path) -> None:
    words = ["--iterative-pruning", "--calibration-size", 30]
    assert_told(attempt(good, *words), r"--calibration-size 30: does not fit: train has 32 images")


# ------------------------------------------------------------------ images


def damage(path: Path, kind: str) -> None:
    data = path.read_bytes()
    contents = {
        "truncated": data[: len(data) // 2],
        "empty": b"",
        "random": np.random.default_rng(0).bytes(3000),
        "text": b"not an image\n" * 40,
    }
    path.write_bytes(contents[kind])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["truncated", "empty", "random", "text"])
def test_unreadable_image_stops_the_run(attempt: Attempt, folder: Path, kind: str, backend: str) -> None:
    bad = folder / "train" / "class1" / "0003.jpg"
    damage(bad, kind)
    result = attempt(folder, backend=backend)
    assert_told(result, rf"{re.escape(str(bad))} cannot be read: .*--on-bad-sample substitute")


@pytest.mark.parametrize("backend", BACKENDS)
def test_unreadable_images_are_substituted(
    attempt: Attempt, folder: Path, tmp_path: Path, backend: str
) -> None:
    kinds = ["truncated", "empty", "random", "text"]
    for number, kind in enumerate(kinds):
        damage(folder / "train" / f"class{number}" / "0003.jpg", kind)
    damage(folder / "val" / "class0" / "0001.jpg", "truncated")
    code, text = attempt(folder, "--on-bad-sample", "substitute", "--print-freq", 1, backend=backend)
    assert code == 0, text
    assert "Traceback" not in text
    entries = read_report(tmp_path / "workspace" / "experiment_raport.json")
    counts = [
        e["data"]["train.substituted_samples"]
        for e in entries
        if "train.substituted_samples" in e.get("data", {})
    ]
    assert counts[-1] == 4
    assert [e["data"]["val.samples"] for e in entries if "val.samples" in e.get("data", {})] == [8]


def test_no_readable_image_at_all(attempt: Attempt, folder: Path) -> None:
    for path in (folder / "train").rglob("*.jpg"):
        damage(path, "text")
    assert_told(attempt(folder, "--on-bad-sample", "substitute"), r"not one of the 32 images .* can be read")


@pytest.mark.parametrize("backend", BACKENDS)
def test_unusual_images_just_work(attempt: Attempt, folder: Path, backend: str) -> None:
    class0 = folder / "train" / "class0"
    smooth_image(60, 50, 1).convert("CMYK").save(class0 / "0000.jpg")
    smooth_image(60, 50, 1).convert("L").save(class0 / "0001.jpg")
    Image.new("RGB", (1, 1), (200, 10, 10)).save(class0 / "0002.jpg")
    rng = np.random.default_rng(0)
    write_png16(class0 / "deep.png", rng.integers(0, 2**16, (40, 50, 3), dtype=np.uint16))
    write_png16(class0 / "deep_grey.png", rng.integers(0, 2**16, (40, 50), dtype=np.uint16))
    smooth_image(60, 50, 1).convert("P").save(class0 / "palette.png")
    smooth_image(60, 50, 1).convert("RGBA").save(class0 / "alpha.png")
    code, text = attempt(folder, backend=backend)
    assert code == 0, text
    assert "cannot be read" not in text


@pytest.mark.parametrize("backend", BACKENDS)
def test_images_of_20000_pixels(attempt: Attempt, folder: Path, backend: str) -> None:
    """They just work, except where every image gets the room of the largest: told, with the ways out."""
    Image.new("RGB", (20_000, 30), (10, 200, 10)).save(folder / "train" / "class0" / "long.jpg")
    Image.new("RGB", (30, 20_000), (10, 10, 200)).save(folder / "train" / "class1" / "tall.png")
    result = attempt(folder, backend=backend)
    if backend == "resident":
        assert_told(result, r"--data-backend resident: needs 38\.\d GiB for 34 images .*: choose dali-gpu")
    else:
        assert result[0] == 0, result[1]


# ------------------------------------------------------------------ the network


def test_wrong_number_of_classes(attempt: Attempt, good: Path) -> None:
    assert_told(
        attempt(good, "--num-classes", 3), r"--num-classes 3, but the data has 4 classes: give 4 or more"
    )


def test_unknown_architecture(attempt: Attempt, good: Path) -> None:
    assert_told(attempt(good, "--arch", "resnet21"), r"resnet21.*did you mean|resnet21.*resnet20")
    assert_told(attempt(good, "--arch", "torchvision/resnet51"), r"resnet51")


def test_weights_of_another_head(attempt: Attempt, good: Path, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(create_model("resnet20", num_classes=10).state_dict(), path)
    result = attempt(good, "--pretrained-weights", path)
    assert_told(result, r"module 'fc'.*other classes\. Give --num-classes 10 .*or --new-head")
    assert attempt(good, "--pretrained-weights", path, "--new-head")[0] == 0


@pytest.mark.parametrize("flag", ["--pretrained-weights", "--resume"])
def test_missing_checkpoint(attempt: Attempt, good: Path, tmp_path: Path, flag: str) -> None:
    assert_told(attempt(good, flag, tmp_path / "absent.pth"), rf"{flag}.*|absent\.pth")


# ------------------------------------------------------------------ resume


@pytest.fixture(scope="module")
def trained(good: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of one epoch of two."""
    workspace = tmp_path_factory.mktemp("trained")
    words = [str(good), "--arch", "resnet20", "--epochs", "2", "--run-epochs", "1", "--batch-size", "8"]
    words += [
        "--image-size",
        "32",
        "--device",
        "cpu",
        "--workers",
        "1",
        "--data-backend",
        "pytorch",
        "--lr",
        "0.01",
    ]
    assert main.main([*words, "--workspace", str(workspace)]) == 0
    return workspace / NAME


@pytest.mark.parametrize("kind", ["foreign", "plain weights"])
def test_a_file_without_a_training(attempt: Attempt, good: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "checkpoint.pth"
    content: dict[str, object] = {"epoch": 3, "iteration": 7, "arch": "resnet20"}
    if kind == "plain weights":
        content = create_model("resnet20", num_classes=4).state_dict()
    torch.save(content, path)
    assert_told(attempt(good, "--epochs", 2, "--resume", path), "holds no training state")


def test_incomplete_checkpoint(attempt: Attempt, good: Path, trained: Path, tmp_path: Path) -> None:
    """A file of our format that lacks entries, or contradicts itself: told, whatever is missing."""
    payload = read_safely(trained)
    for key in ("optimizer", "loader", "rng", "structure", "callbacks", "steps_per_epoch"):
        path = tmp_path / f"{key}.pth"
        torch.save(sealed({name: value for name, value in payload.items() if name != key}), path)
        assert_told(attempt(good, "--epochs", 2, "--resume", path), rf"--resume: .*{key}")
    payload["state_dict"]["fc.weight"] = torch.zeros(5, 64)
    torch.save(payload, tmp_path / "contradiction.pth")
    result = attempt(good, "--epochs", 2, "--resume", tmp_path / "contradiction.pth")
    assert_told(result, r"contradiction\.pth: it contradicts itself at .*fc\.weight")


@pytest.mark.parametrize(
    ("words", "pattern"),
    [
        (["--arch", "resnet32"], r"--resume: .* is of --arch resnet20, not resnet32"),
        (["--seed", 5], r"--resume: .*seed was 0, is 5"),
        (["--batch-size", 4], r"--resume: .*(--optimizer-batch-size|--batch-size|global_batch)"),
        (["--optimizer-batch-size", 16], r"--resume: .* 4 iterations per epoch, now there would be 2"),
        (["--augmentation", "none"], r"--resume: .*augmentation flags were changed"),
        (["--optimizer", "adamw"], r"--resume: .*--optimizer sgd, not adamw"),
        (["--bn-weight-decay"], r"--resume: .*--bn-weight-decay"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_resume_with_other_settings(
    attempt: Attempt, good: Path, trained: Path, words: list[object], pattern: str
) -> None:
    assert_told(attempt(good, "--epochs", 2, "--resume", trained, *words), pattern)


def test_resume_on_other_data(attempt: Attempt, folder: Path, trained: Path) -> None:
    damage(folder / "train" / "class1" / "0003.jpg", "truncated")
    assert_told(attempt(folder, "--epochs", 2, "--resume", trained), r"--resume: .*the files.*were changed")


def test_flags_win_over_the_checkpoint(attempt: Attempt, good: Path, trained: Path, tmp_path: Path) -> None:
    """Momentum and decay of a resumed run are those of its flags; they used to be the checkpoint's, silently."""
    code, text = attempt(good, "--epochs", 2, "--resume", trained, "--mom", 0.5, "--wd", 0.25)
    assert code == 0, text
    groups = read_safely(tmp_path / "workspace" / NAME)["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.25, 0.0]
    assert {group["momentum"] for group in groups} == {0.5}


# ------------------------------------------------------------------ outputs


def test_workspace_that_cannot_be_made(attempt: Attempt, good: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    below = tmp_path / "file" / "below"
    result = attempt(good, "--workspace", below, "--raport-file", "")
    assert_told(result, r"--workspace .*below: cannot be written \(Not a directory\)")


def test_report_that_cannot_be_written(attempt: Attempt, good: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = attempt(good, "--raport-file", tmp_path / "file" / "report.json")
    assert_told(result, r"--raport-file .*report\.json: cannot be written")


@pytest.mark.parametrize("allowed", [0, 1], ids=["first save", "second save"])
def test_full_disk_while_saving(
    attempt: Attempt, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: int
) -> None:
    """The job stops with one line, and the checkpoint before is whole."""
    real, saves = torch.save, []

    def save(payload: Any, file: Any) -> None:
        saves.append(payload["iteration"])
        if len(saves) > allowed:
            file.write(b"the beginning of a checkpoint")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(payload, file)

    monkeypatch.setattr(torch, "save", save)
    result = attempt(good, "--checkpoint-interval", 1)
    assert_told(
        result, r"cannot write .*checkpoint\.pth\.tar \(No space left on device\): free space or choose"
    )
    workspace = tmp_path / "workspace"
    assert not [path.name for path in workspace.iterdir() if path.name.endswith(".tmp")]
    if allowed:
        assert read_safely(workspace / NAME)["iteration"] == 1
    else:
        assert not (workspace / NAME).exists()


# ------------------------------------------------------------------ while training


def test_nan_loss(attempt: Attempt, good: Path) -> None:
    result = attempt(good, "--lr", "1e30", "--checkpoint-interval", 1)
    assert_told(result, r"the loss is not finite at iteration \d on rank 0; sample ids of that batch: \[\d")


def test_out_of_memory(attempt: Attempt, good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from image_classification.objective import TaskObjective

    def exhausted(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(TaskObjective, "__call__", exhausted)
    assert_told(attempt(good), r"out of memory: lower --batch-size")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_asked_for_and_absent(attempt: Attempt, good: Path) -> None:
    assert_told(attempt(good, "--device", "cuda"), r"--device cuda: no GPU is visible")
    assert_told(attempt(good, backend="dali-gpu"), r"--data-backend dali-gpu: .*needs a CUDA device")


def test_optimizer_batch_that_does_not_divide(attempt: Attempt, good: Path) -> None:
    result = attempt(good, "--optimizer-batch-size", 12)
    assert_told(result, r"--optimizer-batch-size: 12 is not a multiple of --batch-size 8 × 1 process")


# ------------------------------------------------------------------ pruning


@pytest.mark.parametrize(
    ("words", "pattern"),
    [
        (["--budget", "macs=0.0001"], r"--budget macs=0\.0001"),
        (["--budget", "macs=1.5"], r"--budget macs=1\.5: the share that may remain is between 0 and 1"),
        (["--budget", "macs"], r"--budget macs: write METRIC=SHARE"),
        (["--budget", "mac=0.5"], r"--budget mac: unknown cost.*macs"),
        (["--pruning-criterion", "magnitud"], r"magnitud.*magnitude"),
        (["--pruning-search", "gready"], r"--pruning-search gready: .*did you mean greedy"),
        (["--pruning-delta", "0"], r"--pruning[-_]delta 0"),
        (["--pruning-step", "0"], r"--pruning-step 0"),
        (["--min-width", "0"], r"min[-_]width"),
        (["--prune-limit", "layer1"], r"--prune-limit layer1: write PATTERN=LEAST"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_pruning_that_cannot_be(attempt: Attempt, good: Path, words: list[str], pattern: str) -> None:
    code, text = attempt(good, "--iterative-pruning", "--calibration-size", 8, *words)
    assert_told((code, text), pattern)
    assert "epoch 0" not in text  # refused before training starts


def test_pruning_flags_without_pruning(attempt: Attempt, good: Path) -> None:
    result = attempt(good, "--pruning-step", 20)
    assert_told(result, r"--pruning-step has no effect without --iterative-pruning")


# ------------------------------------------------------------------ the command line


def test_misspelt_flag(attempt: Attempt, good: Path) -> None:
    assert_told(attempt(good, "--warmpu", 5), r"unrecognized argument '--warmpu'; did you mean --warmup")


def test_misspelt_key_and_wrong_value_in_yaml(attempt: Attempt, good: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    for text, pattern in (
        ("lable_smoothing: 0.1\n", r"unknown key 'lable_smoothing'; did you mean label_smoothing"),
        ("epochs: many\n", r"--epochs: 'many' is not usable"),
        ("- epochs\n", r"must hold a mapping"),
        ("epochs: [1\n", r"is not readable YAML"),
    ):
        recipe.write_text(text)
        assert_told(attempt(good, "--config", recipe), pattern)
    assert_told(attempt(good, "--config", tmp_path / "absent.yaml"), r"--config: no such file")


# ------------------------------------------------------------------ classes by name


def test_classes_are_matched_by_name(attempt: Attempt, good: Path, trained: Path, tmp_path: Path) -> None:
    """A renamed class is told; the same classes in another order, and some of them, are measured as what they are."""
    words = ["--pretrained-weights", trained, "--evaluate"]

    def measured(data: Path, *more: object) -> dict[str, float]:
        shutil.rmtree(tmp_path / "workspace", ignore_errors=True)
        code, text = attempt(data, *words, *more)
        assert code == 0, text
        entries = read_report(tmp_path / "workspace" / "experiment_raport.json")
        return next(entry["data"] for entry in entries if "val.loss" in entry.get("data", {}))

    whole = measured(good)
    assert read_safely(trained)["class_names"] == [f"class{number}" for number in range(4)]

    renamed = Path(shutil.copytree(good, tmp_path / "renamed"))
    for split in ("train", "val"):
        (renamed / split / "class0").rename(renamed / split / "dog")
    message = r"DATA: renamed: 1 of its 4 classes are not among the 4 of .*: 'dog' .*'class0'.*--new-head"
    assert_told(attempt(renamed, *words), message)
    assert_told(attempt(renamed, "--epochs", 2, "--resume", trained), message)
    assert measured(renamed, "--ignore-class-names")["val.loss"] != pytest.approx(whole["val.loss"])

    some = Path(shutil.copytree(good, tmp_path / "some"))
    for split in ("train", "val"):
        shutil.rmtree(some / split / "class1")
    code, text = attempt(some, *words)
    assert code == 0, text
    assert "3 of its 4 classes occur in the data" in text
    figures = {}
    for number in (0, 2, 3):
        one = Path(shutil.copytree(some, tmp_path / f"one{number}"))
        for other in {0, 2, 3} - {number}:
            shutil.rmtree(one / "val" / f"class{other}")
        figures[number] = measured(one)["val.loss"]
    assert measured(some)["val.loss"] == pytest.approx(sum(figures.values()) / 3, rel=1e-4)


# ------------------------------------------------------------------ small sets, and jobs in one workspace


def test_a_small_training_set_trains_and_hinders_no_evaluation(
    attempt: Attempt, good: Path, trained: Path, tmp_path: Path
) -> None:
    code, text = attempt(good, "--pretrained-weights", trained, "--evaluate", "--batch-size", 64)
    assert code == 0, text
    assert_told(attempt(good, "--batch-size", 64), r"--batch-size.*64|32 images")
    words = [str(good), "--arch", "resnet20", "--epochs", "1", "--image-size", "32", "--device", "cpu"]
    words += [
        "--workers",
        "1",
        "--data-backend",
        "pytorch",
        "--lr",
        "0.01",
        "--workspace",
        str(tmp_path / "w"),
    ]
    assert main.main(words) == 0
    assert read_safely(tmp_path / "w" / NAME)["steps_per_epoch"] == 2, "batches of 16"


def test_an_evaluation_leaves_the_files_of_a_job_alone_and_measures_its_checkpoint(
    attempt: Attempt, good: Path, trained: Path, tmp_path: Path
) -> None:
    workspace = Path(shutil.copytree(trained.parent, tmp_path / "run"))
    torn = workspace / ".checkpoint.pth.tar.7-ab.tmp"
    torn.touch()
    before = (workspace / "config.yaml").read_bytes()
    lock = WorkspaceLock(workspace)
    try:
        assert_told(
            attempt(good, "--workspace", workspace), r"--workspace .*another job is at work in it \(process"
        )
        code, text = attempt(good, "--workspace", workspace, "--resume", "auto", "--epochs", 2, "--evaluate")
    finally:
        lock.release()
    assert code == 0, text
    assert torn.exists()
    assert (workspace / "config.yaml").read_bytes() == before
    code, other = attempt(good, "--pretrained-weights", trained, "--evaluate")
    loss = r"val\.loss (\d+\.\d+)"
    found = [re.search(loss, said.replace("\n", " ")) for said in (text, other)]
    assert all(found)
    assert found[0][1] == found[1][1]  # type: ignore[index]
