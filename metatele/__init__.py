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
    from metatele.optim.along import carry_along_
    from metatele.optim.learned import LearnedOptimizer
    from metatele.optim.recording import Recording
    from metatele.optim.teleport import TeleportOptimizer, teleport_
    from metatele.symmetry.find import Symmetries, find_symmetries
    from metatele.teleport import (
        Balance,
        GradientNormAscent,
        ModuleMove,
        Random,
        Rescaling,
        Whitening,
        balance_,
        balance_heads_,
        fold_norms_,
        loss_barrier,
        match_,
        null_space_,
        randomize_,
    )

install()

_HOME = {
    "Balance": "metatele.teleport",
    "Checkpoint": "metatele.checkpoint",
    "GradientNormAscent": "metatele.teleport",
    "LearnedOptimizer": "metatele.optim.learned",
    "MetaOptimizer": "metatele.learned",
    "ModuleMove": "metatele.teleport",
    "Random": "metatele.teleport",
    "Recording": "metatele.optim.recording",
    "Rescaling": "metatele.teleport",
    "Symmetries": "metatele.symmetry.find",
    "TeleportOptimizer": "metatele.optim.teleport",
    "Whitening": "metatele.teleport",
    "balance_": "metatele.teleport",
    "balance_heads_": "metatele.teleport",
    "carry_along_": "metatele.optim.along",
    "find_symmetries": "metatele.symmetry.find",
    "fold_norms_": "metatele.teleport",
    "load": "metatele.checkpoint",
    "loss_barrier": "metatele.teleport",
    "match_": "metatele.teleport",
    "null_space_": "metatele.teleport",
    "randomize_": "metatele.teleport",
    "save": "metatele.checkpoint",
    "teleport_": "metatele.optim.teleport",
}

__all__ = [
    "Balance",
    "Checkpoint",
    "GradientNormAscent",
    "LearnedOptimizer",
    "MetaOptimizer",
    "ModuleMove",
    "Random",
    "Recording",
    "Rescaling",
    "Symmetries",
    "TeleportOptimizer",
    "Whitening",
    "__version__",
    "balance_",
    "balance_heads_",
    "carry_along_",
    "find_symmetries",
    "fold_norms_",
    "load",
    "loss_barrier",
    "match_",
    "null_space_",
    "randomize_",
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
