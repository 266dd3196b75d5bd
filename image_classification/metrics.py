"""Prediction figures as exact sums: counts are summed over ranks before anything is divided.

A rank may have seen no image at all (the last validation batch of an uneven split).
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from image_classification.distributed import Distributed
from image_classification.extras import optional_import
from image_classification.observe.figures import VALIDATIONS, Figure, register_figures

_PERCENT = Figure(".2f", "%", steers=True)
#: Logits from here on count as predictions in the attribution-preservation program.
_PUBLISHED_THRESHOLD = 0.5
register_figures("train", {"loss": Figure(".5f", steers=True), "top1": _PERCENT})
register_figures(VALIDATIONS, {"top1": _PERCENT, "top5": _PERCENT, "map": _PERCENT, "f1": _PERCENT})
register_figures(VALIDATIONS, {"map_images": _PERCENT, "f1_images": _PERCENT, "f1_macro": Figure(".2f", "%")})


class Metrics(Protocol):
    """Collects predictions batch by batch; `compute` is a collective call over all ranks."""

    def update(self, logits: Tensor, targets: Tensor) -> None: ...

    def compute(self, distributed: Distributed) -> dict[str, float]: ...


def topk_correct(logits: Tensor, targets: Tensor, k: int) -> Tensor:
    """Return the number of rows whose target is among the `k` largest logits.

    Args:
        logits: (N, L).
        targets: (N,) class indices, or (N, L) soft targets, of which the largest entry is used.
        k: Clamped to the number of classes.

    Returns:
        Scalar float64 tensor on the device of `logits`.
    """
    if targets.ndim == 2:
        targets = targets.argmax(dim=1)
    top = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return (top == targets[:, None]).any(dim=1).sum(dtype=torch.float64)


class ClassificationMetrics:
    """Top-1 and top-5 accuracy in percent. Sums stay on the device until `compute`."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Add one batch; `logits` (N, L), `targets` (N,) or (N, L)."""
        count = torch.full((), float(len(logits)), dtype=torch.float64, device=logits.device)
        sums = torch.stack([topk_correct(logits, targets, 1), topk_correct(logits, targets, 5), count])
        self._sums = sums if self._sums is None else self._sums + sums

    def compute(self, distributed: Distributed) -> dict[str, float]:
        """Return `{"top1", "top5"}` in percent over all ranks; NaN if no rank saw an image."""
        sums = (
            self._sums
            if self._sums is not None
            else torch.zeros(3, dtype=torch.float64, device=distributed.device)
        )
        (total,) = distributed.all_reduce_sum(sums)
        top1, top5, count = total.tolist()
        if count == 0:
            return {"top1": float("nan"), "top5": float("nan")}
        return {"top1": 100 * top1 / count, "top5": 100 * top5 / count}


