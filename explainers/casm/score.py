"""`python -m explainers score-casm`: how well masks find objects (Żołna et al. 2020, section 5.1 and table 1).

    python -m explainers score-casm DATA --annotation-path ANN --casms-path CASMS [--log-path LOGS --save-to-file]

For each CASM: F1, F1a, LE and OM against boxes, the saliency metric, mask statistics; `max` (the whole picture) and
`centre` (a central box) beside. `--interface FILE.py` scores another architecture, see `interface`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from explainers.casm.files import FilesConfig, casm_networks, write_results
from explainers.casm.interface import CasmInterface, Interface, checked_answer, load_interface
from explainers.casm.model import Casm, casm_name, find_casms
from explainers.casm.objective import mask_figures, summary
from explainers.ground_truth import Annotated, annotated, check_ground_truth
from explainers.job import PictureConfig, input_preset, open_split, picture_loader
from explainers.localization import Rectangle, box_figures
from explainers.perturbation import saliency_metric
from explainers.tables import print_table
from image_classification.cli import parse_config, to_plain
from image_classification.config import ConfigError, check, flag
from image_classification.data.build import ReadConfig
from image_classification.data.dataset import Preset
from image_classification.data.loader import Batch, PlannedLoader
from image_classification.data.progress import progress_bar
from image_classification.distributed import Distributed, DistributedConfig, setup_distributed

#: Side of the published pictures and the margin of `centre` on them, in pixels.
_PUBLISHED_SIZE, _MARGIN = 224, 33
FIGURES = ("f1", "f1a", "le", "om", "saliency", "top1")
STATISTICS = ("mask_mean", "mask_std", "mask_entropy", "mask_tv")
_PERCENT = {"le", "om", "top1"}


@dataclasses.dataclass(kw_only=True)
class ScoreConfig:
    """What is scored."""

    interface: Path | None = flag(
        None, "--interface", metavar="FILE.py",
        help="score another architecture: a file that defines load_model and get_masks_and_check_predictions",
    )  # fmt: skip
    not_normalize: bool = flag(
        False, "--not-normalize", help="with --interface: give it pictures in 0 … 1, not normalised"
    )

    def __post_init__(self) -> None:
        check(
            self.interface is not None or not self.not_normalize,
            "--not-normalize is for an --interface of your own; our networks need normalised pictures",
        )


def main(argv: Sequence[str]) -> int:
    """Run the verb; see the module's text."""
    sections = {
        "files": FilesConfig, "score": ScoreConfig, "pictures": PictureConfig, "data": ReadConfig,
        "distributed": DistributedConfig,
    }  # fmt: skip
    configs = parse_config(
        sections, argv, prog="python -m explainers score-casm",
        description="Localisation figures and statistics of saliency mappings (CASM).",
    )  # fmt: skip
    with setup_distributed(configs["distributed"]) as distributed:
        files: FilesConfig = configs["files"]
        distributed.check_on_main(files.check_outputs)
        rows = score(configs, distributed)
        if distributed.is_main:
            print_table(
                "saliency mappings against boxes", rows, ("casm", "mask"), (*FIGURES, *STATISTICS), _PERCENT
            )
            write_results(files, rows, to_plain(configs))
    return 0


