"""Many replicas of one network trained in one program: all seeds and arms of an experiment.

Replicas of the same seed see the same mini-batches, in every arm, so they share one matrix product for
the first layer, where nearly all the arithmetic is. The optimizers are torch's own: each arm's works on
that arm's slice of the replica-batched tensors, which is right for every optimizer whose rule is elementwise.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from metatele.data import ImageSet
from metatele.errors import ConfigError
from metatele.geometry import Landscape
from metatele.perceptron.mlp import MLP, Pass, Weights
from metatele.random import generator
from metatele.teleport import MatchedRandom, Report, TeleportMove
from metatele.training.networks import Networks
from metatele.training.static import replayable
from metatele.training.static_steps import StaticSteps, can_stay


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
        follows: Name of an arm before this one that teleports on the same batches: on each of them this arm's move is
            told what that arm's did, and matches it (:class:`~metatele.teleport.MatchedRandom`).
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
    follows: str | None = None
    apart: bool = False

    def __post_init__(self) -> None:
        """Check settings."""
        if self.state not in ("reset", "keep"):
            raise ConfigError(f"state must be reset or keep, got {self.state!r}")
        if self.follows is not None and not isinstance(self.teleport, MatchedRandom):
            raise ConfigError(f"an arm that follows another needs a move that can match one, got {self.teleport!r}")


@dataclass
class History:
    """What happened to each replica, ``[epochs + 1, arms, seeds]``; row i is after i epochs.

    Attributes:
        train_loss: Mean loss on the training samples.
        test_loss: On the test samples.
        test_accuracy: Fraction of test samples classified right.
        teleports: A dictionary for each arm and epoch that teleported. ``loss`` and ``objective`` are pairs
            (before, after) for each batch and seed; what arms on the same batch compute once is in the ``seconds``
            of the first of them.
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

    def branched(self, origins: Sequence[int], names: Sequence[tuple[str, str]]) -> History:
        """The same for arms that begin as copies of some of these.

        Args:
            origins: The numbers of those.
            names: Pairs of an old arm's name and a new one's, by which teleports are told to the new ones.
        """
        index = list(origins)
        return dataclasses.replace(
            self,
            train_loss=[row[index] for row in self.train_loss],
            test_loss=[row[index] for row in self.test_loss],
            test_accuracy=[row[index] for row in self.test_accuracy],
            teleports=[{**t, "arm": new} for t in self.teleports for old, new in names if t["arm"] == old],
        )


