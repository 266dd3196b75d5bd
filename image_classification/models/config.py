"""The flags that choose a network and its starting weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from image_classification.config import check, flag
from image_classification.models.factory import create_model
from image_classification.models.initialization import MODEL_CONFIGS
from image_classification.models.structure import building_on
from image_classification.models.weights import model_for_weights


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
    model_config: str | None = flag(
        None,
        "--model-config",
        "-c",
        help="initialisation of our own networks: convolutions by fan-out (classic, the default) or fan-in; "
        "grp-…: the last batch norm of each residual block starts at zero",
        choices=tuple(MODEL_CONFIGS),
    )
    num_classes: int | None = flag(None, "--num-classes", help="number of classes (default: from the data)")
    pretrained_weights: str | None = flag(
        None,
        "--pretrained-weights",
        help="start from these weights: a checkpoint of ours (pruned ones too), a plain state dict, "
        "torchvision's",
        metavar="FILE",
    )
    pretrained_ema: bool = flag(
        False, "--pretrained-ema", help="take the averaged weights of --pretrained-weights"
    )
    new_head: bool = flag(
        False, "--new-head", help="with --pretrained-weights: start a new classifier, for other classes"
    )
    arch_option: list[str] = flag(
        [],
        "--arch-option",
        help="option of the architecture, such as shortcut=B",
        metavar="KEY=VALUE",
        repeatable=True,
    )

    def __post_init__(self) -> None:
        check(bool(self.arch), "--arch is empty: give the name of a network")
        check(
            self.model_config is None or self.model_config in MODEL_CONFIGS,
            f"--model-config {self.model_config}: choose from {', '.join(MODEL_CONFIGS)}",
        )
        check(
            self.num_classes is None or self.num_classes >= 1,
            f"--num-classes {self.num_classes}: a network needs at least 1 class",
        )
        for name, given in (("--pretrained-ema", self.pretrained_ema), ("--new-head", self.new_head)):
            check(
                not given or self.pretrained_weights is not None,
                f"{name} has no effect without --pretrained-weights: give the file, or leave {name} out",
            )
        parse_options(self.arch_option)


def parse_options(words: list[str]) -> dict[str, Any]:
    """`["shortcut=B", "drop_rate=0.1"]` as a dict; values are read as YAML."""
    options: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        check(bool(key and equals), f"--arch-option {word!r}: write KEY=VALUE, such as shortcut=B")
        check(key not in options, f"--arch-option {key} is given twice")
        try:
            options[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            check(False, f"--arch-option {word!r}: the value cannot be read")
    return options


def build_model(
    config: ModelConfig,
    *,
    num_classes: int,
    image_size: int | None = None,
    device: torch.device | str | None = None,
) -> nn.Module:
    """The network that the flags describe, with its starting weights.

    Args:
        config: The flags.
        num_classes: Number of classes of the data; `--num-classes` must not contradict it from below.
        image_size: Side of the input in pixels; None: the architecture's own.
        device: Where to build it.

    Raises:
        ConfigError: `--num-classes` is smaller than the data's number.
        ModelError, FileNotFoundError: What cannot be built or loaded.
    """
    check(
        config.num_classes is None or config.num_classes >= num_classes,
        f"--num-classes {config.num_classes}, but the data has {num_classes} classes: give {num_classes} or "
        "more",
    )
    classes = num_classes if config.num_classes is None else config.num_classes
    options = parse_options(config.arch_option)
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
