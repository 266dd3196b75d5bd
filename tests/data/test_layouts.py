"""Layouts on disk: class folders, the published CIFAR files, Pascal VOC, archives, and what is wrong with others."""

from __future__ import annotations

import io
import pickle
import re
import shutil
import struct
import tarfile
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.voc import annotation_xml

from image_classification.cache import build_directory
from image_classification.config import SettingError
from image_classification.data.dataset import CIFAR10_PRESET, CIFAR100_PRESET, Dataset
from image_classification.data.layouts import OpenOptions, open_dataset, register_layout
from image_classification.data.layouts.annotations import read_annotation, read_imagenet_boxes
from image_classification.data.layouts.voc import CLASS_NAMES, open_voc

# ------------------------------------------------------------------ class folders


def test_class_folders(class_folders: Path) -> None:
    dataset = open_dataset(str(class_folders), progress=False)
    assert dataset.name == "insects"
    assert dataset.class_names == ("ant", "bee", "cat")
    assert dataset.num_classes == 3
    assert not dataset.multi_label
    assert dataset.preset.image_size == 24
    assert dataset.train.paths[:2] == ("train/ant/0.JPEG", "train/ant/1.JPEG")
    assert dataset.train.targets.labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2]
    assert dataset.train.widths.tolist() == [20, 21, 22, 23, 20, 21, 22, 20, 21]
    assert (dataset.train.heights == 30).all()
    assert dataset.val.split == "val"
    assert dataset.val.targets.labels.tolist() == [0, 1, 2]


def test_same_classes_and_order_as_torchvision(class_folders: Path) -> None:
    from torchvision.datasets import ImageFolder

    for name in ("Zebra", "n01", "ant2"):
        for split in ("train", "val"):
            shutil.copytree(class_folders / split / "ant", class_folders / split / name)
    reference = ImageFolder(str(class_folders / "train"))
    dataset = open_dataset(str(class_folders), progress=False)
    assert list(dataset.class_names) == reference.classes
    ours = {(str(dataset.train.path(i)), int(label)) for i, label in enumerate(dataset.train.targets.labels)}
    assert ours == {(path, label) for path, label in reference.samples}


def test_multi_label_form_of_class_indices(class_folders: Path) -> None:
    dataset = open_dataset(str(class_folders), multi_label=True, progress=False)
    assert dataset.multi_label
    assert dataset.val.targets.labels.tolist() == np.eye(3).tolist()


@pytest.mark.parametrize("folder", ["validation", "valid", "test"])
def test_other_names_of_validation(class_folders: Path, folder: str) -> None:
    (class_folders / "val").rename(class_folders / folder)
    assert open_dataset(str(class_folders), progress=False).val.paths[0] == f"{folder}/ant/0.JPEG"


def test_images_of_32_pixels_are_cifar(tmp_path: Path, write_image) -> None:
    for count, preset in ((10, CIFAR10_PRESET), (12, CIFAR100_PRESET)):
        for split in ("train", "test"):
            for number in range(count):
                write_image(tmp_path / str(count) / split / f"c{number:02d}" / "1.png", width=32, height=32)
        assert open_dataset(str(tmp_path / str(count)), progress=False).preset == preset


def test_small_images_keep_their_size(tmp_path: Path, write_image) -> None:
    """The size is a multiple of 4; one large image among many changes nothing, many do."""
    for name, sizes, expected in (
        ("digits", [(28, 28)] * 20, 28),
        ("odd", [(41, 37)] * 20, 40),
        ("tiny", [(9, 8)] * 20, 16),
        ("one large", [(48, 48)] * 39 + [(300, 300)], 48),
        ("large", [(48, 48)] * 10 + [(300, 300)] * 10, 224),
    ):
        for number, (width, height) in enumerate(sizes):
            write_image(
                tmp_path / name / "train" / f"c{number % 2}" / f"{number}.png", width=width, height=height
            )
        for label in range(2):
            write_image(tmp_path / name / "val" / f"c{label}" / "1.png", width=30, height=30)
        preset = open_dataset(str(tmp_path / name), progress=False).preset
        assert preset.image_size == expected, name
        assert (preset.augmentation == "imagenet") == (expected == 224), name


def test_missing_validation(class_folders: Path) -> None:
    shutil.rmtree(class_folders / "val")
    with pytest.raises(ValueError, match="val/"):
        open_dataset(str(class_folders), progress=False)
    dataset = open_dataset(str(class_folders), progress=False, require_val=False)
    assert len(dataset.val) == 0
    assert len(dataset.train) == 9


