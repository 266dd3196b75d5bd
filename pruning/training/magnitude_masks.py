"""Masks of single weights after each round: the smallest in magnitude are removed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.prune import L1Unstructured

from pruning.training.unstructured_config import Layers, Scope

_PRUNED: dict[Layers, tuple[type[nn.Module], ...]] = {
    "all": (nn.modules.conv._ConvNd, nn.Linear),
    "convolutions": (nn.modules.conv._ConvNd,),
}


def prunable_weights(model: nn.Module, layers: Layers = "all") -> dict[str, nn.Parameter]:
    """Return the weights of convolutions (and linear layers) by name; a weight shared by several modules occurs
    once.
    """
    weights = {id(module.weight) for module in model.modules() if isinstance(module, _PRUNED[layers])}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in weights}


def num_removed_after(num_weights: int, share: float, rounds: int) -> int:
    """Return the number of weights removed after this many rounds: 1 − (1 − share)^rounds of all, rounded."""
    return round(num_weights * (1 - (1 - share) ** rounds))


def next_masks(
    weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], share: float, rounds: int, scope: Scope
) -> dict[str, Tensor]:
    """Return the masks after one more round.

    Args:
        weights: Name → weight.
        masks: Name → bool mask of its shape, the weights left after `rounds − 1` rounds.
        share: p.
        rounds: k, from 1.
        scope: `global` or `layer`.

    Returns:
        Name → bool mask. Removed weights stay removed; the smallest of the rest are removed until 1 − (1 − p)^k of the
        weights (of each layer's weights) are gone.
    """
    if scope == "layer":
        found: dict[str, Tensor] = {}
        for name in weights:
            found |= _without_smallest({name: weights[name]}, {name: masks[name]}, share, rounds)
        return found
    return _without_smallest(weights, masks, share, rounds)


def _without_smallest(
    weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], share: float, rounds: int
) -> dict[str, Tensor]:
    # Put all remaining weights into one vector and compute how many of them to remove now: two host syncs in all.
    flat = torch.cat([weights[name].detach().flatten().float() for name in weights])
    known = torch.cat([masks[name].flatten() for name in weights])
    alive = flat[known]
    count = num_removed_after(len(flat), share, rounds) - (len(flat) - len(alive))
    stays = torch.ones_like(alive)
    if count > 0:
        stays = L1Unstructured(amount=count).compute_mask(alive, default_mask=stays)

    # Split the vector back into masks, weight by weight.
    known[known.clone()] = stays.bool()
    parts = known.split([weight.numel() for weight in weights.values()])
    return {
        name: part.view(weight.shape).clone()
        for (name, weight), part in zip(weights.items(), parts, strict=True)
    }


def mask_digests(masks: Mapping[str, Tensor]) -> dict[str, str]:
    """Return a digest of every mask, by name: of which weights stay, not only of how many."""
    if not masks:
        return {}
    whole = torch.cat([mask.flatten() for mask in masks.values()]).cpu()
    parts = whole.split([mask.numel() for mask in masks.values()])
    return {
        name: hashlib.sha256(np.packbits(part.view(mask.shape).numpy()).tobytes()).hexdigest()
        for (name, mask), part in zip(masks.items(), parts, strict=True)
    }
