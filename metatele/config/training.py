"""Settings of meta-training: those every family has, and those of one family alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

from metatele.config.base import check_types, require, require_positive, setting


@dataclass(frozen=True)
class CommonTrainingConfig:
    """What a run of any kind of meta-training has: when it is validated, saved and logged.

    A subclass says how many :attr:`updates` there are.
    """

    max_skipped: int = setting(20, "non-finite updates in a row before the run stops")
    validation_every: int = setting(100, "updates between validations")
    save_every: int = setting(100, "updates between saves of the resumable state")
    log_every: int = setting(20, "updates between log entries")

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_types(self)
        require_positive(self, "max_skipped", "validation_every", "save_every", "log_every")

    @property
    def updates(self) -> int:
        """Meta-updates of the whole run."""
        raise NotImplementedError


@dataclass(frozen=True)
class TrainingConfig(CommonTrainingConfig):
    """Meta-training by truncated unrolling (Zhao et al. 2024, Algorithm 1): what every family has.

    Lengths are steps of an inner trajectory, counts of updates are meta-updates. A trajectory is cut into
    :attr:`windows` of ``unroll`` steps, with one meta-update after each.

    Raises:
        ConfigError: A value is out of range, or windows and horizons do not fit each other.

    Example:
        >>> TrainingConfig(trajectories=32, batch=16, horizon=100, unroll=10).updates
        20
    """

    trajectories: int = setting(700, "inner trajectories to train on, started or restarted")
    batch: int = setting(16, "trajectories unrolled at the same time")
    horizon: int = setting(100, "steps of one trajectory")
    unroll: int = setting(10, "steps between two meta-updates")
    shorter: tuple[int, ...] = setting((), "horizons that some trajectories of a batch have instead, in turn")
    objective: str = setting("sum", "loss of a window: sum, or mean of the logarithm", ("sum", "mean-log"))
    local_lr: float = setting(1e-3, "Adam's rate for what makes the local moves")
    decay: str = setting("constant", "of the meta learning rates over the run", ("constant", "cosine"))
    clip: float = setting(0.0, "largest norm of a meta-gradient; 0: no clipping")
    average: float = setting(0.0, "decay of the averaged weights that are evaluated and saved; 0: none")
    remat: bool = setting(False, "compute inner steps anew in the backward pass: less memory, more time")
    lost_loss: float = setting(1e8, "a trajectory at this loss stops, and a new one takes its place")
    validation_trajectories: int = setting(16, "held-out trajectories that choose the checkpoint")
    validation_steps: int = setting(100, "their length")
    validation_score_at: tuple[int, ...] = setting((29, 99), "steps whose mean log loss is the score")

    def __post_init__(self) -> None:
        """Check sizes and that windows fit."""
        super().__post_init__()
        require_positive(self, "trajectories", "batch", "horizon", "unroll", "local_lr", "lost_loss")
        require_positive(self, "validation_trajectories", "validation_steps")
        require(self.unroll <= self.horizon, "unroll", f"at most the horizon ({self.horizon})", self.unroll)
        require(
            all(isinstance(h, int) and 0 < h <= self.horizon for h in self.shorter)
            and (not self.shorter or all(h % self.unroll == 0 for h in (self.horizon, *self.shorter))),
            "shorter",
            f"horizons up to {self.horizon}, all multiples of unroll ({self.unroll}) as the horizon then is",
            self.shorter,
        )
        require(self.clip >= 0, "clip", "zero or positive", self.clip)
        require(0 <= self.average < 1, "average", "in [0, 1)", self.average)
        require(
            len(self.validation_score_at) > 0
            and all(isinstance(s, int) and 0 < s <= self.validation_steps for s in self.validation_score_at),
            "validation_score_at",
            f"steps from 1 to validation_steps ({self.validation_steps})",
            self.validation_score_at,
        )

    @property
    def windows(self) -> tuple[int, ...]:
        """Window lengths of one trajectory; they sum to the horizon.

        Example:
            >>> TrainingConfig(horizon=25, unroll=10).windows
            (10, 10, 5)
        """
        full, rest = divmod(self.horizon, self.unroll)
        return (self.unroll,) * full + ((rest,) if rest else ())

    @property
    def updates(self) -> int:
        """Meta-updates that advance at least ``trajectories`` whole trajectories' worth of steps."""
        return math.ceil(self.trajectories / self.batch) * len(self.windows)


@dataclass(frozen=True)
class FlatTrainingConfig(TrainingConfig):
    """Meta-training of the flat family: two moves with a rate each, trajectories of one shape."""

    teleport_lr: float = setting(1e-4, "Adam's rate for what makes the teleports")
    staggered: bool = setting(False, "start the trajectories of a batch at different ages")
    precision: str = setting("float32", "of the LSTM's matrix products", ("float32", "tf32", "bf16"))
    graph: bool | None = setting(
        None, "replay windows as CUDA graphs, the same to rounding; auto: on a GPU", compare=False
    )

    def __post_init__(self) -> None:
        """Check the rate, and what the base class checks."""
        super().__post_init__()
        require_positive(self, "teleport_lr")


@dataclass(frozen=True)
class GroupTrainingConfig(TrainingConfig):
    """Meta-training on groups of trajectories, each group of its own shape; the equivariant family's."""

    groups: int = setting(1, "groups of trajectories, each of its own shape, that are unrolled in turn")

    def __post_init__(self) -> None:
        """Check the number, and what the base class checks."""
        super().__post_init__()
        require_positive(self, "groups")
