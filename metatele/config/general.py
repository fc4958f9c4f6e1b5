"""Settings of the general family, which takes any module."""

from __future__ import annotations

from dataclasses import dataclass

from metatele.config.base import check_types, require_positive, setting


@dataclass(frozen=True)
class GeneralConfig:
    """A meta-optimizer for any module. Enough to rebuild it."""

    first_rate: float = setting(3e-3, "the rate before training")

    def __post_init__(self) -> None:
        """Check the rate."""
        check_types(self)
        require_positive(self, "first_rate")

    @property
    def title(self) -> str:
        """Name in tables and figures."""
        return "General"
