"""Meta-training: one Adam step for each window of a batch of unrolled trajectories, whatever is unrolled.

Zhao et al. 2024, Algorithm 1. How a family's trajectories begin, end and are saved is its own trainer's.
"""

from __future__ import annotations

import copy
import math
import time
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metatele.config import RunConfig, to_dict
from metatele.errors import CheckpointError, ConfigError, DivergedError
from metatele.learned.unrolled import U, Unrolled
from metatele.training.processes import Processes
from metatele.training.shares import joined_shares, own_share
from metatele.unroll import window_loss

# Fraction of the run over which a decaying rate first rises: Adam's first steps are as long as any, whatever the
# gradient, while its second moments are known from a few windows only.
_WARMUP_SHARE = 0.02


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


class MetaTrainer(ABC):
    """What a run folder needs of whoever trains: steps, scores, and a state to go on from.

    Args:
        config: What to train and how.
        optimizer: What is trained.
        device: Where.
        processes: Those that share the work.

    Attributes:
        update: Meta-updates done.
        skipped: Updates skipped because a loss or gradient was not finite.
        started: Inner trajectories begun.
        best: Least validation score so far.
    """

    def __init__(
        self, config: RunConfig, optimizer: nn.Module, device: torch.device | str, processes: Processes
    ) -> None:
        self.config, self.optimizer, self.device = config, optimizer, torch.device(device)
        self.processes = processes
        self.update = self.skipped = self.skipped_in_row = self.started = 0
        self.best = math.inf

    @property
    def finished(self) -> bool:
        """Whether all updates are done."""
        return self.update >= self.config.training.updates

    @property
    def evaluated(self) -> nn.Module:
        """The weights that are validated and published."""
        return self.optimizer

    @property
    def beside(self) -> dict[str, nn.Module]:
        """What is saved beside the checkpoint, by the name of its folder: nothing for most."""
        return {}

    @abstractmethod
    def step(self, measure: bool = False) -> dict[str, float]:
        """One meta-update; numbers to log."""

    @abstractmethod
    def validate(self) -> tuple[float, dict[Any, float]]:
        """Score, lower is better, and what it is made of."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on to the same bits: tensors and plain values only."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""

    @abstractmethod
    def gradients(self) -> Tensor:
        """Inner gradients, for a histogram."""

    def shown(self, measured: dict[Any, float]) -> str:
        """What the score is made of, for whoever watches: losses at steps, but for the first."""
        return "".join(f"  L({step}) {loss:.4g}" for step, loss in measured.items() if step > 1)

    def close(self) -> None:  # noqa: B027 most have nothing to let go of
        """Let go of what was started for the run."""


class Trainer(MetaTrainer):
    r"""One meta-training run: Adam on windows of unrolled trajectories, whatever is unrolled.

    .. math:: θ ← θ - \text{Adam}\Big(∇_θ \frac{1}{B} \sum_{b} \sum_{t \in \text{window}} L_b(w_t)\Big)

    or the mean of the losses' logarithms; see :func:`~metatele.unroll.window_loss`.

    Args:
        config: What to train and how.
        optimizer: What is trained.
        groups: Its parameters, with a rate each, as ``torch.optim`` takes them.
        device: Where.
        processes: Those that share the batch.

    Attributes:
        share: Which trajectories of the batch are this process's.
    """

    def __init__(
        self,
        config: RunConfig,
        optimizer: nn.Module,
        groups: list[dict[str, object]],
        device: torch.device | str,
        processes: Processes,
    ) -> None:
        super().__init__(config, optimizer, device, processes)
        self.share = processes.share(config.training.batch)
        if not len(self.share):
            raise ConfigError(
                f"batch must be at least the number of processes ({processes.count}), got {config.training.batch}"
            )
        self.adam = torch.optim.Adam(groups, fused=True)
        self._rates = [float(group["lr"]) for group in self.adam.param_groups]
        self.averaged: nn.Module | None = None
        if config.training.average:
            self.averaged = copy.deepcopy(optimizer).requires_grad_(False)

    @property
    def evaluated(self) -> nn.Module:
        """The weights that are validated and published: the averaged ones, if there are any."""
        return self.optimizer if self.averaged is None else self.averaged

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

    def _objective(self, losses: Tensor) -> Tensor:
        """This process's part of a window's meta-loss, from its trajectories' losses ``[K, B]``."""
        c = self.config.training
        return window_loss(losses, c.objective) * (len(self.share) / c.batch)

    def _saved(self, at: Unrolled) -> dict[str, Any]:
        """What a file needs of trajectories, those of all processes; complete in the first one."""
        found: dict[str, Any] = joined_shares(self.processes.gathered(at.saved()), at.is_common)
        return found

    def _restored(self, at: U, saved: dict[str, Any]) -> U:
        """This process's trajectories from :meth:`_saved`; ``at`` is some point of the same problems."""
        batch = self.config.training.batch
        return at.restored(own_share(saved, self.share, batch, at.is_common, self.device))

    def _set_rates(self) -> None:
        c = self.config.training
        factor = 1.0
        if c.decay == "cosine":
            done = self.update / c.updates
            factor = 0.5 * (1 + math.cos(math.pi * done)) * min(1.0, (done + 1 / c.updates) / _WARMUP_SHARE)
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
        meta_loss, length = torch.stack([objective, norm.to(objective)]).tolist()  # one wait for the device
        # No gradient at all: every trajectory was lost at once, and there is nothing to learn from.
        if math.isfinite(meta_loss) and 0 < length < math.inf:
            if c.clip and length > c.clip:
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
            "meta_loss": meta_loss,
            "meta_gradient_norm": length,
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
