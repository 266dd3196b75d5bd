"""Recognition of the architecture, widths and number of classes of a published state dict from its shapes."""

from __future__ import annotations

import re

from torch import Tensor, nn

from image_classification.models import ModelError, WeightsError, create_model
from image_classification.models.meta_device import on_meta
from image_classification.models.module_tree import tensors_by_all_names
from image_classification.models.resnet import SPECS
from pruning.files.importing.published_part import Part, load_part

# Positions in a published inverted residual block, a flat list of convolutions and batch norms, to those in nested
# lists; with and without a gate after the expansion's activation.
_EXPANDED = {"0": "0.0", "1": "0.1", "4": "1.0", "5": "1.1", "7": "2", "8": "3"}
_EXPANDED_PLAIN = {"0": "0.0", "1": "0.1", "3": "1.0", "4": "1.1", "6": "2", "7": "3"}
_FIRST = {"0": "0.0", "1": "0.1", "3": "1", "4": "2"}
_LAST_BLOCK = 18


def classifier_part(part: Part) -> Part:
    """Rename a classifier's tensors to LucidPrune's names, whichever program wrote them."""
    part = part.unwrapped("model.", "resnet.", "encoder.", "net.", "mobilenet.")
    if part.has(r"features\.0\.0\.") or part.has(r"features\.\d+\.conv\."):
        return _mobilenet_names(part)
    if part.has(r"layer\d\.\d+\."):
        return _resnet_names(part)
    return part


def _resnet_names(part: Part) -> Part:
    """Rename shortcuts and heads that had other names."""
    shortcut = "shortcut" if part.has(r"layer\d\.\d+\.shortcut\.") else "downsample"
    head = "linear" if part.has(r"linear\.") else "fc"

    def ours(name: str) -> str:
        name = re.sub(rf"^(layer\d\.\d+)\.{shortcut}\.", r"\1.downsample.", name)
        return re.sub(rf"^{head}\.", "fc.", name)

    def theirs(name: str) -> str:
        return re.sub(r"^fc\.", f"{head}.", name.replace(".downsample.", f".{shortcut}."))

    return part.renamed(ours, theirs)


def _mobilenet_names(part: Part) -> Part:
    """Rename from the ISP programs' layout: one list per block, with the last convolution and the classifier apart."""
    if part.has(r"features\.\d+\.conv\.0\.0\."):
        return part
    expanded = _EXPANDED if part.has(r"features\.\d+\.conv\.8\.") else _EXPANDED_PLAIN

    def ours(name: str) -> str:
        if match := re.match(r"features\.(\d+)\.conv\.(\d+)\.(.*)", name):
            block, position, rest = match.groups()
            table = _FIRST if block == "1" else expanded
            return f"features.{block}.conv.{table.get(position, position)}.{rest}"
        if re.match(r"conv\.\d+\.", name):
            return f"features.{_LAST_BLOCK}.{name.removeprefix('conv.')}"
        return re.sub(r"^classifier\.(weight|bias)$", r"classifier.1.\1", name)

    def theirs(name: str) -> str:
        if match := re.match(r"features\.(\d+)\.conv\.(\d(?:\.\d)?)\.([a-z_]+)$", name):
            block, position, rest = match.groups()
            table = _FIRST if block == "1" else expanded
            back = {new: old for old, new in table.items()}
            return f"features.{block}.conv.{back.get(position, position)}.{rest}"
        name = re.sub(rf"^features\.{_LAST_BLOCK}\.", "conv.", name)
        return re.sub(r"^classifier\.1\.", "classifier.", name)

    return part.renamed(ours, theirs)


def recognise(part: Part, small_images: bool, families: tuple[str, ...] = ("resn", "mobilenet")) -> str:
    """Return the architecture's name.

    Args:
        part: From `classifier_part`.
        small_images: Consider the ResNets for 32×32 images.
        families: Prefixes of the names of the format's architectures.

    Raises:
        WeightsError: No architecture has such names, or it belongs to another family.
    """
    arch = _architecture(part, small_images)
    if not arch.startswith(families):
        raise WeightsError(
            f"{part.source} holds a {arch}, which the program of this format does not have: leave the format open"
        )
    return arch


def _architecture(part: Part, small_images: bool) -> str:
    if part.has(r"layers\.\d+\.conv3\."):
        return "mobilenet_v2_cifar_isp"
    if part.has(r"features\.\d+\.conv\."):
        return "mobilenet_v2"
    depths = _depths(part)
    if not small_images and set(depths) == {1, 2, 3, 4}:
        sizes = tuple(depths[stage] for stage in (1, 2, 3, 4))
        bottleneck = part.has(r"layer\d\.\d+\.conv3\.")
        for name, spec in SPECS.items():
            if spec.depths == sizes and spec.bottleneck == bottleneck and spec.groups == _groups(part):
                return name
    if small_images and set(depths) == {1, 2, 3}:
        shortcut = "_b" if part.has(r"layer\d\.\d+\.downsample\.") else "_isp"
        return f"resnet{6 * depths[1] + 2}{shortcut}"
    if part.has(r"features\.\d+\."):
        return _vgg(part)
    shown = ", ".join(map(repr, list(part.names.values())[:4]))
    raise WeightsError(f"{part.source}: no architecture here has such tensors ({shown}, …)")


