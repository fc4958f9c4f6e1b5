r"""What the passes of any module show of its parameters, taken by one hook on the module itself.

After a forward pass in which something is wanted, the graph of its outputs is walked (:mod:`.graph`) and each use of a
part reduces itself to sums in the backward pass (:mod:`.reduced`); nothing else of the activations is kept. A backward
pass counts if a gradient reached a parameter's ``grad`` in it, so evaluations, metrics, penalties on inputs and
abandoned passes are never mixed in; where none did, as with ``p.grad = torch.autograd.grad(...)``, the one that came
through the outputs does, if it is the only one. Penalties on weights that are made outside of the module are in their
gradients and not in what is seen here.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from metatele.network import ranks
from metatele.network.again import COMPILED, Again, ends_in, first_of, is_random, numbered
from metatele.network.graph import Use, tensors_in, walk
from metatele.network.heads import Head, agreed, heads_of
from metatele.network.held import Plain
from metatele.network.hook import is_ordinary, listen
from metatele.network.parts import Part, Vector, refined
from metatele.network.reduced import Look, Sums, reduced
from metatele.network.samples import fingerprint_of, sample_hashes
from metatele.network.totals import PartSeen, Total, all_seen, narrow, over_ranks
from metatele.network.unwrap import inside_of, unwrapped
from metatele.network.use import Fingerprint

NOTHING = Look()
_LIVE = 8  # passes without a gradient yet, that may still get one; and backward passes that may reach a parameter


@dataclass(eq=False)
class _Pass:
    """A forward pass, until its gradients have come.

    Attributes:
        samples: In its batch; 0 if it has no tensor among its arguments.
        scale: Number of the part whose whole gradient is kept, to compare it with ``p.grad``.
        heads: Of attention, if they were asked for.
        within: Those it is counted with.
        again: How it is made once more, if its graph is compiled.
        let_go: Its uses are seen no more.
        replaced: It is a part of another pass.
    """

    number: int
    wanted: Look
    samples: int = 0
    group: ranks.Group | None = None
    fingerprint: Fingerprint | None = None
    hashes: Tensor | None = None
    outputs: Tensor | None = None
    gradient: Tensor | None = None
    uses: list[_Live] = field(default_factory=list)
    scale: int | None = None
    heads: list[Head] = field(default_factory=list)
    within: list[_Pass] | None = None
    again: Again | None = None
    let_go: bool = False
    replaced: bool = False

    def release(self, let_go: bool = True, kept: object = ()) -> None:
        """Let go of the graph, whose nodes hold on to hooks; not if it is among ``kept``, to be made again."""
        if self.again is not None and self.within is kept:
            return
        for live in self.uses:
            live.use = None
        self.uses, self.again, self.let_go = [], None, let_go


@dataclass(eq=False)
class _Live:
    use: Use | None
    counted: bool = False  # its inputs


_Came = tuple[_Pass, "_Live | None", list[Sums], "Tensor | None"]


def _backward_number() -> int:
    """Number of the backward pass that is running, negative outside of one."""
    return int(torch._C._current_graph_task_id())


class Watch:
    """What the passes whose gradients were taken showed of a module's parameters.

    Args:
        model: Any; wrappers are looked through.
        parts: Its matrices. Where :func:`~metatele.network.parts.parts_of` knew no layer, the first pass that is walked
            may show the layout of a part, and its bias: :attr:`parts` and :attr:`vectors` change then, once.
        vectors: The rest of its parameters.
        settled: The layouts of the parts stay as they are.
        held: How the model holds its parameters; the parts and vectors have what stands for them.

    Attributes:
        wanted: What the next passes are to be asked for; :data:`NOTHING` costs one call of a hook.
        group: Of the processes that made the last pass that counts.

    Example:
        >>> from metatele.network.parts import parts_of
        >>> model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.Flatten(), nn.Linear(12, 2))
        >>> watch = Watch(model, *parts_of(model))
        >>> watch.attach(model)
        >>> watch.wanted = Look(moments=frozenset({0, 1}), halves=frozenset({0, 1}))
        >>> model(torch.ones(6, 2, 5)).sum().backward()
        >>> [(number, one.inputs.rows, one.half.shape, one.positions) for number, one in watch.seen().items()]
        [(0, 7, torch.Size([1, 4, 7]), 3.0), (1, 13, torch.Size([1, 2, 13]), 1.0)]
    """

    def __init__(
        self,
        model: nn.Module,
        parts: Sequence[Part],
        vectors: Sequence[Vector] = (),
        settled: bool = False,
        held: Plain | None = None,
    ) -> None:
        self.root, self.held = unwrapped(model), held or Plain()
        self.parts, self.vectors, self.settled = list(parts), list(vectors), settled
        self.wanted = NOTHING
        self.group: ranks.Group | None = None
        self._forget()

    def _forget(self) -> None:
        self._pending: dict[int, list[_Came]] = {}  # by backward pass
        self._counted: list[_Pass] = []
        self._totals: dict[int, Total] = {}
        self._live: list[_Pass] = []
        self._inner: list[_Pass] = []  # of the module inside, until the one around it is known to have been called
        self._into: list[_Came] | None = None  # what comes while a pass is made again
        self._partial = False  # whether a pass counts whose uses were let go
        self._number, self._called = 0, False
        self._reasons: dict[int, str] = {}
        self._shown: frozenset[int] = frozenset()  # parts that were seen at last
        self._handles: dict[int, Any] = {}
        self._group: ranks.Group | None = None

    # --- life

    def attach(self, owner: Any) -> None:
        """Listen to the module for as long as ``owner`` lives."""
        inside = inside_of(self.root)
        listen([self.root] if inside is None else [self.root, inside], self.see, owner, whole=True)
        weakref.finalize(owner, _remove, self._handles)
        if "torch._dynamo" in sys.modules:  # what was compiled before does not know of the hook
            torch.compiler.reset()

    def __getstate__(self) -> dict[str, Any]:
        """The parts travel with a copy; data and owner do not."""
        kept = ("root", "held", "parts", "vectors", "settled", "wanted")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.group = None
        self._forget()

    @property
    def _parameters(self) -> Iterable[nn.Parameter]:
        for part in self.parts:
            yield part.weight
            if part.bias is not None:
                yield part.bias
        for _, p in self.vectors:
            yield p

    def _listen(self) -> None:
        """Hear when a gradient has come into a parameter, also of one that was frozen until now."""
        for p in self._parameters:
            leaf = self.held.leaf(p)
            if leaf is not None and id(p) not in self._handles and leaf.requires_grad and leaf.is_leaf:
                self._handles[id(p)] = leaf.register_post_accumulate_grad_hook(self._count)

    # --- passes

    def see(self, level: int, given: Any, output: Any) -> None:
        """The module was called, or at level 1 the one inside of it."""
        self._called = True
        wanted = self.wanted
        if not wanted.anything:
            if self._handles:
                _remove(self._handles)
            return
        inside = _backward_number() >= 0  # recomputes what checkpointing had dropped
        self._group = self._group if inside else self.held.group()
        if not torch.is_grad_enabled():
            return
        outputs = ends_in(output)
        if not outputs:
            return
        if level == 0:
            for passed in self._inner:
                passed.replaced = True
                passed.release()
            self._inner = []
        self._listen()
        if self._counted and not inside and not self.held.graded(self._parameters):
            self._uncount()  # gradients were cleared since: by the model's zero_grad, say
        self._number += 1
        passed = _Pass(self._number, wanted, group=self._group)
        data = [t.detach() for t in tensors_in(given) if is_ordinary(t) and t.dim() and not t.is_complex()]
        passed.samples = len(data[0]) if data else 0
        with torch.no_grad(), torch.autocast(outputs[0].device.type, enabled=False):
            if wanted.fingerprint:
                passed.fingerprint = fingerprint_of(data, wanted.dtype)
            if wanted.samples and data:
                passed.hashes = sample_hashes(data[0])
        self._mark(passed, outputs)
        if level == 1:
            self._inner = [*self._inner[1 - _LIVE :], passed]
        if wanted.walks:
            if not (inside or self.held.split or is_random(self.root)) and self._is_compiled(outputs):
                passed.again = Again.of((inside_of(self.root) if level else None) or self.root, given, outputs)
            else:
                self._walk(passed, outputs)
            self._live.append(passed)
            if len(self._live) > _LIVE:
                self._live.pop(0).release(kept=self._counted)

    def _mark(self, passed: _Pass, outputs: list[Tensor]) -> None:
        """Know when a gradient comes back to the outputs, and the one at the first of them."""
        first = first_of(outputs)
        if passed.wanted.ends:
            passed.outputs = first.detach().clone()  # a loss may scale it in place
        for node, n in numbered(outputs).items():
            number = first.output_nr if node is first.grad_fn and passed.wanted.ends else None
            node.register_prehook(partial(self._came_back, passed, n, number))

    def _is_compiled(self, outputs: list[Tensor]) -> bool:
        """Whether a compiled graph hides how a parameter is used."""
        found = walk(outputs, self.parts).reasons if "torch._dynamo" in sys.modules else {}
        self._reasons = found or self._reasons
        return COMPILED in found.values()

    def _walk(self, passed: _Pass, outputs: list[Tensor]) -> None:
        found = walk(outputs, self.parts, (p for _, p in self.vectors))
        if not self.settled:
            self.settled = True
            if any(part.kind == "unseen" and id(part.weight) in found.layouts for part in self.parts):
                layouts: dict[int, list[Any]] = {key: list(value) for key, value in found.layouts.items()}
                self.parts, self.vectors = refined(self.parts, self.vectors, layouts, found.biases)
                found = walk(outputs, self.parts, (p for _, p in self.vectors))
        self._reasons = found.reasons
        smallest = min(
            (t.part for use in found.uses for t in use.targets),
            key=lambda n: self.parts[n].weight.numel(),
            default=None,
        )
        if passed.wanted.heads:
            passed.heads = heads_of(outputs, list(self.held.named(self.root).values()))
        passed.scale = smallest if passed.wanted.halves or passed.wanted.errors else None
        for use in found.uses:
            live = _Live(use)
            passed.uses.append(live)
            use.node.register_prehook(partial(self._used, passed, live))

    def complete(self) -> None:
        """Make passes that count and whose graphs were compiled once more, call by call, to see what these hide."""
        for passed in [one for one in self.ended if one.again is not None]:
            reasons, self._into = self._reasons, []
            make: Any = passed.again.make  # type: ignore[union-attr]
            if not make(list(self._parameters), passed.outputs, partial(self._walk, passed)):
                self._reasons, self._into, self._partial = reasons, [], True
            came, self._into = self._into, None
            passed.release(let_go=False)
            self._take(came)

    def _came_back(self, passed: _Pass, node: int, number: int | None, gradients: tuple[Tensor | None, ...]) -> None:
        if passed.again is not None:
            passed.again.came(node, gradients)
        gradient = None if number is None else gradients[number]
        self._note((passed, None, [], None if gradient is None else gradient.detach()))

    def _used(self, passed: _Pass, live: _Live, gradients: tuple[Tensor | None, ...]) -> None:
        """A gradient came back to a use."""
        if live.use is not None and gradients[0] is not None:
            sums = reduced(live.use, gradients[0], self.parts, passed.samples, passed.wanted, passed.scale)
            self._note((passed, live, sums, None))

    def _note(self, came: _Came) -> None:
        into = self._pending.setdefault(_backward_number(), []) if self._into is None else self._into
        into.append(came)
        if len(self._pending) > _LIVE:  # of attacks or penalties, say, that reach no parameter
            self._pending.pop(next(iter(self._pending)))

    def _count(self, _: Tensor | None = None) -> None:
        """The running backward pass reaches the parameters: what came in it counts."""
        if self._pending:
            self._take(self._pending.pop(_backward_number(), ()))

    def _take(self, came: Iterable[_Came]) -> None:
        for passed, live, sums, gradient in came:
            if passed.replaced:
                continue
            self._partial = self._partial or passed.let_go
            if passed.within is not self._counted:  # the first of perhaps several backward passes through it
                passed.within, passed.gradient = self._counted, None
                self._counted.append(passed)
                self.group = passed.group
            if gradient is not None:
                passed.gradient = gradient if passed.gradient is None else passed.gradient + gradient
            for one in sums:
                total = self._totals.setdefault(one.part, Total())
                total.add(one, passed.number, passed.samples, live is None or live.counted, passed.wanted.rank)
            if live is not None:
                live.counted = True

    def _uncount(self) -> None:
        self._counted, self._totals, self._partial = [], {}, False

    def clear(self, ahead: bool = False) -> None:
        """Forget what was seen; ``ahead`` keeps passes made before, whose gradients may still come."""
        self._uncount()
        self._pending = {}
        if not ahead:
            for passed in self._live:
                passed.release()
            self._live, self._inner, self._called = [], [], False

    # --- what was seen

    @property
    def totals(self) -> Mapping[int, Total]:
        """Sums of each part over the passes that count, on this rank."""
        return self._totals

    def heads(self) -> list[Head]:
        """Of attention, where they were asked for; those that all passes and ranks have shown."""
        return agreed([one.heads for one in self.ended], self.group, next(iter(self._parameters)))

    @property
    def ended(self) -> list[_Pass]:
        """Passes that count, in the order they were made."""
        if not self._counted and len(self._pending) == 1:  # gradients taken by autograd.grad
            self._take(self._pending.popitem()[1])
        return sorted(self._counted, key=lambda one: one.number)

    @property
    def samples_seen(self) -> int:
        """Samples in the passes that count, on this rank."""
        return sum(passed.samples for passed in self.ended)

    def why(self, number: int) -> str:
        """Why a part was not seen in the last passes that were looked at; empty if it was."""
        if number in self._shown or (self.ended and number in self._totals):
            return ""
        if not self._called and not self._reasons:
            return "the model itself has not been called: its layers are called on their own"
        if not self.parts[number].weight.requires_grad:
            return "it is frozen"
        if number in self._reasons:
            return self._reasons[number]
        return "no gradient was taken through it"

    def _reduced(self) -> dict[int, Total]:
        """Sums over all ranks."""
        if self.ended and self._partial:
            for total in self._totals.values():
                total.missing = True
        if self._counted:
            narrow(self._totals.values(), self._counted[0].wanted.rank)
        if not self._counted or self.group is None:
            return self._totals
        return over_ranks(self._totals, self.parts, self._counted[0].wanted, self.group)

    def _scale(self, totals: dict[int, Total]) -> float:
        """Factor from gradients as recorded to those of ``p.grad``, which may have been unscaled and clipped."""
        one = next((n for n, total in sorted(totals.items()) if total.whole is not None), None)
        part, recorded = (None, None) if one is None else (self.parts[one], totals[one].whole)
        if part is None or part.weight.grad is None or recorded is None:
            return 1.0
        grad = part.matrix(part.weight.grad, None if part.bias is None else part.bias.grad)
        grad, recorded = grad.to(recorded.dtype), recorded[..., : grad.shape[-1]] / ranks.size(self.group)
        squared = recorded.square().sum()
        inner, most, square = torch.stack([(recorded * grad).sum(), recorded.norm() * grad.norm(), squared]).tolist()
        # Only where the recorded passes explain the gradient: a penalty may have added its own.
        if inner > 0.99 * most > 0:
            return float(inner / square)
        return 1.0

    def scale(self) -> float:
        """Factor from gradients as recorded to those of ``p.grad``, which may have been unscaled and clipped."""
        return self._scale(self._reduced())

    def seen(self) -> dict[int, PartSeen]:
        """What each part received and got back, over all uses, passes and ranks that count, by its number."""
        totals = self._reduced()
        if totals:
            self._shown = frozenset(totals)
        share = self._scale(totals) / ranks.size(self.group)
        return all_seen(totals, share)

    def table(self) -> list[tuple[str, tuple[int, ...], str, str]]:
        """Name, shape, kind of each part and of each vector, and why it was not seen.

        Example:
            >>> from metatele.network.parts import parts_of
            >>> model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
            >>> for row in Watch(model, *parts_of(model)).table():
            ...     print(*row)
            0.weight (1, 2, 4) linear the model itself has not been called: its layers are called on their own
            1.weight (2,) vector
            1.bias (2,) vector
        """
        rows = [(part.name, part.shape, part.kind, self.why(n)) for n, part in enumerate(self.parts)]
        return [*rows, *((name, tuple(p.shape), "vector", "") for name, p in self.vectors)]

    def outputs(self) -> tuple[Tensor, Tensor] | None:
        """The first output of all passes and the gradient there, ``[n, ...]`` in the order of the passes.

        The gradient is as recorded; outputs of another size in other passes leave it at the first pass.
        """
        kept = [one for one in self.ended if one.outputs is not None and one.gradient is not None]
        pairs = [(one.outputs, one.gradient) for one in kept if one.outputs is not None and one.gradient is not None]
        if not pairs:
            return None
        if len({o.shape[1:] for o, _ in pairs}) > 1 or not pairs[0][0].dim():
            return pairs[0]
        return torch.cat([o for o, _ in pairs]), torch.cat([g for _, g in pairs])

    def fingerprint(self) -> Fingerprint | None:
        """Of the model's arguments in all passes and ranks; ``None`` if it was not asked for, or not seen."""
        found = [one.fingerprint for one in self.ended]
        total = found[0] if found else None
        for other in found[1:]:
            total = None if total is None or other is None else total.plus(other)
        if total is None or self.group is None:
            return total
        count = torch.tensor([float(total.columns)], dtype=torch.float64, device=total.sums.device)
        sums, squares = total.sums.clone(), total.squares.clone()
        ranks.sum_([sums, squares, count], self.group)
        return Fingerprint(sums, squares, int(count))

    def samples(self) -> Tensor | None:
        """A number for each sample of all passes on this rank, ``[n]`` in float64; ``None`` if not asked for."""
        return torch.cat(found) if (found := [h for one in self.ended if (h := one.hashes) is not None]) else None


def _remove(handles: dict[int, Any]) -> None:
    while handles:
        handles.popitem()[1].remove()
