"""Meta-training of the flat family, the paper's LSTMs (Zhao et al. 2024, Algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metatele.config import FlatRunConfig
from metatele.errors import ConfigError
from metatele.learned import MetaOptimizer, Stepped
from metatele.learned.flat.trajectories import Trajectories
from metatele.tasks import Problems, Regression
from metatele.training.curves import held_out_score, learned_curves
from metatele.training.processes import Processes
from metatele.training.static import StaticWindow, replayable
from metatele.training.trainer import Trainer, Window
from metatele.unroll import start, unroll


class Step(NamedTuple):
    """The last step of a window, to be measured: where it began and what it did."""

    problems: Problems
    begin: Tensor
    gradient: Tensor
    local: Tensor
    weights: Tensor
    algebra: Tensor | None


class FlatTrainer(Trainer):
    """Meta-training of the flat family on one distribution of problems of one shape.

    Args:
        config: What to train and how.
        device: Where.
        processes: Those that share the batch; this one alone if not given.

    Example:
        >>> from metatele.config import preset
        >>> config = preset("paper", trajectories=4, batch=2, horizon=4, unroll=2, hidden=8,
        ...     widths=(3, 4, 2), samples=3)
        >>> trainer = FlatTrainer(config)
        >>> metrics = trainer.step()
        >>> trainer.update, trainer.config.training.updates
        (1, 4)
    """

    config: FlatRunConfig
    optimizer: MetaOptimizer

    def __init__(
        self, config: FlatRunConfig, device: torch.device | str = "cpu", processes: Processes | None = None
    ) -> None:
        self.task = Regression(config.task)
        optimizer = MetaOptimizer(config.method, config.task, config.seed).to(device)
        optimizer.set_precision(config.training.precision)
        groups = optimizer.parameter_groups(config.training.local_lr, config.training.teleport_lr)
        super().__init__(config, optimizer, groups, device, processes or Processes())
        self.trajectories = self._fresh(range(config.training.batch))
        self._static: dict[int, StaticWindow] = {}
        self._last: dict[int, Step] = {}
        self._validation: StaticWindow | None = None
        worst = float(self.trajectories.loss.max())
        if not worst < config.training.lost_loss:
            raise ConfigError(
                f"lost_loss must be above the losses that trajectories begin with ({worst:.3g}), "
                f"got {config.training.lost_loss:g}"
            )

    def _fresh(self, positions: Sequence[int]) -> Trajectories:
        """New trajectories for those of the given places in the batch that are this process's."""
        indices = [self.started + k for k, i in enumerate(positions) if i in self.share]
        self.started += len(positions)
        return start(self.optimizer, self.task.sample(self.config.seed, "train", indices).to(self.device))

    def _due(self) -> list[int]:
        """Trajectories whose horizon ends with the window just done.

        The window lengths repeat with the update number, so a trajectory that starts with any of
        them still sees each once, and their sum is the horizon.
        """
        c = self.config.training
        horizons = (c.horizon, *c.shorter)
        due = []
        for i in range(c.batch):
            windows = math.ceil(horizons[i % len(horizons)] / c.unroll)
            offset = i * windows // c.batch if c.staggered else 0
            if (self.update + 1) % windows == offset:
                due.append(i)
        return due

    def differentiated(
        self, at: Trajectories, steps: int, observe: Callable[[int, Trajectories, Stepped], None] | None = None
    ) -> tuple[Trajectories, Tensor]:
        """Where trajectories are after a window, and this process's part of the objective; parameters have gradients.

        Args:
            at: Where they begin.
            steps: Of the window.
            observe: Called with the step's number, where it began and what it did.

        Example:
            >>> from metatele.config import preset
            >>> trainer = FlatTrainer(preset("quick", batch=2, widths=(3, 4, 2), samples=3, hidden=8))
            >>> end, objective = trainer.differentiated(trainer.trajectories, steps=10)
            >>> end.loss.shape, objective.requires_grad
            (torch.Size([2]), False)
        """
        c = self.config.training
        with nullcontext() if c.remat else self.optimizer.window():
            end, losses = unroll(self.optimizer, at.detach(), steps, observe, lost_loss=c.lost_loss, remat=c.remat)
            objective = self._objective(losses)
            objective.backward()
        return end.detach(), objective.detach()

    @property
    def _in_place(self) -> bool:
        """Whether windows have memory of their own, which CUDA graphs need; rematerialised ones are to have little."""
        c = self.config.training
        return replayable(self.device) and not c.remat if c.graph is None else c.graph

    def _window(self, at: Trajectories, steps: int) -> tuple[Trajectories, Tensor]:
        """A window, of which the last step is kept to be measured: in a graph it lies where each replay leaves it."""

        def observe(k: int, where: Trajectories, done: Stepped) -> None:
            if k == steps - 1:
                at_last = (where.problems, where.weights.detach(), where.gradient.detach())
                algebra = None if done.algebra is None else done.algebra.detach()
                self._last[steps] = Step(*at_last, done.local.detach(), done.weights.detach(), algebra)

        return self.differentiated(at, steps, observe)

    def _unrolled(self, measure: bool) -> Window:
        c = self.config.training
        steps = c.windows[self.update % len(c.windows)]
        if self._in_place:
            if steps not in self._static:
                parameters = list(self.optimizer.parameters())
                body = partial(self._window, steps=steps)
                self._static[steps] = StaticWindow(body, parameters, self.trajectories, replayable(self.device))
            self.trajectories, objective = self._static[steps](self.trajectories)
        else:
            run = self._window if measure else self.differentiated
            self.trajectories, objective = run(self.trajectories, steps)
        lost = ~(self.trajectories.loss < c.lost_loss)
        return Window(objective, lost[None], steps, self._measure(self._last[steps]) if measure else {})

    def _renewed(self, flags: Tensor) -> None:
        restart = sorted({*self._due(), *(i for i, gone in enumerate(flags[0].tolist()) if gone)})
        ours = [i - self.share.start for i in restart if i in self.share]
        if ours:
            self.trajectories = self.trajectories.restarted(ours, self._fresh(restart))
        else:
            self.started += len(restart)

    def gradients(self) -> Tensor:
        """See the base class."""
        return self.trajectories.gradient

    @torch.no_grad()
    def _measure(self, done: Step) -> dict[str, float]:
        """Median over this process's trajectories of what the last step of a window did."""
        update = done.local - done.begin
        measured = {"update_norm": update.norm(dim=-1)}
        if self.config.method.method == "lr-tele":
            measured["learning_rate"] = update.norm(dim=-1) / done.gradient.norm(dim=-1)
        if done.algebra is not None:
            before = done.problems.loss_and_gradient(done.local)[0]
            after = done.problems.loss_and_gradient(done.weights)[0]
            measured["algebra_norm"] = done.algebra.norm(dim=-1)
            measured["drift"] = (after - before).abs() / before
        return {name: float(values.median()) for name, values in measured.items()}

    def validate(self) -> tuple[float, dict[int, float]]:
        """Score and mean held-out losses at a few steps, on validation trajectories.

        The score is the mean over ``validation_score_at`` of the logarithm of the mean loss.
        """
        c = self.config.training
        problems = self.task.sample(self.config.seed, "validation", range(c.validation_trajectories))
        optimizer = self.evaluated
        assert isinstance(optimizer, MetaOptimizer)
        optimizer.set_precision("float32")  # as a loaded checkpoint computes
        losses = self._held_out(optimizer, problems.to(self.device))
        optimizer.set_precision(c.precision)
        mean = losses.double().mean(1).nan_to_num(nan=math.inf)
        shown = sorted({s for s in (1, 10, 29, 99, 299) if s <= c.validation_steps} | {*c.validation_score_at})
        score = held_out_score(mean, c.validation_score_at)
        return score, {s: float(mean[s]) for s in shown}

    @torch.no_grad()
    def _held_out(self, optimizer: MetaOptimizer, problems: Problems) -> Tensor:
        """Losses ``[validation_steps + 1, B]`` as of :func:`~metatele.training.curves.learned_curves`, in windows."""
        c = self.config.training
        if not self._in_place:
            return learned_curves(optimizer, problems, c.validation_steps)[0]
        steps = min(c.unroll, c.validation_steps)
        at = start(optimizer, problems)
        if self._validation is None:

            @torch.no_grad()
            def body(begin: Trajectories) -> tuple[Trajectories, Tensor]:
                return unroll(optimizer, begin, steps)

            self._validation = StaticWindow(body, [], at, replayable(self.device))
        losses = [at.loss[None]]
        for _ in range(c.validation_steps // steps):
            at, found = self._validation(at)
            losses.append(found.clone())  # the window's own until the next one
        if rest := c.validation_steps % steps:
            losses.append(unroll(optimizer, at, rest)[1])
        return torch.cat(losses).cpu()

    def _where(self) -> dict[str, Any]:
        return self._saved(self.trajectories)

    def _return(self, where: dict[str, Any]) -> None:
        self.trajectories = self._restored(self.trajectories, where)
