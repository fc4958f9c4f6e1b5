"""The general family steps any module."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from metatele.learned.general.course import Course
from metatele.learned.general.memory import laid_back, laid_out, read
from metatele.learned.general.optimizer import GeneralOptimizer
from metatele.learned.general.scene import Piece, Scene
from metatele.network.again import is_random
from metatele.network.held import held_by
from metatele.network.parts import parts_of
from metatele.network.reduced import Look
from metatele.network.unwrap import unwrapped
from metatele.network.use import is_same_batch
from metatele.network.wanted import NOTHING
from metatele.network.watch import Watch
from metatele.optim.checked import own
from metatele.optim.described import Row, rows_of
from metatele.optim.equivariant import NETWORK, perceptrons
from metatele.optim.heads import NOTE, balanced_
from metatele.optim.messages import MANY_LOST, NOT_FINITE, STANDS
from metatele.optim.moving import Moves, Paths, real
from metatele.optim.one_batch import PREFIX, OneBatch, under
from metatele.optim.scenes import ends_of, scene_of
from metatele.optim.steppers import Memory, Situation, Stepper
from metatele.perceptron.losses import kind

COURSE = "course"  # key of the first parameter group: what belongs to no single parameter
ONE_BATCH = "one_batch"  # key there of what belongs to none while one batch comes again and again
_NOTHING, _BATCH = Look(), Look(fingerprint=True)  # what passes are asked for between looks, and before one
_STILL = 1e-8  # relative change below which a network does not move
_PATIENCE = 50  # looks of that before it is said
_LOST = 3  # steps in a row whose gradients are not finite, to go back


class GeneralStepper(Stepper):
    """Whitened momentum with a controller's settings; on a batch that comes again, the equivariant family's step.

    A gradient or closure's loss that is not finite makes no step: ``skipped`` of the first group counts those. All that
    a step depends on is saved, but the weights that a run goes back to when its loss leaves its range between two
    looks: a resumed run has none until its next look.

    Attributes:
        course: Where the network is on its way; ``None`` before the first step.
        heads: Of attention, that were balanced before the first step.
    """

    meta: GeneralOptimizer
    capture: Watch
    splits = True
    defaults: Mapping[str, Any] = {"momentum": 1.0, "total_steps": None, "skipped": 0}

    def __init__(self, meta: GeneralOptimizer, model: nn.Module) -> None:
        self.meta, self.model = meta, model
        root = unwrapped(model)
        self.held = held_by(root, "LearnedOptimizer")
        self.capture = Watch(model, *self.held.pieces(*parts_of(root)), held=self.held)
        plain = meta.config.repeats and not self.held.split
        self._inner = perceptrons(meta.repeated, model) if plain else None  # on one batch
        self._still, self._lost, self._warned = 0, 0, False
        self._owner: weakref.ref[Any] | None = None
        self._within = False  # whether the layers of a perceptron are listened to
        self._begin()
        self._watch()

    def _begin(self) -> None:
        """Remember nothing."""
        self.course: Course | None = None
        self.repeating, self.heads, self._fresh = False, 0, True
        self._one_batch: OneBatch | None = None
        self._last: Tensor | None = None  # fingerprint of the last batch
        self._to_fit: bool | None = None  # as the first batches that came again told
        self._by_gradient: set[int] = set()  # parts whose moments are of their gradients
        self._paths: Paths | None = None  # to and from its flat tensors
        self._listed: tuple[object, object, list[nn.Parameter]] | None = None
        self._safe: tuple[float, list[Tensor]] | None = None  # log of the loss at a look, and the weights there

    def attach(self, owner: Any) -> None:
        """Listen to the model for as long as ``owner`` lives."""
        self.capture.attach(owner)
        self._owner, self._within = weakref.ref(owner), False

    def _hear_layers(self) -> None:
        """Listen to a perceptron's layers too: with one batch alone, as hooks cost even where nothing is asked for."""
        owner = None if self._owner is None else self._owner()
        if self._inner is not None and owner is not None and not self._within:
            self._inner.capture.attach(owner)
            self._within = True

    def clear(self) -> None:
        """Forget what the passes showed."""
        self.capture.clear()
        if self._inner is not None and self._within:
            self._inner.capture.clear()

    def zeroed(self) -> None:
        """See the base class."""
        self.capture.clear(ahead=True)
        if self._inner is not None and self._within:
            self._inner.capture.clear()

    def ready(self) -> None:
        """See the base class."""
        self.capture.complete()

    @property
    def like(self) -> Tensor:
        """See the base class; asked for at each step."""
        return next(self.meta.controller.parameters())

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All of the model's, each once."""
        parts, vectors = self.capture.parts, self.capture.vectors
        if self._listed is None or self._listed[0] is not parts or self._listed[1] is not vectors:
            every = [p for part in parts for p in (part.weight, part.bias)] + [p for _, p in vectors]
            self._listed = parts, vectors, list({id(p): p for p in every if p is not None}.values())
        return self._listed[2]

    # --- a step

    def advance(self, at: Situation) -> bool:
        """Look where that is due, and step."""
        course = self._known(at)
        if self.repeating and self._one_batch is None:
            done = self._advance_repeated(course, at)
            if done is not None:
                return done
        if self._paths is None or not self._paths.are_of(course, self.capture.parts):
            self._paths = Paths(course, self.capture.parts, self.capture.vectors)
        moves = self._paths.gather(at, self._one_batch is not None)
        if not (course.measure() or bool(torch.isfinite(course.gradient.sum()))) or not self._is_known(at):
            return self._skip(course, at)
        self._lost = 0
        if self._fresh and self.meta.config.heads:
            self.heads = balanced_(self.capture, at, self.meta.config.heads)
            moves = self._paths.gather(at, self._one_batch is not None)
            course.measure()
        self._fresh = False
        at.decay_()
        looks = course.looks
        same = self._compare() if looks or self.capture.wanted.fingerprint else False
        if looks:
            self.refuse_replaced()
            scene = scene_of(course, self.capture, at, moves, self._by_gradient, same)
            if not self.repeating and self._recovers(course, scene, at):
                self._watch()
                return True
            course.look(scene, course.gradient, self.meta.controller)
        mover = self._paths.mover if self._one_batch is None else None
        change, shares = course.step(at.momentum, self._cooled(course, at) * self._paths.rate, mover)
        if self._one_batch is not None:
            self._on_one_batch(self._one_batch, course, change, shares, moves, at)
        if mover is None:
            self._paths.apply(shares)
        self._heed(course, at)
        if looks and same and not self.repeating:
            if self._to_fit is None:
                self._to_fit = self._fits(at)
            if self._to_fit:
                self._repeat()
        self._watch()
        return True

    def _is_known(self, at: Situation) -> bool:
        """Whether the closure's loss is finite, if there is one; under several ranks it is one of them."""
        return at.loss is None or self.capture.group is not None or math.isfinite(at.loss)

    def _skip(self, course: Course, at: Situation) -> bool:
        """Make no step; after several in a row go back, as the weights themselves may have left their range."""
        at.group["skipped"] += 1
        self._lost += 1
        if self._lost >= _LOST and self._safe is not None:
            self._go_back(course, at)
        if self._lost == MANY_LOST:
            warnings.warn(NOT_FINITE, stacklevel=9)
        self._watch()
        return False

    def _fits(self, at: Situation) -> bool:
        """Whether a batch that comes again is there to be fitted: a squared error of several outputs, say.

        What is learned of few samples that carry noise is worst learned by whoever fits them fastest.
        """
        least, ends = self.meta.config.repeats, ends_of(self.capture)
        if not least or ends is None or ends[0].shape[0] < least or is_random(self.model):
            return False
        return kind(ends[0], at.signed(ends[1])) == "squared"

    # --- one batch that comes again

    def _repeat(self) -> None:
        """From the next step on, as on a batch that comes again and again."""
        self.repeating = True
        if self._inner is None:
            self._one_batch = OneBatch(self.meta.repeated, self.capture)
        else:
            self._inner.forget()
            self._hear_layers()

    def _repeat_no_more(self, at: Situation) -> None:
        """The next batch is stepped on as one of many."""
        self.repeating, self._one_batch, self._last, self._to_fit = False, None, None, None
        at.group.pop(NETWORK, None)
        at.group.pop(ONE_BATCH, None)
        for entry in at.memory.values():
            for name in [name for name in entry if name.split(".")[0] == "one" or ".one." in name]:
                del entry[name]
        if self._inner is not None:
            self._inner.forget()

    @torch.no_grad()
    def _on_one_batch(
        self, one: OneBatch, course: Course, change: Tensor, shares: Tensor, moves: Moves, at: Situation
    ) -> None:
        """Changes of the matrices by the equivariant family in place of the course's."""
        layout, parts = course.layout, self.capture.parts
        gradients = [layout.part(course.gradient, number) for number in range(len(parts))]
        weights = [
            part.matrix(part.weight.detach(), None if part.bias is None else part.bias.detach()).to(course.usual)
            for part in parts
        ]
        vectors = [
            (g, real(p.detach()).flatten().to(g))
            for g, (_, p) in zip(layout.vector_parts(course.gradient), self.capture.vectors, strict=True)
        ]
        done = one.step(gradients, weights, vectors, at.sign)
        if done is None or not done.same:
            self._repeat_no_more(at)
            return
        at.group["rolled_back"] += int(done.shortened)
        for number, D in done.changes.items():
            layout.part(change, number).copy_(D)
            shares[layout.rows(number)] = 0.0
        for moved, mine in zip(done.vectors, layout.vector_parts(change), strict=True):
            mine.copy_(moved)

    def _advance_repeated(self, course: Course, at: Situation) -> bool | None:
        """As the equivariant family steps; ``None`` if it cannot."""
        inner = self._inner
        assert inner is not None
        if not inner.capture.ended:
            self._repeat_no_more(at)
            return None
        total = torch.stack(torch._foreach_norm([p.grad for p in self.parameters if p.grad is not None])).sum()
        if not (self._is_known(at) and bool(torch.isfinite(total))):
            return self._skip(course, at)
        self._lost = 0
        own = replace(at, memory=under(at.memory))
        before = inner._known(own)
        done = inner.advance(own)
        after = inner._states
        if after is not None and before is not None and before.age >= 1 and not after.same:
            course.velocity.zero_()
            course.change.zero_()
            self._repeat_no_more(at)
        course.age += 1
        self._watch()
        return done

    def _known(self, at: Situation) -> Course:
        """The memories, on the parameters' device."""
        device = at.parameters[0].device
        if self.course is not None and self.course.usual.device != device:
            self.store(at.memory, at.group)
            self.loaded(at.memory, at.group)
        if self.course is None:
            self.course = self._new_course(device)
        return self.course

    def _new_course(self, device: torch.device) -> Course:
        like = torch.empty(0, dtype=next(self.meta.parameters()).dtype, device=device)
        pieces = [Piece(part.shape, part.kind, part.kind == "embedding") for part in self.capture.parts]
        return Course(self.meta.config, pieces, [real(p).numel() for _, p in self.capture.vectors], like)

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
        if self.repeating:
            wanted = _NOTHING if self._one_batch is None else self._one_batch.look()
        elif course is None or course.looks:
            everything = frozenset(range(len(self.capture.parts)))
            wanted = Look(
                moments=everything,
                halves=everything,
                heads=self._fresh and self.meta.config.heads > 0,
                ends=True,
                fingerprint=True,
                samples=True,
                dtype=next(self.meta.parameters()).dtype,
                widest=config.dense,
                rank=config.rank,
            )
        else:
            next_ = course is not None and age + 1 >= config.warm and course.looks_at(age + 1)
            wanted = _BATCH if next_ else _NOTHING
        self.capture.wanted = wanted
        if self._inner is not None and not self.repeating:
            self._inner.capture.wanted = NOTHING

    def _compare(self) -> bool:
        """Whether the batch is the last one again."""
        found = self.capture.fingerprint()
        numbers = None if found is None else found.numbers().cpu()
        same = numbers is not None and self._last is not None and is_same_batch(numbers, self._last)
        self._last = numbers
        return same

    # --- recovery

    @torch.no_grad()
    def _recovers(self, course: Course, scene: Scene, at: Situation) -> bool:
        """Go back to where the last looks were, with shorter steps, if the loss has left its range since."""
        if scene.loss is None or course.start_loss is None:
            return False
        loss, config = float(scene.loss), self.meta.config
        far = loss > float(course.start_loss) + math.log(config.above_first) or not math.isfinite(loss)
        if self._safe is not None and far and not loss <= self._safe[0] + math.log(config.above_last):
            self._go_back(course, at)
            return True
        if not far:
            self._safe = loss, [p.detach().clone() for p in self.parameters]
        return False

    @torch.no_grad()
    def _go_back(self, course: Course, at: Situation) -> None:
        assert self._safe is not None
        for p, kept, rate in zip(at.parameters, self._safe[1], at.rates, strict=True):
            if rate:
                p.copy_(kept)
        course.recover()
        at.group["rolled_back"] += 1
        self._safe = None  # if it rises again from there, the steps were not to blame

    def _heed(self, course: Course, at: Situation) -> None:
        """Say once that the network does not move any more."""
        if self._warned or not course.looks or course.start_sizes is None:
            return
        moved, start = torch.stack(torch._foreach_norm([course.change, course.start_sizes])).tolist()
        self._still = self._still + 1 if moved < _STILL * start * max(at.rates) else 0
        if self._still >= _PATIENCE and math.isfinite(moved):
            self._warned = True
            warnings.warn(STANDS, stacklevel=9)

    # --- memories

    @property
    def _named(self) -> dict[str, nn.Parameter]:
        return self.held.named(self.capture.root)

    def store(self, memory: Memory, group: dict[str, Any]) -> None:
        """See the base class."""
        course = self.course
        if course is None:
            return
        parts, vectors = self.capture.parts, self.capture.vectors
        group[COURSE] = laid_out(course, memory, parts, vectors, self._named) | {
            "heads": self.heads,
            "repeating": self.repeating,
            "to_fit": self._to_fit,
            "last": None if self._last is None else self._last.tolist(),
            "by_gradient": sorted(self._by_gradient),
        }
        if self._one_batch is not None:
            group[ONE_BATCH] = self._one_batch.laid_out(memory)
        elif self._inner is not None and self.repeating:
            homes: dict[Any, dict[str, Any]] = {p: {} for p in memory}
            self._inner._stored = False
            self._inner.store(homes, group)
            for p, entry in homes.items():
                memory[p].update({PREFIX + name: value for name, value in entry.items()})

    def loaded(self, memory: Memory, group: Mapping[str, Any]) -> None:
        """See the base class."""
        self._begin()
        stored = group.get(COURSE)
        if stored:
            self.capture.parts, self.capture.vectors = laid_back(stored, self.capture.parts, self._named)
            self.capture.settled = True
            self.course = self._new_course(self.parameters[0].device)
            self.heads, self._fresh = stored.get("heads", 0), not stored["age"]
            read(self.course, stored, memory, self.capture.parts, self.capture.vectors, self._named)
            self.repeating, self._to_fit = stored["repeating"], stored["to_fit"]
            self._last = None if stored["last"] is None else torch.tensor(stored["last"], dtype=self.course.usual.dtype)
            self._by_gradient = set(stored["by_gradient"])
            if group.get(ONE_BATCH):
                self._one_batch = OneBatch(self.meta.repeated, self.capture)
                self._one_batch.read(group[ONE_BATCH], memory)
        if self._inner is not None:
            self._inner.forget()
            if self.repeating and self._one_batch is None:
                self._hear_layers()
        self._watch()

    def checked(self, state_dict: dict[str, Any], parameters: Mapping[Any, nn.Parameter]) -> dict[str, Any]:
        """See the base class."""
        return own(state_dict, parameters, COURSE, len(self.capture.parts))

    def __getstate__(self) -> dict[str, Any]:
        """The memories travel as the optimizer's state."""
        gone = {"course", "repeating", "_one_batch", "_last", "_to_fit", "_by_gradient", "_safe", "_paths", "_listed"}
        gone |= {"heads", "_fresh", "_owner", "_within"}
        return {name: value for name, value in self.__dict__.items() if name not in gone}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._owner, self._within = None, False
        self._begin()

    # --- what is told

    @property
    def note(self) -> str:
        """See the base class."""
        return NOTE.format(self.heads) if self.heads else ""

    def rows(self) -> list[Row]:
        """See the base class."""
        layers = () if self._one_batch is None else self._one_batch.layers
        once = [self.repeating and (self._inner is not None or n in layers) for n in range(len(self.capture.parts))]
        moments = None if self.course is None else [m is not None for m in self.course.moments]
        return rows_of(self.capture, moments, self._by_gradient, once)
