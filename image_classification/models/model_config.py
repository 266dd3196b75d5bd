"""The flags that choose a network and its starting weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import get_args

import torch
from torch import nn

from image_classification.config import ConfigError, check, check_choice, flag
from image_classification.models.building_for_weights import model_for_weights
from image_classification.models.factory import create_model
from image_classification.models.initialization import ModelConfigName
from image_classification.models.meta_device import building_on
from image_classification.plain_data import Plain


@dataclasses.dataclass(kw_only=True)
class ModelConfig:
    """Which network to train or evaluate, and where its weights start."""

    arch: str = flag(
        "resnet50",
        "--arch",
        "-a",
        help="network: one of our own, torchvision/NAME or timm/NAME",
        metavar="NAME",
    )
    model_config: ModelConfigName | None = flag(
        None,
        "--model-config",
        "-c",
        help="initialisation of our own networks: convolutions by fan-out (classic, the default) or fan-in; "
        "grp-…: the last batch norm of each residual block starts at zero",
    )
    num_classes: int | None = flag(None, "--num-classes", help="number of classes (default: from the data)")
    pretrained_weights: str | None = flag(
        None,
        "--pretrained-weights",
        "--weights",
        help="start from these weights: a LucidPrune checkpoint (pruned ones too), a plain state dict, or what a "
        "library publishes, such as torchvision/resnet50:DEFAULT or timm/resnet50.a1_in1k",
        metavar="FILE",
        reads=True,
    )
    pretrained_ema: bool | None = flag(
        None,
        "--pretrained-ema",
        help="take the averaged weights of --pretrained-weights, or with --no- the last ones; default: the averaged "
        "ones of a LucidPrune checkpoint that has them, for validation has judged them",
        setting="ema",
    )
    new_head: bool = flag(
        False, "--new-head", help="with --pretrained-weights: start a new classifier, for other classes"
    )
    ignore_class_names: bool = flag(
        False,
        "--ignore-class-names",
        help="take class i of the data for class i of the weights whatever they are called; otherwise classes that a "
        "checkpoint knows by name are matched by name",
    )
    arch_option: list[str] = flag(
        [],
        "--arch-option",
        help="option of the architecture, such as shortcut=B",
        metavar="KEY=VALUE",
        repeatable=True,
    )

    bn_momentum: float | None = flag(
        None,
        "--bn-momentum",
        help="share of a batch in the running statistics of batch norms; default: the architecture's",
    )
    bn_eps: float | None = flag(
        None,
        "--bn-epsilon",
        help="what batch norms add to the variance; default: the architecture's",
        setting="bn_eps",
    )

    def __post_init__(self) -> None:
        check(bool(self.arch), "--arch is empty: give the name of a network")
        if self.model_config is not None:
            check_choice("model_config", self.model_config, get_args(ModelConfigName))
        check(
            self.num_classes is None or self.num_classes >= 1,
            f"--num-classes {self.num_classes}: a network needs at least 1 class",
        )
        given_ema = self.pretrained_ema is not None
        for name, given in (("--pretrained-ema", given_ema), ("--new-head", self.new_head)):
            check(
                not given or self.pretrained_weights is not None,
                f"{name} has no effect without --pretrained-weights: give the file, or leave {name} out",
            )
        for name, value in (("--bn-momentum", self.bn_momentum), ("--bn-epsilon", self.bn_eps)):
            check(value is None or 0 < value <= 1, f"{name} {value}: give a number above 0, at most 1")
        parse_options(self.arch_option)

    @property
    def options(self) -> Plain:
        """Return the keyword arguments of the architecture.

        Raises:
            ConfigError: A word of `--arch-option` cannot be parsed, or names an option that has its own flag.
        """
        options = parse_options(self.arch_option)
        for name, value in (("bn_momentum", self.bn_momentum), ("bn_eps", self.bn_eps)):
            if value is not None:
                check(
                    name not in options, f"--arch-option {name} is given by a flag of its own: leave one out"
                )
                options[name] = value
        return options


def parse_options(words: list[str]) -> Plain:
    """Parse `["shortcut=B", "drop_rate=0.1"]` to a dict; values are read as YAML.

    Raises:
        ConfigError: A word is not KEY=VALUE, or a key occurs twice.
    """
    options: Plain = {}
    if not words:
        return options
    from image_classification.yaml_reading import parse_yaml

    for word in words:
        key, equals, value = word.partition("=")
        check(bool(key and equals), f"--arch-option {word!r}: write KEY=VALUE, such as shortcut=B")
        check(key not in options, f"--arch-option {key} is given twice")
        try:
            options[key] = parse_yaml(value)
        except ConfigError:
            raise ConfigError(f"--arch-option {word!r}: the value cannot be read as YAML") from None
    return options


def build_model(
    config: ModelConfig,
    *,
    num_classes: int,
    image_size: int | None = None,
    device: torch.device | str | None = None,
) -> nn.Module:
    """Build the network that a configuration describes, with its initial weights.

    Args:
        config: Network and weights.
        num_classes: Number of classes of the data; a `num_classes` of the configuration must not be smaller.
        image_size: Side of the input in pixels; None for the architecture's own.
        device: Device to build it on.

    Raises:
        ConfigError: `--num-classes` is smaller than the data's number.
        ModelError, FileNotFoundError: The network cannot be built, or its weights cannot be loaded.
    """
    check(
        config.num_classes is None or config.num_classes >= num_classes,
        f"--num-classes {config.num_classes}, but the data has {num_classes} classes: give {num_classes} or "
        "more",
    )
    classes = num_classes if config.num_classes is None else config.num_classes
    options = config.options
    if config.pretrained_weights is None:
        with building_on(device):
            return create_model(
                config.arch,
                num_classes=classes,
                model_config=config.model_config,
                image_size=image_size,
                **options,
            )
    return model_for_weights(
        config.arch,
        Path(config.pretrained_weights),
        num_classes=classes,
        model_config=config.model_config,
        image_size=image_size,
        ema=config.pretrained_ema,
        new_head=config.new_head,
        device=device,
        **options,
    )
