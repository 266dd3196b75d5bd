"""A single cut of a network and everything that trains along with it, and a record of the changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch.optim import Optimizer

from image_classification.models.modes import drop_graphs, uncompiled
from pruning.engine.surgery import prune_channels
from pruning.rewrites.averages import Average
from pruning.rewrites.followed import Followed
from pruning.rewrites.leftovers import warn_of_leftovers
from pruning.rewrites.subject import Kept, Scores, Subject


def cut(
    subject: Subject,
    keep: Kept,
    optimizers: Sequence[Optimizer],
    averages: Sequence[Average],
    followed: Followed,
    done: Callable[[dict[str, list[int]]], None],
) -> None:
    """Cut a network down, in place, with its optimizers, averages and explanation. Collective.

    The cut was tried when it was chosen (`search.feasible`).

    Args:
        subject: The network, its graph and its costs.
        keep: Channels to keep.
        optimizers: Optimizers that are cut along.
        averages: Averages that are cut along.
        followed: The explanation.
        done: Is told group name → width before and after as soon as the network is smaller. An error before that
            leaves all as it was.

    Raises:
        RuntimeError: The ranks disagree about the result.
    """
    model, graph = subject.model, subject.graph
    drop_graphs(model)
    if subject.distributed.is_main:
        warn_of_leftovers(model, optimizers)
    staying = followed.staying(graph, graph.keep_mask(keep))
    with uncompiled():
        report = prune_channels(model, graph, keep, optimizers=optimizers, emas=averages, check=False)
        done({name: list(widths) for name, widths in report.widths.items()})
        subject.course.costs.refresh()
    followed.follow(staying)
    subject.distributed.check_agreement(
        "the widths of the network", {group.name: group.width for group in graph.groups}
    )


def borders(subject: Subject, keep: Kept, scores: Scores) -> dict[str, list[float]]:
    """Return group name → lowest score kept and highest removed, for the groups about to be cut.

    A group that keeps all its channels after all (`search.feasible`) is none of them.
    """
    found = {}
    for index, kept in keep.items():
        values = scores[index].numpy()
        gone = np.setdiff1d(np.arange(len(values)), kept)
        if gone.size == 0:
            continue
        found[subject.graph.groups[index].name] = [float(values[kept].min()), float(values[gone].max())]
    return found
