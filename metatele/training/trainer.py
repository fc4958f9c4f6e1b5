"""Meta-training: one Adam step for each window of a batch of unrolled trajectories (Algorithm 1)."""

from __future__ import annotations

import copy
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metatele.config import RunConfig, TransferConfig, to_dict
from metatele.errors import CheckpointError, ConfigError, DivergedError
from metatele.learned import EquivariantOptimizer, MetaOptimizer, Stepped
from metatele.tasks import Problems, Regression
from metatele.training.curves import held_out_score, learned_curves
from metatele.training.processes import Processes
from metatele.training.static import StaticWindow
from metatele.unroll import Observer, Trajectories, start, unroll, window_loss

_WARM_UP = 0.02  # fraction of the run over which a decaying rate first rises


class Window(NamedTuple):
    """What an unrolled window leaves.

    Attributes:
        objective: What was differentiated: this process's part of the mean over the batch.
        flags: What is to be known of each of its trajectories, as 0 or 1 ``[kinds, B]``; first, whether it is lost.
        steps: Length of the window.
        measured: More numbers to log.
    """

    objective: Tensor
    flags: Tensor
    steps: int
    measured: dict[str, float]


class Trainer(ABC):
    """One meta-training run: Adam on windows of unrolled trajectories, whatever is unrolled.

    Args:
        config: What to train and how.
        optimizer: What is trained.
        groups: Its parameters, with a rate each, as ``torch.optim`` takes them.
        device: Where.
        processes: Those that share the batch.

    Attributes:
        share: Which trajectories of the batch are this process's.
        update: Meta-updates done.
        skipped: Updates skipped because a loss or gradient was not finite.
        best: Least validation score so far.
    """

    def __init__(
        self,
        config: RunConfig | TransferConfig,
        optimizer: MetaOptimizer | EquivariantOptimizer,
        groups: list[dict[str, object]],
        device: torch.device | str,
        processes: Processes,
    ) -> None:
        self.config, self.optimizer, self.device = config, optimizer, torch.device(device)
        self.processes, self.share = processes, processes.share(config.training.batch)
        if not len(self.share):
            raise ConfigError(
                f"batch must be at least the number of processes ({processes.count}), got {config.training.batch}"
            )
        self.adam = torch.optim.Adam(groups, fused=True)
        self._rates = [float(group["lr"]) for group in self.adam.param_groups]
        self.averaged: MetaOptimizer | EquivariantOptimizer | None = None
        if config.training.average:
            self.averaged = copy.deepcopy(optimizer).requires_grad_(False)
        self.update = self.skipped = self.skipped_in_row = self.started = 0
        self.best = math.inf

    @property
    def finished(self) -> bool:
        """Whether all updates are done."""
        return self.update >= self.config.training.updates

    @property
    def evaluated(self) -> MetaOptimizer | EquivariantOptimizer:
        """The weights that are validated and published: the averaged ones, if there are any."""
        return self.optimizer if self.averaged is None else self.averaged

    @abstractmethod
    def validate(self) -> tuple[float, dict[int, float]]:
        """Score, and what it is made of, at a few steps, on validation trajectories."""

    @abstractmethod
    def _unrolled(self, measure: bool) -> Window:
        """Unroll the next window and differentiate it."""

    @abstractmethod
    def _renewed(self, flags: Tensor) -> None:
        """Begin trajectories anew where their horizon ended or the flags of all of them ``[kinds, batch]`` say so."""

    @abstractmethod
    def _where(self) -> dict[str, Any]:
        """Where the trajectories are: tensors and plain values only."""

    @abstractmethod
    def _return(self, where: dict[str, Any]) -> None:
        """Go on from :meth:`_where`."""

    @abstractmethod
    def gradients(self) -> Tensor:
        """Inner gradients of the trajectories, for a histogram."""

    def _set_rates(self) -> None:
        c = self.config.training
        factor = 1.0
        if c.decay == "cosine":
            done = self.update / c.updates
            factor = 0.5 * (1 + math.cos(math.pi * done)) * min(1.0, (done + 1 / c.updates) / _WARM_UP)
        for group, rate in zip(self.adam.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor

    def step(self, measure: bool = False) -> dict[str, float]:
        """One meta-update: unroll a window, differentiate, and step Adam.

        A loss or gradient that is not finite, or a gradient that is zero, skips Adam's step;
        trajectories that are lost start anew.

        Args:
            measure: Also measure the group element's norm, the drift and the learned rate.

        Returns:
            Numbers to log.

        Raises:
            DivergedError: ``max_skipped`` updates in a row were skipped.
        """
        c = self.config.training
        begin_s = time.perf_counter()
        self._set_rates()
        self.adam.zero_grad(set_to_none=True)
        done = self._unrolled(measure)
        objective, flags = self._together(done)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.optimizer.parameters() if p.grad is not None])
        healthy = bool(torch.isfinite(objective)) and bool(torch.isfinite(norm))
        # No gradient at all: every trajectory was lost at once, and there is nothing to learn from.
        healthy = healthy and float(norm) > 0
        if healthy:
            if c.clip and float(norm) > c.clip:
                torch.nn.utils.clip_grads_with_norm_(self.optimizer.parameters(), c.clip, norm)
            self.adam.step()
            self.skipped_in_row = 0
            self._average()
        else:
            self.skipped += 1
            self.skipped_in_row += 1
        self._renewed(flags)
        self.update += 1
        if self.skipped_in_row >= c.max_skipped:
            raise DivergedError(
                f"{self.skipped_in_row} updates in a row had a loss or gradient that is not finite, or no gradient "
                f"(at update {self.update}); earlier files are intact: lower the learning rates or set clip"
            )
        metrics = {
            "meta_loss": float(objective),
            "meta_gradient_norm": float(norm),
            "skipped": float(self.skipped),
            "lost_trajectories": float(flags[0].sum()),
            "ms_per_trajectory_step": 1e3 * (time.perf_counter() - begin_s) / (done.steps * c.batch),
        }
        return {**metrics, **done.measured}

    @torch.no_grad()
    def _together(self, done: Window) -> tuple[Tensor, Tensor]:
        """The objective and flags of the whole batch; gradients are summed over the processes with them."""
        if self.processes.count == 1:
            return done.objective.detach(), done.flags
        parameters = list(self.optimizer.parameters())
        flags = done.flags.new_zeros(len(done.flags), self.config.training.batch)
        flags[:, self.share.start : self.share.stop] = done.flags
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        parts += [done.objective, flags.to(done.objective)]
        flat = torch.cat([part.detach().flatten() for part in parts])
        self.processes.add_(flat)
        *gradients, objective, summed = flat.split([part.numel() for part in parts])
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient.view_as(p)
        return objective[0], summed.view_as(flags) > 0.5

    @torch.no_grad()
    def _average(self) -> None:
        if self.averaged is None:
            return
        decay = min(self.config.training.average, (self.update + 1) / (self.update + 11))
        targets: list[Tensor] = list(self.averaged.parameters())
        torch._foreach_lerp_(targets, list(self.optimizer.parameters()), 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on to the same bits: tensors and plain values only.

        All processes must ask for it; the first one's is complete.
        """
        return {
            "format": 1,
            "config": to_dict(self.config),
            "optimizer": self.optimizer.state_dict(),
            "averaged": None if self.averaged is None else self.averaged.state_dict(),
            "adam": self.adam.state_dict(),
            "counters": [self.update, self.skipped, self.skipped_in_row, self.started],
            "best": self.best,
            "trajectories": self._where(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            CheckpointError: The state does not belong to this configuration.
        """
        try:
            self.optimizer.load_state_dict(state["optimizer"])
            if self.averaged is not None:
                self.averaged.load_state_dict(state["averaged"])
            self.adam.load_state_dict(state["adam"])
            self.update, self.skipped, self.skipped_in_row, self.started = state["counters"]
            self.best = state["best"]
            self._return(state["trajectories"])
        except (KeyError, ValueError, RuntimeError, StopIteration) as error:
            raise CheckpointError(f"the training state does not fit its configuration: {error}") from error


class MetaTrainer(Trainer):
    """Meta-training of the flat family on one distribution of problems of one shape.

    Args:
        config: What to train and how.
        device: Where.
        processes: Those that share the batch; this one alone if not given.

    Example:
        >>> from metatele.config import preset
        >>> config = preset("paper", trajectories=4, batch=2, horizon=4, unroll=2, hidden=8,
        ...     widths=(3, 4, 2), samples=3)
        >>> trainer = MetaTrainer(config)
        >>> metrics = trainer.step()
        >>> trainer.update, trainer.config.training.updates
        (1, 4)
    """

    config: RunConfig
    optimizer: MetaOptimizer
    evaluated: MetaOptimizer

    def __init__(
        self, config: RunConfig, device: torch.device | str = "cpu", processes: Processes | None = None
    ) -> None:
        self.task = Regression(config.task)
        optimizer = MetaOptimizer(config.method, config.task, config.seed).to(device)
        optimizer.set_precision(config.training.precision)
        groups = optimizer.parameter_groups(config.training.local_lr, config.training.teleport_lr)
        super().__init__(config, optimizer, groups, device, processes or Processes())
        self.trajectories = self._fresh(range(config.training.batch))
        self._static: dict[int, StaticWindow] = {}
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
        self, at: Trajectories, steps: int, observe: Observer | None = None
    ) -> tuple[Trajectories, Tensor]:
        """Where trajectories are after a window, and this process's part of the objective; parameters have gradients.

        Example:
            >>> from metatele.config import preset
            >>> trainer = MetaTrainer(preset("quick", batch=2, widths=(3, 4, 2), samples=3, hidden=8))
            >>> end, objective = trainer.differentiated(trainer.trajectories, steps=10)
            >>> end.loss.shape, objective.requires_grad
            (torch.Size([2]), False)
        """
        c = self.config.training
        with nullcontext() if c.remat else self.optimizer.window():
            end, losses = unroll(self.optimizer, at.detach(), steps, observe, c.lost_loss, c.remat)
            objective = window_loss(losses, c.objective) * (len(self.share) / c.batch)
            objective.backward()
        return end.detach(), objective.detach()

    def _unrolled(self, measure: bool) -> Window:
        c = self.config.training
        steps = c.windows[self.update % len(c.windows)]
        last: list[tuple[Trajectories, Stepped]] = []
        if measure:  # what is observed is gone in a replay

            def observe(k: int, where: Trajectories, done: Stepped) -> None:
                if k == steps - 1:
                    last.append((where, done))

            self.trajectories, objective = self.differentiated(self.trajectories, steps, observe)
        elif c.graph:
            if steps not in self._static:
                parameters = list(self.optimizer.parameters())
                body = partial(self.differentiated, steps=steps)
                self._static[steps] = StaticWindow(body, parameters, self.trajectories, self.device.type == "cuda")
            self.trajectories, objective = self._static[steps](self.trajectories)
        else:
            self.trajectories, objective = self.differentiated(self.trajectories, steps)
        lost = ~(self.trajectories.loss < c.lost_loss)
        return Window(objective, lost[None], steps, self._measure(*last[0]) if measure else {})

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
    def _measure(self, where: Trajectories, done: Stepped) -> dict[str, float]:
        """Median over this process's trajectories of what the last step of a window did."""
        update = done.local - where.weights
        measured = {"update_norm": update.norm(dim=-1)}
        if self.config.method.method == "lr-tele":
            measured["learning_rate"] = update.norm(dim=-1) / where.gradient.norm(dim=-1)
        if done.algebra is not None:
            before = where.problems.loss_and_gradient(done.local)[0]
            after = where.problems.loss_and_gradient(done.weights)[0]
            measured["algebra_norm"] = done.algebra.norm(dim=-1)
            measured["drift"] = (after - before).abs() / before
        return {name: float(values.median()) for name, values in measured.items()}

    def validate(self) -> tuple[float, dict[int, float]]:
        """Score and mean held-out losses at a few steps, on validation trajectories.

        The score is the mean over ``validation_score_at`` of the logarithm of the mean loss.
        """
        c = self.config.training
        problems = self.task.sample(self.config.seed, "validation", range(c.validation_trajectories))
        self.evaluated.set_precision("float32")  # as a loaded checkpoint computes
        losses, _ = learned_curves(self.evaluated, problems.to(self.device), c.validation_steps)
        self.evaluated.set_precision(c.precision)
        mean = losses.double().mean(1).nan_to_num(nan=math.inf)
        shown = sorted({s for s in (1, 10, 29, 99, 299) if s <= c.validation_steps} | {*c.validation_score_at})
        score = held_out_score(mean, c.validation_score_at)
        return score, {s: float(mean[s]) for s in shown}

    def _where(self) -> dict[str, Any]:
        t = self.trajectories
        ours = {
            "inputs": t.problems.inputs,
            "targets": t.problems.targets,
            "initial": t.problems.initial,
            "prepared": t.prepared,
            "weights": t.weights,
            "loss": t.loss,
            "gradient": t.gradient,
            "states": t.states.tensors(),
        }
        return joined_shares(self.processes.gathered(ours))

    def _return(self, where: dict[str, Any]) -> None:
        saved = {k: self._restored(v) for k, v in where.items() if k != "states"}
        tensors = iter(where["states"])
        states = self.trajectories.states.map(lambda _: self._restored(next(tensors)))
        problems = Problems(self.task.mlp, saved.pop("inputs"), saved.pop("targets"), saved.pop("initial"))
        self.trajectories = Trajectories(problems, states=states, **saved)

    def _restored(self, tensor: Tensor | None) -> Any:
        return None if tensor is None else tensor[self.share.start : self.share.stop].to(self.device)


def joined_shares(shares: list[Any]) -> Any:
    """What several processes hold of a batch, as one; the same nesting of tensors in each."""
    if len(shares) < 2:
        return shares[0] if shares else {}
    if isinstance(shares[0], dict):
        return {name: joined_shares([share[name] for share in shares]) for name in shares[0]}
    if isinstance(shares[0], list):
        return [joined_shares(list(parts)) for parts in zip(*shares, strict=True)]
    return torch.cat([share.cpu() for share in shares]) if isinstance(shares[0], Tensor) else shares[0]
