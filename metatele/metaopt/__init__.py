"""Meta-optimizers: learned local moves, learned teleport moves, and their compositions."""

from metatele.metaopt.equivariant import EquivariantOptimizer, EquivariantStates, Observation
from metatele.metaopt.lstm import LSTMState, StackedLSTM
from metatele.metaopt.moves import LearnedRate, LearnedTeleport, LearnedUpdate, LocalMove
from metatele.metaopt.optimizer import MetaOptimizer, MoveStates, Stepped

__all__ = [
    "EquivariantOptimizer",
    "EquivariantStates",
    "LSTMState",
    "LearnedRate",
    "LearnedTeleport",
    "LearnedUpdate",
    "LocalMove",
    "MetaOptimizer",
    "MoveStates",
    "Observation",
    "StackedLSTM",
    "Stepped",
]
