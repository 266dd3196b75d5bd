"""Grad-CAM (Selvaraju et al. 2017): ReLU(Σ_c mean_hw(∂z_k/∂A_c) · A_c), resized to the image.

A is the last feature map with more than one pixel that every path goes through, before any pool after the last
convolution (VGG: 14 × 14 for images of 224 pixels; ResNet: the last stage's output). It is found by structure, or is
the output of a layer named by the user.

The hook that captures A passes a clone on: an in-place ReLU after the layer would otherwise silently overwrite A before
it is read.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from explainers.attribution.method import (
    Attribution,
    check_request,
    dtype_of,
    frozen_copy,
    register_method,
    target_logits,
)
from explainers.attribution.record import Record, UnsupportedOperatorError, is_feature_map, record_forward
from image_classification.config import flag, nearest
from image_classification.models import exact_float32, main_and_auxiliary_logits


@register_method("gradcam")
@dataclasses.dataclass(frozen=True)
class GradCAM:
    """Grad-CAM.

    Attributes:
        layer: Name of the module whose output is A; None to find it by structure.
    """

    name: ClassVar[str]
    layer: str | None = flag(
        None,
        "--layer",
        metavar="MODULE",
        help="gradcam: module whose output is the feature map; default: the last one with more than one pixel that "
        "everything goes through, before any pool that follows it",
    )

    def prepare(self, model: nn.Module, example: Tensor) -> PreparedGradCAM:
        """See `Method.prepare`."""
        return PreparedGradCAM(model, example, self.layer)


class PreparedGradCAM:
    """Grad-CAM bound to a copy of a network.

    Attributes:
        layer: Name of the module whose output is A.
    """

    def __init__(self, model: nn.Module, example: Tensor, layer: str | None) -> None:
        self.model = frozen_copy(model)
        self.dtype = dtype_of(self.model)
        self.layer = find_layer(self.model, example) if layer is None else layer
        self(example[:1], torch.zeros(1, dtype=torch.int64, device=example.device))

    def __call__(self, images: Tensor, targets: Tensor) -> Attribution:
        """See `Prepared.__call__`."""
        check_request(images, targets)
        with exact_float32():
            maps, logits = class_activation(self.model, self.layer, images.to(self.dtype), targets)
        heatmap = resize(maps, images.shape[2:]).float()
        return Attribution.without_account(heatmap, logits, targets, known=True)


def class_activation(
    model: nn.Module,
    layer: str,
    images: Tensor,
    targets: Tensor,
    *,
    create_graph: bool = False,
    known: bool = False,
) -> tuple[Tensor, Tensor]:
    """Grad-CAM maps at the resolution of A, on the network itself.

    Args:
        model: Network, in training or evaluation mode; its parameters' gradients are not touched.
        layer: Name of the module whose output is A.
        images: (B, 3, H, W).
        targets: (B,) int64.
        create_graph: Keep the graph, so that the maps can be differentiated with respect to the network's parameters
            (second order), for matching the explanations of two networks.
        known: See `target_logits`.

    Returns:
        Maps (B, h, w) after the ReLU, and logits (B, num_classes); both detached unless `create_graph`.

    Raises:
        ValueError: There is no such module, or its output is not a feature map (B, C, h, w).
        UnsupportedOperatorError: The target's logit does not depend on the module's output.
    """
    with torch.enable_grad(), feature_maps(model, [layer], detach=not create_graph) as caught:
        logits, _ = main_and_auxiliary_logits(model(images))
        chosen = target_logits(logits, targets, known=known).sum()
    features = caught[layer]
    (gradient,) = _gradient(chosen, features, layer, create_graph)
    maps = (gradient.mean((2, 3), keepdim=True) * features).sum(1).relu()
    return (maps, logits) if create_graph else (maps.detach(), logits.detach())


def _gradient(chosen: Tensor, features: Tensor, layer: str, create_graph: bool) -> tuple[Tensor, ...]:
    try:
        return torch.autograd.grad(chosen, features, create_graph=create_graph)
    except RuntimeError as error:
        raise UnsupportedOperatorError(
            f"Grad-CAM: the logits do not depend on layer {layer!r} ({error})"
        ) from error


@contextlib.contextmanager
def feature_maps(
    model: nn.Module, layers: Sequence[str], *, detach: bool = False
) -> Iterator[dict[str, Tensor]]:
    """Capture the outputs of modules in the single forward pass run inside the block.

    A map that does not depend on trained weights becomes a leaf that requires a gradient, so that the backward pass of
    a frozen network is as short as possible.

    Args:
        model: The bare network; it may be called through a wrapper (DDP).
        layers: Names of modules.
        detach: Cut the graph at every map: nothing before it needs a gradient.

    Yields:
        Layer → (B, C, h, w); filled by the forward pass and complete when the block ends.

    Raises:
        ValueError: There is no such module, its output is not a feature map, or it does not run exactly once.
    """
    caught: dict[str, Tensor] = {}
    runs = dict.fromkeys(layers, 0)

    def catcher(layer: str) -> Callable[[nn.Module, object, object], Tensor]:
        def catch(_module: nn.Module, _inputs: object, output: object) -> Tensor:
            if not isinstance(output, Tensor) or output.dim() != 4:
                shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
                raise ValueError(
                    f"layer {layer!r} gives {shape}, no feature map (B, C, h, w): name another layer"
                )
            if detach or not output.requires_grad:
                output = output.detach().requires_grad_()
            runs[layer] += 1
            caught[layer] = output
            return output.clone()

        return catch

    with contextlib.ExitStack() as hooks:
        for layer in runs:
            handle = _module(model, layer).register_forward_hook(catcher(layer))
            hooks.callback(handle.remove)
        yield caught
    for layer, count in runs.items():
        if count != 1:
            raise ValueError(
                f"layer {layer!r} ran {count} times in the forward pass; name one that runs once"
            )


def _module(model: nn.Module, layer: str) -> nn.Module:
    modules: dict[str, nn.Module] = dict(model.named_modules())
    if layer not in modules:
        raise ValueError(f"there is no layer {layer!r} in {type(model).__name__}{nearest(layer, modules)}")
    return modules[layer]


def resize(maps: Tensor, size: torch.Size | tuple[int, int]) -> Tensor:
    """Resize maps (B, h, w) to (B, *size), bilinear."""
    return F.interpolate(maps[:, None], size=tuple(size), mode="bilinear", align_corners=False)[:, 0]


def find_layer(model: nn.Module, example: Tensor) -> str:
    """Find the module whose output is A: the last feature map of more than one pixel that every path goes through.

    Pools coarsen the map before them, so their outputs are skipped: maps of one semantic level are taken at their
    finest grid. Of modules that return the same map (a stage, its last block, that block's ReLU) the outermost is
    named; a module that runs several times has no single output and is skipped.

    Args:
        model: In evaluation mode.
        example: Images (B, 3, H, W), of the size that will be explained.

    Raises:
        UnsupportedOperatorError: The network has no such feature map.
    """
    with contextlib.closing(record_forward(model, example[:1].to(dtype_of(model)))) as record:
        best = _last_feature_map(record)
    if best is None:
        raise UnsupportedOperatorError(
            f"Grad-CAM: {type(model).__name__} has no feature map (B, C, h, w) of more than one pixel that everything "
            "goes through; name a layer"
        )
    return best


def _last_feature_map(record: Record) -> str | None:
    """Return the module whose output is the last feature map that every path goes through, or None."""
    order = {value: index for index, value in enumerate(record.bottlenecks())}
    runs = Counter(name for name, _ in record.module_outputs)
    best: tuple[int, int, str] | None = None
    for name, value in record.module_outputs:
        pooled = value.step is not None and value.step.is_pool
        if name and runs[name] == 1 and value in order and not pooled and is_feature_map(value, record):
            rank = (order[value], -name.count("."), name)
            if best is None or rank[:2] > best[:2]:
                best = rank
    return None if best is None else best[2]
