"""A classifier with CASM's decoder on its features, and the file that holds both.

The file is a LucidPrune checkpoint (so its classifier loads wherever a checkpoint does) with one additional entry:

    casm    taps, channels, width, image_size, kept (remaining channels of a pruned classifier), decoder (state dict)
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, nn

from explainers.casm.classifier_taps import Taps, find_casm_taps
from explainers.casm.decoder import UPSAMPLE, CasmDecoder, Upsample, enlarged
from explainers.differentiable.features import FeatureTaps
from image_classification.checkpoint import save_atomically
from image_classification.checkpoint_format import (
    FORMAT,
    POSITIVE,
    STATE,
    TEXT,
    Entry,
    FormatError,
    check_entries,
    list_of,
)
from image_classification.models import (
    build_from_structure,
    capture_structure,
    identity_of,
    main_and_auxiliary_logits,
    read_safely,
    unwrap,
)
from image_classification.models.fitting_weights import build_exactly, load_exactly
from image_classification.models.weights import structure_in
from image_classification.models.weights_reading import WeightsError
from image_classification.plain_data import PlainMapping

KEY = "casm"
#: What stands in that entry of a checkpoint.
_ENTRY = {
    "taps": list_of(TEXT),
    "channels": list_of(POSITIVE),
    "width": POSITIVE,
    "image_size": POSITIVE,
    "kept": STATE,
    "decoder": STATE,
    "upsample": Entry(lambda value: value in get_args(Upsample), f"one of {', '.join(get_args(Upsample))}"),
}


class Casm(nn.Module):
    """Classifier and decoder.

    Args:
        classifier: Any classifier.
        decoder: Decoder for the channels of `taps`.
        taps: Modules of the classifier that the decoder reads, the base first.
        image_size: Side of the images it was trained for, in pixels.
        kept: See `FeatureTaps`.
        upsample: Mode for enlarging masks to the images' size.
    """

    def __init__(
        self,
        classifier: nn.Module,
        decoder: CasmDecoder,
        taps: tuple[str, ...],
        image_size: int,
        kept: Mapping[str, Tensor] | None = None,
        upsample: Upsample = UPSAMPLE,
    ) -> None:
        super().__init__()
        self.classifier = classifier
        self.decoder = decoder
        self.upsample = upsample
        self.taps = tuple(taps)
        self.image_size = image_size
        self.kept = dict(kept or {})

    @classmethod
    def for_classifier(
        cls, classifier: nn.Module, image_size: int, width: int, upsample: Upsample = UPSAMPLE
    ) -> Casm:
        """Build a fresh decoder for a classifier; the caller sets device and memory format.

        Raises:
            ValueError: The classifier's feature maps are unsuitable.
        """
        device = next(classifier.parameters()).device
        found: Taps = find_casm_taps(classifier, torch.zeros(1, 3, image_size, image_size, device=device))
        return cls(classifier, CasmDecoder(found.channels, width), found.names, image_size, upsample=upsample)

    @property
    def widths(self) -> dict[str, int]:
        """Number of channels that the decoder expects at each tap."""
        return dict(zip(self.taps, self.decoder.channels, strict=True))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (N, L) and masks (N, 1, H, W) in (0, 1), float32, of images (N, 3, H, W)."""
        with FeatureTaps(self.classifier, self.taps, self.kept, self.widths) as taps:
            logits, _ = main_and_auxiliary_logits(self.classifier(images))
            features = taps.features
        return logits, enlarged(self.decoder(features), images.shape[2:], self.upsample)

    def entry(self) -> dict[str, object]:
        """Return the `casm` entry of a checkpoint: plain data and tensors."""
        return {
            "taps": list(self.taps),
            "channels": list(self.decoder.channels),
            "width": self.decoder.width,
            "image_size": self.image_size,
            "kept": {name: positions.cpu() for name, positions in self.kept.items()},
            "decoder": self.decoder.state_dict(),
            "upsample": self.upsample,
        }


def save_casm(path: str | Path, casm: Casm) -> None:
    """Write a CASM for inference; a training run's checkpoint also holds the state needed to resume.

    Raises:
        ModelError: The classifier was not built by `create_model`, so a file cannot describe it.
        OSError: The file cannot be written.
    """
    structure = capture_structure(casm.classifier).to_plain()
    payload = {
        "format": FORMAT,
        "arch": structure["arch"],
        "structure": structure,
        "state_dict": unwrap(casm.classifier).state_dict(),
        KEY: casm.entry(),
    }
    save_atomically(payload, Path(path))


def load_casm(path: str | Path, *, device: torch.device | str | None = None) -> Casm:
    """Read a CASM from a file of `save_casm` or a training checkpoint; in evaluation mode, without gradients.

    Raises:
        FileNotFoundError: The file does not exist.
        WeightsError: The file holds no CASM or is inconsistent.
    """
    path = Path(path)
    payload = read_safely(path)
    if not (isinstance(payload, Mapping) and payload.get("format") == FORMAT and KEY in payload):
        raise WeightsError(
            f"{path} holds no saliency mapping (CASM): give a file that `python -m explainers train-casm` wrote; "
            "a file of the published program becomes one by `python -m pruning import FILE OUT`"
        )
    classifier = build_from_structure(structure_in(payload, path), device=device)
    load_exactly(classifier, payload["state_dict"], path, "classifier")
    casm = casm_from_entry(classifier, payload[KEY], path)
    return casm.to(device).eval().requires_grad_(False)


def casm_from_entry(classifier: nn.Module, entry: PlainMapping, path: Path) -> Casm:
    """Build the CASM that a checkpoint's entry describes on top of a loaded classifier.

    Raises:
        WeightsError: The entry is incomplete, or belongs to another classifier.
    """
    try:
        check_entries(entry, _ENTRY, "its saliency mapping's")
    except FormatError as error:
        raise WeightsError(f"{path}: {error}") from error
    missing = _ENTRY.keys() - {"upsample"} - entry.keys()
    if missing:
        raise WeightsError(
            f"{path}: its saliency mapping lacks {', '.join(sorted(missing))}; take another copy"
        )
    modules = dict(classifier.named_modules())
    absent = [name for name in entry["taps"] if name not in modules]
    if absent:
        identity = identity_of(classifier)
        raise WeightsError(
            f"{path}: its decoder reads module {absent[0]!r}, which {identity.arch if identity else 'the classifier'} "
            "does not have: it was trained on another architecture"
        )
    if len(entry["channels"]) != len(entry["taps"]):
        raise WeightsError(f"{path}: its saliency mapping's channels are not one number for each of its taps")
    build = functools.partial(CasmDecoder, entry["channels"], entry["width"])
    decoder = build_exactly(build, entry["decoder"], path, "decoder")
    return Casm(
        classifier,
        decoder,
        tuple(entry["taps"]),
        int(entry["image_size"]),
        entry["kept"],
        entry.get("upsample", "nearest"),
    )
