"""Networks that a user's own code builds, by name: `package.module:Callable`.

The module is imported as Python does it, from the working directory too. A name in a file is not a reason to import
anything: a checkpoint of such a network is built only where the same name has been given, on the command line, in a
recipe or to `create_model`.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from image_classification.models.registry import IMAGENET, ArchInfo, Builder, ModelSettingError
from image_classification.trusted_code import is_own_code, is_trusted


def check_trusted(arch: str) -> None:
    """Refuse to run code because a file names it.

    Raises:
        ModelSettingError: The user has not named it.
    """
    if is_own_code(arch) and not is_trusted(arch):
        module = arch.partition(":")[0]
        problem = (
            "the file says that this code builds the network, which is not run for that alone: give the same name "
            f"yourself, or --plugin {module}"
        )
        raise ModelSettingError("arch", arch, problem)


def build_own(
    arch: str, num_classes: int, image_size: int | None, options: Mapping[str, object]
) -> nn.Module:
    """Call the user's function or class; it gets `num_classes` and `image_size` if it takes them, and the options.

    Raises:
        ModelSettingError: There is no such module or callable, it fails, or it builds no network.
    """
    builder = _find(arch)
    taken = inspect.signature(builder).parameters
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
    offered = {"num_classes": num_classes} | ({} if image_size is None else {"image_size": image_size})
    arguments = {name: value for name, value in offered.items() if anything or name in taken} | dict(options)
    try:
        model = builder(**arguments)
    except Exception as error:  # whatever a user's code raises
        given = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        problem = f"it cannot be built with {given or 'no arguments'}: {type(error).__name__}: {error}"
        raise ModelSettingError("arch", arch, problem) from error
    if not isinstance(model, nn.Module):
        raise ModelSettingError("arch", arch, f"it makes a {type(model).__name__}, not an nn.Module")
    return model


def own_info(arch: str) -> ArchInfo:
    """The images that it expects: those of ImageNet, at the side that an attribute `image_size` of it says."""
    size = getattr(_find(arch), "image_size", None) if is_trusted(arch) else None
    return ArchInfo(size, round(size / 0.875)) if isinstance(size, int) else IMAGENET


def _find(arch: str) -> Builder:
    module, _, name = arch.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # last: nothing of ours is hidden by it
    try:
        builder = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever a user's module raises while it is imported
        raise ModelSettingError("arch", arch, f"{type(error).__name__}: {error}") from error
    if not callable(builder):
        raise ModelSettingError(
            "arch", arch, f"{name} is a {type(builder).__name__}, not a class or a function"
        )
    found: Builder = builder
    return found
