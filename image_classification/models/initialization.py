"""Model configurations: initialisation of LucidPrune's own networks (`-c/--model-config`).

`classic` and `grp-fanout` draw convolutions from N(0, 2 / fan_out), `fanin` and `grp-fanin` from N(0, 2 / fan_in) (He
et al. 2015); batch norms start at scale 1, shift 0. The names are those of NVIDIA DeepLearningExamples
(PyTorch/Classification/ConvNets, `resnet_configs`).

Note:
    There, `grp-…` is meant to initialise the last batch norm of each residual block to zero (Goyal et al. 2017,
    section 5.1), but the published table has `last_bn_0_init: False` in all four entries, so that
    `grp-fanin` equals `fanin`. Here `grp-…` does as intended.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Literal

from torch import nn

from image_classification.config import nearest
from image_classification.models.registry import ModelSettingError


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """Settings of an initialisation."""

    fan: Literal["fan_in", "fan_out"]
    zero_last_bn: bool


ModelConfigName = Literal["classic", "fanin", "grp-fanin", "grp-fanout"]

MODEL_CONFIGS: dict[str, InitConfig] = {
    "classic": InitConfig("fan_out", zero_last_bn=False),
    "fanin": InitConfig("fan_in", zero_last_bn=False),
    "grp-fanin": InitConfig("fan_in", zero_last_bn=True),
    "grp-fanout": InitConfig("fan_out", zero_last_bn=True),
}
DEFAULT_MODEL_CONFIG = "classic"


def init_config(model_config: str | None) -> InitConfig:
    """Return the configuration called `model_config` (None: classic)."""
    name = DEFAULT_MODEL_CONFIG if model_config is None else model_config
    if name not in MODEL_CONFIGS:
        problem = f"choose from {', '.join(MODEL_CONFIGS)}{nearest(name, MODEL_CONFIGS)}"
        raise ModelSettingError("model_config", name, problem)
    return MODEL_CONFIGS[name]


def initialise(
    model: nn.Module,
    model_config: str | None,
    *,
    last_bns: Iterable[nn.Module] = (),
    linear_std: float | None = None,
) -> None:
    """Reinitialise all weights of `model`.

    Args:
        model: Network of convolutions, batch norms and linear layers.
        model_config: One of `MODEL_CONFIGS`.
        last_bns: The last batch norm of each residual branch.
        linear_std: Standard deviation of linear layers, whose biases then start at zero; None keeps
        PyTorch's initialisation.

    Raises:
        ModelError: The configuration is unknown, or `grp-…` is given for a network without residual blocks.
    """
    config = init_config(model_config)
    last_bns = list(last_bns)
    if config.zero_last_bn and not last_bns:
        problem = (
            "it starts the last batch norm of each residual block at zero, and this network has no residual blocks: "
            "choose classic or fanin"
        )
        raise ModelSettingError("model_config", model_config, problem)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode=config.fan, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear) and linear_std is not None:
            nn.init.normal_(module.weight, 0.0, linear_std)
            nn.init.zeros_(module.bias)
    if config.zero_last_bn:
        for bn in last_bns:
            assert isinstance(bn, nn.BatchNorm2d)
            nn.init.zeros_(bn.weight)
