"""What the benchmarks share: where they ran, and their JSON."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from metatele.checkpoint import versions


def environment(**more: Any) -> dict[str, Any]:
    """Machine, cores, threads and versions."""
    return {
        **versions(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        **more,
    }


def save(path: Path | None, result: dict[str, Any]) -> None:
    """Write a result where ``--json`` says, if it does."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
