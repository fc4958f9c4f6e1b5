"""An optimizer around another one, which keeps groups, state and defaults."""

from __future__ import annotations

from typing import Any

import torch


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
