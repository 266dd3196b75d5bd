"""The selector: a decoder on a classifier's feature maps that predicts where the classifier looks.

Ganjdanesh et al. 2022, section 3.2 and supplement. Its encoder is the classifier itself, frozen; the deepest of its
feature maps is gated by the class, decoded scale by scale, and a head gives either the three numbers of an RBF mask
("rbf") or two maps for a mask per pixel ("real-x", Jethani et al. 2021).

Two decoders: "published", whose sub-pixel up-sampling takes 143 M parameters on ResNet-50, and "light", which first
brings every scale down to at most 64 channels and adds instead of concatenating (a feature pyramid).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from explainers.aem.masks import (
    MaskGeometry,
    at_least_float32,
    centres_and_widths,
    rbf_masks,
    relaxed_bernoulli,
    to_size,
)
from explainers.attribution.method import dtype_of
from explainers.differentiable.features import FeatureTaps, find_taps
from image_classification.checkpoint_format import POSITIVE, TABLE, TEXT, Entry, check_entries, list_of
from image_classification.config import check_choice
from image_classification.models import evaluating
from image_classification.plain_data import PlainValue

Kind = Literal["rbf", "real-x"]
DecoderName = Literal["published", "light"]
#: Default decoder.
DECODER: DecoderName = "published"
#: What stands in a file of a selector's design.
_ENTRIES = {
    "kind": TEXT,
    "decoder": TEXT,
    "num_classes": POSITIVE,
    "taps": list_of(TEXT),
    "widths": list_of(POSITIVE),
    "sizes": list_of(list_of(POSITIVE, 2)),
    "geometry": TABLE,
    "row_first": Entry(lambda value: isinstance(value, bool), "true or false"),
}
LIGHT_WIDTH = 64


@dataclasses.dataclass(frozen=True)
class SelectorDesign:
    """Everything needed to build a selector, as plain data.

    Attributes:
        kind: "rbf" or "real-x".
        decoder: "published" or "light".
        num_classes: Number of classes of the classifier.
        taps: Modules of the classifier whose feature maps are read, shallow to deep.
        widths: Channels of those feature maps.
        sizes: Heights and widths of those feature maps.
        geometry: Frame and range of RBF masks; its `image_size` is the side of the images.
        row_first: Whether the first raw output of an RBF selector moves the row of its centre, as published. In files
            written before this was recorded, it moves the column.
    """

    kind: str
    decoder: str
    num_classes: int
    taps: tuple[str, ...]
    widths: tuple[int, ...]
    sizes: tuple[tuple[int, int], ...]
    geometry: MaskGeometry
    row_first: bool = True

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, get_args(Kind))
        check_choice("decoder", self.decoder, get_args(DecoderName))
        if not len(self.taps) == len(self.widths) == len(self.sizes) >= 2:
            raise ValueError(f"a selector needs at least 2 scales, one width and size for each: {self}")

    @property
    def image_size(self) -> int:
        """Side of the images."""
        return self.geometry.image_size

    def to_plain(self) -> dict[str, object]:
        """Return the design as dicts, lists and numbers, for `torch.save` and JSON."""
        plain = dataclasses.asdict(self)
        return plain | {
            "taps": list(self.taps),
            "widths": list(self.widths),
            "sizes": [list(size) for size in self.sizes],
        }

    @classmethod
    def from_plain(cls, plain: PlainValue) -> SelectorDesign:
        """Build a design from the output of `to_plain`.

        Raises:
            ValueError: `plain` does not have that form.
        """
        check_entries(plain, _ENTRIES, "its selector's")
        missing = _ENTRIES.keys() - {"row_first"} - plain.keys()
        if missing:
            raise ValueError(f"not a description of a selector: it lacks {', '.join(sorted(missing))}")
        return cls(
            kind=plain["kind"],
            decoder=plain["decoder"],
            num_classes=plain["num_classes"],
            taps=tuple(plain["taps"]),
            widths=tuple(plain["widths"]),
            sizes=tuple((height, width) for height, width in plain["sizes"]),
            geometry=MaskGeometry.from_plain(plain["geometry"]),
            row_first=plain.get("row_first", False),
        )


def design_selector(
    model: nn.Module,
    example_images: Tensor,
    *,
    kind: str,
    geometry: MaskGeometry,
    num_classes: int,
    decoder: str = DECODER,
    num_scales: int | None = None,
) -> SelectorDesign:
    """Design a selector for a classifier and an image size.

    Args:
        model: The classifier; run once or twice in evaluation mode on the example.
        example_images: (N, 3, S, S) images of the size that will be used.
        kind, decoder: See the module docstring.
        geometry: Its `image_size` is S.
        num_classes: Number of classes of the classifier.
        num_scales: Number of the deepest scales to read; None: `default_num_scales`.

    Raises:
        ValueError: The images are too small for the classifier to have that many scales.
    """
    wanted = default_num_scales(geometry.image_size) if num_scales is None else num_scales
    taps = find_taps(model, example_images, wanted)
    with evaluating(model), FeatureTaps(model, taps) as caught, torch.no_grad():
        model(example_images[:1].to(dtype_of(model)))
        shapes = [tuple(feature.shape) for feature in caught.features]
    return SelectorDesign(
        kind,
        decoder,
        num_classes,
        taps,
        tuple(shape[1] for shape in shapes),
        tuple((shape[2], shape[3]) for shape in shapes),
        geometry,
    )


def default_num_scales(image_size: int) -> int:
    """3 scales for CIFAR-sized images and 4 for ImageNet-sized ones, as published."""
    return 3 if image_size < 96 else 4


class Selector(nn.Module):
    """Decoder with class gate and head; see the module docstring.

    Args:
        design: The design to build.
    """

    def __init__(self, design: SelectorDesign) -> None:
        super().__init__()
        self.design = design
        self.embedding = nn.Embedding(design.num_classes, design.widths[-1])
        decoder = PublishedDecoder if design.decoder == "published" else LightDecoder
        self.decoder = decoder(design.widths)
        if design.kind == "rbf":
            # One kernel over the whole remaining map.
            self.head = nn.Conv2d(self.decoder.out_channels, 3, design.sizes[0])
            assert self.head.bias is not None
            nn.init.zeros_(self.head.bias)
            with torch.no_grad():
                self.head.bias[2] = design.geometry.initial_width
        else:
            self.head = nn.Conv2d(self.decoder.out_channels, 2, 1, bias=False)

    def forward(self, features: Sequence[Tensor], classes: Tensor) -> Tensor:
        """Decode feature maps into a mask's raw output.

        Args:
            features: (N, C, h, w) per tap of the design, shallow to deep.
            classes: (N,) int64.

        Returns:
            Raw output: (N, 3) = (row, column, width) for "rbf", (N, 2, h, w) at the shallowest scale for "real-x".

        Raises:
            ValueError: The feature maps have other shapes than the design's: other images or another network.
        """
        self._check(features)
        *shallow, deepest = features
        weights = self.embedding(classes)
        gate = torch.sigmoid((deepest * weights[:, :, None, None]).sum(1, keepdim=True))
        decoded = at_least_float32(self.decoder([*shallow, deepest * gate]))
        # Half precision would round a centre to an eighth of a pixel.
        with torch.autocast(decoded.device.type, enabled=False):
            raw: Tensor = self.head(decoded)
        return raw.flatten(1) if self.design.kind == "rbf" else raw

    def _check(self, features: Sequence[Tensor]) -> None:
        expected = [(width, *size) for width, size in zip(self.design.widths, self.design.sizes, strict=True)]
        found = [tuple(feature.shape[1:]) for feature in features]
        if found != expected:
            raise ValueError(
                f"the selector was made for feature maps of {expected} (images of {self.design.image_size} pixels), "
                f"but gets {found}: give the network and the size of images that it was trained with"
            )

    def phi(self, raw: Tensor) -> Tensor:
        """The values matched between networks: (N, K), float32 (float64 for float64 networks).

        The raw (a, b, w) for "rbf"; the mask's pixels for "real-x".
        """
        return at_least_float32(raw) if self.design.kind == "rbf" else self.cells(raw).flatten(1)

    def cells(self, raw: Tensor) -> Tensor:
        """Masks of a "real-x" selector at their own resolution, (N, 1, h, w): |a| / (|a| + |b| + 1e-8)."""
        magnitudes = at_least_float32(raw).abs()
        first, second = magnitudes[:, :1], magnitudes[:, 1:]
        return first / (first + second + 1e-8)

    def mask(self, raw: Tensor, size: int) -> Tensor:
        """Return masks as probabilities, without noise: (N, 1, size, size) in [0, 1]."""
        if self.design.kind == "real-x":
            return to_size(self.cells(raw), size)
        geometry = self.design.geometry
        return rbf_masks(*centres_and_widths(self._row_first(raw), geometry), size, geometry)

    def sample(self, raw: Tensor, temperature: float, *, hard: bool = False) -> Tensor:
        """Draw relaxed Bernoulli samples of the masks, (N, 1, S, S) for images of side S.

        Per-pixel masks are drawn at their own resolution: a cell is kept or dropped as a whole.
        """
        size = self.design.image_size
        if self.design.kind == "real-x":
            return to_size(relaxed_bernoulli(self.cells(raw), temperature, hard=hard), size)
        return relaxed_bernoulli(self.mask(raw, size), temperature, hard=hard)

    def centres(self, raw: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Return centres (N, 2) and widths (N,) of RBF masks in pixels of images of side `size`."""
        assert self.design.kind == "rbf", "only RBF masks have a centre and a width"
        centres, widths = centres_and_widths(self._row_first(raw), self.design.geometry)
        scale = size / self.design.image_size
        return centres * scale, widths * scale

    def _row_first(self, raw: Tensor) -> Tensor:
        """Return raw outputs (N, 3) in the order row, column, width."""
        return raw if self.design.row_first else raw[:, [1, 0, 2]]


