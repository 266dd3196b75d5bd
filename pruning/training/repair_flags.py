"""The flags of the repair that follows a rewrite of channels, or a round of zeroed weights."""

from __future__ import annotations

import dataclasses

from image_classification.config import check, flag
from pruning.repair.repairing import Method, RepairSettings, Scope
from pruning.training.pruning_config import PruningConfig
from pruning.training.unused_flags import refuse_unused


@dataclasses.dataclass(kw_only=True)
class RepairConfig:
    """Repair of what was pruned"""

    repair: Method | None = flag(
        None,
        "--repair",
        setting="repair",
        help="What repairs the network right after a rewrite, from the calibration images and without training: "
        "least-squares solves for weights that make up for what left, statistics measures batch norms again, none "
        "leaves the cut as it is. Held-out images decide whether it is kept. Default: least-squares, where every "
        "process has calibration images; --unstructured-pruning sets images aside only if this flag or "
        "--calibration-size asks.",
    )
    repair_scope: Scope | None = flag(
        None,
        "--repair-scope",
        setting="scope",
        help="Layers that least-squares solves for: those that lost inputs (cut), or all from the first of them on "
        "(behind); by default cut with --iterative-pruning, else behind.",
    )

    def __post_init__(self) -> None:
        check(
            self.repair_scope is None or self.repair in (None, "least-squares"),
            f"--repair-scope {self.repair_scope} has no effect with --repair {self.repair}: leave it out",
        )

    def check_used(self, pruning: PruningConfig, *, unstructured: bool) -> None:
        """Refuse flags that would have no effect.

        Raises:
            ConfigError: Such a flag is given; the message names it.
        """
        if pruning.active:
            return
        needed = "--iterative-pruning, --one-shot-pruning or --pruning-method learned"
        refuse_unused(self, ["repair_scope"], needed)
        if not unstructured:
            refuse_unused(self, ["repair"], f"{needed}, or --unstructured-pruning")

    @property
    def wants_images(self) -> bool:
        """Whether images have to be held out for the repair even if nothing else needs them."""
        return self.repair not in (None, "none")

    def choice(self) -> Method | RepairSettings | None:
        """Return the requested repair; None for the default (see `pruning.repair.rewrite_repair.settled`)."""
        if self.repair_scope is None:
            return self.repair
        return RepairSettings(method="least-squares", scope=self.repair_scope)
