"""`python -m explainers score-casm`: how well masks find objects (Żołna et al. 2020, section 5.1 and table 1).

    python -m explainers score-casm DATA --annotation-path ANN --casms-path CASMS [--log-path LOGS --save-to-file]

For each CASM: F1, F1a, LE and OM against boxes, the saliency metric, mask statistics; the same for `max`
(the whole image) and `centre` (a central box). `--interface FILE.py` scores another architecture, see `interface`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from explainers.casm.casm_objective import (
    PUBLISHED_STATISTICS,
    STATISTICS,
    mask_figures,
    published_figures,
    published_summary,
    summary,
)
from explainers.casm.casm_paths import FilesConfig, casm_name, casm_networks, find_casms, write_results
from explainers.casm.interface import CasmInterface, Interface, checked_answer, load_interface
from explainers.casm.model import Casm
from explainers.measures.behind import Behind
from explainers.measures.ground_truth import Annotated, annotated
from explainers.measures.localization import Rectangle, box_figures
from explainers.measures.perturbation import saliency_metric
from explainers.measures.tables import Cell, print_table
from explainers.verbs.attribution_job import ImagesJob, image_loader, input_preset, open_split
from explainers.verbs.ground_truth_checks import check_ground_truth
from image_classification.config import ConfigError, check, flag, section
from image_classification.data.loader import Batch, PlannedLoader
from image_classification.data.progress import progress_bar
from image_classification.distributed import Distributed
from image_classification.joining import setup_distributed
from image_classification.resolved_config import to_plain
from image_classification.verbs import configured

#: Side of the published images and margin of `centre` on them, in pixels.
_PUBLISHED_SIZE, _MARGIN = 224, 33
FIGURES = ("f1", "f1a", "le", "om", "saliency", "top1")
_PERCENT = {"le", "om", "top1"}
#: Masks scored for comparison; see `baseline_rectangle`.
BASELINES = ("max", "centre")


@dataclasses.dataclass(kw_only=True)
class ScoreConfig:
    """What is scored."""

    figures: Literal["own", "published"] = flag(
        "own",
        "--figures",
        help="statistics of masks: own (deviation over images, binary entropy in nats, mean absolute difference of "
        "neighbours) or published (as the published score.py computes them)",
    )

    interface: Path | None = flag(
        None,
        "--interface",
        metavar="FILE.py",
        help="score another architecture: a file that defines load_model and get_masks_and_check_predictions",
    )
    not_normalize: bool = flag(
        False, "--not-normalize", help="with --interface: give it images in 0 … 1, not normalised"
    )

    def __post_init__(self) -> None:
        check(
            self.interface is not None or not self.not_normalize,
            "--not-normalize is for an --interface of your own; our networks need normalised images",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreCasmConfig(ImagesJob):
    """Configuration of `score-casm`."""

    files: FilesConfig = section(FilesConfig)
    score: ScoreConfig = section(ScoreConfig)


def run(configs: ScoreCasmConfig) -> int:
    """Run the verb; see the module docstring."""
    with setup_distributed(configs.distributed) as distributed:
        files = configs.files
        distributed.check_on_main(files.check_outputs)
        rows = score(configs, distributed)
        if distributed.is_main:
            names = PUBLISHED_STATISTICS if configs.score.figures == "published" else STATISTICS
            print_table(
                "saliency mappings against boxes", rows, ("casm", "mask"), (*FIGURES, *names), _PERCENT
            )
            write_results(files, rows, to_plain(configs))
    return 0


def score(configs: ScoreCasmConfig, distributed: Distributed) -> list[dict[str, Cell]]:
    """Return a row for each CASM, and for `max` and `centre` under its classifier. Collective.

    Raises:
        ConfigError, FileNotFoundError, WeightsError: Input is unusable; raised before the first image is read.
    """
    data = configs.data
    settings = configs.score
    paths = find_casms(configs.files.casms_path)
    dataset, manifest = open_split(data, configs.images, distributed)
    distributed.check_on_main(lambda: check_ground_truth(manifest, masks=False, boxes=True))
    interface: Interface
    models: list[object]
    if settings.interface is None:
        interface = CasmInterface(distributed.device)
        networks = casm_networks(paths, data, dataset, distributed.device)
        preset = input_preset(data, dataset, networks)
        models = [network.casm for network in networks]
    else:
        interface = load_interface(settings.interface)
        preset = data.resolved_preset(dataset.preset)
        models = [interface.load_model(str(path)) for path in paths]
    if data.resize is None:  # as published: the short side is not cropped, and boxes lose less
        preset = dataclasses.replace(preset, resize=preset.image_size)
    if settings.not_normalize:
        preset = dataclasses.replace(preset, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    rows: list[dict[str, Cell]] = []
    with image_loader(manifest, preset, data, configs.images, distributed, with_boxes=True) as loader:
        for path, model in zip(paths, models, strict=True):
            rows += _score_one(casm_name(path), interface, model, loader, distributed)
    return rows


def _score_one(
    name: str, interface: Interface, model: object, loader: PlannedLoader, distributed: Distributed
) -> list[dict[str, Cell]]:
    """Score one CASM and the two baselines."""
    sums = {mask: _Sums() for mask in ("casm", *BASELINES)}
    share = math.ceil(loader.num_samples / distributed.world_size)
    with progress_bar(name, share, distributed.is_main) as advance, Behind() as behind:
        for batch in loader:
            if not len(batch):
                continue
            images = batch.images.float().cpu().numpy()
            targets = _one_label(batch.targets)
            size = images.shape[2], images.shape[3]
            answer = interface.get_masks_and_check_predictions(images, targets.cpu().numpy(), model)
            masks, found, correct = checked_answer(answer, len(batch), size, name)
            truths = [_boxes(truth, loader) for truth in annotated(batch)]
            saliency = _saliency(model, batch, targets, found)
            counted = [functools.partial(sums["casm"].add, masks, found, truths, correct, saliency)]
            for mask in BASELINES:
                block = baseline_rectangle(mask, size)
                filled = np.broadcast_to(as_mask(block, size), masks.shape)
                found = [block] * len(batch)
                saliency = _saliency(model, batch, targets, found)
                counted.append(functools.partial(sums[mask].add, filled, found, truths, correct, saliency))
            behind.do(functools.partial(_run_all, counted))
            advance(len(batch))
    return [{"casm": name, "mask": mask, **each.figures(distributed)} for mask, each in sums.items()]


def _run_all(pieces: Sequence[Callable[[], None]]) -> None:
    for piece in pieces:
        piece()


def baseline_rectangle(name: str, size: tuple[int, int]) -> Rectangle:
    """Return the rectangle of a baseline.

    `max` is the whole image; `centre` leaves out a margin of 33 pixels at 224, others in proportion.
    """
    height, width = size
    if name == "max":
        return Rectangle(0, 0, width, height)
    top, left = (round(side * _MARGIN / _PUBLISHED_SIZE) for side in size)
    return Rectangle(left, top, width - left, height - top)


def as_mask(block: Rectangle, size: tuple[int, int]) -> NDArray[np.float64]:
    """Return a mask (H, W) that is 1 within the block and 0 outside."""
    mask = np.zeros(size)
    block.of(mask)[...] = 1
    return mask


def _one_label(targets: Tensor) -> Tensor:
    """Return class indices (N,) int64; the first of several labels."""
    return targets if targets.dim() == 1 else targets.argmax(1)


def _boxes(truth: Annotated, loader: PlannedLoader) -> NDArray[np.float64]:
    """Return the boxes (k, 4) of the classes that an image is labelled with."""
    of_labels = [truth.boxes[label] for label in truth.labels if label in truth.boxes]
    if not of_labels:
        manifest = loader.manifest
        names = ", ".join(manifest.class_names[label] for label in truth.labels)
        raise ConfigError(
            f"an image labelled {names} has boxes of other classes only: the annotations belong to another set; give "
            "the right --annotation-path"
        )
    return np.concatenate(of_labels)


def _saliency(
    model: object, batch: Batch, targets: Tensor, found: Sequence[Rectangle]
) -> NDArray[np.float64]:
    """Compute the saliency metric under the CASM's own classifier; NaN for other architectures, whose logits are
    unknown.
    """
    if not isinstance(model, Casm):
        return np.full(len(batch), math.nan)

    @torch.inference_mode()
    def predict(images: Tensor) -> Tensor:
        logits: Tensor = model(images)[0]
        return logits

    return saliency_metric(predict, batch.images, targets, found).cpu().numpy()


class _Sums:
    """Sums of the figures of one kind of mask."""

    def __init__(self) -> None:
        self.sums = dict.fromkeys(FIGURES, 0.0)
        self.statistics = torch.zeros(2, 4, dtype=torch.float64)
        self.count = 0

    def add(
        self,
        masks: NDArray[np.float64],
        found: Sequence[Rectangle],
        truths: Sequence[NDArray[np.float64]],
        correct: NDArray[np.bool_],
        saliency: NDArray[np.float64],
    ) -> None:
        """Add a batch to the sums.

        Args:
            masks: (N, H, W).
            found: Predicted location of each mask's object.
            truths: (k, 4) boxes per image.
            correct: (N,) bool, whether the classifier is right.
            saliency: (N,) the saliency metric.
        """
        for mask, rectangle, boxes, right in zip(masks, found, truths, correct, strict=True):
            figures = box_figures(mask, boxes, rectangle)
            self.sums["f1"] += figures.f1
            self.sums["f1a"] += figures.f1_mean
            self.sums["le"] += 1.0 - figures.located
            self.sums["om"] += 1.0 - (figures.located and bool(right))
            self.sums["top1"] += float(right)
        for value in saliency:
            self.sums["saliency"] += float(value)
        tensors = torch.from_numpy(np.array(masks))[:, None]
        for row, figures_of in enumerate((mask_figures, published_figures)):
            self.statistics[row] += figures_of(tensors).sum(0)
        self.count += len(masks)

    def figures(self, distributed: Distributed) -> dict[str, Cell]:
        """Return means over all ranks. Collective."""
        sums, statistics, count = distributed.all_reduce_sum(
            torch.tensor([self.sums[name] for name in FIGURES], dtype=torch.float64),
            self.statistics,
            torch.tensor(self.count),
        )
        num_images = int(count)
        means: dict[str, Cell] = {}
        for name, total in zip(FIGURES, sums.tolist(), strict=True):
            means[name] = total / num_images if num_images else math.nan
        own, published = statistics
        counted = summary(own, num_images) | published_summary(published, num_images)
        return {**means, **counted, "images": num_images}


VERB = configured(ScoreCasmConfig, run)
