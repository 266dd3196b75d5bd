"""Optimizers: SGD, RMSprop, Adam and AdamW from torch, fused on CUDA; LARS for very large batches.

Which parameters decay is decided by the type of the module that owns them, never by their name.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.optimizer import ParamsT

from image_classification.config import check, flag
from image_classification.overflow import DecidesOnDevice
from image_classification.plain_data import Plain

OptimizerName = Literal["sgd", "lars", "rmsprop", "adam", "adamw", "apex-sgd", "apex-adam"]
#: Names in older commands for update rules of NVIDIA apex, whose fused optimizers torch has adopted.
_SYNONYMS = {"apex-sgd": "sgd", "apex-adam": "adamw"}


def update_rule(name: str) -> str:
    """Return the name of an update rule, resolving synonyms."""
    return _SYNONYMS.get(name, name)


# Everything that torch considers a normalisation layer; their scale and shift are not decayed. timm's norms are
# subclasses.
_NORMALIZATIONS: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
    nn.RMSNorm,
)


@dataclasses.dataclass(kw_only=True)
class OptimConfig:
    """Optimizer"""

    optimizer: OptimizerName = flag(
        "sgd",
        "--optimizer",
        help="Update rule; lars is SGD for batches of many thousand images; apex-sgd means sgd, apex-adam adamw.",
    )
    momentum: float = flag(
        0.9, "--momentum", "--mom", help="Momentum of SGD, LARS and RMSprop, first beta of Adam and AdamW."
    )
    nesterov: bool = flag(False, "--nesterov", help="Nesterov momentum (SGD).")
    weight_decay: float = flag(
        1e-4, "--weight-decay", "--wd", help="Weight decay of weights; biases and norms have none."
    )
    bn_weight_decay: bool = flag(
        False, "--bn-weight-decay", help="Decay normalisation parameters and biases too."
    )
    rmsprop_alpha: float = flag(0.9, "--rmsprop-alpha", help="Smoothing constant of RMSprop.")
    lars_trust: float = flag(
        0.001, "--lars-trust", help="Length of a layer's step under LARS, as a share of its weights' norm."
    )
    optimizer_eps: float | None = flag(
        None, "--optimizer-eps", "--rmsprop-eps", help="Epsilon; 1e-3 for RMSprop, 1e-8 for Adam and AdamW."
    )
    clip_grad_norm: float | None = flag(
        None, "--clip-grad-norm", help="Largest gradient norm; longer gradients are scaled."
    )

    def __post_init__(self) -> None:
        check(0 <= self.momentum < 1, f"--momentum: {self.momentum} is outside [0, 1)")
        check(self.weight_decay >= 0, f"--weight-decay: {self.weight_decay} is negative")
        check(0 < self.rmsprop_alpha < 1, f"--rmsprop-alpha: {self.rmsprop_alpha} is outside (0, 1)")
        check(
            self.optimizer_eps is None or self.optimizer_eps > 0,
            f"--optimizer-eps: {self.optimizer_eps} is not positive",
        )
        check(
            self.clip_grad_norm is None or self.clip_grad_norm > 0,
            f"--clip-grad-norm: {self.clip_grad_norm} is not positive; leave the flag out to clip nothing",
        )
        check(self.lars_trust > 0, f"--lars-trust: {self.lars_trust} is not positive")
        if self.nesterov:
            check(
                update_rule(self.optimizer) == "sgd",
                f"--nesterov: {self.optimizer} has no Nesterov momentum",
            )
            check(self.momentum > 0, "--nesterov needs --momentum above 0")


class PlainLars(torch.optim.Optimizer):
    """SGD with momentum whose step in each weight tensor is proportional to the tensor's norm.

    You, Gitman, Ginsburg, "Large Batch Training of Convolutional Networks" (2017), arXiv:1708.03888: λ = trust · ‖w‖ /
    (‖g‖ + β‖w‖), v ← momentum · v + lr · λ · (g + βw), w ← w − v, β the weight decay. One-dimensional tensors (biases,
    norms) and all-zero tensors take plain steps, λ = 1. There are no host syncs.

    Args:
        params: Parameters or groups.
        lr: Learning rate.
        momentum: Weight of the previous step.
        trust: λ of a tensor whose gradient has the same norm as the tensor.
        weight_decay: β.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        momentum: float,
        trust: float,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "trust": trust, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all parameters that have a gradient; `closure` as in torch.optim."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, weight: torch.Tensor, gradient: torch.Tensor, group: Plain) -> None:
        decayed = gradient.add(weight, alpha=group["weight_decay"])
        if weight.dim() > 1:
            length = torch.linalg.vector_norm(weight)
            total = torch.linalg.vector_norm(gradient) + group["weight_decay"] * length
            # A tensor with zero norm or gradient has no scale to measure its step by.
            ratio = torch.where((length > 0) & (total > 0), group["trust"] * length / total, 1.0)
            decayed.mul_(ratio)
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        state["momentum_buffer"].mul_(group["momentum"]).add_(decayed, alpha=group["lr"])
        weight.sub_(state["momentum_buffer"])


class Lars(DecidesOnDevice, PlainLars):
    """LARS that skips overflowing updates by itself."""


class RMSprop(DecidesOnDevice, torch.optim.RMSprop):
    """PyTorch's RMSprop, which has no fused kernel, extended to skip overflowing updates by itself."""


def parameter_groups(model: nn.Module, weight_decay: float, decay_all: bool = False) -> list[Plain]:
    """Split the parameters into decayed and undecayed ones.

    Args:
        model: The network.
        weight_decay: Decay of the first group.
        decay_all: Put every parameter into the first group.

    Returns:
        Two parameter groups (the second is omitted if empty). Normalisation layers of any kind, biases and
        other one-dimensional parameters (layer scales, for instance) are not decayed.
    """
    undecayed: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, _NORMALIZATIONS) or name == "bias" or parameter.ndim <= 1:
                undecayed.add(id(parameter))
    parameters = list(model.parameters())
    decayed = [p for p in parameters if decay_all or id(p) not in undecayed]
    rest = [p for p in parameters if not decay_all and id(p) in undecayed]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(config: OptimConfig, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Build the optimizer over all parameters of `model`.

    On CUDA the fused kernels are used: one launch per update. With AMP, updates need no host sync to find out whether
    gradients overflowed.
    """
    groups = parameter_groups(model, config.weight_decay, config.bn_weight_decay)
    fused = all(p.is_cuda and p.is_floating_point() for p in model.parameters())
    rule = update_rule(config.optimizer)
    if rule == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=config.momentum, nesterov=config.nesterov, fused=fused)
    if rule == "lars":
        return Lars(groups, lr=lr, momentum=config.momentum, trust=config.lars_trust)
    if rule == "rmsprop":
        eps = config.optimizer_eps or 1e-3
        return RMSprop(groups, lr=lr, alpha=config.rmsprop_alpha, momentum=config.momentum, eps=eps)
    eps = config.optimizer_eps or 1e-8
    adam = torch.optim.Adam if rule == "adam" else torch.optim.AdamW
    return adam(groups, lr=lr, betas=(config.momentum, 0.999), eps=eps, fused=fused)
