"""Headers, listings, manifests and their cache."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from image_classification.data import scan
from image_classification.data.calibration import split_calibration
from image_classification.data.dataset import IMAGENET_PRESET, Dataset
from image_classification.data.decode import UnreadableError, open_image
from image_classification.data.imagefile import read_header
from image_classification.data.layouts import open_dataset
from image_classification.data.listing import list_images
from image_classification.data.manifest import Manifest
from image_classification.data.paths import Paths
from image_classification.data.prepare import prepare
from image_classification.data.scan import scan_folders, scan_list
from image_classification.data.split import split
from image_classification.data.targets import TargetTable
from image_classification.data.verify import verify


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("plain.JPEG", {}),
        ("progressive.jpg", {"progressive": True}),
        ("grey.jpg", {"mode": "L"}),
        ("cmyk.jpg", {"mode": "CMYK"}),
        ("long_comment.jpg", {"comment": b"x" * 60_000}),
        ("a.png", {}),
        ("a.webp", {}),
        ("a.BMP", {}),
    ],
)
def test_header_agrees_with_pillow(tmp_path: Path, write_image, name: str, options: dict) -> None:
    path = write_image(tmp_path / name, width=53, height=31, **options)
    header = read_header(path)
    assert (header.height, header.width) == (31, 53)
    assert header.digest != 0


@pytest.mark.parametrize("suffix", ["jpg", "tif", "webp"])
@pytest.mark.parametrize("orientation", [None, 1, 2, 6])
def test_exif_orientation_is_seen_and_not_applied(
    tmp_path: Path, suffix: str, orientation: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    exif = Image.Exif()
    exif[0x010E] = "a description before it"
    if orientation is not None:
        exif[0x0112] = orientation
    path = tmp_path / "c" / f"a.{suffix}"
    path.parent.mkdir()
    Image.new("RGB", (30, 20)).save(path, exif=exif)
    header = read_header(path)
    assert header[:2] == (20, 30)
    assert header.turned == (orientation not in (None, 1))
    assert open_image(path).size == (30, 20)
    with caplog.at_level("WARNING"):
        scan_folders(tmp_path, ["c"], cache_dir=tmp_path / "cache", label="train")
    assert ("--upright" in caplog.text) == header.turned


def test_what_is_no_image_for_every_backend_is_told(
    tmp_path: Path, write_image, caplog: pytest.LogCaptureFixture
) -> None:
    """GIFs by name are counted, GIFs by content and floating-point pixels unreadable, pipes do not hang the scan."""
    folder = tmp_path / "c"
    for name in ("a.jfif", "b.jpg"):
        write_image(folder / name, format="JPEG")
    for name in ("c.gif", "d.GIF", "hidden_gif.jpg"):
        write_image(folder / name, mode="L", format="GIF")
    Image.fromarray(np.linspace(0, 300, 600, dtype=np.float32).reshape(20, 30)).save(folder / "float.tif")
    os.mkfifo(folder / "pipe.jpg")
    for _ in ("looked at", "known"):
        caplog.clear()
        with caplog.at_level("WARNING"):
            paths, headers, _ = scan_folders(tmp_path, ["c"], cache_dir=tmp_path / "cache", label="train")
        assert "2 .gif left out" in caplog.text
    intact = {Path(path).name: bool(whole) for path, whole in zip(paths, headers.intact, strict=True)}
    assert intact == {
        "a.jfif": True,
        "b.jpg": True,
        "float.tif": False,
        "hidden_gif.jpg": False,
        "pipe.jpg": False,
    }
    broken = {
        Path(entry.path).name: entry.reason
        for entry in verify(tmp_path, num_workers=0, progress=False).broken
    }
    assert broken.keys() == {"c.gif", "d.GIF", "hidden_gif.jpg", "float.tif", "pipe.jpg"}
    for name in ("hidden_gif.jpg", "float.tif", "pipe.jpg"):
        with pytest.raises(UnreadableError):
            open_image(folder / name)
    assert "prepare writes a copy" in broken["c.gif"]
    assert "16 bits" in broken["float.tif"]
    prepared = prepare(tmp_path / "c", tmp_path / "copy", num_workers=0, progress=False)
    assert {entry.path for entry in prepared.broken} == {"float.tif", "pipe.jpg"}
    with pytest.raises(ValueError, match=r"pipe\.jpg is no regular file"):
        split(tmp_path, tmp_path.with_name("parts"))


def test_content_decides_the_format(tmp_path: Path, write_image) -> None:
    write_image(tmp_path / "a.png", width=9, height=7).rename(tmp_path / "a.JPEG")
    assert read_header(tmp_path / "a.JPEG")[:2] == (7, 9)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"text",
        b"\xff\xd8\xff",
        b"\xff\xd8" + b"\xff" * 20_000,
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff\xe0\0\x10",
    ],
)
def test_unreadable_headers_have_no_size(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.jpg").write_bytes(content)
    assert read_header(tmp_path / "bad.jpg")[:2] == (0, 0)
    assert read_header(tmp_path / "absent.jpg") == (0, 0, 0, False, False)


def test_every_truncation_of_a_header_is_survived(tmp_path: Path, write_image) -> None:
    whole = write_image(tmp_path / "a.jpg", width=21, height=13).read_bytes()
    for length in range(0, 800, 7):
        (tmp_path / "cut.jpg").write_bytes(whole[:length])
        assert read_header(tmp_path / "cut.jpg")[:2] in ((0, 0), (13, 21))


def test_listing(tmp_path: Path, write_image) -> None:
    for name in ("b/2.JPG", "b/1.png", "b/deep/3.webp", "b/._1.png", "b/notes.txt", "b/.hidden/4.jpg"):
        write_image(tmp_path / name, format="PNG")
    (tmp_path / "b" / "loop").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "linked.jpg").symlink_to(tmp_path / "b" / "2.JPG")
    (tmp_path / "b" / "dangling.jpg").symlink_to(tmp_path / "nowhere.jpg")
    paths = [entry.path for entry in list_images(tmp_path, "b")]
    assert paths == ["b/1.png", "b/2.JPG", "b/dangling.jpg", "b/deep/3.webp", "b/linked.jpg"]


@pytest.fixture
def opened_files(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose headers are read."""
    names: list[str] = []
    read = scan.read_header
    monkeypatch.setattr(scan, "read_header", lambda path: names.append(Path(path).name) or read(path))
    return names


