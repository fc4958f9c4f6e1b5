"""The fast equivariant step against the same in plain formulas, in float64."""

import pytest
import torch

from metatele.config import EquivariantConfig
from metatele.learned import EquivariantOptimizer, Observation
from metatele.learned.equivariant import reference
from metatele.learned.equivariant.observation import joined, parted
from metatele.network.bias import with_ones
from metatele.perceptron.activations import LeakyReLU, ReLU, SiLU, Tanh
from metatele.perceptron.losses import CrossEntropy, MeanSquaredError
from metatele.perceptron.mlp import MLP, Pass
from metatele.tasks.fitting import Fitting, usual_weights

MLPS = [
    MLP((5, 7, 3), LeakyReLU(0.1)),
    MLP((5, 8, 6, 3), Tanh(), True),
    MLP((4, 6, 7, 6, 5), [ReLU(), SiLU(), Tanh()], [True, False, True, True]),
]


def learned(seed=0, **settings):
    """An optimizer whose outputs depend on everything it reads."""
    optimizer = EquivariantOptimizer(EquivariantConfig(hidden=8, **settings), seed).double().requires_grad_(False)
    random = torch.Generator().manual_seed(seed)
    for p in optimizer.parameters():
        p.add_(0.1 * torch.randn(p.shape, generator=random, dtype=torch.float64))
    return optimizer


def fitting(mlp, loss, samples=60, batch_size=0, seed=0):
    random = torch.Generator().manual_seed(seed)
    X = torch.randn(1, mlp.widths[0], samples, generator=random, dtype=torch.float64)
    Y = torch.randn(1, mlp.widths[-1], samples, generator=random, dtype=torch.float64)
    w = usual_weights(mlp, 1, random).double()
    return Fitting(mlp, X, Y.argmax(-2) if isinstance(loss, CrossEntropy) else Y, w, loss, batch_size)


def plainly(done, factor):
    """What the reference is told of a pass."""
    inputs = [with_ones(h[0]) if b else h[0] for h, b in zip(done.hidden, done.mlp.biases, strict=True)]
    return reference.Seen(
        [W[0] for W in joined(done.weights)],
        [G[0] for G in joined(done.gradient())],
        inputs,
        [factor * e[0] for e in done.errors],
        [z[0] for z in done.pre],
        done.hidden[0][0],
    )


def quickly(done, factor, config):
    """What the fast step is told of it: errors may have been scaled, as a GradScaler does, gradients not."""
    seen = Observation.of(done, config.dense, config.rank)

    def uses(wanted):
        return [u if u.errors is None else u._replace(errors=u.errors.scaled(factor**2)) for u in seen.uses(wanted)]

    return seen._replace(error=factor * seen.error, uses=uses)


def compared(optimizer, problem, count, pauses=True, factor=1.0, targets=lambda step, y: y, tolerance=1e-10):
    """Both from the fast one's weights at every step; returns at which steps something was shortened, and looks."""
    mlp, flat = problem.mlp, problem.initial
    states = memory = None
    shortened, looks = [], []
    for step in range(count):
        inputs, y = problem.batch(step)
        done = Pass(mlp, mlp.unflatten(flat), inputs)
        done.backward(targets(step, y), problem.loss)
        looks += [step] if states is None or states.looks else []
        fast = optimizer.step(quickly(done, factor, optimizer.config), states, pauses)
        expected, memory = reference.step(optimizer, plainly(done, factor), memory, pauses)
        size = sum(C.norm() for C in expected)
        assert size > 0
        for change, C in zip(fast.changes, expected, strict=True):
            assert (change[0] - C).norm() <= tolerance * size, (step, float((change[0] - C).norm() / size))
        assert bool(fast.shortened) == (memory.shortened if step else bool(fast.shortened))
        assert fast.states.looks == (memory.age >= memory.until)
        shortened += [step] if memory.shortened else []
        states, flat = fast.states, flat + mlp.flatten(parted(fast.changes, mlp.biases))
    return shortened, looks


@pytest.mark.parametrize("mlp", MLPS, ids=str)
@pytest.mark.parametrize("loss", [MeanSquaredError(), CrossEntropy()], ids=lambda loss: loss.name)
def test_steps_on_whole_data_are_the_reference_s(mlp, loss):
    _, looks = compared(learned(), fitting(mlp, loss), 60)
    assert looks == list(range(60))


@pytest.mark.parametrize("mlp", MLPS, ids=str)
@pytest.mark.parametrize("pauses", [True, False])
@pytest.mark.parametrize("batch_size", [12, 40])
def test_steps_on_mini_batches_are_the_reference_s(mlp, pauses, batch_size):
    problem = fitting(mlp, CrossEntropy(), samples=120, batch_size=batch_size)
    _, looks = compared(learned(), problem, 60, pauses)
    assert looks == (list(range(60)) if not pauses else [*range(17), 32, 48])


@pytest.mark.parametrize("batch_size", [0, 40])
def test_errors_scaled_unlike_the_gradients_are_the_reference_s(batch_size):
    compared(learned(), fitting(MLPS[1], MeanSquaredError(), 120, batch_size), 30, factor=2.0**12)


@pytest.mark.parametrize("mlp", MLPS, ids=str)
@pytest.mark.parametrize(("batch_size", "at"), [(0, (5, 6, 7, 20)), (40, (8, 9, 21, 31, 40))])
def test_shortened_steps_are_the_reference_s(mlp, batch_size, at):
    def targets(step, y):  # now and then far away
        return 50.0 * y if step in at else y

    problem = fitting(mlp, MeanSquaredError(), 120, batch_size)
    shortened, _ = compared(learned(), problem, 60, targets=targets, tolerance=1e-7)
    assert set(at[:1]) <= set(shortened)
    assert len(shortened) < 30


def test_losses_that_creep_up_are_the_reference_s():
    def targets(step, y):
        return y * 1.25 ** max(0, step - 5)  # less than a factor of two a step

    shortened, _ = compared(learned(), fitting(MLPS[1], MeanSquaredError()), 40, targets=targets)
    assert shortened


@pytest.mark.parametrize("batch_size", [0, 32])
def test_a_wide_layer_of_few_directions_is_the_reference_s_but_for_what_it_leaves_out(batch_size):
    mlp, loss = MLP((160, 12, 3), Tanh(), True), CrossEntropy()
    problem = fitting(mlp, loss, 96, batch_size)
    low = torch.randn(160, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    problem.inputs.copy_(low @ problem.inputs[:, :6] + 1e-3 * problem.inputs)
    # Eigenvalues below twice their mean share one, which is that of the noise here.
    compared(learned(whole=64, whole_averaged=64), problem, 40, tolerance=2e-2)


@pytest.mark.parametrize("mlp", [MLP((90, 12, 3), Tanh(), True), MLP((6, 80, 70), LeakyReLU(0.1))], ids=str)
def test_factors_of_wide_moments_are_the_reference_s_where_they_have_a_column_for_each_sample(mlp):
    # Moments of sides wider than 40 are factors of 30 columns.
    compared(learned(dense=40, rank=40), fitting(mlp, MeanSquaredError(), 30), 40, tolerance=1e-8)