class PublishedDecoder(nn.Module):
    """Per level: sub-pixel up-sampling to the next scale, concatenation with it, a residual block.

    Args:
        widths: Channels per scale, shallow to deep.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            _Level(deep, shallow) for shallow, deep in zip(widths[-2::-1], widths[:0:-1], strict=True)
        )
        self.out_channels = widths[0]

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Decode maps (N, C, h, w) per scale, shallow to deep, to (N, C, h, w) of the shallowest scale."""
        *shallow, x = features
        for level, feature in zip(self.levels, reversed(shallow), strict=True):
            x = level(x, feature)
        return x


class _Level(nn.Module):
    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.expand = nn.Sequential(
            nn.Conv2d(in_channels, 4 * channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(4 * channels),
            nn.ReLU(),
        )
        self.shuffle = nn.PixelShuffle(2)
        self.relu = nn.ReLU()
        self.block = _Block(2 * channels, channels)

    def forward(self, x: Tensor, feature: Tensor) -> Tensor:
        up = _fit(self.relu(self.shuffle(self.expand(x))), feature)
        refined: Tensor = self.block(torch.cat([up, feature], 1))
        return refined


class _Block(nn.Module):
    """Basic residual block with a projected shortcut."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential(
            nn.Conv2d(in_channels, channels, 1, bias=False), nn.BatchNorm2d(channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        branch = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(branch + self.shortcut(x))


class LightDecoder(nn.Module):
    """Feature pyramid: 1×1 convolutions to at most 64 channels, up-sampling and addition, a 3×3 convolution per level.

    Args:
        widths: Channels per scale, shallow to deep.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.out_channels = min(LIGHT_WIDTH, widths[0])
        self.lateral = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, self.out_channels, 1, bias=False), nn.BatchNorm2d(self.out_channels)
            )
            for width in widths
        )
        self.smooth = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(self.out_channels, self.out_channels, 3, padding=1, bias=False),
                nn.BatchNorm2d(self.out_channels),
                nn.ReLU(),
            )
            for _ in widths[1:]
        )

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Decode maps (N, C, h, w) per scale, shallow to deep, to (N, out_channels, h, w) of the shallowest scale."""
        rest: list[Tensor]
        x: Tensor
        *rest, x = [lateral(feature) for lateral, feature in zip(self.lateral, features, strict=True)]
        for smooth, side in zip(self.smooth, reversed(rest), strict=True):
            x = smooth(F.relu(side + F.interpolate(x, size=side.shape[2:], mode="nearest")))
        return x


def _fit(x: Tensor, like: Tensor) -> Tensor:
    """Resize a map to another's size, for scales that are not exactly halves of each other."""
    if x.shape[2:] == like.shape[2:]:
        return x
    return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)
