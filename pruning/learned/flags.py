"""The flags of learned gates. Defaults are the published constants (Ganjdanesh et al., ECCV 2022)."""

from __future__ import annotations

import dataclasses
from typing import Any

from image_classification.config import check, flag

FORMS = ("simple", "hyper")
NOISES = ("gumbel", "logistic")
SAMPLINGS = ("soft", "hard")
GATED = ("inner", "all")


@dataclasses.dataclass(kw_only=True)
class GateFlags:
    """Part of `PruningConfig`."""

    gates: str = flag(
        "simple", "--gates", choices=FORMS,
        help="Where gates come from: a free number per channel, or a hypernetwork (bidirectional GRU over the layers).",
    )  # fmt: skip
    gate_groups: str = flag(
        "inner", "--gate-groups", choices=GATED,
        help="Channels that get gates: those within blocks (as published), or also those of residual sums.",
    )  # fmt: skip
    gate_noise: str = flag(
        "gumbel", "--gate-noise", choices=NOISES,
        help="Noise of a gate: as published, or that of a binary concrete variable.",
    )  # fmt: skip
    gate_sampling: str = flag(
        "soft", "--gate-sampling", choices=SAMPLINGS,
        help="What the network sees while gates learn: values in (0, 1) as published, or 0 and 1 with straight-through "
        "gradients. Costs always count hard gates.",
    )  # fmt: skip
    gate_temperature: float = flag(0.4, "--gate-temperature", help="Temperature T of the gates.")
    gate_base: float = flag(3.0, "--gate-base", help="What is added to a gate's logit: how open gates start.")
    gate_epochs: int = flag(
        200,
        "--gate-epochs",
        help="Passes over the calibration pictures in which gates learn (--prof does not shorten them).",
    )
    gate_lr: float = flag(1e-3, "--gate-lr", help="Learning rate of the gates (AdamW).")
    gate_weight_decay: float = flag(1e-3, "--gate-weight-decay", help="Weight decay of the gates (AdamW).")
    matching_weight: float = flag(
        10.0,
        "--matching-weight",
        help="Weight of the squared distance of the explanation from the original one.",
    )
    gate_task_weight: float = flag(
        0.0, "--gate-task-weight", help="Weight of the classification loss while gates learn."
    )
    resource_weight: float = flag(
        1.0, "--resource-weight", help="Weight of the resource loss log(max(cost, p)/p)."
    )

    resource_growth: float = flag(
        1.0,
        "--resource-growth",
        help="Factor on the weight of the resource loss after every epoch that leaves the gates above the budget; 1 "
        "as published.",
    )

    def gate_settings(self) -> dict[str, Any]:
        """What gates learn by, as plain data by name of the field."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(GateFlags)}

    def check_gates(self) -> None:
        """Refuse values that cannot work.

        Raises:
            ConfigError: Naming the flag.
        """
        check(self.gate_temperature > 0, f"--gate-temperature {self.gate_temperature}: must be positive")
        check(self.gate_epochs >= 1, f"--gate-epochs {self.gate_epochs}: at least 1 is needed")
        check(self.gate_lr > 0, f"--gate-lr {self.gate_lr}: must be positive")
        for name in ("gate_weight_decay", "matching_weight", "gate_task_weight"):
            value = getattr(self, name)
            check(value >= 0, f"--{name.replace('_', '-')} {value} is negative")
        check(
            self.matching_weight + self.gate_task_weight > 0,
            "--matching-weight 0 and --gate-task-weight 0: the gates would learn nothing; give one of them",
        )
        check(
            self.resource_weight > 0,
            f"--resource-weight {self.resource_weight}: must be positive, or no gate would ever close",
        )
        check(self.resource_growth >= 1, f"--resource-growth {self.resource_growth}: must be 1 or more")
