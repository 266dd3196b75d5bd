"""A bounded store of the classifier's earlier states during training, in main memory, with random replacement and
draws.

Which state is replaced or drawn is a function of (seed, iteration), so all ranks and resumed runs agree without
communication.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

_REPLACE, _DRAW, _JUDGE = range(3)


class PastClassifiers:
    """The store of a classifier's earlier weights.

    Args:
        capacity: Largest number of states kept; after that, a new state replaces a random one.
        every: Iterations between two stored states; 0 stores the first only.
        share: Probability that a stored state judges, in [0, 1]. With 0 nothing is stored.
        seed: Seed of all random choices.
    """

    def __init__(self, capacity: int, every: int, share: float, seed: int) -> None:
        self.capacity = capacity
        self.every = every
        self.share = share
        self.seed = seed
        self.states: list[dict[str, Tensor]] = []
        self._judge: nn.Module | None = None
        self._loaded: int | None = None

    def __len__(self) -> int:
        return len(self.states)

    def wants(self, iteration: int) -> bool:
        """Whether the classifier is to be stored before this iteration."""
        if self.share == 0:
            return False
        return not self.states or (self.every > 0 and iteration % self.every == 0)

    def add(self, model: nn.Module, iteration: int) -> None:
        """Store a copy of a classifier's weights."""
        state = _on_host(model.state_dict())
        if len(self.states) < self.capacity:
            self.states.append(state)
            return
        place = int(self._random(iteration, _REPLACE).integers(self.capacity))
        self.states[place] = state
        if place == self._loaded:
            self._loaded = None

    def drawn(self, iteration: int) -> int | None:
        """Return the index of the stored classifier that judges this iteration; None if the current one does."""
        if not self.states or self._random(iteration, _JUDGE).random() >= self.share:
            return None
        return int(self._random(iteration, _DRAW).integers(len(self.states)))

    def judge(self, index: int, like: nn.Module) -> nn.Module:
        """Return a stored classifier in evaluation mode, without parameter gradients.

        Args:
            index: From `drawn`.
            like: The current classifier, for structure and device.
        """
        if self._judge is None:
            self._judge = copy.deepcopy(like).requires_grad_(False).eval()
        if self._loaded != index:
            self._judge.load_state_dict(self.states[index])
            self._loaded = index
        return self._judge

    def state_dict(self) -> dict[str, list[dict[str, Tensor]]]:
        """Return the stored states, for checkpoints."""
        return {"states": self.states}

    def load_state_dict(self, state: Mapping[str, list[dict[str, Tensor]]]) -> None:
        """Restore a state from `state_dict`."""
        self.states = list(state["states"])
        self._loaded = None

    def _random(self, iteration: int, purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, iteration, purpose])


def _on_host(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies in host memory, never the tensors themselves, with one host sync per dtype."""
    copies: dict[str, Tensor] = {}
    for dtype in {tensor.dtype for tensor in state.values()}:
        alike = {name: tensor for name, tensor in state.items() if tensor.dtype == dtype}
        packed = torch.cat([tensor.detach().flatten() for tensor in alike.values()]).cpu()
        parts = packed.split([tensor.numel() for tensor in alike.values()])
        for (name, tensor), part in zip(alike.items(), parts, strict=True):
            copies[name] = part.view(tensor.shape).clone()
    return {name: copies[name] for name in state}
