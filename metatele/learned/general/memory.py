"""A course's memories as an optimizer's state, and back."""

from __future__ import annotations

from typing import Any


def laid_out(course: Any, memory: Any, parts: Any, vectors: Any) -> dict[str, Any]:
    """To come."""
    return {}


def read(course: Any, stored: Any, memory: Any, parts: Any, vectors: Any) -> None:
    """To come."""
