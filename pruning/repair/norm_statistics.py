"""Re-estimation of batch-norm statistics on calibration images: means and variances of the current network."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from image_classification.distributed import Distributed
from image_classification.models.modes import evaluating
from image_classification.models.running import Args

_Norm = nn.modules.batchnorm._BatchNorm


def norms_of(model: nn.Module) -> list[_Norm]:
    """Return the batch norms that keep running statistics."""
    return [
        module for module in model.modules() if isinstance(module, _Norm) and module.running_mean is not None
    ]


@torch.no_grad()
def remeasure(
    model: nn.Module, passes: Iterable[Callable[[], object]], distributed: Distributed | None = None
) -> None:
    """Replace running statistics by their averages over some forward passes. Collective.

    Every batch norm normalises by the statistics of its batch, as in training; dropout and everything else evaluates.
    Norms that the passes do not reach keep their statistics. There is no collective per norm, so ranks may have
    different numbers of batches.

    Args:
        model: The network; its modes are restored afterwards.
        passes: Functions that each run the network on a batch.
        distributed: Ranks whose batches are averaged over.
    """
    distributed = distributed or Distributed()
    norms = norms_of(model)
    # Per norm: Σ means, Σ variances, number of batches.
    sums = [
        torch.zeros(3, norm.num_features, dtype=torch.float64, device=_mean(norm).device) for norm in norms
    ]
    before = [(_mean(norm).clone(), _variance(norm).clone()) for norm in norms]

    def look(total: Tensor, norm: _Norm, args: Args) -> None:
        """Normalise by this batch, and accumulate its statistics."""
        images = args[0]
        count = images.numel() / images.shape[1]
        variance, mean = torch.var_mean(images.float(), (0, *range(2, images.dim())), correction=0)
        _mean(norm).copy_(mean)
        _variance(norm).copy_(variance)
        unbiased = variance * (count / max(count - 1, 1))
        total += torch.stack([mean, unbiased, torch.ones_like(mean)])

    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for norm, total in zip(norms, sums, strict=True):
            stack.callback(norm.register_forward_pre_hook(functools.partial(look, total)).remove)
        for run in passes:
            run()
    if distributed.is_distributed and sums:
        sums = list(distributed.all_reduce_sum(*sums))
    for norm, total, (mean, variance) in zip(norms, sums, before, strict=True):
        seen = total[2] > 0
        average = total[:2] / total[2].clamp(min=1)
        _mean(norm).copy_(torch.where(seen, average[0].to(mean.dtype), mean))
        _variance(norm).copy_(torch.where(seen, average[1].to(variance.dtype), variance))


def _mean(norm: _Norm) -> Tensor:
    assert norm.running_mean is not None
    return norm.running_mean


def _variance(norm: _Norm) -> Tensor:
    assert norm.running_var is not None
    return norm.running_var
