"""Meta-training of an optimizer that takes any shape, over a distribution of problems.

A batch holds trajectories of one shape; several groups of them, each of its own shape, are unrolled in turn. Where a
group's horizon ends, a new shape takes its place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from metatele.config import TransferConfig
from metatele.errors import ConfigError
from metatele.learned import EquivariantOptimizer, EquivariantStates
from metatele.rollout import Rollout, losses_of
from metatele.tasks import Mixture
from metatele.training.processes import Processes
from metatele.training.trainer import Trainer, Window
from metatele.unroll import window_loss

_FLOOR = 1e-9  # of a loss relative to the initial one: rounding, below which nothing is learned
_VALIDATED = 4  # trajectories of each shape


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
    at: Rollout

    def relative(self, loss: Tensor) -> Tensor:
        """Losses relative to the initial ones, and no smaller than rounding."""
        return loss / self.begun + _FLOOR

    def is_common(self, name: str) -> bool:
        """Whether a tensor of the states is one for all trajectories, rather than a row for each."""
        shared = self.at.problems.inputs.dim() == 2
        first = ("moments.0.inputs.", "moments.0.input_spectrum.")
        return name in ("counters", "fingerprint") or (shared and name.startswith(first))


def validation_score(
    optimizer: EquivariantOptimizer, config: TransferConfig, device: torch.device | str = "cpu"
) -> tuple[float, dict[int, float]]:
    """Score and geometric mean of the losses relative to the initial ones at a few steps.

    The score is the mean of their logarithms over ``validation_score_at``. On mini-batches a loss is the mean
    over the last ten steps.

    Args:
        optimizer: What is scored.
        config: The seed and number of its validation problems, and the steps that count.
        device: Where.

    Example:
        >>> from metatele.config import transfer
        >>> config = transfer(validation_trajectories=4, validation_steps=3, validation_score_at=(1, 3))
        >>> score, ratios = validation_score(EquivariantOptimizer(config.method), config)
        >>> list(ratios)
        [1, 3]
    """
    c, mixture = config.training, Mixture(config.task)
    steps = [s for s in c.validation_score_at if s <= c.validation_steps]
    logs = []
    for number in range(max(1, c.validation_trajectories // _VALIDATED)):
        problems = mixture.sample(config.seed, "validation", number, _VALIDATED).to(device)
        losses = losses_of(optimizer, problems, max(steps)).double()
        rows = [losses[max(0, s - 9) : s + 1].mean(0) if problems.batch_size else losses[s] for s in steps]
        ratio = torch.stack(rows) / losses[0] + _FLOOR
        logs.append(ratio.nan_to_num(nan=c.lost_loss).clamp(max=c.lost_loss).log().mean(1))
    mean = torch.stack(logs).mean(0)
    return float(mean.mean()), {s: math.exp(v) for s, v in zip(steps, mean.tolist(), strict=True)}


class TransferTrainer(Trainer):
    """Meta-training of the equivariant family.

    Args:
        config: What to train and how.
        device: Where.
        processes: Those that share the batch; this one alone if not given.

    Example:
        >>> from metatele.config import transfer
        >>> trainer = TransferTrainer(transfer(trajectories=4, batch=2, groups=2, horizon=4, shorter=(), unroll=2))
        >>> metrics = trainer.step()
        >>> trainer.update, trainer.config.training.updates
        (1, 4)
    """

    config: TransferConfig
    optimizer: EquivariantOptimizer
    evaluated: EquivariantOptimizer

    def __init__(
        self, config: TransferConfig, device: torch.device | str = "cpu", processes: Processes | None = None
    ) -> None:
        c = config.training
        if c.precision != "float32":
            raise ConfigError(f"precision must be float32 for the equivariant family, got {c.precision}")
        self.mixture = Mixture(config.task)
        optimizer = EquivariantOptimizer(config.method, config.seed).to(device)
        groups: list[dict[str, Any]] = [{"params": list(optimizer.parameters()), "lr": c.local_lr}]
        super().__init__(config, optimizer, groups, device, processes or Processes())
        self.groups = [self._fresh() for _ in range(c.groups)]

    def _fresh(self) -> _Group:
        self.started += 1
        return self._group(self.started - 1)

    def _group(self, number: int) -> _Group:
        c = self.config
        problems = self.mixture.sample(c.seed, "train", number, c.training.batch)
        problems = problems.part(slice(self.share.start, self.share.stop)).to(self.device)
        at = Rollout.begin(problems)
        return _Group(number, at.loss, at)

    @property
    def _turn(self) -> _Group:
        return self.groups[self.update % len(self.groups)]

    def _unrolled(self, measure: bool) -> Window:
        c, group = self.config.training, self._turn
        at, losses = group.at.detach(), []
        for _ in range(c.unroll):
            if c.remat:
                at = checkpoint(at.advanced, self.optimizer, pauses=False, use_reentrant=False)
            else:
                at = at.advanced(self.optimizer, pauses=False)
            # One lost trajectory is no reason to learn nothing from the others.
            losses.append(group.relative(at.loss).nan_to_num(nan=c.lost_loss).clamp(max=c.lost_loss))
        objective = window_loss(torch.stack(losses), c.objective) * (len(self.share) / c.batch)
        objective.backward()
        group.at = at.detach()
        sound = torch.isfinite(group.at.weights).all(-1) & (group.relative(group.at.loss) < c.lost_loss)
        arrived = group.at.loss < 10 * _FLOOR * group.begun
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
        at = self._turn.at
        return at.problems.mlp.flatten(at.done.gradient())

    def validate(self) -> tuple[float, dict[int, float]]:
        """See :func:`validation_score`."""
        return validation_score(self.evaluated, self.config, self.device)

    def _where(self) -> dict[str, Any]:
        ours = [
            {
                "number": g.number,
                "age": g.at.age,
                "weights": g.at.weights,
                "states": None if g.at.states is None else g.at.states.tensors(),
            }
            for g in self.groups
        ]
        shares = self.processes.gathered(ours)
        return {"groups": [self._joined(*parts) for parts in zip(self.groups, *shares, strict=True)] if shares else []}

    @staticmethod
    def _joined(group: _Group, first: dict[str, Any], *others: dict[str, Any]) -> dict[str, Any]:
        """What the processes hold of a group, as one."""
        if not others:
            return first
        states = None
        if first["states"] is not None:
            states = {
                name: t if group.is_common(name) else torch.cat([p["states"][name].cpu() for p in (first, *others)])
                for name, t in first["states"].items()
            }
        return {**first, "weights": torch.cat([p["weights"].cpu() for p in (first, *others)]), "states": states}

    def _ours(self, tensor: Tensor) -> Tensor:
        """This process's share of what lies trajectory by trajectory in the first dimension."""
        each = tensor.shape[0] // self.config.training.batch
        return tensor[self.share.start * each : self.share.stop * each].to(self.device)

    def _return(self, where: dict[str, Any]) -> None:
        self.groups = []
        for saved in where["groups"]:
            group = self._group(saved["number"])
            weights = self._ours(saved["weights"])
            loss, done = group.at.problems.visit(weights, saved["age"])
            states = saved["states"]
            if states is not None:
                ours = {k: t.to(self.device) if group.is_common(k) else self._ours(t) for k, t in states.items()}
                states = EquivariantStates.from_tensors(ours)
            group.at = Rollout(group.at.problems, weights, loss, done, states, saved["age"])
            self.groups.append(group)
