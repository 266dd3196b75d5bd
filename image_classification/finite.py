"""The tensors that training changes, and whether all of them are finite."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


def learned_tensors(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield name and value of all parameters, and of the running statistics of normalisation layers.

    Other buffers are constants, which may well be infinite, such as an attention mask.
    """
    for name, parameter in model.named_parameters():
        yield prefix + name, parameter
    for module_name, module in model.named_modules():
        if isinstance(module, _NormBase):
            inner = f"{prefix}{module_name}." if module_name else prefix
            for name, buffer in module.named_buffers(recurse=False):
                yield inner + name, buffer


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, prefix: str = "optimizer "
) -> Iterator[tuple[str, Tensor]]:
    """Yield an optimizer's state tensors of every parameter."""
    for number, state in enumerate(optimizer.state.values()):
        for key, value in state.items():
            if isinstance(value, Tensor):
                yield f"{prefix}{key} of parameter {number}", value


@torch.no_grad()
def first_not_finite(named: Iterable[tuple[str, Tensor]]) -> str | None:
    """Return the name of the first floating-point tensor with a NaN or an infinity; reads each device once."""
    by_kind: dict[tuple[torch.device, torch.dtype], list[tuple[int, str, Tensor]]] = {}
    for order, (name, tensor) in enumerate(named):
        if tensor.is_floating_point() and tensor.numel() and not tensor.is_meta:
            tensor = tensor if tensor.element_size() > 1 else tensor.float()  # 8-bit types have no norm
            by_kind.setdefault((tensor.device, tensor.dtype), []).append((order, name, tensor.detach()))
    bad: list[tuple[int, str]] = []
    for entries in by_kind.values():
        # The largest magnitude is NaN or infinite exactly if some value is; unlike a sum, it cannot overflow.
        largest = torch.stack(torch._foreach_norm([tensor for *_, tensor in entries], float("inf")))
        flags = largest.isfinite().tolist()
        bad += [(order, name) for (order, name, _), finite in zip(entries, flags, strict=True) if not finite]
    return min(bad)[1] if bad else None
