"""Meta-optimizers: learned local moves, learned teleport moves, and their compositions."""

from metatele.learned.equivariant.observation import Observation, Wants
from metatele.learned.equivariant.opening import Opened, Opening
from metatele.learned.equivariant.optimizer import ConstantOptimizer, EquivariantOptimizer
from metatele.learned.equivariant.states import EquivariantStates
from metatele.learned.families import LearnedFamily, family_of, learned_family, register_learned
from metatele.learned.flat.moves import LearnedRate, LearnedTeleport, LearnedUpdate, LocalMove
from metatele.learned.flat.optimizer import MetaOptimizer, MoveStates, Stepped
from metatele.learned.lstm import LSTMState, StackedLSTM

__all__ = [
    "ConstantOptimizer",
    "EquivariantOptimizer",
    "EquivariantStates",
    "LSTMState",
    "LearnedFamily",
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
    "Wants",
    "family_of",
    "learned_family",
    "register_learned",
]
