"""What the hot paths ask the device for: on a GPU the host waits for each value it reads."""

import copy

import pytest
import torch
from asked import Asked
from cases import small_run
from torch import nn
from torch.nn import functional

import metatele
from metatele.data import load_images
from metatele.optim.moving import Paths
from metatele.optim.steppers import Situation
from metatele.perceptron.activations import LeakyReLU
from metatele.perceptron.mlp import MLP
from metatele.training.flat import FlatTrainer
from metatele.training.replicas import Arm, Replicas
from metatele.training.static import StaticWindow
from metatele.training.static_steps import StaticSteps

BETWEEN = 301  # an age after which the next looks are far


class Block(nn.Module):
    """A layer of a GPT with the shapes of one, and nothing between its positions."""

    def __init__(self, width):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(2)])
        self.packed, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.back = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        q, k, v = self.packed(self.norms[0](x)).chunk(3, -1)
        x = x + self.out(torch.tanh(q * k) * v)
        return x + self.back(functional.gelu(self.wide(self.norms[1](x))))


def gpt(width=8, depth=12, vocabulary=24):
    torch.manual_seed(0)
    blocks = [Block(width) for _ in range(depth)]
    return nn.Sequential(
        nn.Embedding(vocabulary, width), *blocks, nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
    )


def cnn():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 3)
    )


def perceptron():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 3))


def batch_of(model, seed):
    draws = torch.Generator().manual_seed(seed)
    if isinstance(model[0], nn.Embedding):
        tokens = torch.randint(24, (4, 6), generator=draws)
        return tokens, tokens.roll(1, 1)
    shape = (8, 1, 8, 8) if isinstance(model[0], nn.Conv2d) else (8, 6)
    return torch.randn(shape, generator=draws), torch.randint(3, (8,), generator=draws)


def passed(model, optimizer, seed):
    x, y = batch_of(model, seed)
    optimizer.zero_grad()
    functional.cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()


def between_looks(model):
    """An optimizer whose next steps are no looks."""
    optimizer = metatele.LearnedOptimizer(model)
    for step in range(4):
        passed(model, optimizer, step)
        optimizer.step()
    optimizer.stepper.course.age = BETWEEN
    for step in range(2):
        passed(model, optimizer, step)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("make", [perceptron, cnn, gpt])
def test_a_step_between_looks_asks_once_and_its_passes_never(make):
    model = make()
    optimizer = between_looks(model)
    with Asked() as asked:
        passed(model, optimizer, 7)
    assert asked.count == 0, asked.found
    with Asked() as asked:
        optimizer.step()
    assert asked.count == 1, asked.found
    assert next(iter(asked.found))[0] == "tolist"  # all in one transfer


def test_operations_of_a_step_do_not_grow_with_the_number_of_layers():
    """But those that copy gradients and move weights, which are two for each matrix and its bias."""
    counts = {}
    for depth in (2, 12):
        optimizer = between_looks(gpt(depth=depth))
        passed(optimizer.model, optimizer, 7)
        with Asked() as asked:
            optimizer.step()
        counts[depth] = asked.operations
    assert counts[12] - counts[2] <= 10 * 4 * 2 + 5, counts
    assert counts[12] <= 320, counts


def test_gradients_copied_in_stacks_are_those_copied_one_by_one():
    model = gpt(depth=3)
    optimizer = between_looks(model)
    passed(model, optimizer, 7)
    capture, course, stepped = optimizer.capture, optimizer.stepper.course, list(model.parameters())
    at = Situation(stepped, [1.0] * len(stepped), [0.0] * len(stepped), 1.0, 1.0, {}, {}, torch.float32)
    copied = []
    for stacks in (False, True):
        paths = Paths(course, capture.parts, capture.vectors, stacks)
        course.gradient.fill_(float("nan"))
        paths.gather(at)
        copied.append((course.gradient.clone(), paths.copies))
    torch.testing.assert_close(copied[0][0], copied[1][0], rtol=0, atol=0)
    assert copied[0][0].isfinite().all()
    assert copied[0][1] == len(stepped) == 40
    assert copied[1][1] <= 14  # kinds of layers


def test_an_optimizer_that_teleports_asks_for_nothing_of_its_own_between_moves():
    model = perceptron()
    bare = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    twin = copy.deepcopy(model)
    base = torch.optim.SGD(twin.parameters(), 0.1, momentum=0.9)
    found = []
    for network, optimizer in ((model, bare), (twin, metatele.TeleportOptimizer(base, twin, at=[100]))):
        passed(network, optimizer, 0)
        optimizer.step()
        with Asked() as asked:
            passed(network, optimizer, 1)
            optimizer.step()
        found.append(asked)
    assert found[1].count == found[0].count == 0, found[1].found
    assert found[1].operations <= found[0].operations + 4


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_window_of_meta_training_asks_for_nothing(precision):
    trainer = FlatTrainer(small_run(graph=False, precision=precision))
    window = StaticWindow(
        lambda at: trainer.differentiated(at, 2), list(trainer.optimizer.parameters()), trainer.trajectories
    )
    window(trainer.trajectories)
    with Asked() as asked:
        window(trainer.trajectories)
    assert asked.operations > 100
    # Whether all trajectories are alive is asked of a CPU alone.
    assert {line.split(":")[0] for _, line in asked.found} <= {"metatele/learned/flat/trajectories.py"}, asked.found
    assert asked.count <= 2


def test_a_window_of_replicas_asks_for_nothing():
    digits = load_images()
    arms = [
        Arm("SGD", torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
        Arm("RMSprop", torch.optim.RMSprop, {"lr": 1e-3}),
    ]
    shape = MLP((64, 8, 10), LeakyReLU(0.1), True)
    replicas = Replicas(digits, shape, arms, (3, 7), 230, 2, graph=True)
    replicas.train(1)
    data = (shape, replicas.loss, replicas.train_images, replicas.train_labels)
    static = StaticSteps(*data, arms, replicas.optimizers, seeds=2, batch_size=2)
    orders = torch.stack([torch.randperm(230) for _ in range(2)])
    assert static.run(orders)
    with Asked() as asked:
        assert static.run(orders)
    assert asked.operations > 1000
    assert asked.count == 0, asked.found
