"""Common parts of the two ISP programs' files (Ganjdanesh et al. 2022): black box, predictor, selector.

One state dict under `model` holds them side by side: `bb_model.…`, `predictor.…`, `selector.…` (`s_model.…`), or a
black box alone (`model.…`, older `resnet.…`). The selector is a decoder with its own encoder, which is the black box
without its last layer. If the encoder's weights differ from the black box's (its batch norms may have kept counting),
the encoder is also saved as a network, with the black box's last layer, since the selector belongs to it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from explainers.aem import MASK_PRESETS, Selector, SelectorDesign
from explainers.aem.selector import design_selector
from image_classification.config import SettingError
from image_classification.models import WeightsError, model_for_weights
from pruning.files.importing.architectures import (
    build_network,
    classifier_part,
    empty_network,
    num_classes_of,
    recognise,
)
from pruning.files.importing.imported import Imported, arch_of, facts_of
from pruning.files.importing.published_part import Part, load_part, state_of

_SELECTOR = ("selector.", "s_model.")
_PREDICTOR = ("predictor.", "p_model.")
_BLACK_BOX = ("bb_model.", "blackbox.")
_DECODER = (r"uplayer\d+\.", r"embedding\.", r"saliency_chans\.")
_HEADS = tuple(f"{head}.{kind}" for head in ("fc", "classifier.1", "linear") for kind in ("weight", "bias"))
_KINDS = {3: "rbf", 2: "real-x"}


def state_names(content: object) -> list[str]:
    """Return the names in the state dict of an ISP file, without wrappers; empty for other files."""
    state = content.get("model") if isinstance(content, Mapping) else None
    return [str(name).removeprefix("module.") for name in state] if isinstance(state, Mapping) else []


def read_isp(
    content: object, source: Path, classifier: Path | None, *, name: str, small_images: bool
) -> Imported:
    """Build the networks and the selector of a file.

    Args:
        content: From `read_published`.
        source: The file.
        classifier: LucidPrune checkpoint with the black box, for files that lack it.
        name: Name of the format.
        small_images: Networks for 32×32 images.
    """
    state = state_of(content, source)
    selector_part = _first(state, _SELECTOR)
    predictor_part = _first(state, _PREDICTOR)
    box_part = _first(state, _BLACK_BOX)
    rest = state.without((*_SELECTOR, *_PREDICTOR, *_BLACK_BOX))
    if rest.tensors and (selector_part or predictor_part or box_part):
        stray = rest.called(next(iter(rest.tensors)))
        raise WeightsError(
            f"{source} has {stray!r}, which belongs to no part of it (selector, predictor, bb_model)"
        )
    imported = Imported(name, facts=facts_of(content, ("iter", "val", "test")))
    for role, part in (
        ("classifier", box_part or (rest if rest.tensors else None)),
        ("predictor", predictor_part),
    ):
        if part is not None:
            found = classifier_part(part)
            imported.networks[role] = build_network(found, recognise(found, small_images))
    if classifier is not None:
        if "classifier" in imported.networks:
            raise SettingError(
                "classifier", classifier, f"has no effect: {source} holds its classifier, leave it out"
            )
        imported.networks["classifier"] = model_for_weights(None, classifier).eval()
    imported.geometry = MASK_PRESETS["cifar" if small_images else "imagenet"]
    if selector_part is not None:
        _add_selector(imported, selector_part, small_images)
    elif "predictor" in imported.networks:
        imported.remarks.append(
            "the file does not say which masks the predictor was trained on: RBF is assumed"
        )
    return imported


def _first(state: Part, prefixes: tuple[str, ...]) -> Part | None:
    parts = [part for prefix in prefixes if (part := state.under(prefix)).tensors]
    return parts[0].unwrapped() if parts else None


def _add_selector(imported: Imported, part: Part, small_images: bool) -> None:
    decoder_names = {name for name in part.tensors if any(re.match(pattern, name) for pattern in _DECODER)}
    encoder = classifier_part(part.without(decoder_names))
    arch = recognise(encoder, small_images)
    embedding = part.tensors.get("embedding.weight")
    if embedding is None or embedding.dim() != 2:
        raise WeightsError(
            f"{part.source}: {part.called('embedding.weight')!r} is missing, which the selector needs"
        )
    network = empty_network(encoder, arch, int(embedding.shape[0]))
    box = imported.networks.get("classifier")
    head = _head_of(box, arch, encoder) if box is not None else _own_head(network)
    load_part(network, _with(encoder, head), f"the selector's encoder ({arch})")
    network.eval()
    imported.selector = _selector(part, decoder_names, network, small_images)
    imported.selector_arch = arch
    imported.mask_kind = imported.selector.design.kind
    imported.geometry = imported.selector.design.geometry
    if box is None:
        imported.remarks.append(
            "the selector's network is not in the file: give it later as it was trained, or import again with its "
            "classifier"
        )
    elif _same(box, network):
        imported.selector_of = "classifier"
    else:
        imported.networks["encoder"] = network
        imported.selector_of = "encoder"
        imported.remarks.append(
            "the selector's encoder is not the classifier itself: it is saved as a network of its own, with the "
            "classifier's last layer, and the selector belongs to it"
        )


def _head_of(box: nn.Module, arch: str, encoder: Part) -> dict[str, Tensor]:
    if arch_of(box) != arch:
        raise WeightsError(
            f"{encoder.source}: the selector's encoder is a {arch}, but the classifier is a {arch_of(box)}: give the "
            "classifier that it was trained for"
        )
    return _own_head(box)


def _own_head(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in network.state_dict().items() if name in _HEADS}


def _with(encoder: Part, head: Mapping[str, Tensor]) -> Part:
    """Return the encoder's tensors with a last layer; the encoder's own takes precedence."""
    return Part({**head, **encoder.tensors}, encoder.source, encoder.names, encoder.spell)


def _same(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    counters = "num_batches_tracked"
    return ours.keys() == theirs.keys() and all(
        name.endswith(counters) or torch.equal(tensor, theirs[name]) for name, tensor in ours.items()
    )


def _selector(part: Part, names: set[str], network: nn.Module, small_images: bool) -> Selector:
    """Build the decoder, for the image size implied by its head."""
    decoder = part.without([name for name in part.tensors if name not in names])
    head = decoder.tensors.get("saliency_chans.weight")
    if head is None or head.dim() != 4 or head.shape[0] not in _KINDS:
        raise WeightsError(
            f"{part.source}: {part.called('saliency_chans.weight')!r} is missing or has neither 3 outputs (RBF) nor 2 "
            "(REAL-X)"
        )
    if _KINDS[int(head.shape[0])] == "rbf" and head.shape[2] == 1:
        raise WeightsError(
            f"{part.source}: {part.called('saliency_chans.weight')!r} is {list(head.shape)}: the head of an RBF "
            "selector covers the whole map, that of a REAL-X one has 2 outputs"
        )
    levels = sorted({int(m[1]) for name in names if (m := re.match(r"uplayer(\d+)\.", name))}, reverse=True)
    design = _design(network, _KINDS[int(head.shape[0])], int(head.shape[2]), len(levels) + 1, small_images)
    selector = Selector(design)
    load_part(selector, decoder.renamed(*_decoder_names(levels)), f"the selector of {arch_of(network)}")
    return selector.eval()


def _design(
    network: nn.Module, kind: str, kernel: int, num_scales: int, small_images: bool
) -> SelectorDesign:
    preset = MASK_PRESETS["cifar" if small_images else "imagenet"]
    classes = num_classes_of(Part(network.state_dict(), Path(), {}, lambda name: name))

    def design(image_size: int) -> SelectorDesign:
        geometry = preset if image_size == preset.image_size else preset.scaled(image_size)
        example = torch.zeros(1, 3, image_size, image_size)
        return design_selector(
            network, example, kind=kind, geometry=geometry, num_classes=classes, num_scales=num_scales
        )

    found = design(preset.image_size)
    if (
        kind == "rbf" and kernel != found.sizes[0][0]
    ):  # the head covers the whole map: trained on another size
        found = design(preset.image_size * kernel // found.sizes[0][0])
    return found


def _decoder_names(levels: list[int]) -> tuple[Callable[[str], str], Callable[[str], str]]:
    """Return functions that map a decoder's published names to LucidPrune's, and back."""

    def ours(name: str) -> str:
        if match := re.match(r"uplayer(\d+)\.(.*)", name):
            rest = re.sub(r"^upsampler\.0\.", "expand.", match[2])
            return f"decoder.levels.{levels.index(int(match[1]))}.{re.sub(r'^follow_up[.]', 'block.', rest)}"
        return name.replace("saliency_chans.", "head.")

    def theirs(name: str) -> str:
        if match := re.match(r"decoder\.levels\.(\d+)\.(.*)", name):
            rest = re.sub(r"^expand\.", "upsampler.0.", match[2])
            return f"uplayer{levels[int(match[1])]}.{re.sub(r'^block[.]', 'follow_up.', rest)}"
        return re.sub(r"^head\.", "saliency_chans.", name)

    return ours, theirs
