"""What moves of any module have in common: one method says which elements of its groups act."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from metatele.errors import ConfigError
from metatele.geometry import Point
from metatele.network.spaces import GROUPS, Space
from metatele.symmetry.exact import Element
from metatele.teleport.move import Course, TeleportMove


def some_groups(groups: Sequence[str]) -> tuple[str, ...]:
    """Names of groups, if they are some of those there are.

    Raises:
        ConfigError: They are not.

    Example:
        >>> some_groups(["scale", "perm"])
        ('scale', 'perm')
    """
    if isinstance(groups, str) or not set(groups) <= set(GROUPS) or not groups:
        raise ConfigError(f"groups must be some of {', '.join(GROUPS)}, got {groups!r}")
    return tuple(groups)


@dataclass(frozen=True, kw_only=True)
class ModuleMove(TeleportMove):
    """A move of one's own along the exact symmetries of any module, for ``teleport_`` and ``TeleportOptimizer``.

    It is computed in double precision on a copy. If an output of the batch would change there, nothing is written.

    Args:
        groups: Which may act, of ``GL``, ``O``, ``scale``, ``phase``, ``perm``, ``shift``.

    Example:
        A move that doubles what writes every unit with a scale, and halves what reads it.

        >>> import torch
        >>> from torch import nn
        >>> import metatele
        >>> class Double(ModuleMove):
        ...     def elements(self, spaces, tensors):
        ...         for space in spaces:
        ...             if space.group == "scale":
        ...                 two = torch.full((space.k,), 2.0, dtype=torch.float64)
        ...                 yield space, Element(two, 1 / two)
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.Flatten())
        >>> before, x = model[0].weight.detach().clone(), torch.randn(5, 1, 6, 6)
        >>> report = metatele.teleport_(model, x, torch.zeros(5, 8), nn.functional.mse_loss, move=Double())
        >>> report.drift < 1e-5, torch.allclose(model[0].weight, 2 * before)
        (True, True)
    """

    groups: Sequence[str] = GROUPS

    def __post_init__(self) -> None:
        """Check settings."""
        super().__post_init__()
        object.__setattr__(self, "groups", some_groups(self.groups))

    @abstractmethod
    def elements(self, spaces: Sequence[Space], tensors: Mapping[str, Tensor]) -> Iterator[tuple[Space, Element]]:
        """What acts, one after another; each has acted on the tensors before the next is asked for.

        Under several ranks all have to give the same: what is random comes from a seed.

        Args:
            spaces: Of :attr:`groups`, none with a parameter that may not move.
            tensors: Parameters in double precision, by name; to be read.
        """

    def legs(self, start: Point, movable: Sequence[bool]) -> Course:
        """It is no move of flat weights.

        Raises:
            ConfigError: Always.
        """
        name = type(self).__name__
        raise ConfigError(f"{name} moves a model, not flat weights: give it to teleport_ or TeleportOptimizer")
