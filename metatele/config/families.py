"""The families of meta-optimizers, and what belongs to one of them alone. Imports no torch.

A family has three entries of one name: here its settings and presets; in :mod:`metatele.learned.families` the optimizer
they describe; in :mod:`metatele.training.families` how it is meta-trained. One that users step their own models with
has a stepper in :mod:`metatele.optim` too. Nothing else asks which family it is.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from metatele.config.base import from_dict
from metatele.errors import ConfigError

PARTS = ("task", "method", "training")


@dataclass(frozen=True)
class RunConfig:
    """Everything a meta-training run of some family needs to know, but for where to run and write.

    A family has a subclass of this, with a settings class for each part and a default for each field.

    Attributes:
        preset: What the settings began with.
        seed: Of everything random.
        task: The distribution of inner problems.
        method: The meta-optimizer; enough to rebuild it.
        training: How it is trained: a :class:`~metatele.config.training.CommonTrainingConfig`.
    """

    preset: str
    seed: int
    task: Any
    method: Any
    training: Any

    @property
    def family(self) -> FamilyConfig:
        """The family whose settings these are.

        Raises:
            ConfigError: It is not known.
        """
        for family in _FAMILIES.values():
            if type(self) is family.run:
                return family
        raise ConfigError(f"{type(self).__name__} is of no family that is known")


@dataclass(frozen=True)
class FamilyConfig:
    """A family's settings.

    Attributes:
        name: Its name, in stored files and everywhere else.
        title: What it is, in a few words.
        run: Its :class:`RunConfig`.
        presets: Their names.
        changed: What a preset changes of the defaults: ``changed(preset, given)``, where ``given`` holds the fields
            that the user sets.
        defaults: What the help of a flag calls a field's default.

    Example:
        >>> from metatele.config import family_named
        >>> flat = family_named("flat")
        >>> flat.title, flat.part("training").__name__
        ("the paper's LSTMs, for one shape of network", 'FlatTrainingConfig')
    """

    name: str
    title: str
    run: type[RunConfig]
    presets: tuple[str, ...]
    changed: Callable[[str, dict[str, Any]], dict[str, Any]]
    defaults: str = "default"

    def part(self, name: str) -> type[Any]:
        """The settings class of ``"task"``, ``"method"`` or ``"training"``."""
        found: type[Any] = typing.get_type_hints(self.run)[name]
        return found

    def fields(self, part: str) -> dict[str, Any]:
        """Names and defaults of a part's fields."""
        return {f.name: f.default for f in dataclasses.fields(self.part(part))}


_FAMILIES: dict[str, FamilyConfig] = {}


def register_family(family: FamilyConfig) -> FamilyConfig:
    """Make a family's settings known.

    Raises:
        ConfigError: Its name or one of its presets is taken.
    """
    for other in _FAMILIES.values():
        if family.name == other.name:
            raise ConfigError(f"there is a family {family.name!r} already")
        if taken := sorted({*family.presets} & {*other.presets}):
            raise ConfigError(f"the preset {taken[0]!r} is of the family {other.name!r} already")
    _FAMILIES[family.name] = family
    return family


def families() -> tuple[FamilyConfig, ...]:
    """All families, in the order they became known.

    Example:
        >>> [family.name for family in families()][:2]
        ['flat', 'equivariant']
    """
    return tuple(_FAMILIES.values())


def family_named(name: str) -> FamilyConfig:
    """The family of a name.

    Raises:
        ConfigError: There is none.

    Example:
        >>> family_named("equivariant").presets
        ('transfer',)
    """
    if name not in _FAMILIES:
        raise ConfigError(f"family must be one of {', '.join(_FAMILIES)}, got {name!r}")
    return _FAMILIES[name]


def family_with(preset: str) -> FamilyConfig:
    """The family a preset belongs to.

    Raises:
        ConfigError: There is no such preset.

    Example:
        >>> family_with("quick").name
        'flat'
    """
    for family in _FAMILIES.values():
        if preset in family.presets:
            return family
    known = ", ".join(name for family in _FAMILIES.values() for name in family.presets)
    raise ConfigError(f"preset must be one of {known}, got {preset!r}")


def preset(name: str, method: str | None = None, **changes: Any) -> RunConfig:
    """A preset, with fields of any part changed by name.

    Args:
        name: One of any family's presets.
        method: Short for the field of that name, which the flat family has.
        changes: Fields of the task, the method or the training, and ``seed``.

    Raises:
        ConfigError: Unknown preset, method or field; a field of another family; or a value out of range.

    Example:
        >>> preset("paper", "update", batch=8).training.batch
        8
        >>> preset("transfer", widest=32).task.widest
        32
    """
    family = family_with(name)
    if method is not None:
        changes["method"] = method
    values = {**family.changed(name, changes), **changes}
    built: dict[str, Any] = {}
    for part in PARTS:
        names = family.fields(part)
        built[part] = family.part(part)(**{k: values.pop(k) for k in list(values) if k in names})
    seed = values.pop("seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ConfigError(f"seed must be a whole number, zero or more, got {seed!r}")
    if values:
        unknown = sorted(values)[0]
        for other, _ in _elsewhere(family, unknown):
            raise ConfigError(_foreign(unknown, other, name, family))
        raise ConfigError(f"there is no setting {unknown!r}")
    return family.run(preset=name, seed=seed, **built)


def stored_config(values: dict[str, Any]) -> RunConfig:
    """What :func:`to_dict` made of a run's configuration of any family.

    A field of another family, which earlier versions stored too, is dropped where it has its default.

    Args:
        values: The stored mapping; its ``preset`` tells the family.

    Raises:
        ConfigError: Unknown fields, fields of another family that say something, or values out of range.

    Example:
        >>> from metatele.config import to_dict, transfer
        >>> stored = to_dict(transfer(seed=3))
        >>> stored["training"]["staggered"] = False
        >>> stored_config(stored) == transfer(seed=3)
        True
    """
    if not isinstance(values, dict):
        raise ConfigError(f"a run's configuration must be given by a mapping, got {type(values).__name__}")
    family = family_with(values.get("preset", "quick"))
    kept = {
        name: _own(family, name, value) if name in PARTS and isinstance(value, dict) else value
        for name, value in values.items()
    }
    config: RunConfig = from_dict(family.run, kept)
    return config


def _own(family: FamilyConfig, part: str, values: dict[str, Any]) -> dict[str, Any]:
    """Stored fields of a part without those of other families."""
    own, kept = family.fields(part), {}
    for name, value in values.items():
        others = [] if name in own else [(other, default) for other, default in _elsewhere(family, name, part)]
        if not others:
            kept[name] = value
            continue
        other, default = others[0]
        if value != (list(default) if isinstance(default, tuple) else default):
            raise ConfigError(f"{name} is a setting of the {other.name} family, not of the {family.name} one")
    return kept


def _elsewhere(family: FamilyConfig, name: str, *parts: str) -> Iterator[tuple[FamilyConfig, Any]]:
    """The other families that have a field of a name, and its default there."""
    for other in _FAMILIES.values():
        for part in parts or PARTS:
            if other is not family and name in other.fields(part):
                yield other, other.fields(part)[name]


def _foreign(name: str, other: FamilyConfig, preset: str, family: FamilyConfig) -> str:
    return f"{name} is a setting of the {other.name} family, and the preset {preset} is of the {family.name} one"
