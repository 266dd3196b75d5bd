"""Feature taps: the last feature maps of any classifier at each of its spatial sizes.

A decoder on top of an encoder (a selector, a CASM decoder) needs one feature map per scale. The scales are found by
running the network once, not from its class: they are the points where the spatial size halves.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from explainers.attribution.method import dtype_of
from explainers.attribution.record import Record, Value, is_feature_map, record_forward
from explainers.differentiable.gated_features import through_gate
from image_classification.config import SettingError, nearest
from image_classification.models import evaluating, unwrap
from image_classification.models.running import Args, ModuleCall, following

#: Sizes that differ by less than this factor count as one scale: an unpadded convolution removes a border pixel without
#: making a new scale.
_SAME_SCALE = 1.5
_Size = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class _Candidate:
    """A module output that every path to the logits goes through."""

    name: str
    size: _Size
    order: int


def find_taps(model: nn.Module, example_images: Tensor, num_scales: int | None = None) -> tuple[str, ...]:
    """Return the names of the modules whose outputs are the last feature maps at each spatial size.

    A map counts if every path to the logits goes through it (it is the network's whole state) and it has more than one
    pixel. A block's intermediate maps on the way to the next smaller size (the expansion of a MobileNetV2 block with
    stride 2) belong to that next size. Of modules that return the same map the outermost is named.

    Args:
        model: Any classifier; run once in evaluation mode, its own modes are restored.
        example_images: (N, 3, H, W) of the size that will be used.
        num_scales: Number of the deepest scales to take; None takes all.

    Returns:
        Names, shallow to deep. A pruned version of a network has the same taps, but store them with the trained
            decoder.

    Raises:
        SettingError: The network has fewer scales at this size; the message says how many and suggests a remedy.
    """
    bare = unwrap(model)
    images = example_images[:1].to(dtype_of(bare))
    inputs: dict[str, _Size] = {}  # spatial size of each module's first input

    def entering(call: ModuleCall, _module: nn.Module, args: Args, kwargs: object) -> None:
        if args and isinstance(args[0], Tensor) and args[0].dim() == 4:
            height, width = args[0].shape[2:]
            inputs.setdefault(call.name, (height, width))

    with (
        evaluating(bare),
        following(bare, entering=entering),
        contextlib.closing(record_forward(bare, images)) as record,
    ):
        candidates = _candidates(record)
        outputs = {name: _size(value) for name, value in record.module_outputs}
    scales = _scales({candidate.size for candidate in candidates})
    taps = []
    for scale in scales:
        at_scale = [candidate for candidate in candidates if candidate.size in scale]
        taps.append(_tap(at_scale, scale, scales, inputs, outputs))
    wanted = 2 if num_scales is None else num_scales
    if len(taps) < wanted:
        height, width = example_images.shape[2:]
        fewer = "" if num_scales is None else ", or fewer `num_scales`"
        raise SettingError(
            "image_size",
            height,
            f"{type(bare).__name__} has {len(taps)} scale(s) of feature maps with more than one pixel for images of "
            f"{height}×{width}, and {wanted} are needed: give larger images{fewer}",
        )
    return tuple(taps if num_scales is None else taps[len(taps) - num_scales :])


def _size(value: Value) -> _Size | None:
    if value.tensor.dim() != 4:
        return None
    height, width = value.tensor.shape[2:]
    return height, width


def _candidates(record: Record) -> list[_Candidate]:
    """Return module outputs that are feature maps and bottlenecks, each map under its outermost module's name."""
    order = {value: index for index, value in enumerate(record.bottlenecks())}
    runs: dict[str, int] = {}
    for name, _ in record.module_outputs:
        runs[name] = runs.get(name, 0) + 1
    chosen: dict[Value, str] = {}
    for name, value in record.module_outputs:
        fits = name and runs[name] == 1 and value in order and is_feature_map(value, record, to_one_row=True)
        if fits and (value not in chosen or name.count(".") < chosen[value].count(".")):
            chosen[value] = name
    found = [
        _Candidate(name, (value.tensor.shape[2], value.tensor.shape[3]), order[value])
        for value, name in chosen.items()
    ]
    return sorted(found, key=lambda candidate: candidate.order)


def _scales(sizes: set[_Size]) -> list[set[_Size]]:
    """Group sizes that are nearly the same, large to small."""
    groups: list[list[_Size]] = []
    for size in sorted(sizes, reverse=True):
        if groups and groups[-1][0][0] < _SAME_SCALE * size[0]:
            groups[-1].append(size)
        else:
            groups.append([size])
    return [set(group) for group in groups]


