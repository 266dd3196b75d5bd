"""A trained selector on disk, and as an explanation φ of its classifier or of a pruned version of it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from explainers.aem.records import read_record
from explainers.aem.selector import Selector, SelectorDesign
from explainers.differentiable.explanation import network_digest
from explainers.differentiable.features import FeatureTaps
from image_classification.checkpoint import save_atomically
from image_classification.checkpoint_format import FORMAT, STATE
from image_classification.config import SettingError, check_setting
from image_classification.models import (
    WeightsError,
    apply_weights,
    build_from_structure,
    capture_structure,
    identity_of,
    main_and_auxiliary_logits,
    unwrap,
)
from image_classification.models.fitting_weights import build_exactly
from image_classification.models.weights import structure_in

#: Key in a checkpoint's `callbacks` that holds a selector's description.
SELECTOR_RECORD = "selector"


@dataclasses.dataclass(frozen=True)
class SelectorExplanation:
    """φ of a selector: raw (a, b, w), or the pixels of its mask.

    Attributes:
        selector: In evaluation mode, without gradients for its weights.
        arch: Architecture of the classifier it explains, None if the file does not record it.
        digest: `network_digest` of that classifier; None skips that check.
        figures: Figures measured when it was saved.
        path: File it was read from.
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
        """The design the selector was built from."""
        return self.selector.design

    @property
    def taps(self) -> tuple[str, ...]:
        """See `Explanation.taps`."""
        return self.design.taps

    @property
    def size(self) -> int:
        """Number of values per image."""
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
        """Return the raw output and the network's logits from one forward pass.

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

    def check_network(self, model: nn.Module, *, image_size: int, num_classes: int) -> None:
        """Check that this selector was trained for a network.

        Args:
            model: The network before any pruning.
            image_size: Side of the images that will be used.
            num_classes: Number of classes of the data.

        Raises:
            SettingError: It was trained for another network, image size or number of classes; the message says
                what differs.
        """
        identity = identity_of(model)
        arch = None if identity is None else identity.arch
        self._check(
            self.arch is None or arch is None or arch == self.arch,
            f"it explains {self.arch}, not {arch}: train one for {arch} with `python -m explainers train-selector`",
        )
        self._check(
            self.design.num_classes == num_classes,
            f"it was trained for {self.design.num_classes} classes, but the data has {num_classes}: give the data that "
            "it was trained on, or train another",
        )
        self._check(
            self.design.image_size == image_size,
            f"it was trained on images of {self.design.image_size} pixels, not {image_size}: give `image_size` "
            f"{self.design.image_size}",
        )
        modules = dict(unwrap(model).named_modules())
        missing = [tap for tap in self.taps if tap not in modules]
        self._check(not missing, f"it reads module {', '.join(missing)}, which the network does not have")
        self._check(
            self.digest is None or self.digest == network_digest(model),
            f"it was trained for other weights of {self.arch or 'the network'}: give the weights that it was trained "
            "with, or train another",
        )

    def _check(self, condition: bool, problem: str) -> None:
        check_setting(condition, "selector", "in memory" if self.path is None else str(self.path), problem)


def selector_record(selector: Selector, model: nn.Module, digest: str | None = None) -> dict[str, object]:
    """Return a selector's description for its file, as plain data.

    Args:
        selector: The selector.
        model: The classifier it explains.
        digest: The classifier's `network_digest`, if already computed.
    """
    identity = identity_of(model)
    return {
        "design": selector.design.to_plain(),
        "arch": None if identity is None else identity.arch,
        "digest": network_digest(model) if digest is None else digest,
        "black_box": None if identity is None else _described(model),
        "figures": {},
    }


def _described(model: nn.Module) -> dict[str, object]:
    """Describe a classifier with its weights, so that the selector's file alone suffices to show and judge the
    selector.
    """
    return {"structure": capture_structure(model).to_plain(), "state_dict": unwrap(model).state_dict()}


def save_selector(
    path: str | Path, selector: Selector, model: nn.Module, figures: Mapping[str, float] | None = None
) -> None:
    """Write a selector for `load_selector`; training writes the same content plus the state needed to resume.

    Args:
        path: File.
        selector: Trained for `model`.
        model: The classifier it explains.
        figures: Measured figures to store with it.
    """
    record = selector_record(selector, model) | {"figures": dict(figures or {})}
    payload = {
        "format": FORMAT,
        "arch": record["arch"],
        "structure": None,
        "state_dict": selector.state_dict(),
        "callbacks": {SELECTOR_RECORD: record},
    }
    save_atomically(payload, Path(path))


def load_selector(path: str | Path, *, device: torch.device | str | None = None) -> SelectorExplanation:
    """Read a selector from a checkpoint of `train-selector` or a file of `save_selector`.

    Args:
        path: File.
        device: Device to load it onto.

    Raises:
        SettingError: The file does not exist or holds no selector.
        WeightsError: The file is damaged, would run code, or is inconsistent.
    """
    path = Path(path)
    payload, record = read_record(path, SELECTOR_RECORD)
    try:
        design = SelectorDesign.from_plain(record.get("design"))
    except ValueError as error:
        raise WeightsError(f"{path} contradicts itself: {' '.join(str(error).split())}") from error
    build = functools.partial(Selector, design)
    selector = build_exactly(build, payload.get("state_dict", {}), path, "selector")
    selector = selector.to(device).eval().requires_grad_(False)
    return SelectorExplanation(
        selector, record.get("arch"), record.get("digest"), record.get("figures", {}), path
    )


def load_black_box(path: str | Path, *, device: torch.device | str | None = None) -> nn.Module:
    """Load the classifier stored in a selector's file, frozen and in evaluation mode.

    Raises:
        SettingError: See `load_selector`; or the file does not hold the classifier.
        ModelError: The file is damaged or inconsistent.
    """
    _, record = read_record(Path(path), SELECTOR_RECORD)
    held = record.get("black_box")
    if not isinstance(held, dict) or not STATE.holds(held.get("state_dict")):
        raise SettingError(
            "selector",
            str(path),
            "the file does not hold the network that it explains, which `create_model` did not build",
        )
    model = build_from_structure(structure_in(held, Path(path)), device=device)
    apply_weights(model, held["state_dict"])
    return model.eval().requires_grad_(False)
