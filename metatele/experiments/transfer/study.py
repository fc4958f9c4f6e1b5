"""The study's size and its methods: every number that a smaller or larger one would change."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from metatele.config import EquivariantRunConfig, transfer
from metatele.experiments.transfer.results import TARGET
from metatele.training.baselines import EVERYWHERE, Baseline

# Name to what is changed in the configuration of meta-training.
ABLATIONS: dict[str, dict[str, Any]] = {
    "everything": {},
    "no teleport at the beginning": {"opening": False},
    "inputs' moments not used": {"inputs": False},
    "errors' moments not used": {"errors": False},
    "no teleport: learned update alone": {"opening": False, "inputs": False, "errors": False},
    "controller blind to slopes": {"blind": ("slopes",)},
    "controller blind to the loss": {"blind": ("loss",)},
    "controller blind to spectra": {"blind": ("spectra",)},
    "controller blind to sizes": {"blind": ("sizes", "cosine")},
    "controller blind to time, data and depth": {"blind": ("clock", "data", "place")},
}


def whitening_candidates() -> tuple[dict[str, float], ...]:
    """Settings among which whitening with gradient descent is tuned.

    Example:
        >>> len(whitening_candidates())
        52
    """
    return tuple({"rate": 10 ** (e / 4), "damping": d} for e in range(-10, 3) for d in (1e-6, 1e-4, 1e-2, 1.0))


@dataclass(frozen=True)
class Study:
    """What is run, and how much of it; the defaults are those of the published tables.

    Attributes:
        problems: Held-out problems of each kind of regression.
        networks: Networks on each image set.
        tuning: Problems on which standard optimizers are tuned.
        alone: Of those, on how many the ones are tuned that run one trajectory at a time; they are evaluated on twice
            as many.
        alone_steps: How far these go.
        steps: How far all others go.
        target: Step whose loss they are tuned for and compared at.
        baselines: The standard optimizers, with the grids they are tuned on.
        whitening: Settings of whitening with gradient descent, tuned as well.
        training: What is changed in the meta-training of preset ``transfer``.
        ablations: Name to what is changed in a meta-training without something.
        ablation_trajectories: Of each of these, which are shorter.
        ablation_seeds: Of each of these.
        selection: What is changed in the configuration by whose validation problems meta-seeds are compared; of
            training's kinds.
        selection_hidden: Hidden widths of the networks on which they are compared too, on data like images.
        selection_steps: How long these runs are.
    """

    problems: int = 64
    networks: int = 5
    tuning: int = 32
    alone: int = 8
    alone_steps: int = 300
    steps: int = 1000
    target: int = TARGET
    baselines: tuple[Baseline, ...] = EVERYWHERE
    whitening: tuple[dict[str, float], ...] = field(default_factory=whitening_candidates)
    training: dict[str, Any] = field(default_factory=dict)
    ablations: dict[str, dict[str, Any]] = field(default_factory=lambda: dict(ABLATIONS))
    ablation_trajectories: int = 16 * 67
    ablation_seeds: int = 2
    selection: dict[str, Any] = field(default_factory=lambda: {"seed": 1000, "validation_trajectories": 4 * 30})
    selection_hidden: tuple[tuple[int, ...], ...] = ((400, 200), (300, 300), (256, 128, 64))
    selection_steps: int = 600

    def config(self, **changes: Any) -> EquivariantRunConfig:
        """The configuration of a meta-training.

        Example:
            >>> Study(training={"batch": 4}).config(seed=3).training.batch
            4
        """
        return transfer(**{**self.training, **changes})
