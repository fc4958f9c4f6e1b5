"""Training steps of many replicas on memory that stays where it is, many of them in one launch of a GPU.

A step of a small network is some fifty small kernels, and to launch one takes longer than its work. What changes from
step to step is read from memory: which samples are next, and how many steps an optimizer has made. So a CUDA graph of
many steps is captured once and replayed for the next ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from metatele.perceptron.losses import Loss
from metatele.perceptron.mlp import MLP, Pass, Weights
from metatele.training.static import captured, replayable

if TYPE_CHECKING:
    from metatele.training.replicas import Arm

_STEPS = 50  # in a launch: far more than it costs, and few enough to be captured in a fraction of a second


class _Rule(NamedTuple):
    """An optimizer of torch whose step is the same kernels each time.

    Attributes:
        settings: Those with which it is.
        on_gpu: Settings with which it keeps its counter there.
        remembered: What it remembers of a parameter beside the counter, and what that begins with.
        counted: Whether its steps depend on their number.
    """

    settings: frozenset[str]
    on_gpu: dict[str, Any]
    remembered: dict[str, float]
    counted: bool


def _rule(arm: Arm) -> _Rule | None:
    """How an arm steps; ``None`` if that is not known to be the same kernels each time."""
    s = arm.settings
    adam = frozenset({"lr", "betas", "eps", "weight_decay"})
    fused = {"capturable": True, "fused": True}
    moments = {"exp_avg": 0.0, "exp_avg_sq": 0.0}
    # A momentum of zero before the first step is what torch's first step gives, without dampening.
    momentum = {"momentum_buffer": 0.0} if s.get("momentum") else {}
    rules: dict[Any, _Rule] = {
        torch.optim.SGD: _Rule(frozenset({"lr", "momentum", "weight_decay", "nesterov"}), {}, momentum, False),
        torch.optim.Adam: _Rule(adam, fused, moments, True),
        torch.optim.AdamW: _Rule(adam, fused, moments, True),
        torch.optim.RMSprop: _Rule(
            frozenset({"lr", "alpha", "eps", "weight_decay"}), {"capturable": True}, {"square_avg": 0.0}, False
        ),
        torch.optim.Adagrad: _Rule(
            frozenset({"lr", "eps", "weight_decay", "initial_accumulator_value"}),
            {},
            {"sum": s.get("initial_accumulator_value", 0.0)},
            False,
        ),
    }
    rule = rules.get(arm.optimizer)
    if rule is None or arm.apart or not set(s) <= rule.settings or isinstance(s.get("lr"), Tensor):
        return None
    return rule


def can_stay(arms: Sequence[Arm]) -> bool:
    """Whether all arms' steps are the same kernels each time.

    Those of SGD, Adam, AdamW, RMSprop and AdaGrad are, but with settings that change the rate or the rule with time.

    Example:
        >>> from metatele.training.replicas import Arm
        >>> can_stay([Arm("Adam", torch.optim.Adam, {"lr": 1e-3})]), can_stay([Arm("NAdam", torch.optim.NAdam, {})])
        (True, False)
    """
    return all(_rule(arm) is not None for arm in arms)


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    found: list[Tensor] = optimizer.param_groups[0]["params"]
    return found


def _steps_of(optimizer: torch.optim.Optimizer) -> int:
    first = optimizer.state.get(_parameters(optimizer)[0], {})
    return int(first.get("step", 0))


def _key(arm: Arm, optimizer: torch.optim.Optimizer) -> str:
    """Arms with the same one make the same steps, so they are stepped together."""
    rule = _rule(arm)
    counted = _steps_of(optimizer) if rule is not None and rule.counted else 0
    return repr((arm.optimizer.__name__, sorted(arm.settings.items()), counted))


class _Group(NamedTuple):
    """Arms that are stepped together.

    Attributes:
        where: They in the order of the memory.
        optimizer: Of all of them.
        rule: How it steps.
    """

    where: slice
    optimizer: torch.optim.Optimizer
    rule: _Rule


class StaticSteps:
    """Steps of replicas ``[arms, seeds]``, on copies of their weights and of what their optimizers remember.

    Args:
        mlp: Shape of every network.
        loss: Of its outputs.
        images: Training samples ``[count, d]``.
        labels: Their classes.
        arms: Ways to train; :func:`can_stay`.
        optimizers: One for each.
        seeds: How many.
        batch_size: Of a step.

    Example:
        >>> from metatele.data import load_images
        >>> from metatele.perceptron.activations import LeakyReLU
        >>> from metatele.training.replicas import Arm, Replicas
        >>> arms = [Arm("SGD", torch.optim.SGD, {"lr": 0.1}), Arm("Adam", torch.optim.Adam, {"lr": 1e-3})]
        >>> shape = (load_images(), MLP((64, 16, 10), LeakyReLU(0.1)), arms, range(2))
        >>> usual, ours = (Replicas(*shape, graph=graph).train(1).train_loss[-1] for graph in (False, True))
        >>> torch.allclose(usual, ours, rtol=1e-4)
        True
    """

    def __init__(
        self,
        mlp: MLP,
        loss: Loss,
        images: Tensor,
        labels: Tensor,
        arms: Sequence[Arm],
        optimizers: Sequence[torch.optim.Optimizer],
        seeds: int,
        batch_size: int,
    ) -> None:
        self._mlp, self._loss, self._images, self._labels = mlp, loss, images, labels
        self._arms, self._batch_size, self._device = list(arms), batch_size, images.device
        self._keys = self._keys_of(optimizers)
        self._order = sorted(range(len(arms)), key=lambda a: self._keys[a])
        shape = (len(arms), seeds)
        drawn = mlp.unflatten(images.new_zeros(mlp.num_parameters))
        self._weights = Weights(
            tuple(W.new_zeros(*shape, *W.shape) for W in drawn.matrices),
            tuple(None if b is None else b.new_zeros(*shape, *b.shape) for b in drawn.biases),
        )
        self._index = torch.zeros(*shape, _STEPS * batch_size, dtype=torch.int64, device=self._device)
        self._groups: list[_Group] = []
        begin = 0
        for _, members in itertools.groupby(self._order, key=lambda a: self._keys[a]):
            together = list(members)
            self._groups.append(self._group(arms[together[0]], slice(begin, begin + len(together))))
            begin += len(together)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def _keys_of(self, optimizers: Sequence[torch.optim.Optimizer]) -> list[str]:
        return [_key(arm, optimizer) for arm, optimizer in zip(self._arms, optimizers, strict=True)]

    def fits(self, optimizers: Sequence[torch.optim.Optimizer]) -> bool:
        """Whether the arms that were stepped together still can be: one that forgets its state begins to count anew."""
        ours = self._keys_of(optimizers)
        # Equal keys as before are equal now, and others are others.
        return len(set(ours)) == len(set(self._keys)) == len(set(zip(ours, self._keys, strict=True)))

    def _tensors(self) -> list[Tensor]:
        pairs = zip(self._weights.matrices, self._weights.biases, strict=True)
        return [t for pair in pairs for t in pair if t is not None]

    def _group(self, arm: Arm, where: slice) -> _Group:
        rule = _rule(arm)
        assert rule is not None
        gpu = self._device.type == "cuda"
        parameters = [t[where] for t in self._tensors()]
        optimizer = arm.optimizer(parameters, **arm.settings, **(rule.on_gpu if gpu else {}))
        optimizer._warned_capturable_if_run_uncaptured = True  # it is run like that before it is captured
        for p in parameters:
            optimizer.state[p] = {name: torch.full_like(p, value) for name, value in rule.remembered.items()}
            if arm.optimizer is not torch.optim.SGD:
                there = p.device if gpu and rule.on_gpu else torch.device("cpu")
                optimizer.state[p]["step"] = torch.zeros((), device=there)
        return _Group(where, optimizer, rule)

    def _changed(self) -> list[Tensor]:
        """All that a step changes."""
        states = [s for g in self._groups for p in _parameters(g.optimizer) for s in g.optimizer.state[p].values()]
        return self._tensors() + states

    def load(self, tensors: Sequence[Tensor], optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Take the replicas' weights ``[seeds, arms, ...]`` and what their optimizers remember."""
        for ours, theirs in zip(self._tensors(), tensors, strict=True):
            ours.copy_(theirs[:, self._order].transpose(0, 1))
        for group in self._groups:
            for number, p in enumerate(_parameters(group.optimizer)):
                state = group.optimizer.state[p]
                for row, arm in enumerate(self._order[group.where]):
                    theirs = optimizers[arm].state.get(_parameters(optimizers[arm])[number], {})
                    for name, value in group.rule.remembered.items():
                        found = theirs.get(name)
                        state[name][row].fill_(value) if found is None else state[name][row].copy_(found)
                    if "step" in state:
                        state["step"].fill_(_steps_of(optimizers[arm]))

    def store(self, tensors: Sequence[Tensor], optimizers: Sequence[torch.optim.Optimizer], steps: int) -> None:
        """Give them back after some steps."""
        for ours, theirs in zip(self._tensors(), tensors, strict=True):
            theirs[:, self._order] = ours.transpose(0, 1)
        for group in self._groups:
            for row, arm in enumerate(self._order[group.where]):
                done = _steps_of(optimizers[arm]) + steps
                for p, q in zip(_parameters(group.optimizer), _parameters(optimizers[arm]), strict=True):
                    state = group.optimizer.state[p]
                    given = {name: state[name][row].clone() for name in group.rule.remembered}
                    if "step" in state:
                        given = {"step": torch.tensor(float(done)), **given}
                    if given:
                        optimizers[arm].state[q] = given

    @torch.no_grad()
    def _run(self, steps: int) -> None:
        """The next steps, on the samples whose numbers lie in memory."""
        for index in self._index[..., : steps * self._batch_size].split(self._batch_size, -1):
            inputs = self._images.index_select(0, index.flatten()).unflatten(0, index.shape).mT
            done = Pass(self._mlp, self._weights, inputs)
            done.backward(self._labels[index], self._loss)
            matrices, biases = done.gradient()
            gradients = [t for pair in zip(matrices, biases, strict=True) for t in pair if t is not None]
            for group in self._groups:
                for p, gradient in zip(_parameters(group.optimizer), gradients, strict=True):
                    p.grad = gradient[group.where]
                group.optimizer.step()

    def run(self, orders: Tensor) -> bool:
        """All steps of some samples in their order ``[seeds, n]``; what is left over at the end is left out.

        Returns:
            False, with nothing done, if CUDA graphs are wanted and cannot be captured.
        """
        samples, steps = _STEPS * self._batch_size, orders.shape[1] // self._batch_size
        lengths = {min(_STEPS, steps), steps % _STEPS} - {0}
        if replayable(self._device):
            for length in sorted(lengths - self._graphs.keys()):
                graph = captured(partial(self._run, length), self._changed(), before=1)
                if graph is None:
                    return False
                self._graphs[length] = graph
        for window in orders[:, : steps * self._batch_size].split(samples, 1):
            self._index[..., : window.shape[1]].copy_(window)
            length = window.shape[1] // self._batch_size
            self._graphs[length].replay() if length in self._graphs else self._run(length)
        return True
