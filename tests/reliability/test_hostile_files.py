"""Whatever reads a file × whatever a file may be: one line that names it and exit code 2, or what is right.

Every reader gets every file of `support.hostile`, and the good files of all other kinds. None of them may end in a
traceback, run code, take long or much memory, or be taken for what it is not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import pickle
import re
import shutil
import tarfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.hostile import MAKERS
from support.images import loader_of, manifest_of, write_jpegs
from support.miniatures import CLASSES, Miniatures, write_cifar10
from support.voc import annotation_xml, write_devkit

from benchmarks.fuzz import GOOD_RECIPE, TooLongError, make_files, time_limit
from explainers.__main__ import VERBS as EXPLAIN_VERBS
from explainers.aem.predictor import load_predictor
from explainers.aem.saved_selector import load_black_box, load_selector
from explainers.casm.model import load_casm
from image_classification.checkpoint_format import sealed
from image_classification.config import is_told, out_of_memory, told
from image_classification.data.bad_samples import BadSampleError
from image_classification.data.decode import UnreadableError, open_image
from image_classification.data.layouts import open_dataset
from image_classification.data.layouts.annotations import read_imagenet_boxes
from image_classification.data.manifest import Manifest
from image_classification.data.plan import CentreCrop
from image_classification.data.targets import read_mask
from image_classification.models import create_model, read_safely
from image_classification.verbs import run_verb, verb_of
from image_classification.workspace_lock import WorkspaceLock
from pruning.__main__ import ALL_VERBS
from pruning.costs.latency_measure import LatencySettings
from pruning.costs.latency_table import TableCache
from pruning.files.importing import import_checkpoint
from pruning.files.saved_network import load_pruned, save_pruned
from pruning.report.content import read_sensitivity
from pruning.report.lineage import find_lineage

#: What a case may take.
SECONDS = 20
MEBIBYTES = 700
CHARACTERS = 1200
_NAME = "hostile"


@dataclasses.dataclass(frozen=True)
class Place:
    """What a reader finds beside the file.

    Attributes:
        images: A data set of class folders, a and b.
        network: A checkpoint of a training on it.
        run: The folder of that training.
        sets: Data sets of other layouts.
        out: A folder that is new for every case.
    """

    images: Path
    network: Path
    run: Path
    sets: Path
    out: Path


#: Exit code, and the line of the error.
Outcome = tuple[int, str]
Read = Callable[[Path, Place], Outcome]


@dataclasses.dataclass(frozen=True)
class Reader:
    """Something that reads a file.

    Attributes:
        kind: Of the files that it reads: a key of `goods`.
        read: Has it read a file.
        suffix: That its files have.
        takes: Hostile files, or other kinds, that it rightly takes, or leaves out with a word.
        named: What the error names in place of the file.
    """

    kind: str
    read: Read
    suffix: str = ".pth.tar"
    takes: tuple[str, ...] = ()
    named: str = _NAME

    def may_take(self, name: str) -> bool:
        """Whether a file is rightly taken."""
        return name in self.takes or "*" in self.takes


def by_verb(line: str) -> Read:
    """A command line, with `{file}` where the file is named."""

    def read(path: Path, place: Place) -> Outcome:
        words = [word.format(file=path, **vars(place)) for word in line.split()]
        explained = words[0] == "explain"
        err, code = io.StringIO(), 0
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
            try:
                table = EXPLAIN_VERBS if explained else ALL_VERBS
                code = run_verb(table, words[explained:], prog="lucidprune", description="")
            except SystemExit as stop:
                code = int(stop.code or 0)
        errors = [line for line in err.getvalue().splitlines() if "error:" in line]
        if code == 2 and len(errors) != 1:
            return code, f"{len(errors)} errors"
        return code, "".join(errors)

    return read


def by_parser(verb: str, line: str) -> Read:
    """A command line that is read alone."""

    def read(path: Path, place: Place) -> Outcome:
        words = [word.format(file=path, **vars(place)) for word in line.split()]
        err = io.StringIO()
        try:
            with contextlib.redirect_stderr(err):
                verb_of(ALL_VERBS[verb][0]).parse(words, "lucidprune", "")
        except SystemExit as stop:
            lines = [line for line in err.getvalue().splitlines() if "error:" in line]
            return int(stop.code or 0), "".join(lines)
        return 0, ""

    return read


def by_call(function: Callable[[Path, Place], object]) -> Read:
    """A function of the library; its error as a verb would tell it."""

    def read(path: Path, place: Place) -> Outcome:
        try:
            function(path, place)
        except (UnreadableError, BadSampleError) as error:
            return 2, f"{path}: {error}"
        except Exception as error:
            if out_of_memory(error):
                return 2, f"memory has run out: {path}"
            if not is_told(error):
                raise
            return 2, told(error)
        return 0, ""

    return read


def in_folder(name: str, read: Read) -> Read:
    """The file under a name in the new folder, where a reader looks for it by itself."""

    def placed(path: Path, place: Place) -> Outcome:
        path.rename(place.out / name)
        return read(place.out / name, place)

    return placed


def in_copy(of: Callable[[Place], Path], name: str, read: Callable[[Path], object]) -> Read:
    """The file in the place of one of a folder, a copy of which is read."""

    def placed(path: Path, place: Place) -> object:
        folder = Path(shutil.copytree(of(place), place.out / "copy"))
        (folder / name).unlink(missing_ok=True)
        path.rename(folder / name)
        return read(folder)

    return by_call(placed)


def in_set(name: str, file: str) -> Read:
    """The file in the place of one of a data set."""
    return in_copy(
        lambda place: place.sets / name, file, lambda folder: open_dataset(str(folder), progress=False)
    )


def _through_a_loader(backend: str) -> Read:
    def load(path: Path, place: Place) -> None:
        names = write_jpegs(place.out, [(40, 50), (41, 60), (45, 40)])
        path.rename(place.out / "hostile.jpg")
        manifest = manifest_of(place.out, [*names, "hostile.jpg"])
        with loader_of(manifest, backend, CentreCrop((32, 32), 40), batch_size=2, workers=0) as loader:
            list(loader)

    return by_call(load)


def _again_as_if_nothing_were_there(path: Path, place: Place) -> None:
    """A record of an earlier scan that is hostile is made again, and what it says is right."""
    cache = place.out / "cache"
    first = open_dataset(str(place.images), cache_dir=cache, progress=False)
    records = sorted((cache / "scans").glob("*.npz"))
    records[0].unlink()
    path.rename(records[0])
    again = open_dataset(str(place.images), cache_dir=cache, progress=False)
    assert again.train.fingerprint == first.train.fingerprint
    assert again.val.fingerprint == first.val.fingerprint


def _the_same_manifest(path: Path, place: Place) -> None:
    """What is taken although a bit of it is another one is what was written."""
    written = open_dataset(str(place.images), progress=False).train
    assert Manifest.load(path).fingerprint == written.fingerprint


def _measured_again(path: Path, place: Place) -> None:
    settings = LatencySettings(cache_dir=place.out / "cache")
    TableCache(settings, {"a": "b"}).add_grids({})
    (table,) = (place.out / "cache" / "latency").glob("*.json")
    table.unlink()
    path.rename(table)
    assert TableCache(settings, {"a": "b"}).grids == {}


def _sensitivity(folder: Path) -> None:
    missing: list[str] = []
    if (folder / "sensitivity.json").is_file():
        assert read_sensitivity([folder], missing) is None
        assert missing


def _lock(folder: Path) -> None:
    WorkspaceLock(folder).release()


_JOB = "--arch resnet20 --image-size 32 --epochs 1 -b 4 -j 0 --device cpu --workspace {out}/w"
_CUT = f"prune {{images}} {_JOB} --budget macs=0.5 --calibration-size 4"
#: Of a PNG, the last byte belongs to a chunk that says that it has ended.
_ENDLESS = ("all but a byte",)
_LOCATED = "shapes:train=12,val=12"
_LOOK = "--image-size 32 -b 4 -j 0 --device cpu"
#: Kinds that hold a classifier, for readers of any.
_NETWORKS = ("training", "pruned", "published", "predictor", "casm")
#: Of a line of a report or a list, whatever cannot be read is left out: a crash may have torn it.
_ALL = ("*",)
#: Where the file is looked for by its name, what is no regular file is not there.
_NOT_THERE = ("a directory", "a pipe", "a link to nothing", "a link to itself", "a device without an end")

#: Command lines that read networks as the functions below do.
NETWORK_VERBS: dict[str, Reader] = {
    "train --pretrained-weights": Reader(
        "training", by_verb(f"train {{images}} {_JOB} --pretrained-weights {{file}}"), takes=_NETWORKS
    ),
    "evaluate": Reader(
        "training", by_verb(f"evaluate {{images}} {_JOB} --pretrained-weights {{file}}"), takes=_NETWORKS
    ),
    "train --resume": Reader("training", by_verb(f"train {{images}} {_JOB} --resume {{file}}")),
    "prune --teacher": Reader("training", by_verb(f"{_CUT} --match swa --teacher {{file}}"), takes=_NETWORKS),
    "prune --selector": Reader(
        "selector", by_verb(f"{_CUT} --pruning-criterion saliency --selector {{file}}")
    ),
    "prune --casm": Reader("casm", by_verb(f"{_CUT} --pruning-criterion saliency --casm {{file}}")),
    "compare": Reader("training", by_verb("compare {network} {file}"), takes=_NETWORKS),
    "shrink": Reader("training", by_verb("shrink {file} {out}/x.pth --arch resnet20"), takes=_NETWORKS),
    "export": Reader(
        "training", by_verb("export {file} --output {out}/x.pt --format state-dict"), takes=_NETWORKS
    ),
    "score": Reader("training", by_verb("score {file} {images} -b 2"), takes=_NETWORKS),
    "compress": Reader(
        "training", by_verb("compress {file} {images} --output {out}/x.pth -n 4"), takes=_NETWORKS
    ),
    "sensitivity": Reader(
        "training", by_verb("sensitivity {file} {images} --output {out}/x.json -n 4"), takes=_NETWORKS
    ),
    "import": Reader("published", by_verb("import {file} {out}/x.pth"), takes=_NETWORKS),
    "upload": Reader("training", by_verb("upload {file} owner/name --folder {out}/up"), takes=_NETWORKS),
    "benchmark": Reader(
        "training", by_verb("benchmark --arch resnet20 --checkpoint {file}"), takes=_NETWORKS
    ),
    "report --original": Reader(
        "training", by_verb("report {run} --original {file} --output {out}/x.html"), takes=_NETWORKS
    ),
    "classify": Reader(
        "training", by_verb("explain classify {images}/train/a/0.png --checkpoint {file}"), takes=_NETWORKS
    ),
    "attribute": Reader(
        "training",
        by_verb(
            f"explain attribute {{images}} {_LOOK} --checkpoint {{file}} --method gradcam --output {{out}}/x"
        ),
        takes=_NETWORKS,
    ),
    "localize": Reader(
        "training",
        by_verb(f"explain localize {_LOCATED} {_LOOK} --checkpoint {{file}} --method gradcam"),
        takes=_NETWORKS,
    ),
    "explain compare": Reader(
        "training", by_verb(f"explain compare {{network}} {{file}} {{images}} {_LOOK}"), takes=_NETWORKS
    ),
    "train-predictor": Reader(
        "training",
        by_verb(f"explain train-predictor {{images}} {_JOB} --pretrained-weights {{file}}"),
        takes=_NETWORKS,
    ),
    "train-selector --predictor": Reader(
        "predictor",
        by_verb(
            f"explain train-selector {{images}} {_JOB} --pretrained-weights {{network}} --predictor {{file}}"
        ),
    ),
    "evaluate-selector": Reader(
        "selector", by_verb(f"explain evaluate-selector {{images}} {_LOOK} --selector {{file}}")
    ),
    "visualize": Reader(
        "selector",
        by_verb(f"explain visualize {{images}} {_LOOK} --selector {{file}} --output {{out}}/x.png"),
    ),
    "train-casm --resume": Reader(
        "casm",
        by_verb(
            "explain train-casm {images} --arch resnet20 --image-size 32 --casms-path {out} --resume {file}"
        ),
        named="hostile|--resume",
    ),
    "plot-casm": Reader(
        "casm", by_verb(f"explain plot-casm {{images}} {_LOOK} --casm-path {{file}} --plots-path {{out}}/x")
    ),
    "eval-casm --classifier": Reader(
        "training",
        by_verb(
            f"explain eval-casm {{images}} {_LOOK} --casms-path {{sets}}/casms --classifier resnet20={{file}}"
        ),
        takes=_NETWORKS,
    ),
}
READERS: dict[str, Reader] = {
    # ------------------------------------------------ networks, in Python and in folders
    "load_pruned": Reader("pruned", by_call(lambda path, place: load_pruned(path)), takes=_NETWORKS),
    "load_casm": Reader("casm", by_call(lambda path, place: load_casm(path))),
    "load_selector": Reader("selector", by_call(lambda path, place: load_selector(path))),
    "load_black_box": Reader("selector", by_call(lambda path, place: load_black_box(path))),
    "load_predictor": Reader("predictor", by_call(lambda path, place: load_predictor(path))),
    "import_checkpoint": Reader(
        "published", by_call(lambda path, place: import_checkpoint(path)), takes=_NETWORKS
    ),
    "--resume auto": Reader(
        "training",
        in_folder(
            "checkpoint.pth.tar", by_verb(f"train {{images}} {_JOB} --resume auto --workspace {{out}}")
        ),
        takes=_NOT_THERE,
        named="checkpoint.pth.tar",
    ),
    "score-casm": Reader(
        "casm",
        in_folder("a.pth.tar", by_verb(f"explain score-casm {_LOCATED} {_LOOK} --casms-path {{out}}")),
        named=r"a\.pth\.tar|casms-path",
    ),
    "report: checkpoint": Reader(
        "training",
        in_copy(lambda place: place.run, "checkpoint.pth.tar", find_lineage),
        takes=(*_NOT_THERE, "pruned", "predictor", "casm", "selector"),
        named="checkpoint.pth.tar",
    ),
    # ------------------------------------------------ recipes and records
    "--config": Reader(
        "recipe",
        by_parser("train", "{images} --config {file}"),
        ".yaml",
        takes=("empty", "a quarter"),
        named="hostile|--budget",
    ),
    "report: config.yaml": Reader(
        "recipe",
        in_copy(lambda place: place.run, "config.yaml", find_lineage),
        ".yaml",
        named="config.yaml|RUN",
    ),
    "report: figures": Reader(
        "text",
        in_copy(lambda place: place.run, "experiment_raport.json", find_lineage),
        ".json",
        takes=_ALL,
        named="experiment_raport.json",
    ),
    "report: invocations": Reader(
        "text",
        in_copy(lambda place: place.run, "invocations.jsonl", find_lineage),
        ".jsonl",
        takes=_ALL,
        named="invocations.jsonl",
    ),
    "report: sensitivity": Reader(
        "text", in_copy(lambda place: place.run, "sensitivity.json", _sensitivity), ".json", takes=_ALL
    ),
    "upload --report": Reader(
        "text",
        in_folder(
            "page.json", by_verb("upload {network} owner/name --folder {out}/up --report {out}/page.html")
        ),
        ".json",
        named="--report",
    ),
    "--class-names": Reader(
        "names",
        by_verb("explain classify {images}/train/a/0.png --checkpoint {network} --class-names {file}"),
        ".txt",
        takes=("64 bytes", "all but a byte", "middle bit flipped", "first bit flipped"),
    ),
    "--class-names JSON": Reader(
        "text",
        by_verb("explain classify {images}/train/a/0.png --checkpoint {network} --class-names {file}"),
        ".json",
    ),
    "prepare: settings": Reader(
        "text",
        in_folder("prepare.json", by_verb("prepare {images}/train/a {out} --workers 0 --quiet")),
        ".json",
        takes=("a link to nothing",),
        named="prepare.json",
    ),
    "latency table": Reader("text", by_call(_measured_again), ".json", takes=_ALL),
    "lock of a workspace": Reader(
        "text",
        in_copy(lambda place: place.sets / "empty", ".lucidprune.lock", _lock),
        ".json",
        takes=_ALL,
        named="lock",
    ),
    # ------------------------------------------------ data
    "manifest": Reader("manifest", by_call(_the_same_manifest), ".npz", takes=("middle bit flipped",)),
    "scan of a set": Reader(
        "manifest", by_call(_again_as_if_nothing_were_there), ".npz", takes=_ALL, named=r"\.npz"
    ),
    "archive .tar.gz": Reader("tar.gz", by_verb(f"train {{file}} {_JOB}"), ".tar.gz"),
    "archive .zip": Reader("zip", by_verb(f"train {{file}} {_JOB}"), ".zip"),
    "CIFAR: a batch": Reader(
        "cifar",
        in_set("cifar", "data_batch_2.bin"),
        ".bin",
        takes=("middle bit flipped", "first bit flipped"),
        named="cifar|copy",
    ),
    "CIFAR, Python: a batch": Reader(
        "pickle",
        in_set("cifar-python", "data_batch_2"),
        "",
        takes=("middle bit flipped",),
        named="data_batch_2|copy",
    ),
    "CIFAR: names": Reader("text", in_set("cifar", "batches.meta.txt"), ".txt", named=r"batches\.meta|copy"),
    "VOC: a list": Reader(
        "list",
        in_set("voc", "VOCdevkit/VOC2012/ImageSets/Main/train.txt"),
        ".txt",
        takes=("64 bytes", "a half"),
        named=r"train\.txt|JPEGImages",
    ),
    "VOC: an annotation": Reader(
        "xml", in_set("voc", "VOCdevkit/VOC2012/Annotations/2008_001.xml"), ".xml", named="2008_001"
    ),
    "ImageNet: boxes": Reader(
        "xml",
        in_folder("b.xml", by_call(lambda path, place: read_imagenet_boxes(place.out, ["a/b.jpg"], ["cat"]))),
        ".xml",
        named=r"b\.xml",
    ),
    "a mask": Reader("image", by_call(lambda path, place: read_mask(path)), ".png", takes=_ENDLESS),
    "an image": Reader("image", by_call(lambda path, place: open_image(path)), ".png", takes=_ENDLESS),
    "classify IMAGE": Reader(
        "image", by_verb("explain classify {file} --checkpoint {network}"), ".png", takes=_ENDLESS
    ),
    "backend pytorch": Reader("image", _through_a_loader("pytorch"), ".jpg", takes=_ENDLESS),
    "backend resident": Reader("image", _through_a_loader("resident"), ".jpg", takes=_ENDLESS),
    "backend dali-cpu": Reader("image", _through_a_loader("dali-cpu"), ".jpg", takes=_ENDLESS),
}


def write_cifar10_python(root: Path) -> None:
    """The Python version of CIFAR-10, an image of every class in each file."""
    root.mkdir()
    rows = np.random.default_rng(0).integers(0, 256, (10, 3072), dtype=np.uint8)
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        (root / name).write_bytes(pickle.dumps({"data": rows, "labels": list(range(10))}, 2))
    names = [f"class{number}" for number in range(10)]
    (root / "batches.meta").write_bytes(pickle.dumps({"label_names": names}, 2))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUCIDPRUNE_CACHE", str(folder / "cache"))
        patch.setitem(CLASSES, "imagenet", 2)  # as the data set below has
        made = make_files(folder)
        sets = folder / "sets"
        (sets / "empty").mkdir(parents=True)
        write_cifar10(sets / "cifar", 50, 10)
        write_devkit(sets / "voc", 6, 3)
        write_cifar10_python(sets / "cifar-python")
        yield Place(Path(made["images"]), Path(made["network"]), Path(made["run"]), sets, folder / "out")


@pytest.fixture(scope="module")
def goods(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, bytes]:
    """A good file of every kind."""
    folder = tmp_path_factory.mktemp("goods")
    miniatures = Miniatures(folder)
    network = create_model("resnet20", num_classes=2, image_size=32)
    save_pruned(folder / "pruned", network)
    torch.save(network.state_dict(), folder / "published")
    noise = np.random.default_rng(0).integers(0, 256, (30, 40), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "image.png")
    with tarfile.open(folder / "x.tar.gz", "w:gz") as tar, zipfile.ZipFile(folder / "x.zip", "w") as packed:
        for file in sorted(place.images.rglob("*.png")):
            tar.add(file, file.relative_to(place.images))
            packed.write(file, file.relative_to(place.images))
    open_dataset(str(place.images), progress=False).train.save(folder / "manifest.npz")
    files = {
        "training": place.network,
        "predictor": miniatures.predictor("resnet20", "imagenet"),
        "selector": miniatures.selector("resnet20", "imagenet"),
        "casm": miniatures.casm("resnet20", "imagenet"),
        "pruned": folder / "pruned",
        "published": folder / "published",
        "image": folder / "image.png",
        "tar.gz": folder / "x.tar.gz",
        "zip": folder / "x.zip",
        "manifest": folder / "manifest.npz",
        "pickle": place.sets / "cifar-python" / "data_batch_2",
        "cifar": place.sets / "cifar" / "data_batch_2.bin",
        "list": place.sets / "voc/VOCdevkit/VOC2012/ImageSets/Main/train.txt",
    }
    casms = place.sets / "casms"
    casms.mkdir()
    shutil.copy(files["casm"], casms / "L.pth.tar")
    texts = {
        "recipe": GOOD_RECIPE,
        "names": "ant\nbee\n",
        "text": json.dumps({"a": [1, 2.5, None], "b": "c"}),
        "xml": annotation_xml([("cat", (3, 4, 10, 12), 0)]),
    }
    return {name: path.read_bytes() for name, path in files.items()} | {
        name: text.encode() for name, text in texts.items()
    }


@contextlib.contextmanager
def little_memory() -> Iterator[list[float]]:
    """Tells how many MiB this process has grown by at most, within; nothing where the system does not say."""
    grown: list[float] = []
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        reset.write_text("5")
    except OSError:
        yield grown
        return

    def peak(key: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(key))

    before = peak("VmRSS")
    yield grown
    grown.append((peak("VmHWM") - before) / 1024)


def fault_of(reader: Reader, name: str, path: Path, place: Place, canary: Path) -> str | None:
    """What is wrong with how a reader ends on a file; None where all is well."""
    begin = time.monotonic()
    try:
        with little_memory() as grown, time_limit(SECONDS):
            code, line = reader.read(path, place)
    except (Exception, TooLongError) as error:
        return f"{name}: {''.join(traceback.format_exception(error)[-4:])}"
    faults = {
        "its code was run": canary.exists() or Path("canary").exists(),
        "it was taken": code == 0 and not reader.may_take(name),
        f"exit code {code}": code not in (0, 2),
        "the error names no file": code == 2 and not re.search(reader.named, line),
        f"an error of {len(line)} characters": len(line) > CHARACTERS,
        f"{grown[:1]} MiB": bool(grown) and grown[0] > MEBIBYTES,
    }
    found = next((fault for fault, is_so in faults.items() if is_so), None)
    return found and f"{name}: {found} ({time.monotonic() - begin:.1f} s) {line[:300]}"


#: For `NETWORK_VERBS`, whose reading gets all files by the functions; the slow test leaves none out.
FEW = (
    *("empty", "a half", "middle bit flipped", "torch.save with code", "one number, 2⁴⁰ times"),
    *("a directory", "a pipe", "a link to itself", "closed to this user"),
)


def faults_of(
    name: str,
    makers: Iterable[str],
    kinds: Iterable[str],
    goods: Mapping[str, bytes],
    place: Place,
    folder: Path,
) -> list[str]:
    """How a reader ends badly on files of `makers`, and on good files of other kinds."""
    reader, canary = {**NETWORK_VERBS, **READERS}[name], folder / "canary"
    faults = []
    for hostile in [*makers, *kinds]:
        path = folder / "files" / f"{_NAME}{reader.suffix}"
        for new in (path.parent, place.out):
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()
        if hostile in MAKERS:
            MAKERS[hostile](path, goods[reader.kind], canary)
        else:
            path.write_bytes(goods[hostile])
        faults.append(fault_of(reader, hostile, path, place, canary))
    return [fault for fault in faults if fault is not None]


@pytest.mark.parametrize("name", [*NETWORK_VERBS, *READERS])
def test_no_reader_is_taken_in(
    name: str, goods: Mapping[str, bytes], place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    reader = {**NETWORK_VERBS, **READERS}[name]
    makers = [hostile for hostile in MAKERS if name in READERS or hostile in FEW]
    kinds = sorted(kind for kind in goods.keys() - {reader.kind} if not reader.may_take(kind))
    assert faults_of(name, makers, kinds, goods, place, tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORK_VERBS)
def test_no_verb_is_taken_in(
    name: str, goods: Mapping[str, bytes], place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert faults_of(name, MAKERS.keys() - set(FEW), [], goods, place, tmp_path) == []


@pytest.mark.parametrize("name", ["load_pruned", "load_selector", "manifest", "archive .zip", "an image"])
def test_a_good_file_is_taken(name: str, goods: Mapping[str, bytes], place: Place, tmp_path: Path) -> None:
    """Otherwise a reader of the table might refuse whatever it is given."""
    shutil.rmtree(place.out, ignore_errors=True)
    place.out.mkdir()
    path = tmp_path / f"good{READERS[name].suffix}"
    path.write_bytes(goods[READERS[name].kind])
    assert READERS[name].read(path, place) == (0, "")


FORGED = {
    "casm": ("load_casm", ("casm",)),
    "predictor": ("load_predictor", ("callbacks", "predictor")),
    "selector": ("load_selector", ("callbacks", "selector", "design")),
}


@pytest.mark.parametrize("kind", FORGED)
def test_no_entry_of_a_description_is_trusted(
    kind: str, goods: Mapping[str, bytes], place: Place, tmp_path: Path
) -> None:
    """Entries of any kind and size, under a digest that is right."""
    name, keys = FORGED[kind]
    path, canary = tmp_path / "hostile.pth.tar", tmp_path / "canary"
    path.write_bytes(goods[kind])
    payload = read_safely(path)
    table = payload
    for key in keys:
        table = table[key]
    reader = dataclasses.replace(READERS[name], takes=("*",))  # a text, for one, may stand for another
    faults = []
    for key, right in list(table.items()):
        for wrong in (None, -1, "x", [], {}, [{}], 1e300, 10**30, 10**9, torch.zeros(2)):
            table[key] = wrong
            torch.save(sealed(payload), path)
            faults.append(fault_of(reader, f"{key} = {wrong!r}", path, place, canary))
        table[key] = right
    assert not list(filter(None, faults))
