"""Symmetries of multi-layer perceptrons: group elements and how they act on the weights."""

from metatele.symmetry.actions import ACTIONS, Action, Approximate, Exact, Rescaling, action, register_action
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
from metatele.symmetry.least_squares import (
    damped_right_solve,
    has_full_rank,
    inverse_factor,
    pseudo_inverse,
    truncated_inverse,
)
from metatele.symmetry.site import Acted, Pair, Site
from metatele.symmetry.sweep import drift, sweep, walk

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
    "Site",
    "action",
    "cayley",
    "compose",
    "damped_right_solve",
    "direct",
    "drift",
    "exponential",
    "first_order",
    "from_matrix",
    "has_full_rank",
    "identity",
    "inverse_factor",
    "pseudo_inverse",
    "random_algebra",
    "register_action",
    "sweep",
    "truncated_inverse",
    "walk",
]
