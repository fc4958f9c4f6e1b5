"""Unrolling of the equivariant family: trajectories that share a shape and an age."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from metatele.learned.equivariant.observation import parted
from metatele.learned.equivariant.old_states import read_old
from metatele.learned.equivariant.optimizer import EquivariantOptimizer
from metatele.learned.equivariant.states import EquivariantStates
from metatele.learned.general.optimizer import GeneralOptimizer
from metatele.learned.unrolled import Observer
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

    Example:
        >>> from metatele.config import EquivariantConfig
        >>> from metatele.tasks.held_out import REGRESSIONS
        >>> at = Rollout.begin(REGRESSIONS["narrow"].sample(0, "train", 5))
        >>> at = at.advanced(EquivariantOptimizer(EquivariantConfig(hidden=8)))
        >>> at.age, at.loss.shape
        (1, torch.Size([5]))
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

    @property
    def gradient(self) -> Tensor:
        """``∇L(w_t)``, flat, ``[B, P]``."""
        return self.problems.mlp.flatten(self.done.gradient())

    def advanced(
        self,
        optimizer: EquivariantOptimizer | GeneralOptimizer,
        *,
        observe: Observer | None = None,
        remat: bool = False,
        pauses: bool = True,
    ) -> Rollout:
        """One step further: the teleport of the network at age 0, if there is one, and a learned step later.

        Args:
            optimizer: Takes the step.
            observe: Called with this point and with what :meth:`EquivariantOptimizer.step` returned.
            remat: Compute the step anew in the backward pass.
            pauses: Whether the controller may rest between its looks.
        """
        if remat:
            anew: Rollout = checkpoint(self.advanced, optimizer, observe=observe, pauses=pauses, use_reentrant=False)
            return anew
        mlp = self.problems.mlp
        if self.age == 0 and optimizer.opens(mlp):
            weights = optimizer.opening(mlp, self.weights, self.problems.batch(0)[0]).weights
            loss, done = self.problems.visit(weights, 1)
            return Rollout(self.problems, weights, loss, done, None, 1)
        stepped = optimizer.step(optimizer.observed(self.done), self.states, pauses)
        if observe is not None:
            observe(self, stepped)
        weights = self.weights + mlp.flatten(parted(stepped.changes, mlp.biases))
        loss, done = self.problems.visit(weights, self.age + 1)
        if weights.requires_grad:
            gradient = mlp.flatten(done.gradient())
            sound = torch.isfinite(loss) & torch.isfinite(gradient).all(-1)
            loss = attach_gradient(weights, loss, torch.where(sound.unsqueeze(-1), gradient, 0.0))
        return Rollout(self.problems, weights, loss, done, stepped.states, self.age + 1)

    def detach(self) -> Rollout:
        """The same point without history."""
        states = None if self.states is None else self.states.map(Tensor.detach)
        return replace(self, weights=self.weights.detach(), loss=self.loss.detach(), states=states)

    def saved(self) -> dict[str, Any]:
        """What a file needs, beside the problems, to go on from here."""
        states = None if self.states is None else self.states.tensors()
        return {"age": self.age, "weights": self.weights, "states": states}

    def restored(self, saved: dict[str, Any]) -> Rollout:
        """The point that :meth:`saved` came from, on this one's problems; version 0.1 named the states otherwise."""
        loss, done = self.problems.visit(saved["weights"], saved["age"])
        stored = saved["states"]
        if stored is not None:
            stored = read_old(stored) if "log_rate" in stored else EquivariantStates.from_tensors(stored)
        return Rollout(self.problems, saved["weights"], loss, done, stored, saved["age"])

    def is_common(self, name: str) -> bool:
        """Counters and the batch's fingerprint, and what is made of inputs that all trajectories share."""
        shared = self.problems.inputs.dim() == 2
        first = ("moments.0.inputs.", "moments.0.input_spectrum.", "input_moments_0", "inputs_0_")
        return name in ("counters", "fingerprint") or (shared and name.startswith(first))
