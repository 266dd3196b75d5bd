"""The flags for the network's explanation: which one to use, and how it enters scores."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal, get_args

from explainers.differentiable.explanation import EXPLAINED, ExplainedClass
from image_classification.config import check, flag
from pruning.criteria.combine import DEFAULT_WEIGHT
from pruning.criteria.saliency import DEFAULT_PASSES, DEFAULT_TARGET, Target

ExplanationName = Literal["selector", "gradcam", "casm"]
EXPLANATIONS: tuple[ExplanationName, ...] = get_args(ExplanationName)
#: Verb of `python -m explainers` that writes the file of an explanation.
_WRITERS = {"selector": "train-selector", "casm": "train-casm"}


@dataclasses.dataclass(kw_only=True)
class SaliencyFlags:
    """Part of `PruningConfig`."""

    selector: str | None = flag(
        None,
        "--selector",
        metavar="FILE",
        reads=True,
        help="Trained selector (python -m explainers train-selector) whose explanation is to survive; every rewrite "
        "reports how far it moved.",
    )
    casm: str | None = flag(
        None,
        "--casm",
        metavar="FILE",
        reads=True,
        help="Trained CASM (python -m explainers train-casm) whose mask is to survive, in place of a selector.",
    )
    saliency_explanation: ExplanationName | None = flag(
        None,
        "--saliency-explanation",
        setting="originals",
        help="The explanation: that of --selector or --casm, or the network's Grad-CAM map, which needs no training; "
        "by default that of the file that is given.",
    )
    explained_class: ExplainedClass = flag(
        EXPLAINED,
        "--explained-class",
        help="The class whose explanation is to survive: what the original network predicts, or the label, as "
        "published.",
    )
    saliency_weight: float = flag(
        DEFAULT_WEIGHT,
        "--saliency-weight",
        metavar="BETA",
        setting="weight",
        help="Share β of the saliency score in --pruning-criterion CRITERION+saliency.",
    )
    saliency_passes: int = flag(
        DEFAULT_PASSES,
        "--saliency-passes",
        setting="max_passes",
        help="Backward passes per batch of the saliency score; exact where the explanation has no more numbers, else "
        "random projections.",
    )
    saliency_target: Target = flag(
        DEFAULT_TARGET,
        "--saliency-target",
        setting="target",
        help="The saliency score asks how far removal leads from the original network's explanation, or from the "
        "present one.",
    )

    def check_saliency(self, criteria: list[str], learned: bool) -> None:
        """Refuse flags that cannot apply.

        Args:
            criteria: Parts of `--pruning-criterion`.
            learned: Whether `--pruning-method learned` is set.

        Raises:
            ConfigError: Such a flag is given; the message names it.
        """
        kind = self.explanation_kind(criteria, learned)
        for name, path in {"selector": self.selector, "casm": self.casm}.items():
            if kind == name:
                check(
                    path is not None,
                    f"--{name} is missing: give the file that `python -m explainers {_WRITERS[name]}` wrote, or choose "
                    "--saliency-explanation gradcam, which needs no training",
                )
            else:
                check(
                    path is None, f"--{name} has no effect with --saliency-explanation {kind}: leave one out"
                )
        check(
            kind is not None or self.explained_class == EXPLAINED,
            "--explained-class has no effect without an explanation that is followed: give --selector or --casm",
        )
        scored = "saliency" in criteria and not learned
        check(
            (scored and len(criteria) == 2) or self.saliency_weight == DEFAULT_WEIGHT,
            "--saliency-weight has no effect without --pruning-criterion CRITERION+saliency, such as "
            "discriminant+saliency",
        )
        check(
            0 <= self.saliency_weight <= 1,
            f"--saliency-weight {self.saliency_weight}: give a share in [0, 1]",
        )
        check(
            scored or self.saliency_passes == DEFAULT_PASSES,
            "--saliency-passes has no effect without --pruning-criterion saliency",
        )
        check(self.saliency_passes >= 1, f"--saliency-passes {self.saliency_passes}: at least 1 is needed")
        check(
            scored or self.saliency_target == DEFAULT_TARGET,
            "--saliency-target has no effect without --pruning-criterion saliency",
        )

    def check_files(self) -> None:
        """Check that the files exist, before anything is opened or trained.

        Raises:
            ConfigError: A file is missing; the message names the flag.
        """
        for name, path in {"selector": self.selector, "casm": self.casm}.items():
            check(
                path is None or Path(path).is_file(),
                f"--{name} {path}: there is no such file; `python -m explainers {_WRITERS[name]}` writes one",
            )

    def explanation_kind(self, criteria: list[str], learned: bool) -> str | None:
        """Return the kind of explanation to follow; None for none."""
        if self.saliency_explanation is not None:
            return self.saliency_explanation
        if self.casm is not None and self.selector is None:
            return "casm"
        needed = learned or "saliency" in criteria or self.selector is not None
        return "selector" if needed else None
