"""`python -m explainers eval-casm`: classifier accuracy on images with the masked part kept, removed or inpainted.

    python -m explainers eval-casm DATA --casms-path CASMS [--resnets-path DIR] [--log-path LOGS --save-to-file]

Żołna et al. 2020, section 5.2: top-1, top-5, cross-entropy and entropy of many classifiers (those of the CASMs, and
those in `--resnets-path`) on the images of `modify.KINDS`; and the same for masks that do not depend on the image.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from explainers.casm.casm_objective import negative_entropy
from explainers.casm.casm_paths import (
    CHECKPOINT_ENDINGS,
    CasmNetwork,
    FilesConfig,
    casm_networks,
    find_casms,
    write_results,
)
from explainers.casm.inpaint import Inpainted, Inpainter, import_opencv
from explainers.casm.modify import BASELINES, KINDS, baseline_masks, binarised, modified
from explainers.measures.tables import Cell, print_table
from explainers.verbs.attribution_job import (
    ImagesJob,
    Network,
    NetworkConfig,
    image_loader,
    input_preset,
    load_networks,
    open_split,
)
from image_classification.config import check, flag, section
from image_classification.data.data_config import ReadConfig
from image_classification.data.dataset import Dataset, Preset
from image_classification.data.loader import Batch
from image_classification.data.progress import progress_bar
from image_classification.distributed import Distributed
from image_classification.joining import setup_distributed
from image_classification.metrics import topk_correct
from image_classification.resolved_config import to_plain
from image_classification.verbs import configured

FIGURES = ("top1", "top5", "loss", "entropy")
_PERCENT = {"top1", "top5"}


@dataclasses.dataclass(kw_only=True)
class ClassifierConfig:
    """Further classifiers"""

    resnets_path: Path | None = flag(
        None,
        "--resnets-path",
        metavar="DIR",
        help="folder of checkpoints of further classifiers that judge the images",
    )
    arch: str | None = flag(
        None,
        "--arch",
        "-a",
        metavar="NAME",
        help="architecture of those checkpoints that do not name it; resnet50 as published",
    )

    classifier: list[str] = flag(
        [],
        "--classifier",
        metavar="ARCH=FILE",
        repeatable=True,
        help="a further classifier by architecture and weights, such as torchvision/densenet161=dense.pth; may be "
        "repeated",
    )

    def __post_init__(self) -> None:
        for word in self.classifier:
            arch, equals, path = word.partition("=")
            check(bool(arch and equals), f"--classifier {word}: write ARCH=FILE")
            check(Path(path).is_file(), f"--classifier {word}: there is no file {path}")
        if self.resnets_path is None:
            check(self.arch is None, "--arch describes the files in --resnets-path: give the folder")
            return
        check(self.resnets_path.is_dir(), f"--resnets-path {self.resnets_path}: there is no such folder")
        check(bool(self.files), f"--resnets-path {self.resnets_path}: there is no checkpoint in it")

    @property
    def files(self) -> list[str]:
        """List the checkpoints in the folder."""
        if self.resnets_path is None:
            return []
        paths = sorted(path for path in self.resnets_path.iterdir() if path.is_file())
        return [
            str(path)
            for path in paths
            if path.name.endswith(CHECKPOINT_ENDINGS) and not path.name.startswith(".")
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalCasmConfig(ImagesJob):
    """Configuration of `eval-casm`."""

    files: FilesConfig = section(FilesConfig)
    classifiers: ClassifierConfig = section(ClassifierConfig)


def run(configs: EvalCasmConfig) -> int:
    """Run the verb; see the module docstring."""
    with setup_distributed(configs.distributed) as distributed:
        distributed.check_on_main(configs.files.check_outputs)
        rows = evaluate(configs, distributed)
        if distributed.is_main:
            names = ("casm", "images", "classifier")
            print_table("classification of modified images", rows, names, FIGURES, _PERCENT)
            write_results(configs.files, rows, to_plain(configs))
    return 0


def evaluate(configs: EvalCasmConfig, distributed: Distributed) -> list[dict[str, Cell]]:
    """Return a row for each mask (of a CASM or a baseline), kind of image and classifier. Collective.

    Raises:
        ConfigError, FileNotFoundError, WeightsError: Input is unusable; raised before the first image is read.
    """
    data = configs.data
    import_opencv()
    paths = find_casms(configs.files.casms_path)
    dataset, manifest = open_split(data, configs.images, distributed)
    check(
        not dataset.multi_label,
        f"DATA {data.data}: images have several labels, and top-1 asks for the one; take another set",
    )
    casms = casm_networks(paths, data, dataset, distributed.device)
    classifiers = [*casms, *_others(configs.classifiers, data, dataset, distributed.device)]
    preset = input_preset(data, dataset, classifiers)
    loader = image_loader(manifest, preset, data, configs.images, distributed)
    share = math.ceil(len(manifest) / distributed.world_size)
    with (
        Inpainter(preset.mean, preset.std) as inpainter,
        loader,
        progress_bar("classifying", share, distributed.is_main) as advance,
    ):
        table = _Table(casms, classifiers, preset, distributed.device, inpainter)
        for batch in loader:
            if len(batch):
                table.add(batch)
                advance(len(batch))
        return table.rows(distributed)


def _others(
    config: ClassifierConfig, data: ReadConfig, dataset: Dataset, device: torch.device
) -> list[Network]:
    """Load the classifiers of `--resnets-path`, each under its file's name, and those of `--classifier`."""
    networks: list[Network] = []
    if config.files:
        files = NetworkConfig(checkpoint=config.files, arch=config.arch)
        networks += load_networks(files, data, dataset, device)
    for word in config.classifier:
        arch, _, path = word.partition("=")
        networks += load_networks(NetworkConfig(checkpoint=[path], arch=arch), data, dataset, device)
    return networks


