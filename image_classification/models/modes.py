"""Context managers that temporarily change states of a network or of PyTorch.

`evaluating` and `modes_restored` are the only places that restore a network's modes. They call every module's own
`train()`, because modules override it: a LoRA layer merges its update in evaluation mode and removes it again in
training mode, an attention layer drops a cached table. Setting `module.training` would skip that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor, nn

from image_classification.models.module_tree import buffers, overlaps
from image_classification.process_state import ProcessState


@contextlib.contextmanager
def modes_restored(*models: nn.Module) -> Iterator[None]:
    """Restore every module's mode afterwards, whatever happens to the networks' modes inside the block."""
    modes = {module: module.training for model in models for module in model.modules()}
    try:
        yield
    finally:
        for model in models:
            model.train(modes[model])
            _restore(model, modes)


def _restore(module: nn.Module, modes: Mapping[nn.Module, bool]) -> None:
    """Restore parents first, since `train()` of a parent also sets the modes of its children."""
    if module.training != modes.get(module, module.training):
        module.train(modes[module])
    for child in module.children():
        _restore(child, modes)


@contextlib.contextmanager
def evaluating(*models: nn.Module, keep_random_state: bool = False) -> Iterator[None]:
    """Set evaluation mode inside the block, and restore every module's mode afterwards.

    Args:
        models: Networks, bare or wrapped.
        keep_random_state: Also restore the random generators of the CPU and of the networks' GPUs.
    """
    with contextlib.ExitStack() as stack:
        if keep_random_state:
            stack.enter_context(random_state_kept(*models))
        stack.enter_context(modes_restored(*models))
        for model in models:
            model.eval()
        yield


def quieten(modules: Iterable[nn.Module], also: Collection[str] = (), *, extended: bool = True) -> None:
    """Set PyTorch's batch norms and dropouts to evaluation mode, whatever the mode of the network around them.

    Their mode is set without `train()`, which none of them overrides.

    Args:
        modules: Modules of a network in training mode.
        also: Names of further classes to set to evaluation mode.
        extended: Include subclasses of these layers that have their own forward pass.
    """
    quiet = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
    for module in modules:
        layer = isinstance(module, quiet)
        if layer and not extended:
            layer = type(module).forward.__module__.startswith("torch.")
        if layer or type(module).__name__ in also:
            module.training = False


def uncompiled() -> contextlib.AbstractContextManager[None]:
    """Run everything compiled by `torch.compile`, whole networks or parts, as plain code inside the block.

    Otherwise hooks and recordings would be compiled too, again for each of them.
    """
    return _UNCOMPILED.changed()


_UNCOMPILED = ProcessState(lambda: torch.compiler.set_stance("force_eager"))


@contextlib.contextmanager
def casts_uncached() -> Iterator[None]:
    """Let an autocast from outside cast weights anew in every pass inside the block, since the weights change there."""
    cached = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(cached)


def attention_in_steps() -> contextlib.AbstractContextManager[None]:
    """Run PyTorch's attention operator by operator: its fused form hides the layers within, and a cut one has none."""
    return _ATTENTION_IN_STEPS.changed()


@contextlib.contextmanager
def _without_fused_attention() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


_ATTENTION_IN_STEPS = ProcessState(_without_fused_attention)


@contextlib.contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Restore a network's buffers afterwards, what passes write into them and what they put in their places."""
    places = [
        (module._buffers, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    values = [(buffer, buffer.detach().clone()) for buffer in buffers(model) if not overlaps(buffer)]
    try:
        yield
    finally:
        for table, name, buffer in places:
            table[name] = buffer
        for tensor, before in values:
            tensor.data.copy_(before)


def random_state_kept(*models: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Restore the random generators of the CPU and of the networks' GPUs after the block."""
    return torch.random.fork_rng(devices=_gpus(*models))


@contextlib.contextmanager
def inference(*models: nn.Module) -> Iterator[None]:
    """Set evaluation mode without gradients inside the block, and restore every module's mode afterwards."""
    with evaluating(*models), torch.no_grad():
        yield


class _Products(Protocol):
    """The precision switches of one kind of product."""

    fp32_precision: str


def _float32_products() -> tuple[_Products, ...]:
    """Return the switches of float32 products on CUDA, from the newer of two APIs, which must not be mixed."""
    cuda: ModuleType = torch.backends.cuda
    cudnn: ModuleType = torch.backends.cudnn
    return (cuda.matmul, cudnn.conv)


def allow_tf32(allowed: bool) -> None:
    """Set whether float32 products may round their factors to TensorFloat-32, on GPUs that have it."""
    for product in _float32_products():
        product.fp32_precision = "tf32" if allowed else "ieee"


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Compute float32 products in full float32 and without autocast inside the block, whatever the job's switches."""
    with (
        _EXACT_PRODUCTS.changed(),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
    ):
        yield


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    products = _float32_products()
    before = [product.fp32_precision for product in products]
    allow_tf32(False)
    try:
        yield
    finally:
        for product, precision in zip(products, before, strict=True):
            product.fp32_precision = precision


_EXACT_PRODUCTS = ProcessState(_without_tf32)


def _gpus(*models: nn.Module) -> list[torch.device]:
    """Return the GPUs that hold the networks' parameters."""
    devices = {parameter.device for model in models for parameter in model.parameters()}
    return [device for device in devices if device.type == "cuda"]


def drop_graphs(model: nn.Module) -> None:
    """Release the graphs of earlier passes that modules keep alive through tensors in plain attributes.

    Such tensors are weights computed by hooks (the old weight and spectral norm), and features that a network stores
    for inspection. Their values are kept.
    """
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                setattr(module, name, value.detach())
