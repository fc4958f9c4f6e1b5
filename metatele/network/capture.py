r"""What the passes of a module show of its layers, taken by hooks and reduced where it is seen.

A **use** of a layer is one forward call of it whose output a gradient comes back to. The layer's input ``h`` and that
gradient ``δ`` are reduced to second moments in the backward pass; of a whole pass the first layer's data and the last
layer's outputs and gradient may be kept. What is taken is set before the pass (:class:`Wanted`): a hook asks nobody.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from metatele.network import ranks
from metatele.network.bias import with_ones
from metatele.network.hook import listen
from metatele.network.use import Fingerprint, Moment, Use
from metatele.network.wanted import NOTHING, Wanted

_PENDING = 8  # backward passes that have not reached a parameter, and may yet


@dataclass
class _Pass:
    """A pass through the network: what is kept of its two ends.

    Attributes:
        number: In the order of forward passes.
        data: The first layer's inputs; a copy once a gradient came back.
        fingerprint: Of the data.
        outputs: The last layer's.
        gradient: What came back to them; of several backward passes their sum.
        product: ``Σ δhᵀ`` of the last layer.
        group: Of the ``DistributedDataParallel`` that made it.
    """

    number: int
    data: Tensor | None = None
    fingerprint: Fingerprint | None = None
    outputs: Tensor | None = None
    gradient: Tensor | None = None
    product: Tensor | None = None
    group: ranks.Group | None = None
    reduced: bool = False  # the data


@dataclass
class _Use:
    """One forward call of a layer."""

    layer: int
    wanted: Wanted
    inputs: Tensor | None
    square: Tensor | None = None
    of: _Pass | None = None  # of the last layer alone
    columns: int = 0
    moment: Moment | None = None
    errors: list[Moment] = field(default_factory=list)
    within: list[_Use] | None = None  # those it is counted with


_Came = tuple[_Use, Tensor, Moment | None, Tensor | None]  # a use, its gradient, and what that was reduced to


def _backward_number() -> int:
    """Number of the backward pass that is running, negative outside of one."""
    return int(torch._C._current_graph_task_id())


class Capture:
    """What the passes whose gradients were taken showed of some layers of a network.

    A backward pass counts if a gradient reached a parameter's ``grad`` in it, so evaluations, metrics, penalties on
    inputs and abandoned passes are never mixed in; where none did, as with ``p.grad = torch.autograd.grad(...)``, the
    one that came through the last layer does, if it is the only one. Passes count until :meth:`clear`.

    Args:
        linears: The layers, in the order of a pass; a Linear on inputs ``[..., d]`` with any leading dimensions.
        accumulated: Gradients come into ``p.grad``; without, those of ``autograd.grad`` count.

    Attributes:
        wanted: What the next passes are to be asked for; :data:`NOTHING` costs nothing.
        group: Of the ``DistributedDataParallel`` that made the last pass that counts.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        >>> capture = Capture([model[0], model[2]])
        >>> capture.attach(model)
        >>> capture.wanted = Wanted(ends=True, moments=frozenset({0, 1}), squares=True)
        >>> model(torch.ones(5, 6, 3)).sum().backward()  # five sequences of six positions: thirty columns
        >>> [(use.inputs.rows, use.errors.rows, use.columns) for use in capture.uses()]
        [(4, 4, 30), (5, 2, 30)]
    """

    def __init__(self, linears: Sequence[nn.Linear], accumulated: bool = True) -> None:
        self.linears, self.accumulated = list(linears), accumulated
        self.wanted = NOTHING
        self.group: ranks.Group | None = None
        self._forget()

    def _forget(self) -> None:
        self._pending: dict[int, list[_Came]] = {}  # by backward pass
        self._counted: list[_Use] = []
        self._current: dict[int, _Pass] = {}  # by thread: DataParallel has one for each device
        self._number = 0
        self._called = False
        self._heard: set[int] = set()

    # --- life

    def attach(self, owner: Any) -> None:
        """Listen to the layers for as long as ``owner`` lives."""
        listen(self.linears, self.see, owner)
        self._owner = weakref.ref(owner)
        self._heard = set()
        self._listen()
        if "torch._dynamo" in sys.modules:  # what was compiled before does not know of the hooks
            torch.compiler.reset()

    def _listen(self) -> None:
        """Hear when a gradient has come into a parameter, also of one that was frozen until now."""
        owner = self._owner()
        if not self.accumulated or owner is None:
            return
        for linear in self.linears:
            for p in linear._parameters.values():
                if p is not None and p.requires_grad and id(p) not in self._heard:
                    self._heard.add(id(p))
                    weakref.finalize(owner, p.register_post_accumulate_grad_hook(self._count).remove)

    def __getstate__(self) -> dict[str, Any]:
        """The layers travel with a copy; data and owner do not."""
        return {"linears": self.linears, "accumulated": self.accumulated, "wanted": self.wanted}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.group = None
        self._forget()

    # --- passes

    def see(self, layer: int, given: Any, output: Tensor) -> None:
        """A layer was called."""
        self._called = True
        wanted = self.wanted
        if not wanted.anything or not isinstance(given, Tensor):
            return
        first, last, whole = layer == 0, layer == len(self.linears) - 1, layer in wanted.moments
        if not (first or last or whole or wanted.squares):
            return
        inside = _backward_number() >= 0  # recomputes what checkpointing had dropped
        if first and not inside:
            self._listen()
            if self._counted and not any(
                p is not None and p.is_leaf and p.grad is not None and bool(p.grad.any())
                for linear in self.linears
                for p in linear._parameters.values()
            ):
                self._counted = []  # gradients were cleared since: by the model's zero_grad, say
            # Also without gradients: reentrant checkpointing makes its passes like that.
            self._number += 1
            data = given.detach() if wanted.data or wanted.fingerprint else None
            self._current[threading.get_ident()] = _Pass(self._number, data, group=ranks.active_group())
        if not torch.is_grad_enabled():
            return
        passed = self._current.get(threading.get_ident()) if last else None
        if last and passed is None:  # the last layer was called on its own
            self._number += 1
            passed = _Pass(self._number)
        if not output.requires_grad or not (whole or last or wanted.squares):
            return
        use = _Use(layer, wanted, given.detach() if whole or (last and wanted.product) else None, of=passed)
        if wanted.squares:  # at once: an activation may work in place
            use.square = output.detach().square().mean()
        use.columns = output.numel() // max(1, output.shape[-1])
        if passed is not None:
            passed.outputs = output.detach().clone() if wanted.ends else None  # a loss may scale it in place
            if passed.data is not None and not self._first_moves:
                passed.data = passed.data.clone()  # nothing else holds on to it, and a loop may use its buffer again
        # Of an output with several leading dimensions, a view, a later in-place activation would drop the hook.
        whole_of = output._base if output._is_view() else None
        target = output if whole_of is None or whole_of.numel() != output.numel() else whole_of
        target.register_hook(partial(self._came, use))

    @property
    def _first_moves(self) -> bool:
        """Whether the first layer keeps its inputs for its own gradient, so that they stay as they are until then."""
        return any(p is not None and p.requires_grad for p in self.linears[0]._parameters.values())

    def _came(self, use: _Use, gradient: Tensor) -> None:
        """A gradient came back to the output of a use."""
        wanted, passed = use.wanted, use.of
        reduced: tuple[Moment | None, Tensor | None] = (None, None)
        if use.layer in wanted.moments or (passed is not None and (wanted.product or passed.data is not None)):
            reduced = self._reduced(use, gradient)
        self._pending.setdefault(_backward_number(), []).append((use, gradient.detach(), *reduced))
        if len(self._pending) > _PENDING:  # of attacks or penalties, say, that reach no parameter
            self._pending.pop(next(iter(self._pending)))
        if not self.accumulated:
            self._count()

    @torch.no_grad()
    def _reduced(self, use: _Use, gradient: Tensor) -> tuple[Moment | None, Tensor | None]:
        """Everything that is not asked for whole is reduced now; the errors' second moment, and ``Σ δhᵀ``."""
        errors, product, wanted, passed = None, None, use.wanted, use.of
        with torch.autocast(gradient.device.type, enabled=False):
            if use.layer in wanted.moments and gradient.numel():
                if use.moment is None and use.inputs is not None:
                    h = _columns(use.inputs, wanted.dtype)
                    h = h if self.linears[use.layer].bias is None else with_ones(h)
                    use.moment = Moment.of(h, wanted.widest, wanted.rank)
                errors = Moment.of(_columns(gradient.detach(), wanted.dtype), wanted.widest, wanted.rank)
            if passed is not None and wanted.product and use.inputs is not None:
                product = _rows(gradient.detach()).to(wanted.dtype).T @ _rows(use.inputs).to(wanted.dtype)
            else:
                use.inputs = None
            if passed is not None and passed.data is not None and not passed.reduced:
                passed.reduced = True
                if wanted.fingerprint:
                    passed.fingerprint = Fingerprint.of(_columns(passed.data, wanted.dtype)[None])
                passed.data = passed.data.clone() if wanted.data else None
        return errors, product

    def _count(self, _: Tensor | None = None) -> None:
        """The running backward pass reaches the parameters: its uses count."""
        self._take(self._pending.pop(_backward_number(), ()))

    def _take(self, came: Iterable[_Came]) -> None:
        for use, gradient, errors, product in came:
            passed = use.of
            if use.within is not self._counted:  # the first of perhaps several backward passes through it
                use.within, use.errors = self._counted, []
                self._counted.append(use)
                if passed is not None:
                    passed.gradient = passed.product = None
            if errors is not None:
                use.errors.append(errors)
            if passed is not None:
                self.group = passed.group
                passed.gradient = gradient if passed.gradient is None else passed.gradient + gradient
                if product is not None:
                    passed.product = product if passed.product is None else passed.product + product

    def clear(self) -> None:
        """Forget what was seen."""
        self._counted, self._pending, self._current, self._called = [], {}, {}, False

    # --- what was seen

    @property
    def ended(self) -> list[_Pass]:
        """Passes that count, in the order they were made, without empty ones."""
        if not self._counted and self._pending:  # gradients taken by autograd.grad
            last = len(self.linears) - 1
            through = [came for came in self._pending.values() if any(use.layer == last for use, *_ in came)]
            if len(through) == 1:  # of several, who knows which one the gradients are of
                self._take(through[0])
                self._pending = {}
        found = [use.of for use in self._counted if use.of is not None and use.columns]
        return sorted(found, key=lambda one: one.number)

    @property
    def seen(self) -> bool:
        """Whether any pass counts, an empty one too."""
        return bool(self.ended) or any(use.of is not None for use in self._counted)

    def shows(self, moments: frozenset[int], fingerprint: bool, squares: bool) -> bool:
        """Whether the passes that count were asked for as much."""
        asked = [use.wanted for use in self._counted]
        return all(moments <= w.moments and fingerprint <= w.fingerprint and squares <= w.squares for w in asked)

    def why_nothing(self) -> str:
        """Why no pass counts, for a message."""
        if self.seen:
            return "the batch was empty"
        if not self._called:
            return (
                "no layer of the model has been called since the last step or zero_grad: its weights are used "
                "elsewhere, in F.linear, functional_call or an exported graph, say"
            )
        if len(self._pending) > 1:
            return (
                "gradients were taken by several calls of torch.autograd.grad since the last step or zero_grad: use "
                "backward(), or zero_grad() before the call whose gradients are to be stepped on"
            )
        if self._pending:
            return "the loss reached no output of the last layer, as one of derivatives alone does not"
        return "no gradient was taken through a forward pass of the model since the last step or zero_grad"

    def uses(self) -> list[Use]:
        """What each layer received and got back, over all uses that count and all ranks.

        A layer whose moments were not asked for, or that was not used, has none; errors of one that no gradient
        reached are none either. Several backward passes through one forward pass add their second moments.
        """
        uses = [self._use(layer) for layer in range(len(self.linears))]
        if self.group is None:
            return uses
        return _over_ranks(uses, self.wanted.rank, self.linears[0].weight.device, self.group)

    def _use(self, layer: int) -> Use:
        """Sums over the uses of one layer, normalised."""
        mine = [use for use in self._counted if use.layer == layer and use.columns]
        columns = sum(use.columns for use in mine)
        inputs = _sum((use.moment for use in mine if use.moment is not None), self.wanted.rank)
        errors = _sum((e for use in mine for e in use.errors), self.wanted.rank)
        if self.group is not None and inputs is None and layer in self.wanted.moments:  # an empty share of a batch
            linear = self.linears[layer]
            rows, empty = (
                linear.in_features + (linear.bias is not None),
                linear.weight.new_empty(0, dtype=self.wanted.dtype),
            )
            inputs, errors = (Moment.zero(k, empty, self.wanted.widest) for k in (rows, linear.out_features))
        squares = [(use.square.to(use.wanted.dtype), use.columns) for use in mine if use.square is not None]
        square = None
        if not squares and self.group is not None and self.wanted.squares:
            square = self.linears[layer].weight.new_zeros((), dtype=self.wanted.dtype)
        if squares:
            square = squares[0][0] if len(squares) == 1 else sum_of([s * (n / columns) for s, n in squares])
        return Use(None if inputs is None else inputs.over(max(1, columns)), errors, square, columns)

    def fingerprint(self) -> Fingerprint | None:
        """Of the first layer's inputs in all passes and ranks; ``None`` if it was not asked for."""
        found = [one.fingerprint for one in self.ended]
        if not found and self.group is not None and self.wanted.fingerprint:  # an empty share of a batch
            none = self.linears[0].weight.new_zeros(2, dtype=self.wanted.dtype)
            found = [Fingerprint(none, none, 0)]
        if not found or any(f is None for f in found):
            return None
        total = found[0]
        assert total is not None
        for other in found[1:]:
            assert other is not None
            total = total.plus(other)
        if self.group is None:
            return total
        count = torch.tensor([float(total.columns)], dtype=torch.float64, device=total.sums.device)
        sums, squares = total.sums.clone(), total.squares.clone()
        ranks.sum_([sums, squares, count], self.group)
        return Fingerprint(sums, squares, int(count))

    def inputs(self, dtype: torch.dtype) -> Tensor | None:
        """The first layer's inputs in all passes and ranks, one column per sample ``[d, n]``."""
        kept = [one for one in self.ended if one.data is not None]
        return self._gathered(kept, dtype, (lambda one: one.data, self.linears[0].in_features))

    def ends(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """Outputs ``[o, n]`` of the last layer and the gradient there, of all passes and ranks.

        The gradient is as recorded: one that was clipped since would tell of another loss.
        """
        kept = [one for one in self.ended if one.outputs is not None and one.gradient is not None]
        if kept and self.group is None:
            outputs, gradient = _joined(one.outputs for one in kept), _joined(one.gradient for one in kept)
            return _columns(outputs, dtype), _columns(gradient, dtype)
        width = self.linears[-1].out_features
        both = self._gathered(kept, dtype, (lambda one: one.outputs, width), (lambda one: one.gradient, width))
        return None if both is None else (both[:width], both[width:] / ranks.size(self.group))

    def columns(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """Inputs ``[d, n]`` of the first layer and gradients ``[o, n]`` at the last one's outputs, column by column.

        The gradients are scaled to what the optimizer sees, ``p.grad`` of the last layer: a ``GradScaler``
        has unscaled it, and clipping may have shortened it.
        """
        kept = [p for p in self.ended if p.data is not None and p.gradient is not None]
        kept = [p for p in kept if len(_rows(p.data)) == len(_rows(p.gradient))]
        first, last = self.linears[0].in_features, self.linears[-1].out_features
        scale = self._scale([p.product for p in kept if p.product is not None])
        both = self._gathered(kept, dtype, (lambda one: one.data, first), (lambda one: one.gradient, last))
        return None if both is None else (both[:first], both[first:] * (scale / ranks.size(self.group)))

    def _gathered(
        self, kept: list[_Pass], dtype: torch.dtype, *parts: tuple[Callable[[_Pass], Tensor | None], int]
    ) -> Tensor | None:
        """Some parts of passes, below each other, with a column for each sample of all ranks."""
        if kept:
            mine = torch.cat([_columns(_joined(part(one) for one in kept), dtype) for part, _ in parts])
        elif self.group is None:
            return None
        else:  # the others wait for a rank without samples, too
            mine = self.linears[0].weight.new_zeros(sum(width for _, width in parts), 0, dtype=dtype)
        columns = ranks.gathered(mine, self.group)
        return columns if columns.shape[-1] else None

    def _scale(self, products: list[Tensor]) -> Tensor | float:
        """Factor from output gradients as recorded to those of ``p.grad``."""
        if not self.wanted.product or self.linears[-1].weight.grad is None:
            return 1.0
        seen = self.linears[-1].weight.grad.to(self.wanted.dtype)
        recorded = sum_of(products) if products else torch.zeros_like(seen)
        recorded = recorded / ranks.size(self.group)
        ranks.sum_([recorded], self.group)
        product = (recorded * seen).sum()
        # Only where the recorded passes explain the gradient: a penalty may have added its own.
        if float(product) > 0.99 * float(recorded.norm() * seen.norm()) > 0:
            return product / recorded.square().sum()
        return 1.0


def _over_ranks(uses: list[Use], rank: int, device: torch.device, group: ranks.Group) -> list[Use]:
    """The same sums over all ranks, which have the same uses of the same layers."""
    counts = torch.tensor([float(u.columns) for u in uses], dtype=torch.float64, device=device)
    ranks.sum_([counts], group)
    totals = [int(c) for c in counts.tolist()]
    shares = [u.columns / max(1, n) for u, n in zip(uses, totals, strict=True)]
    inputs = [None if u.inputs is None else u.inputs.scaled(s) for u, s in zip(uses, shares, strict=True)]
    inputs, errors = ranks.moments(inputs, rank, group), ranks.moments([u.errors for u in uses], rank, group)
    squares = [None if u.square is None else u.square * s for u, s in zip(uses, shares, strict=True)]
    ranks.sum_([s for s in squares if s is not None], group)
    return [Use(i, e, s, n) for i, e, s, n in zip(inputs, errors, squares, totals, strict=True)]


def sum_of(tensors: list[Tensor]) -> Tensor:
    """Sum of tensors of one shape."""
    return torch.stack(tensors).sum(0) if len(tensors) > 1 else tensors[0]


def _sum(moments: Iterable[Moment], rank: int) -> Moment | None:
    total = None
    for moment in moments:
        total = moment if total is None else total.plus(moment, rank)
    return total


def _rows(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.reshape(-1, tensor.shape[-1])


def _columns(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor ``[..., d]`` as columns ``[d, n]``."""
    return _rows(tensor).to(dtype).T


def _joined(tensors: Iterable[Tensor | None]) -> Tensor:
    rows = [_rows(t) for t in tensors]
    return torch.cat(rows) if len(rows) > 1 else rows[0]
