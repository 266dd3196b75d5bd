"""Labels that depend on two dimensions of a tensor are united until they depend on one."""

from __future__ import annotations

import numpy as np

from pruning.engine.coupling import settle
from pruning.engine.labeller import Labeller
from pruning.engine.operators import RULES


def test_labels_beside_a_channel_that_stays_come_to_an_end() -> None:
    """Keypoint R-CNN has such labels: 2 shares its column with a channel that always stays."""
    labeller = Labeller(RULES)
    atoms = labeller.table.new(5)
    slot = np.array([[-1, 0, 1], [2, 3, 4]])
    labeller.joint_slots.append((slot, "view"))

    root = settle(labeller)

    assert root.tolist() == [0, 1, 2, 0, 1]
    assert labeller.table.frozen(root).tolist() == (atoms == 2).tolist()
