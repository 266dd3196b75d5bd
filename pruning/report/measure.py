"""The report's own measurements on the run's validation data: accuracy missing from the logs, and explanations.

These measurements have no influence on any network.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from explainers.attribution.method import Prepared, create_method
from explainers.measures.evaluate import localize
from explainers.measures.movement import rank_correlation, structural_similarity
from explainers.plots import overlay, to_image
from image_classification.data.backends import AUTO, choose_backend
from image_classification.data.build import Placement, evaluation_loader
from image_classification.data.data_config import DataConfig
from image_classification.data.dataset import Dataset, Preset
from image_classification.data.layouts import open_dataset
from image_classification.data.loader import Batch, PlannedLoader
from image_classification.distributed import Distributed
from image_classification.evaluation import Evaluator
from image_classification.models import main_and_auxiliary_logits
from image_classification.network_input import NetworkInput
from image_classification.observe.log import LogConfig, Logger
from image_classification.plain_data import Plain
from image_classification.precision import Precision, PrecisionConfig
from pruning.report.networks import Network

_SIDE = 144
_NUM_SHOWN = 8  # number of images in the gallery
_FIGURES = ("point", "auc", "energy")


@dataclasses.dataclass(frozen=True)
class EvaluationImages:
    """The validation split of a run, preprocessed as for its networks.

    Attributes:
        config: Backend, batch size, sizes.
        dataset: The data set.
        preset: Size and normalisation.
        device: Device to compute on.
    """

    config: DataConfig
    dataset: Dataset
    preset: Preset
    device: torch.device

    def loader(
        self, count: int | None = None, *, annotated: bool = False, training: bool = False
    ) -> PlannedLoader:
        """Create a loader of the split, or of `count` images sampled from it, the same ones every time.

        Args:
            count: Number of images; None for all.
            annotated: Load masks, or else boxes, if there are any.
            training: Use the training images, read as in evaluation.
        """
        manifest = self.dataset.train if training else self.dataset.val
        if count is not None and count < len(manifest):
            # Taking every n-th image could select a single class if classes alternate.
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
        """Whether every image has a pixel mask."""
        paths = self.dataset.val.targets.mask_paths
        return paths is not None and all(paths)

    @property
    def has_boxes(self) -> bool:
        """Whether images have boxes."""
        return self.dataset.val.targets.boxes is not None


def open_images(
    settings: Plain, device: torch.device, data: str | None = None, images: NetworkInput | None = None
) -> EvaluationImages:
    """Open the validation data of a run.

    Args:
        settings: Its resolved configuration.
        device: Device of the images.
        data: Replaces the run's data, which may have moved.
        images: Input that the network was trained for, unless a flag overrides it.

    Raises:
        ConfigError, OSError, ValueError: The data cannot be opened.
    """
    known = {field.name for field in dataclasses.fields(DataConfig)}
    values = {name: value for name, value in settings.items() if name in known}
    config = DataConfig(**{**values, "calibration_size": 0, "data": data or settings["data"]})
    backend = choose_backend(config.data_backend, device)
    if not backend.needs_dataset or backend.problem(device) is not None:
        config.data_backend = AUTO
    dataset = open_dataset(
        config.data, multi_label=bool(settings.get("multi_label")), difficult=config.difficult
    )
    return EvaluationImages(
        config, dataset, config.resolved_preset(dataset.preset.for_network(images)), device
    )


def accuracy_of(network: Network, images: EvaluationImages) -> dict[str, float]:
    """Return loss and figures in percent on the whole validation split, without the prefix."""
    precision = Precision(PrecisionConfig(), images.device)
    with images.loader() as loader, Logger(LogConfig(), images.dataset.val.root, is_main=False) as quiet:
        evaluator = Evaluator(
            loader,
            precision,
            Distributed(device=images.device),
            multi_label=images.dataset.multi_label,
        )
        found = evaluator(network.model.to(images.device), quiet)
    wanted = ("top1", "map", "top5", "f1", "loss")
    return {name: found[f"val.{name}"] for name in wanted if f"val.{name}" in found}


@torch.no_grad()
def answers_of(original: Network, pruned: Network, images: EvaluationImages, num_images: int) -> Plain:
    """Compare the predictions of two networks, on images of one class each.

    Args:
        original, pruned: The networks.
        images: The data.
        num_images: Number of images.

    Returns:
        `num_images`; `agreement`, the share of images for which both predict the same class; `classes`: rows of `name`,
        `count`, and the shares `before` and `after` of its images that each network classifies correctly.
    """
    models = [network.model.to(images.device) for network in (original, pruned)]
    targets, answers = [], []
    with images.loader(num_images) as loader:
        for batch in loader:
            if len(batch):
                logits = [main_and_auxiliary_logits(model(batch.images))[0] for model in models]
                targets.append(batch.targets.cpu())
                answers.append(torch.stack([values.argmax(1).cpu() for values in logits]))
    truth, (before, after) = torch.cat(targets), torch.cat(answers, dim=1)
    classes = []
    for label in truth.unique().tolist():
        of_class = truth == label
        right = [float((said[of_class] == label).double().mean()) for said in (before, after)]
        name = images.dataset.class_names[label]
        classes.append({"name": name, "count": int(of_class.sum()), "before": right[0], "after": right[1]})
    agreement = float((before == after).double().mean())
    return {"num_images": len(truth), "agreement": agreement, "classes": classes}


def explain(
    original: Network,
    pruned: Network,
    images: EvaluationImages,
    *,
    methods: Sequence[str],
    num_images: int,
) -> Plain:
    """Compare the explanations of both networks.

    Args:
        original, pruned: The networks.
        images: The data.
        methods: Attribution methods.
        num_images: Number of images for the figures.

    Returns:
        `num_images`; `localization`: rows of point, AUC and energy by network and method (absent without masks or
        boxes); `drift`: per method the rank correlation and the SSIM of the two networks' maps for the labelled class,
        `mean` and `p10` (the maps of a tenth of the images moved further); `gallery`: images as data URIs.
    """
    example = torch.zeros(1, 3, images.preset.image_size, images.preset.image_size)
    example = example.to(images.device)
    prepared = {}
    for network in (original, pruned):
        model = network.model.to(images.device)
        prepared[network.name] = {name: create_method(name).prepare(model, example) for name in methods}
    result: Plain = {"methods": list(methods)}
    if images.has_masks or images.has_boxes:
        result["localization"] = _localization([original, pruned], prepared, images, num_images)
    with images.loader(num_images) as loader:
        result |= _drift_and_gallery(prepared[original.name], prepared[pruned.name], images, loader)
    return result


def _localization(
    networks: Sequence[Network],
    prepared: dict[str, dict[str, Prepared]],
    shown: EvaluationImages,
    num_images: int,
) -> list[Plain]:
    rows = []
    with shown.loader(num_images, annotated=True) as loader:
        for network in networks:

            @torch.no_grad()
            def predict(images: torch.Tensor, model: torch.nn.Module = network.model) -> torch.Tensor:
                return main_and_auxiliary_logits(model(images))[0]

            found = localize(
                network.name,
                prepared[network.name],
                predict,
                loader,
                metrics=_FIGURES,
                multi_label=shown.dataset.multi_label,
                distributed=Distributed(device=shown.device),
                max_pairs=loader.batch_size,
            )
            for row in found:
                values = {name: None if math.isnan(value) else value for name, value in row.figures.items()}
                rows.append({"network": row.network, "method": row.method, **values, **row.counts})
    return rows


def _drift_and_gallery(
    before: dict[str, Prepared],
    after: dict[str, Prepared],
    images: EvaluationImages,
    loader: PlannedLoader,
) -> Plain:
    moved: dict[str, dict[str, list[float]]] = {
        method: {"rank_correlation": [], "ssim": []} for method in before
    }
    gallery: list[Plain] = []
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
        for row in range(min(len(batch), _NUM_SHOWN - len(gallery))):
            gallery.append(_shown(batch, row, int(targets[row]), maps, images))
    return {"num_images": count, "drift": _drift(moved), "gallery": gallery}


def _drift(moved: dict[str, dict[str, list[float]]]) -> list[Plain]:
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


def _shown(batch: Batch, row: int, target: int, maps: Plain, images: EvaluationImages) -> Plain:
    """Return one row of the gallery: the image, and per method both maps, as data URIs."""
    preset = images.preset
    image = to_image(batch.images[row].float().cpu().numpy(), preset.mean, preset.std)
    pairs = []
    for method, both in maps.items():
        uris = [_uri(overlay(image, found.map[row].cpu().numpy(), found.signed)) for found in both]
        logits = [found.logits[row] for found in both]
        said = [_answer(values, target, images) for values in logits]
        pairs.append({"method": method, "before": uris[0], "after": uris[1], "said": said})
    return {"label": images.dataset.class_names[target], "image": _uri(image), "maps": pairs}


def _answer(logits: torch.Tensor, target: int, images: EvaluationImages) -> Plain:
    """Convert a network's logits (classes,) to the predicted class's name, its probability, and whether it is the
    label.
    """
    said = int(logits.argmax())
    probabilities = logits.sigmoid() if images.dataset.multi_label else logits.softmax(0)
    return {
        "name": images.dataset.class_names[said],
        "probability": float(probabilities[said]),
        "right": said == target,
    }


def _uri(pixels: np.ndarray) -> str:
    """Encode an image (H, W, 3) in [0, 1] as a JPEG data URI, enlarged if it is small."""
    image = Image.fromarray((np.clip(pixels, 0, 1) * 255).round().astype(np.uint8))
    if image.width < _SIDE:
        image = image.resize((_SIDE, round(_SIDE * image.height / image.width)), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