class Replicas(Networks):
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
        graph: Make many steps in one launch, as a CUDA graph (:mod:`metatele.training.static_steps`): the same to
            rounding. ``None``: on a GPU, if all optimizers' rules allow it.

    Raises:
        ConfigError: The data, the arms or the sizes do not fit each other; or graphs are asked for with an optimizer
            whose rule does not allow them.

    Example:
        >>> from metatele.perceptron.activations import LeakyReLU
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
        graph: bool | None = None,
    ) -> None:
        super().__init__(images, mlp, seeds, train_samples, batch_size, device)
        _check(arms, len(self.train_labels))
        if graph and not can_stay(arms):
            raise ConfigError("graph needs SGD, Adam, AdamW, RMSprop or AdaGrad whose rate and rule stay as they are")
        self.graph = graph
        self.arms = list(arms)
        self.weights = self._initial()
        self.optimizers = [self._optimizer(a) for a in range(len(self.arms))]
        self.history = History()
        self._randoms = [generator(seed, "train") for seed in self.seeds]
        self._static: StaticSteps | None = None

    def _initial(self) -> Weights:
        shape, first = (len(self.seeds), len(self.arms)), self.initial()

        def spread(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.unsqueeze(1).expand(*shape, *t.shape[1:]).contiguous()

        return Weights(tuple(map(spread, first.matrices)), tuple(map(spread, first.biases)))  # type: ignore[arg-type]

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
        """Train for some more epochs, evaluating before the very first and after each.

        Args:
            epochs: Passes over the training samples.
            progress: Called after each epoch with its number and the history so far.

        Returns:
            The history from the very first epoch on.
        """
        history, randoms = self.history, self._randoms
        if not history.train_loss:
            self._evaluate(history)
        for epoch in range(self.epoch, self.epoch + epochs):
            self._teleport(epoch, history)
            for number, arm in enumerate(self.arms):
                if epoch in arm.resets:
                    self.optimizers[number] = self._optimizer(number)  # AdaGrad may make its state there
            begin_s = time.perf_counter()
            orders = torch.stack([torch.randperm(len(self.train_labels), generator=g) for g in randoms]).to(self.device)
            self._steps(orders)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # or the evaluation would wait for the steps
            history.step_seconds += time.perf_counter() - begin_s
            self._evaluate(history)
            if progress is not None:
                progress(epoch, history)
        return history

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return max(0, len(self.history.train_loss) - 1)

    def branched(self, arms: Sequence[Arm], origins: Sequence[int] | None = None) -> Replicas:
        """Replicas that go on from here with other arms: what is common to all arms is trained once.

        Each new arm begins with the weights, the optimizer's state and the history of one of these, and all see
        the mini-batches that these would see next. These are left as they are.

        Args:
            arms: Ways to train from here; their optimizers are of the class of those they begin with.
            origins: The number of the arm each begins as; the first, if not given.

        Raises:
            ConfigError: An optimizer is of another class, a teleport needs more samples than there are, or an arm
                follows one that is not before it or teleports on other batches.
        """
        index = [0] * len(arms) if origins is None else list(origins)
        for arm, origin in zip(arms, index, strict=True):
            old = self.arms[origin]
            if (arm.optimizer, arm.apart) != (old.optimizer, old.apart):
                raise ConfigError(f"{arm.name} cannot go on from {old.name}, whose optimizer is another")
        _check(arms, len(self.train_labels))
        twin = copy.copy(self)
        twin.arms, twin._static = list(arms), None
        twin.weights = Weights(
            tuple(W[:, index].contiguous() for W in self.weights.matrices),
            tuple(None if b is None else b[:, index].contiguous() for b in self.weights.biases),
        )
        twin.optimizers = [twin._optimizer(a) for a in range(len(arms))]
        for fresh, origin in zip(twin.optimizers, index, strict=True):
            _set_state(fresh, copy.deepcopy(self.optimizers[origin].state_dict()["state"]))
        pairs = [(self.arms[origin].name, arm.name) for arm, origin in zip(arms, index, strict=True)]
        twin.history = self.history.branched(index, pairs)
        twin._randoms = [g.clone_state() for g in self._randoms]
        return twin

    def state(self) -> dict[str, Any]:
        """All that :meth:`restore` needs: tensors and primitives, on the CPU."""
        return {
            "weights": [t.cpu().clone() for t in self._tensors(self.weights)],
            "optimizers": [copy.deepcopy(o.state_dict()["state"]) for o in self.optimizers],
            "randoms": [g.get_state() for g in self._randoms],
            "history": dataclasses.asdict(self.history),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from the :meth:`state` of replicas that were made with the same arguments."""
        for mine, theirs in zip(self._tensors(self.weights), state["weights"], strict=True):
            mine.copy_(theirs)
        for optimizer, theirs in zip(self.optimizers, state["optimizers"], strict=True):
            _set_state(optimizer, theirs)
        for random, theirs in zip(self._randoms, state["randoms"], strict=True):
            random.set_state(theirs)
        self.history = History(**state["history"])

    def _batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs ``[seeds, 1, d, n]`` and labels ``[seeds, 1, n]`` of samples ``[seeds, n]``."""
        inputs = self.train_images.index_select(0, index.flatten()).unflatten(0, index.shape)
        return inputs.mT.unsqueeze(1), self.train_labels[index].unsqueeze(1)

    def _steps(self, orders: Tensor) -> None:
        """All steps of an epoch, on samples in their order ``[seeds, n]``."""
        steps, tensors = orders.shape[1] // self.batch_size, self._tensors(self.weights)
        if self.graph or (self.graph is None and replayable(self.device) and can_stay(self.arms)):
            if self._static is None or not self._static.fits(self.optimizers):
                data = (self.mlp, self.loss, self.train_images, self.train_labels)
                self._static = StaticSteps(*data, self.arms, self.optimizers, len(self.seeds), self.batch_size)
            self._static.load(tensors, self.optimizers)
            if self._static.run(orders):
                self._static.store(tensors, self.optimizers, steps)
                return
            self._static, self.graph = None, False
        for step in range(steps):
            self._step(orders[:, step * self.batch_size : (step + 1) * self.batch_size])

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

    def _teleport(self, epoch: int, history: History) -> None:
        """The teleports of all arms that are due, batch by batch, as they share the batches."""
        due = [a for a, arm in enumerate(self.arms) if arm.teleport is not None and epoch in arm.epochs]
        flats = {a: self.mlp.flatten(self.weights_of(a)) for a in due}
        reports: dict[str, list[Report]] = {self.arms[a].name: [] for a in due}
        seconds = dict.fromkeys(due, 0.0)
        for size in dict.fromkeys(self.arms[a].batch_size for a in due):
            group = [a for a in due if self.arms[a].batch_size == size]
            # The same samples for every arm: drawn anew from the seed and the epoch.
            draws = [
                torch.randperm(len(self.train_labels), generator=generator(seed, "tuning", epoch))
                for seed in self.seeds
            ]
            most = max(self.arms[a].batches for a in group)
            for number, index in enumerate(torch.stack(draws)[:, : most * size].to(self.device).split(size, 1)):
                begin_s = time.perf_counter()
                x, y = self._batch(index)
                landscape = Landscape(self.mlp, x.squeeze(1), y.squeeze(1), self.loss)
                drawing_s = time.perf_counter() - begin_s
                for a in (a for a in group if number < self.arms[a].batches):
                    begin_s = time.perf_counter()
                    arm, move = self.arms[a], self.arms[a].teleport
                    if arm.follows is not None and isinstance(move, MatchedRandom):
                        move = move.matching(reports[arm.follows][number])
                    assert move is not None
                    flats[a], report, _ = move(landscape, flats[a])
                    reports[arm.name].append(report)
                    seconds[a] += drawing_s + time.perf_counter() - begin_s
        for a in due:
            moved = self.mlp.unflatten(flats[a])
            for target, source in zip(self._tensors(self.weights_of(a)), self._tensors(moved), strict=True):
                target.copy_(source)
            arm = self.arms[a]
            if arm.state == "reset":
                self.optimizers[a] = self._optimizer(a)
            history.teleport_seconds += seconds[a]
            history.teleports.append(
                {"arm": arm.name, "epoch": epoch, "seconds": seconds[a], **_told(reports[arm.name])}
            )

    def weights_of(self, arm: int) -> Weights:
        """Views ``[seeds, ...]`` of the weights of an arm, by its number."""
        return Weights(
            tuple(W[:, arm] for W in self.weights.matrices),
            tuple(None if b is None else b[:, arm] for b in self.weights.biases),
        )

    def _evaluate(self, history: History) -> None:
        begin_s = time.perf_counter()
        everyone = Weights(
            tuple(W.flatten(0, 1) for W in self.weights.matrices),
            tuple(None if b is None else b.flatten(0, 1) for b in self.weights.biases),
        )
        shape = (len(self.seeds), len(self.arms))
        (train, _), (test, accuracy) = (
            tuple(t.view(shape).T.float().cpu() for t in self.evaluated(everyone, split)) for split in ("train", "test")
        )
        history.train_loss.append(train)
        history.test_loss.append(test)
        history.test_accuracy.append(accuracy)
        history.evaluation_seconds += time.perf_counter() - begin_s


def _check(arms: Sequence[Arm], samples: int) -> None:
    """Refuse teleports that need more samples than there are, or follow what is not there."""
    names: dict[str, Arm] = {}
    for arm in arms:
        if arm.follows is not None and (
            arm.follows not in names
            or names[arm.follows].teleport is None
            or any(getattr(names[arm.follows], f) != getattr(arm, f) for f in ("epochs", "batches", "batch_size"))
        ):
            raise ConfigError(f"{arm.name} follows {arm.follows}, which no arm before it does on the same batches")
        names[arm.name] = arm
        if arm.teleport is not None and arm.batches * arm.batch_size > samples:
            raise ConfigError(f"a teleport on {arm.batches} x {arm.batch_size} samples needs more than {samples}")


def _set_state(optimizer: torch.optim.Optimizer, state: dict[Any, Any]) -> None:
    """Give an optimizer the state of another, and leave it its settings."""
    whole = optimizer.state_dict()
    whole["state"] = state
    optimizer.load_state_dict(whole)


def _pairs(before: Tensor, after: Tensor) -> list[list[float | None]]:
    """For each seed the value before and after; one that is not finite becomes ``None``."""
    return [_finite(pair) for pair in torch.stack([before, after], -1)]


def _finite(values: Tensor) -> list[float | None]:
    return [v if math.isfinite(v) else None for v in values.double().tolist()]


def _told(reports: list[Report]) -> dict[str, Any]:
    """What is kept of the reports of a teleport, one for each batch."""
    return {
        # Each batch has its own norm: the factors of all batches together.
        "objective_ratio": _finite(torch.stack([r.objective_after / r.objective_before for r in reports]).prod(0)),
        "drift": torch.stack([r.drift for r in reports]).amax(0).tolist(),
        "rolled_back": int(sum(int(r.rolled_back.sum()) for r in reports)),
        "loss": [_pairs(r.loss_before, r.loss_after) for r in reports],
        "objective": [_pairs(r.objective_before, r.objective_after) for r in reports],
    }
