"""How each family is meta-trained: one entry for each family of :mod:`metatele.config.families`, of the same name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from metatele.config import RunConfig, family_named
from metatele.errors import ConfigError
from metatele.training.equivariant import EquivariantTrainer
from metatele.training.flat import FlatTrainer
from metatele.training.general import GeneralTrainer
from metatele.training.processes import Processes
from metatele.training.trainer import MetaTrainer

MakeTrainer = Callable[[Any, torch.device | str, Processes], MetaTrainer]

_TRAINERS: dict[str, MakeTrainer] = {}


def register_trainer(name: str, make: MakeTrainer) -> None:
    """Make a family's trainer known.

    Args:
        name: Of the family.
        make: ``make(config, device, processes)`` gives the trainer at its beginning.

    Raises:
        ConfigError: There are no settings of this name, or there is a trainer already.
    """
    family_named(name)
    if name in _TRAINERS:
        raise ConfigError(f"the family {name!r} has a trainer already")
    _TRAINERS[name] = make


def trainer_of(
    config: RunConfig, device: torch.device | str = "cpu", processes: Processes | None = None
) -> MetaTrainer:
    """A trainer for a run, at its beginning.

    Args:
        config: Of a family that has a trainer.
        device: Where.
        processes: Those that share the batch; this one alone if not given.

    Raises:
        ConfigError: The family has none, or the settings cannot train.

    Example:
        >>> from metatele.config import preset
        >>> type(trainer_of(preset("quick", batch=2, widths=(3, 4, 2), samples=3, hidden=8))).__name__
        'FlatTrainer'
    """
    name = config.family.name
    if name not in _TRAINERS:
        raise ConfigError(f"the family {name!r} has no trainer")
    return _TRAINERS[name](config, device, processes or Processes())


register_trainer("flat", FlatTrainer)
register_trainer("equivariant", EquivariantTrainer)
register_trainer("general", GeneralTrainer)
