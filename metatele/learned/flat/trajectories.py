"""Unrolling of the flat family: a batch of trajectories of one shape, each with an age of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from metatele.learned.flat.optimizer import MetaOptimizer, MoveStates
from metatele.learned.unrolled import Observer
from metatele.perceptron.mlp import attach_gradient
from metatele.tasks import Problems


@dataclass(frozen=True)
class Trajectories:
    """Everything that crosses from one window to the next, for a batch of trajectories.

    Attributes:
        problems: Their inner problems.
        prepared: What the teleport needs of the problems' data.
        weights: ``w_t``, flat, ``[B, P]``.
        loss: ``L(w_t)``, ``[B]``.
        gradient: ``∇L(w_t)``, ``[B, P]``; kept so that each point is visited once.
        states: Memories of the meta-optimizer.

    Example:
        >>> from metatele.config import MethodConfig, TaskConfig
        >>> from metatele.tasks import Regression
        >>> task = TaskConfig(widths=(3, 4, 2), samples=3)
        >>> optimizer = MetaOptimizer(MethodConfig(hidden=8), task)
        >>> at = Trajectories.begin(optimizer, Regression(task).sample(0, "train", range(5)))
        >>> at.advanced(optimizer).age
        tensor([1., 1., 1., 1., 1.])
    """

    problems: Problems
    prepared: Tensor | None
    weights: Tensor
    loss: Tensor
    gradient: Tensor
    states: MoveStates

    @staticmethod
    def begin(optimizer: MetaOptimizer, problems: Problems) -> Trajectories:
        """Trajectories at their initial weights, with empty memories."""
        loss, gradient = problems.loss_and_gradient(problems.initial)
        return Trajectories(
            problems,
            optimizer.prepare(problems.inputs),
            problems.initial,
            loss,
            gradient,
            optimizer.initial_states(len(problems)),
        )

    @property
    def age(self) -> Tensor:
        """Steps done, ``[B]``."""
        return self.states.age

    def advanced(
        self,
        optimizer: MetaOptimizer,
        *,
        observe: Observer | None = None,
        remat: bool = False,
        lost_loss: float = math.inf,
    ) -> Trajectories:
        r"""One step ``w_{t+1} = g_t·(w_t + f_t)``, with f and g functions of ``∇L(w_t)``.

        One forward and backward pass of the inner network serves both as the next input and as the derivative of the
        meta-loss.

        Args:
            optimizer: Gives f and g.
            observe: Called with this point and with what :meth:`MetaOptimizer.step` returned.
            remat: Keep of the step where it began alone, and compute the rest anew in the backward pass. Not inside
                ``optimizer.window()``, which keeps operands itself.
            lost_loss: A trajectory whose loss reaches this, or is not a number, stops where it was and reports this
                loss, as a constant, from then on; so one that explodes does not drown the meta-gradient of the others.
                (One whose very weights are not finite still spoils it, and the trainer skips that update.)
        """
        given = (self.weights, self.gradient, self.states, self.problems.inputs, self.prepared)
        done = (
            checkpoint(optimizer.step, *given, use_reentrant=False, preserve_rng_state=False)
            if remat
            else optimizer.step(*given)
        )
        if observe is not None:
            observe(self, done)
        weights = done.weights
        value, gradient = self.problems.loss_and_gradient(weights)
        if math.isfinite(lost_loss):
            # A sum is finite if all of its parts are, and one that overflows is no gradient to learn from.
            alive = (value < lost_loss) & torch.isfinite(gradient.sum(-1)) & (self.loss.detach() < lost_loss)
            if gradient.is_cuda or not bool(alive.all()):  # to ask a GPU would stop it
                weights = torch.where(alive[:, None], weights, self.weights.detach())
                value = torch.where(alive, value, lost_loss)
                gradient = torch.where(alive[:, None], gradient, 0.0)
        loss = attach_gradient(weights, value, gradient)
        return replace(self, weights=weights, loss=loss, gradient=gradient, states=done.states)

    def detach(self) -> Trajectories:
        """The same point without history; what a window leaves to the next."""
        return replace(
            self,
            weights=self.weights.detach(),
            loss=self.loss.detach(),
            gradient=self.gradient.detach(),
            states=self.states.map(torch.Tensor.detach),
        )

    def restarted(self, where: Sequence[int], fresh: Trajectories) -> Trajectories:
        """A copy in which the trajectories at some positions begin anew."""
        if not len(where):
            return self
        index = torch.tensor(list(where), device=self.weights.device)

        def merge(old: Tensor, new: Tensor) -> Tensor:
            return old.index_copy(0, index, new)

        pairs = iter(zip(self.states.tensors(), fresh.states.tensors(), strict=True))
        return Trajectories(
            self.problems.replaced(where, fresh.problems),
            None if self.prepared is None or fresh.prepared is None else merge(self.prepared, fresh.prepared),
            merge(self.weights, fresh.weights),
            merge(self.loss, fresh.loss),
            merge(self.gradient, fresh.gradient),
            self.states.map(lambda _: merge(*next(pairs))),
        )

    def saved(self) -> dict[str, Any]:
        """What a file needs to go on from here; the problems too, since a batch is of many draws."""
        return {
            "inputs": self.problems.inputs,
            "targets": self.problems.targets,
            "initial": self.problems.initial,
            "prepared": self.prepared,
            "weights": self.weights,
            "loss": self.loss,
            "gradient": self.gradient,
            "states": self.states.tensors(),
        }

    def restored(self, saved: dict[str, Any]) -> Trajectories:
        """The point that :meth:`saved` came from."""
        tensors = iter(saved["states"])
        problems = replace(self.problems, **{name: saved[name] for name in ("inputs", "targets", "initial")})
        where = {name: saved[name] for name in ("prepared", "weights", "loss", "gradient")}
        return Trajectories(problems, states=self.states.map(lambda _: next(tensors)), **where)

    def is_common(self, name: str) -> bool:
        """Every tensor has a row for each trajectory."""
        return False
