"""Optimization with parameter symmetries: teleport a network along its loss level set.

By hand, in closed form, or with a meta-trained optimizer. Implements, and goes past, the paper that docstrings here
call "Zhao et al. 2024":

    Bo Zhao, Robert M. Gower, Robin Walters and Rose Yu.
    "Improving Convergence and Generalization Using Parameter Symmetries".
    International Conference on Learning Representations (ICLR), 2024. arXiv:2305.13404.

Numbers of equations, algorithms, figures and propositions are those of that paper.

Names are imported when first used, so that the command line answers before torch is loaded.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from metatele._moved import install
from metatele._version import __version__

if TYPE_CHECKING:
    from metatele.checkpoint import Checkpoint, load, save
    from metatele.learned import MetaOptimizer
    from metatele.optim.learned import LearnedOptimizer
    from metatele.optim.teleport import TeleportOptimizer, teleport_
    from metatele.teleport import GradientNormAscent, Random, Rescaling, Whitening, balance_heads_

install()

_HOME = {
    "Checkpoint": "metatele.checkpoint",
    "GradientNormAscent": "metatele.teleport",
    "LearnedOptimizer": "metatele.optim.learned",
    "MetaOptimizer": "metatele.learned",
    "Random": "metatele.teleport",
    "Rescaling": "metatele.teleport",
    "TeleportOptimizer": "metatele.optim.teleport",
    "Whitening": "metatele.teleport",
    "balance_heads_": "metatele.teleport",
    "load": "metatele.checkpoint",
    "save": "metatele.checkpoint",
    "teleport_": "metatele.optim.teleport",
}

__all__ = [
    "Checkpoint",
    "GradientNormAscent",
    "LearnedOptimizer",
    "MetaOptimizer",
    "Random",
    "Rescaling",
    "TeleportOptimizer",
    "Whitening",
    "__version__",
    "balance_heads_",
    "load",
    "save",
    "teleport_",
]


if not TYPE_CHECKING:  # else every misspelt name would pass a type checker

    def __getattr__(name: str) -> Any:
        if name in _HOME:
            return getattr(importlib.import_module(_HOME[name]), name)
        raise AttributeError(f"module 'metatele' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
