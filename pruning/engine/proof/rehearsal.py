"""The setting of the trials: well-conditioned weights, and the masked network as the reference.

A fresh network says little about its wiring: vectors that are all zero or all equal hide permutations and dead
branches, and activations may fade away with depth. A rehearsal therefore runs on substitute weights that tell channels
apart; the network's own are restored untouched.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from image_classification.models.modes import modes_restored
from image_classification.models.plain_tensors import plain_tensors
from image_classification.models.running import Args
from image_classification.process_state import ProcessState
from pruning.engine.channel_graph import ChannelGraph
from pruning.engine.computed_weights import (
    singular_vectors,
    spectral_norms,
    spectral_quotient,
    weight_norm_pairs,
)
from pruning.engine.cutting import tensor_cuts
from pruning.engine.examples import Example, Pass
from pruning.engine.kept_state import attributes_kept
from pruning.engine.kept_statistics import StatisticsOverKept
from pruning.engine.named_tensors import is_in_attribute, named_tensors
from pruning.engine.stand_ins import stand_ins
from pruning.engine.undisturbed import set_trace_mode

_TABLE_LENGTH = 65_537  # a prime, so that no two rows of a weight repeat each other


@contextlib.contextmanager
def rehearsal(model: nn.Module, passes: Sequence[Pass]) -> Iterator[None]:
    """See `_on_stage`, in float32."""
    with in_type(model, torch.float32), _on_stage(model, passes):
        yield


@contextlib.contextmanager
def _on_stage(model: nn.Module, passes: Sequence[Pass]) -> Iterator[None]:
    """Lend the network well-conditioned random float32 weights; give its own, and its gradients, back afterwards.

    They are the same on every call and do not depend on the network's values, so that what is found does not
    change while a network trains, and is the same on all ranks.

    Args:
        model: The network.
        passes: The ways in which it is run. What they divide by, or take the logarithm of, is positive.
    """
    divisors = {name for one in passes for name in one.divisors}
    tensors = named_tensors(model)
    parameters = {name for name, _ in model.named_parameters()}
    originals = {name: tensor.data for name, tensor in tensors.items()}
    gradients = {name: tensors[name].grad for name in parameters}
    generator = torch.Generator().manual_seed(0)
    table = torch.rand(_TABLE_LENGTH, generator=generator, dtype=torch.float32) * 2 - 1
    norms = [
        m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats
    ]
    try:
        for name in parameters:
            tensors[name].grad = None
        for number, (name, tensor) in enumerate(tensors.items()):
            if name in parameters and tensor.is_floating_point():
                values = _stage_weights(tensor.data, name, table.roll(number))
                tensor.data = values.abs() + 0.5 if name in divisors else values
            elif tensor.is_floating_point():
                tensor.data = tensor.data.clone()
        for norm in norms:
            if norm.running_mean is not None and norm.running_var is not None:
                norm.running_mean.zero_()
                norm.running_var.fill_(1.0)
        for spectral in spectral_norms(model):
            u, v = tensors[spectral.u], tensors[spectral.v]
            u.data, v.data = singular_vectors(tensors[spectral.weight].data, u.data, v.data, spectral.dim)
        _calibrate(model, norms, passes[0].example)
        yield
    finally:
        for name, tensor in tensors.items():
            tensor.data = originals[name]
        for name, gradient in gradients.items():
            tensors[name].grad = gradient


def _stage_weights(data: Tensor, name: str, table: Tensor) -> Tensor:
    """Random values of the parameter's shape: variance 2 ÷ fan-in for weights, near 1 for scales.

    A single number is 1: gains that start at zero would hide the branch behind them.
    """
    count = data.numel()
    noise = table.repeat(count // _TABLE_LENGTH + 1)[:count].reshape(data.shape).to(data.device)
    if data.dim() > 1:
        deviation: float = (6.0 * data.shape[0] / count) ** 0.5
        return noise * deviation
    if data.dim() == 0:
        return torch.ones_like(data, dtype=torch.float32)
    return noise * 0.1 if "bias" in name else 1.0 + 0.4 * noise


def condition(model: nn.Module, images: Args) -> None:
    """Give a fresh network weights that tell its channels apart and keep activations at a sensible scale.

    Learned vectors that hold one number everywhere are spread out, batch norms that saw no data take their statistics
    from the images. For tests and benchmarks on networks without trained weights; changes the network.
    """
    generator = torch.Generator().manual_seed(0)
    untouched = [
        m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and _is_fresh(m)
    ]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.copy_(_conditioned(parameter.data, generator))
        with modes_restored(model):
            _calibrate(model, untouched, Example(images))


def _is_fresh(norm: nn.modules.batchnorm._BatchNorm) -> bool:
    if norm.running_mean is None or norm.running_var is None:
        return False
    return bool((norm.running_mean == 0).all() and (norm.running_var == 1).all())


def _conditioned(data: Tensor, generator: torch.Generator) -> Tensor:
    """The values, spread out where they are all the same number.

    A single number that is zero becomes 1, so that no branch is switched off.
    """
    values = data.to(torch.float32)
    if values.dim() == 0:
        return torch.where(values == 0, 1.0, values)
    few = values.flatten()[:64]
    if values.numel() > 1 and bool((few == few[0]).all()) and bool((values == few[0]).all()):
        noise = torch.rand(values.shape, generator=generator).to(values.device)
        level = values.flatten()[0].abs()
        return noise * 0.2 - 0.1 if level == 0 else 0.6 + 0.8 * noise
    return values


def _calibrate(model: nn.Module, norms: list[nn.modules.batchnorm._BatchNorm], example: Example) -> None:
    """Batch statistics for batch norms that have seen no data: keeps activations at a sensible scale.

    What the pass leaves in attributes (anchors of this image size, say) is dropped: later passes would skip steps.
    """
    if not norms:
        return
    set_trace_mode(model, training=False)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    try:
        with attributes_kept(model):
            as_float(example).run(model)
    except (RuntimeError, ValueError):
        pass  # one value per channel, for example: fresh statistics will have to do
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()
            if norm.running_var is not None:
                norm.running_var.clamp_(min=1e-3)


def as_float(example: Example, dtype: torch.dtype = torch.float32) -> Example:
    """The example with one type in place of all floating-point numbers."""
    return example.map(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


@contextlib.contextmanager
def _default_type(dtype: torch.dtype) -> Iterator[None]:
    """Change the type of tensors that a network makes without saying of which type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


