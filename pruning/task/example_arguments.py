"""Example inputs of a network, and the arguments that they stand for."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from image_classification.config import SettingError
from image_classification.models.running import Args, Kwargs

#: A tensor (the only argument), a tuple (positional arguments), a mapping (keyword arguments), or a list of these.
Example = Tensor | Args | Mapping[str, object] | list[Any]


def check_example(example: object) -> None:
    """Refuse objects that cannot be an example.

    Raises:
        SettingError: The message names what was passed and what to pass instead.
    """
    several = example if isinstance(example, list) else [example]
    if not several:
        raise SettingError("example", [], "there is no example: give one or two samples of the final size")
    for one in several:
        if not isinstance(one, (Tensor, tuple, Mapping)):
            raise SettingError(
                "example",
                type(one).__name__,
                "give a tensor, a tuple of positional arguments, a mapping of keyword arguments, or a list of these",
            )
        tensors = [leaf for leaf in tree_leaves(_plain(one)) if isinstance(leaf, Tensor)]
        if not tensors:
            raise SettingError(
                "example", one, "it holds no tensor: give one or two samples of the final size"
            )
        if any(tensor.numel() == 0 for tensor in tensors):
            raise SettingError("example", 0, "there is no image: give one or two of the final size")


def first_call(model: nn.Module, example: Example) -> tuple[Args, Kwargs]:
    """Return the positional and keyword arguments of the (first) example, for which costs are counted.

    Raises:
        SettingError: The network does not take such keywords.
    """
    one = example[0] if isinstance(example, list) else example
    if isinstance(one, Mapping):
        check_keywords(model, one, setting="example")
        return (), dict(one)
    return (one if isinstance(one, tuple) else (one,)), {}


def check_keywords(model: nn.Module, keywords: Mapping[str, object], setting: str = "forward") -> None:
    """Refuse keywords that a network does not take.

    Raises:
        SettingError: There is such a keyword; the message names `setting`.
    """
    try:
        inspect.signature(model.forward).bind(**keywords)
    except TypeError as error:
        raise SettingError(
            setting,
            None if setting == "forward" else ", ".join(keywords),
            f"{type(model).__name__}.forward does not take a batch of {', '.join(map(str, keywords))} by name "
            f"({error}): give forward=, a function of the batch",
        ) from error


def _plain(value: object) -> object:
    return dict(value) if isinstance(value, Mapping) else value
