"""What an attribution method is: `prepare` it for a network, then ask for maps. And the register of methods.

    prepared = GradCAM().prepare(model, example)
    prepared(images, targets).map                   # (B, H, W)

`prepare` works on a deep copy in evaluation mode, so the network stays exactly as it was, also when something fails;
after a rewrite of the network, prepare again.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn

from image_classification.models import unwrap
from image_classification.models.registry import nearest


@dataclasses.dataclass(frozen=True)
class Attribution:
    """Maps of a batch.

    Attributes:
        map: (B, H, W) float32 at the size of the pictures, on their device. Larger speaks for the class.
        signed: Negative values speak against the class; otherwise the map is ≥ 0.
        started: (B,) float32, what was distributed (a logit, a probability, a difference of logits).
        arrived: (B,) float32, the sum of what arrived at the pictures (or where the method stops). NaN where a method
            keeps no account.
        logits: (B, num_classes), what the network said.
    """

    map: Tensor
    signed: bool
    started: Tensor
    arrived: Tensor
    logits: Tensor


class Prepared(Protocol):
    """A method bound to a copy of a network."""

    def __call__(self, images: Tensor, targets: Tensor) -> Attribution:
        """Explain a batch.

        Args:
            images: (B, 3, H, W) float, normalised.
            targets: (B,) int64, the class to explain for each picture.
        """
        ...


class Method(Protocol):
    """An attribution method with its settings."""

    name: ClassVar[str]

    def prepare(self, model: nn.Module, example: Tensor) -> Prepared:
        """Bind to a copy of `model`.

        Args:
            model: Any classifier (B, 3, H, W) → (B, num_classes), bare or wrapped. It is not touched.
            example: Pictures, at least one, of the size that will be asked about; finds out whether the method has
                a rule for everything that the network does.

        Raises:
            UnsupportedOperatorError: It has not; the message names the operator and the module.
        """
        ...


M = TypeVar("M", bound="Method")
_METHODS: dict[str, Callable[..., Method]] = {}
_ALIASES = {"gcam": "gradcam", "integrated_gradients": "ig"}


def register_method(name: str) -> Callable[[type[M]], type[M]]:
    """Class decorator that enters a method under `name`; its settings are the constructor's arguments."""

    def enter(method: type[M]) -> type[M]:
        assert name not in _METHODS, f"{name} is registered twice"
        method.name = name
        _METHODS[name] = method
        return method

    return enter


def method_names(*, aliases: bool = False) -> list[str]:
    """Names of all methods, sorted; `aliases` are other spellings that `create_method` takes."""
    return sorted([*_METHODS, *(_ALIASES if aliases else ())])


def plain_name(name: str) -> str:
    """The name that a method is registered under; `name` may be an alias."""
    return _ALIASES.get(name, name)


def create_method(name: str, **settings: Any) -> Method:
    """The method called `name`.

    Raises:
        ValueError: There is no such method, or it has no such setting.
    """
    known = plain_name(name)
    if known not in _METHODS:
        names = method_names(aliases=True)
        raise ValueError(f"--method {name}: choose from {', '.join(names)}{nearest(name, names)}")
    method = _METHODS[known]
    fields = {field.name for field in dataclasses.fields(method) if field.init}  # type: ignore[arg-type]
    for setting in settings:
        if setting not in fields:
            has = ", ".join(sorted(fields)) or "none"
            raise ValueError(
                f"--method {name} has no setting {setting!r} (it has: {has}){nearest(setting, fields)}"
            )
    return method(**settings)


def frozen_copy(model: nn.Module) -> nn.Module:
    """A deep copy of a network to compute explanations with: unwrapped, evaluating, without gradients, not in half
    precision.

    Raises:
        TypeError: It cannot be copied.
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
    """The floating-point type that a network computes in."""
    floats = (p.dtype for p in model.parameters() if p.is_floating_point())
    return next(floats, torch.float32)


@contextlib.contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Full float32 products, whatever the TF32 and autocast switches of training say: relevance is a chain of
    quotients of such products, and would not keep its sum.
    """
    backends: Any = torch.backends
    parts = (backends.cuda.matmul, backends.cudnn.conv) if device.type == "cuda" else ()
    before = [part.fp32_precision for part in parts]
    try:
        for part in parts:
            part.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for part, precision in zip(parts, before, strict=True):
            part.fp32_precision = precision


def check_request(images: Tensor, targets: Tensor) -> None:
    """Shapes and types of what a prepared method is asked.

    Raises:
        ValueError: With what is expected.
    """
    if images.dim() != 4:
        raise ValueError(f"images have shape {tuple(images.shape)}; give a batch (B, C, H, W)")
    if targets.shape != images.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"targets have shape {tuple(targets.shape)} and type {targets.dtype}; give one class index (int64) for "
            f"each of the {len(images)} pictures"
        )


def target_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """(B,) the logit of each picture's target class.

    Raises:
        ValueError: A target that is no class of the network, or logits of another shape than (B, num_classes).
    """
    if logits.dim() != 2:
        raise ValueError(
            f"the network returns shape {tuple(logits.shape)}; attribution needs logits (B, num_classes)"
        )
    num_classes = logits.shape[1]
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < num_classes:
        raise ValueError(
            f"targets run from {int(targets.min())} to {int(targets.max())}, but the network has {num_classes} classes"
        )
    return logits.gather(1, targets.to(logits.device)[:, None])[:, 0]
