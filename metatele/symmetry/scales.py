r"""All positive scales of a network at once, to where its weights are smallest: Newton's method in their logarithms.

With an element x of the weights written by a unit i and read by a unit j, ``‖θ‖²`` along the orbit is

.. math::
    F(u) = \sum_x x^2 e^{2 (u_i - u_j)},

which is smooth and convex. Sweeps that solve it unit by unit take hundreds of rounds along a deep chain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from metatele.network.spaces import Space
from metatele.symmetry.exact import Element

_UNITS, _ELEMENTS = 2048, 1 << 22  # the Hessian is dense; elements are numbered
_STEPS, _FARTHEST = 60, 2.0
_CLOSE = 1e-6  # a last step, from where sweeps end it
_ARRIVED, _RIDGE = 1e-13, 1e-13


class Terms(NamedTuple):
    """``F(u) = Σ_t v_t exp(2 Σ_e sign_te u_{unit_te})``.

    Attributes:
        sizes: v, ``[t]``.
        units: Two for each ``[t, 2]``.
        signs: 1, -1, or 0 where there is none ``[t, 2]``.
    """

    sizes: Tensor
    units: Tensor
    signs: Tensor

    def at(self, u: Tensor) -> Tensor:
        """Each term at log scales ``[N]``."""
        return self.sizes * (2 * (self.signs * u[self.units]).sum(1)).exp()

    def slopes(self, terms: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Gradient ``[N]`` and Hessian ``[N, N]`` from each term's value."""
        gradient = torch.zeros(count, dtype=terms.dtype)
        hessian = torch.zeros(count * count, dtype=terms.dtype)
        for e in range(2):
            gradient.index_add_(0, self.units[:, e], 2 * self.signs[:, e] * terms)
            for f in range(2):
                at = self.units[:, e] * count + self.units[:, f]
                hessian.index_add_(0, at, 4 * self.signs[:, e] * self.signs[:, f] * terms)
        return gradient, hessian.view(count, count)


def least_scales(spaces: Sequence[Space], tensors: Mapping[str, Tensor]) -> list[Element] | None:
    """The scales of spaces that together make ``‖θ‖²`` least; those of units not both written and read stay 1.

    Args:
        spaces: All that scale.
        tensors: Parameters by name.

    Returns:
        An element for each space; ``None`` where they are not scales alone, are too many, or have no smallest point.

    Example:
        >>> import metatele
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 1, False), torch.nn.ReLU(), torch.nn.Linear(1, 1, False))
        >>> tensors = {"0.weight": torch.tensor([[8.0]]).double(), "2.weight": torch.tensor([[2.0]]).double()}
        >>> spaces = [s for s in metatele.find_symmetries(model, torch.ones(1, 1)).spaces if s.group == "scale"]
        >>> [round(float(element.value), 9) for element in least_scales(spaces, tensors)]
        [0.5]
    """
    count = sum(space.k for space in spaces)
    if any(s.group != "scale" or any(p.gain is not None for p in s.places) for s in spaces) or count > _UNITS:
        return None
    terms = _terms(spaces, tensors)
    if terms is None:
        return None
    both = torch.zeros(2, count, dtype=torch.float64)
    for e in range(2):
        for side, sign in enumerate((1, -1)):
            chosen = terms.signs[:, e] == sign
            both[side].index_add_(0, terms.units[chosen, e], terms.sizes[chosen])
    free = (both > 0).all(0)
    u = _minimum(terms._replace(signs=terms.signs * free[terms.units]), free)
    return None if u is None else [Element(part.exp(), (-part).exp()) for part in u.split([s.k for s in spaces])]


def _terms(spaces: Sequence[Space], tensors: Mapping[str, Tensor]) -> Terms | None:
    """Elements that the same units write and read are one term; ``None`` where one has more than two units."""
    places: dict[str, list[tuple[int, Tensor, bool]]] = {}
    count = 0
    for space in spaces:
        for place in space.places:
            places.setdefault(place.name, []).append((count, place.indices(), place.reads))
        count += space.k
    if sum(tensors[name].numel() for name in places) > _ELEMENTS:
        return None
    codes = 2 * count + 1
    keys, sizes = [], []
    for name, mine in places.items():
        flat = tensors[name].detach().reshape(-1).cpu().double()
        code = torch.zeros(2, len(flat), dtype=torch.int64)
        for begin, at, reads in mine:
            at = at.cpu()
            own = (1 + 2 * (begin + torch.arange(len(at))) + reads)[:, None].expand_as(at)
            second = (code[0][at] != 0).long()
            code[second, at] = own
        if int((code != 0).sum()) != sum(at.numel() for _, at, _ in mine):
            return None
        key = code[0] * codes + code[1]
        touched = (key != 0) & (flat != 0)
        each, inverse = key[touched].unique(return_inverse=True)
        keys.append(each)
        sizes.append(torch.zeros(len(each), dtype=torch.float64).index_add_(0, inverse, flat[touched].square()))
    key = torch.cat(keys)
    pair = torch.stack([key // codes, key % codes], 1)
    signs = torch.where(pair % 2 == 1, 1.0, -1.0).double() * (pair != 0)
    return Terms(torch.cat(sizes), (pair - 1).clamp_min(0) // 2, signs)


def _minimum(terms: Terms, free: Tensor) -> Tensor | None:
    """Log scales where the sum is least, by damped steps."""
    u = torch.zeros(len(free), dtype=torch.float64)
    now = terms.at(u)
    change = float("inf")
    for _ in range(_STEPS):
        gradient, hessian = terms.slopes(now, len(u))
        root = torch.where(free, hessian.diagonal(), 1.0).clamp_min(torch.finfo(u.dtype).tiny).sqrt()
        scaled = hessian / (root[:, None] * root)
        scaled.diagonal().fill_(1.0 + _RIDGE)  # a direction that changes nothing has no curvature
        L, failed = torch.linalg.cholesky_ex(scaled)
        if int(failed):
            return None
        step = -torch.cholesky_solve((gradient / root)[:, None], L)[:, 0] / root
        change = float(step.abs().max())
        step *= min(1.0, _FARTHEST / max(change, 1e-300))
        slope, before, length = float(gradient @ step), float(now.sum()), 1.0
        while not float((then := terms.at(u + length * step)).sum()) <= before + 1e-4 * length * slope:
            length /= 2
            if length < 1e-4:  # rounding is all that is left
                return u if change < _CLOSE else None
        u, now = u + length * step, then
        if change < _ARRIVED:
            break
    return u if change < _CLOSE else None