def score(configs: dict[str, Any], distributed: Distributed) -> list[dict[str, Any]]:
    """A row for each CASM, and for `max` and `centre` under its classifier. Collective.

    Raises:
        ConfigError, FileNotFoundError, WeightsError: Before the first picture is read.
    """
    data: ReadConfig = configs["data"]
    settings: ScoreConfig = configs["score"]
    paths = find_casms(configs["files"].casms_path)
    dataset, manifest = open_split(data, configs["pictures"], distributed)
    distributed.check_on_main(lambda: check_ground_truth(manifest, masks=False, boxes=True))
    interface: Interface
    if settings.interface is None:
        interface = CasmInterface(distributed.device)
        networks = casm_networks(paths, data, dataset, distributed.device)
        preset = input_preset(data, dataset, networks)
        models = [network.casm for network in networks]
    else:
        interface, preset = load_interface(settings.interface), data.resolved_preset(dataset.preset)
        models = [interface.load_model(str(path)) for path in paths]
    if settings.not_normalize:
        preset = dataclasses.replace(preset, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    rows: list[dict[str, Any]] = []
    with _loader(manifest, preset, configs, distributed) as loader:
        for path, model in zip(paths, models, strict=True):
            rows += _score_one(casm_name(path), interface, model, loader, distributed)
    return rows


def _loader(
    manifest: Any, preset: Preset, configs: dict[str, Any], distributed: Distributed
) -> PlannedLoader:
    return picture_loader(
        manifest, preset, configs["data"], configs["pictures"], distributed, with_boxes=True
    )


def _score_one(
    name: str, interface: Interface, model: Any, loader: PlannedLoader, distributed: Distributed
) -> list[dict[str, Any]]:
    """One CASM and the two baselines."""
    sums = {mask: _Sums() for mask in ("casm", "max", "centre")}
    share = math.ceil(loader.num_samples / distributed.world_size)
    with progress_bar(name, share, distributed.is_main) as advance:
        for batch in loader:
            if not len(batch):
                continue
            images, targets = batch.images.float().cpu().numpy(), _one_label(batch.targets)
            answer = interface.get_masks_and_check_predictions(images, targets.cpu().numpy(), model)
            masks, found, correct = checked_answer(answer, len(batch), images.shape[2:], name)
            truths = [_boxes(truth, loader) for truth in annotated(batch)]
            saliency = _saliency(model, batch, targets, found)
            sums["casm"].add(masks, found, truths, correct, saliency)
            for mask in ("max", "centre"):
                size = images.shape[2], images.shape[3]
                block = baseline_rectangle(mask, size)
                filled = np.broadcast_to(as_mask(block, size), masks.shape)
                saliency = _saliency(model, batch, targets, [block] * len(batch))
                sums[mask].add(filled, [block] * len(batch), truths, correct, saliency)
            advance(len(batch))
    return [{"casm": name, "mask": mask, **each.figures(distributed)} for mask, each in sums.items()]


def baseline_rectangle(name: str, size: tuple[int, int]) -> Rectangle:
    """`max`: the whole picture; `centre`: without a margin of 33 pixels at 224, others in proportion."""
    height, width = size
    if name == "max":
        return Rectangle(0, 0, width, height)
    top, left = (round(side * _MARGIN / _PUBLISHED_SIZE) for side in size)
    return Rectangle(left, top, width - left, height - top)


def as_mask(block: Rectangle, size: tuple[int, int]) -> NDArray[np.float64]:
    """(H, W): 1 within the block, 0 outside."""
    mask = np.zeros(size)
    block.of(mask)[...] = 1
    return mask


def _one_label(targets: Tensor) -> Tensor:
    """(N,) int64; of several labels the first."""
    return targets if targets.dim() == 1 else targets.argmax(1)


def _boxes(truth: Annotated, loader: PlannedLoader) -> NDArray[np.float64]:
    """(k, 4) boxes of the classes that a picture is labelled with."""
    of_labels = [truth.boxes[label] for label in truth.labels if label in truth.boxes]
    if not of_labels:
        manifest = loader.manifest
        names = ", ".join(manifest.class_names[label] for label in truth.labels)
        raise ConfigError(
            f"a picture labelled {names} has boxes of other classes only: the annotations belong to another set; give "
            "the right --annotation-path"
        )
    return np.concatenate(of_labels)


def _saliency(model: Any, batch: Batch, targets: Tensor, found: Sequence[Rectangle]) -> NDArray[np.float64]:
    """The saliency metric under the CASM's own classifier; NaN for architectures that do not say probabilities."""
    if not isinstance(model, Casm):
        return np.full(len(batch), math.nan)

    @torch.inference_mode()
    def predict(images: Tensor) -> Tensor:
        return model(images)[0]

    return saliency_metric(predict, batch.images, targets, found).cpu().numpy()


class _Sums:
    """Sums of one kind of mask's figures."""

    def __init__(self) -> None:
        self.sums = dict.fromkeys(FIGURES, 0.0)
        self.statistics = torch.zeros(4, dtype=torch.float64)
        self.count = 0

    def add(
        self, masks: NDArray[np.float64], found: Sequence[Rectangle], truths: Sequence[NDArray[np.float64]],
        correct: NDArray[np.bool_], saliency: NDArray[np.float64],
    ) -> None:  # fmt: skip
        """Count a batch."""
        for index, values in enumerate(self._each(masks, found, truths, correct)):
            for name, value in values.items():
                self.sums[name] += value
            self.sums["saliency"] += float(saliency[index])
        self.statistics += mask_figures(torch.from_numpy(np.array(masks))[:, None]).sum(0)
        self.count += len(masks)

    def _each(
        self, masks: NDArray[np.float64], found: Sequence[Rectangle], truths: Sequence[NDArray[np.float64]],
        correct: NDArray[np.bool_],
    ) -> Iterator[dict[str, float]]:  # fmt: skip
        for mask, rectangle, boxes, right in zip(masks, found, truths, correct, strict=True):
            figures = box_figures(mask, boxes, rectangle)
            yield {
                "f1": figures.f1,
                "f1a": figures.f1_mean,
                "le": 1.0 - figures.located,
                "om": 1.0 - (figures.located and bool(right)),
                "top1": float(right),
            }

    def figures(self, distributed: Distributed) -> dict[str, Any]:
        """Means over all ranks. Collective."""
        sums, statistics, count = distributed.all_reduce_sum(
            torch.tensor([self.sums[name] for name in FIGURES], dtype=torch.float64),
            self.statistics,
            torch.tensor(self.count),
        )
        pictures = int(count)
        means = {
            name: value / pictures if pictures else math.nan
            for name, value in zip(FIGURES, sums.tolist(), strict=True)
        }
        return {**means, **summary(statistics, pictures), "pictures": pictures}
