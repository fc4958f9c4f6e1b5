"""An optimizer around another one, which keeps groups, state and defaults; and when it does something more."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from metatele.errors import ConfigError
from metatele.network import ranks
from metatele.network.unwrap import unwrapped
from metatele.teleport import TeleportMove


class Wrapper(torch.optim.Optimizer):
    """Shows the wrapped optimizer's groups, state and defaults as its own.

    Args:
        base: The wrapped optimizer.
    """

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base = base
        super().__setstate__({})  # hooks and profiling, without a second copy of groups and state

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.base.param_groups = value

    @property
    def state(self) -> Any:
        """The wrapped optimizer's."""
        return self.base.state

    @state.setter
    def state(self, value: Any) -> None:
        self.base.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The wrapped optimizer's."""
        return self.base.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.base.defaults = value


def refuse(base: Any, model: nn.Module, teleport: Any) -> None:
    """What no wrapper that teleports takes, of whatever module.

    Raises:
        TypeError: The base is no optimizer, or the move no move.
        ConfigError: The base teleports already.
        UnsupportedModelError: The model's parameters are split over processes.
    """
    if not isinstance(base, torch.optim.Optimizer):
        raise TypeError(f"base must be a torch.optim.Optimizer, got {type(base).__name__}")
    if isinstance(base, Wrapper):
        raise ConfigError("base teleports already: give one TeleportOptimizer all the steps in at or every")
    if not (teleport is None or isinstance(teleport, TeleportMove)):
        raise TypeError(f"teleport must be a teleport move, got {type(teleport).__name__}")
    ranks.refuse_sharded(unwrapped(model).parameters(), "TeleportOptimizer")


def schedule(at: Iterable[int] | None, every: int | None) -> tuple[frozenset[int] | None, int | None]:
    """The steps after which to teleport, as they were given: a set of them, or every so many.

    Raises:
        ConfigError: They are both given or none is, or they are no whole numbers.

    Example:
        >>> schedule([0, 5], None), schedule(None, 3)
        ((frozenset({0, 5}), None), (None, 3))
    """
    if (at is None) == (every is None):
        raise ConfigError("give either at or every: the steps after which to teleport")
    if every is not None:
        try:
            number = operator.index(every)
        except TypeError:
            number = 0
        if number < 1:
            raise ConfigError(f"every must be a whole number of at least 1, got {every!r}")
        return None, number
    assert at is not None
    try:
        given = list(at)
    except TypeError:
        raise ConfigError(f"at must be a collection of steps, got {at!r}") from None
    try:
        steps = frozenset(operator.index(step) for step in given)  # of 0-d tensors too, which hash by identity
    except TypeError:
        steps = frozenset({-1})
    if any(step < 0 for step in steps):
        raise ConfigError(f"at must hold whole numbers, zero or more, got {at!r}")
    return steps, None
