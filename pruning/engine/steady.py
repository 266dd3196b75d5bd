"""Makes passes comparable: deterministic, and float32 throughout.

The cut network draws other random numbers than the whole one, since it draws fewer. And half precision, which a
`forward` may ask for by `torch.autocast`, rounds sums differently when they have fewer terms.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload

from image_classification.models.running import Args, Kwargs, Outputs
from pruning.engine.operator_mode import OperatorMode

_NOISE = frozenset(
    "rand randn rand_like randn_like normal normal_ uniform uniform_ exponential exponential_ log_normal_ cauchy_ "
    "geometric_ bernoulli bernoulli_".split()
)
_LOW = (torch.float16, torch.bfloat16)
#: Functions that do something else in training, by an argument, which leaves channels as they are.
_BY_MODE = frozenset(
    {
        F.batch_norm,
        F.dropout,
        F.dropout1d,
        F.dropout2d,
        F.dropout3d,
        F.alpha_dropout,
        F.feature_alpha_dropout,
    }
)


def as_in_evaluation(func: Callable[..., Any], args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
    """Return arguments that make batch norms and dropouts work as in evaluation while the network trains."""
    if func not in _BY_MODE or kwargs.get("training") is False:
        return args, kwargs
    call = inspect.signature(func).bind(*args, **kwargs)
    if "running_mean" in call.arguments and call.arguments["running_mean"] is None:  # it never has others
        return args, kwargs
    call.arguments["training"] = False
    return call.args, call.kwargs


def seed_generators() -> None:
    """Let a network's draws from PyTorch, NumPy and Python be the same in every pass (a path taken by chance, say)."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002  # the generator that a network may draw from
    random.seed(0)


def rate_of(func: Callable[..., Any], args: Args, kwargs: Kwargs) -> float | None:
    """Return the rate of a dropout, which trials disable: a width might decide on it; None for other functions."""
    if func not in _BY_MODE or func is F.batch_norm:
        return None
    call = inspect.signature(func).bind(*args, **kwargs)
    call.apply_defaults()
    return float(call.arguments["p"])


def is_unsteady(func: OpOverload, kwargs: Kwargs) -> bool:
    """Whether an operator draws random numbers or makes tensors of half precision."""
    return torch.Tag.nondeterministic_seeded in func.tags or kwargs.get("dtype") in _LOW


class Steady(OperatorMode):
    """Noise is the same number everywhere, dropout drops nothing, and casts to half precision do nothing.

    Args:
        full_precision: Ignore casts; the network's own tensors must be float32.
    """

    def __init__(self, full_precision: bool) -> None:
        super().__init__()
        self._full_precision = full_precision

    def operator(self, func: OpOverload, args: Args, kwargs: Kwargs) -> Outputs:
        """See `OperatorMode`."""
        if self._full_precision and kwargs.get("dtype") in _LOW:
            kwargs = {**kwargs, "dtype": torch.float32}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name == "native_dropout":
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        result = func(*args, **kwargs)
        if name in _NOISE and isinstance(result, Tensor):
            result.fill_(1 if name.startswith("bernoulli") else 0.5)
        return result