def _depths(part: Part) -> dict[int, int]:
    """Return the number of blocks by stage."""
    found: dict[int, int] = {}
    for name in part.tensors:
        if match := re.match(r"layer(\d)\.(\d+)\.", name):
            stage, block = int(match[1]), int(match[2])
            found[stage] = max(found.get(stage, 0), block + 1)
    return found


def _groups(part: Part) -> int:
    """Return the number of groups of the 3×3 convolutions of the last stage."""
    for name, tensor in part.tensors.items():
        if re.fullmatch(r"layer4\.\d+\.conv2\.weight", name) and tensor.dim() == 4:
            reads = part.tensors.get(name.replace("conv2", "conv1"))
            return 1 if reads is None else max(1, reads.shape[0] // tensor.shape[1])
    return 1


def _vgg(part: Part) -> str:
    """Name a VGG with batch norm on VOC: depth by the last layer's position, width by the widest layer."""
    layers = [name for name in part.tensors if name.startswith("features.")]
    last = max(int(name.split(".")[1]) for name in layers)
    depth = next((depth for end, depth in ((26, 11), (32, 13), (41, 16)) if last <= end), 19)
    widest = max(part.tensors[name].shape[0] for name in layers if part.tensors[name].dim())
    divisor = next((divisor for divisor in (8, 4, 2) if widest <= 512 // divisor), 1)
    return f"vgg{depth}_bn_voc" + ("" if divisor == 1 else f"_x{divisor}")


def num_classes_of(part: Part) -> int:
    """Return the number of rows of the classifier.

    Raises:
        WeightsError: The file has no classifier, or an inconsistent one.
    """
    if part.has(r"layers\.\d+\.conv3\."):
        head = "linear"
    else:
        head = "fc" if part.has(r"fc\.") or part.has(r"layer\d\.") else "classifier.1"
    names = [name for name in (f"{head}.weight", f"{head}.bias") if name in part.tensors]
    rows = [int(part.tensors[name].shape[0]) for name in names if part.tensors[name].dim()]
    if not rows:
        raise WeightsError(f"{part.source}: {part.called(f'{head}.weight')!r} is missing, the classifier")
    if len(set(rows)) > 1:
        first, second = map(part.called, names)
        raise WeightsError(f"{part.source}: {first!r} has {rows[0]} rows and {second!r} {rows[1]}")
    return rows[0]


def build_network(part: Part, arch: str) -> nn.Module:
    """Build the network of a part, with the widths of its tensors.

    Args:
        part: From `classifier_part`.
        arch: From `recognise`.

    Raises:
        WeightsError: A tensor is missing, superfluous or of another shape, or widths contradict each other.
    """
    model = empty_network(part, arch, num_classes_of(part))
    load_part(model, part, arch)
    return model.eval()


def empty_network(part: Part, arch: str, num_classes: int) -> nn.Module:
    """Build the network with a part's widths and fresh weights."""
    plain = on_meta(lambda: create_model(arch, num_classes=num_classes))
    widths = _differing_widths(dict(tensors_by_all_names(plain)), part)
    if not widths:
        return create_model(arch, num_classes=num_classes)
    try:
        return create_model(arch, num_classes=num_classes, widths=widths)
    except ModelError as error:
        first = next(iter(widths))
        raise WeightsError(
            f"{part.source}: {part.called(f'{first}.weight')!r} and others have shapes that do not fit together as "
            f"{arch} ({error})"
        ) from error


def _differing_widths(fresh: dict[str, Tensor], part: Part) -> dict[str, int]:
    """Return convolution → number of filters, where it differs from the architecture's."""
    widths = {}
    for name, expected in fresh.items():
        conv = name.removesuffix(".weight")
        width = _width(part, conv) if expected.dim() == 4 else None
        if width is not None and width != expected.shape[0]:
            widths[conv] = width
    return widths


def _width(part: Part, conv: str) -> int | None:
    """Return the number of filters by a vote of the convolution and its batch norm; outliers are reported as errors
    later.
    """
    owner, _, last = conv.rpartition(".")
    norm = last.replace("conv", "bn") if last.startswith("conv") else str(int(last) + 1)
    prefix = f"{owner}.{norm}" if owner else norm
    names = [
        f"{conv}.weight",
        *(f"{prefix}.{kind}" for kind in ("weight", "bias", "running_mean", "running_var")),
    ]
    found = [part.tensors[name] for name in names if name in part.tensors]
    votes = [int(tensor.shape[0]) for tensor in found if tensor.dim()]
    return max(votes, key=votes.count) if votes else None