def grown_old(root: Path) -> None:
    """Give all directories a time long ago: what was changed just now is looked at again."""
    for directory, _, _ in os.walk(root):
        os.utime(directory, (1e9, 1e9))


class TestScan:
    def scan(self, root: Path, **options: Any) -> list[tuple[str, int]]:
        folders = [f"train/{path.name}" for path in sorted((root / "train").iterdir())]
        cache = root.parent / "cache"
        paths, headers, counts = scan_folders(root, folders, cache_dir=cache, label="train", **options)
        assert sum(counts) == len(paths)
        return list(zip(paths, headers.widths.tolist(), strict=True))

    def test_directories_say_what_has_changed(
        self, class_folders, opened_files, write_image, monkeypatch
    ) -> None:
        grown_old(class_folders)
        first = self.scan(class_folders)
        assert len(opened_files) == len(first) == 9
        opened_files.clear()
        listed: list[str] = []
        walk = scan.list_images
        monkeypatch.setattr(
            scan,
            "list_images",
            lambda root, folder, *more: listed.append(folder) or walk(root, folder, *more),
        )
        assert self.scan(class_folders) == first
        assert (opened_files, listed) == ([], [])
        write_image(class_folders / "train" / "bee" / "new.JPEG", width=77)
        (class_folders / "train" / "bee" / "1.JPEG").unlink()
        second = self.scan(class_folders)
        assert dict(second)["train/bee/new.JPEG"] == 77
        assert "train/bee/1.JPEG" not in dict(second)
        assert (opened_files, listed) == (["new.JPEG"], ["train/bee"])
        assert [row for row in second if "bee" not in row[0]] == [row for row in first if "bee" not in row[0]]

    def test_what_is_overwritten_in_place_is_found_by_rescan(
        self, class_folders, opened_files, write_image
    ) -> None:
        grown_old(class_folders)
        self.scan(class_folders)
        write_image(class_folders / "train" / "ant" / "2.JPEG", width=99)
        assert dict(self.scan(class_folders))["train/ant/2.JPEG"] != 99
        opened_files.clear()
        assert dict(self.scan(class_folders, rescan=True))["train/ant/2.JPEG"] == 99
        assert opened_files == ["2.JPEG"]
        write_image(
            class_folders / "train" / "ant" / "0.JPEG", width=98
        )  # a folder's first file is always looked at
        assert dict(self.scan(class_folders))["train/ant/0.JPEG"] == 98

    def test_unreadable_files_are_tried_again(self, class_folders, write_image) -> None:
        broken = class_folders / "train" / "ant" / "1.JPEG"
        broken.write_bytes(b"broken")
        grown_old(class_folders)
        assert dict(self.scan(class_folders))["train/ant/1.JPEG"] == 0
        write_image(broken, width=55)
        assert dict(self.scan(class_folders))["train/ant/1.JPEG"] == 55

    def test_folders_that_come_and_go(self, class_folders, write_image) -> None:
        grown_old(class_folders)
        self.scan(class_folders)
        write_image(class_folders / "train" / "aaa" / "0.JPEG", width=44)
        shutil.rmtree(class_folders / "train" / "ant")
        rows = self.scan(class_folders)
        assert rows[0] == ("train/aaa/0.JPEG", 44)
        assert rows == self.scan(class_folders)
        shutil.rmtree(class_folders.parent / "cache")
        assert rows == self.scan(class_folders)

    def test_a_killed_scan_goes_on_where_it_was(self, class_folders, opened_files, monkeypatch) -> None:
        monkeypatch.setattr(scan, "CHUNK", 2)
        monkeypatch.setattr(scan, "SECONDS_BETWEEN_PARTS", 0.0)
        monkeypatch.setattr(scan, "NUM_THREADS", 1)
        read = scan.read_header

        def dies(path: str) -> Any:
            if len(opened_files) == 6:
                raise KeyboardInterrupt
            return read(path)

        monkeypatch.setattr(scan, "read_header", dies)
        with pytest.raises(KeyboardInterrupt):
            self.scan(class_folders)
        monkeypatch.setattr(scan, "read_header", read)
        opened_files.clear()
        rows = self.scan(class_folders)
        assert 3 <= len(opened_files) <= 5
        assert all(width > 0 for _, width in rows)

    def test_a_damaged_record_is_made_again(self, class_folders, opened_files) -> None:
        grown_old(class_folders)
        first = self.scan(class_folders)
        (cached,) = (class_folders.parent / "cache" / "scans").glob("*.npz")
        cached.write_bytes(cached.read_bytes()[:100])
        opened_files.clear()
        assert self.scan(class_folders) == first
        assert len(opened_files) == 9

    def test_a_record_of_another_user_is_read_and_left(self, class_folders, write_image, monkeypatch) -> None:
        """In a folder of mode 1777, its owner alone may replace a file."""
        first = self.scan(class_folders)
        (cached,) = (class_folders.parent / "cache" / "scans").glob("*.npz")
        before = cached.read_bytes()

        def refuse(source: object, target: object) -> None:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(source), None, str(target))

        monkeypatch.setattr(os, "replace", refuse)
        write_image(class_folders / "train" / "ant" / "new.jpg")
        assert len(self.scan(class_folders)) == len(first) + 1
        assert cached.read_bytes() == before
        cached.unlink()
        with pytest.raises(ValueError, match="LUCIDPRUNE_CACHE"):
            self.scan(class_folders)

    def test_lists(self, class_folders, opened_files, write_image) -> None:
        paths = ["train/bee/1.JPEG", "train/ant/0.JPEG", "train/ant/1.JPEG"]
        grown_old(class_folders)

        def read(names: list[str], **options: bool) -> list[int]:
            cache = class_folders.parent / "cache"
            return scan_list(
                class_folders, names, listed_in="it", cache_dir=cache, label="x", **options
            ).widths.tolist()

        first = read(paths)
        assert len(opened_files) == 3
        assert read(paths) == first
        assert read(paths[::-1]) == first[::-1]
        assert read(paths) == first
        assert len(opened_files) == 3
        write_image(class_folders / "train" / "ant" / "1.JPEG", width=66)
        assert read(paths) == first
        assert read(paths, rescan=True)[2] == 66
        with pytest.raises(FileNotFoundError, match=r"none\.JPEG"):
            read([*paths, "train/none.JPEG"])


