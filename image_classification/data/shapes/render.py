"""Drawing the images of `shapes`: one textured object (or several) before a cluttered background.

The class is determined by the pair of outline and texture of the object: each outline and each texture belongs to
several classes, so neither is enough alone. Colours, size, position and rotation are drawn from the same distributions
for every class. The background (gradient, noise of several scales, blobs with flat colour or with the objects' own
textures, lines) is drawn from a separate random stream, independent of the class. So only the object reveals the class,
which is the ground truth for explanations.

Object pixels replace background pixels, without blending: the mask is exact before JPEG compression.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

CLASSES: tuple[tuple[str, str], ...] = (
    ("checked", "ring"), ("checked", "star"), ("checked", "triangle"),
    ("dotted", "cross"), ("dotted", "disk"), ("dotted", "triangle"),
    ("mottled", "cross"), ("mottled", "ring"), ("mottled", "square"),
    ("striped", "disk"), ("striped", "square"), ("striped", "star"),
)  # fmt: skip
CLASS_NAMES = tuple(f"{texture}_{outline}" for texture, outline in CLASSES)
TEXTURES = ("checked", "dotted", "mottled", "striped")

_SHORT_SIDE = (72, 200)
_RADIUS_ALONE = (0.31, 0.48)  # relative to the image's short side
_RADIUS_AMONG_OTHERS = (0.18, 0.29)
_MAX_TURN = 0.4  # rotation of an outline, in radians; textures rotate freely
_MIN_VISIBLE = 0.75  # visible share of each object, if several overlap
_LUMA = np.array([0.299, 0.587, 0.114])


class Layer(NamedTuple):
    """An object to be put into an image.

    Attributes:
        colours: (h, w, 3) uint8.
        inside: (h, w) bool, the pixels that belong to the object.
        top, left: Position of the layer's corner.
        label: Class index.
    """

    colours: np.ndarray
    inside: np.ndarray
    top: int
    left: int
    label: int


@dataclass(frozen=True, eq=False)
class ShapesImage:
    """A finished image and its ground truth.

    Attributes:
        image: (H, W, 3) uint8.
        mask: (H, W) uint8, class index + 1 on the object's visible pixels, 0 elsewhere.
        boxes: (k, 4) float32 bounds `x0, y0, x1, y1` of the visible pixels, ends exclusive.
        labels: (k,) int64 class index of each box.
        quality: JPEG quality to save with.
    """

    image: np.ndarray
    mask: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    quality: int


class Streams(NamedTuple):
    """Independent random streams of one image: its classes, its background, its objects."""

    classes: np.random.Generator
    background: np.random.Generator
    objects: np.random.Generator


def streams(seed: int, split: str, index: int) -> Streams:
    """Create the streams of image `index` of a split: a pure function of its arguments."""
    sequence = np.random.SeedSequence((seed, ("train", "val").index(split), index))
    return Streams(*(np.random.default_rng(child) for child in sequence.spawn(3)))


def labels_of(seed: int, split: str, index: int, multi_label: bool) -> tuple[int, ...]:
    """Return the classes in an image: one, each in turn; for multi-label sets, one to three different ones at
    random.
    """
    if not multi_label:
        return (index % len(CLASSES),)
    stream = streams(seed, split, index).classes
    return tuple(int(label) for label in stream.permutation(len(CLASSES))[: stream.integers(1, 4)])


def render(seed: int, split: str, index: int, labels: tuple[int, ...]) -> ShapesImage:
    """Draw image `index` of a split with objects of the given classes; later objects cover earlier ones."""
    _, background_stream, object_stream = streams(seed, split, index)
    background = draw_background(background_stream)
    quality = int(background_stream.integers(82, 96))
    layers = place_objects(object_stream, background.shape[:2], labels)
    image, mask = compose(background, layers)
    boxes = np.array([bounds(mask == label + 1) for label in labels], np.float32)
    return ShapesImage(image, mask, boxes, np.array(labels, np.int64), quality)


def compose(background: np.ndarray, layers: list[Layer]) -> tuple[np.ndarray, np.ndarray]:
    """Put objects in front of a background and return the image and its mask. The background is not modified."""
    image = background.copy()
    mask = np.zeros(image.shape[:2], np.uint8)
    for layer in layers:
        height, width = layer.inside.shape
        rows, columns = slice(layer.top, layer.top + height), slice(layer.left, layer.left + width)
        image[rows, columns][layer.inside] = layer.colours[layer.inside]
        mask[rows, columns][layer.inside] = layer.label + 1
    return image, mask


def bounds(pixels: np.ndarray) -> tuple[int, int, int, int]:
    """Return tight bounds `x0, y0, x1, y1` (ends exclusive) of the true pixels of an (H, W) array."""
    rows, columns = np.flatnonzero(pixels.any(axis=1)), np.flatnonzero(pixels.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def place_objects(stream: np.random.Generator, size: tuple[int, int], labels: tuple[int, ...]) -> list[Layer]:
    """Draw the objects at random positions where each stays visible.

    Objects are drawn again, gradually smaller, until none is covered by more than a quarter.
    """
    span = _RADIUS_ALONE if len(labels) == 1 else _RADIUS_AMONG_OTHERS
    shrink = 1.0
    while True:
        radii = [shrink * stream.uniform(*span) * min(size) for _ in labels]
        layers = [
            draw_object(stream, size, label, radius) for label, radius in zip(labels, radii, strict=True)
        ]
        if len(layers) == 1 or _all_visible(size, layers):
            return layers
        shrink *= 0.97


def _all_visible(size: tuple[int, int], layers: list[Layer]) -> bool:
    _, mask = compose(np.zeros((*size, 3), np.uint8), layers)
    return all((mask == layer.label + 1).sum() >= _MIN_VISIBLE * layer.inside.sum() for layer in layers)


def draw_object(stream: np.random.Generator, size: tuple[int, int], label: int, radius: float) -> Layer:
    """Draw an object of a class, wholly inside an image of `size` (height, width)."""
    texture, outline = CLASSES[label]
    centre_y = stream.uniform(radius, size[0] - radius)
    centre_x = stream.uniform(radius, size[1] - radius)
    top, left = max(int(centre_y - radius), 0), max(int(centre_x - radius), 0)
    bottom = min(int(np.ceil(centre_y + radius)), size[0])
    right = min(int(np.ceil(centre_x + radius)), size[1])
    y = (np.arange(top, bottom, dtype=np.float32)[:, None] + 0.5 - centre_y) / radius
    x = (np.arange(left, right, dtype=np.float32)[None, :] + 0.5 - centre_x) / radius
    angle = stream.uniform(-_MAX_TURN, _MAX_TURN)
    squeeze = stream.uniform(1.0, 1.2)
    u = np.cos(angle) * x + np.sin(angle) * y
    v = (np.cos(angle) * y - np.sin(angle) * x) * squeeze
    inside = OUTLINES[outline](u, v)
    # The texture rotates independently of the outline, and its grain is a share of the object.
    fabric = draw_texture(stream, texture, x, y, stream.uniform(0.36, 0.56))
    colours = _shade(stream, fabric, x, y)
    return Layer(colours, inside, top, left, label)


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Five points: inside the line between a point (radius 1) and a notch (radius 0.45)."""
    notch = 0.45
    step = np.pi / 5
    turn = np.abs((np.arctan2(v, u) + step) % (2 * step) - step)
    cross = np.array([notch * np.cos(step) - 1.0, notch * np.sin(step)])
    radius = np.hypot(u, v)
    # The edge from (1, 0) to the notch, as a half-plane in the folded sector.
    inside: np.ndarray = cross[0] * (radius * np.sin(turn)) - cross[1] * (radius * np.cos(turn) - 1.0) >= 0
    return inside