def _tap(
    candidates: Sequence[_Candidate],
    scale: set[_Size],
    scales: list[set[_Size]],
    inputs: Mapping[str, _Size],
    outputs: Mapping[str, _Size | None],
) -> str:
    """Return the last candidate of a scale that is not internal to a module leading to the next scale."""
    position = scales.index(scale)
    next_scale = scales[position + 1] if position + 1 < len(scales) else set()

    def on_the_way(candidate: _Candidate) -> bool:
        parts = candidate.name.split(".")
        around = [".".join(parts[:length]) for length in range(1, len(parts))]
        return any(inputs.get(name) in scale and outputs.get(name) in next_scale for name in around)

    settled = [candidate for candidate in candidates if not on_the_way(candidate)]
    return (settled or candidates)[-1].name


class FeatureTaps:
    """Captures the feature maps of named modules during a forward pass.

        with FeatureTaps(model, names) as taps:
            logits = model(images)
            features = taps.features

    The hooks are removed when the block ends, also after an exception. The network continues with a clone, so that an
    in-place operator after the module cannot overwrite the captured map.

    Args:
        model: The network, bare or wrapped.
        names: Names of modules, from `find_taps`.
        kept: Tap to (n,) int64, the original positions of the channels that remain in its feature map after a rewrite;
            the map is scattered back into zeros. Taps not named have all their channels.
        widths: Tap to its original number of channels; needed for the taps in `kept`.

    Raises:
        ValueError: There is no such module, or `kept` names a module that is not a tap, has no width, or has wrong
            positions.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        kept: Mapping[str, Tensor] | None = None,
        widths: Mapping[str, int] | None = None,
    ) -> None:
        modules = dict(unwrap(model).named_modules())
        for name in names:
            if name not in modules:
                raise ValueError(
                    f"there is no module {name!r} in {type(unwrap(model)).__name__}{nearest(name, modules)}: the taps "
                    "belong to another network"
                )
        self.names = tuple(names)
        self._modules = [modules[name] for name in names]
        self._kept = {name: torch.as_tensor(positions) for name, positions in (kept or {}).items()}
        self._widths = dict(widths or {})
        self._check_kept()
        self._caught: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def _check_kept(self) -> None:
        for name, positions in self._kept.items():
            if name not in self.names:
                raise ValueError(f"kept names {name!r}, which is not a tap ({', '.join(self.names)})")
            width = self._widths.get(name)
            if width is None:
                raise ValueError(f"tap {name!r}: give its original number of channels (widths) with kept")
            if positions.dim() != 1 or positions.unique().numel() != positions.numel():
                raise ValueError(f"tap {name!r}: the kept positions are not a list of distinct channels")
            if positions.numel() and not 0 <= int(positions.min()) <= int(positions.max()) < width:
                raise ValueError(f"tap {name!r}: kept positions lie outside its {width} original channels")

    def __enter__(self) -> Self:
        for name, module in zip(self.names, self._modules, strict=True):
            self._handles.append(module.register_forward_hook(self._catcher(name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._caught.clear()

    def _catcher(self, name: str) -> Callable[[nn.Module, object, object], Tensor]:
        def catch(_module: nn.Module, _inputs: object, output: object) -> Tensor:
            if not isinstance(output, Tensor) or output.dim() != 4:
                raise ValueError(f"tap {name!r} gives no feature map (N, C, h, w)")
            self._caught[name] = output
            return output.clone()

        return catch

    @property
    def features(self) -> list[Tensor]:
        """Feature maps (N, C, h, w) of the last forward pass, shallow to deep, at the original widths.

        Raises:
            RuntimeError: No forward pass has run inside the block, or it did not reach a tap.
        """
        missing = [name for name in self.names if name not in self._caught]
        if missing:
            raise RuntimeError(
                f"no feature map was caught at {', '.join(missing)}: run the network inside the block"
            )
        return [self._widened(name, through_gate(name, self._caught[name])) for name in self.names]

    def _widened(self, name: str, feature: Tensor) -> Tensor:
        positions = self._kept.get(name)
        if positions is None:
            return feature
        if len(positions) != feature.shape[1]:
            raise ValueError(
                f"tap {name!r} has {feature.shape[1]} channels, but {len(positions)} positions were kept: the "
                "record of kept channels does not belong to this network"
            )
        positions = positions.to(feature.device)
        full = feature.new_zeros(feature.shape[0], self._widths[name], *feature.shape[2:])
        return full.index_copy(1, positions, feature)
