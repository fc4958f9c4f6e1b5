"""The loss of any module on fixed data, at the weights that the module has: a point of its landscape."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from metatele.errors import ConfigError, ShapeMismatchError
from metatele.network import ranks
from metatele.network.spaces import Space
from metatele.network.unwrap import unwrapped
from metatele.symmetry.double import steady


@contextmanager
def kept(model: nn.Module) -> Iterator[None]:
    """Buffers as they were, whatever passes did to them."""
    buffers = [(b, b.clone()) for b in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for b, was in buffers:
                b.copy_(was)


def norm_of(tensors: Sequence[Tensor]) -> Tensor:
    """Of all numbers of some tensors, in double precision."""
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    norms = torch._foreach_norm([t.detach() for t in tensors], 2, dtype=torch.float64)
    return torch.linalg.vector_norm(torch.stack(norms))


class ModulePoint:
    """Any module at its weights, for objectives of :mod:`metatele.geometry`: what a ``Point`` is for perceptrons.

    Flat vectors hold the parameters that ask for a gradient, in the order of ``named_parameters()``: of an
    ``nn.Sequential`` of Linear and activations they are those of its landscape. Passes are made without dropout, and
    buffers stay.

    Args:
        model: Any module.
        loss: Makes a pass of the model and gives a scalar, such as ``lambda: F.cross_entropy(model(x), y)``. Curvature
            needs none.
        spaces: Exact symmetries for curvature, ``find_symmetries(model, x).spaces``. Permutations are left out.
        group: Of ranks that hold the same weights: losses and gradients are then the means of theirs.

    Raises:
        ConfigError: No parameter asks for a gradient, or ``loss`` is no function.

    Example:
        >>> from metatele.geometry import GradientNorm
        >>> model = nn.Linear(1, 1, bias=False).double()
        >>> _ = nn.init.constant_(model.weight, 3.0)
        >>> x = torch.ones(1, 1, dtype=torch.float64)
        >>> GradientNorm().value(ModulePoint(model, lambda: model(x).square().sum()))  # (2w)²
        tensor(36., dtype=torch.float64)
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[], Tensor] | None = None,
        spaces: Sequence[Space] = (),
        group: ranks.Group | None = None,
    ) -> None:
        if not (loss is None or callable(loss)):
            raise ConfigError(f"loss must be a function that makes a pass and gives a scalar, got {loss!r}")
        self.model, self.given, self.group = unwrapped(model), loss, group
        self.spaces = [space for space in spaces if space.group != "perm"]
        self.own = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if not self.own:
            raise ConfigError("no parameter of the model asks for a gradient")

    @torch.no_grad()
    def loss(self) -> Tensor:
        """``L(w)``."""
        with steady(self.model), kept(self.model):
            loss = self._pass().detach().clone()
            if self.group is not None:
                ranks.mean_([loss], self.group)
            return loss

    @torch.enable_grad()
    def gradients(self) -> tuple[Tensor, dict[str, Tensor]]:
        """``L(w)`` and ``∇L(w)`` by name, of the parameters that it depends on."""
        with steady(self.model), kept(self.model):
            loss = self._pass()
            found = torch.autograd.grad(loss, list(self.own.values()), allow_unused=True)
            loss = loss.detach().clone()
            if self.group is not None:  # a rank may not use what others do
                pairs = zip(self.own.values(), found, strict=True)
                found = tuple(torch.zeros_like(p) if g is None else g for p, g in pairs)
                ranks.mean_([loss, *found], self.group)
        return loss, {n: g for n, g in zip(self.own, found, strict=True) if g is not None}

    @torch.enable_grad()
    def _pass(self) -> Tensor:
        """The loss; gradients are on, as a loss may be made of what passes without them do not show."""
        if self.given is None:
            raise ConfigError("this objective needs a loss: ModulePoint(model, loss)")
        value = self.given()
        if not isinstance(value, Tensor) or value.dim():
            got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ShapeMismatchError(f"loss must give a scalar tensor, got {got}")
        return value

    @torch.no_grad()
    def hessian_product(
        self, direction: Mapping[str, Tensor], gradients: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """``∇²L(w) v`` by a difference of two gradients, ``(∇L(w + ε v) - ∇L(w)) / ε``.

        With ``ε ‖v‖ = √u ‖w‖``, u the unit of the last place, it is as far off as √u, relative (3e-4 in float32), where
        the loss is as curved as usual. It costs one gradient, where a second differentiation costs more than three. No
        operation has to be differentiable twice, as fused attention is not.

        Args:
            direction: v by name.
            gradients: ``∇L(w)``, if they are known.

        Returns:
            By name; nothing where v is zero or not finite.
        """
        here = self.gradients()[1] if gradients is None else gradients
        sizes = torch.stack([norm_of(list(self.own.values())), norm_of(list(direction.values()))]).tolist()
        return self.difference(direction, here, *sizes)

    @torch.no_grad()
    def difference(
        self, direction: Mapping[str, Tensor], gradients: Mapping[str, Tensor], size: float, length: float
    ) -> dict[str, Tensor]:
        """The same where ``‖w‖`` and ``‖v‖`` are known."""
        unit = max(torch.finfo(p.dtype).eps for p in self.own.values())
        step = math.sqrt(unit) * size / length if length > 0 else 0.0
        if not 0 < step < math.inf:
            return {}
        with self.restored(direction):
            torch._foreach_add_([self.own[name] for name in direction], list(direction.values()), alpha=step)
            _, there = self.gradients()
        names = [name for name in gradients if name in there]
        differences = torch._foreach_sub([there[name] for name in names], [gradients[name] for name in names])
        torch._foreach_div_(differences, step)
        return dict(zip(names, differences, strict=True))

    @contextmanager
    def restored(self, names: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """Weights that may be changed, and come back; gives what they were."""
        own = [self.own[name].detach() for name in names]
        before = list(torch._foreach_mul(own, 1)) if own else []  # copies
        try:
            yield dict(zip(names, before, strict=True))
        finally:
            if own:
                torch._foreach_copy_(own, before)

    @property
    def size(self) -> int:
        """P, the number of weights."""
        return sum(p.numel() for p in self.own.values())

    @property
    def like(self) -> Tensor:
        """A number of the first parameter's kind, in single precision at least."""
        first = next(iter(self.own.values()))
        return torch.zeros((), dtype=torch.promote_types(first.dtype, torch.float32), device=first.device)

    def flatten(self, parts: Mapping[str, Tensor]) -> Tensor:
        """One vector ``[P]`` of parts by name; those that are missing are zero."""
        like = self.like
        return torch.cat(
            [
                (parts[n] if n in parts else torch.zeros_like(p)).detach().reshape(-1).to(like)
                for n, p in self.own.items()
            ]
        )

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """Its inverse.

        Raises:
            ShapeMismatchError: It is no vector ``[P]``.
        """
        if tuple(flat.shape) != (self.size,):
            raise ShapeMismatchError(f"weights must be [{self.size}], got {list(flat.shape)}")
        parts = flat.split([p.numel() for p in self.own.values()])
        return {n: t.view(p.shape).to(p) for (n, p), t in zip(self.own.items(), parts, strict=True)}