OUTLINES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "cross": lambda u, v: (np.maximum(abs(u), abs(v)) <= 0.95) & (np.minimum(abs(u), abs(v)) <= 0.32),
    "disk": lambda u, v: u * u + v * v <= 0.9,
    "ring": lambda u, v: (u * u + v * v <= 1.0) & (u * u + v * v >= 0.25),
    "square": lambda u, v: np.maximum(abs(u), abs(v)) <= 0.72,
    "star": _star,
    "triangle": lambda u, v: (v >= -0.5) & (np.sqrt(3) * abs(u) + v <= 1.0),
}
"""Outline by name: true where the point (u, v) of the object's own frame, radius 1, lies inside."""


def draw_texture(
    stream: np.random.Generator, name: str, x: np.ndarray, y: np.ndarray, grain: float
) -> np.ndarray:
    """Draw a two-valued pattern softened at its edges, (h, w) in [0, 1], over coordinates x (1, w) and y (h, 1).

    Args:
        stream: Random stream for the rotation and phase.
        name: One of `TEXTURES`.
        x, y: Coordinates in object radii.
        grain: Period of the pattern in object radii.
    """
    angle = stream.uniform(0, 2 * np.pi)
    frequency = 2 * np.pi / grain
    u = frequency * (np.cos(angle) * x + np.sin(angle) * y) + stream.uniform(0, 2 * np.pi)
    v = frequency * (np.cos(angle) * y - np.sin(angle) * x) + stream.uniform(0, 2 * np.pi)
    if name == "striped":
        wave = np.sin(u) + 0 * v
    elif name == "checked":
        wave = 1.5 * np.sin(0.75 * u) * np.sin(0.75 * v)
    elif name == "dotted":
        wave = np.cos(u) + np.cos(v) - 0.6
    else:  # mottled: irregular patches of about the same grain, from smooth noise
        cells = (max(2, round(float(np.ptp(y)) / grain * 2.4)), max(2, round(float(np.ptp(x)) / grain * 2.4)))
        wave = smooth_noise(stream, cells, np.broadcast_shapes(x.shape, y.shape)) * 1.5
    fabric: np.ndarray = (0.5 + 1.6 * wave).clip(0, 1)
    return fabric


