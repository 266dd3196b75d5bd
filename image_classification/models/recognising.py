"""Which builder of torchvision or timm made a network, and with which arguments: by building it again and comparing.

A network that is recognised remembers its builder as those of `create_model` do, so that it is saved and loaded by
name. Nothing is assumed: what the builder makes has the same modules, shapes and settings, or it is another network.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Iterator
from types import ModuleType

from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from image_classification.config import SettingError
from image_classification.models.external import import_library
from image_classification.models.factory import ModelIdentity, identity_of, remember_identity
from image_classification.models.registry import IMAGENET_CLASSES, Builder, ModelError
from image_classification.models.running import Args
from image_classification.models.structure import on_meta
from image_classification.plain_data import Plain

_PLAIN = (bool, int, float, str, type(None))


def recognise(model: nn.Module) -> bool:
    """Let an unpruned network of torchvision or timm remember what it was built with, if that can be found out.

    Returns:
        Whether the network knows its builder, from this look or from before.
    """
    if identity_of(model) is not None:
        return True
    for identity in _candidates(model):
        try:
            same = is_same_network(model, on_meta(identity.build))
        except Exception:  # builders raise what they like at arguments that are not theirs
            continue
        if same:
            remember_identity(model, identity)
            return True
    return False


def identity_of_builder(builder: Builder) -> ModelIdentity | None:
    """What a builder of torchvision or timm makes, as a name with options; None for one of the user's own.

    Args:
        builder: Such as `functools.partial(torchvision.models.resnet50, num_classes=10)`.

    Raises:
        SettingError: Arguments that cannot be given by name.
    """
    function: Builder = builder
    options: Plain = {}
    positional: Args = ()
    while isinstance(function, functools.partial):
        options, positional = {**function.keywords, **options}, (*function.args, *positional)
        function = function.func
    library = getattr(function, "__module__", "").partition(".")[0]
    name = getattr(function, "__name__", "")
    if library not in ("torchvision", "timm"):
        return None
    if name in ("create_model", "get_model") and len(positional) == 1:
        options["model_name"], positional = positional[0], ()
    if positional:
        raise SettingError(
            "builder", builder, "give its arguments by name: functools.partial(f, num_classes=10)"
        )
    if name in ("create_model", "get_model"):
        name = options.pop("model_name", options.pop("name", ""))
    for setting in ("weights", "weights_backbone", "pretrained", "progress"):
        options.pop(setting, None)  # of the values, which come from the file
    num_classes = options.pop("num_classes", _default_classes(function))
    return ModelIdentity(f"{library}/{name}", None, num_classes, options.pop("image_size", None), options)


def _candidates(model: nn.Module) -> Iterator[ModelIdentity]:
    """Builders with arguments that might have made a network, read off it."""
    library = type(model).__module__.partition(".")[0]
    if library == "timm":
        config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
        name = (
            config.get("architecture") if isinstance(config, dict) else getattr(config, "architecture", None)
        )
        if name:
            yield from _with_sizes(model, f"timm/{name}", IMAGENET_CLASSES)
    elif library == "torchvision":
        try:
            models = import_library("torchvision")
        except ModelError:
            return
        for name in _by_likeness(model, models):
            function = models.get_model_builder(name)
            yield from _with_sizes(model, f"torchvision/{name}", _default_classes(function))


def _by_likeness(model: nn.Module, models: ModuleType) -> list[str]:
    """Builders of a network's class whose published networks are about as large, the nearest one first."""
    count = sum(parameter.numel() for parameter in model.parameters())
    found = []
    for name in models.list_models():
        if inspect.signature(models.get_model_builder(name)).return_annotation is type(model):
            published = [weights.meta.get("num_params", count) for weights in models.get_model_weights(name)]
            ratio = count / (published[0] if published else count)
            if 0.2 < ratio < 3:  # another number of classes may matter much in a small network
                found.append((abs(math.log(ratio)), name))
    return [name for _, name in sorted(found)]


def _with_sizes(model: nn.Module, arch: str, default_classes: int) -> Iterator[ModelIdentity]:
    """A builder with the number of classes, the image size and the options that a network shows."""
    plain = ModelIdentity(arch, None, default_classes)
    try:
        fresh = on_meta(plain.build)
    except Exception:  # as above
        return
    options = _root_options(model, fresh)
    image_size = options.pop("image_size", None)
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if image_size is None and isinstance(size, tuple):
        image_size = size[0]
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if arch.startswith("timm/") and first is not None and first.in_channels != 3:
        options["in_chans"] = first.in_channels
    yield ModelIdentity(arch, None, _num_classes(model, fresh, default_classes), image_size, options)


def _root_options(model: nn.Module, fresh: nn.Module) -> Plain:
    """Plain arguments of the network's class that it keeps under their names, where they are not the default ones."""
    parameters = inspect.signature(type(model).__init__).parameters
    found: Plain = {}
    for name, value in vars(fresh).items():
        mine = vars(model).get(name, value)
        if name in parameters and name != "num_classes" and isinstance(mine, _PLAIN) and mine != value:
            found[name] = mine
    return found


def _num_classes(model: nn.Module, fresh: nn.Module, default: int) -> int:
    """The number of classes, from the first tensor that is not as large as it is by default."""
    named = getattr(model, "num_classes", None)
    if isinstance(named, int) and not isinstance(named, bool) and named > 0:
        return named
    theirs = dict(fresh.named_parameters())
    for name, parameter in model.named_parameters():
        for mine, other in zip(parameter.shape, theirs[name].shape if name in theirs else (), strict=False):
            if mine != other:
                return max(1, mine * default // other)
    return default


def _default_classes(function: Builder) -> int:
    parameter = inspect.signature(function).parameters.get("num_classes")
    if parameter is not None and isinstance(parameter.default, int):
        return parameter.default
    kinds = {"detection": 91, "segmentation": 21, "video": 400}
    kind = getattr(function, "__module__", "").split(".")
    return next((number for name, number in kinds.items() if name in kind), IMAGENET_CLASSES)


def is_same_network(model: nn.Module, fresh: nn.Module) -> bool:
    """Whether two networks have the same modules with the same plain settings, and tensors of the same shapes."""
    mine, theirs = dict(model.named_modules()), dict(fresh.named_modules())
    if mine.keys() != theirs.keys():
        return False
    for name, module in mine.items():
        other = theirs[name]
        if type_before_parametrizations(module) is not type_before_parametrizations(other):
            return False
        if _settings(module) != _settings(other):
            return False
    return _shapes(model) == _shapes(fresh)


def _settings(module: nn.Module) -> dict[str, object]:
    found = {}
    for name, value in vars(module).items():
        plain = isinstance(value, _PLAIN) or (
            isinstance(value, (tuple, list)) and all(isinstance(item, _PLAIN) for item in value)
        )
        if plain and not name.startswith("_") and name != "training":
            found[name] = value
    return found


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: tuple(tensor.shape) for name, tensor in named}