def test_paths_are_a_sequence() -> None:
    names = ["a.jpg", "b/ü.jpg", "", "c" * 300, "\udcff.png"]
    packed = Paths.of(names)
    assert list(packed) == names
    assert packed == names
    assert packed != names[:-1]
    assert [packed[0], packed[-1], packed[1:3]] == [names[0], names[-1], tuple(names[1:3])]
    assert "b/ü.jpg" in packed
    assert packed.subset(np.array([3, 0, 3])) == [names[3], names[0], names[3]]
    assert packed.subset(np.array([], np.int64)) == []
    assert packed.rows(1, 4) == names[1:4]
    assert Paths.concatenated([packed.rows(2, 5), Paths.of(()), packed.rows(0, 2)]) == names[2:] + names[:2]
    assert Paths.from_arrays(packed.to_arrays("x"), "x") == names
    with pytest.raises(IndexError):
        packed[5]


def test_unreadable_files_stay_and_are_listed(class_folders: Path, caplog: pytest.LogCaptureFixture) -> None:
    (class_folders / "train" / "bee" / "1.JPEG").write_bytes(b"broken")
    dataset = open_dataset(str(class_folders), progress=False)
    assert len(dataset.train) == 9
    assert dataset.train.heights[5] == dataset.train.widths[5] == 0
    assert "train/bee/1.JPEG" in caplog.text
    assert dataset.val.heights.min() > 0


