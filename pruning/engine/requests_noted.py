"""Records the PyTorch functions that a network's code calls, above autograd and before PyTorch dispatches them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from image_classification.models.running import Args, Kwargs, Running
from pruning.engine.steady import as_in_evaluation, rate_of
from pruning.engine.wrapped_tensors import unwrapped

_OF_GRADIENTS = frozenset({Tensor.register_hook, Tensor.retain_grad})


class Requests(TorchFunctionMode):
    """Records the PyTorch functions that the network's code calls, before PyTorch dispatches them.

    Batch norms and dropouts work as in evaluation, whichever mode the network is in.

    Args:
        running: The running modules.
        value_of: Returns the number of a tensor; None if the numbers do not matter.

    Attributes:
        steps: (module, function) of every call that returns tensors; of a dropout with its rate.
        scaled: Queries of scaled dot products whose scale follows from the width of a head, with the module. The
            operators below only show a constant, which would differ for a narrower head.
    """

    def __init__(self, running: Running, value_of: Callable[[Tensor], int] | None = None) -> None:
        super().__init__()
        self.steps: set[tuple[str, str]] = set()
        self.scaled: list[tuple[int, str]] = []
        self._running = running
        self._value_of = value_of

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> Any:
        args, kwargs = as_in_evaluation(func, args, kwargs or {})
        module = self._running.innermost
        if func in _OF_GRADIENTS and not (args[0].requires_grad and torch.is_grad_enabled()):
            return RemovableHandle(OrderedDict())  # of a gradient that this pass does not have
        attends = func is F.scaled_dot_product_attention and kwargs.get("scale") is None
        if attends and self._value_of is not None:
            query = unwrapped(kwargs["query"] if "query" in kwargs else args[0])
            self.scaled.append((self._value_of(query), module))
        result = func(*args, **kwargs)
        if isinstance(result, (Tensor, tuple, list)) and not isinstance(result, torch.Size):
            rate = rate_of(func, args, kwargs)
            name = getattr(func, "__name__", str(func))
            self.steps.add((module, name if rate is None else f"{name} of {rate:.6g}"))
        return result
