"""What each ATen operator does to channel labels.

Data movement acts on the label arrays literally; element-wise operators unite what they bring together;
contractions consume the labels of the contracted dimension and pass the others on; statistics over channels
and operators that are not listed freeze what they touch, with the reason.
"""

# Importing a module of rules enters them in the register.
from pruning.operators import (
    elementwise,
    normalisation,
    parts,
    products,
    reductions,
    shapes,
    space,
    writing,
)
from pruning.operators.register import RULES, arguments

__all__ = [
    "RULES",
    "arguments",
    "elementwise",
    "normalisation",
    "parts",
    "products",
    "reductions",
    "shapes",
    "space",
    "writing",
]
