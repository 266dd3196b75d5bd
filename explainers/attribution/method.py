"""The interface of attribution methods (`prepare` one for a network, then call it for maps), and their registry.

    prepared = GradCAM().prepare(model, example)
    prepared(images, targets).map                   # (B, H, W)

`prepare` works on a deep copy in evaluation mode, so the network is never modified, not even on failure. After a
rewrite of the network, prepare again.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn

from image_classification.config import check_choice, nearest
from image_classification.models import unwrap


@dataclasses.dataclass(frozen=True)
class Attribution:
    """Maps of a batch.

    Attributes:
        map: (B, H, W) float32 at the size of the images, on their device. Larger values support the class.
        signed: Negative values are evidence against the class; otherwise the map is ≥ 0.
        started: (B,) float32, the amount distributed (a logit, a probability, a difference of logits).
        arrived: (B,) float32, the sum that arrived at the images (or where the method stops). NaN if the method does
            not track it.
        logits: (B, num_classes), the network's output.
    """

    map: Tensor
    signed: bool
    started: Tensor
    arrived: Tensor
    logits: Tensor

    @classmethod
    def without_account(
        cls, map: Tensor, logits: Tensor, targets: Tensor, *, signed: bool = False, known: bool = False
    ) -> Attribution:
        """Build the result of a method that distributes nothing: `started` is the target's logit, `arrived` NaN.

        Arguments as of `Attribution` and `target_logits`.
        """
        chosen = target_logits(logits, targets, known=known).float()
        return cls(map, signed, chosen, torch.full_like(chosen, torch.nan), logits)


class Prepared(Protocol):
    """A method bound to a copy of a network."""

    def __call__(self, images: Tensor, targets: Tensor) -> Attribution:
        """Explain a batch.

        Args:
            images: (B, 3, H, W) float, normalised.
            targets: (B,) int64, the class to explain for each image.
        """
        ...


class Method(Protocol):
    """An attribution method with its settings."""

    name: ClassVar[str]

    def prepare(self, model: nn.Module, example: Tensor) -> Prepared:
        """Bind to a copy of `model`.

        Args:
            model: Any classifier (B, 3, H, W) → (B, num_classes), bare or wrapped; not modified.
            example: At least one image of the size that will be explained; a first run on it checks that the method has
                a rule for every operator of the network.

        Raises:
            UnsupportedOperatorError: A rule is missing; the message names the operator and the module.
        """
        ...


M = TypeVar("M", bound="Method")
_METHODS: dict[str, type[Method]] = {}
_ALIASES = {"gcam": "gradcam", "integrated_gradients": "ig"}
#: Modules of this package that register methods; imported when the registry is first read.
_BUILT_IN = (
    "explainers.attribution.baselines",
    "explainers.attribution.ebp",
    "explainers.attribution.gradcam",
    "explainers.attribution.integrated_gradients",
    "explainers.attribution.lrp",
    "explainers.attribution.rap",
    "explainers.aem.selector_method",
    "explainers.casm.casm_method",
)


def register_method(name: str) -> Callable[[type[M]], type[M]]:
    """Class decorator that registers a method under `name`.

    The class is a dataclass; its fields are the method's settings. A field made with `image_classification.config.flag`
    becomes that flag in the verbs that take `--method`.

    Raises:
        ValueError: Another method has that name.
    """

    def enter(method: type[M]) -> type[M]:
        if name in _METHODS or name in _ALIASES:
            raise ValueError(f"there is a method called {name!r} already: register yours under another name")
        method.name = name
        _METHODS[name] = method
        return method

    return enter


@functools.cache
def _import_built_in() -> None:
    for module in _BUILT_IN:
        importlib.import_module(module)


def method_names(*, aliases: bool = False) -> list[str]:
    """Return the names of all methods, sorted; with `aliases`, also other spellings that `create_method` accepts."""
    _import_built_in()
    return sorted([*_METHODS, *(_ALIASES if aliases else ())])


def plain_name(name: str) -> str:
    """Return the name that a method is registered under; `name` may be an alias."""
    return _ALIASES.get(name, name)


def method_class(name: str) -> type[Method]:
    """Return the class of the method called `name`.

    Raises:
        SettingError: There is no such method.
    """
    check_choice("method", name, method_names(aliases=True))
    return _METHODS[plain_name(name)]


def create_method(name: str, **settings: object) -> Method:
    """Create the method called `name`.

    Raises:
        SettingError: There is no such method, or a setting has an invalid value.
        ValueError: The method has no such setting.
    """
    method: Callable[..., Method] = method_class(name)
    fields = [field.name for field in dataclasses.fields(method) if field.init]  # type: ignore[arg-type]
    for setting in settings:
        if setting not in fields:
            has = ", ".join(sorted(fields)) or "none"
            raise ValueError(f"{name} has no setting {setting!r} (it has: {has}){nearest(setting, fields)}")
    return method(**settings)


def frozen_copy(model: nn.Module) -> nn.Module:
    """Return a deep copy of a network for computing explanations.

    The copy is unwrapped and in evaluation mode, its parameters need no gradients, and half precision becomes float32.

    Raises:
        TypeError: The network cannot be copied.
    """
    bare = unwrap(model)
    try:
        duplicate = copy.deepcopy(bare)
    except RuntimeError as error:
        raise TypeError(
            f"{type(bare).__name__} cannot be copied ({error}); attribution works on a copy, so a network must not "
            "keep tensors with gradient history among its attributes"
        ) from error
    for parameter in duplicate.parameters():
        parameter.requires_grad_(False)
    if any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in duplicate.state_dict().values()):
        duplicate.float()
    return duplicate.eval()


def dtype_of(model: nn.Module) -> torch.dtype:
    """Return the floating-point type that a network computes in."""
    floats = (p.dtype for p in model.parameters() if p.is_floating_point())
    return next(floats, torch.float32)


def check_request(images: Tensor, targets: Tensor) -> None:
    """Check shapes and types of the arguments of a prepared method.

    Raises:
        ValueError: A shape or type is wrong; the message says what is expected.
    """
    if images.dim() != 4:
        raise ValueError(f"images have shape {tuple(images.shape)}; give a batch (B, C, H, W)")
    if targets.shape != images.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"targets have shape {tuple(targets.shape)} and type {targets.dtype}; give one class index (int64) for "
            f"each of the {len(images)} images"
        )


def target_logits(logits: Tensor, targets: Tensor, *, known: bool = False) -> Tensor:
    """Return the logit of each image's target class, (B,).

    Args:
        logits: (B, num_classes).
        targets: (B,) int64.
        known: The targets are known to be classes of the network; skips the check, which syncs with the device.

    Raises:
        ValueError: A target is not a class of the network, or the logits are not (B, num_classes).
    """
    if logits.dim() != 2:
        raise ValueError(
            f"the network returns shape {tuple(logits.shape)}; attribution needs logits (B, num_classes)"
        )
    num_classes = logits.shape[1]
    if not known and targets.numel():
        lowest, highest = torch.stack(targets.aminmax()).tolist()
        if not 0 <= lowest <= highest < num_classes:
            raise ValueError(
                f"targets run from {lowest} to {highest}, but the network has {num_classes} classes"
            )
    return logits.gather(1, targets.to(logits.device)[:, None])[:, 0]
