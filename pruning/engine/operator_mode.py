"""What the engine's dispatch modes have in common."""

from __future__ import annotations

import abc

from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from image_classification.models.running import Args, Kwargs, Outputs


class OperatorMode(TorchDispatchMode, abc.ABC):
    """A mode that runs every operator inside its block by `operator`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it unannotated

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Skip Dynamo: importing it takes seconds, and it would leave this mode uncompiled anyway."""
        return False

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> Outputs:
        """See `operator`."""
        return self.operator(func, args, kwargs or {})

    @abc.abstractmethod
    def operator(self, func: OpOverload, args: Args, kwargs: Kwargs) -> Outputs:
        """Run an operator, or something in its place, and return the result."""
