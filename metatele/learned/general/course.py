"""Where a network is on its way: what is remembered of it, and how it is stepped; see :mod:`.optimizer`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from metatele.config import GeneralConfig
from metatele.learned.general.controller import KINDS, Controller, Controls, Sight
from metatele.learned.general.direction import lengths_of, norms
from metatele.learned.general.kept import Kept, Together, grouped
from metatele.learned.general.layout import Layout
from metatele.learned.general.roots import roots_of
from metatele.learned.general.scene import Piece, Scene
from metatele.learned.general.slopes import averaged, slope
from metatele.network.stacks import all_mixed
from metatele.network.use import TINY, Moment

_FAN_IN = 3.0  # weights of variance 1/(3 i) are what layers begin with


class _Measured(NamedTuple):
    """Of a gradient.

    Attributes:
        sizes: ``‖G‖`` of each matrix, ``[L]``.
        finite: Whether all of it is, squared too.
        most: Largest of the sizes beside what is usual.
        slope: Along the last change.
    """

    sizes: Tensor
    finite: bool
    most: float
    slope: float


def _sizes(moments: Sequence[Moment | Tensor]) -> list[float]:
    """Of each a number that is finite where all of it is, and a factor's squares."""
    kinds: dict[float, list[tuple[int, Tensor]]] = {2.0: [], 1.0: []}  # by the norm
    for number, m in enumerate(moments):
        if not isinstance(m, Moment):
            kinds[1.0].append((number, m))
        else:
            kinds[1.0 if m.rest is None else 2.0].append((number, m.tensor))
            if m.rest is not None:
                kinds[1.0].append((number, m.rest))
    norms = [norm for order, some in kinds.items() if some for norm in torch._foreach_norm([t for _, t in some], order)]
    found = [0.0] * len(moments)
    places = [number for some in kinds.values() for number, _ in some]
    for number, size in zip(places, torch.stack(norms).tolist() if norms else (), strict=True):
        found[number] += size
    return found


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
        self._together: list[Together] = []
        self._alone: list[int] = []
        self._usual_now: tuple[int, Tensor] | None = None  # root mean squares of gradients, and at which age
        self._views = [(b.of(self.gradient), b.of(self.velocity), b.of(self.change)) for b in layout.buckets]
        self.hashes: set[float] = set()
        self.epochs = 0.0
        self._facts()

    def _facts(self) -> None:
        """What the controller is told of places."""
        layout, like = self.layout, self.usual
        kinds, aspect, first, last, natural = (like.new_zeros(layout.matrices + 1) for _ in range(5))
        for number, piece in enumerate(self.pieces):
            rows, (_, o, i) = layout.rows(number), piece.shape
            kinds[rows] = KINDS.index(piece.kind)
            aspect[rows] = math.log(o / i)
            first[rows], last[rows] = float(number == 0), float(number == len(self.pieces) - 1)
            natural[rows] = math.sqrt(o / _FAN_IN)
        kinds[-1] = KINDS.index("vectors")
        self._kinds, self._aspect, self._first, self._last, self._natural = kinds, aspect, first, last, natural[:-1]

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
        sizes = _sizes([new for _, new in seen])
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
        products = self.usual.new_zeros(len(self.usual), 2, 2)
        for bucket, kept, (G, _, _) in zip(self.layout.buckets, self.kept, self._views, strict=True):
            halves = [scene.pieces[n].half if n in scene.pieces else None for n in bucket.parts]
            if all(half is None for half in halves):
                continue
            H = torch.cat(
                [
                    torch.zeros_like(self.layout.part(gradients, n)) if h is None else h
                    for n, h in zip(bucket.parts, halves, strict=True)
                ]
            )
            m, o, i = bucket.shape
            both = torch.stack([H, G - H], 1)
            if kept.root is not None:
                both = kept.root.right(both.view(m, 2 * o, i))
            both = both.view(m, 2, o * i)
            torch.bmm(both, both.mT, out=products[bucket.rows])
        products = products.nan_to_num_(0.0, 0.0, 0.0)
        squares = products[:, 0, 0], products[:, 1, 1], products[:, 0, 1]
        one, two, across = squares
        share = self.config.agreeing if self.age else 1.0
        cosine = (across / (one * two).sqrt().clamp_min(TINY)).clamp(0, 1)
        known = (one > 0) & (two > 0)
        self.agreement = torch.where(known, self.agreement.lerp(2 * cosine / (1 + cosine), share), self.agreement)
        # Layers count alike.
        weight = torch.where(known, 1 / (one + two).clamp_min(TINY), 0.0).nan_to_num(0.0, 0.0, 0.0)
        one, two, across = ((t * weight).sum() for t in (one, two, across))
        cosine = (across / (one * two).sqrt().clamp_min(TINY)).clamp(0, 1)
        mean = self.agreement_all.lerp(2 * cosine / (1 + cosine), share)
        self.agreement_all = torch.where(known.any(), mean, self.agreement_all)

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
            aspect=self._aspect,
            depth=len(self.pieces),
            first=self._first,
            last=self._last,
            kinds=self._kinds,
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
        sizes = torch.maximum(self.sizes, self.config.floor * self._natural)
        if self.start_sizes is not None:  # steps in proportion to what has grown would make it grow ever faster
            begun = torch.maximum(self.start_sizes, self.config.floor * self._natural)
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

    # --- a step

    def _by_matrix(self, views: Sequence[Tensor]) -> Tensor:
        """``‖·‖`` of each matrix, ``[L]``, of those of each bucket."""
        found = [norms(view) for view in views]
        return found[0] if len(found) == 1 else torch.cat(found) if found else self.usual

    def _usual_norms(self) -> Tensor:
        """Root mean square of each matrix's gradients, ``[L]``."""
        if self._usual_now is None or self._usual_now[0] != self.age:
            now = (self.usual / (1 - self.config.slow ** max(self.age, 1))).clamp_min_(TINY).sqrt_()
            self._usual_now = self.age, now
        return self._usual_now[1]

    def measure(self) -> bool:
        """Measure the gradient that lies in :attr:`gradient`; whether it is finite, and its squares.

        All that a step asks the device for comes here, in one transfer.
        """
        G = self.gradient
        sizes = self._by_matrix([view for view, _, _ in self._views])
        total = sizes.sum()
        if self.layout.sizes:
            total = total + G[self.layout.vectors :].sum()
        most = (sizes / self._usual_norms()).max() if self.layout.matrices else total
        asked = torch.stack([total, most, torch.dot(G, self.change), self.calm])
        total_, most_, slope_, self._calm_now = asked.tolist()
        self.measured = _Measured(sizes, math.isfinite(total_), most_, slope_)
        return self.measured.finite

    def step(self, momentum: float = 1.0, cooled: float = 1.0) -> tuple[Tensor, Tensor]:
        """Make the next change, of the flat gradient that lies in :attr:`gradient`.

        Args:
            momentum: Factor on the momentum.
            cooled: Factor on the length.

        Returns:
            The change, flat; and the shares that the weights of each matrix lose first, ``[L]``.
        """
        c, layout, G, V = self.config, self.layout, self.gradient, self.velocity
        assert self.controls is not None
        if self.measured is None:
            self.measure()
        assert self.measured is not None
        (sizes, finite, most, slope_), self.measured = self.measured, None
        if self.age:
            self._feel(slope_)
        if not finite:  # numbers too large to be squared: others were skipped before
            self.change.zero_()
            return self.change, torch.zeros_like(self.decays)
        if not most <= c.clip:
            sizes = self._clip(sizes)
        self.usual.lerp_(sizes.square(), 1 - c.slow)
        self.age += 1
        usual = self._usual_norms()
        beta = c.momentum * momentum
        V.lerp_(G, 1 - beta)
        rate = math.exp(self.log_rate) * cooled
        begun = 1 - c.momentum**self.age
        calm = (self._by_matrix([view for _, view, _ in self._views]) / (usual * begun)).clamp_(TINY, 1)
        calm.pow_(self.anneal)
        lengths = calm * self.lengths
        lengths.mul_(rate)
        self.calm = calm.mean() if layout.matrices else self.calm
        due = {n: self.age <= c.warm or self.age % self.kept[n].every == 0 for n in self._alone}
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
            root = (self.seconds / (1 - c.slow**self.age)).sqrt_().add_(TINY)
            moved = (V[layout.vectors :] / root).mul_(self.spread)
            torch.mul(moved, -rate * self.vector_length / begun, out=self.change[layout.vectors :])
        return self.change, (calm * self.decays).mul_(rate)

    def _clip(self, sizes: Tensor) -> Tensor:
        """Shorten gradients that are far larger than usual; how large they are then, ``[L]``."""
        before = torch.where(self.usual > 0, self._usual_norms(), sizes)  # of a first gradient nothing is known
        limit = self.config.clip * before
        clipped = torch.where(sizes > limit, limit / sizes.clamp_min(TINY), 1.0)
        for bucket, (G, _, _) in zip(self.layout.buckets, self._views, strict=True):
            G.mul_(clipped[bucket.rows, None, None])
        return sizes * clipped

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
