"""Teleportation around any ``torch.optim`` optimizer of a module that is no perceptron."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from metatele.errors import ConfigError
from metatele.network.unwrap import unwrapped
from metatele.optim.along import carry_along_
from metatele.optim.any_module import plan_of
from metatele.optim.by_hand import refuse_balance
from metatele.optim.module_moves import ModuleTeleports
from metatele.optim.state import STRATEGIES, carried_tensors, reset_state_
from metatele.optim.teleport import COUNTERS, TeleportOptimizer
from metatele.optim.wrapper import refuse, schedule
from metatele.teleport import MoveReport, TeleportMove, TeleportReport


class ModuleTeleportOptimizer(TeleportOptimizer):
    """What :class:`~metatele.TeleportOptimizer` is for a module that is no perceptron; see there."""

    def __init__(
        self,
        base: torch.optim.Optimizer,
        model: nn.Module,
        teleport: TeleportMove | None = None,
        *,
        at: Iterable[int] | None = None,
        every: int | None = None,
        state: str = "keep",
        metric: str = "euclidean",
        batches: Callable[[], Iterable[tuple[Any, Any]]] | None = None,
        loss_fn: Callable[..., torch.Tensor] | None = None,
    ) -> None:
        refuse(base, model, teleport)
        self.at, self.every = schedule(at, every)
        if state not in STRATEGIES:
            raise ConfigError(f"state must be one of {', '.join(STRATEGIES)}, got {state!r}")
        if metric != "euclidean":
            raise ConfigError(f"on a module that is no perceptron metric is euclidean, got {metric!r}")
        if (batches is None) != (loss_fn is None):
            raise ConfigError("batches and loss_fn belong together")
        if not (batches is None or callable(batches)):
            raise ConfigError(f"batches must be a function that gives (inputs, targets) pairs, got {batches!r}")
        plan = plan_of(teleport, "grad-norm", {})
        refuse_balance(model, teleport)
        super(TeleportOptimizer, self).__init__(base)
        self.model, self.teleport = model, teleport  # type: ignore[assignment]
        self.strategy, self.metric, self.batches, self.loss_fn = state, metric, batches, loss_fn
        self.report: TeleportReport | None = None
        self._require_own(base.param_groups)
        for name, value in COUNTERS.items():
            base.param_groups[0].setdefault(name, value)
        self._moves = ModuleTeleports(model, plan, batches, loss_fn)
        self._watch()

    def _watch(self) -> None:
        self._moves.passes.wanted = self.teleport_due and self.batches is None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients, and forget the passes they came from."""
        self._moves.passes.zeroed()
        self.base.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's; counters lie in its first group."""
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The wrapped optimizer's, also one saved without teleportation."""
        self.base.load_state_dict(copy.deepcopy(state_dict))
        for name, value in COUNTERS.items():
            self.base.param_groups[0].setdefault(name, value)
        self._watch()

    @torch._disable_dynamo  # type: ignore[attr-defined]  # of a step that is compiled this runs as it is
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """A step of the wrapped optimizer, then a teleport if one is due; returns the closure's loss."""
        due, passes = self.teleport_due, self._moves.passes
        if closure is not None and due:
            given = closure

            def closure() -> Any:  # an optimizer may call it several times: the last passes count
                passes.clear()
                return given()

        loss = self.base.step() if closure is None else self.base.step(closure)
        group = self.param_groups[0]
        rates = {id(p): float(g.get("lr", 1.0)) for g in self.param_groups for p in g["params"]}
        moving = [p for p in unwrapped(self.model).parameters() if p.grad is not None and rates.get(id(p), 0.0) != 0]
        try:
            if due and moving:
                device = moving[0].device.type
                with torch.autocast(device, enabled=False):
                    self._move(moving)
        finally:
            group["teleport_steps"] += bool(moving)
            passes.clear()
            self._watch()
        return loss

    def _move(self, moving: list[nn.Parameter]) -> None:
        lost = self.strategy == "transport" and isinstance(self.base, torch.optim.LBFGS)  # pairs of the old point
        rule = "reset" if lost else self.strategy
        outcome = self._moves.teleport(moving)
        if rule == "transport" and outcome.path:
            carry_along_(self.base, self.model, MoveReport((), 0.0, path=outcome.path))
        own = list(self._moves.model.parameters())
        outcome = self._moves.shared(outcome, lambda: carried_tensors(self.base, own) if rule == "transport" else [])
        if rule == "reset" and outcome.teleports:
            reset_state_(self.base)
        self.report = outcome.report
        self.param_groups[0]["teleports"] += outcome.teleports
        self.param_groups[0]["teleports_rolled_back"] += outcome.rolled_back

    @property
    def listening(self) -> bool:
        """Whether the next step's passes are kept."""
        return self._moves.passes.wanted

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles carry: wrapped optimizer and model together."""
        kept = ("base", "model", "teleport", "at", "every", "strategy", "metric", "batches", "loss_fn", "report")
        return {**{name: self.__dict__[name] for name in kept}, "plan": self._moves.plan}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore, and listen to the copied model."""
        plan = state.pop("plan")
        self.__dict__.update(state)
        super(TeleportOptimizer, self).__setstate__({})
        self._moves = ModuleTeleports(self.model, plan, self.batches, self.loss_fn)
        self._watch()

    def __repr__(self) -> str:
        return f"TeleportOptimizer({self.base!r}, of a module's exact symmetries)"
