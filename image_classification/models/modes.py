"""States of a network and of PyTorch that are changed for a while and then put back.

`evaluating` and `modes_restored` are the only places that switch a network's modes back. They go through every
module's own `train()`, because modules override it: a LoRA layer merges its update when it starts to evaluate and
takes it out again when it trains, an attention layer drops a cached table. Setting `module.training` would skip that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def modes_restored(*models: nn.Module) -> Iterator[None]:
    """Whatever happens to the modes of networks inside, every module has its own again afterwards."""
    modes = {module: module.training for model in models for module in model.modules()}
    try:
        yield
    finally:
        for model in models:
            model.train(modes[model])
            _restore(model, modes)


def _restore(module: nn.Module, modes: Mapping[nn.Module, bool]) -> None:
    """Parents first: `train()` of a parent sets the modes of its children too."""
    if module.training != modes.get(module, module.training):
        module.train(modes[module])
    for child in module.children():
        _restore(child, modes)


@contextlib.contextmanager
def evaluating(*models: nn.Module, keep_random_state: bool = False) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module has its own mode again.

    Args:
        models: Networks, bare or wrapped.
        keep_random_state: Draws inside leave the random generators of the CPU and the networks' GPUs as they were.
    """
    with contextlib.ExitStack() as stack:
        if keep_random_state:
            stack.enter_context(random_state_kept(*models))
        stack.enter_context(modes_restored(*models))
        for model in models:
            model.eval()
        yield


def quieten(modules: Iterable[nn.Module], also: Collection[str] = (), *, extended: bool = True) -> None:
    """PyTorch's batch norms and dropouts evaluate, whatever mode the network around them is in.

    Their mode is set past `train()`, which none of them overrides.

    Args:
        modules: Of a network in training mode.
        also: Further classes that evaluate, by name.
        extended: Classes that extend these layers, with a forward pass of their own, evaluate too.
    """
    quiet = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
    for module in modules:
        layer = isinstance(module, quiet)
        if layer and not extended:
            layer = type(module).forward.__module__.startswith("torch.")
        if layer or type(module).__name__ in also:
            module.training = False


def uncompiled() -> contextlib.AbstractContextManager[object]:
    """What `torch.compile` has compiled, the whole network or parts of it, runs as plain code inside.

    Otherwise hooks and recordings would be compiled too, once more for each of them.
    """
    stance: contextlib.AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance


def random_state_kept(*models: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Draws inside leave the random generators of the CPU and of the networks' GPUs as they were."""
    return torch.random.fork_rng(devices=_gpus(*models))


@contextlib.contextmanager
def inference(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module has its own mode again afterwards."""
    with evaluating(*models), torch.no_grad():
        yield


class _Products(Protocol):
    """The switches of one kind of product."""

    fp32_precision: str


def _float32_products() -> tuple[_Products, ...]:
    """The switches of products of float32 on CUDA: the newer of two sets, which must not be mixed."""
    cuda: ModuleType = torch.backends.cuda
    cudnn: ModuleType = torch.backends.cudnn
    return (cuda.matmul, cudnn.conv)


def allow_tf32(allowed: bool) -> None:
    """Whether products of float32 may round their factors to TensorFloat-32, on GPUs that have it."""
    for product in _float32_products():
        product.fp32_precision = "tf32" if allowed else "ieee"


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Products of float32 in full float32, and no autocast, whatever the switches of the job say."""
    products = _float32_products()
    before = [product.fp32_precision for product in products]
    try:
        for product in products:
            product.fp32_precision = "ieee"
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        for product, precision in zip(products, before, strict=True):
            product.fp32_precision = precision


def _gpus(*models: nn.Module) -> list[torch.device]:
    """The GPUs that hold the networks' parameters."""
    devices = {parameter.device for model in models for parameter in model.parameters()}
    return [device for device in devices if device.type == "cuda"]


def drop_graphs(model: nn.Module) -> None:
    """Release the graphs of earlier passes that modules hold by tensors in plain attributes.

    Weights that hooks compute (weight and spectral norm of the old kind) are such tensors, and features that a network
    keeps to look at. Their values stay.
    """
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                setattr(module, name, value.detach())
