"""Evolution strategies with antithetic pairs: a gradient from scores alone.

Salimans et al. 2017 (arXiv:1703.03864): score the parameters with a random vector added and subtracted, on one problem;
vectors weighted by half the difference of the scores add up to a gradient of the smoothed score.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from metatele.config import EvolutionTrainingConfig
from metatele.random import generator


def weights_of(differences: Tensor, normalise: str) -> Tensor:
    """What each pair counts: its difference, its rank among all by size with the sign kept, or in units of their size.

    Args:
        differences: ``[pairs]``, score of the sum less that of the difference; NaN for a lost pair, which counts 0.
        normalise: ``"rank"``, ``"z"`` or ``"none"``.

    Example:
        >>> weights_of(torch.tensor([0.1, -5.0, float("nan"), 0.0]), "rank")
        tensor([ 0.6667, -1.0000,  0.0000,  0.0000])
    """
    known = differences.isfinite()
    found = torch.where(known, differences, torch.zeros_like(differences))
    count = int(known.sum())
    if not count:
        return found
    if normalise == "rank":
        sizes = torch.where(known, found.abs(), -torch.ones_like(found))
        order = sizes.argsort(stable=True).argsort(stable=True) + 1 - (len(found) - count)
        return torch.where(known, found.sign() * order / count, found)
    if normalise == "z":
        return found / found.square().sum().div(count).sqrt().clamp_min(1e-12)
    return found


class Evolution:
    r"""Steps along a gradient that is estimated from scores: Adam's, or by momentum.

    .. math:: ∇ ≈ \frac{1}{2 σ n} \sum_k d_k ε_k, \qquad d_k = s(θ + σ ε_k) - s(θ - σ ε_k),

    The d may be replaced by ranks. Every ε is named by the seed and its generation.

    Args:
        begin: Parameters ``[n]`` to begin with.
        config: Sizes and rates.
        seed: Of the directions.
        disturbed: Numbers that are disturbed; as many as parameters unless given.

    Attributes:
        mean: The parameters θ.
        averaged: Their running average.
        generation: Generations done.

    Example:
        >>> config = EvolutionTrainingConfig(pairs=8, sigma=0.1, sigma_end=0.1, meta_lr=0.1, average=0.0)
        >>> evolution = Evolution(torch.ones(3), config, 0)
        >>> for _ in range(60):
        ...     noise, sigma = evolution.asked(0.0)
        ...     plus, minus = evolution.mean + sigma * noise, evolution.mean - sigma * noise
        ...     norm = evolution.told(noise, plus.square().sum(-1) - minus.square().sum(-1), sigma, 1.0)
        >>> bool(evolution.mean.norm() < 0.3)
        True
    """

    def __init__(self, begin: Tensor, config: EvolutionTrainingConfig, seed: int, disturbed: int | None = None) -> None:
        self.config, self.seed, self.generation = config, seed, 0
        self.mean = begin.detach().clone()
        self.disturbed = disturbed or len(begin)
        self.averaged = self.mean.clone()
        self._first, self._second, self._steps = torch.zeros_like(self.mean), torch.zeros_like(self.mean), 0

    def asked(self, progress: float) -> tuple[Tensor, float]:
        """Directions ``[pairs, disturbed]`` of the next generation, and their length σ at a share of the run."""
        c = self.config
        g = generator(self.seed, "exploration", self.generation)
        noise = torch.randn(c.pairs, self.disturbed, generator=g, dtype=torch.float64).to(self.mean)
        return noise, c.sigma * (c.sigma_end / c.sigma) ** min(1.0, progress)

    def told(self, noise: Tensor, differences: Tensor, sigma: float, rate: float) -> float:
        """Step by the scores' differences ``[pairs]``; NaN for a pair of which one was lost.

        Args:
            noise: What :meth:`asked` gave, as directions of the parameters ``[pairs, n]``.
            differences: Score of the sum less that of the difference, for each pair.
            sigma: As :meth:`asked` gave it.
            rate: Share of the meta learning rate.

        Returns:
            The norm of the estimated gradient; 0 if no pair told anything, and then there is no step.
        """
        c = self.config
        self.generation += 1
        known = int(differences.isfinite().sum())
        if not known:
            return 0.0
        weights = weights_of(differences.to(torch.float64), c.normalise).to(noise)
        gradient = weights @ noise / (2 * sigma * known)
        norm = float(gradient.norm())
        if norm == 0:
            return 0.0
        self._steps += 1
        self._first.lerp_(gradient, 1 - 0.9)
        self._second.lerp_(gradient.square(), 1 - 0.99)
        first, second = self._first / (1 - 0.9**self._steps), self._second / (1 - 0.99**self._steps)
        self.mean -= rate * c.meta_lr * (first / (second.sqrt() + 1e-12) if c.step == "adam" else first)
        self.averaged.lerp_(self.mean, 1 - min(c.average, self._steps / (self._steps + 10)))
        return norm

    def state_dict(self) -> dict[str, Any]:
        """Everything to go on with."""
        tensors = {"mean": self.mean, "averaged": self.averaged, "first": self._first, "second": self._second}
        counts = {"generation": self.generation, "steps": self._steps}
        return {**{name: tensor.clone() for name, tensor in tensors.items()}, **counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            ValueError: It is of another number of parameters.
        """
        if state["mean"].shape != self.mean.shape:
            raise ValueError(f"{state['mean'].numel()} parameters there, {self.mean.numel()} here")
        self.mean, self.averaged = state["mean"].clone(), state["averaged"].clone()
        self._first, self._second = state["first"].clone(), state["second"].clone()
        self.generation, self._steps = state["generation"], state["steps"]


def rate_share(progress: float, decay: str) -> float:
    """Share of the meta learning rate at a share of the run.

    Example:
        >>> rate_share(0.5, "cosine"), rate_share(0.5, "constant")
        (0.5, 1.0)
    """
    return 0.5 * (1 + round(math.cos(math.pi * min(1.0, progress)), 12)) if decay == "cosine" else 1.0
