"""Explanations of the original network, stored per image, and how far they have moved since.

The target of saliency-matching pruning (Ganjdanesh et al., "Interpretations steered network pruning via amortized
inferred saliency maps", ECCV 2022) is φ(x; 1) of the network that pruning began with, across all rewrites and the
training between them. It is computed once on the calibration images and keyed by the images' content, so rank, batch,
order and resuming make no difference. An image whose last bits differ because of the decoder (a GPU's may vary, and
other decoders differ) is found by its thumbnail.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from explainers.differentiable.explanation import EXPLAINED, ExplainedClass, Explanation, explained_classes
from explainers.differentiable.gated_features import FeatureGate, gated_features
from image_classification.config import ConfigError
from image_classification.distributed import Distributed
from image_classification.models import evaluating, main_and_auxiliary_logits
from image_classification.plain_data import PlainMapping

_THUMBNAIL = 8  # pixels a side
_SAME_IMAGE = (
    0.02  # root mean square between two thumbnails; decoders differ by a tenth of this, images by ten times
)


def image_keys(images: Tensor) -> list[int]:
    """Return a 64-bit number per image that depends only on its pixels. Reads the images on the host."""
    host = images.detach().float().cpu().contiguous()
    digests = (hashlib.blake2b(image.numpy().tobytes(), digest_size=8).digest() for image in host)
    return [int.from_bytes(digest, "little", signed=True) for digest in digests]


def thumbnails(images: Tensor) -> Tensor:
    """Return coarse thumbnails of images in units of their normalisation: (N, C · 64) float32 on the CPU."""
    return F.adaptive_avg_pool2d(images.detach().float(), _THUMBNAIL).flatten(1).cpu()


@dataclasses.dataclass(frozen=True)
class Source:
    """Origin of an explanation, for checking that a resumed run uses the same one.

    Attributes:
        name: Flag and file, for messages.
        digest: Digest of everything that φ depends on apart from the network.
    """

    name: str
    digest: str

    def __str__(self) -> str:
        return f"{self.name} (digest {self.digest[:12]})"


class OriginalExplanations:
    """An explanation together with its values in the original network.

    Args:
        explanation: φ for the network at its original widths.
        source: Origin of the explanation; None skips the check on resume.
        explained: The class to explain.

    Attributes:
        present: φ for the current network; removed channels count as zero.
        kept: Tap → original positions of the remaining channels, for taps that have lost some.
    """

    def __init__(
        self,
        explanation: Explanation,
        source: Source | None = None,
        explained: ExplainedClass = EXPLAINED,
    ) -> None:
        self._whole = explanation
        self.explained = explained
        self.source = source
        self.present = explanation
        self.kept: dict[str, Tensor] = {}
        self._rows: dict[int, int] = {}
        self._values = torch.zeros(0, 0)
        self._classes = torch.zeros(0, dtype=torch.int64)
        self._thumbnails = torch.zeros(0, 0)

    @property
    def taps(self) -> tuple[str, ...]:
        """Names of the modules whose output φ reads."""
        return self.present.taps

    @property
    def remembered(self) -> bool:
        """Whether `remember` has been called."""
        return bool(self._rows)

    @torch.no_grad()
    def remember(
        self,
        model: nn.Module,
        batches: Iterable[tuple[Tensor, Tensor]],
        distributed: Distributed | None = None,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """Store φ of the current network as that of the original. Collective.

        The explained class is the network's arg-max, or the label; it remains that image's class from then on.

        Args:
            model: The bare network; not modified.
            batches: (images, targets) on its device: this rank's share of the calibration images.
            distributed: The ranks; each receives the values of all images.
            autocast: Creates the context of the forward passes.
        """
        distributed = distributed or Distributed()
        device = next(model.parameters()).device
        # Key (N,), φ (N, K) and class (N,) of this rank's images; starting empty covers ranks without images.
        nothing = torch.zeros(0, dtype=torch.int64, device=device)
        keys, classes = [nothing], [nothing]
        values: list[Tensor] = []
        seen: list[Tensor] = []
        with evaluating(model, keep_random_state=True):
            for images, targets in batches:
                with autocast():
                    logits = main_and_auxiliary_logits(model(images))[0]
                    chosen = explained_classes(self.explained, logits, targets)
                    values.append(self.present(model, images, chosen).float())
                keys.append(torch.tensor(image_keys(images), dtype=torch.int64, device=device))
                classes.append(chosen)
                seen.append(thumbnails(images).to(device))
        none = torch.zeros(0, 0, device=device)
        columns = (
            torch.cat(keys),
            torch.cat(values or [none]),
            torch.cat(classes),
            torch.cat(seen or [none]),
        )
        self._take(*(distributed.gather_rows(column).cpu() for column in columns))

    def _take(self, keys: Tensor, values: Tensor, classes: Tensor, seen: Tensor) -> None:
        self._rows = {key: row for row, key in enumerate(keys.tolist())}
        self._values = values
        self._classes = classes
        self._thumbnails = seen

    def _found(self, images: Tensor, keys: list[int]) -> list[int | None]:
        """Return the row of every image with its key; None for an unknown image."""
        rows = [self._rows.get(key) for key in keys]
        if None in rows and self._thumbnails.shape[1:] == (images.shape[1] * _THUMBNAIL**2,):
            distances = torch.cdist(thumbnails(images), self._thumbnails) / self._thumbnails.shape[1] ** 0.5
            nearest = distances.min(dim=1)
            for number, (distance, row) in enumerate(zip(*(n.tolist() for n in nearest), strict=True)):
                if rows[number] is None and distance < _SAME_IMAGE:
                    rows[number] = row
        return rows

    def lookup(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the classes (N,) and original φ (N, K) of images, on their device.

        Raises:
            ValueError: An image was not among those remembered.
        """
        if not self._rows:
            raise ValueError(
                "no original explanation is known yet: call `remember` on the network to be pruned first"
            )
        rows = [row for row in self._found(images, image_keys(images)) if row is not None]
        if len(rows) < len(images):
            raise ValueError(
                "a calibration image is not one of those whose original explanation is known: resume with the data, "
                "--image-size, --calibration-size and --calibration-batches that the run was started with"
            )
        return self._classes[rows].to(images.device), self._values[rows].to(images.device)

    def keys(self, images: Tensor) -> list[int]:
        """Return a key per image: that of the matching remembered image (see `image_keys`), or its own."""
        known = {row: key for key, row in self._rows.items()}
        keys = image_keys(images)
        pairs = zip(self._found(images, keys), keys, strict=True)
        return [own if row is None else known.get(row, own) for row, own in pairs]

    def gated(self, model: nn.Module, images: Tensor, classes: Tensor, gate: FeatureGate) -> Tensor:
        """Compute φ (N, K) of the current network, its feature maps read through `gate`."""
        with gated_features(gate):
            return self.present(model, images, classes)

    @torch.no_grad()
    def moved(
        self,
        model: nn.Module,
        batches: Iterable[tuple[Tensor, Tensor]],
        distributed: Distributed | None = None,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> float:
        """Return the mean squared difference of φ from the original network's, over images and values. Collective.

        Arguments as for `remember`; NaN without images.
        """
        distributed = distributed or Distributed()
        device = next(model.parameters()).device
        total = torch.zeros(2, dtype=torch.float64, device=device)
        with evaluating(model, keep_random_state=True):
            for images, _ in batches:
                classes, original = self.lookup(images)
                with autocast():
                    present = self.present(model, images, classes)
                total[0] += (present.double() - original.double()).square().mean(1).sum()
                total[1] += len(images)
        (total,) = distributed.all_reduce_sum(total)
        return float(total[0] / total[1]) if total[1] else float("nan")

    def follow(self, staying: Mapping[str, tuple[int, Tensor]]) -> None:
        """Update φ after a rewrite of the network.

        Args:
            staying: Result of `staying_channels` before the rewrite: tap → (number of channels, positions that stay).
        """
        for tap, (width, positions) in staying.items():
            before = self.kept.get(tap, torch.arange(width))
            self.kept[tap] = before[positions]
        self.present = self._whole.rewritten(self.kept)

    def state_dict(self) -> dict[str, object]:
        """Return the original values by image, and the remaining channels of every tap."""
        keys = torch.tensor(list(self._rows), dtype=torch.int64)
        rows = list(self._rows.values())  # an image that occurs twice has a single key and row
        return {
            "keys": keys,
            "values": self._values[rows],
            "classes": self._classes[rows],
            "thumbnails": self._thumbnails[rows],
            "kept": dict(self.kept),
            "source": None if self.source is None else dataclasses.asdict(self.source),
        }

    def load_state_dict(self, state: PlainMapping) -> None:
        """Restore a state from `state_dict`.

        Raises:
            ConfigError: The stored values belong to another explanation.
        """
        known = state.get("source")
        if known is not None and self.source is not None and known["digest"] != self.source.digest:
            raise ConfigError(
                f"{self.source}: the run to resume follows another explanation, that of {Source(**known)}: give the "
                "one that it was started with, or start afresh"
            )
        none = torch.zeros(len(state["keys"]), 0)  # format of older versions
        self._take(state["keys"], state["values"], state["classes"], state.get("thumbnails", none))
        self.kept = dict(state["kept"])
        self.present = self._whole.rewritten(self.kept)
