"""`python -m explainers eval-casm`: what classifiers make of pictures whose mask is left in, taken out, painted over.

    python -m explainers eval-casm DATA --casms-path CASMS [--resnets-path DIR] [--log-path LOGS --save-to-file]

Żołna et al. 2020, section 5.2: top-1, top-5, cross-entropy and entropy of many classifiers (those of the CASMs, and
those in `--resnets-path`) on the pictures of `modify.KINDS`; masks that know no picture beside.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from explainers.casm.files import CasmNetwork, FilesConfig, casm_networks, write_results
from explainers.casm.model import find_casms
from explainers.casm.modify import BASELINES, KINDS, baseline_masks, binarised, modified
from explainers.casm.objective import negative_entropy
from explainers.inpaint import import_opencv
from explainers.job import (
    Network,
    NetworkConfig,
    PictureConfig,
    input_preset,
    load_networks,
    open_split,
    picture_loader,
)
from explainers.tables import print_table
from image_classification.cli import parse_config, to_plain
from image_classification.config import check, flag
from image_classification.data.build import ReadConfig
from image_classification.data.dataset import Dataset, Preset
from image_classification.data.loader import Batch
from image_classification.data.progress import progress_bar
from image_classification.distributed import Distributed, DistributedConfig, setup_distributed
from image_classification.metrics import topk_correct

FIGURES = ("top1", "top5", "loss", "entropy")
_PERCENT = {"top1", "top5"}
_ENDINGS = (".pth.tar", ".pth", ".pt", ".chk")


@dataclasses.dataclass(kw_only=True)
class ClassifierConfig:
    """Further classifiers"""

    resnets_path: Path | None = flag(
        None, "--resnets-path", metavar="DIR", help="folder of checkpoints of classifiers that judge besides"
    )
    arch: str | None = flag(
        None, "--arch", "-a", metavar="NAME",
        help="architecture of those checkpoints that do not say theirs; resnet50 as published",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.resnets_path is None:
            check(self.arch is None, "--arch describes the files in --resnets-path: give the folder")
            return
        check(self.resnets_path.is_dir(), f"--resnets-path {self.resnets_path}: there is no such folder")
        check(bool(self.files), f"--resnets-path {self.resnets_path}: there is no checkpoint in it")

    @property
    def files(self) -> list[str]:
        """Checkpoints in the folder."""
        if self.resnets_path is None:
            return []
        paths = sorted(path for path in self.resnets_path.iterdir() if path.is_file())
        return [str(path) for path in paths if path.name.endswith(_ENDINGS) and not path.name.startswith(".")]


def main(argv: Sequence[str]) -> int:
    """Run the verb; see the module's text."""
    sections = {
        "files": FilesConfig, "classifiers": ClassifierConfig, "pictures": PictureConfig, "data": ReadConfig,
        "distributed": DistributedConfig,
    }  # fmt: skip
    configs = parse_config(
        sections, argv, prog="python -m explainers eval-casm",
        description="Classification of pictures that are changed by saliency mappings (CASM).",
    )  # fmt: skip
    with setup_distributed(configs["distributed"]) as distributed:
        distributed.check_on_main(configs["files"].check_outputs)
        rows = evaluate(configs, distributed)
        if distributed.is_main:
            names = ("casm", "pictures", "classifier")
            print_table("classification of modified pictures", rows, names, FIGURES, _PERCENT)
            write_results(configs["files"], rows, to_plain(configs))
    return 0


def evaluate(configs: dict[str, Any], distributed: Distributed) -> list[dict[str, Any]]:
    """A row for each mask (of a CASM or a baseline), kind of picture and classifier. Collective.

    Raises:
        ConfigError, FileNotFoundError, WeightsError: Before the first picture is read.
    """
    data: ReadConfig = configs["data"]
    import_opencv()
    paths = find_casms(configs["files"].casms_path)
    dataset, manifest = open_split(data, configs["pictures"], distributed)
    check(
        not dataset.multi_label,
        f"DATA {data.data}: pictures have several labels, and top-1 asks for the one; take another set",
    )
    casms = casm_networks(paths, data, dataset, distributed.device)
    classifiers = [*casms, *_others(configs["classifiers"], data, dataset, distributed.device)]
    preset = input_preset(data, dataset, classifiers)
    table = _Table(casms, classifiers, preset, distributed.device)
    loader = picture_loader(manifest, preset, data, configs["pictures"], distributed)
    share = math.ceil(len(manifest) / distributed.world_size)
    with loader, progress_bar("classifying", share, distributed.is_main) as advance:
        for batch in loader:
            if len(batch):
                table.add(batch)
                advance(len(batch))
    return table.rows(distributed)


def _others(
    config: ClassifierConfig, data: ReadConfig, dataset: Dataset, device: torch.device
) -> list[Network]:
    """The classifiers of `--resnets-path`, each under its file's name."""
    if not config.files:
        return []
    networks = NetworkConfig(checkpoint=config.files, arch=config.arch)
    return load_networks(networks, data, dataset, device)


class _Table:
    """Sums of all figures.

    Args:
        casms: Their masks.
        classifiers: Who judges.
        preset: Normalisation and size of the pictures.
        device: Where to add up.
    """

    def __init__(
        self,
        casms: Sequence[CasmNetwork],
        classifiers: Sequence[Network],
        preset: Preset,
        device: torch.device,
    ) -> None:
        self.casms, self.classifiers, self.preset = casms, classifiers, preset
        # Whole pictures are the same whatever the mask: a line of their own.
        sources = [*(casm.name for casm in casms), *BASELINES]
        self.lines = [
            ("–", "whole"),
            *((source, kind) for source in sources for kind in KINDS if kind != "whole"),
        ]
        self.sums = torch.zeros(len(self.lines), len(classifiers), 5, dtype=torch.float64, device=device)

    @torch.inference_mode()
    def add(self, batch: Batch) -> None:
        """Count a batch."""
        masks = {casm.name: binarised(casm.casm(batch.images)[1]) for casm in self.casms}
        size = batch.images.shape[-1]
        masks |= {
            name: baseline_masks(name, batch.sample_ids, size).to(batch.images.device) for name in BASELINES
        }
        nothing = torch.zeros_like(masks[BASELINES[0]])
        for line, (source, kind) in enumerate(self.lines):
            pictures = modified(
                batch.images, masks.get(source, nothing), kind, self.preset.mean, self.preset.std
            )
            for column, classifier in enumerate(self.classifiers):
                self.sums[line, column] += _figures(classifier.predict(pictures), batch.targets)

    def rows(self, distributed: Distributed) -> list[dict[str, Any]]:
        """Means over all ranks. Collective."""
        (sums,) = distributed.all_reduce_sum(self.sums)
        rows = []
        for (source, kind), line in zip(self.lines, sums.tolist(), strict=True):
            for classifier, (*totals, count) in zip(self.classifiers, line, strict=True):
                means = {
                    name: total / count if count else math.nan
                    for name, total in zip(FIGURES, totals, strict=True)
                }
                rows.append({"casm": source, "pictures": kind, "classifier": classifier.name, **means})
        return rows


def _figures(logits: Tensor, targets: Tensor) -> Tensor:
    """(5,) float64: sums of top-1, top-5, cross-entropy and entropy (nats), and the number of pictures."""
    logits = logits.float()
    loss = F.cross_entropy(logits, targets, reduction="sum")
    figures = [
        topk_correct(logits, targets, 1), topk_correct(logits, targets, 5), loss.double(),
        -negative_entropy(logits).sum().double(), loss.new_full((), len(targets), dtype=torch.float64),
    ]  # fmt: skip
    return torch.stack(figures)
