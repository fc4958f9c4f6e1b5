"""Teleport moves by hand: along an objective, in closed form, at random."""

from metatele.teleport.ascent import Ascent, GradientNormAscent, default_move
from metatele.teleport.closed_form import Random, Rescaling, Whitening
from metatele.teleport.control import MatchedRandom
from metatele.teleport.heads import HeadsReport, balance_heads_
from metatele.teleport.move import Course, Leg, Teleport, TeleportMove, in_sequence
from metatele.teleport.report import Reason, Report, TeleportReport
from metatele.teleport.transport import transport

__all__ = [
    "Ascent",
    "Course",
    "GradientNormAscent",
    "HeadsReport",
    "Leg",
    "MatchedRandom",
    "Random",
    "Reason",
    "Report",
    "Rescaling",
    "Teleport",
    "TeleportMove",
    "TeleportReport",
    "Whitening",
    "balance_heads_",
    "default_move",
    "in_sequence",
    "transport",
]
