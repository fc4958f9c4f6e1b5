"""What all configurations share: frozen, validated when built, saved in every checkpoint. Imports no torch."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import field
from typing import Any

from metatele.errors import ConfigError


def setting(default: Any, help: str, choices: tuple[str, ...] = (), compare: bool = True) -> Any:
    """A field of a configuration.

    Args:
        default: Its value if none is given.
        help: Text of its flag's help.
        choices: The only values it may have, if these are few.
        compare: Whether configurations that differ in it are different: false for what changes time alone.
    """
    return field(default=default, compare=compare, metadata={"help": help, "choices": choices})


def require(condition: bool, name: str, expected: str, value: object) -> None:
    """Refuse a value in one sentence unless a condition holds."""
    if not condition:
        raise ConfigError(f"{name} must be {expected}, got {value}")


def require_positive(config: Any, *names: str) -> None:
    """Refuse fields that are not positive, finite numbers."""
    for name in names:
        value = getattr(config, name)
        require(value > 0 and math.isfinite(value), name, "positive", value)


def check_types(config: Any) -> None:
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
        >>> from metatele.config import TaskConfig
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
