"""Where a network is on its way: what is remembered of it, and how it is stepped; see :mod:`.optimizer`."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from metatele.config import GeneralConfig
from metatele.learned.general.agreeing import agreed, half_products
from metatele.learned.general.controller import Controller, Controls, Sight
from metatele.learned.general.direction import lengths_of, norms
from metatele.learned.general.kept import Kept, Together, grouped
from metatele.learned.general.layout import Layout
from metatele.learned.general.places import places_of
from metatele.learned.general.replays import Replays, replays_for, shapes
from metatele.learned.general.roots import roots_of
from metatele.learned.general.scene import Piece, Scene
from metatele.learned.general.slopes import averaged, slope
from metatele.network.stacks import all_mixed, magnitudes
from metatele.network.use import TINY, Moment


class _Measured(NamedTuple):
    """Of a gradient.

    Attributes:
        finite: Whether all of it is, squared too.
        most: Largest of the sizes beside what is usual.
        slope: Along the last change.
    """

    finite: bool
    most: float
    slope: float


class Course:
    """A network's memories, and its steps.

    Args:
        config: Settings.
        pieces: Its matrices.
        sizes: Of its vectors.
        like: Of the dtype and on the device of all memories.

    Attributes:
        age: Steps done.
        layout: Where all lies in the flat tensors.
        velocity: Running gradient, flat.
        change: The last change of the weights, flat.
        moments: Of each part's inputs.
        log_rate: ``log η``. It and other numbers of the whole network live on the host, where they cost nothing.
    """

    def __init__(self, config: GeneralConfig, pieces: Sequence[Piece], sizes: Sequence[int], like: Tensor) -> None:
        self.config, self.pieces = config, list(pieces)
        ways = ["diagonal" if p.diagonal else "dense" if p.shape[2] <= config.dense else "factor" for p in pieces]
        self.layout = Layout([p.shape for p in pieces], ways, sizes)
        new = like.new_zeros
        layout = self.layout
        self.age = 0
        self.velocity, self.change, self.gradient = new(layout.size), new(layout.size), new(layout.size)
        self.usual = new(layout.matrices)  # running squared norm of gradients
        self.seconds = new(sum(sizes))
        self.moments: list[Moment | Tensor | None] = [None] * len(pieces)
        self.taken = [0] * len(pieces)  # batches in each
        self.kept = [Kept() for _ in layout.buckets]
        self.log_rate = math.log(config.start)
        self.slopes, self.slopes_long = (0.0, 0.0), (0.0, 0.0)  # averages of q and q²
        self.agreement = new(layout.matrices)
        self.agreement_all = new(())
        self.positions = torch.ones_like(self.usual)
        self.columns = [0] * len(pieces)
        self.sizes: Tensor | None = None  # of the matrices, at the last look
        self.start_sizes: Tensor | None = None
        self.start_loss: Tensor | None = None
        self.controls: Controls | None = None
        self.pace = (1.0, 0.0, 0.0)  # the controls that are one for all: longest, target, gain
        self.calm = new(()) + 1  # mean over matrices
        self.lengths = new(layout.matrices)  # of a step with η = 1
        self.vector_length = 0.0
        self.decays, self.anneal = new(layout.matrices), new(layout.matrices)
        self.spread = new(sum(sizes))  # the same of each number of the vectors
        self.owner = torch.repeat_interleave(
            torch.arange(len(sizes), device=like.device),
            torch.tensor(list(sizes), device=like.device, dtype=torch.long),
        )
        self.measured: _Measured | None = None
        self.replays = replays_for(like, layout.size)
        self._sizes, self._now = new(layout.matrices), new(layout.matrices)  # where each step finds them
        self._numbers = new(4)
        self._held: tuple[list[Tensor], Hashable] | None = None  # what a step reads that looks replace
        self._together: list[Together] = []
        self._alone: list[int] = []
        self._now_at = -1  # age of the root mean squares of gradients
        self._views = [(b.of(self.gradient), b.of(self.velocity), b.of(self.change)) for b in layout.buckets]
        self.hashes: set[float] = set()
        self.epochs = 0.0
        self._places = places_of(layout, self.pieces, self.usual)

    @property
    def looks(self) -> bool:
        """Whether the next step is a look."""
        return self.looks_at(self.age)

    def looks_at(self, age: int) -> bool:
        """Whether a step is a look, which become rarer: what changes slowly is looked at less often."""
        c = self.config
        return age < c.warm or age % (c.hold * min(max(age // c.settle, 1), c.rarest)) == 0

    # --- a look

    def remember(self, hashes: Sequence[float]) -> tuple[int, int, int]:
        """Take in a batch's samples; how many were known, of how many, and how many are remembered."""
        known = sum(h in self.hashes for h in hashes) if self.hashes else 0
        room = self.config.remembered - len(self.hashes)
        before = len(self.hashes)
        if room > 0:
            self.hashes.update(hashes[:room])
        return known, len(hashes), before

    def look(self, scene: Scene, gradients: Tensor, controller: Controller) -> None:
        """Take in what a look shows, and set the controls.

        Args:
            scene: What it shows.
            gradients: Flat.
            controller: What sets them.
        """
        self._take_in(scene)
        self._agree(scene, gradients)
        if self.start_sizes is None:
            self.start_sizes = scene.sizes.clamp_min(TINY)
        if scene.loss is not None and self.start_loss is None and bool(torch.isfinite(scene.loss)):
            self.start_loss = scene.loss
        controls = controller(self._sight(scene))
        self._set(controls, scene)

    def _take_in(self, scene: Scene) -> None:
        c, seen = self.config, []
        positions = [0.0] * self.layout.matrices
        for number, glimpse in scene.pieces.items():
            rows, new = self.layout.rows(number), glimpse.inputs
            positions[rows] = [max(glimpse.positions, 1.0)] * (rows.stop - rows.start)
            self.columns[number] = glimpse.columns
            if new is not None:
                seen.append((number, new))
        known = self.positions.new_tensor(positions)
        self.positions = torch.where(known > 0, known, self.positions)
        sizes = magnitudes([new for _, new in seen])
        mixed: list[tuple[int, Moment, Moment, float]] = []
        for (number, new), size in zip(seen, sizes, strict=True):
            if not math.isfinite(size):
                continue
            old = self.moments[number]
            self.taken[number] += 1
            share = max(1 - c.averaging, 1 / self.taken[number])
            if old is None:
                self.moments[number] = new
            elif isinstance(old, Moment) and isinstance(new, Moment):
                mixed.append((number, old, new, share))
            elif isinstance(old, Tensor) and isinstance(new, Tensor):
                self.moments[number] = old.lerp(new, share)
        if mixed:
            numbers, olds, news, shares = zip(*mixed, strict=True)
            for number, moment in zip(numbers, all_mixed(olds, news, shares, c.rank), strict=True):
                self.moments[number] = moment

    def _agree(self, scene: Scene, gradients: Tensor) -> None:
        """How far the gradients of the two halves of the batch agree, in whitened coordinates."""
        halves = {n: piece.half for n, piece in scene.pieces.items() if piece.half is not None}
        roots = [kept.root for kept in self.kept]
        products = half_products(self.layout, roots, gradients, halves)
        share = self.config.agreeing if self.age else 1.0
        self.agreement, self.agreement_all = agreed(products, self.agreement, self.agreement_all, share)

    def _sight(self, scene: Scene) -> Sight:
        like = self.usual
        known, compared, remembered = scene.known
        if known and compared:
            total = max(remembered * compared / known, 1.0)  # samples there are, as from marked fish in a pond
            self.epochs = self.age * scene.samples / total

        def all_(x: Tensor, vectors: float) -> Tensor:
            return torch.cat([x, x.new_full((1,), vectors)])

        assert self.start_sizes is not None
        z, long = (slope(s) for s in (self.slopes, self.slopes_long))
        momentum = self._by_matrix([V for _, V, _ in self._views]) / self._usual_norms()
        mean = self.agreement_all
        return Sight(
            slope=z,
            slope_long=long,
            agreement=torch.cat([self.agreement, mean[None]]),
            agreement_all=mean,
            momentum=all_(momentum, 1.0),
            length=self.log_rate - math.log(self.config.start),
            grown=all_((scene.sizes.clamp_min(TINY) / self.start_sizes).log(), 0.0),
            known=known / compared if compared else 0.0,
            epochs=self.epochs,
            age=self.age,
            progress=scene.progress,
            same=scene.same,
            samples=scene.samples,
            parameters=self.layout.size,
            fallen=like.new_zeros(())
            if scene.loss is None or self.start_loss is None
            else scene.loss - self.start_loss,
            positions=all_(self.positions, 1.0),
            aspect=self._places.aspect,
            depth=len(self.pieces),
            first=self._places.first,
            last=self._places.last,
            kinds=self._places.kinds,
        )

    def _set(self, controls: Controls, scene: Scene) -> None:
        """Make of the controls what steps use."""
        c, layout = self.config, self.layout
        self.controls = controls
        self.sizes = scene.sizes
        self.resume(scene.vectors.clamp_min(c.vector_floor))
        self.set_roots()
        for bucket, kept in zip(layout.buckets, self.kept, strict=True):
            kept.plan(c, bucket, max((self.columns[n] for n in bucket.parts), default=0))
        self.group()

    def resume(self, vectors: Tensor) -> None:
        """Make of the controls and the sizes of matrices and vectors what all steps until the next look use."""
        assert self.controls is not None
        assert self.sizes is not None
        sizes = torch.maximum(self.sizes, self.config.floor * self._places.natural)
        if self.start_sizes is not None:  # steps in proportion to what has grown would make it grow ever faster
            begun = torch.maximum(self.start_sizes, self.config.floor * self._places.natural)
            sizes = torch.minimum(sizes, (sizes * begun).sqrt())
        stretch, decay = self.controls.stretch, self.controls.decay
        self.lengths, self.decays, self.anneal = stretch[:-1] * sizes, (stretch * decay)[:-1], self.controls.anneal[:-1]
        for bucket, kept in zip(self.layout.buckets, self.kept, strict=True):
            kept.spectral = self.controls.spectral[bucket.rows, None, None]
        joint = torch.stack([self.controls.longest, self.controls.target, self.controls.gain, stretch[-1]])
        *pace, self.vector_length = joint.tolist()
        self.pace = pace[0], pace[1], pace[2]
        if self.layout.sizes:
            self.spread = vectors[self.owner]

    def set_roots(self) -> None:
        """Make the roots of all matrices whose moments are known."""
        assert self.controls is not None
        found = roots_of(self.layout, self.moments, self.controls.damping[:-1], self.config.rank)
        for kept, root in zip(self.kept, found, strict=True):
            if root is not None:
                kept.root, kept.through = root, None

    def group(self) -> None:
        """Find which buckets are stepped in one go, as they are until the next look."""
        for bucket, kept in zip(self.layout.buckets, self.kept, strict=True):
            kept.lead(self.config, bucket)
        homes = [change for _, _, change in self._views]
        self._together, self._alone = grouped(self.config, self.layout.buckets, self.kept, homes)
        self._held = None

    # --- a step

    def _by_matrix(self, views: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
        """``‖·‖`` of each matrix, ``[L]``, of those of each bucket."""
        if not views:
            return self.usual
        if len(views) == 1:
            return torch.linalg.vector_norm(views[0], dim=(-2, -1), out=out)
        return torch.cat([norms(view) for view in views], out=out)

    def _usual_norms(self) -> Tensor:
        """Root mean square of each matrix's gradients, ``[L]``."""
        if self._now_at != self.age:
            self._renew_usual(1 - self.config.slow ** max(self.age, 1))
            self._now_at = self.age
        return self._now

    def _renew_usual(self, corrected: float | Tensor) -> Tensor:
        return torch.div(self.usual, corrected, out=self._now).clamp_min_(TINY).sqrt_()

    def measure(self) -> bool:
        """Measure the gradient that lies in :attr:`gradient`; whether it is finite, and its squares.

        All that a step asks the device for comes here, in one transfer.
        """
        self._usual_norms()
        plain = self.replays is None or self.age <= self.config.warm
        asked = self._measured() if plain or self.replays is None else self.replays.run("measure", (), self._measured)
        total, most, slope_, self._calm_now = asked.tolist()
        self.measured = _Measured(math.isfinite(total), most, slope_)
        return self.measured.finite

    def _measured(self) -> Tensor:
        """What is to be known of the gradient on the host, ``[4]``."""
        G = self.gradient
        sizes = self._by_matrix([view for view, _, _ in self._views], self._sizes)
        total = sizes.sum()
        if self.layout.sizes:
            total = total + G[self.layout.vectors :].sum()
        most = (sizes / self._now).max() if self.layout.matrices else total
        return torch.stack([total, most, torch.dot(G, self.change), self.calm])

    def step(
        self, momentum: float = 1.0, cooled: float = 1.0, apply: Callable[[Tensor], None] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Make the next change, of the flat gradient that lies in :attr:`gradient`.

        Args:
            momentum: Factor on the momentum.
            cooled: Factor on the length.
            apply: Given the shares, moves the weights; another object where other ones move.

        Returns:
            The change, flat; and the shares that the weights of each matrix lose first, ``[L]``.
        """
        c = self.config
        assert self.controls is not None
        if self.measured is None:
            self.measure()
        assert self.measured is not None
        (finite, most, slope_), self.measured = self.measured, None
        if self.age:
            self._feel(slope_)
        if not finite:  # numbers too large to be squared: others were skipped before
            self.change.zero_()
            shares = torch.zeros_like(self.decays)
            if apply is not None:
                apply(shares)
            return self.change, shares
        if not most <= c.clip:
            self._clip(self._sizes)
        self.age += 1
        beta = c.momentum * momentum
        rate = math.exp(self.log_rate) * cooled
        begun, corrected = 1 - c.momentum**self.age, 1 - c.slow**self.age
        due = {n: self.age <= c.warm or self.age % self.kept[n].every == 0 for n in self._alone}
        numbers = [rate, begun, corrected, -rate * self.vector_length / begun]
        settled = self.age > c.warm and all(self.kept[n].is_settled(self.age) for n, anew in due.items() if anew)
        if self.replays is None or not settled:
            shares = self._advance(beta, due, numbers)
            self._held = self._held if settled else None
            if apply is not None:
                apply(shares)
        else:
            shares = self._replayed(self.replays, beta, due, numbers, apply)
        self._now_at = self.age
        return self.change, shares

    def _replayed(
        self,
        replays: Replays,
        beta: float,
        due: dict[int, bool],
        numbers: Sequence[float],
        apply: Callable[[Tensor], None] | None,
    ) -> Tensor:
        """The same by a graph: what changes from step to step lies in tensors, whose places do not."""
        self._numbers.copy_(torch.tensor(numbers, dtype=self._numbers.dtype))
        if self._held is None:
            held = [self.lengths, self.decays, self.anneal, self.spread]
            held += [t for one in self._together for t in one.tensors()]
            held += [t for n in self._alone for t in self.kept[n].tensors()]
            homes = tuple(tuple(one.homes) for one in self._together)
            exact = tuple((n, self.kept[n].exact) for n in self._alone)
            self._held = held, (shapes(held), homes, exact)
        held, kind = self._held

        def body() -> Tensor:
            shares = self._advance(beta, due, self._numbers.unbind())
            if apply is not None:
                apply(shares)
            return shares

        return replays.run((beta, tuple(due.items()), kind, apply), held, body, self._together)

    def _advance(self, beta: float, due: Mapping[int, bool], numbers: Sequence[float | Tensor]) -> Tensor:
        """Make the change; the shares of the weights that are lost."""
        c, layout, G, V = self.config, self.layout, self.gradient, self.velocity
        rate, begun, corrected, factor = numbers
        self.usual.lerp_(self._sizes.square(), 1 - c.slow)
        usual = self._renew_usual(corrected)
        V.lerp_(G, 1 - beta)
        calm = (self._by_matrix([view for _, view, _ in self._views]) / (usual * begun)).clamp_(TINY, 1)
        calm.pow_(self.anneal)
        lengths = calm * self.lengths
        lengths.mul_(rate)
        if layout.matrices:
            torch.mean(calm, 0, out=self.calm)
        whole = all(due.values())
        if whole:  # what momentum and gradient point to together lies where the change will
            torch.lerp(V, G, 1 - beta, out=self.change)
        else:
            for n, (G_, V_, D) in enumerate(self._views):
                if due.get(n, True):
                    torch.lerp(V_, G_, 1 - beta, out=D)
        lengths = lengths.view(-1, 1, 1)
        for together in self._together:
            together.step(lengths)
        for n, anew in due.items():
            D = self._views[n][2]
            mine = lengths[layout.buckets[n].rows]
            if anew:
                made = self.kept[n].direction(D, self.age, c.orthogonal)
                torch.mul(made, (mine / lengths_of(made)).neg_(), out=D)
            else:
                D.mul_(mine / lengths_of(D))
        if layout.sizes:
            g = G[layout.vectors :]
            self.seconds.lerp_(g.square(), 1 - c.slow)
            root = (self.seconds / corrected).sqrt_().add_(TINY)
            moved = (V[layout.vectors :] / root).mul_(self.spread)
            torch.mul(moved, factor, out=self.change[layout.vectors :])
        return (calm * self.decays).mul_(rate)

    def _clip(self, sizes: Tensor) -> None:
        """Shorten gradients that are far larger than usual, and their sizes ``[L]``."""
        before = torch.where(self.usual > 0, self._usual_norms(), sizes)  # of a first gradient nothing is known
        limit = self.config.clip * before
        clipped = torch.where(sizes > limit, limit / sizes.clamp_min(TINY), 1.0)
        for bucket, (G, _, _) in zip(self.layout.buckets, self._views, strict=True):
            G.mul_(clipped[bucket.rows, None, None])
        sizes.mul_(clipped)

    def recover(self) -> None:
        """Begin anew with shorter steps, at weights that the last ones have not changed."""
        self.velocity.zero_()
        self.change.zero_()
        self.slopes, self.slopes_long = (0.0, 0.0), (0.0, 0.0)
        self.log_rate -= math.log(self.config.back)
        self.age += 1
        self.measured = None

    def _feel(self, q: float) -> None:
        """The length of steps follows the slope ``q = ⟨G, last change⟩``."""
        c, (longest, target, gain) = self.config, self.pace
        both = (q, q * q) if math.isfinite(q) else (0.0, 0.0)
        self.slopes = averaged(self.slopes, both, 1 - c.feedback)
        self.slopes_long = averaged(self.slopes_long, both, (1 - c.feedback) / 10)
        if self.age >= 2:
            grown = self.log_rate + gain * (target - slope(self.slopes))
            most = math.log(longest) - math.log(self._calm_now)
            # Batches of one epoch lean against each other, which looks like a slope that rises: without a bound steps
            # would shorten for ever.
            least = math.log(c.least * c.start / (1 + self.age / c.ageing))
            self.log_rate = max(min(grown, most), least)
