"""Networks that customise their gradients: by hooks, or by functions with a handwritten backward pass.

A forward pass does not show these, and state of the old width in them (a mask of trainable channels, say) raises an
error in the first backward pass after a cut. So the gradients of such networks are compared too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pruning.engine.slices import Cuts

_HOOKS = frozenset({"register_hook", "register_post_accumulate_grad_hook"})


def has_gradient_hooks(model: nn.Module) -> bool:
    """Whether any code hooks gradients: of parameters, of modules, or of tensors made in a method."""
    for parameter in model.parameters():
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            return True
    for module in model.modules():
        if module._backward_hooks or module._backward_pre_hooks:
            return True
    return any(_names(kind) & _HOOKS for kind in {type(module) for module in model.modules()})


def _names(kind: type) -> set[str]:
    """Return every attribute that the methods of one of the network's own classes access."""
    if kind.__module__.startswith("torch."):
        return set()
    codes = (getattr(method, "__code__", None) for method in vars(kind).values())
    return {name for code in codes if code is not None for name in code.co_names}


@contextlib.contextmanager
def own_functions_noted() -> Iterator[set[str]]:
    """Collect the names of the autograd functions, other than PyTorch's, that run inside."""
    apply = torch.autograd.Function.__dict__["apply"]
    found: set[str] = set()

    def noting(kind: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
        if not kind.__module__.startswith("torch."):
            found.add(kind.__qualname__)
        return apply.__get__(None, kind)(*args, **kwargs)

    torch.autograd.Function.apply = classmethod(noting)
    try:
        yield found
    finally:
        torch.autograd.Function.apply = apply


def gradients(model: nn.Module, outputs: Collection[Tensor]) -> dict[str, Tensor]:
    """Return name → gradient of every parameter that has one, of all outputs at once. `.grad` is empty afterwards."""
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(())
    for output in outputs:
        if output.requires_grad and output.is_floating_point():
            weights = torch.rand(output.shape, generator=generator).to(output)
            total = total + (output * weights).sum().cpu()
    if not total.requires_grad:
        return {}
    try:
        total.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    finally:
        for parameter in model.parameters():
            parameter.grad = None


def differing(
    whole: dict[str, Tensor], cut: dict[str, Tensor], cuts: dict[str, Cuts], tolerance: float
) -> str | None:
    """Return the first parameter whose gradient differs from the whole network's at the kept slices, or None."""
    for name, expected in whole.items():
        for dim, index in cuts.get(name, {}).items():
            expected = expected.index_select(dim, index.to(expected.device))
        found = cut.get(name)
        if found is None or found.shape != expected.shape:
            return name
        largest = float(expected.abs().amax().clamp(min=1e-12)) if expected.numel() else 1.0
        if expected.numel() and not float((expected - found).abs().amax()) <= tolerance * largest:
            return name
    return None