class _Table:
    """Sums of all figures.

    Images are inpainted by the host while the device judges the others, and the next batch's.

    Args:
        casms: The CASMs that provide the masks.
        classifiers: The classifiers to evaluate.
        preset: Normalisation and size of the images.
        device: Where to add up.
        inpainter: Of that normalisation.
    """

    def __init__(
        self,
        casms: Sequence[CasmNetwork],
        classifiers: Sequence[Network],
        preset: Preset,
        device: torch.device,
        inpainter: Inpainter,
    ) -> None:
        self.casms = casms
        self.classifiers = classifiers
        self.preset = preset
        self.inpainter = inpainter
        self._begun: list[tuple[int, Inpainted, Tensor]] = []  # line, images, targets
        # Whole images do not depend on the mask: they have one line.
        self.lines = [("–", "whole")]
        for source in [*(casm.name for casm in casms), *BASELINES]:
            self.lines += [(source, kind) for kind in KINDS if kind != "whole"]
        # Sums of `_figures`: (lines, classifiers, 5).
        self.sums = torch.zeros(len(self.lines), len(classifiers), 5, dtype=torch.float64, device=device)

    @torch.inference_mode()
    def add(self, batch: Batch) -> None:
        """Add a batch to the sums."""
        masks = {casm.name: binarised(casm.casm(batch.images)[1]) for casm in self.casms}
        size = batch.images.shape[-1]
        for name in BASELINES:
            masks[name] = baseline_masks(name, batch.sample_ids, size).to(batch.images.device)
        nothing = torch.zeros_like(masks[BASELINES[0]])
        begun = [
            (line, self.inpainter.begin(batch.images, masks[source]), batch.targets)
            for line, (source, kind) in enumerate(self.lines)
            if kind == "inpainted"
        ]
        for line, (source, kind) in enumerate(self.lines):
            if kind != "inpainted":
                mask = masks.get(source, nothing)
                self._judge(
                    line,
                    modified(batch.images, mask, kind, self.preset.mean, self.preset.std),
                    batch.targets,
                )
        self._judge_inpainted()
        self._begun = begun

    @torch.inference_mode()
    def _judge_inpainted(self) -> None:
        """Classify the inpainted images of the previous batch."""
        for line, inpainted, targets in self._begun:
            self._judge(line, inpainted.result(), targets)
        self._begun = []

    def _judge(self, line: int, images: Tensor, targets: Tensor) -> None:
        for column, classifier in enumerate(self.classifiers):
            self.sums[line, column] += _figures(classifier.predict(images), targets)

    def rows(self, distributed: Distributed) -> list[dict[str, Cell]]:
        """Return means over all ranks. Collective."""
        self._judge_inpainted()
        (sums,) = distributed.all_reduce_sum(self.sums)
        rows = []
        for (source, kind), line in zip(self.lines, sums.tolist(), strict=True):
            for classifier, (*totals, count) in zip(self.classifiers, line, strict=True):
                row: dict[str, Cell] = {"casm": source, "images": kind, "classifier": classifier.name}
                for name, total in zip(FIGURES, totals, strict=True):
                    row[name] = total / count if count else math.nan
                rows.append(row)
        return rows


def _figures(logits: Tensor, targets: Tensor) -> Tensor:
    """Return sums of top-1, top-5, cross-entropy and entropy (nats), and the number of images: (5,) float64."""
    logits = logits.float()
    loss = F.cross_entropy(logits, targets, reduction="sum")
    figures = [
        topk_correct(logits, targets, 1),
        topk_correct(logits, targets, 5),
        loss.double(),
        -negative_entropy(logits).sum().double(),
        loss.new_full((), len(targets), dtype=torch.float64),
    ]
    return torch.stack(figures)


VERB = configured(EvalCasmConfig, run)
