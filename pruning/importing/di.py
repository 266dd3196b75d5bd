"""Files of the DI-pruning program (Kung & Hou 2020): ResNets whose pruned channels are rows of zeros.

Keys: epoch, arch, state_dict (`module.…`), best_prec1, optimizer. Nothing in them is smaller; `python -m pruning
shrink` makes it so.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pruning.importing.architectures import build_network, classifier_part, recognise
from pruning.importing.imported import Imported, facts_of
from pruning.importing.parts import state_of

NAME = "di"


def matches(content: Any) -> bool:
    """Whether a file's content looks like this kind: a state dict of a ResNet for photographs."""
    state = content.get("state_dict") if isinstance(content, Mapping) else None
    return isinstance(state, Mapping) and any(".layer4.0." in f".{name}" for name in state)


def read(content: Any, source: Path, classifier: Path | None) -> Imported:
    """Make a network of it; see `import_checkpoint`."""
    part = classifier_part(state_of(content, source, "state_dict"))
    network = build_network(part, recognise(part, small_images=False, families=("resn",)))
    facts = facts_of(content, ("epoch", "best_prec1"))
    return Imported(NAME, {"classifier": network}, facts=facts)
