"""Where CASM's decoder reads a classifier: after the stem, and at the end of every stage (arXiv:1805.08249).

In a ResNet for photographs these are the stem's max-pool and the four stages. Other networks are read alike, by
structure: stages are the last feature maps at each halving of the size, and the base is what enters the first of them.

Note: The finest stage used has a quarter of the picture's side, as in the published ResNet-50, or is finer where that
would leave fewer than three stages (CIFAR ResNets, which halve only twice).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from explainers.features import find_taps
from image_classification.models import unwrap

_QUARTER = 4
_MIN_STAGES = 3


@dataclasses.dataclass(frozen=True)
class Taps:
    """What the decoder reads.

    Attributes:
        names: Modules, the base first, then shallow to deep.
        channels: Of their outputs.
    """

    names: tuple[str, ...]
    channels: tuple[int, ...]


@torch.no_grad()
def find_casm_taps(model: nn.Module, example: Tensor) -> Taps:
    """Find the base and the stages of a classifier.

    Args:
        model: Any classifier (N, 3, H, W) → (N, num_classes), bare or wrapped; left as it is.
        example: One picture of the size to be used.

    Raises:
        ValueError: It has feature maps of fewer than two sizes.
    """
    bare = unwrap(model)
    names = find_taps(bare, example)
    watch = _Watch(bare, names)
    modes = {module: module.training for module in bare.modules()}
    bare.eval()
    try:
        with watch:
            bare(example[:1])
    finally:
        for module, mode in modes.items():
            module.training = mode
    largest = example.shape[-1] // _QUARTER
    small = [name for name in names if watch.shapes[name][-1] <= largest]
    stages = small if len(small) >= _MIN_STAGES else list(names)
    base = watch.enters.get(stages[0])
    chosen = [base, *stages] if base is not None else stages
    if len(chosen) < 2:
        raise ValueError(
            f"{type(bare).__name__} has feature maps of one size only at {example.shape[-1]} pixels: CASM's decoder "
            "needs at least two; take larger pictures or another --arch"
        )
    return Taps(tuple(chosen), tuple(watch.shapes[name][1] for name in chosen))


class _Watch:
    """Notes during a forward pass what modules give, and which module's output enters each stage unchanged in size."""

    def __init__(self, model: nn.Module, stages: tuple[str, ...]) -> None:
        self.model, self.stages = model, set(stages)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.enters: dict[str, str] = {}
        self._last: dict[int, tuple[str, Tensor]] = {}
        self._entered: dict[str, Tensor] = {}
        self._calls: dict[str, int] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> _Watch:
        for name, module in self.model.named_modules():
            if name in self.stages and any(module.children()):
                self._handles.append(module.register_forward_pre_hook(self._before(name)))
            self._handles.append(module.register_forward_hook(self._after(name)))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        # A module that runs several times has no one output to read.
        entering = {stage: self._last.get(id(tensor)) for stage, tensor in self._entered.items()}
        for stage, entry in entering.items():
            if entry is not None and self._calls[entry[0]] == 1 and self._same_size(entry[0], stage):
                self.enters[stage] = entry[0]
        self._last.clear()
        self._entered.clear()

    def _same_size(self, name: str, stage: str) -> bool:
        return len(self.shapes[name]) == 4 and self.shapes[name][2:] == self.shapes[stage][2:]

    def _before(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[object, ...]) -> None:
            if inputs and isinstance(inputs[0], Tensor):
                self._entered[name] = inputs[0]

        return hook

    def _after(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            self._calls[name] = self._calls.get(name, 0) + 1
            if isinstance(output, Tensor):
                self.shapes[name] = tuple(output.shape)
                # Innermost first: of nested modules that return the same tensor the first one seen keeps it.
                self._last.setdefault(id(output), (name, output))

        return hook
