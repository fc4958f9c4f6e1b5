"""What every family's unrolled batch of problems is: where its trajectories are, and how they go one step further."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from torch import Tensor

U = TypeVar("U", bound="Unrolled")

# Called with where a step began, and with what the optimizer did there.
Observer = Callable[[Any, Any], None]


class Unrolled(Protocol):
    """``[B]`` trajectories of one shape, between two steps. Frozen: a step makes a new one.

    All that crosses from one step to the next is in here, so that one :meth:`detach` cuts all history.
    """

    @property
    def problems(self) -> Any:
        """What the trajectories fit; ``len`` of it is B."""

    @property
    def weights(self) -> Tensor:
        """``w_t``, flat, ``[B, P]``."""

    @property
    def loss(self) -> Tensor:
        """``L(w_t)`` on the batch of the next step, ``[B]``; with history, if :meth:`advanced` made it."""

    @property
    def gradient(self) -> Tensor:
        """``∇L(w_t)`` on the same batch, ``[B, P]``, a constant."""

    @property
    def age(self) -> Tensor | int:
        """Steps done, one number for all or ``[B]``."""

    def advanced(self: U, optimizer: Any, *, observe: Observer | None = None, remat: bool = False) -> U:
        """One step further; the loss there is differentiable in the meta-parameters, with every gradient a constant.

        Args:
            optimizer: Of this family.
            observe: Called with this point and what the optimizer did, as its ``step`` returns it.
            remat: Compute the step anew in the backward pass; the same derivatives for less memory.

        A family may take more settings, each with a default.
        """

    def detach(self: U) -> U:
        """The same point without history."""

    def saved(self) -> dict[str, Any]:
        """What a file needs, beside the problems, to go on from here: nested tensors and plain values.

        Tensors have a row, or the same number of rows, for each trajectory; but for those of :meth:`is_common`.
        """

    def restored(self: U, saved: dict[str, Any]) -> U:
        """The point that :meth:`saved` came from; this one gives the problems and the device."""

    def is_common(self, name: str) -> bool:
        """Whether a tensor of this name in :meth:`saved` is one for all trajectories."""
