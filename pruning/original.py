"""What an explanation was in the original network, remembered per picture, and how far it has moved since.

The target of saliency-matching pruning (Ganjdanesh et al., "Interpretations steered network pruning via amortized
inferred saliency maps", ECCV 2022) is φ(x; 1) of the network that pruning began with, through all rewrites and all
training between them. It is computed once on the calibration pictures and kept by the pictures' content, so that it
does not matter which rank, batch or order a picture comes in, nor whether the run was resumed.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from explainers.explanation import Explanation
from image_classification.config import ConfigError
from image_classification.distributed import Distributed
from image_classification.models import main_and_auxiliary_logits
from pruning.hooks import evaluation_mode


def picture_keys(images: Tensor) -> list[int]:
    """A 64-bit number per picture that depends on its pixels only. Reads the pictures on the host."""
    host = images.detach().float().cpu().contiguous()
    digests = (hashlib.blake2b(picture.numpy().tobytes(), digest_size=8).digest() for picture in host)
    return [int.from_bytes(digest, "little", signed=True) for digest in digests]


@dataclasses.dataclass(frozen=True)
class Source:
    """Where an explanation comes from, to tell whether a resumed run has the same.

    Attributes:
        name: Flag and file, for messages.
        digest: Of everything that φ depends on beside the network.
    """

    name: str
    digest: str

    def __str__(self) -> str:
        return f"{self.name} (digest {self.digest[:12]})"


class OriginalExplanations:
    """An explanation together with its values in the original network.

    Args:
        explanation: φ for the network at its original widths.
        source: Where it comes from; None leaves that unchecked.

    Attributes:
        present: φ for the network as it is now; removed channels count as zero.
        kept: Tap → original positions of the channels that are left, for taps that have lost some.
    """

    def __init__(self, explanation: Explanation, source: Source | None = None) -> None:
        self._whole = explanation
        self.source = source
        self.present = explanation
        self.kept: dict[str, Tensor] = {}
        self._rows: dict[int, int] = {}
        self._values = torch.zeros(0, 0)
        self._classes = torch.zeros(0, dtype=torch.int64)

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
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Take the network as it is for the original one. Collective.

        The explained class is the network's own arg-max, the same for a picture ever after.

        Args:
            model: The bare network; left as it was.
            batches: (images, targets) on its device: this rank's share of the calibration pictures.
            distributed: The ranks; each gets to know all pictures.
            autocast: Makes the context of the forward passes.
        """
        distributed = distributed or Distributed()
        device = next(model.parameters()).device
        keys, values, classes = [torch.zeros(0, dtype=torch.int64, device=device)], [], []
        with evaluation_mode(model):
            for images, _ in batches:
                with autocast():
                    chosen = main_and_auxiliary_logits(model(images))[0].argmax(1)
                    values.append(self.present(model, images, chosen).float())
                keys.append(torch.tensor(picture_keys(images), dtype=torch.int64, device=device))
                classes.append(chosen)
        all_values = torch.cat(values) if values else torch.zeros(0, 0, device=device)
        all_classes = torch.cat(classes) if classes else keys[0]
        self._take(
            *(distributed.gather_rows(rows).cpu() for rows in (torch.cat(keys), all_values, all_classes))
        )

    def _take(self, keys: Tensor, values: Tensor, classes: Tensor) -> None:
        self._rows = {key: row for row, key in enumerate(keys.tolist())}
        self._values, self._classes = values, classes

    def lookup(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Classes (N,) and original φ (N, K) of pictures, on their device.

        Raises:
            ValueError: A picture is none of those that were remembered.
        """
        if not self._rows:
            raise ValueError(
                "no original explanation is known yet: call `remember` on the network to be pruned first"
            )
        try:
            rows = [self._rows[key] for key in picture_keys(images)]
        except KeyError:
            raise ValueError(
                "a calibration picture is not one of those whose original explanation is known: resume with the data, "
                "--image-size, --calibration-size, --calibration-batches and --data-backend that the run was started "
                "with"
            ) from None
        return self._classes[rows].to(images.device), self._values[rows].to(images.device)

    @torch.no_grad()
    def moved(
        self,
        model: nn.Module,
        batches: Iterable[tuple[Tensor, Tensor]],
        distributed: Distributed | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> float:
        """Mean squared difference of φ from the original network's, over pictures and numbers. Collective.

        Arguments as for `remember`; NaN without pictures.
        """
        distributed = distributed or Distributed()
        device = next(model.parameters()).device
        total = torch.zeros(2, dtype=torch.float64, device=device)
        with evaluation_mode(model):
            for images, _ in batches:
                classes, original = self.lookup(images)
                with autocast():
                    present = self.present(model, images, classes)
                total[0] += (present.double() - original.double()).square().mean(1).sum()
                total[1] += len(images)
        (total,) = distributed.all_reduce_sum(total)
        return float(total[0] / total[1]) if total[1] else float("nan")

    def follow(self, staying: Mapping[str, tuple[int, Tensor]]) -> None:
        """Follow a rewrite.

        Args:
            staying: From `staying_channels`, before the rewrite: tap → number of channels, positions that stay.
        """
        for tap, (width, positions) in staying.items():
            before = self.kept.get(tap, torch.arange(width))
            self.kept[tap] = before[positions]
        self.present = self._whole.rewritten(self.kept)

    def state_dict(self) -> dict[str, Any]:
        """Original values by picture, and the channels that rewrites have left of every tap."""
        keys = torch.tensor(list(self._rows), dtype=torch.int64)
        rows = list(self._rows.values())  # a picture that occurs twice has one key, and one row is enough
        return {
            "keys": keys,
            "values": self._values[rows],
            "classes": self._classes[rows],
            "kept": dict(self.kept),
            "source": None if self.source is None else dataclasses.asdict(self.source),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state of `state_dict`.

        Raises:
            ConfigError: Its values are those of another explanation.
        """
        known = state.get("source")
        if known is not None and self.source is not None and known["digest"] != self.source.digest:
            raise ConfigError(
                f"{self.source}: the run to resume follows another explanation, that of {Source(**known)}: give the "
                "one that it was started with, or start anew"
            )
        self._take(state["keys"], state["values"], state["classes"])
        self.kept = dict(state["kept"])
        self.present = self._whole.rewritten(self.kept)