def _remove_train(root: Path) -> None:
    shutil.rmtree(root / "train")


def _only_class_folders(root: Path) -> None:
    shutil.rmtree(root / "val")
    for path in list((root / "train").iterdir()):
        path.rename(root / path.name)
    (root / "train").rmdir()


def _flat(root: Path) -> None:
    _remove_train(root)
    shutil.rmtree(root / "val")
    for name in "ab":
        Image.new("RGB", (4, 4)).save(root / f"{name}.jpg")


def _flat_val(root: Path) -> None:
    for path in list((root / "val").iterdir()):
        (path / "0.JPEG").rename(root / "val" / f"{path.name}.JPEG")
        path.rmdir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_remove_train, "no train/"),
        (_only_class_folders, "ant/ "),
        (_flat, "2 images"),
        (_flat_val, r"val\b.* 3 images"),
        (lambda root: (root / "train" / "empty").mkdir(), "train .*: empty"),
        (lambda root: (root / "val" / "bee").rename(root / "val" / "fly"), "train/: bee.*val/: fly"),
        (lambda root: [shutil.rmtree(path) for path in (root / "train").iterdir()], r"^\S+/train "),
    ],
)
def test_incomplete_folders_are_named(class_folders: Path, damage: Callable, message: str) -> None:
    damage(class_folders)
    with pytest.raises(ValueError, match=message) as caught:
        open_dataset(str(class_folders), progress=False)
    assert str(class_folders) in str(caught.value)


def test_validation_may_lack_classes_and_keeps_the_numbers_of_the_others(class_folders: Path) -> None:
    shutil.rmtree(class_folders / "val" / "bee")
    dataset = open_dataset(str(class_folders), progress=False)
    assert dataset.val.class_names == dataset.train.class_names == ("ant", "bee", "cat")
    for path, label in zip(dataset.val.paths, dataset.val.targets.labels, strict=True):
        assert path.split("/")[1] == dataset.class_names[label] != "bee"


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="'/no/such/place'"):
        open_dataset("/no/such/place")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        open_dataset(str(tmp_path))


def test_cache_that_cannot_be_written(class_folders: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="LUCIDPRUNE_CACHE"):
        open_dataset(str(class_folders), cache_dir=tmp_path / "file" / "cache")


# ------------------------------------------------------------------ archives


def test_archives_of_class_folders(class_folders: Path, tmp_path: Path) -> None:
    plain = open_dataset(str(class_folders), progress=False)
    for suffix, mode in ((".tar", "w"), (".tar.gz", "w:gz"), (".tar.xz", "w:xz")):
        archive = tmp_path / f"set{suffix}"
        with tarfile.open(archive, mode) as members:
            members.add(class_folders, "above")
        opened = open_dataset(str(archive), progress=False)
        assert opened.name == "set"
        assert opened.train.fingerprint == plain.train.fingerprint
        archive_again = open_dataset(str(archive), progress=False)
        assert archive_again.train.root == opened.train.root
    zipped = Path(shutil.make_archive(str(tmp_path / "zipped"), "zip", class_folders))
    assert open_dataset(str(zipped), progress=False).val.fingerprint == plain.val.fingerprint


def _tar_with(path: Path, info: tarfile.TarInfo, content: bytes = b"") -> Path:
    info.size = len(content)
    with tarfile.open(path, "w") as members:
        members.addfile(info, io.BytesIO(content))
    return path


def test_hostile_tar_members_are_refused(tmp_path: Path, private_cache: Path) -> None:
    outside = _tar_with(tmp_path / "a.tar", tarfile.TarInfo("../../../evil.txt"), b"x")
    link = tarfile.TarInfo("link")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc"
    linked = _tar_with(tmp_path / "b.tar", link)
    device = tarfile.TarInfo("device")
    device.type = tarfile.CHRTYPE
    special = _tar_with(tmp_path / "c.tar", device)
    for archive, name in ((outside, "../../../evil.txt"), (linked, "link"), (special, "device")):
        with pytest.raises(ValueError, match=re.escape(f"{archive.name} ") + f".*'{re.escape(name)}'"):
            open_dataset(str(archive), progress=False)
    assert not list(private_cache.rglob("evil.txt"))
    assert not [path for path in (private_cache / "archives").iterdir() if path.is_dir()]


