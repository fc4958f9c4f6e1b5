"""Synthetic tables: columns of many kinds, and targets that depend on them by random rules.

Features f are what a target is made of; the columns that a network sees are ``x = scale · f + offset``, which may be as
badly scaled as those that people have.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from metatele.tasks.modules.data import Data, flipped
from metatele.tasks.modules.draws import Draws, seeded

FEATURES = ("normal", "normal", "normal", "correlated", "uniform", "binary", "counts", "sparse", "skewed")
SCALES = ("plain", "plain", "plain", "plain", "columns", "large", "pixels", "constant", "shifted")
RULES = ("network", "network", "waves", "products", "steps", "linear")
SORTS = ("teacher", "teacher", "teacher", "clusters", "clusters", "parity", "rare", "labels")
_PROBE = 1024  # samples by which targets are standardised


@dataclass(frozen=True)
class Table:
    """A table with a target.

    Attributes:
        width: Columns.
        features: One of :data:`FEATURES`.
        scales: One of :data:`SCALES`.
        rule: How targets follow from features: one of :data:`RULES`, or of :data:`SORTS` for classes.
        outputs: Numbers or classes to predict.
        loss: By which.
        noise: Noise in numbers, as a share of their variance.
        flips: Share of classes that are drawn anew.
        honest: Whether held-out targets are without noise.
        unit: Standard deviation of targets that are numbers.
        seed: Of the rule.

    Example:
        >>> table = Table(3, "normal", "plain", "waves", 2, "mse", 0.1, 0.0, False, 1.0, 5)
        >>> data = table.draw(4, torch.Generator().manual_seed(0))
        >>> data.inputs.shape, data.targets.shape
        (torch.Size([4, 3]), torch.Size([4, 2]))
    """

    width: int
    features: str
    scales: str
    rule: str
    outputs: int
    loss: str
    noise: float
    flips: float
    honest: bool
    unit: float
    seed: int

    tokens = 0
    positions = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one input."""
        return (self.width,)

    def draw(self, count: int, generator: torch.Generator, clean: bool = False) -> Data:
        """New samples."""
        clean = clean and self.honest
        features = self._features(count, generator)
        scale, offset = self._scaling
        if self.rule == "clusters":
            targets = torch.randint(self.outputs, (count,), generator=generator)
            features = features + self._centres[targets]
        else:
            targets = self._targets(features)
        if self.loss in ("ce", "smoothed"):
            targets = targets if clean else flipped(targets, self.outputs, self.flips, generator)
        elif self.loss == "bce":
            kept = torch.rand(targets.shape, generator=generator) >= (0.0 if clean else self.flips)
            targets = torch.where(kept, targets, torch.randint(2, targets.shape, generator=generator).float())
        else:
            if not clean:
                targets = targets + math.sqrt(self.noise) * torch.randn(targets.shape, generator=generator)
            targets = self.unit * targets
        columns = scale * features + offset
        return Data(columns.clamp(0, 255).round() if self.scales == "pixels" else columns, targets)

    def _features(self, count: int, generator: torch.Generator) -> Tensor:
        f = torch.randn(count, self.width, generator=generator)
        match self.features:
            case "correlated":
                return f @ self._mixing
            case "uniform":
                return 3**0.5 * (2 * torch.rand(count, self.width, generator=generator) - 1)
            case "binary":
                return (f > 0.5).float()
            case "counts":
                return torch.poisson(f.mul(0.7).exp(), generator=generator)
            case "sparse":
                return f * (torch.rand(count, self.width, generator=generator) < 0.1)
            case "skewed":
                return f.clamp(max=3).exp()
        return f

    @cached_property
    def _mixing(self) -> Tensor:
        g = seeded(self.seed + 1)
        rank = max(1, self.width // 3)
        low = torch.randn(self.width, rank, generator=g) @ torch.randn(rank, self.width, generator=g)
        return low / (self.width * rank) ** 0.5 + 0.1 * torch.eye(self.width)

    @cached_property
    def _scaling(self) -> tuple[Tensor, Tensor]:
        draws, ones = Draws(seeded(self.seed + 2)), torch.ones(self.width)
        match self.scales:
            case "columns":
                exponents = torch.rand(self.width, generator=draws.generator) * draws.uniform(1, 7) - 3
                return 10**exponents, 0 * ones
            case "large":
                return draws.log_uniform(1e-3, 1e4) * ones, 0 * ones
            case "pixels":
                return 60 * ones, 100 * ones
            case "constant":
                fixed = (torch.rand(self.width, generator=draws.generator) < 0.3).float()
                fixed[0] = 1.0
                return 1 - fixed, draws.choice((0.0, 1.0, 100.0, 1e4)) * fixed
            case "shifted":
                return ones, draws.log_uniform(1, 100) * torch.randn(self.width, generator=draws.generator)
        return ones, 0 * ones

    @cached_property
    def _centres(self) -> Tensor:
        draws = Draws(seeded(self.seed + 3))
        apart = draws.uniform(1.0, 4.0) / self.width**0.5
        return apart * torch.randn(self.outputs, self.width, generator=draws.generator)

    @cached_property
    def _standard(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Means and deviations of features, then of what the rule makes of them."""
        f = self._features(_PROBE, seeded(self.seed + 4))
        mean, deviation = f.mean(0), f.std(0) + 1e-3
        raw = self._rule((f - mean) / deviation)
        return mean, deviation, raw.mean(0), raw.std(0) + 1e-6

    def _targets(self, features: Tensor) -> Tensor:
        mean, deviation, middle, spread = self._standard
        raw = (self._rule((features - mean) / deviation) - middle) / spread
        match self.rule:
            case "teacher":
                return raw.argmax(-1)
            case "parity":
                return (raw[:, 0] > 0).long()
            case "rare":
                threshold = Draws(seeded(self.seed + 5)).uniform(1.65, 2.33)  # 5 % to 1 % of a normal variable
                return (
                    (raw[:, 0] > threshold).float()[:, None] if self.loss == "bce" else (raw[:, 0] > threshold).long()
                )
            case "labels":
                return (raw > 0.5).float()
        return raw

    def _rule(self, f: Tensor) -> Tensor:
        """Any number of features to ``outputs`` numbers, which are standardised after."""
        draws = Draws(seeded(self.seed))
        g, i, o = draws.generator, self.width, self.outputs
        match self.rule:
            case "linear":
                return f @ torch.randn(i, o, generator=g)
            case "waves":
                terms = 4
                w = draws.uniform(0.5, 2.5) * torch.randn(i, terms * o, generator=g) / i**0.5
                phase = 2 * math.pi * torch.rand(terms * o, generator=g)
                return (f @ w + phase).sin().unflatten(-1, (o, terms)).sum(-1)
            case "products":
                left, right = torch.randn(i, o, generator=g) / i**0.5, torch.randn(i, o, generator=g) / i**0.5
                return (f @ left) * (f @ right) + f @ torch.randn(i, o, generator=g) / i**0.5
            case "steps":
                cuts = torch.randn(8, o, generator=g)
                return (f @ torch.randn(i, 8, generator=g) / i**0.5 + torch.randn(8, generator=g)).sign() @ cuts
            case "parity":
                chosen = torch.randperm(i, generator=g)[: draws.choice((2, 2, 3, 4))]
                return f[:, chosen].prod(-1, keepdim=True)
        h, hidden, gain = f, draws.whole(8, 64), draws.uniform(1.0, 3.0)
        for _ in range(draws.choice((1, 1, 2))):
            h = (h @ torch.randn(h.shape[1], hidden, generator=g) * gain / h.shape[1] ** 0.5).tanh()
        return h @ torch.randn(hidden, o, generator=g)


def drawn_table(draws: Draws, kind: str) -> Table:
    """A table for ``"regression"``, or for ``"classification"``."""
    width, seed = draws.whole(2, 64), draws.seed()
    scales = draws.choice(SCALES)
    features = "normal" if scales == "pixels" else draws.choice(FEATURES)
    noise = draws.choice((0.0, 0.0, draws.log_uniform(1e-3, 1), draws.uniform(0, 1), 1.0))
    flips = draws.choice((0.0, 0.0, draws.uniform(0, 0.3), draws.uniform(0, 0.6)))
    honest = draws.chance(0.3)
    if kind == "regression":
        unit = draws.choice((1.0, 1.0, 1.0, 1.0, 1.0, draws.log_uniform(0.1, 100)))
        loss, outputs = draws.choice(("mse", "mse", "mse", "huber")), draws.choice((1, 1, 1, 2, 5))
        rule = draws.choice(RULES)
        return Table(width, features, scales, rule, outputs, loss, noise, 0.0, honest, unit, seed)
    rule = draws.choice(SORTS)
    loss, outputs = draws.choice(("ce", "ce", "ce", "smoothed")), draws.choice((2, 3, 5, 10, 10))
    if rule in ("parity", "rare"):
        outputs, flips, width = 2, 0.1 * flips, min(width, 20) if rule == "parity" else width
    if rule == "labels" or (rule == "rare" and draws.chance(0.5)):
        loss, outputs = "bce", 1 if rule == "rare" else outputs
    if rule == "clusters" and scales == "constant":
        scales = "plain"
    return Table(max(width, 4), features, scales, rule, outputs, loss, 0.0, flips, honest, 1.0, seed)
