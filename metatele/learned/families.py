"""The families of meta-optimizers: which optimizer the settings of one describe, and how its trajectories begin.

One entry for each family of :mod:`metatele.config.families`, of the same name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from metatele.config import FamilyConfig, RunConfig, family_named
from metatele.errors import ConfigError
from metatele.learned.equivariant.optimizer import EquivariantOptimizer
from metatele.learned.equivariant.rollout import Rollout
from metatele.learned.flat.optimizer import MetaOptimizer
from metatele.learned.flat.trajectories import Trajectories
from metatele.learned.general.optimizer import GeneralOptimizer
from metatele.learned.unrolled import Unrolled


@dataclass(frozen=True)
class LearnedFamily:
    """A family's optimizer.

    Attributes:
        name: As its settings have it.
        optimizer: The class; an instance has its settings as ``config``, with a ``title``.
        build: ``build(method, task, seed)``, an optimizer before any training.
        begin: ``begin(optimizer, problems)``, trajectories at their initial weights.
        task_of: The distribution of problems that an optimizer is made for, if there is just one; else the settings'
            default stands for all.

    Example:
        >>> from metatele.config import EquivariantConfig
        >>> family = learned_family("equivariant")
        >>> family.build(EquivariantConfig(hidden=8), family.settings.part("task")(), 0).config.title
        'Equivariant(update,tele)'
    """

    name: str
    optimizer: type[nn.Module]
    build: Callable[[Any, Any, int], nn.Module]
    begin: Callable[[Any, Any], Unrolled]
    task_of: Callable[[Any], Any] | None = None

    @property
    def settings(self) -> FamilyConfig:
        """Its settings' entry."""
        return family_named(self.name)

    def task(self, optimizer: nn.Module, run: RunConfig | None = None) -> Any:
        """The distribution of problems that one of its optimizers is for, or was trained on in a run."""
        if self.task_of is not None:
            return self.task_of(optimizer)
        return self.settings.part("task")() if run is None else run.task


_FAMILIES: dict[str, LearnedFamily] = {}


def register_learned(family: LearnedFamily) -> LearnedFamily:
    """Make a family's optimizer known.

    Raises:
        ConfigError: There are no settings of this name, or there is an optimizer already.

    Example:
        >>> register_learned(learned_family("flat"))
        Traceback (most recent call last):
        metatele.errors.ConfigError: the family 'flat' has an optimizer already
    """
    family_named(family.name)
    if family.name in _FAMILIES:
        raise ConfigError(f"the family {family.name!r} has an optimizer already")
    _FAMILIES[family.name] = family
    return family


def learned_family(name: str) -> LearnedFamily:
    """The family of a name.

    Raises:
        ConfigError: There is none.

    Example:
        >>> learned_family("flat").optimizer.__name__
        'MetaOptimizer'
    """
    if name not in _FAMILIES:
        raise ConfigError(f"family must be one of {', '.join(_FAMILIES)}, got {name!r}")
    return _FAMILIES[name]


def family_of(optimizer: object) -> LearnedFamily:
    """The family a meta-optimizer belongs to.

    Raises:
        TypeError: It is none.

    Example:
        >>> from metatele.learned import ConstantOptimizer
        >>> family_of(ConstantOptimizer(0.1, 0.01)).name
        'equivariant'
    """
    for kind in type(optimizer).__mro__:  # the closest, where a family's optimizer is made of another's
        for family in _FAMILIES.values():
            if family.optimizer is kind:
                return family
    raise TypeError(
        f"checkpoint must be a name, a path, a Checkpoint or a meta-optimizer, got {type(optimizer).__name__}"
    )


def _rollout(optimizer: Any, problems: Any) -> Unrolled:
    return Rollout.begin(problems.fitting())


register_learned(
    LearnedFamily("flat", MetaOptimizer, MetaOptimizer, Trajectories.begin, lambda optimizer: optimizer.task)
)
register_learned(
    LearnedFamily(
        "equivariant",
        EquivariantOptimizer,
        lambda method, task, seed: EquivariantOptimizer(method, seed),
        _rollout,
    )
)
register_learned(
    LearnedFamily(
        "general",
        GeneralOptimizer,
        lambda method, task, seed: GeneralOptimizer(method, seed),
        _rollout,
    )
)
