"""Files of the DI-pruning program (Kung & Hou 2020): ResNets whose pruned channels are rows of zeros.

Keys: epoch, arch, state_dict (`module.…`), best_prec1, optimizer. Their tensors have full size; `python -m pruning
shrink` removes the zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pruning.files.importing.architectures import build_network, classifier_part, recognise
from pruning.files.importing.imported import Imported, facts_of
from pruning.files.importing.published_part import state_of

NAME = "di"


def matches(content: object) -> bool:
    """Whether a file's content looks like this format: a state dict of an ImageNet ResNet."""
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    return isinstance(state, Mapping) and any(".layer4.0." in f".{name}" for name in state)


def read(content: object, source: Path, classifier: Path | None) -> Imported:
    """Build the network; see `import_checkpoint`."""
    part = classifier_part(state_of(content, source, "state_dict"))
    network = build_network(part, recognise(part, small_images=False, families=("resn",)))
    facts = facts_of(content, ("epoch", "best_prec1"))
    return Imported(NAME, {"classifier": network}, facts=facts)
