"""Files of the attribution-preservation programs (Park et al. 2020): VGG-16-BN on Pascal VOC, full or narrow.

Keys: epoch, opt_dict or arch (an argparse Namespace), state_dict (`module.…`), best_mAP, optimizer, and p_rate for
pruned networks. Distilled and structurally pruned networks have smaller tensors, the others zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pruning.files.importing.architectures import build_network, classifier_part, recognise
from pruning.files.importing.imported import Imported, facts_of
from pruning.files.importing.published_part import state_of

NAME = "swa"


def matches(content: object) -> bool:
    """Whether a file's content looks like this format: a state dict of a VGG."""
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping):
        return False
    names = [str(name).removeprefix("module.") for name in state]
    return any(name.startswith("features.") and name.split(".")[1] > "0" for name in names) and not any(
        ".conv." in name for name in names
    )


def read(content: object, source: Path, classifier: Path | None) -> Imported:
    """Build the network; see `import_checkpoint`."""
    part = classifier_part(state_of(content, source, "state_dict"))
    network = build_network(part, recognise(part, small_images=False, families=("vgg",)))
    facts = facts_of(content, ("epoch", "best_mAP", "p_rate"))
    remarks = ["its images have several labels each: evaluate it as a multi-label network"]
    return Imported(NAME, {"classifier": network}, facts=facts, remarks=remarks)
