r"""Sharpness of a minimum: the loss averaged over random displacements (Zhao et al. 2024, Eq. 4).

Everything that is linear in the displacement is computed once: with ``Z = W₁X`` and ``E = D₁X``, the first
layer at ``w + t d`` is ``Z + t E``, so the data are multiplied once for every network and once for every
direction, not once for every combination.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from metatele.errors import ConfigError
from metatele.geometry.landscape import Landscape, Point, point_given
from metatele.geometry.module_point import ModulePoint
from metatele.geometry.objectives import Objective
from metatele.perceptron.losses import Differentiable
from metatele.perceptron.mlp import MLP, affine, product

DISPLACEMENTS = tuple(round(0.001 + 0.01 * i, 3) for i in range(20))  # the paper's, for MNIST


@dataclass(frozen=True)
class Sharpness(Objective):
    r"""``φ(w, T, D) = mean over t ∈ T, d ∈ D of L(w + t d)`` (Zhao et al. 2024, Eq. 4).

    The directions are the same for every network and every call, so that differences between networks, or
    between the points of an ascent, are not those of the draw. A displaced loss that is not finite makes φ
    infinite. Memory is bounded by chunks, chosen from the sizes.

    Of a :class:`~metatele.geometry.ModulePoint` each displaced loss is a pass, and its gradient one more backward:
    4000 of them by default. There, chunks play no part.

    Args:
        displacements: T.
        directions: Number of directions, uniform on the unit sphere of weight space.
        orthant: Take them from the positive orthant, as the reference implementation does: absolute values
            of the same directions.
        seed: Of the directions.
        chunk_bytes: Memory of the hidden units that are looked at together; about what a core's cache holds.

    Example:
        >>> from metatele.perceptron.activations import Identity
        >>> from metatele.perceptron.losses import SquaredError
        >>> line = Landscape(MLP((1, 1), Identity()), torch.ones(1, 1), torch.zeros(1, 1), SquaredError())
        >>> phi = Sharpness(displacements=(2.0,), directions=1000)  # d = ±1: mean of ½(w ± 2)² = ½w² + 2
        >>> round(float(phi.value(line.at(torch.tensor([1.0])))), 1)
        2.5
    """

    displacements: tuple[float, ...] = DISPLACEMENTS
    directions: int = 200
    orthant: bool = False
    seed: int = 0
    chunk_bytes: int = 8 << 20
    name: ClassVar[str] = "sharpness"
    needs_loss: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check settings."""
        try:
            steps = tuple(float(t) for t in self.displacements)
        except (TypeError, ValueError):
            steps = ()
        if not steps or not all(map(math.isfinite, steps)):
            raise ConfigError(f"displacements must be a list of finite numbers, got {self.displacements!r}")
        object.__setattr__(self, "displacements", steps)
        if not isinstance(self.directions, int) or not isinstance(self.seed, int):
            raise ConfigError(f"directions and seed must be whole numbers, got {self.directions!r} and {self.seed!r}")
        for name in ("directions", "chunk_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")

    def value(self, point: Point | ModulePoint) -> Tensor:
        """See the class."""
        return self._of(point, gradient=False)[0]

    def value_and_gradient(self, point: Point | ModulePoint) -> tuple[Tensor, Tensor]:
        """See the class."""
        value, gradient = self._of(point, gradient=True)
        assert gradient is not None
        return value, gradient

    def draw(self, size: int, like: Tensor) -> Iterator[Tensor]:
        """The directions ``[size]``, one after another: the same whatever the chunks."""
        random = torch.Generator().manual_seed(self.seed)
        for _ in range(self.directions):
            d = torch.randn(size, generator=random)
            d = (d.abs() if self.orthant else d) / d.norm()
            yield d.to(like)

    def _of(self, point: Point | ModulePoint, gradient: bool) -> tuple[Tensor, Tensor | None]:
        return self._over_passes(point, gradient) if isinstance(point, ModulePoint) else self._sum(point, gradient)

    @torch.no_grad()
    def _over_passes(self, point: ModulePoint, gradient: bool) -> tuple[Tensor, Tensor | None]:
        """Of any module: a pass for each direction and displacement, at weights that come back."""
        count, like = self.directions * len(self.displacements), point.like
        total = torch.zeros_like(like, dtype=torch.float64)
        sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in point.own.items()} if gradient else {}
        with point.restored(point.own) as before:
            for flat in self.draw(point.size, like):
                direction = point.unflatten(flat)
                for t in self.displacements:
                    for name, p in point.own.items():
                        p.copy_(torch.add(before[name], direction[name], alpha=t))
                    if gradient:
                        loss, found = point.gradients()
                        for name, g in found.items():
                            sums[name] += g
                    else:
                        loss = point.loss()
                    total += loss
        value = torch.where(torch.isfinite(total), total / count, math.inf).to(like)
        return value, point.flatten({name: s / count for name, s in sums.items()}) if gradient else None

    def _sum(self, point: Point, gradient: bool) -> tuple[Tensor, Tensor | None]:
        point_given(point)
        scene = _Scene.of(point.landscape, point.flat)
        count, n = scene.pre.shape[0], scene.pre.shape[-1]
        size = 3 * n * max(point.landscape.mlp.widths[1:]) * scene.pre.element_size()
        fit = max(1, self.chunk_bytes // size)
        networks = min(count, fit)
        moves = min(len(self.displacements), max(1, fit // networks))
        group = min(self.directions, max(1, fit // (networks * moves)))
        steps = torch.tensor(self.displacements, dtype=scene.pre.dtype, device=scene.pre.device)
        total = scene.pre.new_zeros(count)
        by_pre, by_tail = torch.zeros_like(scene.pre), torch.zeros_like(scene.tail)
        drawn = self.draw(point.flat.shape[-1], point.flat)
        for begin in range(0, self.directions, group):
            bundle = torch.stack([next(drawn) for _ in range(min(group, self.directions - begin))])
            shift, tail = scene.moved(bundle)
            for t in steps.split(moves):
                for at in range(0, count, networks):
                    part = slice(at, at + networks)
                    pre, rest = scene.pre[part], scene.tail[part]
                    with torch.set_grad_enabled(gradient):
                        if gradient:
                            pre, rest = pre.detach().requires_grad_(), rest.detach().requires_grad_()
                        losses = scene.losses(pre, rest, shift, tail, t, part).sum((0, 1))
                    if gradient:
                        a, b = torch.autograd.grad(losses, (pre, rest), torch.ones_like(losses), allow_unused=True)
                        by_pre[part] += a
                        if b is not None:
                            by_tail[part] += b
                    total[part] += losses.detach()
        mean = 1 / (self.directions * len(self.displacements))
        value = torch.where(torch.isfinite(total), mean * total, math.inf).view(scene.shape)
        if not gradient:
            return value, None
        return value, mean * scene.gradient(by_pre, by_tail)


class _Scene(NamedTuple):
    """A landscape with what its first layer makes of the data, and the networks in one dimension."""

    landscape: Landscape
    shape: tuple[int, ...]
    inputs: Tensor  # [networks or 1, d, n]
    targets: Tensor
    pre: Tensor  # [networks, k, n]
    tail: Tensor  # weights behind the first layer

    @staticmethod
    def of(landscape: Landscape, flat: Tensor) -> _Scene:
        """At weights ``[..., P]``."""
        mlp, shape = landscape.mlp, flat.shape[:-1]
        rows = flat.reshape(-1, flat.shape[-1])
        inputs = (
            landscape.inputs.expand(*shape, -1, -1) if landscape.inputs.shape[:-2].numel() > 1 else landscape.inputs
        )
        inputs = inputs.reshape(-1, *landscape.inputs.shape[-2:])
        own = 1 if landscape.targets.is_floating_point() else 0  # dimensions of one network's targets, less one
        targets = landscape.targets
        if isinstance(landscape.loss, Differentiable):
            if shape:
                raise ConfigError("a loss given as a function sees one network at a time")
        elif targets.shape[: targets.ndim - 1 - own].numel() > 1:
            targets = targets.expand(*shape, *targets.shape[-1 - own :]).reshape(-1, *targets.shape[-1 - own :])
        else:
            targets = targets.reshape(1, *targets.shape[-1 - own :])
        W, b, tail = _split(mlp, rows)
        pre = _first(W, b, inputs)
        return _Scene(landscape, tuple(shape), inputs, targets, pre, tail)

    def moved(self, directions: Tensor) -> tuple[Tensor, Tensor]:
        """``D₁X`` ``[directions, networks or 1, k, n]`` and the rest of the directions."""
        W, b, tail = _split(self.landscape.mlp, directions)
        return torch.stack([_first(W, b, x.unsqueeze(0)) for x in self.inputs], 1), tail

    def losses(self, pre: Tensor, tail: Tensor, shift: Tensor, rest: Tensor, steps: Tensor, part: slice) -> Tensor:
        """``L(w + t d)``, ``[directions, displacements, networks]``."""
        mlp, loss = self.landscape.mlp, self.landscape.loss
        t = steps[:, None, None, None]
        own = shift[:, part] if shift.shape[1] > 1 else shift
        z = torch.addcmul(pre, t, own.unsqueeze(1))
        if len(mlp.widths) > 2:
            behind = MLP(mlp.widths[1:], mlp.activations[1:], mlp.biases[1:])
            weights = behind.unflatten(tail + steps[:, None, None] * rest[:, None, None])
            z = behind.forward(weights, mlp.activations[0](z))
        if isinstance(loss, Differentiable):
            values = [loss.value(outputs, self.targets) for outputs in z.flatten(0, -3)]
            return torch.stack(values).view(z.shape[:-2])
        return loss.value(z, self.targets[part] if self.targets.shape[0] > 1 else self.targets)

    def gradient(self, by_pre: Tensor, by_tail: Tensor) -> Tensor:
        """From derivatives by ``pre`` and ``tail``, by all weights: flat ``[..., P]``."""
        parts = [product(by_pre.unsqueeze(0), self.inputs.mT.unsqueeze(0))[0].flatten(1)]
        if self.landscape.mlp.biases[0]:
            parts.append(by_pre.sum(-1))
        joined = torch.cat([*parts, by_tail], 1)
        return joined.unflatten(0, self.shape) if self.shape else joined[0]


def _split(mlp: MLP, rows: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """First layer's matrix and bias, and the flat rest, of weights ``[m, P]``."""
    k, d = mlp.widths[1], mlp.widths[0]
    end = k * d + (k if mlp.biases[0] else 0)
    return rows[:, : k * d].view(-1, k, d), rows[:, k * d : end] if mlp.biases[0] else None, rows[:, end:]


def _first(W: Tensor, b: Tensor | None, inputs: Tensor) -> Tensor:
    """``WX + b`` for ``[m, k, d]`` and inputs ``[m or 1, d, n]``: one product where they are shared."""
    return affine(W.unsqueeze(0), None if b is None else b.unsqueeze(0), inputs.unsqueeze(0))[0]
