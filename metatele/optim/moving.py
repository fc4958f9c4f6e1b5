"""Gradients of any module's parameters in one flat tensor, and changes from there back into the parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from metatele.learned.general.course import Course
from metatele.learned.general.layout import Layout
from metatele.network.parts import Part, Vector
from metatele.optim.steppers import Situation

_STEADY = 3  # steps with the same rates, after which they may stay the same for a while


class Moves(NamedTuple):
    """What moves in a step.

    Attributes:
        weights: Of each part.
        biases: The same of their last columns.
        vectors: Each.
    """

    weights: list[bool]
    biases: list[bool]
    vectors: list[bool]


def real(tensor: Tensor) -> Tensor:
    """A complex tensor as a view of its real and imaginary parts; any other as it is.

    Example:
        >>> real(torch.tensor([1 + 2j]))
        tensor([[1., 2.]])
    """
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


_Read = Callable[[Tensor], Tensor]


def _of(tensor: Tensor, read: _Read | None) -> Tensor:
    return tensor if read is None else read(tensor)


class _Place(NamedTuple):
    """Where the numbers of a parameter, or of a piece of it, lie in a flat tensor.

    Attributes:
        p: The parameter.
        read: From a tensor shaped like it, what is copied; ``None``: the tensor as it is.
        where: From a flat tensor a view shaped like that.
        row: Its matrix among all; negative for a vector.
    """

    p: nn.Parameter
    read: _Read | None
    where: Callable[[Tensor], Tensor]
    row: int


class Paths:
    """The ways between a module's parameters and a course's flat tensors.

    Most of a step on a small network would be spent on making views, so they are made once, and anew when what moves,
    or where parameters lie, has changed.

    Args:
        course: Whose gradient, velocity and change.
        parts: The matrices.
        vectors: The rest.
        stacks: Whether gradients that lie at even distances there are copied in one go; by default on a GPU.

    Attributes:
        rate: What the rates of all that moves have in common: the step itself is to be made that long.
    """

    def __init__(
        self, course: Course, parts: Sequence[Part], vectors: Sequence[Vector], stacks: bool | None = None
    ) -> None:
        self._parts, self._vectors = parts, vectors
        self._flat = course.gradient, course.velocity, course.change
        self._places = list(_places(course.layout, parts, vectors))
        self._stacks = course.gradient.is_cuda if stacks is None else stacks
        self._key: object = None
        self.rate = 1.0
        self._since = 0  # steps since the views were made

    @property
    def copies(self) -> int:
        """Of a :meth:`gather`, each a launch on a GPU."""
        return len(self._targets) + len(self._stacked)

    @property
    def mover(self) -> Callable[[Tensor], None] | None:
        """:meth:`apply`, another object after what moves has changed; ``None`` if it has just now."""
        return self._mover if self._since >= _STEADY else None

    def are_of(self, course: Course, parts: Sequence[Part]) -> bool:
        """Whether they lead from these parts to this course."""
        gradient, velocity, change = self._flat
        return (
            parts is self._parts
            and gradient is course.gradient
            and velocity is course.velocity
            and change is course.change
        )

    def _plan(self, at: Situation, relative: Sequence[float]) -> None:
        """Make the views."""
        gradient, velocity, change = self._flat
        rates = {id(p): rate for p, rate in zip(at.parameters, relative, strict=True)}

        def moves(p: nn.Parameter | None) -> bool:
            return p is not None and rates[id(p)] != 0

        self.moves = Moves(
            [moves(part.weight) for part in self._parts],
            [moves(part.bias) for part in self._parts],
            [moves(p) for _, p in self._vectors],
        )
        moving = [place for place in self._places if moves(place.p)]
        still = [place for place in self._places if not moves(place.p)]
        self._sources = [(place.p, place.read) for place in moving]
        self._targets = [place.where(gradient) for place in moving]
        self._stacked: list[tuple[list[nn.Parameter], Tensor]] = []
        if self._stacks:
            runs = _runs(self._targets, [n for n, (_, read) in enumerate(self._sources) if read is None])
            for run in runs:
                self._stacked.append(([self._sources[n][0] for n in run], _stack([self._targets[n] for n in run])))
            alone = sorted(set(range(len(moving))) - {n for run in runs for n in run})
            self._sources, self._targets = [self._sources[n] for n in alone], [self._targets[n] for n in alone]
        self._still = [(place.where(gradient), place.where(velocity)) for place in still]
        self._zeros = [place.where(change) for place in still]
        # Views of a parameter or, where there are none of the right shape, what makes them by a copy.
        homes = [_of(place.p.detach(), place.read) for place in moving]
        changes = [place.where(change) for place in moving]
        scaled = [(place.where(change), rates[id(place.p)]) for place in moving if rates[id(place.p)] != 1]
        self._scaled, self._by = [one for one, _ in scaled], [rate for _, rate in scaled]
        every = {rates[id(place.p)] for place in moving}
        self._one = every.pop() if len(every) == 1 else None
        matrices = [(number, place) for number, place in enumerate(moving) if place.row >= 0]
        self._weights = [(homes[number], changes[number]) for number, _ in matrices]
        self._rows = [place.row for _, place in matrices]
        self._rates = [rates[id(place.p)] for _, place in matrices]
        others = [number for number, place in enumerate(moving) if place.row < 0]
        self._homes, self._changes = [homes[n] for n in others], [changes[n] for n in others]

    @torch.no_grad()
    def gather(self, at: Situation, apart: bool = False) -> Moves:
        """Copy gradients into the flat one; what does not move gets its running gradient, which so stays as it is.

        Args:
            at: Rates, zero where nothing moves, and the sign of what is minimized.
            apart: Whether the rates are all left to :meth:`apply`, and :attr:`rate` is 1.
        """
        every = {rate for rate in at.rates if rate}
        self.rate = every.pop() if len(every) == 1 and not apart else 1.0
        rates = [rate / self.rate for rate in at.rates]  # so a schedule changes no view
        key = rates, [p.data_ptr() for p in at.parameters]  # views hold on to a memory, so no other lies there
        if key != self._key:
            self._plan(at, rates)
            self._key, self._since, self._mover = key, 0, partial(self.apply)
        self._since += 1
        if self._targets:
            grads = [_of(p.grad, read) for p, read in self._sources if p.grad is not None]
            torch._foreach_copy_(self._targets, grads)
        for parameters, target in self._stacked:
            torch.stack([p.grad for p in parameters if p.grad is not None], out=target)
        if at.sign < 0:
            self._flat[0].neg_()
        for mine, before in self._still:
            mine.copy_(before)
        return self.moves

    @torch.no_grad()
    def apply(self, shares: Tensor) -> None:
        """Move the parameters, by the rates of the last :meth:`gather`; the change is then what was made of it.

        Args:
            shares: Of the weights of each matrix that are lost first.
        """
        for mine in self._zeros:
            mine.zero_()
        if self._scaled:
            torch._foreach_mul_(self._scaled, self._by)
        if self._one is not None:
            kept = (shares * -self._one).add_(1).unbind()
            keeps = [kept[row] for row in self._rows]
        else:
            keeps = [1 - rate * shares[row] for rate, row in zip(self._rates, self._rows, strict=True)]
        for (home, change), share in zip(self._weights, keeps, strict=True):
            torch.addcmul(change, home, share, out=home)  # both in one pass
        if self._homes:
            torch._foreach_add_(self._homes, self._changes)


def _runs(views: Sequence[Tensor], numbers: Sequence[int]) -> list[list[int]]:
    """Those of one shape that lie at even distances in one memory, two and more."""
    alike: dict[object, list[int]] = {}
    for n in numbers:
        alike.setdefault((views[n].shape, views[n].stride()), []).append(n)
    found: list[list[int]] = []
    for some in alike.values():
        run: list[int] = []
        for n in sorted(some, key=lambda n: views[n].storage_offset()):
            last = [views[k].storage_offset() for k in run[-2:]] + [views[n].storage_offset()]
            if len(last) == 3 and last[2] - last[1] != last[1] - last[0]:
                found.append(run)
                run = []
            run.append(n)
        found.append(run)
    return [run for run in found if len(run) > 1]


def _stack(views: Sequence[Tensor]) -> Tensor:
    """Those of a run as one view ``[n, ...]``."""
    first, second = views[0], views[1]
    apart = second.storage_offset() - first.storage_offset()
    return first.as_strided((len(views), *first.shape), (apart, *first.stride()), first.storage_offset())


def _places(layout: Layout, parts: Sequence[Part], vectors: Sequence[Vector]) -> Iterator[_Place]:
    for number, part in enumerate(parts):
        row = layout.rows(number).start
        yield _matrix(layout, part, number, row)
        if part.bias is not None:
            piece = None if part.bias_rows == (0, part.bias.numel()) else part.of_bias
            yield _Place(part.bias, piece, partial(_column, layout, number), row)
    for number, (_, p) in enumerate(vectors):
        read = torch.view_as_real if p.is_complex() else None
        yield _Place(p, read, partial(_vector, layout, number, real(p.detach()).shape), -1)


def _matrix(layout: Layout, part: Part, number: int, row: int) -> _Place:
    """Of a part without its bias."""
    read = None if part.whole else part.of
    shape = part.of(part.weight.detach()).shape
    if part.transposed and part.groups > 1 and shape[0] != part.groups:  # its groups are no neighbours in a matrix
        read, shape = partial(_grouped, part), _grouped(part, part.weight.detach()).shape

    def where(flat: Tensor) -> Tensor:
        table = layout.part(flat, number)[..., : part.inputs]
        return (table.mT if part.transposed else table).view(shape)

    return _Place(part.weight, read, where, row)


def _grouped(part: Part, tensor: Tensor) -> Tensor:
    return part.of(tensor).unflatten(0, (part.groups, -1))


def _column(layout: Layout, number: int, flat: Tensor) -> Tensor:
    """A bias, the last column of its matrices."""
    column = layout.part(flat, number)[..., -1]
    return column.view(-1)


def _vector(layout: Layout, number: int, shape: torch.Size, flat: Tensor) -> Tensor:
    return layout.vector_parts(flat)[number].view(shape)
