"""The jobs `verify` and `prepare`, as functions and as commands."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from image_classification.__main__ import main
from image_classification.data import workers
from image_classification.data.prepare import PrepareConfig, jpeg_names, prepare
from image_classification.data.verify import verify


def damage(root: Path) -> dict[str, bytes]:
    """Add broken files; their names and contents."""
    whole = (root / "train" / "ant" / "3.JPEG").read_bytes()
    broken = {
        "train/ant/cut.jpg": whole[: len(whole) // 2],
        "train/bee/empty.jpg": b"",
        "train/bee/text.png": b"not an image",
        "val/cat/header.jpg": whole[:20],
    }
    for path, content in broken.items():
        (root / path).write_bytes(content)
    return broken


def test_verify_names_what_is_broken(class_folders: Path, write_image) -> None:
    assert verify(class_folders, num_workers=0, progress=False).exit_code == 0
    broken = damage(class_folders)
    (class_folders / "train" / "cat" / "gone.jpg").symlink_to(class_folders / "nowhere")
    write_image(class_folders / "val" / "cat" / "grey.png", mode="L")
    report = verify(class_folders, num_workers=0, progress=False)
    reasons = {entry.path: entry.reason for entry in report.broken}
    assert reasons.keys() == broken.keys() | {"train/cat/gone.jpg"}
    assert report.num_images == 12 + 5 + 1
    assert report.kinds == {"JPEG RGB": 12, "PNG L": 1}
    assert "truncated" in reasons["train/ant/cut.jpg"].lower()
    assert reasons["train/bee/empty.jpg"] == "empty file"
    assert reasons["train/bee/text.png"] == "no image of a known format"
    assert "dangling" in reasons["train/cat/gone.jpg"]
    assert report.exit_code == 1


def test_gigantic_image_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("1", (2000, 2000)).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    report = verify(tmp_path, num_workers=0, progress=False)
    assert "4000000 pixels" in report.broken[0].reason


def test_verify_command(class_folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(class_folders), "--workers", "0", "--quiet"]) == 0
    assert "12 images, 0 broken (12 JPEG RGB)" in capsys.readouterr().out
    damage(class_folders)
    report = tmp_path / "reports" / "r.json"
    assert main(["verify", str(class_folders), "--workers", "0", "--quiet", "--json", str(report)]) == 1
    printed = capsys.readouterr().out
    assert "16 images, 4 broken" in printed
    assert "train/bee/empty.jpg: empty file" in printed
    saved = json.loads(report.read_text())
    assert saved["num_images"] == 16
    assert {"path": "train/bee/empty.jpg", "reason": "empty file"} in saved["broken"]


@pytest.mark.multiprocess
def test_processes_find_the_same(tmp_path: Path, write_image) -> None:
    for number in range(40):
        write_image(tmp_path / "set" / f"{number:02d}.jpg", seed=number, width=300 + number, height=20)
    (tmp_path / "set" / "07.jpg").write_bytes(b"x")
    assert verify(tmp_path / "set", num_workers=2, progress=False) == verify(
        tmp_path / "set", num_workers=0, progress=False
    )
    config = PrepareConfig(short_side=10)
    for name, count in (("two", 2), ("none", 0)):
        report = prepare(tmp_path / "set", tmp_path / name, config, num_workers=count, progress=False)
        assert report.num_resized == 39
    for path in (tmp_path / "two").glob("*.jpg"):
        assert path.read_bytes() == (tmp_path / "none" / path.name).read_bytes()


def test_prepare_resizes_converts_and_copies(tmp_path: Path, write_image) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    write_image(source / "train/a/large.JPEG", width=200, height=101)
    write_image(source / "train/a/tall.png", width=60, height=90)
    write_image(source / "train/a/small.jpg", width=30, height=80)
    write_image(source / "train/b/small_grey.jpg", width=30, height=20, mode="L")
    write_image(source / "val/b/large_cmyk.jpg", width=300, height=60, mode="CMYK")
    write_image(source / "val/b/exact.webp", width=90, height=50)
    report = prepare(source, target, PrepareConfig(short_side=50), num_workers=0, progress=False)
    assert (report.num_resized, report.num_converted, report.num_copied, report.num_kept) == (3, 1, 2, 0)
    sizes = {}
    for path in target.rglob("*.*"):
        if path.suffix != ".json":
            with Image.open(path) as image:
                sizes[path.relative_to(target).as_posix()] = (image.size, image.mode, image.format)
    assert sizes == {
        "train/a/large.JPEG": ((99, 50), "RGB", "JPEG"),
        "train/a/tall.jpg": ((50, 75), "RGB", "JPEG"),
        "train/a/small.jpg": ((30, 80), "RGB", "JPEG"),
        "train/b/small_grey.jpg": ((30, 20), "RGB", "JPEG"),
        "val/b/large_cmyk.jpg": ((250, 50), "RGB", "JPEG"),
        "val/b/exact.webp": ((90, 50), "RGB", "WEBP"),
    }
    assert (target / "train/a/small.jpg").read_bytes() == (source / "train/a/small.jpg").read_bytes()


def test_prepare_is_antialiased(tmp_path: Path) -> None:
    stripes = np.zeros((200, 200, 3), np.uint8)
    stripes[:, ::2] = 255
    (tmp_path / "in").mkdir()
    Image.fromarray(stripes).save(tmp_path / "in" / "a.png")
    prepare(tmp_path / "in", tmp_path / "out", PrepareConfig(short_side=50), num_workers=0, progress=False)
    pixels = np.asarray(Image.open(tmp_path / "out" / "a.jpg")).astype(int)
    assert np.abs(pixels - 127).max() < 12


def test_prepare_keeps_stored_orientation_and_16_bit_values(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (80, 40)).save(tmp_path / "in" / "turned.jpg", exif=exif)
    Image.fromarray(np.full((40, 40), 200 * 256, np.uint16)).save(tmp_path / "in" / "deep.png")
    prepare(tmp_path / "in", tmp_path / "out", PrepareConfig(short_side=20), num_workers=0, progress=False)
    with Image.open(tmp_path / "out" / "turned.jpg") as turned:
        assert turned.size == (40, 20)
        assert 0x0112 not in turned.getexif()
    deep = np.asarray(Image.open(tmp_path / "out" / "deep.jpg")).astype(int)
    assert np.abs(deep - 200).max() <= 2


def test_prepare_turns_upright_and_takes_any_format(tmp_path: Path) -> None:
    """A red left half is on top once it is turned by 90° clockwise; small images and GIFs become JPEGs as well."""
    (tmp_path / "in").mkdir()
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :16, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "in" / "turned.jpg", exif=exif, quality=95)
    Image.fromarray(pixels).save(tmp_path / "in" / "b.gif")
    config = PrepareConfig(short_side=20, upright=True)
    report = prepare(tmp_path / "in", tmp_path / "out", config, num_workers=0, progress=False)
    assert (report.num_converted, report.broken) == (2, ())
    turned = np.asarray(Image.open(tmp_path / "out" / "turned.jpg")).astype(int)
    assert turned.shape == (32, 16, 3)
    assert turned[:12, :, 0].min() > 200
    assert turned[20:, :, 0].max() < 50
    assert np.asarray(Image.open(tmp_path / "out" / "b.jpg")).shape == (16, 32, 3)


def test_prepare_goes_on_where_it_stopped(class_folders: Path, tmp_path: Path) -> None:
    target, config = tmp_path / "out", PrepareConfig(short_side=10)
    first = prepare(class_folders, target, config, num_workers=0, progress=False)
    assert first.num_resized == 12
    (target / "train/bee/1.JPEG").unlink()
    marker = target / "train/ant/0.JPEG"
    before = marker.stat().st_mtime_ns
    second = prepare(class_folders, target, config, num_workers=0, progress=False)
    assert (second.num_resized, second.num_kept) == (1, 11)
    assert marker.stat().st_mtime_ns == before
    assert len(list(target.rglob("*.JPEG"))) == 12
    assert not list(target.rglob(".*"))
    with pytest.raises(ValueError, match=r"'short_side': 10.*'short_side': 11"):
        prepare(class_folders, target, PrepareConfig(short_side=11), num_workers=0, progress=False)


def test_prepare_reports_broken_sources_and_goes_on(class_folders: Path, tmp_path: Path) -> None:
    broken = damage(class_folders)
    # half an image that would only have been copied must not be copied either
    report = prepare(
        class_folders, tmp_path / "out", PrepareConfig(short_side=500), num_workers=0, progress=False
    )
    assert {entry.path for entry in report.broken} == broken.keys()
    assert report.num_copied == 12
    assert report.exit_code == 1
    assert not (tmp_path / "out/train/ant/cut.jpg").exists()


def test_prepare_command(class_folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--short-side", "16", "--workers", "0", "--quiet"]
    arguments = ["prepare", str(class_folders), str(tmp_path / "out"), *options]
    assert main(arguments) == 0
    assert "12 resized" in capsys.readouterr().out
    assert main([*arguments, "--quality", "50"]) == 2
    assert "error: " in capsys.readouterr().err


def test_names_of_jpeg_copies() -> None:
    paths = ["a/x.png", "a/x.jpg", "a/y.PNG", "b/x.webp", "c/z.bmp", "c/Z.png", "c/k.JPEG"]
    names = jpeg_names(paths)
    assert names == ["a/x.png.jpg", "a/x.jpg", "a/y.jpg", "b/x.jpg", "c/z.bmp.jpg", "c/Z.png.jpg", "c/k.JPEG"]


def test_refusals(class_folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=rf"{class_folders} .*{class_folders}/out"):
        prepare(class_folders, class_folders / "out", num_workers=0)
    with pytest.raises(ValueError, match="short_side=0"):
        PrepareConfig(short_side=0)
    with pytest.raises(ValueError, match="quality=101"):
        PrepareConfig(quality=101)
    with pytest.raises(ValueError, match="workers=-1"):
        verify(class_folders, num_workers=-1)
    (class_folders / "Annotations").mkdir()
    with pytest.raises(ValueError, match="Annotations"):
        prepare(class_folders, tmp_path / "out", num_workers=0)
    (tmp_path / "nothing").mkdir()
    assert main(["verify", str(tmp_path / "nothing")]) == 2
    assert "no images in" in capsys.readouterr().err
    assert main(["verify", str(tmp_path / "absent")]) == 2
    assert "there is no directory" in capsys.readouterr().err


def test_no_more_processes_are_started_than_have_something_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--workers 3000` would take the machine's memory."""
    asked: list[int] = []

    def pool(num_processes: int, mp_context: object) -> ThreadPoolExecutor:
        asked.append(num_processes)
        return ThreadPoolExecutor(num_processes)

    monkeypatch.setattr(workers, "ProcessPoolExecutor", pool)
    assert list(workers.map_in_processes(str, range(50), 3000)) == list(map(str, range(50)))
    assert asked == [4]
