"""The fast equivariant step against the same in plain formulas, in float64."""

import math

import pytest
import torch

from metatele import checkpoint
from metatele.config import SENSES, EquivariantConfig
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


def fitting(mlp, loss, samples=60, batch_size=0, seed=0, count=1):
    random = torch.Generator().manual_seed(seed)
    X = torch.randn(count, mlp.widths[0], samples, generator=random, dtype=torch.float64)
    Y = torch.randn(count, mlp.widths[-1], samples, generator=random, dtype=torch.float64)
    w = usual_weights(mlp, count, random).double()
    return Fitting(mlp, X, Y.argmax(-2) if isinstance(loss, CrossEntropy) else Y, w, loss, batch_size)


def plainly(done, factor, b):
    """What the reference is told of a pass of one trajectory."""
    hidden = [h[b] for h in done.hidden]
    return reference.Seen(
        [W[b] for W in joined(done.weights)],
        [G[b] for G in joined(done.gradient())],
        [with_ones(h) if bias else h for h, bias in zip(hidden, done.mlp.biases, strict=True)],
        [factor * e[b] for e in done.errors],
        [z[b] for z in done.pre],
        torch.cat(list(done.hidden[0]), -1),  # a batch of several trajectories is known again by all its samples
    )


def quickly(done, factor, config):
    """What the fast step is told of it: errors may have been scaled, as a GradScaler does, gradients not."""
    seen = Observation.of(done, config.dense, config.rank)

    def uses(wanted):
        return [u if u.errors is None else u._replace(errors=u.errors.scaled(factor**2)) for u in seen.uses(wanted)]

    return seen._replace(error=factor * seen.error, uses=uses)


