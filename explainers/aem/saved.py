"""A trained selector on disk, and as an explanation φ of its classifier (or of what became of it)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from explainers.aem.records import read_record
from explainers.aem.selector import Selector, SelectorDesign
from explainers.explanation import network_digest
from explainers.features import FeatureTaps
from image_classification.checkpoint import VERSION, save_atomically
from image_classification.config import ConfigError, check
from image_classification.models import (
    Structure,
    WeightsError,
    apply_weights,
    build_from_structure,
    capture_structure,
    identity_of,
    main_and_auxiliary_logits,
    unwrap,
)
from image_classification.models.weights import FORMAT

#: Key of a checkpoint's `callbacks` under which a selector's description lies.
SELECTOR_RECORD = "selector"


@dataclasses.dataclass(frozen=True)
class SelectorExplanation:
    """φ of a selector: raw (a, b, w), or the pixels of its mask.

    Attributes:
        selector: In evaluation mode, without gradients for its weights.
        arch: Architecture of the classifier that it explains, None where the file does not say.
        digest: `network_digest` of that classifier; None skips that check.
        figures: What was measured when it was saved.
        path: Where it was read.
        kept: See `Explanation.rewritten`.
    """

    selector: Selector
    arch: str | None = None
    digest: str | None = None
    figures: Mapping[str, float] = dataclasses.field(default_factory=dict)
    path: Path | None = None
    kept: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)

    @property
    def design(self) -> SelectorDesign:
        """What the selector was built from."""
        return self.selector.design

    @property
    def taps(self) -> tuple[str, ...]:
        """See `Explanation.taps`."""
        return self.design.taps

    @property
    def size(self) -> int:
        """Number of values per picture."""
        height, width = self.design.sizes[0]
        return 3 if self.design.kind == "rbf" else height * width

    def __call__(self, model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
        """See `Explanation.__call__`."""
        return self.selector.phi(self.raw(model, images, classes))

    def raw(self, model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
        """The selector's raw output for a batch; see `Selector.forward`."""
        return self.raw_and_logits(model, images, classes)[0]

    def raw_and_logits(
        self, model: nn.Module, images: Tensor, classes: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Raw output and the network's logits from one forward pass.

        Args:
            model, images: See `Explanation.__call__`.
            classes: (N,) int64; None: the network's own arg-max.
        """
        widths = dict(zip(self.design.taps, self.design.widths, strict=True))
        with FeatureTaps(model, self.design.taps, self.kept, widths) as caught:
            logits, _ = main_and_auxiliary_logits(model(images))
            chosen = logits.detach().argmax(1) if classes is None else classes
            return self.selector(caught.features, chosen), logits

    def rewritten(self, kept: Mapping[str, Tensor]) -> Self:
        """See `Explanation.rewritten`."""
        return dataclasses.replace(self, kept=dict(kept))

    def check_network(
        self, model: nn.Module, *, image_size: int, num_classes: int, flag: str = "--selector"
    ) -> None:
        """Make sure that this selector was trained for a network, before anything else is done.

        Args:
            model: The network as it was before any pruning.
            image_size: Side of the pictures that will be used.
            num_classes: Of the data.
            flag: Flag to name in messages.

        Raises:
            ConfigError: It was trained for another network, size of pictures or number of classes; the message says
                what differs.
        """
        name = f"{flag} {self.path}" if self.path is not None else flag
        identity = identity_of(model)
        arch = None if identity is None else identity.arch
        check(
            self.arch is None or arch is None or arch == self.arch,
            f"{name} explains --arch {self.arch}, not {arch}: train one for {arch} with `python -m explainers "
            "train-selector`",
        )
        check(
            self.design.num_classes == num_classes,
            f"{name} was trained for {self.design.num_classes} classes, but the data has {num_classes}: give the data "
            "that it was trained on, or train another",
        )
        check(
            self.design.image_size == image_size,
            f"{name} was trained on pictures of {self.design.image_size} pixels, not {image_size}: give --image-size "
            f"{self.design.image_size}",
        )
        modules = dict(unwrap(model).named_modules())
        missing = [tap for tap in self.taps if tap not in modules]
        check(not missing, f"{name} reads module {', '.join(missing)}, which the network does not have")
        check(
            self.digest is None or self.digest == network_digest(model),
            f"{name} was trained for other weights of {self.arch or 'the network'}: give --pretrained-weights the file "
            "that it was trained with, or train another",
        )


def selector_record(selector: Selector, model: nn.Module, digest: str | None = None) -> dict[str, Any]:
    """What a file says about a selector beside its weights, as plain data.

    Args:
        selector: It.
        model: The classifier that it explains.
        digest: Its `network_digest`, where that is known already.
    """
    identity = identity_of(model)
    return {
        "design": selector.design.to_plain(),
        "arch": None if identity is None else identity.arch,
        "digest": network_digest(model) if digest is None else digest,
        "black_box": None if identity is None else _described(model),
        "figures": {},
    }


def _described(model: nn.Module) -> dict[str, Any]:
    """A classifier whole, so that a selector's file can be shown and judged by itself."""
    return {"structure": capture_structure(model).to_plain(), "state_dict": unwrap(model).state_dict()}


def save_selector(
    path: str | Path, selector: Selector, model: nn.Module, figures: Mapping[str, float] | None = None
) -> None:
    """Write a selector as `load_selector` reads it; training writes the same with what it needs to go on.

    Args:
        path: File.
        selector: Trained for `model`.
        model: The classifier that it explains.
        figures: What was measured.
    """
    record = selector_record(selector, model) | {"figures": dict(figures or {})}
    payload = {
        "format": FORMAT, "version": VERSION, "arch": record["arch"], "structure": None,
        "state_dict": selector.state_dict(), "callbacks": {SELECTOR_RECORD: record},
    }  # fmt: skip
    save_atomically(payload, Path(path))


def load_selector(
    path: str | Path, *, device: torch.device | str | None = None, flag: str = "--selector"
) -> SelectorExplanation:
    """Read a selector: a checkpoint of `train-selector`, or what `save_selector` wrote.

    Args:
        path: File.
        device: Where to put it.
        flag: Flag to name in messages.

    Raises:
        ConfigError: There is no such file, or it holds no selector.
        WeightsError: It is damaged, would run code, or contradicts itself.
    """
    path = Path(path)
    payload, record = read_record(path, flag, "selector", SELECTOR_RECORD)
    try:
        selector = Selector(SelectorDesign.from_plain(record.get("design")))
        selector.load_state_dict(payload["state_dict"])
    except (ValueError, RuntimeError, KeyError) as error:
        raise WeightsError(f"{flag} {path} contradicts itself: {' '.join(str(error).split())}") from error
    selector = selector.to(device).eval().requires_grad_(False)
    return SelectorExplanation(
        selector, record.get("arch"), record.get("digest"), record.get("figures", {}), path
    )


def load_black_box(
    path: str | Path, *, device: torch.device | str | None = None, flag: str = "--selector"
) -> nn.Module:
    """The classifier that a selector's file explains, as it was then: frozen, in evaluation mode.

    Raises:
        ConfigError: See `load_selector`; or the file does not hold the classifier.
        ModelError: The file is damaged or contradicts itself.
    """
    _, record = read_record(Path(path), flag, "selector", SELECTOR_RECORD)
    held = record.get("black_box")
    if not isinstance(held, dict) or not isinstance(held.get("state_dict"), dict):
        raise ConfigError(
            f"{flag} {path} does not hold the network that it explains: it was none of create_model's"
        )
    model = build_from_structure(Structure.from_plain(held.get("structure")), device=device)
    apply_weights(model, held["state_dict"])
    return model.eval().requires_grad_(False)
