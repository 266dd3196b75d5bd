"""Finds the layers of a classifier that CASM's decoder reads: after the stem, and at the end of every stage
(arXiv:1805.08249).

In an ImageNet ResNet these are the stem's max-pool and the four stages. In other networks they are found by structure:
stages are the last feature maps at each halving of the size, and the base is the input of the first stage.

Note: The finest stage used has a quarter of the image's side, as in the published ResNet-50, or a larger side if that
would leave fewer than three stages (CIFAR ResNets, which halve only twice).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from explainers.attribution.method import dtype_of
from explainers.differentiable.features import find_taps
from image_classification.models import evaluating, unwrap
from image_classification.models.running import ModuleCall, Running, following

_QUARTER = 4
_MIN_STAGES = 3


@dataclasses.dataclass(frozen=True)
class Taps:
    """The modules that the decoder reads.

    Attributes:
        names: Names of the modules, the base first, then shallow to deep.
        channels: Number of channels of their outputs.
    """

    names: tuple[str, ...]
    channels: tuple[int, ...]


@torch.no_grad()
def find_casm_taps(model: nn.Module, example: Tensor) -> Taps:
    """Find the base and the stages of a classifier.

    Args:
        model: Any classifier (N, 3, H, W) → (N, num_classes), bare or wrapped; not modified.
        example: One image of the size to be used.

    Raises:
        ValueError: The classifier has feature maps of fewer than two sizes.
    """
    bare = unwrap(model)
    names = find_taps(bare, example)
    watch = _Watch(bare, names)
    with evaluating(bare), watch.watching():
        bare(example[:1].to(dtype_of(bare)))
    largest = example.shape[-1] // _QUARTER
    small = [name for name in names if watch.shapes[name][-1] <= largest]
    stages = small if len(small) >= _MIN_STAGES else list(names)
    base = watch.enters(stages[0])
    chosen = [base, *stages] if base is not None else stages
    return Taps(tuple(chosen), tuple(watch.shapes[name][1] for name in chosen))


class _Watch:
    """Records, during a forward pass, the outputs of modules and which module's output enters each stage."""

    def __init__(self, model: nn.Module, stages: tuple[str, ...]) -> None:
        self.model = model
        self.stages = set(stages)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._entered: dict[str, str] = {}
        self._last: dict[int, tuple[str, Tensor]] = {}
        self._running = Running()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the forward passes inside the block."""
        with following(self.model, entering=self._before, leaving=self._after) as self._running:
            yield
        self._last.clear()

    def enters(self, stage: str) -> str | None:
        """Return the module whose output enters a stage and has the size of the stage's own output, or None."""
        name = self._entered.get(stage)
        # A module that runs several times has no single output to read.
        if name is None or self._running.num_calls(name) != 1 or len(self.shapes[name]) != 4:
            return None
        return name if self.shapes[name][2:] == self.shapes[stage][2:] else None

    def _before(
        self, call: ModuleCall, module: nn.Module, inputs: tuple[object, ...], _kwargs: object
    ) -> None:
        # Of several modules that return the same tensor, take the last one before the stage: in-place operations (an
        # activation, a residual sum) have changed the tensor since the first one returned it.
        entry = self._last.get(id(inputs[0])) if inputs else None
        if entry is not None and call.name in self.stages and any(module.children()):
            self._entered[call.name] = entry[0]

    def _after(self, call: ModuleCall, _module: nn.Module, output: object) -> None:
        if isinstance(output, Tensor):
            self.shapes[call.name] = tuple(output.shape)
            self._last[id(output)] = (call.name, output)
