"""Symmetries of multi-layer perceptrons: group elements and how they act on the weights."""

from metatele.symmetry.actions import (
    ACTIONS,
    Acted,
    Action,
    Approximate,
    Exact,
    Pair,
    Rescaling,
    action,
    drift,
    sweep,
)
from metatele.symmetry.group import (
    PARAMETRISATIONS,
    GroupElement,
    cayley,
    compose,
    direct,
    exponential,
    first_order,
    from_matrix,
    identity,
    random_algebra,
)
from metatele.symmetry.least_squares import damped_right_solve, pseudo_inverse

__all__ = [
    "ACTIONS",
    "PARAMETRISATIONS",
    "Acted",
    "Action",
    "Approximate",
    "Exact",
    "GroupElement",
    "Pair",
    "Rescaling",
    "action",
    "cayley",
    "compose",
    "damped_right_solve",
    "direct",
    "drift",
    "exponential",
    "first_order",
    "from_matrix",
    "identity",
    "pseudo_inverse",
    "random_algebra",
    "sweep",
]
