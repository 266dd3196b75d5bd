"""Other parameters in the places of a network's own, for as long as a block runs.

What is done to the data of a parameter leaves traces in it: autograd forgets what it has noted there when the type
changes, so that DistributedDataParallel stops exchanging gradients, and a graph that is still alive somewhere expects
gradients of the old shape.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from torch import Tensor, nn


@contextlib.contextmanager
def stand_ins(model: nn.Module, values: Callable[[nn.Parameter], Tensor | None]) -> Iterator[None]:
    """Lend the network parameters with these values, and with the hooks of its own; None: its own stays.

    A parameter that several modules share has one stand-in.
    """
    lent: dict[int, nn.Parameter] = {}
    places: list[tuple[nn.Module, str, nn.Parameter]] = []
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in lent:
                data = values(parameter)
                if data is None:
                    continue
                lent[id(parameter)] = nn.Parameter(data, requires_grad=parameter.requires_grad)
                lent[id(parameter)]._backward_hooks = parameter._backward_hooks
            places.append((module, name, parameter))
    try:
        for module, name, parameter in places:
            setattr(module, name, lent[id(parameter)])  # recurrent layers note what is set
        yield
    finally:
        for module, name, parameter in places:
            setattr(module, name, parameter)
