"""The loss between two networks: along the straight line from the weights of one to those of the other."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metatele.errors import ConfigError, ShapeMismatchError
from metatele.network.unwrap import unwrapped

Refresh = Callable[[nn.Module], object] | Iterable[Any]


@dataclass(frozen=True)
class Barrier:
    """Losses on a straight line between two networks; prints as a table.

    Attributes:
        at: t of each point, from 0, the model, to 1, the reference.
        losses: There.

    Example:
        >>> line = Barrier((0.0, 0.5, 1.0), (1.0, 3.0, 2.0))
        >>> line.barrier, line.midpoint
        (1.5, 1.5)
        >>> print(line)
        t     loss    above the ends
        0.00  1.0000  0.0000
        0.50  3.0000  1.5000
        1.00  2.0000  0.0000
    """

    at: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def above(self) -> tuple[float, ...]:
        """``loss(t) - ((1 - t) loss(0) + t loss(1))``."""
        first, last = self.losses[0], self.losses[-1]
        return tuple(loss - ((1 - t) * first + t * last) for t, loss in zip(self.at, self.losses, strict=True))

    @property
    def barrier(self) -> float:
        """The largest of them; 0 where the line never rises above its ends."""
        return max(self.above)

    @property
    def midpoint(self) -> float:
        """The one nearest to the middle."""
        return min(zip(self.at, self.above, strict=True), key=lambda pair: abs(pair[0] - 0.5))[1]

    def __str__(self) -> str:
        rows = zip(self.at, self.losses, self.above, strict=True)
        cells = [("t", "loss", "above the ends"), *((f"{t:.2f}", f"{x:.4f}", f"{y:.4f}") for t, x, y in rows)]
        widths = [max(len(line[column]) for line in cells) for column in range(3)]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)

    __repr__ = __str__


@torch.no_grad()
def loss_barrier(
    model: nn.Module,
    reference: nn.Module,
    loss: Callable[[nn.Module], Tensor | float],
    points: int = 11,
    refresh: Refresh | None = None,
) -> Barrier:
    r"""Losses on the line ``(1 - t) model + t reference``, and how far it rises above its ends.

    .. math::
        \max_t \; L(θ_t) - (1 - t) L(θ_0) - t L(θ_1)

    Running statistics of norms belong to the weights they were gathered with, and a mean of them to none: variances
    shrink, and the loss is that of wrong statistics. They are therefore gathered anew at every point, the ends too
    ("REPAIR", Jordan et al., ICLR 2023), from batches that the caller gives.

    Args:
        model: t = 0; neither it nor the reference is changed.
        reference: t = 1; of the same architecture. See :func:`metatele.match_`.
        loss: Of a network, which it is given in ``eval()`` mode and without gradients.
        points: On the line, ends included.
        refresh: Where the networks keep running statistics: batches of inputs by which they are reset, such as a data
            loader (of a list, the first entry; a tuple is all positional arguments; a dictionary all named ones), or a
            function of a network that does it. ``()`` takes a mean of the statistics too.

    Returns:
        The losses.

    Raises:
        ShapeMismatchError: Parameters or buffers differ in name or shape.
        ConfigError: There are running statistics and no batches, or too few points.

    Example:
        >>> a, b = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.constant_(a.weight, -1.0), nn.init.constant_(b.weight, 1.0)
        >>> loss_barrier(a, b, lambda net: 1 - net(torch.ones(1, 1)).square().sum(), points=3).barrier
        1.0
    """
    model, reference = unwrapped(model), unwrapped(reference)
    if points < 2:
        raise ConfigError(f"points must be at least 2, got {points}")
    own, theirs = model.state_dict(), reference.state_dict()
    if {name: t.shape for name, t in own.items()} != {name: t.shape for name, t in theirs.items()}:
        raise ShapeMismatchError("the two networks must be of one architecture: their states differ in name or shape")
    running = [name for name, m in model.named_modules() if _keeps_statistics(m)]
    if running and refresh is None:
        raise ConfigError(
            f"{running[0] or 'the model'} keeps running statistics, which have to be gathered anew between the two "
            "networks: give refresh= batches of inputs, or () to take a mean of the statistics"
        )
    if isinstance(refresh, Iterator):
        refresh = list(refresh)  # it is gone through at every point
    between, losses = copy.deepcopy(model).eval(), []
    at = [n / (points - 1) for n in range(points)]
    for t in at:
        for name, target in between.state_dict().items():
            if target.is_floating_point() or target.is_complex():
                wide = torch.promote_types(target.dtype, torch.float64)
                a, b = own[name].to(wide), theirs[name].to(target.device, wide)
                target.copy_((1 - t) * a + t * b)
        if running and refresh is not None:
            if callable(refresh):
                refresh(between)
            else:
                refreshed_(between, refresh)
        losses.append(float(loss(between.eval())))
    return Barrier(tuple(at), tuple(losses))


def refreshed_(model: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Gather the running statistics of norms anew, as the mean over batches; with none, they stay.

    Args:
        model: Changed; only its norms are in training mode meanwhile.
        batches: Of inputs, as for :func:`loss_barrier`.

    Returns:
        The model.

    Example:
        >>> norm = refreshed_(nn.BatchNorm1d(2), [torch.ones(4, 2), 3 * torch.ones(4, 2)])
        >>> norm.running_mean
        tensor([2., 2.])
    """
    norms: list[Any] = [m for m in model.modules() if _keeps_statistics(m)]
    modes, momenta = [(m, m.training) for m in model.modules()], [m.momentum for m in norms]
    begun = False
    try:
        model.eval()
        for batch in batches:
            for m in norms if not begun else ():
                m.reset_running_stats()
                m.momentum = None
                m.train()
            begun = True
            with torch.no_grad():
                _call(model, batch)
    finally:
        for m, momentum in zip(norms, momenta, strict=True):
            m.momentum = momentum
        for module, training in modes:
            module.training = training
    return model


def _call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, tuple):
        model(*batch)
    else:
        model(batch[0] if isinstance(batch, list) else batch)


def _keeps_statistics(m: nn.Module) -> bool:
    return isinstance(m, nn.modules.batchnorm._NormBase) and m.running_mean is not None
