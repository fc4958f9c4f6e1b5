"""Unrolling and meta-training of an optimizer that takes any shape, over a distribution of problems."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from metatele.metaopt.equivariant import EquivariantOptimizer, EquivariantStates, Observation, parted
from metatele.mlp import Pass, attach_gradient
from metatele.tasks.fitting import Fitting

_LONGEST = 10.0  # cotangent of the weights, in units of the gradient of log L


class _Bounded(torch.autograd.Function):
    """The identity, whose cotangents are shortened to a length for each trajectory.

    Where a trajectory is chaotic its derivative grows without bound with the window, and says nothing.
    """

    @staticmethod
    def forward(ctx, weights, limit):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(limit)
        return weights.view_as(weights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):  # type: ignore[no-untyped-def]
        (limit,) = ctx.saved_tensors
        norm = grad_output.norm(dim=-1)
        factor = torch.where(norm > limit, limit / norm, 1.0)
        return torch.where(torch.isfinite(norm)[:, None], factor[:, None] * grad_output, 0.0), None


@dataclass(frozen=True)
class Rollout:
    """``[B]`` trajectories of one shape, and where they are.

    Attributes:
        problems: What they fit.
        weights: Flat ``[B, P]``.
        loss: On the batch of the next step, ``[B]``.
        done: The pass made there.
        states: Memories; ``None`` at the beginning.
        age: Steps done.
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

    def advanced(self, optimizer: EquivariantOptimizer) -> Rollout:
        """One step further; its loss is differentiable in the meta-parameters."""
        mlp = self.problems.mlp
        point = self.weights if self.weights.requires_grad else None
        changes, states, _ = optimizer.step(Observation.of(self.done, point), self.states)
        weights = self.weights + mlp.flatten(parted(changes, mlp.biases))
        loss, done = self.problems.visit(weights, self.age + 1)
        if weights.requires_grad:
            gradient = mlp.flatten(done.gradient())
            sound = torch.isfinite(loss) & torch.isfinite(gradient).all(-1)
            gradient = torch.where(sound.unsqueeze(-1), gradient, 0.0)
            limit = _LONGEST * gradient.norm(dim=-1) / loss.abs().clamp_min(torch.finfo(loss.dtype).tiny)
            weights = _Bounded.apply(weights, torch.where(sound, limit, 0.0))
            loss = attach_gradient(weights, loss, gradient)
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