def sample_manifest(root: Path) -> Manifest:
    targets = TargetTable(
        labels=np.array([0, 1, 1]),
        boxes=tuple(np.full((n, 4), n, np.float32) for n in (1, 0, 2)),
        box_classes=tuple(np.full(n, n, np.int64) for n in (1, 0, 2)),
        mask_paths=("m/a.png", "", "m/ü.png"),
    )
    sizes = np.array([5, 6, 7], np.int32)
    digests = np.array([1, 2, 2**64 - 1], np.uint64)
    return Manifest(
        root, "train", ("a.jpg", "b/ü.jpg", "c.jpg"), sizes, sizes + 1, digests, targets, ("x", "y")
    )


def test_save_and_load(tmp_path: Path) -> None:
    manifest = sample_manifest(tmp_path)
    manifest.save(tmp_path / "m.npz")
    again = Manifest.load(tmp_path / "m.npz")
    assert again.fingerprint == manifest.fingerprint
    assert (again.root, again.split, again.paths) == (tmp_path, "train", manifest.paths)
    assert again.digests.dtype == np.uint64
    assert (again.digests == manifest.digests).all()
    assert again.class_names == ("x", "y")
    assert Manifest.load(tmp_path / "m.npz", tmp_path / "moved").path(1) == tmp_path / "moved" / "b" / "ü.jpg"
    assert list(tmp_path.iterdir()) == [tmp_path / "m.npz"]


