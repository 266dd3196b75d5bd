"""Recognition of the torchvision or timm builder of a network, with its arguments, by rebuilding and comparing.

A recognised network records its builder like networks of `create_model`, so that it can be saved and loaded by name.
Nothing is assumed: the builder's result must have the same modules, shapes and settings.
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
from image_classification.models.meta_device import on_meta
from image_classification.models.registry import IMAGENET_CLASSES, Builder, ModelError
from image_classification.models.running import Args
from image_classification.plain_data import Plain

_PLAIN = (bool, int, float, str, type(None))


def recognise(model: nn.Module) -> bool:
    """Record on an unpruned network of torchvision or timm how it was built, if that can be determined.

    Returns:
        Whether the builder is recorded now, or was already.
    """
    if identity_of(model) is not None:
        return True
    for identity in _candidates(model):
        try:
            same = is_same_network(model, on_meta(identity.build))
        except Exception:  # builders raise anything for arguments that do not suit them
            continue
        if same:
            remember_identity(model, identity)
            return True
    return False


def identity_of_builder(builder: Builder) -> ModelIdentity | None:
    """Return the identity (name and options) of a torchvision or timm builder; None for a user-defined builder.

    Args:
        builder: Builder such as `functools.partial(torchvision.models.resnet50, num_classes=10)`.

    Raises:
        SettingError: Some arguments cannot be given by name.
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
        options.pop(setting, None)  # these concern values, which come from the file
    num_classes = options.pop("num_classes", _default_classes(function))
    return ModelIdentity(f"{library}/{name}", None, num_classes, options.pop("image_size", None), options)


def _candidates(model: nn.Module) -> Iterator[ModelIdentity]:
    """Yield builders and arguments that might have built a network, derived from the network."""
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
    """Return builders of a network's class whose published networks have a similar size, the closest first."""
    count = sum(parameter.numel() for parameter in model.parameters())
    found = []
    for name in models.list_models():
        if inspect.signature(models.get_model_builder(name)).return_annotation is type(model):
            published = [weights.meta.get("num_params", count) for weights in models.get_model_weights(name)]
            ratio = count / (published[0] if published else count)
            if 0.2 < ratio < 3:  # the number of classes may matter much in a small network
                found.append((abs(math.log(ratio)), name))
    return [name for _, name in sorted(found)]


def _with_sizes(model: nn.Module, arch: str, default_classes: int) -> Iterator[ModelIdentity]:
    """Yield a builder with the number of classes, the image size and the options found in a network."""
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
    """Return the plain constructor arguments that the network stores under their names and that are not the
    defaults.
    """
    parameters = inspect.signature(type(model).__init__).parameters
    found: Plain = {}
    for name, value in vars(fresh).items():
        mine = vars(model).get(name, value)
        if name in parameters and name != "num_classes" and isinstance(mine, _PLAIN) and mine != value:
            found[name] = mine
    return found


def _num_classes(model: nn.Module, fresh: nn.Module, default: int) -> int:
    """Return the number of classes, from the first tensor whose size is not the default."""
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
