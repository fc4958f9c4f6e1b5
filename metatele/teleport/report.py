"""What a teleport did: in tensors for a batch of networks, in plain numbers for a user's one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from metatele.errors import with_page


class Reason(IntEnum):
    """Why a network stayed where it was; :attr:`sentence` says it in words.

    Example:
        >>> Reason.CAP.sentence
        'the objective had reached the cap before the first step'
    """

    MOVED = 0
    CAP = 1
    NO_DIRECTION = 2
    NO_GAIN = 3
    DRIFT = 4
    NOT_FINITE = 5
    ARRIVED = 6
    INPUTS = 7
    EMPTY = 8
    FROZEN = 9
    TOO_FAR = 10
    IMBALANCE = 11
    NO_SPACE = 12
    NO_SYMMETRY = 13
    SEARCH = 14

    @property
    def sentence(self) -> str:
        """For a report; empty for a network that moved."""
        return _SENTENCES[self]


_SENTENCES = {
    Reason.MOVED: "",
    Reason.CAP: "the objective had reached the cap before the first step",
    Reason.NO_DIRECTION: "there is no direction: the gradient of the objective along the orbit is zero or not finite",
    Reason.NO_GAIN: "no step of the line search, down to the shortest, improved the objective",
    Reason.DRIFT: with_page(
        "every step, also the shortest that was tried, drifted past max_drift",
        "docs/teleporting.md#moves",
    ),
    Reason.NOT_FINITE: "the move does not exist here: it led to weights or outputs that are not finite",
    Reason.ARRIVED: "the weights already are where the move leads",
    Reason.INPUTS: "the inputs or the weights are not finite",
    Reason.EMPTY: "the batch was empty",
    Reason.FROZEN: "no hidden layer may move: a layer before or behind each is frozen, in no group, or has lr 0",
    Reason.TOO_FAR: "every step, also the shortest that was tried, changed the weights by more than max_change",
    Reason.IMBALANCE: "all hidden units that the objective would scale are out of balance by max_imbalance already",
    Reason.NO_SPACE: "no units of the model that may move have a group by which this move acts",
    Reason.NO_SYMMETRY: "the model has no continuous symmetry that could be found",
    Reason.SEARCH: "the model's symmetries could not be found from this pass: a warning said why",
}


class Report(NamedTuple):
    """What a teleport did, a value for each network of the batch ``[...]``.

    Attributes:
        loss_before: Loss on the batch it was made on.
        loss_after: The same, after.
        objective_before: The objective on that batch.
        objective_after: The same, after.
        drift: ``|loss_after - loss_before| / |loss_before|``; with a loss that is known by its gradient
            alone, the relative change of the network's outputs.
        rolled_back: Whether a move, or a step of one, was taken back for its drift or for not being finite.
        steps: Steps that moved at least one of the networks.
        seconds: Wall-clock time.
        reasons: Why a network stayed, as numbers of :class:`Reason`; zero where it moved.
    """

    loss_before: Tensor
    loss_after: Tensor
    objective_before: Tensor
    objective_after: Tensor
    drift: Tensor
    rolled_back: Tensor
    steps: int
    seconds: float
    reasons: Tensor

    @staticmethod
    def refused(reason: Reason, like: Tensor) -> Report:
        """Of a teleport of one network that was not tried: its numbers are not known."""
        unknown, zero = torch.full_like(like, torch.nan), torch.zeros_like(like)
        reasons = torch.full(like.shape, int(reason), dtype=torch.int64, device=like.device)
        rolled_back = reasons == int(Reason.INPUTS)  # counted as such; where nothing may move, nothing was taken back
        return Report(unknown, unknown, unknown, unknown, zero, rolled_back, 0, 0.0, reasons)

    def numbers(self) -> Tensor:
        """All of one network's in one vector ``[9]`` of double precision, to be sent to other processes."""
        tensors = (*self[:6], torch.tensor(self.steps), torch.tensor(self.seconds), self.reasons)
        return torch.stack([t.detach().reshape(()).to(self.drift.device, torch.float64) for t in tensors])

    @staticmethod
    def of_numbers(numbers: Tensor) -> Report:
        """The inverse of :meth:`numbers`."""
        a, b, c, d, drift, rolled_back, steps, seconds, reason = numbers
        return Report(a, b, c, d, drift, rolled_back.bool(), int(steps), float(seconds), reason.long())


@dataclass(frozen=True)
class TeleportReport:
    """What a teleport of a user's network did, in plain Python numbers.

    Attributes:
        objective: Name of the objective that the numbers are of, such as ``grad-norm`` for ``‖∇L‖²``.
        loss_before: Loss on the batch that the teleport was made on; ``None`` if it is not known. It is not where
            the data came from the training loop's own passes, which tell the gradient of the loss alone.
        loss_after: The same, after.
        objective_before: The objective on that batch; ``nan`` only if :attr:`reason` says why.
        objective_after: The same, after.
        drift: ``|loss_after - loss_before| / |loss_before|``; where the loss is not known, the change of the outputs
            relative to their spread over the samples. It speaks of that batch alone. Zero if nothing moved.
        moved: Whether the weights are others than before.
        rolled_back: Whether the move, or a step of it, was taken back: it drifted too far or was not finite.
        steps: Steps made and kept.
        seconds: Wall-clock time.
        reason: Why nothing moved, in a sentence; empty if the weights moved.

    Example:
        >>> report = TeleportReport("grad-norm", 2.3, 2.3, 0.5, 2.0, 1e-6, True, False, 10, 0.01)
        >>> print(report)
        squared grad-norm 0.5 -> 2 (x 4) in 10 steps, drift 1.0e-06, loss 2.3 -> 2.3
        >>> print(TeleportReport("grad-norm", None, None, 0.5, 0.5, 0.0, False, True, 0, 0.01, "it drifted too far"))
        nothing moved: it drifted too far (squared grad-norm 0.5)
    """

    objective: str
    loss_before: float | None
    loss_after: float | None
    objective_before: float
    objective_after: float
    drift: float
    moved: bool
    rolled_back: bool
    steps: int
    seconds: float
    reason: str = ""

    @staticmethod
    def of(report: Report, objective: str, loss_known: bool) -> TeleportReport:
        """From the tensors of one network."""
        before, after = (float(t) if loss_known else math.nan for t in report[:2])
        why = Reason(int(report.reasons))
        return TeleportReport(
            objective,
            before if math.isfinite(before) else None,
            after if math.isfinite(after) else None,
            float(report.objective_before),
            float(report.objective_after),
            float(report.drift),
            why is Reason.MOVED,
            bool(report.rolled_back),
            report.steps,
            report.seconds,
            why.sentence,
        )

    def __str__(self) -> str:
        before, after = self.objective_before, self.objective_after
        objective = "squared grad-norm" if self.objective == "grad-norm" else self.objective
        if not self.moved:
            known = f" ({objective} {before:.3g})" if math.isfinite(before) else ""
            return f"nothing moved: {self.reason}{known}"
        factor = f" (x {after / before:.3g})" if before > 0 else ""
        taken_back = ", a step was taken back" if self.rolled_back else ""
        loss = "" if self.loss_before is None else f", loss {self.loss_before:.4g} -> {self.loss_after:.4g}"
        steps = "1 step" if self.steps == 1 else f"{self.steps} steps"
        return f"{objective} {before:.3g} -> {after:.3g}{factor} in {steps}, drift {self.drift:.1e}{loss}{taken_back}"
