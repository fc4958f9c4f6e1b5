"""The families of this package: their whole configurations, and their presets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from metatele.config.equivariant import EquivariantConfig, MixtureConfig
from metatele.config.families import FamilyConfig, RunConfig, preset, register_family
from metatele.config.flat import METHODS, MethodConfig, TaskConfig
from metatele.config.general import GeneralConfig
from metatele.config.general_training import EvolutionTrainingConfig, ModulesConfig
from metatele.config.training import FlatTrainingConfig, GroupTrainingConfig
from metatele.errors import ConfigError


@dataclass(frozen=True)
class FlatRunConfig(RunConfig):
    """A run of the flat family, the paper's LSTMs; see :class:`RunConfig`."""

    preset: str = "quick"
    seed: int = 0
    task: TaskConfig = field(default_factory=TaskConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    training: FlatTrainingConfig = field(default_factory=FlatTrainingConfig)


@dataclass(frozen=True)
class EquivariantRunConfig(RunConfig):
    """A run of the equivariant family, which takes every shape; see :class:`RunConfig`."""

    preset: str = "transfer"
    seed: int = 0
    task: MixtureConfig = field(default_factory=MixtureConfig)
    method: EquivariantConfig = field(default_factory=EquivariantConfig)
    training: GroupTrainingConfig = field(default_factory=GroupTrainingConfig)


@dataclass(frozen=True)
class GeneralRunConfig(RunConfig):
    """A run of the general family, which takes any module; see :class:`RunConfig`."""

    preset: str = "general"
    seed: int = 0
    task: ModulesConfig = field(default_factory=ModulesConfig)
    method: GeneralConfig = field(default_factory=GeneralConfig)
    training: EvolutionTrainingConfig = field(default_factory=EvolutionTrainingConfig)


# What each preset changes, for all methods ("") and for one.
_ADAPTED: dict[str, Any] = {
    "preprocessing": "asinh",
    "objective": "mean-log",
    "gradient_rates": True,
    "rate_output": "log",
    "rate_low": 1e-9,
    "rate_high": 1.0,
    "radius": 0.1,
    "norm": "learned",
    "clip": 0.3,
    "staggered": True,
    "decay": "cosine",
    "teleport_lr": 1e-3,
}
# What kept single trajectories from bursting, and made all seeds find the better of two policies.
_UPDATE_TELE: dict[str, Any] = {
    "gradient_cap": 5.0,
    "norm": "fixed",
    "radius": 0.1,
    "radius_decay": 10.0,
    "teleport_mean": -3.0,
    "teleport_lr": 1e-4,
}
# Step lengths instead of rates: one trajectory in a few hundred exploded with rates. The smaller
# weights keep 20 cells from saturating on 800 inputs.
_LR_TELE: dict[str, Any] = {
    "hidden": 20,
    "input_scale": 0.16,
    "rate_of": "direction",
    "rate_low": 1e-4,
    "rate_high": 100.0,
    "local_lr": 3e-3,
}
_PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "quick": {
        "": {**_ADAPTED, "batch": 32, "trajectories": 640},
        "update-tele": _UPDATE_TELE,
        "update": {"gradient_cap": 5.0},
        "lr-tele": {**_LR_TELE, "rate_low": 1e-2, "local_lr": 1e-2},  # 200 updates: a good step 0 must be near
    },
    # The defaults of the classes above are the paper's; more of its trajectories.
    "paper": {
        "": {},
        "update-tele": {"trajectories": 2 * 700},
        "update": {"trajectories": 2 * 600},
        "lr-tele": {
            "trajectories": 4 * 30,
            "batch": 4,
            "horizon": 300,
            "hidden": 20,
            "local_lr": 1e-4,
            "rate_output": "log",  # a hard clamp has no derivative outside; it diverged when tried
            "validation_steps": 300,
            "validation_score_at": (29, 299),
        },
    },
    "best": {
        "": {
            **_ADAPTED,
            "batch": 32,
            "trajectories": 1920,
            "horizon": 300,
            "shorter": (100, 100),
            "validation_every": 200,
            "save_every": 200,
            "precision": "bf16",
            "validation_steps": 300,
            "validation_score_at": (29, 99, 299),
        },
        "update-tele": _UPDATE_TELE,
        "update": {},
        "lr-tele": _LR_TELE,
    },
}
PRESETS = tuple(_PRESETS)  # of the flat family
TRANSFER = "transfer"  # of the equivariant family
GENERAL = "general"  # of the general family


def _flat(name: str, given: dict[str, Any]) -> dict[str, Any]:
    method = given.get("method", "update-tele")
    if method not in METHODS:
        raise ConfigError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    return {**_PRESETS[name][""], **_PRESETS[name][method], "method": method}


_TRANSFER: dict[str, Any] = {
    "trajectories": 16 * 400,
    "batch": 16,
    "groups": 12,
    "horizon": 300,
    "shorter": (20, 20, 20, 40, 40, 60, 100, 200),
    "unroll": 20,
    "objective": "mean-log",
    "local_lr": 3e-3,
    "decay": "cosine",
    "clip": 0.3,
    "average": 0.99,
    "validation_every": 300,
    "save_every": 300,
    "validation_trajectories": 4 * 24,
    "validation_score_at": (30, 100),
}


# One evolution differs from the next by more than it gains: the mean of five is what is published.
_GENERAL: dict[str, Any] = {
    "meta_seeds": 5,
    "minutes": 19.0,
    "generations": 100_000,
    "pairs": 6,
    "disturb": "settings",
    "step": "momentum",
    "sigma": 0.7,
    "sigma_end": 0.35,
    "meta_lr": 0.5,
    "workers": 2,
    "pool": 512,
    "budget_ms": 300.0,
    "validation_every": 100_000,
    "save_every": 1,
    "log_every": 1,
}


register_family(
    FamilyConfig("flat", "the paper's LSTMs, for one shape of network", FlatRunConfig, PRESETS, _flat, "paper")
)
register_family(
    FamilyConfig("equivariant", "for every shape", EquivariantRunConfig, (TRANSFER,), lambda *_: dict(_TRANSFER))
)
register_family(FamilyConfig("general", "for any module", GeneralRunConfig, (GENERAL,), lambda *_: dict(_GENERAL)))


def transfer(**changes: Any) -> EquivariantRunConfig:
    """The preset of the equivariant family, with fields of any part changed by name.

    Raises:
        ConfigError: Unknown field, one of another family, or a value out of range.

    Example:
        >>> transfer(widest=32).task.widest
        32
    """
    config = preset(TRANSFER, **changes)
    assert isinstance(config, EquivariantRunConfig)
    return config
