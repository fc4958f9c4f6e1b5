"""Many replicas of one network trained in one program: all seeds and arms of an experiment.

Replicas of the same seed see the same mini-batches, in every arm, so they share one matrix product for
the first layer, where nearly all the arithmetic is. The optimizers are torch's own: each arm's works on
that arm's slice of the replica-batched tensors, which is right for every optimizer whose rule is elementwise.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from metatele.data import ImageSet
from metatele.errors import ConfigError
from metatele.geometry import Landscape
from metatele.losses import CrossEntropy
from metatele.mlp import MLP, Pass, Weights
from metatele.random import generator
from metatele.teleport import TeleportMove, in_sequence

_CHUNK = 10_000  # samples in one evaluation pass


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: As in tables.
        optimizer: Class of torch.optim with an elementwise rule.
        settings: Its keyword arguments.
        teleport: The move, or ``None``.
        epochs: At whose beginning to teleport.
        batches: Of fresh samples for one teleport, used in a row.
        batch_size: Samples in each of those.
        state: ``reset`` or ``keep``: the optimizer's state at a teleport.
        resets: At whose beginning to forget the optimizer's state without a teleport: what a reset alone does.
        apart: The optimizer's rule is not elementwise (Muon): it gets each replica's tensors by themselves.
    """

    name: str
    optimizer: Any
    settings: dict[str, Any]
    teleport: TeleportMove | None = None
    epochs: tuple[int, ...] = (0,)
    batches: int = 8
    batch_size: int = 200
    state: str = "reset"
    resets: tuple[int, ...] = ()
    apart: bool = False

    def __post_init__(self) -> None:
        """Check settings."""
        if self.state not in ("reset", "keep"):
            raise ConfigError(f"state must be reset or keep, got {self.state!r}")


@dataclass
class History:
    """What happened to each replica, ``[epochs + 1, arms, seeds]``; row i is after i epochs.

    Attributes:
        train_loss: Mean loss on the training samples.
        test_loss: On the test samples.
        test_accuracy: Fraction of test samples classified right.
        teleports: A dictionary for each arm and epoch that teleported: norms, drifts, seconds.
        step_seconds: Wall-clock of all training steps of all replicas.
        teleport_seconds: Of all teleports.
        evaluation_seconds: Of all evaluations.
    """

    train_loss: list[Tensor] = field(default_factory=list)
    test_loss: list[Tensor] = field(default_factory=list)
    test_accuracy: list[Tensor] = field(default_factory=list)
    teleports: list[dict[str, Any]] = field(default_factory=list)
    step_seconds: float = 0.0
    teleport_seconds: float = 0.0
    evaluation_seconds: float = 0.0