def smooth_noise(stream: np.random.Generator, cells: tuple[int, int], size: tuple[int, ...]) -> np.ndarray:
    """Return Gaussian values on a coarse grid, enlarged bicubically to `size` (height, width): (h, w) float32."""
    grid = stream.standard_normal(cells, dtype=np.float32)
    return np.asarray(Image.fromarray(grid).resize((size[1], size[0]), Image.Resampling.BICUBIC))


def random_colour(stream: np.random.Generator, luma: float) -> np.ndarray:
    """Return a colour of the given brightness in [0, 1], any hue and moderate saturation: (3,) in [0, 255]."""
    colour = stream.uniform(0.15, 0.85, 3)
    colour += luma - colour @ _LUMA
    return (colour * 255).clip(0, 255)


def _shade(stream: np.random.Generator, fabric: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Colour a pattern with a dark and a light colour, light it from one side, add grain: (h, w, 3) uint8."""
    dark = stream.uniform(0.08, 0.45)
    light = stream.uniform(dark + 0.35, 0.95)
    first, second = random_colour(stream, dark), random_colour(stream, light)
    if stream.random() < 0.5:
        first, second = second, first
    colours = first + fabric[..., None].astype(np.float32) * (second - first)
    angle = stream.uniform(0, 2 * np.pi)
    lighting = 1 + stream.uniform(0, 0.25) * (np.cos(angle) * x + np.sin(angle) * y)
    noise = stream.standard_normal(fabric.shape, dtype=np.float32) * stream.uniform(2, 9)
    shaded: np.ndarray = (colours * lighting[..., None] + noise[..., None]).clip(0, 255).astype(np.uint8)
    return shaded


def draw_background(stream: np.random.Generator) -> np.ndarray:
    """Draw a cluttered image without an object: (H, W, 3) uint8 of random size. It does not depend on the class."""
    short = int(stream.integers(_SHORT_SIDE[0], _SHORT_SIDE[1] + 1))
    long = int(short * stream.uniform(1.0, 1.5))
    size = (short, long) if stream.random() < 0.75 else (long, short)
    canvas = _noise_and_gradient(stream, size)
    for _ in range(int(stream.integers(0, 4))):
        _add_blob(stream, canvas)
    image = Image.fromarray(canvas.clip(0, 255).astype(np.uint8))
    _add_lines(stream, image)
    noise = stream.standard_normal(size, dtype=np.float32) * stream.uniform(2, 9)
    background: np.ndarray = (np.asarray(image) + noise[..., None]).clip(0, 255).astype(np.uint8)
    return background


def _noise_and_gradient(stream: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Draw a gradient between two colours under noise of five scales: (H, W, 3) float32."""
    y = np.linspace(-0.5, 0.5, size[0], dtype=np.float32)[:, None]
    x = np.linspace(-0.5, 0.5, size[1], dtype=np.float32)[None, :]
    angle = stream.uniform(0, 2 * np.pi)
    ramp = (0.5 + np.cos(angle) * x + np.sin(angle) * y).clip(0, 1)
    first = random_colour(stream, stream.uniform(0.15, 0.85))
    second = random_colour(stream, stream.uniform(0.15, 0.85))
    strength = stream.uniform(6, 22)
    luminance = np.zeros(size, np.float32)
    for octave in range(5):
        cells = (max(2, 2 << octave), max(2, 2 << octave))
        luminance += smooth_noise(stream, cells, size) * (strength * 0.75**octave)
    tint = random_colour(stream, 0.5) - 127.5
    tint_map = smooth_noise(stream, (3, 3), size)
    canvas: np.ndarray = (
        first + ramp[..., None] * (second - first) + luminance[..., None] + tint_map[..., None] * tint * 0.4
    )
    return canvas.astype(np.float32)


def _add_blob(stream: np.random.Generator, canvas: np.ndarray) -> None:
    """Paint an irregular patch, of one colour or with one of the objects' textures, onto the canvas."""
    height, width = canvas.shape[:2]
    radius = stream.uniform(0.1, 0.24) * min(height, width)
    centre_y, centre_x = stream.uniform(0, height), stream.uniform(0, width)
    top = max(int(centre_y - radius), 0)
    bottom = min(int(centre_y + radius) + 1, height)
    left = max(int(centre_x - radius), 0)
    right = min(int(centre_x + radius) + 1, width)
    y = (np.arange(top, bottom, dtype=np.float32)[:, None] + 0.5 - centre_y) / radius
    x = (np.arange(left, right, dtype=np.float32)[None, :] + 0.5 - centre_x) / radius
    ragged = smooth_noise(stream, (5, 5), (bottom - top, right - left))
    inside = x * x + y * y + 0.45 * ragged < 0.5
    if stream.random() < 0.6:
        fabric = np.full(inside.shape, 0.5, np.float32)
    else:
        fabric = draw_texture(
            stream, TEXTURES[stream.integers(len(TEXTURES))], x, y, stream.uniform(0.3, 0.7)
        )
    patch = _shade(stream, fabric, x, y)
    canvas[top:bottom, left:right][inside] = patch[inside]


def _add_lines(stream: np.random.Generator, image: Image.Image) -> None:
    """Draw a few straight lines across the image."""
    pen = ImageDraw.Draw(image)
    for _ in range(int(stream.integers(0, 5))):
        ends = stream.uniform(-0.1, 1.1, 4) * np.array([image.width, image.height] * 2)
        colour = tuple(int(value) for value in random_colour(stream, stream.uniform(0.1, 0.9)))
        pen.line([float(value) for value in ends], fill=colour, width=int(stream.integers(1, 5)))
