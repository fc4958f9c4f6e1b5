"""Teleport moves by hand: along an objective, in closed form, at random."""

from metatele.teleport.ascent import Ascent, GradientNormAscent
from metatele.teleport.closed_form import Random, Rescaling, Whitening
from metatele.teleport.control import MatchedRandom
from metatele.teleport.move import Leg, Report, Teleport, TeleportMove, in_sequence
from metatele.teleport.transport import transport

__all__ = [
    "Ascent",
    "GradientNormAscent",
    "Leg",
    "MatchedRandom",
    "Random",
    "Report",
    "Rescaling",
    "Teleport",
    "TeleportMove",
    "Whitening",
    "in_sequence",
    "transport",
]
