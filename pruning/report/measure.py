"""What the report measures itself, on the run's own validation data: accuracy that no log holds, and explanations.

Nothing that is measured here has any influence on a network.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from explainers.base import Prepared, create_method
from explainers.evaluate import localize
from explainers.movement import rank_correlation, structural_similarity
from explainers.plots import overlay, to_picture
from image_classification.data.build import DataConfig, Placement, evaluation_loader
from image_classification.data.dataset import Dataset, Preset
from image_classification.data.layouts import open_dataset
from image_classification.data.loader import Batch, PlannedLoader
from image_classification.distributed import Distributed
from image_classification.evaluation import Evaluator
from image_classification.log import LogConfig, Logger
from image_classification.models import main_and_auxiliary_logits
from image_classification.precision import Precision, PrecisionConfig
from pruning.report.networks import Network

_SIDE = 144
_FIGURES = ("point", "auc", "energy")


@dataclasses.dataclass(frozen=True)
class Pictures:
    """The validation split of a run, as its networks get it.

    Attributes:
        config: Backend, batch size, sizes.
        dataset: What is read.
        preset: Size and normalisation.
        device: Where to compute.
    """

    config: DataConfig
    dataset: Dataset
    preset: Preset
    device: torch.device

    def loader(self, count: int | None = None, *, annotated: bool = False) -> PlannedLoader:
        """The split, or `count` pictures that are drawn from it once and for all."""
        manifest = self.dataset.val
        if count is not None and count < len(manifest):
            # Regular steps would meet the same class again and again where classes take turns.
            chosen = np.random.default_rng(0).permutation(len(manifest))[:count]
            manifest = manifest.subset(np.sort(chosen))
        return evaluation_loader(
            manifest,
            self.preset,
            self.config,
            Placement(device=self.device),
            with_masks=annotated and self.has_masks,
            with_boxes=annotated and not self.has_masks and self.has_boxes,
        )

    @property
    def has_masks(self) -> bool:
        """Whether every picture has a pixel mask."""
        paths = self.dataset.val.targets.mask_paths
        return paths is not None and all(paths)

    @property
    def has_boxes(self) -> bool:
        """Whether pictures have boxes."""
        return self.dataset.val.targets.boxes is not None


def open_pictures(settings: dict[str, Any], device: torch.device, data: str | None = None) -> Pictures:
    """The validation data of a run.

    Args:
        settings: Its resolved configuration.
        device: Where pictures go.
        data: Takes the place of the run's data, which may have moved.

    Raises:
        ConfigError, OSError, ValueError: It cannot be opened.
    """
    known = {field.name for field in dataclasses.fields(DataConfig)}
    values = {name: value for name, value in settings.items() if name in known}
    values |= {"calibration_size": 0, "data": data or settings["data"]}
    if values.get("data_backend") in ("dali-gpu", "synthetic", "syntetic") and device.type == "cpu":
        values["data_backend"] = "auto"
    config = DataConfig(**values)
    dataset = open_dataset(config.data, multi_label=bool(settings.get("multi_label")))
    return Pictures(config, dataset, config.resolved_preset(dataset.preset), device)


def accuracy_of(network: Network, pictures: Pictures) -> dict[str, float]:
    """Loss and figures in percent on the whole validation split, without the prefix."""
    precision = Precision(PrecisionConfig(), pictures.device)
    with pictures.loader() as loader, Logger(LogConfig(), pictures.dataset.val.root, is_main=False) as quiet:
        evaluator = Evaluator(
            loader,
            precision,
            Distributed(device=pictures.device),
            multi_label=pictures.dataset.multi_label,
        )
        found = evaluator(network.model.to(pictures.device), quiet)
    wanted = ("top1", "map", "top5", "f1", "loss")
    return {name: found[f"val.{name}"] for name in wanted if f"val.{name}" in found}


def explain(
    original: Network,
    pruned: Network,
    pictures: Pictures,
    *,
    methods: Sequence[str],
    num_pictures: int,
    num_shown: int = 8,
) -> dict[str, Any]:
    """What both networks look at.

    Args:
        original, pruned: The networks.
        pictures: Where from.
        methods: Attribution methods.
        num_pictures: How many pictures the figures are of.
        num_shown: How many the gallery shows.

    Returns:
        `num_pictures`; `localization`: rows of point, AUC and energy by network and method (absent without masks or
        boxes); `drift`: per method the rank correlation and the SSIM of the two networks' maps for the labelled class,
        `mean` and `p10` (a tenth of the pictures moved further); `gallery`: pictures as data URIs.
    """
    example = torch.zeros(1, 3, pictures.preset.image_size, pictures.preset.image_size)
    example = example.to(pictures.device)
    prepared = {
        network.name: {
            method: create_method(method).prepare(network.model.to(pictures.device), example)
            for method in methods
        }
        for network in (original, pruned)
    }
    result: dict[str, Any] = {"methods": list(methods)}
    if pictures.has_masks or pictures.has_boxes:
        result["localization"] = _localization([original, pruned], prepared, pictures, num_pictures)
    with pictures.loader(num_pictures) as loader:
        result |= _drift_and_gallery(
            prepared[original.name], prepared[pruned.name], pictures, loader, num_shown
        )
    return result


def _localization(
    networks: Sequence[Network],
    prepared: dict[str, dict[str, Prepared]],
    pictures: Pictures,
    num_pictures: int,
) -> list[dict[str, Any]]:
    rows = []
    with pictures.loader(num_pictures, annotated=True) as loader:
        for network in networks:

            @torch.no_grad()
            def predict(images: torch.Tensor, model: torch.nn.Module = network.model) -> torch.Tensor:
                return main_and_auxiliary_logits(model(images))[0]

            found = localize(
                network.name, prepared[network.name], predict, loader, metrics=_FIGURES,
                multi_label=pictures.dataset.multi_label, distributed=Distributed(device=pictures.device),
                max_pairs=loader.batch_size,
            )  # fmt: skip
            for row in found:
                values = {name: None if math.isnan(value) else value for name, value in row.figures.items()}
                rows.append({"network": row.network, "method": row.method, **values, **row.counts})
    return rows


def _drift_and_gallery(
    before: dict[str, Prepared],
    after: dict[str, Prepared],
    pictures: Pictures,
    loader: PlannedLoader,
    num_shown: int,
) -> dict[str, Any]:
    moved: dict[str, dict[str, list[float]]] = {
        method: {"rank_correlation": [], "ssim": []} for method in before
    }
    gallery: list[dict[str, Any]] = []
    count = 0
    for batch in loader:
        if not len(batch):
            continue
        targets = batch.targets if batch.targets.dim() == 1 else batch.targets.argmax(1)
        maps = {
            method: (before[method](batch.images, targets), after[method](batch.images, targets))
            for method in before
        }
        for method, (first, second) in maps.items():
            for one, other in zip(first.map.cpu().numpy(), second.map.cpu().numpy(), strict=True):
                moved[method]["rank_correlation"].append(rank_correlation(one, other))
            similar = structural_similarity(first.map, second.map, signed=first.signed or second.signed)
            moved[method]["ssim"] += similar.tolist()
        count += len(batch)
        for row in range(min(len(batch), num_shown - len(gallery))):
            gallery.append(_shown(batch, row, int(targets[row]), maps, pictures))
    return {"num_pictures": count, "drift": _drift(moved), "gallery": gallery}


def _drift(moved: dict[str, dict[str, list[float]]]) -> list[dict[str, Any]]:
    rows = []
    for method, similarities in moved.items():
        for name, values in similarities.items():
            sound = np.array([value for value in values if not math.isnan(value)])
            mean, low = (float(sound.mean()), float(np.quantile(sound, 0.1))) if len(sound) else (None, None)
            undefined = len(values) - len(sound)
            rows.append(
                {"method": method, "similarity": name, "mean": mean, "p10": low, "undefined": undefined}
            )
    return rows


def _shown(batch: Batch, row: int, target: int, maps: dict[str, Any], pictures: Pictures) -> dict[str, Any]:
    """One line of the gallery: the picture, and per method both maps, as data URIs."""
    preset = pictures.preset
    picture = to_picture(batch.images[row].float().cpu().numpy(), preset.mean, preset.std)
    pairs = []
    for method, both in maps.items():
        uris = [_uri(overlay(picture, found.map[row].cpu().numpy(), found.signed)) for found in both]
        logits = [found.logits[row] for found in both]
        said = [pictures.dataset.class_names[int(values.argmax())] for values in logits]
        pairs.append({"method": method, "before": uris[0], "after": uris[1], "said": said})
    return {"label": pictures.dataset.class_names[target], "picture": _uri(picture), "maps": pairs}


def _uri(picture: np.ndarray) -> str:
    """A picture (H, W, 3) in [0, 1] as a JPEG data URI, enlarged if it is small."""
    image = Image.fromarray((np.clip(picture, 0, 1) * 255).round().astype(np.uint8))
    if image.width < _SIDE:
        image = image.resize((_SIDE, round(_SIDE * image.height / image.width)), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
