"""Whole configurations of a run, and the presets."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from metatele.config.base import from_dict
from metatele.config.equivariant import EquivariantConfig, MixtureConfig
from metatele.config.flat import METHODS, MethodConfig, TaskConfig
from metatele.config.training import TrainingConfig
from metatele.errors import ConfigError


@dataclass(frozen=True)
class RunConfig:
    """Everything ``train_meta.py`` needs to know, but for where to run and write."""

    preset: str = "quick"
    seed: int = 0
    task: TaskConfig = field(default_factory=TaskConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)


@dataclass(frozen=True)
class TransferConfig:
    """The same for the equivariant family."""

    preset: str = "transfer"
    seed: int = 0
    task: MixtureConfig = field(default_factory=MixtureConfig)
    method: EquivariantConfig = field(default_factory=EquivariantConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)


def stored_config(values: dict[str, Any]) -> RunConfig | TransferConfig:
    """What :func:`to_dict` made of a run's configuration of either family.

    Raises:
        ConfigError: Unknown fields, or values out of range.
    """
    kind = TransferConfig if isinstance(values, dict) and values.get("preset") == "transfer" else RunConfig
    config: RunConfig | TransferConfig = from_dict(kind, values)
    return config


# What each preset changes, for all methods ("") and for one. README, "Presets", has the reasons.
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
PRESETS = tuple(_PRESETS)
TRANSFER = "transfer"  # the preset of the equivariant family


def preset(name: str, method: str = "update-tele", **changes: Any) -> RunConfig:
    """A preset for a method, with fields of any part changed by name.

    Raises:
        ConfigError: Unknown preset, method or field, or a value out of range.

    Example:
        >>> preset("paper", "update", batch=8).training.batch
        8
    """
    if name not in _PRESETS:
        raise ConfigError(f"preset must be one of {', '.join(_PRESETS)}, got {name!r}")
    if method not in METHODS:
        raise ConfigError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    values = {**_PRESETS[name][""], **_PRESETS[name][method], **changes, "method": method}
    parts = {"task": TaskConfig, "method": MethodConfig, "training": TrainingConfig}
    built, seed = _built(parts, values)
    return RunConfig(preset=name, seed=seed, **built)


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


def transfer(**changes: Any) -> TransferConfig:
    """The preset of the equivariant family, with fields of any part changed by name.

    Raises:
        ConfigError: Unknown field, or a value out of range.

    Example:
        >>> transfer(widest=32).task.widest
        32
    """
    parts = {"task": MixtureConfig, "method": EquivariantConfig, "training": TrainingConfig}
    built, seed = _built(parts, {**_TRANSFER, **changes})
    return TransferConfig(seed=seed, **built)


def _built(parts: dict[str, Any], values: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """The parts of a configuration from fields by name, and the seed."""
    built = {}
    for part, cls in parts.items():
        names = {f.name for f in dataclasses.fields(cls)}
        built[part] = cls(**{k: values.pop(k) for k in list(values) if k in names})
    seed = values.pop("seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ConfigError(f"seed must be a whole number, zero or more, got {seed!r}")
    if values:
        raise ConfigError(f"there is no setting {sorted(values)[0]!r}")
    return built, seed
