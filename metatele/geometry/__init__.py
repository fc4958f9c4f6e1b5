"""What a teleport can aim at, as functions of the weights on a batch."""

from metatele.errors import ConfigError
from metatele.geometry.along_spaces import module_curvatures, module_derivatives, random_tangents
from metatele.geometry.curvature import Curvature, curvatures, derivatives
from metatele.geometry.kappa import Curvatures
from metatele.geometry.landscape import Landscape, Point
from metatele.geometry.module_point import ModulePoint
from metatele.geometry.objectives import GradientNorm, Objective
from metatele.geometry.optimality import OptimalityReport, commutator, one_teleport_is_enough
from metatele.geometry.sharpness import Sharpness
from metatele.geometry.spectrum import EigenSolver, count_above, hessian, largest_eigenvalues, log_volume

OBJECTIVES: dict[str, type[Objective]] = {kind.name: kind for kind in (GradientNorm, Sharpness, Curvature)}
ModuleObjective = GradientNorm | Sharpness | Curvature  # those that also take a ModulePoint


def objective(name: str) -> Objective:
    """Objective by name: ``grad-norm``, ``sharpness`` or ``curvature``, with its default settings.

    Raises:
        ConfigError: There is none of this name.

    Example:
        >>> objective("curvature").curves
        1
    """
    if name not in OBJECTIVES:
        raise ConfigError(f"objective must be one of {', '.join(OBJECTIVES)}, got {name!r}")
    return OBJECTIVES[name]()


__all__ = [
    "OBJECTIVES",
    "Curvature",
    "Curvatures",
    "EigenSolver",
    "GradientNorm",
    "Landscape",
    "ModuleObjective",
    "ModulePoint",
    "Objective",
    "OptimalityReport",
    "Point",
    "Sharpness",
    "commutator",
    "count_above",
    "curvatures",
    "derivatives",
    "hessian",
    "largest_eigenvalues",
    "log_volume",
    "module_curvatures",
    "module_derivatives",
    "objective",
    "one_teleport_is_enough",
    "random_tangents",
]