_DEFAULT_TYPES = {
    dtype: ProcessState(functools.partial(_default_type, dtype)) for dtype in (torch.float32, torch.float64)
}


@contextlib.contextmanager
def in_type(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Lend the network its floating-point weights, buffers and plain tensors in another type: float32 or float64."""

    def other(tensor: Tensor) -> Tensor | None:
        differs = tensor.is_floating_point() and tensor.dtype != dtype
        return tensor.data.to(dtype) if differs else None

    changed = [
        (tensor, tensor.data, values)
        for tensor in (*model.buffers(), *plain_tensors(model).values())
        if (values := other(tensor)) is not None
    ]
    try:
        with _DEFAULT_TYPES[dtype].changed(), stand_ins(model, other):
            for tensor, _, values in changed:
                tensor.data = values
            yield
    finally:
        for tensor, data, _ in changed:
            tensor.data = data


@contextlib.contextmanager
def masked(
    model: nn.Module,
    graph: ChannelGraph,
    mask: np.ndarray,
    trace: int = 0,
    divisors: Collection[str] = (),
) -> Iterator[None]:
    """The full network with all removed slices zeroed, and statistics over what is kept.

    Args:
        model, graph, mask: See `masked_tensors`.
        trace: Number of the recorded pass that is run.
        divisors: Tensors whose slices are left alone, since they are divided by. What they divide is zero.
    """
    tensors = named_tensors(model)
    replaced: dict[str, Tensor] = {}
    try:
        for name, values in masked_tensors(model, graph, mask).items():
            if name in divisors:
                continue
            replaced[name] = tensors[name].data
            tensors[name].data = values
        with (
            StatisticsOverKept(graph.statistics, mask, trace)
            if graph.statistics
            else contextlib.nullcontext()
        ):
            yield
    finally:
        for name, data in replaced.items():
            tensors[name].data = data


def masked_tensors(model: nn.Module, graph: ChannelGraph, mask: np.ndarray) -> dict[str, Tensor]:
    """Full-size values of the tensors that carry removed units, those slices zeroed.

    Of a weight-normalised layer the gains are zeroed for removed rows, and adjusted for removed columns so that
    the other weights keep their values; so are the vectors of a spectral norm.
    """
    tensors = named_tensors(model)
    found = {}
    cuts = tensor_cuts(graph, mask)
    pairs = {v_name: (g_name, dim) for g_name, v_name, dim in weight_norm_pairs(model)}
    for name, per_dim in cuts.items():
        if name not in tensors and is_in_attribute(model, name):
            continue
        rows = pairs[name][1] if name in pairs else None
        found[name] = _zeroed(tensors[name].data, {d: i for d, i in per_dim.items() if d != rows})
    for v_name, (g_name, dim) in pairs.items():
        if v_name in found:
            v = tensors[v_name].data
            over = tuple(d for d in range(v.dim()) if d != dim)
            norms = [torch.linalg.vector_norm(t, dim=over, keepdim=True) for t in (found[v_name], v)]
            gains = found.get(g_name, tensors[g_name].data)
            found[g_name] = gains * (norms[0] / norms[1]).reshape_as(gains)
    for norm in spectral_norms(model):
        if norm.weight in found:
            u = found.get(norm.u, tensors[norm.u].data)
            v = found.get(norm.v, tensors[norm.v].data)
            quotient = spectral_quotient(tensors, norm)
            found[norm.u], found[norm.v] = singular_vectors(found[norm.weight], u, v, norm.dim, quotient)
    return found


def _zeroed(values: Tensor, cuts: Mapping[int, Tensor]) -> Tensor:
    stays = torch.ones([1] * values.dim(), device=values.device, dtype=values.dtype)
    for dim, index in cuts.items():
        along = torch.zeros(values.shape[dim], device=values.device, dtype=values.dtype)
        along[index.to(values.device)] = 1
        stays = stays * along.reshape([-1 if d == dim else 1 for d in range(values.dim())])
    return values * stays
