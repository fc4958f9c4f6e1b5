"""Teleport moves by hand: along an objective, in closed form, at random."""

from metatele.teleport.ascent import Ascent, GradientNormAscent, default_move
from metatele.teleport.balance import MoveReport, balance_, fold_norms_, randomize_
from metatele.teleport.barrier import Barrier, loss_barrier, refreshed_
from metatele.teleport.closed_form import Random, Rescaling, Whitening
from metatele.teleport.control import MatchedRandom
from metatele.teleport.exact_moves import Balance
from metatele.teleport.heads import HeadsReport, balance_heads_
from metatele.teleport.match import MatchReport, match_
from metatele.teleport.module_move import ModuleMove
from metatele.teleport.move import Course, Leg, Teleport, TeleportMove, in_sequence
from metatele.teleport.null_space import NullSpaceReport, null_space_
from metatele.teleport.report import Reason, Report, TeleportReport
from metatele.teleport.transport import transport

__all__ = [
    "Ascent",
    "Balance",
    "Barrier",
    "Course",
    "GradientNormAscent",
    "HeadsReport",
    "Leg",
    "MatchReport",
    "MatchedRandom",
    "ModuleMove",
    "MoveReport",
    "NullSpaceReport",
    "Random",
    "Reason",
    "Report",
    "Rescaling",
    "Teleport",
    "TeleportMove",
    "TeleportReport",
    "Whitening",
    "balance_",
    "balance_heads_",
    "default_move",
    "fold_norms_",
    "in_sequence",
    "loss_barrier",
    "match_",
    "null_space_",
    "randomize_",
    "refreshed_",
    "transport",
]
