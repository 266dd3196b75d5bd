"""Momentum and epsilon of all batch norms of a network, as options of every architecture."""

from __future__ import annotations

from torch import nn

from image_classification.models.registry import ModelSettingError
from image_classification.plain_data import Plain, PlainMapping

#: Option → attribute of the batch norms; values must be above 0.
OPTIONS = {"bn_momentum": "momentum", "bn_eps": "eps"}


def architecture_options(options: PlainMapping) -> Plain:
    """Return the options that are passed on to an architecture's constructor."""
    return {name: value for name, value in options.items() if name not in OPTIONS}


def set_batch_norms(model: nn.Module, options: PlainMapping) -> None:
    """Set the momentum and the epsilon of all batch norms of a network, as given in `options`.

    Raises:
        ModelSettingError: A value is not above 0 (a momentum not at most 1), or there is no batch norm.
    """
    given = {name: options[name] for name in OPTIONS if name in options}
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for name, value in given.items():
        number = not isinstance(value, bool) and isinstance(value, (int, float))
        if not number or not 0 < value <= 1:
            raise ModelSettingError(name, value, "give a number above 0, at most 1")
        if not norms:
            raise ModelSettingError(name, value, "the network has no batch norm: leave it out")
        for module in norms:
            setattr(module, OPTIONS[name], float(value))
