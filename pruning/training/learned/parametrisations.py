"""Parametrisations of learned gates, and sampling of gates.

    logit  = θ + base                                   θ: see below
    gate   = sigmoid((logit + noise) / T)               noise only while learning
    hard   = 1 if gate ≥ ½ else 0, with the derivative of `gate` (straight-through; Bengio et al. 2013)

The constants T = 0.4 and base = 3, and both forms of θ, are those of Ganjdanesh et al. (ECCV 2022): a free number per
channel, or a hypernetwork that couples the layers.

Note on the noise: the published code adds Gumbel noise −log(−log U) to the logit. The logit of a binary concrete
variable (Maddison et al. 2017) has logistic noise, the difference of two Gumbels. With the former a fresh gate closes
with probability exp(−e³) ≈ 2e-9, with the latter with 1 − sigmoid(3) ≈ 0.047. The published code also adds noise when
gates are evaluated; here they are evaluated without noise.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from pruning.training.learned.gate_settings import Form, Init, Noise

INPUT_SIZE = 64
HIDDEN_SIZE = 128


class SimpleGates(nn.Module):
    """A free number per gate.

    Args:
        widths: Number of gates of every group.
        generator: Draws the numbers from a standard normal distribution, as published; None to start at 0.
    """

    def __init__(self, widths: Sequence[int], generator: torch.Generator | None = None) -> None:
        super().__init__()
        count = sum(widths)
        start = torch.zeros(count) if generator is None else torch.randn(count, generator=generator)
        self.theta = nn.Parameter(start)

    def forward(self) -> Tensor:
        """Return θ of all groups, concatenated, (Σ widths,)."""
        return self.theta


class HyperGates(nn.Module):
    """A hypernetwork: fixed orthogonal inputs, one per group → bidirectional GRU → LayerNorm, ReLU → linear layers.

    Args:
        widths: Number of gates of every group, in order of execution.
        generator: Draws inputs and weights, so that all ranks (and all runs with the same seed) start alike.

    Note: deep networks have more than 64 groups; the inputs are then as orthogonal as 64 numbers allow.
    """

    inputs: Tensor

    def __init__(self, widths: Sequence[int], generator: torch.Generator) -> None:
        super().__init__()
        self.gru = nn.GRU(INPUT_SIZE, HIDDEN_SIZE, bidirectional=True)
        self.norm = nn.LayerNorm(2 * HIDDEN_SIZE)
        heads = [nn.Linear(2 * HIDDEN_SIZE, width, bias=False) for width in widths]
        self.register_buffer("inputs", torch.empty(len(widths), INPUT_SIZE))
        nn.init.orthogonal_(self.inputs, generator=generator)
        with torch.no_grad():  # initialised like PyTorch's own layers, but from this generator
            for parameter in self.gru.parameters():
                parameter.uniform_(-(HIDDEN_SIZE**-0.5), HIDDEN_SIZE**-0.5, generator=generator)
            for head in heads:
                bound = head.in_features**-0.5
                head.weight.uniform_(-bound, bound, generator=generator)
        self.heads = nn.ModuleList(weight_norm(head) for head in heads)

    def forward(self) -> Tensor:
        """Return θ of all groups, concatenated, (Σ widths,)."""
        hidden, _ = self.gru(self.inputs[:, None])
        hidden = F.relu(self.norm(hidden[:, 0]))
        return torch.cat([head(row) for head, row in zip(self.heads, hidden, strict=True)])


def build_gates(form: Form, widths: Sequence[int], seed: int, init: Init = "zero") -> nn.Module:
    """Build the parametrisation called `form`; a pure function of its arguments."""
    if form == "simple":
        return SimpleGates(widths, torch.Generator().manual_seed(seed) if init == "normal" else None)
    with torch.random.fork_rng(devices=[]):  # PyTorch's constructors draw random numbers
        return HyperGates(widths, torch.Generator().manual_seed(seed))


def draw_noise(kind: Noise, count: int, seed: int, step: int) -> Tensor:
    """Draw the noise of a step, (count,) float32 on the CPU; a pure function, so ranks and resumed runs agree.

    Args:
        kind: Distribution of the noise.
        count: Number of gates.
        seed, step: Seed of the run, and number of the step.
    """
    # PyTorch's CPU generator uses only 32 bits of its seed.
    generator = np.random.Generator(np.random.Philox(key=np.array([seed % 2**64, step], dtype=np.uint64)))
    # Clamping excludes both ends of the interval, so the noise is finite.
    uniform = torch.from_numpy(generator.random(count)).clamp(1e-12, 1 - 1e-12)
    noise = -torch.log(-torch.log(uniform)) if kind == "gumbel" else torch.logit(uniform)
    return noise.float()


def soft_gates(logits: Tensor, temperature: float, noise: Tensor | None = None) -> Tensor:
    """Return gates in (0, 1) for logits θ + base; without noise, the gates used for evaluation."""
    return torch.sigmoid((logits if noise is None else logits + noise) / temperature)


def harden(soft: Tensor) -> Tensor:
    """Return 0 or 1 with the derivative of the soft gates."""
    # The difference is taken first: it is exactly 0, whereas 1 + soft − soft would be rounded.
    return (soft >= 0.5).to(soft.dtype) + (soft - soft.detach())