def test_fingerprint_sees_every_column(tmp_path: Path) -> None:
    manifest = sample_manifest(tmp_path)
    prints = {manifest.fingerprint}
    for change in (
        {"paths": ("a.jpg", "b.jpg", "c.jpg")},
        {"widths": manifest.widths + 1},
        {"heights": manifest.heights + 1},
        {"digests": manifest.digests[::-1].copy()},
        {"class_names": ("x", "z")},
        {"targets": dataclasses.replace(manifest.targets, labels=np.array([0, 1, 0]))},
        {"targets": dataclasses.replace(manifest.targets, mask_paths=("", "", ""))},
        {"targets": dataclasses.replace(manifest.targets, boxes=None, box_classes=None)},
    ):
        prints.add(dataclasses.replace(manifest, **change).fingerprint)
    assert len(prints) == 9
    assert dataclasses.replace(manifest, root=tmp_path / "elsewhere").fingerprint == manifest.fingerprint


def test_columns_must_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lengths"):
        dataclasses.replace(sample_manifest(tmp_path), heights=np.zeros(2, np.int32))


def labelled(labels: np.ndarray, multi_label: bool = False) -> Dataset:
    count = len(labels)
    num_classes = int(labels.max()) + 1 if labels.ndim == 1 else labels.shape[1]
    names = tuple(f"c{number}" for number in range(num_classes))
    sizes = np.full(count, 8, np.int32)
    manifest = Manifest(
        Path("/nowhere"),
        "train",
        tuple(f"{number}.jpg" for number in range(count)),
        sizes,
        sizes,
        np.arange(count, dtype=np.uint64),
        TargetTable(labels, multi_label=multi_label),
        names,
    )
    return Dataset("made", manifest, manifest.subset([0], "val"), names, multi_label, IMAGENET_PRESET)


def test_calibration_is_stratified_and_disjoint() -> None:
    dataset = labelled(np.repeat([0, 1, 2], [60, 30, 10]))
    reduced, calibration = split_calibration(dataset, 20, seed=5)
    assert calibration.split == "calibration"
    assert np.bincount(calibration.targets.labels).tolist() == [12, 6, 2]
    assert set(reduced.train.paths) | set(calibration.paths) == set(dataset.train.paths)
    assert len(reduced.train) + len(calibration) == 100
    assert list(reduced.train.digests) == sorted(reduced.train.digests)
    assert len(dataset.train) == 100
    assert len(set(calibration.targets.labels[:8].tolist())) > 1  # its batches mix the classes


def test_calibration_depends_on_the_seed_only() -> None:
    dataset = labelled(np.repeat([0, 1, 2], [60, 30, 10]))
    again = split_calibration(dataset, 20, seed=5)[1].paths
    assert split_calibration(dataset, 20, seed=5)[1].paths == again
    assert split_calibration(dataset, 20, seed=6)[1].paths != again


def test_calibration_quotas_sum_up() -> None:
    dataset = labelled(np.repeat(np.arange(7), [3, 5, 9, 11, 2, 30, 41]))
    for size in (1, 2, 13, 37, 50):
        assert len(split_calibration(dataset, size, seed=0)[1]) == size


def test_calibration_of_multi_label_sets_has_rare_classes() -> None:
    labels = np.zeros((200, 3), np.float32)
    labels[:, 0] = 1
    labels[::2, 1] = 1
    labels[:20, 2] = 1
    _, calibration = split_calibration(labelled(labels, multi_label=True), 50, seed=0)
    assert calibration.targets.labels[:, 2].sum() == 5


@pytest.mark.parametrize("size", [-1, 0, 51, 1000])
def test_calibration_size_must_be_sensible(size: int) -> None:
    with pytest.raises(ValueError, match=f"calibration_size={size}"):
        split_calibration(labelled(np.repeat([0, 1], 50)), size, seed=0)
