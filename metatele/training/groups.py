"""Meta-training over a distribution of problems, for an optimizer that takes any shape.

A batch holds trajectories of one shape; several groups of them, each of its own shape, are unrolled in turn. Where a
group's horizon ends, a new shape takes its place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from metatele.config import RunConfig
from metatele.learned.unrolled import Unrolled
from metatele.training.processes import Processes
from metatele.training.trainer import Trainer, Window
from metatele.unroll import losses_of, start, unroll

# Added to losses relative to the initial ones before their logarithm is taken: below it nothing is learned but
# rounding, and without it the mean logarithm would be that of the trajectories which have arrived.
_LEAST_RATIO = 1e-9
_ARRIVED_RATIO = 10 * _LEAST_RATIO  # below it a tenth and more of the sum is what was added: little is left to learn
_VALIDATED_OF_SHAPE = 4  # trajectories: shapes differ more than trajectories of one, so many shapes with few of each


class Source(Protocol):
    """A distribution of problems, such as :class:`metatele.tasks.Mixture`."""

    def sample(self, seed: int, stream: str, index: int, count: int) -> Any:
        """``count`` problems of one shape, number ``index`` of a stream: a :class:`metatele.tasks.Fitting`."""


@dataclass
class _Group:
    """Trajectories of one shape.

    Attributes:
        number: Of the problems in their stream.
        begun: Their initial losses ``[B]``.
        at: Where they are.
    """

    number: int
    begun: Tensor
    at: Unrolled

    def relative(self, loss: Tensor) -> Tensor:
        """Losses relative to the initial ones, and no smaller than rounding."""
        return loss / self.begun + _LEAST_RATIO


def validation_score(
    optimizer: nn.Module, source: Source, config: RunConfig, device: torch.device | str = "cpu"
) -> tuple[float, dict[int, float]]:
    """Score and geometric mean of the losses relative to the initial ones at a few steps.

    The score is the mean of their logarithms over ``validation_score_at``. On mini-batches a loss is the mean
    over the last ten steps.

    Args:
        optimizer: What is scored, of any family.
        source: The distribution of problems.
        config: The seed and number of its validation problems, and the steps that count.
        device: Where.

    Returns:
        The score, the less the better, and the ratios by step.

    Example:
        >>> from metatele.config import transfer
        >>> from metatele.learned import EquivariantOptimizer
        >>> from metatele.tasks import Mixture
        >>> config = transfer(validation_trajectories=4, validation_steps=3, validation_score_at=(1, 3))
        >>> score, ratios = validation_score(EquivariantOptimizer(config.method), Mixture(config.task), config)
        >>> list(ratios)
        [1, 3]
    """
    c = config.training
    steps = [s for s in c.validation_score_at if s <= c.validation_steps]
    logs = []
    for number in range(max(1, c.validation_trajectories // _VALIDATED_OF_SHAPE)):
        problems = source.sample(config.seed, "validation", number, _VALIDATED_OF_SHAPE).to(device)
        losses = losses_of(optimizer, problems, max(steps)).double()
        rows = [losses[max(0, s - 9) : s + 1].mean(0) if problems.batch_size else losses[s] for s in steps]
        ratio = torch.stack(rows) / losses[0] + _LEAST_RATIO
        logs.append(ratio.nan_to_num(nan=c.lost_loss).clamp(max=c.lost_loss).log().mean(1))
    mean = torch.stack(logs).mean(0)
    return float(mean.mean()), {s: math.exp(v) for s, v in zip(steps, mean.tolist(), strict=True)}


class GroupTrainer(Trainer):
    """Meta-training on groups of trajectories, each group of problems of its own.

    Args:
        config: What to train and how; its training is a :class:`metatele.config.GroupTrainingConfig`.
        optimizer: What is trained.
        source: The distribution of problems.
        device: Where.
        processes: Those that share the batch; this one alone if not given.
        settings: Of each step, as the family's trajectories take them.
    """

    def __init__(
        self,
        config: RunConfig,
        optimizer: nn.Module,
        source: Source,
        device: torch.device | str = "cpu",
        processes: Processes | None = None,
        **settings: Any,
    ) -> None:
        c: Any = config.training
        self.source, self.settings = source, settings
        optimizer = optimizer.to(device)
        groups: list[dict[str, Any]] = [{"params": list(optimizer.parameters()), "lr": c.local_lr}]
        super().__init__(config, optimizer, groups, device, processes or Processes())
        self.groups = [self._fresh() for _ in range(c.groups)]

    def _fresh(self) -> _Group:
        self.started += 1
        return self._group(self.started - 1)

    def _group(self, number: int) -> _Group:
        c = self.config
        problems = self.source.sample(c.seed, "train", number, c.training.batch)
        problems = problems.part(slice(self.share.start, self.share.stop)).to(self.device)
        at = start(self.optimizer, problems)
        return _Group(number, at.loss, at)

    @property
    def _turn(self) -> _Group:
        return self.groups[self.update % len(self.groups)]

    def _unrolled(self, measure: bool) -> Window:
        c, group = self.config.training, self._turn
        at, losses = unroll(self.optimizer, group.at.detach(), c.unroll, remat=c.remat, **self.settings)
        # One lost trajectory is no reason to learn nothing from the others.
        relative = group.relative(losses).nan_to_num(nan=c.lost_loss).clamp(max=c.lost_loss)
        objective = self._objective(relative)
        objective.backward()
        group.at = at.detach()
        sound = torch.isfinite(group.at.weights).all(-1) & (group.relative(group.at.loss) < c.lost_loss)
        arrived = group.at.loss < _ARRIVED_RATIO * group.begun
        return Window(objective, torch.stack([~sound, arrived]), c.unroll, {})

    def _renewed(self, flags: Tensor) -> None:
        c, group = self.config.training, self._turn
        horizons = (c.horizon, *c.shorter)
        lost, arrived = flags
        # Little is left to learn from; half of the groups stay, to learn to stay there.
        settled = group.number % 2 == 0 and bool(arrived.all())
        if settled or group.at.age >= horizons[group.number % len(horizons)] or 2 * int(lost.sum()) > c.batch:
            self.groups[self.update % len(self.groups)] = self._fresh()

    def gradients(self) -> Tensor:
        """See the base class."""
        return self._turn.at.gradient

    def validate(self) -> tuple[float, dict[int, float]]:
        """See :func:`validation_score`."""
        return validation_score(self.evaluated, self.source, self.config, self.device)

    def _where(self) -> dict[str, Any]:
        return {"groups": [{"number": group.number, **self._saved(group.at)} for group in self.groups]}

    def _return(self, where: dict[str, Any]) -> None:
        self.groups = []
        for saved in where["groups"]:
            group = self._group(saved["number"])
            group.at = self._restored(group.at, {name: value for name, value in saved.items() if name != "number"})
            self.groups.append(group)