def compared(optimizer, problem, count, pauses=True, factor=lambda step: 1.0, change=None, tolerance=1e-10):
    """Both from the fast one's weights at every step; returns where each trajectory was shortened, and looks.

    Args:
        optimizer: Of both.
        problem: With one trajectory or more.
        count: Steps.
        pauses: Whether looks may be skipped.
        factor: By which errors are scaled at a step.
        change: Of inputs and targets at a step.
        tolerance: Relative difference of changes.
    """
    mlp, flat = problem.mlp, problem.initial
    states, memories = None, [None] * len(problem)
    shortened, looks = [[] for _ in memories], []
    for step in range(count):
        x, y = problem.batch(step) if change is None else change(step, *problem.batch(step))
        done = Pass(mlp, mlp.unflatten(flat), x)
        done.backward(y, problem.loss)
        looks += [step] if states is None or states.looks else []
        fast = optimizer.step(quickly(done, factor(step), optimizer.config), states, pauses)
        for b, memory in enumerate(memories):
            expected, memories[b] = reference.step(optimizer, plainly(done, factor(step), b), memory, pauses)
            size = sum(C.norm() for C in expected)
            assert size > 0
            for C, slow in zip(fast.changes, expected, strict=True):
                assert (C[b] - slow).norm() <= tolerance * size, (step, b, float((C[b] - slow).norm() / size))
            assert not step or bool(fast.shortened[b]) == memories[b].shortened
            assert fast.states.looks == (memories[b].age >= memories[b].until)
            shortened[b] += [step] if memories[b].shortened else []
        states, flat = fast.states, flat + mlp.flatten(parted(fast.changes, mlp.biases))
    assert bool(torch.isfinite(flat).all())
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
@pytest.mark.parametrize("loss", [MeanSquaredError(), CrossEntropy()], ids=lambda loss: loss.name)
@pytest.mark.parametrize("factor", [lambda step: 2.0**12, lambda step: 2.0 ** (16 - step // 10 + step % 3)])
def test_errors_scaled_unlike_the_gradients_are_the_reference_s(batch_size, loss, factor):
    problem = fitting(MLPS[1], loss, 120, batch_size)
    _, looks = compared(learned(), problem, 50, factor=factor, tolerance=1e-8)
    assert looks == ([*range(17), 32, 48] if batch_size else list(range(50)))


@pytest.mark.parametrize("mlp", MLPS, ids=str)
@pytest.mark.parametrize(("batch_size", "at"), [(0, (5, 6, 7, 20)), (40, (8, 9, 21, 31, 40))])
def test_shortened_steps_are_the_reference_s(mlp, batch_size, at):
    def change(step, x, y):  # now and then far away
        return x, 50.0 * y if step in at else y

    problem = fitting(mlp, MeanSquaredError(), 120, batch_size)
    (shortened,), _ = compared(learned(), problem, 60, change=change, tolerance=1e-7)
    assert set(at[:1]) <= set(shortened)
    assert len(shortened) < 30


def test_losses_that_creep_up_are_the_reference_s():
    def change(step, x, y):
        return x, y * 1.25 ** max(0, step - 5)  # less than a factor of two a step

    (shortened,), _ = compared(learned(), fitting(MLPS[1], MeanSquaredError()), 40, change=change)
    assert shortened


@pytest.mark.parametrize(
    "settings",
    [{"slow_looks": 1}, {"between": 1}, {"young": 1}, {"slow_looks": 5, "between": 2, "young": 8}, {"young_wide": 9}],
    ids=str,
)
def test_moments_and_spectra_come_when_the_settings_say_as_the_reference_s_do(settings):
    optimizer = learned(hold=2, warm=6, small=4, dense=6, rank=40, **settings)
    _, looks = compared(optimizer, fitting(MLPS[1], CrossEntropy(), 120, 40), 40)
    assert looks == [*range(7), *range(8, 40, 2)]


@pytest.mark.parametrize("sense", SENSES)
def test_what_the_controller_is_blind_to_is_the_reference_s(sense):
    compared(learned(blind=(sense,)), fitting(MLPS[1], MeanSquaredError(), 120, 40), 30)


@pytest.mark.parametrize("batch_size", [0, 20])
def test_moments_of_the_last_batch_alone_are_the_reference_s(batch_size):
    _, looks = compared(learned(averaging=0.0), fitting(MLPS[1], CrossEntropy(), 120, batch_size), 40)
    assert looks == list(range(40))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["inputs", "targets"])
@pytest.mark.parametrize(("batch_size", "at"), [(0, 9), (40, 9), (40, 31), (40, 32), (40, 37)])
@pytest.mark.parametrize("enabled", [True, False], ids=["derivatives", "none"])
def test_a_step_at_a_loss_that_is_not_finite_is_the_reference_s(bad, where, batch_size, at, enabled):
    def change(step, x, y):
        x, y = x.clone(), y.clone()
        if step == at:
            (x if where == "inputs" else y)[0, 0, 3] = bad
        return x, y

    problem = fitting(MLPS[1], MeanSquaredError(), 120, batch_size)
    with torch.set_grad_enabled(enabled):
        (shortened,), _ = compared(learned(), problem, 70, change=change, tolerance=1e-7)
    assert at in shortened or bad == math.inf  # tanh makes finite outputs of infinite inputs


@pytest.mark.parametrize("batch_size", [0, 40])
def test_steps_of_several_trajectories_are_the_reference_s_of_each(batch_size):
    def change(step, x, y):  # in one trajectory the loss leaps now and then
        return x, torch.stack([y[0], 50.0 * y[1] if step in (6, 20, 33) else y[1], y[2]])

    problem = fitting(MLPS[1], MeanSquaredError(), 120, batch_size, count=3)
    shortened, _ = compared(learned(), problem, 50, change=change, tolerance=1e-7)
    assert {6, 20, 33} <= set(shortened[1])
    assert not {20, 33} & {*shortened[0], *shortened[2]}


@pytest.mark.parametrize("loss", [MeanSquaredError(), CrossEntropy()], ids=lambda loss: loss.name)
@pytest.mark.parametrize("batch_size", [0, 24])
def test_steps_of_the_published_checkpoint_are_the_reference_s(loss, batch_size):
    published = checkpoint.load("transfer").optimizer.double()
    compared(published, fitting(MLPS[1], loss, 120, batch_size), 60, tolerance=1e-7)


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
    compared(learned(dense=40, rank=15), fitting(mlp, MeanSquaredError(), 30), 40, tolerance=1e-8)
