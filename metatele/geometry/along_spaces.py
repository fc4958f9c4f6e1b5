r"""Curves ``γ(t) = exp(tM)·w`` along the exact symmetries of any module, and their curvature.

On a space whose units are written by W and read by V the curve is ``W ← exp(tM) W``, ``V ← V exp(-tM)``, so that

.. math::
    γ_W^{(j)} = M^j W, \qquad γ_V^{(j)} = (-1)^j V M^j.

Spaces act one after another as :func:`metatele.symmetry.exact.act` does, each on what those before it made: of every
element its first derivatives are carried along, through products by Leibniz's rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from metatele.errors import ConfigError, ShapeMismatchError
from metatele.geometry.jets import Jet, add, leibniz, scaled
from metatele.geometry.kappa import Curvatures, from_derivatives
from metatele.network.spaces import Carry, Place, Space
from metatele.network.unwrap import unwrapped

_ROUNDING = 1e-5  # relative, by which an M of rotations may miss its algebra


def random_tangents(spaces: Sequence[Space], curves: int, seed: int, like: Tensor) -> list[Tensor]:
    """An M of each space for each curve: entries uniform on [0, 1], then Frobenius norm 1.

    They are those of :class:`~metatele.geometry.Curvature` where a space is the hidden layer of a linear perceptron.
    Of rotations the antisymmetric part is taken before the norm.

    Args:
        spaces: Of continuous groups.
        curves: How many.
        seed: Of the draw.
        like: A tensor of the dtype and on the device wanted.

    Returns:
        For each space ``[curves, ...]``, shaped as tangents of :func:`metatele.symmetry.exact.element_of` are.

    Raises:
        ConfigError: Permutations have no tangents.

    Example:
        >>> import metatele
        >>> found = metatele.find_symmetries(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.ones(5, 3))
        >>> [M.shape for M in random_tangents(found.spaces, 2, 0, torch.ones(()))]  # GL, and shifts
        [torch.Size([2, 4, 4]), torch.Size([2, 4])]
    """
    g = torch.Generator().manual_seed(seed)
    drawn = []
    for space in spaces:
        M = torch.rand(curves, *_shape(space), generator=g)
        if space.group == "O":
            M = _antisymmetric(space, M.double())
        sizes = M.flatten(1).norm(dim=1).view(-1, *(1,) * (M.dim() - 1))
        drawn.append((M / torch.where(sizes > 0, sizes, 1.0)).to(like))
    return drawn


def _shape(space: Space) -> tuple[int, ...]:
    """Of a tangent."""
    if space.group == "perm":
        raise ConfigError("permutations are no continuous group: they have no curves")
    return {"GL": (space.k, space.k), "O": (space.k, space.k), "phase": (space.k, 2)}.get(space.group, (space.k,))


def _antisymmetric(space: Space, M: Tensor) -> Tensor:
    M = (M - M.mT) / 2
    if space.centred:
        centre = torch.eye(space.k, dtype=M.dtype, device=M.device) - 1 / space.k
        M = centre @ M @ centre
    return M


def module_derivatives(
    model: nn.Module | Mapping[str, Tensor], spaces: Sequence[Space], M: Sequence[Tensor], order: int = 3
) -> list[dict[str, Tensor]]:
    """``γ', γ'', γ'''`` at t = 0 of ``γ(t) = exp(tM)·w``, all spaces one after another; differentiable.

    Args:
        model: Any module, or its parameters by name.
        spaces: Its spaces of continuous groups, ``find_symmetries(model, x).spaces`` without permutations.
        M: For each space ``[curves, ...]``: ``[k, k]`` of GL; the same, antisymmetric, of O; ``[k]`` of scales and
            shifts; ``[k, 2]`` of phases, logarithm and angle.
        order: How many derivatives, 1 to 3.

    Returns:
        For each order the parts ``[curves, *shape]`` by name, of the parameters that move.

    Raises:
        ConfigError: Permutations among the spaces, a parameter that the model lacks, order or M not as named.
        ShapeMismatchError: An M of another shape.

    Example:
        >>> import metatele
        >>> model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False))
        >>> for p in model.parameters():
        ...     _ = nn.init.constant_(p, 3.0)
        >>> spaces = [s for s in metatele.find_symmetries(model, torch.ones(2, 1)).spaces if s.group != "perm"]
        >>> [{n: t.item() for n, t in row.items()} for row in module_derivatives(model, spaces, [torch.ones(1, 1)], 2)]
        [{'0.weight': 3.0, '2.weight': -3.0}, {'0.weight': 3.0, '2.weight': 3.0}]
    """
    tensors = model if isinstance(model, Mapping) else dict(unwrapped(model).named_parameters())
    if order not in (1, 2, 3):
        raise ConfigError(f"order must be 1, 2 or 3, got {order}")
    curves = _checked(tensors, spaces, M)
    names = list(dict.fromkeys(name for space in spaces for name in space.parameters))
    each = [_curve(tensors, spaces, [m[n] for m in M], order) for n in range(curves)]
    return [
        {name: torch.stack([_whole(curve[name], j).view(tensors[name].shape) for curve in each]) for name in names}
        for j in range(1, order + 1)
    ]


def module_curvatures(
    model: nn.Module | Mapping[str, Tensor], spaces: Sequence[Space], M: Sequence[Tensor], slope: bool = False
) -> Curvatures:
    """Curvature at t = 0 of ``exp(tM)·w`` on any module, and its derivative (Zhao et al. 2024, Eq. 47, 51).

    What :func:`~metatele.geometry.curvatures` is for perceptrons. Curves of exact symmetries need no data.

    Args:
        model: Any module, or its parameters by name.
        spaces: See :func:`module_derivatives`.
        M: See :func:`module_derivatives`.
        slope: Also κ'.

    Returns:
        A value for each curve ``[curves]``.

    Raises:
        ConfigError: As for :func:`module_derivatives`.
        ShapeMismatchError: As for :func:`module_derivatives`.

    Example:
        >>> import metatele
        >>> model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False))
        >>> for p in model.parameters():
        ...     _ = nn.init.ones_(p)
        >>> spaces = [s for s in metatele.find_symmetries(model, torch.ones(2, 1)).spaces if s.group != "perm"]
        >>> module_curvatures(model, spaces, [torch.ones(1, 1)]).kappa.detach()  # the hyperbola through (1, 1): 1/√2
        tensor([0.7071])
    """
    rows = module_derivatives(model, spaces, M, 3 if slope else 2)
    if not rows[0]:
        raise ConfigError("curves need at least one space of a continuous group")
    return from_derivatives([[part.flatten(1).unsqueeze(1) for part in row.values()] for row in rows])


def _checked(tensors: Mapping[str, Tensor], spaces: Sequence[Space], M: Sequence[Tensor]) -> int:
    """The number of curves."""
    if len(M) != len(spaces):
        raise ConfigError(f"expected one M for each of {len(spaces)} spaces, got {len(M)}")
    curves = M[0].shape[0] if len(M) and M[0].dim() else 0
    for space, m in zip(spaces, M, strict=True):
        wanted = (curves, *_shape(space))
        if tuple(m.shape) != wanted:
            raise ShapeMismatchError(f"the M of {space.group} of {space.k} must be {list(wanted)}, got {list(m.shape)}")
        if space.group == "O":
            off = (m - _antisymmetric(space, m)).detach().abs().max()
            if bool(off > _ROUNDING * m.detach().abs().max()):
                keeping = ", and rows that add up to zero" if space.centred else ""
                raise ConfigError(f"the M of rotations must be antisymmetric{keeping}")
        if missing := [name for name in space.parameters if name not in tensors]:
            raise ConfigError(f"the spaces are those of another model: this one has no parameter {missing[0]!r}")
    return curves


def _whole(jet: Jet, j: int) -> Tensor:
    found, start = jet[j], jet[0]
    assert start is not None
    return torch.zeros_like(start) if found is None else found


def _curve(tensors: Mapping[str, Tensor], spaces: Sequence[Space], M: Sequence[Tensor], order: int) -> dict[str, Jet]:
    """Of one curve: every parameter that a space names, flat, with its derivatives."""
    jets: dict[str, Jet] = {}

    def take(name: str, at: Tensor) -> Jet:
        if name not in jets:
            own = tensors[name].reshape(-1)
            jets[name] = [own.to(torch.promote_types(own.dtype, M[0].dtype)), *[None] * order]
        return [None if t is None else t[at.to(t.device)] for t in jets[name]]

    def put(name: str, at: Tensor, new: Jet) -> None:
        start = jets[name][0]
        assert start is not None
        where = (at.to(start.device),)
        for j, value in enumerate(new[1:], 1):
            if value is not None:
                jets[name][j] = _whole(jets[name], j).index_put(where, value.to(start.dtype))

    for space, m in zip(spaces, M, strict=True):
        for carry in space.carries:
            put(carry.name, carry.at, _carried(carry, m, take))
        for place in space.places:
            at = place.indices()
            x, gain = take(place.name, at), None
            if place.gain is not None:
                gain = [None if g is None else g[:, None] for g in take(*place.gain)]
                x = _product(x, gain) if place.reads else _quotient(x, gain)
            x = _moved(space, place, m, x)
            if gain is not None:
                x = _quotient(x, gain) if place.reads else _product(x, gain)
            put(place.name, at, x)
    return jets


def _carried(carry: Carry, c: Tensor, take: Callable[[str, Tensor], Jet]) -> Jet:
    """A bias that is lowered by ``t W c``: its j-th derivative by ``j W⁽ʲ⁻¹⁾ c``."""
    W, bias = take(carry.weight.name, carry.weight.indices()), take(carry.name, carry.at)
    for j in range(1, len(bias)):
        before = W[j - 1]
        if before is not None:
            bias[j] = add(bias[j], -j * (c.to(before) @ before))
    return bias


def _moved(space: Space, place: Place, m: Tensor, x: Jet) -> Jet:
    """What lies at a place under ``exp(tM)``, or its dual where it is read: ``Σ C(j, i) Gⁱ x⁽ʲ⁻ⁱ⁾``."""
    start = x[0]
    assert start is not None
    m = m.to(start)
    if space.group == "shift":
        first = m[:, None].expand_as(start)
        return [start, add(x[1], first), *x[2:]]
    powers: list[list[Tensor | None]] = [x]
    while len(powers) < len(x):
        powers.append([None if t is None else _generated(space, place, m, t) for t in powers[-1]])
    return leibniz(len(x), lambda i, j: powers[i][j])


def _generated(space: Space, place: Place, m: Tensor, x: Tensor) -> Tensor:
    """``M x`` where units are written, ``-Mᵀ x`` where they are read; x is ``[k, m]``."""
    match space.group:
        case "scale":
            return (-m if place.reads else m)[:, None] * x
        case "phase":
            log, angle = (t[:, None, None] for t in m.unbind(-1))
            log = -log if place.reads else log
            a, b = x.view(space.k, -1, 2, len(place.offsets)).unbind(2)
            return torch.stack([log * a - angle * b, log * b + angle * a], 2).view_as(x)
    parts = x.view(space.k, -1)
    return ((-m.mT if place.reads else m) @ parts).view_as(x)


def _product(x: Jet, y: Jet) -> Jet:
    def term(i: int, j: int) -> Tensor | None:
        a, b = x[i], y[j]
        return None if a is None or b is None else a * b

    return leibniz(len(x), term)


def _quotient(x: Jet, y: Jet) -> Jet:
    """The z with ``z y = x``, order by order."""
    start = y[0]
    assert start is not None
    z: Jet = []
    for j in range(len(x)):
        rest = x[j]
        for i, known in enumerate(z):
            below = y[j - i]
            if known is not None and below is not None:
                rest = add(rest, scaled(-_BINOMIAL[j][i], known * below))
        z.append(None if rest is None else rest / start)
    return z


_BINOMIAL = ((1,), (1, 1), (1, 2, 1), (1, 3, 3, 1))
