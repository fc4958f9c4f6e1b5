"""One inner problem on a module: its network, its batches in order, what changes in mid-run, how it is judged."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from metatele.tasks.modules.data import LOSSES, Data, Source
from metatele.tasks.modules.draws import seeded
from metatele.tasks.modules.networks import Network, built

# What may change in mid-run: a layer that was frozen is freed; inputs are turned round; targets are; the classes are
# others than before.
CHANGES = ("none", "freed", "inputs", "targets", "classes")
_BLOCK = 1024  # samples that are drawn at a time where batches never repeat
_TRAINED_RATE = 3e-3  # Adam's, of states to go on from


@dataclass(frozen=True)
class Problem:
    """A run that somebody might make: everything but the optimizer.

    Attributes:
        kind: As in the settings.
        source: Of the data.
        network: Its description.
        horizon: Steps.
        samples: Of the training set; 0: batches never repeat.
        batch: Samples of one pass.
        passes: Passes whose gradients are added for one step.
        known: Whether an optimizer is told how many steps there will be.
        change: One of :data:`CHANGES`.
        change_at: Step at which it changes.
        trained: Steps of Adam before, on what the data are like before the change.
        clip: Norm to which gradients are clipped; 0: they are not.
        held_out_samples: By which it is judged.
        cost_ms: Estimated time of the run with Adam.
        seed: Of data and order.

    Example:
        >>> from metatele.config import ModulesConfig
        >>> from metatele.tasks.modules import Modules
        >>> problem = Modules(ModulesConfig(kinds=("images",))).sample(0, "train", 1)
        >>> model, batch = problem.model(), next(problem.batches())
        >>> bool(problem.loss(model(batch.inputs), batch.targets).isfinite())
        True
    """

    kind: str
    source: Source
    network: Network
    horizon: int
    samples: int
    batch: int
    passes: int = 1
    known: bool = False
    change: str = "none"
    change_at: int = 0
    trained: int = 0
    clip: float = 0.0
    held_out_samples: int = 256
    cost_ms: float = field(default=0.0, compare=False)
    seed: int = 0

    @property
    def total_steps(self) -> int | None:
        """What an optimizer is told about the length of the run."""
        return self.horizon if self.known else None

    @property
    def whole(self) -> bool:
        """Whether every batch is the whole training set."""
        return 0 < self.samples <= self.batch

    def model(self) -> nn.Module:
        """The network at the beginning of the run: new, or trained before."""
        model = built(self.network, self.source)
        if self.trained:
            adam = torch.optim.Adam(model.parameters(), _TRAINED_RATE)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)  # of dropout
                for data in itertools.islice(self._batches(self.seed + 3, 0), self.trained):
                    adam.zero_grad()
                    self.loss(model(data.inputs), data.targets).backward()
                    adam.step()
            model.zero_grad()
        return model

    def phase(self, step: int) -> int:
        """0 before the data change, 1 from then on."""
        return int(self.change in ("inputs", "targets", "classes") and step >= self.change_at)

    def batches(self) -> Iterator[Data]:
        """Batches in order, one for each pass; they never end."""
        first = self._batches(self.seed, 0)
        for _ in range(self.change_at if self.phase(self.change_at) else 0):
            yield from itertools.islice(first, self.passes)
        if self.phase(self.change_at):
            yield from self._batches(self.seed, 1)
        yield from first

    def frozen(self, model: nn.Module) -> list[nn.Parameter]:
        """Parameters that do not move until :attr:`change_at`."""
        if self.change != "freed":
            return []
        layers = [m for m in model.modules() if next(m.parameters(recurse=False), None) is not None]
        found = list(layers[self.seed % max(1, len(layers) - 1)].parameters(recurse=False))
        every = {id(p) for p in model.parameters()}
        return [] if every <= {id(p) for p in found} else found  # one layer tied to all others

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """What is minimised: the mean over a batch."""
        return LOSSES[self.source.loss](outputs, targets)

    def held_out(self, phase: int = 0) -> Data:
        """Samples that are never trained on."""
        return self._drawn(self.held_out_samples, seeded(self.seed + 1), phase, clean=True)

    def trained_on(self, phase: int = 0) -> Data:
        """Samples of the training set, or new ones where batches never repeat, as many as held-out ones at most."""
        count = self.held_out_samples
        if self.samples:
            return self._set(self.seed, phase).part(slice(count))
        return self._drawn(count, seeded(self.seed + 2), phase)

    @torch.no_grad()
    def judged(self, model: nn.Module, data: Data) -> float:
        """Mean loss of a model on samples, as a user measures it: without dropout, batch statistics and smoothing."""
        training = model.training
        model.eval()
        name = "ce" if self.source.loss == "smoothed" else self.source.loss
        loss = float(LOSSES[name](model(data.inputs), data.targets))
        model.train(training)
        return loss

    def _batches(self, seed: int, phase: int) -> Iterator[Data]:
        order = seeded(seed + 7 + phase)
        if not self.samples:
            count = self.batch * math.ceil(_BLOCK / self.batch)
            while True:
                block = self._drawn(count, order, phase)
                yield from (block.part(slice(i, i + self.batch)) for i in range(0, count, self.batch))
        data = self._set(seed, phase)
        least = min(2, self.samples)  # what norms over a batch need
        while True:
            if self.whole:
                yield data
                continue
            for rows in torch.randperm(self.samples, generator=order).split(self.batch):
                if len(rows) >= least:
                    yield data.part(rows)

    def _set(self, seed: int, phase: int) -> Data:
        return self._drawn(self.samples, seeded(seed + 5), phase)

    def _drawn(self, count: int, g: torch.Generator, phase: int, clean: bool = False) -> Data:
        if self.change == "classes":
            half, outputs, found = self.source.outputs // 2, self.source.outputs, []
            low, high = (half, outputs) if phase else (0, half)
            for _ in range(64):  # in case a class hardly ever comes
                data = self.source.draw(2 * count, g, clean)
                found.append(data.part((data.targets >= low) & (data.targets < high)))
                if sum(len(part.inputs) for part in found) >= count:
                    break
            whole = Data(*(torch.cat(parts) for parts in zip(*found, strict=True)))
            return whole.part(slice(count)) if len(whole.inputs) >= count else self.source.draw(count, g, clean)
        x, y = self.source.draw(count, g, clean)
        if phase and self.change == "inputs":
            x = (x + 1) % self.source.tokens if self.source.tokens else x.amax() - x
        if phase and self.change == "targets":
            if y.dtype == torch.long:
                y = torch.where(y >= 0, (y + 1) % self.source.outputs, y)
            else:
                y = 1 - y if self.source.loss == "bce" else -y
        return Data(x, y)
