"""Records of rewrites, as plain data for checkpoints and reports, and in words."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence

from torch import Tensor

from image_classification.observe.html_table import html_table
from image_classification.plain_data import Plain
from pruning.engine.channel_graph import ChannelGraph
from pruning.engine.groups import Group


@dataclasses.dataclass(frozen=True)
class RewriteRecord:
    """The record of one rewrite, as plain data.

    Attributes:
        rewrite: Number of the rewrite, from 1.
        iteration: Training iteration after which it happened; -1 outside training.
        widths: Group name → [before, after], changed groups only.
        costs: Metric → [before, after, baseline].
        loss: Calibration loss [before, after], or [before, after the cut, after the repair]; all without training in
            between.
        scores: Group name → [lowest score kept, highest score removed].
        candidates: The best candidates considered.
        seconds: `score`, `search`, `rewrite` and, if there was one, `repair`.
        explanation: Mean squared distance of the explanation from the original network's [before, after], if one is
            followed.
        repair: Description of the repair; empty if there was none.
        unfinished: The error that ended the rewrite after the cut, in words; empty if none did. Costs that were not
            counted any more are NaN.
    """

    rewrite: int
    iteration: int
    widths: dict[str, list[int]]
    costs: dict[str, list[float]]
    loss: list[float]
    scores: dict[str, list[float]]
    candidates: list[Plain]
    seconds: dict[str, float]
    explanation: list[float] = dataclasses.field(default_factory=list)
    repair: str = ""
    unfinished: str = ""

    def describe(self) -> str:
        """Return a one-line description."""
        widths = ", ".join(f"{name} {before}→{after}" for name, (before, after) in self.widths.items())
        costs = ", ".join(
            f"{metric} {100 * after / base:.1f} %" for metric, (_, after, base) in self.costs.items()
        )
        moved = ""
        if self.explanation:
            moved = f"; explanation moved by {self.explanation[0]:.4g} → {self.explanation[1]:.4g}"
        known = [loss for loss in self.loss if not math.isnan(loss)]  # NaN without calibration data
        losses = f"; calibration loss {' → '.join(f'{loss:.4f}' for loss in known)}" if known else ""
        repair = f"; {self.repair}" if self.repair else ""
        repair += f"; ended after the cut by {self.unfinished}" if self.unfinished else ""
        return (
            f"rewrite {self.rewrite}: {widths or 'nothing to remove'}; {costs} of the original{losses}{repair}{moved}; "
            f"{sum(self.seconds.values()):.2f} s"
        )

    def _repr_html_(self) -> str:
        """Return a notebook's view: the widths before and after, and a line of costs."""
        rows = [(name, before, after) for name, (before, after) in self.widths.items()]
        when = f" after iteration {self.iteration}" if self.iteration >= 0 else ""
        return html_table(
            f"Rewrite {self.rewrite}{when}", ("group", "before", "after"), rows, [self.describe()]
        )


@contextlib.contextmanager
def unfinished_is_noted(history: list[RewriteRecord]) -> Iterator[None]:
    """Note an error inside the block in the record that the block has added, if it came to that.

    Args:
        history: The records; the network is as the last one says from the moment it is added.
    """
    before = len(history)
    try:
        yield
    except BaseException as error:
        if len(history) > before:
            text = (str(error).strip().splitlines() or [""])[0]
            said = f"{type(error).__name__}: {text}" if text else type(error).__name__
            history[-1] = dataclasses.replace(history[-1], unfinished=said)
        raise


def describe_group(
    graph: ChannelGraph, group: Group, scores: Tensor | None, history: Sequence[RewriteRecord]
) -> str:
    """Describe a group, one line per fact: what it couples, how far it may shrink, its scores and its rewrites.

    Args:
        graph: The graph of the group.
        group: The group.
        scores: (width,) scores of its current channels, if there are any.
        history: The rewrites so far.
    """
    members = sorted({member.tensor.rpartition(".")[0] for member in graph.members(group)})
    lines = [
        f"group {group.name}: {group.width} of {group.original_width} units × {group.channels_per_unit} channels",
        f"  coupled modules: {', '.join(members)}",
    ]
    if group.prunable:
        lines.append(f"  may shrink to {graph.allowed_widths(group)[0]}")
    else:
        lines.append(f"  cannot be pruned: {group.reason}")
    lines += [f"  note: {note}" for note in group.notes]
    if scores is not None:
        lines.append(
            f"  scores: {scores.min():.4g} … {scores.median():.4g} … {scores.max():.4g} (least, median, most)"
        )
    for record in history:
        if group.name in record.widths:
            before, after = record.widths[group.name]
            when = f" after iteration {record.iteration}" if record.iteration >= 0 else ""
            lines.append(f"  rewrite {record.rewrite}{when}: {before} → {after}")
    return "\n".join(lines)