class MultiLabelMetrics:
    """Mean average precision and F1 in percent, counted over classes and over images.

    map, f1, f1_macro      over classes; F1 (micro and macro) of logits above 0 map_images, f1_images  over images, each
    by its own ranking of the classes; F1 of logits from 0.5 on; reported by the attribution-preservation program (Park
    et al. 2020)

    All are scikit-learn's, over the predictions of all ranks together. Classes without a positive image have no average
    precision and no recall: they are left out of the means over classes; images without a label are left out of
    `map_images`.

    Args:
        published: Compute only `map_images` and `f1_images`.
    """

    def __init__(self, published: bool = False) -> None:
        self._published = published
        self._scores: list[Tensor] = []
        self._targets: list[Tensor] = []

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Add one batch; `logits` and `targets` (N, L)."""
        self._scores.append(logits.float())
        self._targets.append(targets.float())

    def compute(self, distributed: Distributed) -> dict[str, float]:
        """Return the figures over all ranks; NaN if no rank saw an image."""
        empty = torch.zeros(0, 0, device=distributed.device)
        local_scores = torch.cat(self._scores) if self._scores else empty
        local_targets = torch.cat(self._targets) if self._targets else empty
        scores = distributed.gather_rows(local_scores).cpu().numpy()
        targets = distributed.gather_rows(local_targets).cpu().numpy() > 0.5
        over_images = figures_over_images(scores, targets)
        return over_images if self._published else _figures_over_classes(scores, targets) | over_images


def _figures_over_classes(scores: NDArray[np.floating], targets: NDArray[np.bool_]) -> dict[str, float]:
    with optional_import():
        from sklearn.metrics import average_precision_score, f1_score

    if targets.size == 0:
        return dict.fromkeys(("map", "f1", "f1_macro"), float("nan"))
    present = np.flatnonzero(targets.any(axis=0))
    precisions = [average_precision_score(targets[:, c], scores[:, c]) for c in present]
    predicted = scores > 0
    by_class = [f1_score(targets[:, c], predicted[:, c], zero_division=0.0) for c in present]
    return {
        "map": 100 * float(np.mean(precisions)) if precisions else float("nan"),
        "f1": 100 * float(f1_score(targets.ravel(), predicted.ravel(), zero_division=0.0)),
        "f1_macro": 100 * float(np.mean(by_class)) if by_class else float("nan"),
    }


def figures_over_images(scores: NDArray[np.floating], targets: NDArray[np.bool_]) -> dict[str, float]:
    """Compute mean average precision and F1 over images in percent, as the attribution-preservation program counts
    them.

    Args:
        scores: (N, L) logits.
        targets: (N, L) bool, whether an image has a label.
    """
    with optional_import():
        from sklearn.metrics import average_precision_score, f1_score

    if targets.size == 0:
        return dict.fromkeys(("map_images", "f1_images"), float("nan"))
    labelled = np.flatnonzero(targets.any(axis=1))
    precisions = [average_precision_score(targets[row], scores[row]) for row in labelled]
    predicted = scores >= _PUBLISHED_THRESHOLD
    return {
        "map_images": 100 * float(np.mean(precisions)) if precisions else float("nan"),
        "f1_images": 100 * float(f1_score(targets, predicted, average="samples", zero_division=0.0)),
    }


class TrainingSums:
    """Loss and accuracy of training, summed on the device and read at logging steps only.

    Attributes:
        window: Sums since the last logging step: loss·samples, correct, samples.
        epoch: The same since the start of the epoch; kept in checkpoints, so that a resumed epoch reports all of it.
    """

    def __init__(self, device: torch.device) -> None:
        self.window = torch.zeros(3, dtype=torch.float64, device=device)
        self.epoch = torch.zeros(3, dtype=torch.float64, device=device)

    def update(self, loss: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Add one batch without a host sync.

        Args:
            loss: Scalar mean loss of the batch.
            logits: (N, L).
            targets: (N,) or (N, L); for soft and multi-hot targets the largest entry is used as the class.
        """
        count = len(logits)
        correct = topk_correct(logits, targets, 1)
        sums = torch.stack([loss.detach().double() * count, correct, correct.new_full((), count)])
        self.window += sums

    def flush(self, distributed: Distributed) -> dict[str, float]:
        """Return `train.loss` and `train.top1` (percent) of the window over all ranks, and start a new window.
        Collective.
        """
        self.epoch += self.window
        figures = self._figures(*distributed.all_reduce_sum(self.window))
        self.window.zero_()
        return figures

    def finish_epoch(self, distributed: Distributed) -> dict[str, float]:
        """Return the epoch's figures over all ranks, and reset both sums. Collective."""
        self.epoch += self.window
        figures = self._figures(*distributed.all_reduce_sum(self.epoch))
        self.window.zero_()
        self.epoch.zero_()
        return figures

    @staticmethod
    def _figures(sums: Tensor) -> dict[str, float]:
        loss, correct, samples = sums.tolist()
        if not samples:
            return {}
        return {"train.loss": loss / samples, "train.top1": 100 * correct / samples}
