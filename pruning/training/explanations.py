"""Construction of the explanation that a pruning run follows, from its flags, checked against its network."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import nn

from explainers.aem.saved_selector import load_selector
from explainers.casm.casm_explanation import CasmExplanation
from explainers.casm.model import Casm, load_casm
from explainers.differentiable.explanation import network_digest
from explainers.differentiable.gradcam_explanation import GradCamExplanation
from explainers.differentiable.remembered import OriginalExplanations, Source
from image_classification.config import ConfigError, check
from image_classification.models.modes import random_state_kept
from pruning.training.pruning_config import PruningConfig


def build_originals(
    config: PruningConfig, model: nn.Module, *, image_size: int, num_classes: int, fresh: bool
) -> OriginalExplanations | None:
    """Build the explanation, still without its values in the original network; None if none is followed.

    The random state is restored afterwards, because a resumed run builds the explanation again after the random state
    of training has been restored.

    Args:
        config: The flags.
        model: The bare network on its device.
        image_size: Side of the images.
        num_classes: Number of classes of the data.
        fresh: Whether the network is the original one; in a resumed run it has changed, and was already checked.

    Raises:
        ConfigError: The selector belongs to another network, or no explanation is possible.
    """
    kind = config.explanation_kind(config.criteria(), config.learned)
    if kind is None:
        return None
    with random_state_kept(model):
        return _built(kind, config, model, image_size, num_classes, fresh)


def _built(
    kind: str, config: PruningConfig, model: nn.Module, image_size: int, num_classes: int, fresh: bool
) -> OriginalExplanations:
    device = next(model.parameters()).device
    if kind == "selector":
        assert config.selector is not None, "PruningConfig checks it"
        selector = load_selector(config.selector, device=device)
        if fresh:
            selector.check_network(model, image_size=image_size, num_classes=num_classes)
        source = _source(f"--selector {config.selector}", selector.selector, selector.design.to_plain())
        return OriginalExplanations(selector, source, config.explained_class)
    if kind == "casm":
        assert config.casm is not None, "PruningConfig checks it"
        casm = _casm(config.casm, model, image_size, fresh)
        source = _source(f"--casm {config.casm}", casm.decoder, {"taps": casm.taps, "widths": casm.widths})
        return OriginalExplanations(CasmExplanation(casm), source, config.explained_class)
    example = torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    try:
        gradcam = GradCamExplanation.of(model, example.to(device))
    except (ValueError, NotImplementedError) as error:
        raise ConfigError(f"--saliency-explanation gradcam: {error}") from error
    source = _source(f"--saliency-explanation gradcam of {gradcam.layer}", nn.Module(), gradcam.layer)
    return OriginalExplanations(gradcam, source, config.explained_class)


def _source(name: str, trained: nn.Module, design: object) -> Source:
    """Return flag and file, with a digest of an explanation's weights and of everything else it is built from
    (JSON-able).
    """
    text = json.dumps([network_digest(trained), design], sort_keys=True)
    return Source(name, hashlib.sha256(text.encode()).hexdigest())


def _casm(path: str, model: nn.Module, image_size: int, fresh: bool) -> Casm:
    """Load the CASM of a file and check it against the network."""
    casm = load_casm(path, device=next(model.parameters()).device)
    check(
        casm.image_size == image_size,
        f"--casm {path} was trained on images of {casm.image_size} pixels, not {image_size}: give --image-size "
        f"{casm.image_size}",
    )
    check(
        not casm.kept,
        f"--casm {path} was made for a network that is pruned already: give that of the original",
    )
    check(
        not fresh or network_digest(casm.classifier) == network_digest(model),
        f"--casm {path} explains another network, or other weights: prune the classifier that it was trained with "
        f"(--pretrained-weights {path})",
    )
    return casm
