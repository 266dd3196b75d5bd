"""Miniature data sets, networks and explainers that recipes and documented commands need, created on demand.

Everything has the real format and the requested architecture: a folder of JPEGs, the binary files of CIFAR-10, a VOC
devkit, checkpoints. Only the images are few and small, and nothing is trained.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from support.images import write_jpegs
from support.voc import annotation_xml, write_devkit

from explainers.aem.masks import MASK_PRESETS
from explainers.aem.predictor import describe_predictor, new_predictor, save_predictor
from explainers.aem.saved_selector import save_selector
from explainers.aem.selector import Selector, design_selector
from explainers.casm import Casm, save_casm
from image_classification.models import create_model, model_for_weights
from pruning.files.saved_network import save_pruned

#: Side of the images that explainers are created for.
SIZE = 32
#: Word for `DATA` of each set in miniature → number of classes.
CLASSES = {"imagenet": 4, "cifar10": 10, "voc": 20, "shapes": 12}
SHAPES = "shapes:train=160,val=24"


def write_imagenet(root: Path, num_train: int = 30, num_val: int = 3) -> Path:
    """Write four classes in `train/` and `val/`, JPEGs of varied size; return the folder."""
    for split, count in (("train", num_train), ("val", num_val)):
        for number in range(CLASSES["imagenet"]):
            place = root / split / f"n{number:08d}"
            place.mkdir(parents=True)
            write_jpegs(place, [(60 + 7 * (i + number) % 40, 70 + 11 * i % 50) for i in range(count)])
    return root


def write_imagenet_boxes(imagenet: Path, folder: Path) -> Path:
    """Write a box for every validation image, in the format of ImageNet's localisation task; return the folder."""
    for image in (imagenet / "val").glob("*/*.jpg"):
        place = folder / image.parent.name
        place.mkdir(parents=True, exist_ok=True)
        objects = [(image.parent.name, (5.0, 8.0, 45.0, 48.0), 0)]
        (place / f"{image.stem}.xml").write_text(annotation_xml(objects, 70, 60))
    return folder


def write_cifar10(root: Path, num_train: int = 80, num_val: int = 20) -> Path:
    """Write the binary version of CIFAR-10 with noise images; return the folder."""
    root.mkdir()
    generator = np.random.default_rng(0)
    files = {f"data_batch_{number}.bin": num_train // 5 for number in range(1, 6)}
    for name, count in (files | {"test_batch.bin": num_val}).items():
        rows = generator.integers(0, 256, (count, 1 + 3 * 32 * 32), dtype=np.uint8)
        rows[:, 0] = np.arange(count) % 10
        (root / name).write_bytes(rows.tobytes())
    (root / "batches.meta.txt").write_text("".join(f"class{number}\n" for number in range(10)))
    return root


class Miniatures:
    """The miniatures in a folder; each is created on first use."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _made(self, name: str, make: Callable[[Path], object]) -> Path:
        path = self.folder / name
        if not path.exists():
            make(path)
        return path

    def data(self, kind: str) -> str:
        """Return the value for DATA; `kind` is a key of CLASSES."""
        if kind == "shapes":
            return SHAPES
        if kind == "voc":
            return str(self._made("voc", write_devkit))
        return str(self._made(kind, write_imagenet if kind == "imagenet" else write_cifar10))

    def boxes(self) -> Path:
        """Annotation files of the images of `imagenet`."""
        imagenet = Path(self.data("imagenet"))
        return self._made("boxes", lambda path: write_imagenet_boxes(imagenet, path))

    def classifier(self, arch: str, kind: str) -> Path:
        """Create a checkpoint of an architecture for the classes of a set."""

        def make(path: Path) -> None:
            torch.manual_seed(0)
            save_pruned(path, create_model(arch, num_classes=CLASSES[kind], image_size=SIZE))

        return self._made(f"{_plain(arch)}-{kind}.pth.tar", make)

    def published_weights(self, arch: str) -> Path:
        """Create a plain state dict of torchvision's network of that name, for the 1,000 classes of ImageNet."""
        name = re.match(r"[a-z]+\d*(_bn)?", arch).group()  # type: ignore[union-attr]

        def make(path: Path) -> None:
            state = create_model(f"torchvision/{name}", num_classes=1000).state_dict()
            # One number each: a VGG's classifier would be half a gigabyte of unused numbers.
            head = {
                key: torch.zeros(1).expand(value.shape) for key, value in state.items() if "classif" in key
            }
            torch.save(state | head, path)

        return self._made(f"torchvision-{name}.pth", make)

    def folder_of_classifiers(self, arch: str, kind: str) -> Path:
        """Create a folder with a checkpoint in the format of PyTorch's ImageNet example."""

        def make(path: Path) -> None:
            path.parent.mkdir(exist_ok=True)
            model = model_for_weights(None, self.classifier(arch, kind))
            state = {f"module.{name}": value for name, value in model.state_dict().items()}
            torch.save({"epoch": 90, "arch": arch, "best_acc1": 0.0, "state_dict": state}, path)

        return self._made(f"{_plain(arch)}-{kind}/model_best.pth.tar", make).parent

    def predictor(self, arch: str, kind: str) -> Path:
        """Create a predictor of `classifier(arch, kind)`."""

        def make(path: Path) -> None:
            black_box = model_for_weights(None, self.classifier(arch, kind)).eval()
            record = describe_predictor(black_box, "rbf", MASK_PRESETS["cifar"].scaled(SIZE), CLASSES[kind])
            save_predictor(path, new_predictor(black_box, fresh=False), record)

        return self._made(f"{_plain(arch)}-{kind}-predictor.pth.tar", make)

    def selector(self, arch: str, kind: str) -> Path:
        """Create a selector of `classifier(arch, kind)`, with the light decoder."""

        def make(path: Path) -> None:
            black_box = model_for_weights(None, self.classifier(arch, kind)).eval()
            torch.manual_seed(1)
            design = design_selector(
                black_box,
                torch.zeros(1, 3, SIZE, SIZE),
                kind="rbf",
                geometry=MASK_PRESETS["cifar"].scaled(SIZE),
                num_classes=CLASSES[kind],
                decoder="light",
            )
            save_selector(path, Selector(design), black_box)

        return self._made(f"{_plain(arch)}-{kind}-selector.pth.tar", make)

    def casm(self, arch: str, kind: str) -> Path:
        """Create a saliency mapping on `classifier(arch, kind)`, in its own folder."""

        def make(path: Path) -> None:
            path.parent.mkdir(exist_ok=True)
            torch.manual_seed(2)
            model = model_for_weights(None, self.classifier(arch, kind)).eval()
            save_casm(path, Casm.for_classifier(model, SIZE, 8))

        return self._made(f"{_plain(arch)}-{kind}-casms/L.pth.tar", make)


class NamesOnly(Miniatures):
    """Empty files under the names of the real ones, for parsers: nothing is read."""

    def _made(self, name: str, make: Callable[[Path], object]) -> Path:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
        return path


def _plain(arch: str) -> str:
    return arch.replace("/", "-")
