"""Label rules: the effect of each ATen operator on channel labels.

Data movement acts on the label arrays literally; element-wise operators unite what they bring together; contractions
consume the labels of the contracted dimension and pass the others on; statistics over channels and operators that are
not listed freeze what they touch, with the reason.
"""

# Importing a module of rules registers them.
from pruning.engine.labeller import Rules
from pruning.engine.operators import (
    elementwise,
    lookups,
    normalisation,
    products,
    recurrent,
    reductions,
    shapes,
    slicing,
    space,
)
from pruning.engine.operators.register import (
    OPERATORS,
    arguments,
    keeps_offset,
    label_rule,
    operator_named,
    register_operator,
    unknown,
)
from pruning.engine.operators.writing import written_through

RULES = Rules(label_rule, unknown, written_through)

__all__ = [
    "OPERATORS",
    "RULES",
    "arguments",
    "elementwise",
    "keeps_offset",
    "lookups",
    "normalisation",
    "operator_named",
    "products",
    "recurrent",
    "reductions",
    "register_operator",
    "shapes",
    "slicing",
    "space",
]