def test_hostile_zip_members_are_refused(tmp_path: Path, private_cache: Path) -> None:
    for name in ("../evil.txt", "/evil.txt", "..\\evil.txt", "C:/evil.txt"):
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as members:
            members.writestr(name, "x")
        with pytest.raises(ValueError, match=rf"a\.zip .*{re.escape(repr(name))}"):
            open_dataset(str(tmp_path / "a.zip"), progress=False)
    assert not [path for path in (private_cache / "archives").iterdir() if path.is_dir()]


@pytest.mark.parametrize("name", ["set.tar.xz", "set.tar.bz2", "set.tar"])
def test_damaged_archives(class_folders: Path, tmp_path: Path, private_cache: Path, name: str) -> None:
    form = {"set.tar.xz": "xztar", "set.tar.bz2": "bztar", "set.tar": "tar"}[name]
    whole = Path(shutil.make_archive(str(tmp_path / "set"), form, class_folders)).read_bytes()
    for content in (whole[: len(whole) // 2], b"junk", b""):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            open_dataset(str(tmp_path / name), progress=False)
    assert not [path for path in (private_cache / "archives").iterdir() if path.is_dir()]


def test_file_that_is_not_an_archive(tmp_path: Path) -> None:
    (tmp_path / "image.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="archive"):
        open_dataset(str(tmp_path / "image.jpg"))


def test_directories_are_built_once_by_concurrent_callers(tmp_path: Path) -> None:
    built = []

    def build(directory: Path) -> None:
        built.append(directory)
        (directory / "content").write_text("whole")

    threads = [threading.Thread(target=build_directory, args=(tmp_path / "entry", build)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1
    assert (tmp_path / "entry" / "content").read_text() == "whole"


def test_failed_and_killed_builds_leave_nothing(tmp_path: Path) -> None:
    (tmp_path / "entry.building-old").mkdir()

    def fail(directory: Path) -> None:
        (directory / "half").write_text("x")
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        build_directory(tmp_path / "entry", fail)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


# ------------------------------------------------------------------ CIFAR as published


class Python2Pickler(pickle._Pickler):
    """Writes byte strings as Python 2 wrote its strings, which is how the published files are."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_bytes(self, value: bytes) -> None:
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)

    dispatch[bytes] = save_bytes


def python2_dump(content: object, path: Path) -> None:
    stream = io.BytesIO()
    Python2Pickler(stream, protocol=2).dump(content)
    path.write_bytes(stream.getvalue().replace(b"cnumpy._core.multiarray", b"cnumpy.core.multiarray"))


def cifar_images(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)


def write_cifar10_python(root: Path, dump: Callable = python2_dump, key: Callable = str.encode) -> np.ndarray:
    root.mkdir()
    names = [f"data_batch_{number}" for number in range(1, 6)]
    for seed, name in enumerate([*names, "test_batch"]):
        rows = cifar_images(10, seed)
        labels = list(range(10)) if name == "test_batch" else [(3 * i) % 10 for i in range(10)]
        dump({key("data"): rows, key("labels"): labels, key("batch_label"): key("x")}, root / name)
    dump({key("label_names"): [key(f"kind{number}") for number in range(10)]}, root / "batches.meta")
    return np.concatenate([cifar_images(10, seed) for seed in range(5)])


def write_cifar10_binary(root: Path) -> None:
    root.mkdir()
    for seed, name in enumerate([*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]):
        labels = np.array([(i if seed == 5 else 3 * i) % 10 for i in range(10)], np.uint8)[:, None]
        (root / name).write_bytes(np.concatenate([labels, cifar_images(10, seed)], axis=1).tobytes())
    (root / "batches.meta.txt").write_text("\n".join(f"kind{number}" for number in range(10)) + "\n\n")


def check_cifar10(root: Path, rows: np.ndarray) -> None:
    dataset = open_dataset(str(root), progress=False)
    assert dataset.name == "cifar10"
    assert dataset.preset == CIFAR10_PRESET
    assert dataset.class_names == tuple(f"kind{number}" for number in range(10))
    assert (len(dataset.train), len(dataset.val)) == (50, 10)
    for sample in range(50):
        number = int(dataset.train.path(sample).stem)
        pixels = np.asarray(Image.open(dataset.train.path(sample)))
        assert (pixels == rows[number].reshape(3, 32, 32).transpose(1, 2, 0)).all()
        assert dataset.train.targets.labels[sample] == 3 * number % 10


def test_cifar10_python(tmp_path: Path) -> None:
    rows = write_cifar10_python(tmp_path / "cifar-10-batches-py")
    check_cifar10(tmp_path / "cifar-10-batches-py", rows)
    check_cifar10(tmp_path, rows)  # the directory above it, as the archive has it


def test_cifar10_written_by_python_3(tmp_path: Path) -> None:
    def dump(content: object, path: Path) -> None:
        path.write_bytes(pickle.dumps(content, protocol=2))

    check_cifar10(tmp_path / "a", write_cifar10_python(tmp_path / "a", dump))
    check_cifar10(tmp_path / "b", write_cifar10_python(tmp_path / "b", dump, key=str))


def test_cifar10_binary_and_archive(tmp_path: Path) -> None:
    write_cifar10_binary(tmp_path / "cifar-10-batches-bin")
    rows = np.concatenate([cifar_images(10, seed) for seed in range(5)])
    check_cifar10(tmp_path / "cifar-10-batches-bin", rows)
    with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz") as members:
        members.add(tmp_path / "cifar-10-batches-bin", "cifar-10-batches-bin")
    check_cifar10(tmp_path / "cifar-10-binary.tar.gz", rows)


def test_cifar100_both_versions(tmp_path: Path) -> None:
    python, binary = tmp_path / "cifar-100-python", tmp_path / "cifar-100-binary"
    python.mkdir()
    binary.mkdir()
    names = [f"kind{number:02d}" for number in range(100)]
    for seed, split in enumerate(("train", "test")):
        rows = cifar_images(100, seed)
        labels = np.random.default_rng(seed).permutation(100)
        content = {b"data": rows, b"fine_labels": labels.tolist(), b"coarse_labels": [0] * 100}
        python2_dump(content, python / split)
        record = np.concatenate([np.full((100, 1), 7), labels[:, None], rows], axis=1).astype(np.uint8)
        (binary / f"{split}.bin").write_bytes(record.tobytes())
    python2_dump({b"fine_label_names": [name.encode() for name in names]}, python / "meta")
    (binary / "fine_label_names.txt").write_text("\n".join(names))
    first, second = (open_dataset(str(root), progress=False) for root in (python, binary))
    assert first.name == second.name == "cifar100"
    assert first.class_names == tuple(names)
    assert first.preset == CIFAR100_PRESET
    assert first.train.fingerprint == second.train.fingerprint
    assert first.val.fingerprint == second.val.fingerprint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps([1, 2]), "data_batch_2"),
        (pickle.dumps({"labels": [1]}), "data_batch_2"),
        (
            pickle.dumps({"data": np.zeros((2, 3072), np.float32), "labels": [0, 1]}, 2),
            "data_batch_2",
        ),
        (pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}, 2), "2 labels"),
        (
            pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1]}, 2),
            r"numbers of images .*data_batch_2 2",
        ),
        (
            pickle.dumps({"data": np.zeros((10, 3072), np.uint8), "labels": [0, 11] * 5}, 2),
            r"\b11\b.*\b10 classes",
        ),
    ],
)
def test_damaged_cifar_files(tmp_path: Path, content: bytes, message: str) -> None:
    root = tmp_path / "cifar"
    write_cifar10_python(root)
    (root / "data_batch_2").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_dataset(str(root), progress=False)


def test_truncated_cifar_binary(tmp_path: Path) -> None:
    root = tmp_path / "cifar"
    write_cifar10_binary(root)
    (root / "test_batch.bin").write_bytes((root / "test_batch.bin").read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"test_batch\.bin"):
        open_dataset(str(root), progress=False)


# ------------------------------------------------------------------ Pascal VOC


@pytest.fixture
def devkit(tmp_path: Path, write_image) -> Path:
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for folder in ("ImageSets/Main", "Annotations", "SegmentationClass"):
        (root / folder).mkdir(parents=True)
    objects = {
        "2008_01": [("person", (1, 1, 40, 30), 0), ("dog", (5, 6, 20, 21), 0), ("person", (3, 3, 4, 4), 0)],
        "2008_02": [("aeroplane", (2, 2, 9, 9), 0), ("tvmonitor", (2, 2, 9, 9), 1)],
        "2008_03": [("cat", (2, 2, 9, 9), 1)],
    }
    for number, (name, found) in enumerate(objects.items()):
        write_image(root / "JPEGImages" / f"{name}.jpg", seed=number)
        (root / "Annotations" / f"{name}.xml").write_text(annotation_xml(found))
    (root / "ImageSets" / "Main" / "train.txt").write_text("2008_01\n2008_02\n")
    (root / "ImageSets" / "Main" / "val.txt").write_text("2008_03\n")
    mask = np.zeros((30, 40), np.uint8)
    mask[0:10, 0:20], mask[10] = 15, 255
    Image.fromarray(mask).save(root / "SegmentationClass" / "2008_01.png")
    return root


def test_voc(devkit: Path) -> None:
    for path in (devkit, devkit.parent, devkit.parent.parent):
        dataset = open_dataset(str(path), progress=False)
        assert dataset.name == "voc2012"
    assert dataset.multi_label
    assert dataset.class_names == CLASS_NAMES == tuple(sorted(CLASS_NAMES))
    targets = dataset.train.targets
    assert [np.flatnonzero(row).tolist() for row in targets.labels] == [[11, 14], [0]]
    assert targets.boxes is not None
    assert targets.box_classes is not None
    assert targets.boxes[0].tolist() == [[0, 0, 40, 30], [4, 5, 20, 21], [2, 2, 4, 4]]
    assert targets.box_classes[0].tolist() == [14, 11, 14]
    assert targets.box_classes[1].tolist() == [0]  # the difficult one is left out
    assert targets.mask_paths == ("SegmentationClass/2008_01.png", "")
    assert dataset.val.targets.labels.sum() == 0
    whole = np.array([[0.0, 0.0, 30.0, 40.0]])
    mask = targets.masks_in(dataset.train.root, [0], whole, np.array([False]), (30, 40))[0]
    assert mask[5, 5] == CLASS_NAMES.index("person") + 1
    assert mask[10, 30] == 255
    assert mask[20, 30] == 0


def test_voc_difficult_objects_and_listed_masks(devkit: Path) -> None:
    assert open_dataset(str(devkit), progress=False).open_masked is None
    (devkit / "ImageSets" / "Segmentation").mkdir()
    (devkit / "ImageSets" / "Segmentation" / "train.txt").write_text("2008_01\n")
    (devkit / "ImageSets" / "Segmentation" / "val.txt").write_text("2008_01\n")
    dataset = open_dataset(str(devkit), progress=False, difficult=True)
    assert [np.flatnonzero(row).tolist() for row in dataset.train.targets.labels] == [[11, 14], [0, 19]]
    assert dataset.val.targets.labels.sum() == 1
    assert dataset.open_masked is not None
    listed, name = dataset.open_masked("val")  # a list of its own, not a part of Main/val
    assert (listed.paths, listed.split, name) == (
        ("JPEGImages/2008_01.jpg",),
        "val",
        "ImageSets/Segmentation/val",
    )
    with pytest.raises(SettingError, match="difficult"):
        open_dataset("shapes:train=10,val=10", difficult=True)


def test_voc_trainval(devkit: Path, tmp_path: Path) -> None:
    (devkit / "ImageSets" / "Main" / "trainval.txt").write_text("2008_01\n2008_02\n2008_03\n")
    dataset = open_voc(
        devkit, cache_dir=tmp_path / "cache", train_set="trainval", val_set="test", require_val=False
    )
    assert (len(dataset.train), len(dataset.val)) == (3, 0)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda root: (root / "Annotations/2008_02.xml").unlink(), FileNotFoundError, r"2008_02\.xml"),
        (lambda root: (root / "JPEGImages/2008_02.jpg").unlink(), FileNotFoundError, r"2008_02\.jpg"),
        (lambda root: (root / "ImageSets/Main/val.txt").unlink(), FileNotFoundError, r"val\.txt"),
        (lambda root: (root / "ImageSets/Main/val.txt").write_text(""), ValueError, r"val\.txt"),
        (lambda root: (root / "ImageSets/Main/val.txt").write_text("../x"), ValueError, r"val\.txt"),
        (
            lambda root: (root / "Annotations/2008_02.xml").write_text(annotation_xml([])),
            ValueError, r"2008_02\.xml",
        ),
        (
            lambda root: (root / "Annotations/2008_02.xml").write_text(annotation_xml([("gnu", (1, 1, 2, 2), 0)])),
            ValueError, r"2008_02\.xml .*gnu",
        ),
        (
            lambda root: (root / "Annotations/2008_02.xml").write_text(annotation_xml([("cat", (9, 1, 2, 2), 0)])),
            ValueError, r"2008_02\.xml",
        ),
        (
            lambda root: (root / "Annotations/2008_02.xml").write_text(annotation_xml([("cat", ("a", 1, 2, 2), 0)])),
            ValueError, r"2008_02\.xml: <xmin> is 'a'",
        ),
        (
            lambda root: (root / "Annotations/2008_02.xml").write_text("<annotation><size>"),
            ValueError, r"2008_02\.xml",
        ),
        (
            lambda root: (root / "Annotations/2008_02.xml").write_text("<!DOCTYPE a [<!ENTITY b 'c'>]><a/>"),
            ValueError, r"2008_02\.xml",
        ),
        (
            lambda root: Image.new("L", (30, 40)).save(root / "SegmentationClass/2008_01.png"),
            ValueError, r"2008_01\.png",
        ),
    ],
)  # fmt: skip
def test_damaged_devkit(devkit: Path, damage: Callable, error: type[Exception], message: str) -> None:
    damage(devkit)
    with pytest.raises(error, match=message):
        open_dataset(str(devkit), progress=False)


def test_imagenet_boxes(tmp_path: Path) -> None:
    (tmp_path / "n02").mkdir()
    (tmp_path / "v_1.xml").write_text(annotation_xml([("n01", (3, 4, 10, 12), 0), ("n02", (0, 0, 5, 5), 0)]))
    (tmp_path / "n02" / "n02_7.xml").write_text(annotation_xml([("n02", (1, 2, 3, 4), 0)]))
    boxes, classes = read_imagenet_boxes(
        tmp_path, ["val/n01/v_1.JPEG", "train/n02/n02_7.JPEG"], ["n01", "n02"]
    )
    assert boxes[0].tolist() == [[3, 4, 10, 12], [0, 0, 5, 5]]
    assert classes[0].tolist() == [0, 1]
    assert boxes[1].tolist() == [[1, 2, 3, 4]]
    assert read_annotation(tmp_path / "v_1.xml", one_based=False).width == 40
    with pytest.raises(FileNotFoundError, match=r"v_9\.xml"):
        read_imagenet_boxes(tmp_path, ["val/n01/v_9.JPEG"], ["n01"])
    with pytest.raises(ValueError, match="n02"):
        read_imagenet_boxes(tmp_path, ["val/n01/v_1.JPEG"], ["n01"])


def test_tar_members_behind_a_link(tmp_path: Path, private_cache: Path) -> None:
    """Links within the archive work; none leads a later member out of it."""
    archive = tmp_path / "links.tar"
    with tarfile.open(archive, "w") as members:
        for name, target in (("real", None), ("alias", "real"), ("up", "real/../..")):
            info = tarfile.TarInfo(name)
            info.type = tarfile.DIRTYPE if target is None else tarfile.SYMTYPE
            info.linkname = target or ""
            info.mode = 0o755
            members.addfile(info)
        for name in ("alias/fine.txt", "up/evil.txt"):
            info = tarfile.TarInfo(name)
            info.size = 1
            members.addfile(info, io.BytesIO(b"x"))
    with pytest.raises(ValueError, match=r"links\.tar .*'up'"):
        open_dataset(str(archive), progress=False)
    assert not list(private_cache.rglob("evil.txt"))


def test_a_layout_of_ones_own_goes_first(tmp_path: Path, class_folders: Path) -> None:
    """It is asked before those of the package, also for single files; a name is given once."""
    (class_folders / "mine.txt").touch()
    (tmp_path / "set.mine").touch()
    opened = []

    @register_layout(
        "mine",
        recognise=lambda path: path.suffix == ".mine" or (path / "mine.txt").is_file(),
        description="a directory with mine.txt",
    )
    def open_mine(path: Path, options: OpenOptions) -> Dataset:
        opened.append((path, options.name))
        return shapes

    shapes = open_dataset("shapes:train=24,val=12", progress=False)
    assert open_dataset(str(class_folders), progress=False) is shapes
    assert open_dataset(str(tmp_path / "set.mine"), progress=False) is shapes
    assert opened == [(class_folders, class_folders.name), (tmp_path / "set.mine", "set")]
    with pytest.raises(ValueError, match="'mine'"):
        register_layout("mine", recognise=lambda path: False, description="")(open_mine)
    with pytest.raises(FileNotFoundError, match=r"mine\.txt"):
        open_dataset("/no/such/place")
