"""What a :class:`~metatele.TeleportOptimizer` sees of the training loop's passes: the batch, of all processes."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metatele.network import ranks
from metatele.network.capture import PassCapture
from metatele.perceptron.mlp import MLP


class Batch(NamedTuple):
    """The samples of a step, one column each.

    Attributes:
        inputs: ``[d, n]``.
        gradient: ``∂L/∂output [o, n]``, scaled as the parameters' gradients now are.
    """

    inputs: Tensor
    gradient: Tensor


class _Capture(PassCapture):
    """Passes, and the group of the ``DistributedDataParallel`` in which they ran."""

    group: ranks.Group | None = None

    def __call__(self, module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        self.group = ranks.active_group() or self.group
        super().__call__(module, arguments, output)


class _Owner:
    """What the capture asks whether the passes of the next step are kept."""

    def __init__(self, listener: Any) -> None:
        self._listener = weakref.ref(listener)

    @property
    def teleport_due(self) -> bool:
        listener = self._listener()
        return listener is not None and bool(listener.listening)


class Passes:
    """Keeps the passes of the steps in which the optimizer is ``listening``.

    Args:
        linears: The layers.
        mlp: Their shape.
    """

    def __init__(self, linears: list[nn.Linear], mlp: MLP) -> None:
        self._linears, self._mlp = linears, mlp
        self._capture = _Capture(linears)

    def attach(self, optimizer: Any) -> None:
        """Listen for as long as ``optimizer`` lives."""
        self._owner = _Owner(optimizer)
        self._capture.attach(self._owner)

    @property
    def group(self) -> ranks.Group | None:
        """Of the processes that train copies of this model."""
        return getattr(self._capture, "group", None)

    @property
    def any(self) -> bool:
        """Whether there were any, of empty batches too."""
        return bool(self._capture.passes)

    def clear(self) -> None:
        """Forget them."""
        self._capture.clear()

    def batch(self, flat: Tensor, current: bool) -> Batch | None:
        """The samples of all passes, and of all processes; ``None`` if there are none.

        Args:
            flat: The weights.
            current: They still are those of the passes.
        """
        group = self.group
        if group is None:
            columns = self._capture.columns(flat.dtype)
            return None if columns is None else Batch(*columns)
        ends = self._capture.ends(flat.dtype)
        # A rank without samples takes part: the others wait for it.
        inputs, gradient = (flat.new_zeros(self._mlp.widths[i], 0) for i in (0, -1))
        if ends is not None:
            inputs, gradient = ends[0], ends[2]
        inputs = ranks.gathered(inputs, group)
        gradient = ranks.gathered(gradient, group) / ranks.size(group)  # averaged, as the parameters' gradients are
        if not inputs.shape[-1]:
            return None
        if current:  # clipped or unscaled since, perhaps
            last = self._mlp.layer_inputs(self._mlp.unflatten(flat), inputs)[-1]
            gradient = gradient * _factor(gradient @ last.mT, self._linears[-1].weight.grad)
        return Batch(inputs, gradient)

    def __getstate__(self) -> dict[str, Any]:
        """Copies carry no owner."""
        return {**self.__dict__, "_owner": None}


def _factor(recorded: Tensor, seen: Tensor | None) -> Tensor | float:
    """From gradients as recorded to those the optimizer sees, where the one explains the other."""
    if seen is None:
        return 1.0
    seen = seen.to(recorded.dtype)
    product = (recorded * seen).sum()
    if float(product) > 0.99 * float(recorded.norm() * seen.norm()) > 0:
        return product / recorded.square().sum()
    return 1.0


def fingerprint(columns: Tensor) -> list[float]:
    """Numbers by which samples ``[d, n]`` are known again, whatever their order.

    Example:
        >>> x = torch.eye(3)
        >>> known_again(fingerprint(x), fingerprint(x.flip(1))), known_again(fingerprint(x), fingerprint(x + 1))
        (True, False)
    """
    columns = columns.double()
    ramp = torch.arange(1, columns.shape[0] + 1, dtype=columns.dtype, device=columns.device)
    rows = torch.stack([ramp.cos(), (0.7 * ramp).sin()]) @ columns
    return [float(columns.shape[-1]), *rows.square().sum(-1).tolist(), *rows.abs().sum(-1).tolist()]


def known_again(then: list[float], now: list[float]) -> bool:
    """Whether two fingerprints are of the same samples, to rounding."""
    return all(abs(a - b) <= 1e-5 * max(abs(a), abs(b), 1e-30) for a, b in zip(then, now, strict=True))
