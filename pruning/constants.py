"""What in a network does not depend on the picture: one run in which "unknown" is NaN.

The pictures are NaN. Every operator carries NaN on, except where a zero makes its operand irrelevant: a zero weight
in a contraction, a zero factor of a product, a batch norm's channel whose scale is zero. Whatever is a number in
the end is the same for all pictures, whatever the other weights are: this is a proof, not a sample. What looks at
values in ways that NaN could not show (comparisons, sorting) is refused.

Zero padding makes a constant map uneven at its border. Where padding meets a constant other than zero, the outcome
counts as unknown, so that what is called constant is so at every image size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from pruning.groups import Place
from pruning.labelling import is_pointwise
from pruning.tracing import set_trace_mode, undisturbed

_ATEN = torch.ops.aten
_NAN = float("nan")
_BATCH_NORMS = (
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "_batch_norm_no_update",
    "cudnn_batch_norm",
    "miopen_batch_norm",
)
# Their whole-number results are positions that only their own backward pass reads.
_INDICES_UNUSED = ("max_pool2d_with_indices", "max_pool3d_with_indices", "adaptive_max_pool2d")


class NotFollowedError(ValueError):
    """An operator decides by values, so that NaN cannot stand for "unknown"."""


def observed_constants(
    model: nn.Module, images: tuple[Any, ...], places: Iterable[Place]
) -> dict[int, np.ndarray]:
    """What consumers read that is the same for every picture and at every pixel.

    Args:
        model: The network; it is left as it was.
        images: Its positional arguments; only their shapes matter.
        places: Inputs of modules. Of those whose module does not run in evaluation nothing is reported.

    Returns:
        Number of the place to (positions along its dimension,) float64: the constant, NaN where there is none.

    Raises:
        NotFollowedError: The network looks at values.
    """
    wanted: dict[str, list[tuple[int, Place]]] = {}
    for number, place in enumerate(places):
        wanted.setdefault(place.module, []).append((number, place))
    modules, found = dict(model.named_modules()), dict[int, np.ndarray]()
    calls: dict[str, int] = {}
    mode = ConstantPropagation()

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            call = calls.get(name, 0)
            calls[name] = call + 1
            with mode.paused():
                for number, place in wanted[name]:
                    if place.call == call and args:
                        found[number] = _per_position(args[0], place.dim)

        return hook

    with contextlib.ExitStack() as stack, undisturbed(model):
        for name in wanted:
            stack.callback(modules[name].register_forward_pre_hook(watch(name)).remove)
        set_trace_mode(model, training=False)
        unknown = tree_map(_unknown, images)
        with mode:
            model(*unknown)
    return found


def _unknown(leaf: Any) -> Any:
    if isinstance(leaf, Tensor) and leaf.is_floating_point():
        return torch.full_like(leaf[:1], _NAN)
    return leaf


def _per_position(x: Tensor, dim: int) -> np.ndarray:
    """(positions,) the common value along everything else, or NaN."""
    values = x.detach().movedim(dim, 0).flatten(1)
    even = (values == values[:, :1]).all(dim=1)
    return torch.where(even, values[:, 0].double(), _NAN).cpu().numpy()


class ConstantPropagation(TorchDispatchMode):
    """Runs operators on tensors in which NaN means "depends on the picture"."""

    def __init__(self) -> None:
        super().__init__()
        self._paused = False

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Operators inside are the plain ones."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        handler = _HANDLERS.get(func.overloadpacket.__name__)
        if handler is not None:
            return handler(func, args, kwargs)
        unknown = [
            is_unknown for leaf in tree_leaves((args, kwargs)) if (is_unknown := _nan_of(leaf)) is not None
        ]
        # In-place operators overwrite what is asked here: look first.
        tainted = _any_of(unknown) if is_pointwise(func) else None
        anything = any(bool(mask.any()) for mask in unknown)
        result = func(*args, **kwargs)
        if anything:
            _check_shown(func, result)
        if tainted is not None and isinstance(result, Tensor) and not _is_choice(func):
            result.masked_fill_(tainted, _NAN)
        return result


def _nan_of(leaf: Any) -> Tensor | None:
    return torch.isnan(leaf) if isinstance(leaf, Tensor) and leaf.is_floating_point() else None


def _any_of(masks: Sequence[Tensor]) -> Tensor | None:
    """Where any operand is unknown; None if nowhere."""
    if not any(bool(mask.any()) for mask in masks):
        return None
    joint = masks[0]
    for mask in masks[1:]:
        joint = joint | mask
    return joint


def _is_choice(func: Any) -> bool:
    """`where` takes one of two operands: the other may be unknown."""
    return func.overloadpacket.__name__ == "where"


def _check_shown(func: Any, result: Any) -> None:
    """Whatever came of unknown values must be able to say so."""
    name = func.overloadpacket.__name__
    leaves = tree_leaves(result)
    hidden = any(isinstance(leaf, Tensor) and not leaf.is_floating_point() for leaf in leaves)
    scalar = any(isinstance(leaf, (bool, int, float)) for leaf in leaves)
    if (hidden and name not in _INDICES_UNUSED) or scalar:
        raise NotFollowedError(f"the operator {name!r} decides by values of the picture")


# -- operators in which a zero makes its partner irrelevant ----------------------------------------------------


def _bilinear(product: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor, spread: Tensor) -> Tensor:
    """A contraction of a and b; unknown wherever something unknown meets something other than zero.

    `spread` marks further entries of a whose product counts as unknown.
    """
    unknown_a, unknown_b = torch.isnan(a), torch.isnan(b)
    values = product(a.masked_fill(unknown_a, 0), b.masked_fill(unknown_b, 0))
    matters = (b != 0) | unknown_b
    count = product((unknown_a | spread).to(a.dtype), matters.to(b.dtype))
    if bool(unknown_b.any()):
        count = count + product((a != 0).to(a.dtype), unknown_b.to(b.dtype))
    return values.masked_fill(count > 0.5, _NAN)


def _convolution(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    x, weight, bias, stride, padding, dilation, transposed, output_padding, groups = args
    uneven = transposed or any(padding)
    spread = (x != 0) if uneven else torch.zeros_like(x, dtype=torch.bool)

    def product(a: Tensor, b: Tensor) -> Tensor:
        return func(a, b, None, stride, padding, dilation, transposed, output_padding, groups)

    result = _bilinear(product, x, weight, spread)
    return result if bias is None else result + bias.reshape(-1, *[1] * (result.dim() - 2))


def _matrix_product(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    a, b = args[-2:]
    plain = _ATEN.bmm.default if a.dim() == 3 else _ATEN.mm.default
    result = _bilinear(plain, a, b, torch.zeros_like(a, dtype=torch.bool))
    if len(args) == 2:
        return result
    return kwargs.get("beta", 1) * args[0] + kwargs.get("alpha", 1) * result


def _product(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    zero: Tensor | bool = False
    for factor in args[:2]:
        zero = (factor == 0) | zero
    result = func(*args, **kwargs)
    return result.masked_fill_(zero, 0) if isinstance(zero, Tensor) else result


def _batch_norm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    weight, bias = args[1], args[2]
    result = func(*args, **kwargs)
    if weight is not None:
        off = weight == 0
        shift = torch.zeros_like(weight) if bias is None else bias
        result[0][:, off] = shift[off].to(result[0].dtype).reshape(-1, *[1] * (result[0].dim() - 2))
    return result


def _average_pool(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    padding = args[3] if len(args) > 3 else (0,)
    x = args[0].masked_fill(args[0] != 0, _NAN) if any(padding) else args[0]
    return func(x, *args[1:], **kwargs)


def _pad(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Padding along channels leaves maps even; along anything else it does not."""
    x, amounts = args[0], args[1]
    value = args[2] if len(args) > 2 else kwargs.get("value", 0)
    inside = amounts[: 2 * (x.dim() - 2)] if x.dim() > 2 else amounts
    return func(x.masked_fill(x != value, _NAN) if any(inside) else x, *args[1:], **kwargs)


_HANDLERS: dict[str, Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]] = {
    "convolution": _convolution,
    "mm": _matrix_product,
    "bmm": _matrix_product,
    "addmm": _matrix_product,
    "baddbmm": _matrix_product,
    "mul": _product,
    "mul_": _product,
    "avg_pool2d": _average_pool,
    "avg_pool3d": _average_pool,
    "constant_pad_nd": _pad,
    **dict.fromkeys(_BATCH_NORMS, _batch_norm),
}
