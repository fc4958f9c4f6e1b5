"""Time of one training step of one torch model with each method, on this machine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

import metatele
from metatele.experiments.transfer.results import FLAT, OURS, PATIENT, WHITENING, RegressionTask, Task
from metatele.experiments.transfer.study import Study
from metatele.learned import ConstantOptimizer
from metatele.named import named_checkpoint
from metatele.perceptron.activations import Activation
from metatele.tasks.held_out import REGRESSIONS

_TURNS = 6  # the first one warms up
_WIDE = 400  # widths above which a turn has half the steps


def _module(activation: Activation) -> nn.Module:
    slope = getattr(activation, "slope", None)
    module: nn.Module = getattr(nn, type(activation).__name__)(*(() if slope is None else (slope,)))
    return module


class _Situation:
    """A task as a user of torch has it: a model, mini-batches, a loss."""

    def __init__(self, task: Task) -> None:
        self.widths = task.widths
        self.loss: Callable[[Tensor, Tensor], Tensor]
        if isinstance(task, RegressionTask):
            kind = REGRESSIONS[task.name]
            given = kind.sample(1, "tuning", 1)
            self.modules = [_module(f) for f in kind.mlp.activations]
            self.bias, self.loss = kind.mlp.biases[0], nn.MSELoss()
            self.batches = [(given.inputs[0].T.contiguous(), given.targets[0].T.contiguous())]
        else:
            n, (d, *_, o) = task.batch_size, task.widths
            draws = torch.Generator().manual_seed(0)
            # As compressible as images are.
            x = (torch.randn(10 * n, 40, generator=draws) @ torch.randn(40, d, generator=draws) - 3).relu()
            y = torch.randint(o, (10 * n,), generator=draws)
            self.modules, self.bias = [nn.ReLU() for _ in task.widths[2:]], True
            self.batches, self.loss = list(zip(x.split(n), y.split(n), strict=True)), nn.CrossEntropyLoss()

    def model(self) -> nn.Module:
        """A fresh one; the same weights each time."""
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(zip(self.widths, self.widths[1:], strict=False)):
            layers += [nn.Linear(a, b, self.bias), *self.modules[i : i + 1]]
        return nn.Sequential(*layers)

    def seconds(self, net: nn.Module, optimizer: Any, count: int) -> float:
        """Of so many steps: forward, backward, step."""
        begin_s = time.perf_counter()
        for step in range(count):
            x, y = self.batches[step % len(self.batches)]

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                optimizer.zero_grad()
                value = self.loss(net(x), y)
                value.backward()
                return value

            optimizer.step(closure)
        return time.perf_counter() - begin_s


def milliseconds(task: Task, learned: nn.Module, study: Study) -> dict[str, float]:
    """Of one step with each method; the least of several turns, in which all take part one after another."""
    situation = _Situation(task)
    made: dict[str, tuple[nn.Module, Any]] = {}
    for baseline in study.baselines:
        if found := task.of(baseline.name):  # not all take part in all tasks
            net = situation.model()
            made[baseline.name] = net, baseline.optimizer(net.parameters(), **found[0].settings)
    made[PATIENT] = made["Adam"]
    for method, optimizer in ((WHITENING, ConstantOptimizer(0.1, 0.01)), (OURS, cast("Any", learned))):
        net = situation.model()
        made[method] = net, metatele.LearnedOptimizer(net, optimizer)
    if task.of(FLAT):
        net = situation.model()
        made[FLAT] = net, metatele.LearnedOptimizer(net, named_checkpoint("update-tele"))
    count = 20 if max(task.widths) > _WIDE else 40
    best = dict.fromkeys(made, math.inf)
    for turn in range(_TURNS):
        for method, (net, stepper) in made.items():
            seconds = situation.seconds(net, stepper, count)
            if turn:
                best[method] = min(best[method], 1e3 * seconds / count)
    return {method: float(f"{value:.4g}") for method, value in best.items()}
