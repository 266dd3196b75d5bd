"""Networks built by a user's own code, by name: `package.module:Callable`.

The module is imported in the usual way, also from the working directory. A name in a file is not a reason to import
anything: a checkpoint of such a network is built only if the same name was given on the command line, in a recipe or to
`create_model`.
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
    """Refuse to run code merely because a file names it.

    Raises:
        ModelSettingError: The user has not named the code.
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
    """Call the user's function or class with the options, and with `num_classes` and `image_size` if it takes them.

    Raises:
        ModelSettingError: There is no such module or callable, it fails, or it does not build a network.
    """
    builder = _find(arch)
    taken = inspect.signature(builder).parameters
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
    offered = {"num_classes": num_classes} | ({} if image_size is None else {"image_size": image_size})
    arguments = {name: value for name, value in offered.items() if anything or name in taken} | dict(options)
    try:
        model = builder(**arguments)
    except Exception as error:  # a user's code may raise anything
        given = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        problem = f"it cannot be built with {given or 'no arguments'}: {type(error).__name__}: {error}"
        raise ModelSettingError("arch", arch, problem) from error
    if not isinstance(model, nn.Module):
        raise ModelSettingError("arch", arch, f"it makes a {type(model).__name__}, not an nn.Module")
    return model


def own_info(arch: str) -> ArchInfo:
    """Return the images that the network expects: ImageNet's, at the side given by its attribute `image_size`."""
    size = getattr(_find(arch), "image_size", None) if is_trusted(arch) else None
    return ArchInfo(size, round(size / 0.875)) if isinstance(size, int) else IMAGENET


def _find(arch: str) -> Builder:
    module, _, name = arch.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # last, so that it shadows no installed module
    try:
        builder = getattr(importlib.import_module(module), name)
    except Exception as error:  # a user's module may raise anything on import
        raise ModelSettingError("arch", arch, f"{type(error).__name__}: {error}") from error
    if not callable(builder):
        raise ModelSettingError(
            "arch", arch, f"{name} is a {type(builder).__name__}, not a class or a function"
        )
    found: Builder = builder
    return found
