"""Configuration: frozen, validated when built, saved in every checkpoint. Imports no torch.

Each class is the settings of one part; :class:`RunConfig` is what ``train_meta.py`` runs. Every
field is a command-line flag; its ``help`` says the unit or the reason of the default.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any

from metatele.errors import ConfigError

METHODS = {
    "update-tele": "LSTM(update,tele)",
    "update": "LSTM(update)",
    "lr-tele": "LSTM(lr,tele)",
}


def _setting(default: Any, help: str, choices: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices})


def _require(condition: bool, name: str, expected: str, value: object) -> None:
    if not condition:
        raise ConfigError(f"{name} must be {expected}, got {value}")


def _require_positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value > 0 and math.isfinite(value), name, "positive", value)


def _check_types(config: Any) -> None:
    """Refuse values of the wrong kind, and choices that do not exist, in one sentence."""
    hints = typing.get_type_hints(type(config))
    for f in dataclasses.fields(config):
        value, choices = getattr(config, f.name), f.metadata.get("choices", ())
        kinds = typing.get_args(hints[f.name]) if isinstance(hints[f.name], types.UnionType) else (hints[f.name],)
        plain = tuple(typing.get_origin(kind) or kind for kind in kinds)
        accepted = plain + ((int,) if float in plain else ())
        if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in plain):
            expected = " or ".join(k.__name__ for k in plain)
            raise ConfigError(f"{f.name} must be of type {expected}, got {value!r}")
        if choices and value not in choices:
            raise ConfigError(f"{f.name} must be one of {', '.join(choices)}, got {value!r}")


@dataclass(frozen=True)
class TaskConfig:
    """The distribution of inner problems (PAPER §4)."""

    widths: tuple[int, ...] = _setting((20, 20, 20), "layer sizes of the inner network")
    samples: int = _setting(20, "columns of X and Y")
    activation: str = _setting("leaky_relu:0.1", "activation of the inner network")
    bias: bool = _setting(False, "whether the inner network has biases")
    low: float = _setting(0.0, "lower end of the uniform entries of X, Y and the initial weights")
    high: float = _setting(1.0, "upper end of the same")

    def __post_init__(self) -> None:
        """Check sizes."""
        _check_types(self)
        _require(
            len(self.widths) >= 2 and all(isinstance(w, int) and w > 0 for w in self.widths),
            "widths",
            "at least two positive sizes",
            self.widths,
        )
        _require_positive(self, "samples")
        _require(math.isfinite(self.low) and math.isfinite(self.high), "low and high", "finite", (self.low, self.high))
        _require(self.low < self.high, "low", f"below high ({self.high})", self.low)


@dataclass(frozen=True)
class MixtureConfig:
    """The distribution of inner problems of every shape: widths, depths, activations, data, losses, batches."""

    narrowest: int = _setting(5, "least width")
    widest: int = _setting(64, "largest width; widths are log-uniform")
    depths: tuple[int, ...] = _setting((2, 2, 3, 3, 4), "numbers of weight layers, drawn evenly")

    def __post_init__(self) -> None:
        """Check sizes."""
        _check_types(self)
        _require(2 <= self.narrowest <= self.widest, "narrowest", f"from 2 to widest ({self.widest})", self.narrowest)
        _require(
            len(self.depths) > 0 and all(isinstance(d, int) and d >= 2 for d in self.depths),
            *("depths", "numbers of layers, at least 2", self.depths),
        )


@dataclass(frozen=True)
class MethodConfig:
    """A meta-optimizer: which moves, and their sizes. Enough to rebuild the network."""

    method: str = _setting("update-tele", "which moves are learned", tuple(METHODS))
    hidden: int = _setting(300, "size of the LSTM cells")
    teleport_hidden: int = _setting(0, "size of the teleport move's cells; 0: the same as hidden")
    layers: int = _setting(2, "LSTM cells in a row")
    input_scale: float = _setting(1.0, "factor on the initial weights that read the gradient")
    preprocessing: str = _setting("raw", "what the LSTM sees of a gradient", ("raw", "asinh", "log-sign"))
    update_scale: float = _setting(1.0, "factor on the learned update")
    gradient_rates: bool = _setting(False, "gate the learned update, and add learned rates times the gradient")
    rate_low: float = _setting(1e-7, "smallest learned learning rate")
    rate_high: float = _setting(5e-3, "largest learned learning rate")
    rate_output: str = _setting("clamp", "how an output becomes a rate between the two", ("clamp", "log"))
    rate_of: str = _setting(
        "gradient", "what a learned rate multiplies: the gradient, or its direction", ("gradient", "direction")
    )
    gradient_cap: float = _setting(
        0.0, "longest gradient that rates multiply, in units of the shortest so far on the trajectory; 0: any"
    )
    action: str = _setting("exact", "how the group acts", ("exact", "approximate", "rescaling"))
    parametrisation: str = _setting("exp", "from T to g", ("exp", "cayley", "first-order", "direct"))
    radius: float = _setting(0.01, "Frobenius norm of T (at most 0.5)")
    radius_decay: float = _setting(0.0, "steps after which the radius has halved, as 1/(1 + t/steps); 0: constant")
    norm: str = _setting(
        "fixed", "of T: always radius, bounded by it, or learned up to it", ("fixed", "bounded", "learned")
    )

    teleport_head: float = _setting(1.0, "factor on the initial weights of the teleport's head")
    teleport_mean: float = _setting(
        0.0, "added to the initial T along the constant matrix (norm, before scaling); below 0 contracts the mean"
    )

    def __post_init__(self) -> None:
        """Check sizes and ranges."""
        _check_types(self)
        _require_positive(self, "hidden", "layers", "input_scale", "update_scale", "rate_low", "rate_high")
        _require_positive(self, "radius", "teleport_head")
        _require(self.rate_low < self.rate_high, "rate_low", f"below rate_high ({self.rate_high})", self.rate_low)
        _require(self.teleport_hidden >= 0, "teleport_hidden", "zero or positive", self.teleport_hidden)
        _require(math.isfinite(self.teleport_mean), "teleport_mean", "finite", self.teleport_mean)
        _require(self.radius_decay >= 0, "radius_decay", "zero or positive", self.radius_decay)
        _require(
            self.gradient_cap == 0 or 1 <= self.gradient_cap < math.inf,
            *("gradient_cap", "0 or at least 1", self.gradient_cap),
        )
        _require(self.radius <= 0.5, "radius", "at most 0.5", self.radius)

    @property
    def title(self) -> str:
        """Name in tables and figures."""
        return METHODS[self.method]


# What the equivariant family's controller sees, by kind: how many numbers, in their order.
SENSES = {"slopes": 2, "cosine": 1, "loss": 2, "spectra": 2, "sizes": 3, "clock": 1, "data": 2, "place": 3}


@dataclass(frozen=True)
class EquivariantConfig:
    """A meta-optimizer that takes networks of any shape. Enough to rebuild it."""

    hidden: int = _setting(32, "size of the controller's LSTM cell")
    averaging: float = _setting(0.95, "decay of the running second moments on mini-batches")
    growth: float = _setting(2.0, "growth of the loss at which a step is shortened; on mini-batches its fourth power")
    hold: int = _setting(16, "mini-batches between two looks of the controller, after the first 16")
    reach: float = _setting(1.0, "largest relative change of a layer's pre-activations by its own step")
    small: int = _setting(64, "widths up to twice this have new spectra every 4 steps, wider ones less often")
    keep: float = _setting(
        2.0, "of wide layers (128, on mini-batches 96), eigenvalues below this times their mean may share one; 0: none"
    )
    opening: bool = _setting(True, "teleport the network itself before the first step")
    inputs: bool = _setting(True, "steps are made where the second moments of a layer's inputs have been evened out")
    errors: bool = _setting(True, "the same for those of the errors")
    drift: float = _setting(0.3, "largest relative change of the outputs by the teleport before the first step")
    blind: tuple[str, ...] = _setting((), "numbers the controller does not see, to find out what they are worth")

    def __post_init__(self) -> None:
        """Check sizes and ranges."""
        _check_types(self)
        _require_positive(self, "hidden", "small", "hold")
        _require(0 <= self.averaging < 1, "averaging", "in [0, 1)", self.averaging)
        _require_positive(self, "reach")
        _require(1 < self.growth < math.inf, "growth", "above 1", self.growth)
        _require(0 <= self.keep < math.inf, "keep", "zero or positive", self.keep)
        _require(0 <= self.drift < math.inf, "drift", "zero or positive", self.drift)
        _require(set(self.blind) <= set(SENSES), "blind", f"among {', '.join(SENSES)}", self.blind)

    @property
    def title(self) -> str:
        """Name in tables and figures."""
        return "Equivariant(update,tele)"


@dataclass(frozen=True)
class TrainingConfig:
    """Meta-training by truncated unrolling (Algorithm 1)."""

    trajectories: int = _setting(700, "inner trajectories to train on, started or restarted")
    batch: int = _setting(16, "trajectories unrolled at the same time")
    horizon: int = _setting(100, "steps of one trajectory")
    unroll: int = _setting(10, "steps between two meta-updates")
    shorter: tuple[int, ...] = _setting((), "horizons that some trajectories of a batch have instead, in turn")
    groups: int = _setting(1, "groups of trajectories, each of its own shape, that are unrolled in turn")
    staggered: bool = _setting(False, "start the trajectories of a batch at different ages")
    objective: str = _setting("sum", "loss of a window: sum, or mean of the logarithm", ("sum", "mean-log"))
    local_lr: float = _setting(1e-3, "Adam's rate for the local move's LSTM")
    teleport_lr: float = _setting(1e-4, "Adam's rate for what makes the teleports")
    decay: str = _setting("constant", "of the meta learning rates over the run", ("constant", "cosine"))
    clip: float = _setting(0.0, "largest norm of a meta-gradient; 0: no clipping")
    average: float = _setting(0.0, "decay of the averaged weights that are evaluated and saved; 0: none")
    precision: str = _setting("float32", "of the LSTM's matrix products", ("float32", "tf32", "bf16"))
    remat: bool = _setting(False, "compute inner steps anew in the backward pass: less memory, more time")
    graph: bool = _setting(False, "flat family on a GPU: replay windows as CUDA graphs; elsewhere they are as ever")
    lost_loss: float = _setting(1e8, "a trajectory at this loss stops, and a new one takes its place")
    max_skipped: int = _setting(20, "non-finite updates in a row before the run stops")
    validation_trajectories: int = _setting(16, "held-out trajectories that choose the checkpoint")
    validation_steps: int = _setting(100, "their length")
    validation_every: int = _setting(100, "updates between validations")
    validation_score_at: tuple[int, ...] = _setting((29, 99), "steps whose mean log loss is the score")
    save_every: int = _setting(100, "updates between saves of the resumable state")
    log_every: int = _setting(20, "updates between log entries")

    def __post_init__(self) -> None:
        """Check sizes and that windows fit."""
        _check_types(self)
        _require_positive(
            self,
            *(
                "trajectories",
                "batch",
                "groups",
                "horizon",
                "unroll",
                "local_lr",
                "teleport_lr",
                "lost_loss",
                "max_skipped",
            ),
            *("validation_trajectories", "validation_steps", "validation_every", "save_every", "log_every"),
        )
        _require(self.unroll <= self.horizon, "unroll", f"at most the horizon ({self.horizon})", self.unroll)
        _require(
            all(isinstance(h, int) and 0 < h <= self.horizon for h in self.shorter)
            and (not self.shorter or all(h % self.unroll == 0 for h in (self.horizon, *self.shorter))),
            "shorter",
            f"horizons up to {self.horizon}, all multiples of unroll ({self.unroll}) as the horizon then is",
            self.shorter,
        )
        _require(self.clip >= 0, "clip", "zero or positive", self.clip)
        _require(0 <= self.average < 1, "average", "in [0, 1)", self.average)
        _require(
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


def to_dict(config: Any) -> dict[str, Any]:
    """Nested dictionary of JSON values."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return list(value) if isinstance(value, tuple) else value

    result: dict[str, Any] = plain(config)
    return result


def from_dict(cls: type[Any], values: dict[str, Any]) -> Any:
    """Inverse of :func:`to_dict`.

    Raises:
        ConfigError: Unknown fields, or values that the class refuses. A missing field takes its
            default, so that what was saved before a setting existed still loads.

    Example:
        >>> from_dict(TaskConfig, to_dict(TaskConfig(samples=7))).samples
        7
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{cls.__name__} must be given by a mapping, got {type(values).__name__}")
    hints = typing.get_type_hints(cls)
    fields = {f.name for f in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - fields):
        raise ConfigError(f"{cls.__name__} has no field {unknown[0]!r}")
    built = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]):
            value = from_dict(typing.cast("type[Any]", hints[name]), value)
        built[name] = tuple(value) if isinstance(value, list) else value
    return cls(**built)


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
