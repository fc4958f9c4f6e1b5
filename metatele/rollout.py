"""Unrolling of the equivariant family: groups of trajectories that share a shape."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from metatele.learned import EquivariantOptimizer, EquivariantStates, Observation
from metatele.learned.equivariant.observation import parted
from metatele.perceptron.mlp import Pass, attach_gradient
from metatele.tasks import Fitting


@dataclass(frozen=True)
class Rollout:
    """``[B]`` trajectories of one shape, and where they are.

    Attributes:
        problems: What they fit.
        weights: Flat ``[B, P]``.
        loss: On the batch of the next step, ``[B]``.
        done: The pass made there.
        states: Memories; ``None`` at the beginning.
        age: Steps done; the teleport at the beginning counts as one.
    """

    problems: Fitting
    weights: Tensor
    loss: Tensor
    done: Pass
    states: EquivariantStates | None
    age: int

    @staticmethod
    def begin(problems: Fitting) -> Rollout:
        """At the initial weights."""
        loss, done = problems.visit(problems.initial, 0)
        return Rollout(problems, problems.initial, loss, done, None, 0)

    def detach(self) -> Rollout:
        """The same point without history."""
        states = None if self.states is None else self.states.map(Tensor.detach)
        return replace(self, weights=self.weights.detach(), loss=self.loss.detach(), states=states)

    def advanced(self, optimizer: EquivariantOptimizer, pauses: bool = True) -> Rollout:
        """One step further; its loss is differentiable in the meta-parameters, with every gradient a constant."""
        mlp = self.problems.mlp
        if self.age == 0 and optimizer.opens(mlp):
            weights = optimizer.opening(mlp, self.weights, self.problems.batch(0)[0]).weights
            loss, done = self.problems.visit(weights, 1)
            return Rollout(self.problems, weights, loss, done, None, 1)
        changes, states, _ = optimizer.step(Observation.of(self.done), self.states, pauses)
        weights = self.weights + mlp.flatten(parted(changes, mlp.biases))
        loss, done = self.problems.visit(weights, self.age + 1)
        if weights.requires_grad:
            gradient = mlp.flatten(done.gradient())
            sound = torch.isfinite(loss) & torch.isfinite(gradient).all(-1)
            loss = attach_gradient(weights, loss, torch.where(sound.unsqueeze(-1), gradient, 0.0))
        return Rollout(self.problems, weights, loss, done, states, self.age + 1)


@torch.no_grad()
def losses_of(optimizer: EquivariantOptimizer, problems: Fitting, steps: int) -> Tensor:
    """Losses ``[steps + 1, B]``, each on the batch of its step."""
    current = Rollout.begin(problems)
    losses = [current.loss]
    for _ in range(steps):
        current = current.advanced(optimizer)
        losses.append(current.loss)
    return torch.stack(losses)
