"""Meta-optimizers: learned local moves, learned teleport moves, and their compositions."""

from metatele.metaopt.equivariant import ConstantOptimizer, EquivariantOptimizer, EquivariantStates
from metatele.metaopt.lstm import LSTMState, StackedLSTM
from metatele.metaopt.moves import LearnedRate, LearnedTeleport, LearnedUpdate, LocalMove
from metatele.metaopt.observation import Observation
from metatele.metaopt.opening import Opened, Opening
from metatele.metaopt.optimizer import MetaOptimizer, MoveStates, Stepped

__all__ = [
    "ConstantOptimizer",
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
    "Opened",
    "Opening",
    "StackedLSTM",
    "Stepped",
]
