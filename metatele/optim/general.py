"""The general family steps any module."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from metatele.errors import ShapeMismatchError, UnsupportedModelError
from metatele.learned.general.course import Course, Glimpse, Piece, Scene
from metatele.learned.general.memory import laid_back, laid_out, read
from metatele.learned.general.optimizer import GeneralOptimizer
from metatele.network import ranks
from metatele.network.parts import parts_of
from metatele.network.reduced import Look
from metatele.network.use import is_same_batch
from metatele.network.wanted import NOTHING
from metatele.network.watch import Watch, unwrapped
from metatele.optim.equivariant import EquivariantStepper
from metatele.optim.one_batch import OneBatch
from metatele.optim.steppers import Memory, Situation, Stepper
from metatele.perceptron.losses import kind, level

COURSE = "course"  # key of the first parameter group: what belongs to no single parameter
_STILL = 1e-8  # relative change below which a network does not move
_ABOVE_FIRST, _ABOVE_LAST = math.log(1.5), math.log(3.0)  # how far a loss is above the first and the last, to go back
_PATIENCE = 50  # looks of that before it is said


class GeneralStepper(Stepper):
    """Whitened momentum with a controller's settings; on a batch that comes again, the equivariant family's step.

    Attributes:
        course: Where the network is on its way; ``None`` before the first step.
    """

    meta: GeneralOptimizer
    capture: Watch
    defaults: Mapping[str, Any] = {"momentum": 1.0, "total_steps": None, "skipped": 0}

    def __init__(self, meta: GeneralOptimizer, model: nn.Module) -> None:
        self.meta, self.model = meta, model
        self.capture = Watch(model, *parts_of(unwrapped(model)))
        self.course: Course | None = None
        self.repeating = False
        self._read = False
        self._last: Tensor | None = None  # fingerprint of the last batch
        self._still = 0
        self._safe: tuple[float, list[Tensor]] | None = None  # log of the loss at a look, and the weights there
        self._warned = False
        self._inner = self._perceptron()
        self._one_batch: OneBatch | None = None
        self._to_fit: bool | None = None  # as the first batches that came again told
        self._watch()

    def _perceptron(self) -> EquivariantStepper | None:
        """What steps on one batch, if the model is a perceptron."""
        if not self.meta.config.repeats:
            return None
        try:
            return EquivariantStepper(self.meta.repeated, self.model)
        except UnsupportedModelError:
            return None

    def attach(self, owner: Any) -> None:
        """Listen to the model for as long as ``owner`` lives."""
        self.capture.attach(owner)
        if self._inner is not None:
            self._inner.capture.attach(owner)

    def clear(self) -> None:
        """Forget what the passes showed."""
        self.capture.clear()
        if self._inner is not None:
            self._inner.capture.clear()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All of the model's, each once."""
        found: dict[int, nn.Parameter] = {}
        for part in self.capture.parts:
            found[id(part.weight)] = part.weight
            if part.bias is not None:
                found[id(part.bias)] = part.bias
        for _, p in self.capture.vectors:
            found[id(p)] = p
        return list(found.values())

    # --- a step

    def advance(self, at: Situation) -> bool:
        """Look where that is due, and step."""
        if self.repeating and self._one_batch is None and self._advance_repeated(at):
            return True
        course = self._known(at)
        live = self._gather(course, at)
        at.decay_()
        same = False
        if course.looks or self.repeating:
            same = self._compare()
        elif self.capture.wanted.fingerprint:
            self._compare()
        if course.looks:
            scene = self._scene(course, at, same)
            if not self.repeating and self._recovers(course, scene, at):
                self._watch()
                return True
            course.look(scene, course.gradient, self.meta.controller)
        change, shares = course.step(at.momentum, self._cooled(course, at))
        if self.repeating:
            self._on_one_batch(course, change, shares, live, at)
        self._apply(course, change, shares, live, at)
        self._heed(course, at)
        if same and self._to_fit is None:
            self._to_fit = self._fits()
        if same and not self.repeating and self._to_fit:
            self._repeat()
        self._watch()
        return True

    def _fits(self) -> bool:
        """Whether a batch that comes again is there to be fitted: a squared error of several outputs, say.

        What is learned of few samples that carry noise is worst learned by whoever fits them fastest.
        """
        ends, least = self.capture.outputs(), self.meta.config.repeats
        if not least or ends is None or ends[0].dim() < 2 or ends[0].shape[-1] < least or _is_random(self.model):
            return False
        outputs, gradient = (t.detach().float().reshape(-1, t.shape[-1]).mT for t in ends)
        return kind(outputs, gradient) == "squared"

    def _repeat(self) -> None:
        """From the next step on, as on a batch that comes again and again."""
        self.repeating = True
        if self._inner is None:
            self._one_batch = OneBatch(self.meta.repeated, self.capture)

    @torch.no_grad()
    def _on_one_batch(
        self, course: Course, change: Tensor, shares: Tensor, live: list[bool], at: Situation
    ) -> None:
        """Changes of the matrices by the equivariant family in place of the course's."""
        one, layout = self._one_batch, course.layout
        assert one is not None
        gradients = [layout.part(course.gradient, number) for number in range(len(self.capture.parts))]
        weights = [
            part.matrix(part.weight.detach(), None if part.bias is None else part.bias.detach()).to(course.usual)
            for part in self.capture.parts
        ]
        vectors = [
            (g, p.detach().flatten().to(g))
            for g, (_, p) in zip(layout.vector_parts(course.gradient), self.capture.vectors, strict=True)
        ]
        done = one.step(gradients, weights, vectors, at.sign)
        if done is None or not done.same:
            self.repeating, self._one_batch, self._last, self._to_fit = False, None, None, None
            return
        at.group["rolled_back"] += int(done.shortened)
        for number, D in done.changes.items():
            if live[number]:
                layout.part(change, number).copy_(D)
                shares[layout.rows(number)] = 0.0
        for moved, mine, moves in zip(done.vectors, layout.vector_parts(change), live[len(gradients) :], strict=True):
            if moves:
                mine.copy_(moved)

    def _advance_repeated(self, at: Situation) -> bool:
        """As the equivariant family steps; whether the batch was the same once more."""
        inner = self._inner
        assert inner is not None
        if not inner.capture.ended:
            self.repeating = False
            return False
        before = inner._states
        done = inner.advance(at)
        after = inner._states
        if after is not None and before is not None and before.age >= 1 and not after.same:
            self.repeating = False  # the next batch is stepped on as one of many
            if self.course is not None:
                self.course.velocity.zero_()
                self.course.change.zero_()
            inner.forget()
            self._last = self._to_fit = None
        if self.course is not None:
            self.course.age += 1
        self._watch()
        return done or True

    def _known(self, at: Situation) -> Course:
        """The memories, on the parameters' device."""
        parts, vectors = self.capture.parts, self.capture.vectors
        weight = next(self.meta.parameters())
        like = torch.empty(0, dtype=weight.dtype, device=at.parameters[0].device)
        if self.course is None and not self._read:
            self._read = True
            if at.group.get(COURSE):
                self.capture.parts, self.capture.vectors = parts, vectors = laid_back(at.group[COURSE], parts, vectors, self._named)
                self.capture.settled = True
        if self.course is None:
            pieces = [Piece(part.shape, part.kind, part.kind == "embedding") for part in parts]
            self.course = Course(self.meta.config, pieces, [p.numel() for _, p in vectors], like)
            if at.group.get(COURSE):
                stored = at.group[COURSE]
                read(self.course, stored, at.memory, parts, vectors)
                self.repeating, self._to_fit = stored["repeating"], stored["to_fit"]
                self._last = None if stored["last"] is None else like.new_tensor(stored["last"])
                # What is loaded between a pass and its step may ask for what was not kept of it.
                self._loaded = True
        return self.course

    @torch.no_grad()
    def _gather(self, course: Course, at: Situation) -> list[bool]:
        """Copy the gradients into the course's flat tensor; which parts and vectors have one."""
        layout, flat = course.layout, course.gradient
        rates = {id(p): rate for p, rate in zip(at.parameters, at.rates, strict=True)}
        targets, sources, live = [], [], []
        for number, part in enumerate(self.capture.parts):
            grad = part.weight.grad
            moves = grad is not None and rates[id(part.weight)] > 0
            live.append(moves)
            mine = layout.part(flat, number)
            if not moves:
                mine.copy_(layout.part(course.velocity, number))  # as it is, the running gradient stays
                continue
            assert grad is not None
            piece = part.of(grad).reshape(part.groups, -1, part.width)
            targets.append(mine[..., : part.inputs])
            sources.append(piece.mT if part.transposed else piece)
            if part.bias is not None:
                column = mine[..., -1]
                if part.bias.grad is not None and rates[id(part.bias)] > 0:
                    targets.append(column)
                    sources.append(part.of_bias(part.bias.grad).reshape(part.groups, -1))
                else:
                    column.zero_()
        for (_, p), mine, old in zip(
            self.capture.vectors, layout.vector_parts(flat), layout.vector_parts(course.velocity), strict=True
        ):
            moves = p.grad is not None and rates[id(p)] > 0
            live.append(moves)
            if moves:
                assert p.grad is not None
                targets.append(mine)
                sources.append(p.grad.reshape(-1))
            else:
                mine.copy_(old)
        if targets:
            torch._foreach_copy_(targets, sources)
        if at.sign < 0:
            flat.neg_()
        return live

    @torch.no_grad()
    def _apply(self, course: Course, change: Tensor, shares: Tensor, live: list[bool], at: Situation) -> None:
        """Move the parameters."""
        layout = course.layout
        rates = {id(p): rate for p, rate in zip(at.parameters, at.rates, strict=True)}
        even = len(set(at.rates)) == 1
        pieces, changes, keeps = [], [], []
        keep = (1 - shares * (at.rates[0] if even else 1.0)).unbind()
        for number, part in enumerate(self.capture.parts):
            if not live[number]:
                layout.part(change, number).zero_()
                continue
            rate = rates[id(part.weight)]
            mine = layout.part(change, number)
            if not even or rate != 1:
                mine.mul_(rate)
            first = layout.rows(number).start
            left = keep[first] if even else 1 - rate * shares[first]
            weight = part.of(part.weight).view(part.groups, -1, part.width)
            D = mine[..., : part.inputs]
            pieces.append(weight.mT if part.transposed else weight)
            changes.append(D)
            keeps.append(left)
            if part.bias is not None and rates[id(part.bias)] > 0:
                pieces.append(part.of_bias(part.bias).view(part.groups, -1))
                changes.append(mine[..., -1])
                keeps.append(left)
        torch._foreach_mul_(pieces, keeps)
        torch._foreach_add_(pieces, changes)
        offset = len(self.capture.parts)
        vectors, moves = [], []
        for k, ((_, p), mine) in enumerate(zip(self.capture.vectors, layout.vector_parts(change), strict=True)):
            if not live[offset + k]:
                mine.zero_()
                continue
            rate = rates[id(p)]
            if rate != 1:
                mine.mul_(rate)
            vectors.append(p)
            moves.append(mine.view_as(p))
        if vectors:
            torch._foreach_add_(vectors, moves)

    def _cooled(self, course: Course, at: Situation) -> float:
        """Factor on the length, where the number of steps is known."""
        total = at.group.get("total_steps")
        if not total:
            return 1.0
        left = (total - course.age) / (self.meta.config.cool * total)
        return min(1.0, max(left, 1 / total))

    # --- looks

    def _watch(self) -> None:
        """Say what the next passes are to be asked for."""
        config, course = self.meta.config, self.course
        age = 0 if course is None else course.age
        looks, next_ = course is None or course.looks, age + 1 >= config.warm and (age + 1) % config.hold == 0
        if self.repeating:
            self.capture.wanted = Look() if self._one_batch is None else self._one_batch.look()
        elif looks:
            everything = frozenset(range(len(self.capture.parts)))
            self.capture.wanted = Look(
                moments=everything,
                halves=everything,
                ends=True,
                fingerprint=True,
                samples=True,
                dtype=next(self.meta.parameters()).dtype,
                widest=config.dense,
                rank=config.rank,
            )
        else:
            self.capture.wanted = Look(fingerprint=next_)
        if self._inner is not None and not self.repeating and age >= 2:
            self._inner.capture.wanted = NOTHING

    def _compare(self) -> bool:
        """Whether the batch is the last one again."""
        found = self.capture.fingerprint()
        numbers = None if found is None else found.numbers()
        same = numbers is not None and self._last is not None and is_same_batch(numbers, self._last)
        self._last = numbers
        return same

    @torch.no_grad()
    def _scene(self, course: Course, at: Situation, same: bool) -> Scene:
        """What a look shows."""
        parts, layout, like = self.capture.parts, course.layout, course.usual
        pieces: dict[int, Glimpse] = {}
        for number, seen in self.capture.seen().items():
            if seen.columns:
                half = None if seen.half is None else at.signed(seen.half)
                pieces[number] = Glimpse(seen.inputs, half, seen.columns, seen.positions)
        for number, part in enumerate(parts):
            if number not in pieces or pieces[number].inputs is None:
                pieces[number] = self._unseen(course, number, pieces.get(number))
        sizes = like.new_zeros(layout.matrices)
        squares = torch._foreach_norm([part.of(part.weight) for part in parts]) if parts else []
        for number, (part, norm) in enumerate(zip(parts, squares, strict=True)):
            if part.groups > 1:
                table = part.of(part.weight).reshape(part.groups, -1)
                sizes[layout.rows(number)] = torch.linalg.vector_norm(table, dim=1).to(like)
            else:
                sizes[layout.rows(number)] = norm.to(like)
        vectors = [p.detach().float().square().mean().sqrt() for _, p in self.capture.vectors]
        samples = self.capture.samples_seen
        known = self._recognise(course)
        total = at.group.get("total_steps")
        return Scene(
            pieces,
            sizes,
            torch.stack(vectors).to(like) if vectors else like.new_zeros(0),
            samples * ranks.size(self.capture.group),
            known,
            self._loss(at),
            course.age / total if total else -1.0,
            same,
        )

    def _unseen(self, course: Course, number: int, glimpse: Glimpse | None) -> Glimpse:
        """A piece whose inputs are not known: by the moments of its gradient."""
        G = course.layout.part(course.gradient, number)
        columns = G.shape[1]
        if course.layout.ways[number] == "diagonal":
            inputs: Any = G.square().sum((0, 1))[None]
        else:
            from metatele.network.use import Moment

            inputs = Moment.of(G.mT, self.meta.config.dense, self.meta.config.rank)
        trace = inputs.trace.sum() if not isinstance(inputs, Tensor) else inputs.sum()
        if float(trace) > 0:
            inputs = inputs.scaled(1 / trace) if not isinstance(inputs, Tensor) else inputs / trace
        else:
            inputs = None
        if glimpse is None:
            return Glimpse(inputs, None, columns, 1.0)
        return Glimpse(inputs, glimpse.half, glimpse.columns, glimpse.positions)

    def _recognise(self, course: Course) -> tuple[int, int, int]:
        """Samples of the batch that were seen before, on all ranks."""
        hashes = self.capture.samples()
        known, compared, before = course.remember([] if hashes is None else hashes.tolist())
        if self.capture.group is not None:
            counts = torch.tensor([known, compared, before], dtype=torch.float64, device=course.usual.device)
            ranks.sum_([counts], self.capture.group)
            known, compared, before = map(int, counts.tolist())
        return known, compared, before

    def _loss(self, at: Situation) -> Tensor | None:
        """Log of the loss: of the closure, else as the outputs and their gradient tell; the same on all ranks."""
        if at.loss is not None and self.capture.group is None:
            return torch.tensor(at.loss).clamp_min(1e-30).log().to(at.parameters[0].device)
        ends = self.capture.outputs()
        if ends is None or self.capture.group is not None:
            return None
        outputs, gradient = (t.detach().float() for t in ends)
        if outputs.dim() == 0 or outputs.numel() == 1:
            return outputs.reshape(()).abs().clamp_min(1e-30).log()
        if outputs.dim() != 2:
            outputs, gradient = (t.reshape(-1, t.shape[-1]) for t in (outputs, gradient))
        return level(outputs.mT, gradient.mT).reshape(())

    # --- recovery

    @torch.no_grad()
    def _recovers(self, course: Course, scene: Scene, at: Situation) -> bool:
        """Go back to where the last looks were, with shorter steps, if the loss has left its range since."""
        if scene.loss is None or course.start_loss is None:
            return False
        loss = float(scene.loss)
        far = loss > float(course.start_loss) + _ABOVE_FIRST or not math.isfinite(loss)
        if self._safe is not None and far and not loss <= self._safe[0] + _ABOVE_LAST:
            for p, kept in zip(self.parameters, self._safe[1], strict=True):
                p.copy_(kept)
            course.recover()
            at.group["rolled_back"] += 1
            self._safe = None  # if it rises again from there, the steps were not to blame
            return True
        if not far:
            self._safe = loss, [p.detach().clone() for p in self.parameters]
        return False

    # --- warnings

    def _heed(self, course: Course, at: Situation) -> None:
        """Say once that the network does not move any more."""
        if self._warned or not course.looks or course.start_sizes is None:
            return
        moved = float(torch.linalg.vector_norm(course.change)) / float(torch.linalg.vector_norm(course.start_sizes))
        self._still = self._still + 1 if moved < _STILL * max(at.rates) else 0
        if self._still >= _PATIENCE and math.isfinite(moved):
            self._warned = True
            warnings.warn(
                "the weights hardly move any more: gradients are zero or not finite, or their loss is at its minimum",
                stacklevel=6,
            )

    # --- memories

    @property
    def _named(self) -> dict[str, nn.Parameter]:
        return dict(self.capture.root.named_parameters())

    def store(self, memory: Memory, group: dict[str, Any]) -> None:
        """See the base class."""
        if self.course is not None:
            group[COURSE] = laid_out(self.course, memory, self.capture.parts, self.capture.vectors, self._named)
            last = None if self._last is None else self._last.tolist()
            group[COURSE] |= {"repeating": self.repeating and self._one_batch is None, "to_fit": self._to_fit, "last": last}
        if self._inner is not None and self.repeating:
            self._inner.store(memory, group)

    def forget(self) -> None:
        """See the base class."""
        self.course, self._read, self._last, self.repeating = None, False, None, False
        self._one_batch, self._to_fit, self._safe = None, None, None
        if self._inner is not None:
            self._inner.forget()
        self._watch()

    def checked(self, state_dict: dict[str, Any], parameters: Mapping[Any, nn.Parameter]) -> dict[str, Any]:
        """See the base class."""
        for number, stored in state_dict["state"].items():
            momentum = stored.get("momentum")
            if number in parameters and momentum is not None and momentum.shape != parameters[number].shape:
                raise ShapeMismatchError(
                    f"the state does not belong to this model: expected momentum of shape "
                    f"{tuple(parameters[number].shape)}, got {tuple(momentum.shape)}"
                )
        return state_dict

    def __getstate__(self) -> dict[str, Any]:
        """The memories travel as the optimizer's state."""
        return {**self.__dict__, "course": None, "_read": False, "_last": None, "_safe": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._watch()


def _is_random(model: nn.Module) -> bool:
    """Whether two passes of one batch differ."""
    return any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 and m.training for m in model.modules())