class Replicas:
    """Networks ``[seeds, arms]`` on one image set.

    All arms of a seed begin with the same weights, uniform on ``±1/√fan_in``, and see the same batches.

    Args:
        images: The data.
        mlp: Shape of every network; its input fits the images.
        arms: Ways to train.
        seeds: One replica of each arm for each.
        train_samples: Use the first so many training images; all if zero.
        batch_size: Of a training step.
        device: Where.

    Example:
        >>> from metatele.activations import LeakyReLU
        >>> from metatele.data import load_images
        >>> arms = [Arm("SGD", torch.optim.SGD, {"lr": 0.1})]
        >>> replicas = Replicas(load_images(), MLP((64, 16, 10), LeakyReLU(0.1)), arms, seeds=range(2))
        >>> history = replicas.train(epochs=1)
        >>> history.train_loss[1].shape, bool((history.train_loss[1] < history.train_loss[0]).all())
        (torch.Size([1, 2]), True)
    """

    def __init__(
        self,
        images: ImageSet,
        mlp: MLP,
        arms: Sequence[Arm],
        seeds: Sequence[int],
        train_samples: int = 0,
        batch_size: int = 20,
        device: torch.device | str = "cpu",
    ) -> None:
        if mlp.widths[0] != images.features:
            raise ConfigError(f"{images.name} has {images.features} features, the network takes {mlp.widths[0]}")
        count = train_samples or len(images.train_labels)
        if not 0 < batch_size <= count <= len(images.train_labels):
            raise ConfigError(
                f"train_samples must lie between the batch size ({batch_size}) and {len(images.train_labels)}, "
                f"got {count}"
            )
        for arm in arms:
            if arm.teleport is not None and arm.batches * arm.batch_size > count:
                raise ConfigError(f"a teleport on {arm.batches} x {arm.batch_size} samples needs more than {count}")
        self.mlp, self.arms, self.seeds, self.batch_size = mlp, list(arms), list(seeds), batch_size
        self.device = torch.device(device)
        self.train_images = images.train_images[:count].to(self.device)
        self.train_labels = images.train_labels[:count].to(self.device)
        self.test_images, self.test_labels = images.test_images.to(self.device), images.test_labels.to(self.device)
        self.loss = CrossEntropy()
        self.weights = self._initial()
        self.optimizers = [self._optimizer(a) for a in range(len(self.arms))]

    def _initial(self) -> Weights:
        shape = (len(self.seeds), len(self.arms))
        flats = []
        for seed in self.seeds:
            random = generator(seed, "initialisation")
            parts = []
            for W, b in zip(*self.mlp.unflatten(torch.rand(self.mlp.num_parameters, generator=random)), strict=True):
                bound = 1 / math.sqrt(W.shape[-1])
                parts += [(2 * p - 1) * bound for p in (W.flatten(), b) if p is not None]
            flats.append(torch.cat(parts))
        joint = self.mlp.unflatten(torch.stack(flats).unsqueeze(1).to(self.device))

        def spread(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.expand(*shape, *t.shape[2:]).contiguous()

        return Weights(tuple(map(spread, joint.matrices)), tuple(map(spread, joint.biases)))  # type: ignore[arg-type]

    def _tensors(self, weights: Weights) -> list[Tensor]:
        pairs = zip(weights.matrices, weights.biases, strict=True)
        return [t for pair in pairs for t in pair if t is not None]

    def _slices(self, tensors: list[Tensor], arm: int) -> list[Tensor]:
        """What an arm's optimizer sees of the joint tensors ``[seeds, arms, ...]``."""
        if self.arms[arm].apart:
            return [t[s, arm] for t in tensors for s in range(len(self.seeds))]
        return [t[:, arm] for t in tensors]

    def _optimizer(self, arm: int) -> torch.optim.Optimizer:
        parameters = self._slices(self._tensors(self.weights), arm)
        optimizer: torch.optim.Optimizer = self.arms[arm].optimizer(parameters, **self.arms[arm].settings)
        return optimizer

    def train(self, epochs: int, progress: Callable[[int, History], None] | None = None) -> History:
        """Train for some epochs, evaluating before the first and after each.

        Args:
            epochs: Passes over the training samples.
            progress: Called after each epoch with its number and the history so far.
        """
        history = History()
        randoms = [generator(seed, "train") for seed in self.seeds]
        self._evaluate(history)
        for epoch in range(epochs):
            for number, arm in enumerate(self.arms):
                if arm.teleport is not None and epoch in arm.epochs:
                    self._teleport(number, arm.teleport, epoch, history)
                if epoch in arm.resets:
                    self.optimizers[number].state = defaultdict(dict)
            begin_s = time.perf_counter()
            orders = torch.stack([torch.randperm(len(self.train_labels), generator=g) for g in randoms]).to(self.device)
            steps = orders.shape[1] // self.batch_size
            for step in range(steps):
                self._step(orders[:, step * self.batch_size : (step + 1) * self.batch_size])
            history.step_seconds += time.perf_counter() - begin_s
            self._evaluate(history)
            if progress is not None:
                progress(epoch, history)
        return history

    def _batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs ``[seeds, 1, d, n]`` and labels ``[seeds, 1, n]`` of samples ``[seeds, n]``."""
        inputs = self.train_images.index_select(0, index.flatten()).unflatten(0, index.shape)
        return inputs.mT.unsqueeze(1), self.train_labels[index].unsqueeze(1)

    def _step(self, index: Tensor) -> None:
        inputs, labels = self._batch(index)
        done = Pass(self.mlp, self.weights, inputs)
        done.backward(labels, self.loss)
        tensors = self._tensors(done.gradient())
        for arm, optimizer in enumerate(self.optimizers):
            parts = self._slices(tensors, arm)
            for p, gradient in zip(optimizer.param_groups[0]["params"], parts, strict=True):
                p.grad = gradient
            optimizer.step()

    def _teleport(self, number: int, move: TeleportMove, epoch: int, history: History) -> None:
        arm = self.arms[number]
        begin_s = time.perf_counter()
        slices = Weights(
            tuple(W[:, number] for W in self.weights.matrices),
            tuple(None if b is None else b[:, number] for b in self.weights.biases),
        )
        flat = self.mlp.flatten(slices)
        # The same samples for every arm: drawn anew from the seed and the epoch.
        draws = [
            torch.randperm(len(self.train_labels), generator=generator(seed, "tuning", epoch))[
                : arm.batches * arm.batch_size
            ]
            for seed in self.seeds
        ]
        batches = [self._batch(index) for index in torch.stack(draws).to(self.device).split(arm.batch_size, 1)]
        landscapes = [Landscape(self.mlp, x.squeeze(1), y.squeeze(1), self.loss) for x, y in batches]
        flat, reports = in_sequence(move, landscapes, flat)
        moved = self.mlp.unflatten(flat)
        for target, source in zip(self._tensors(slices), self._tensors(moved), strict=True):
            target.copy_(source)
        if arm.state == "reset":
            self.optimizers[number].state = defaultdict(dict)
        seconds = time.perf_counter() - begin_s
        history.teleport_seconds += seconds
        history.teleports.append(
            {
                "arm": arm.name,
                "epoch": epoch,
                # Each batch has its own norm: the factors of all batches together.
                "objective_ratio": torch.stack([r.objective_after / r.objective_before for r in reports])
                .prod(0)
                .tolist(),
                "drift": torch.stack([r.drift for r in reports]).amax(0).tolist(),
                "rolled_back": int(sum(int(r.rolled_back.sum()) for r in reports)),
                "seconds": seconds,
            }
        )

    def _evaluate(self, history: History) -> None:
        begin_s = time.perf_counter()
        train, _ = self._measured(self.train_images, self.train_labels)
        test, accuracy = self._measured(self.test_images, self.test_labels)
        history.train_loss.append(train)
        history.test_loss.append(test)
        history.test_accuracy.append(accuracy)
        history.evaluation_seconds += time.perf_counter() - begin_s

    @torch.no_grad()
    def _measured(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean loss and accuracy ``[arms, seeds]``; every replica sees the same samples."""
        everyone = Weights(
            tuple(W.flatten(0, 1).unsqueeze(0) for W in self.weights.matrices),
            tuple(None if b is None else b.flatten(0, 1).unsqueeze(0) for b in self.weights.biases),
        )
        total = correct = torch.zeros((), device=self.device)
        for x, y in zip(images.split(_CHUNK), labels.split(_CHUNK), strict=True):
            outputs = self.mlp.forward(everyone, x.T.expand(1, 1, -1, -1))
            targets = y.expand(1, outputs.shape[1], -1)
            total = total + self.loss.value(outputs, targets) * len(y)
            correct = correct + (outputs.argmax(-2) == targets).sum(-1)
        shape = (len(self.seeds), len(self.arms))
        return tuple((t / len(labels)).view(shape).T.cpu() for t in (total, correct.float()))  # type: ignore[return-value]
