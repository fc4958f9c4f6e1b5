"""The teleport before the first step: what it keeps, what it changes, when it is refused."""

import copy
import math

import pytest
import torch
from torch import nn

import metatele
from metatele.config import EquivariantConfig
from metatele.errors import ConfigError
from metatele.learned import EquivariantOptimizer, Opening
from metatele.learned.equivariant.spectrum import Spectrum
from metatele.perceptron.activations import LeakyReLU, ReLU, Tanh
from metatele.perceptron.mlp import MLP, Pass
from metatele.tasks.fitting import usual_weights


def uniform(mlp, samples, count=4, seed=0):
    """Weights and data as in the paper's task, in float64."""
    random = torch.Generator().manual_seed(seed)
    w = torch.rand(count, mlp.num_parameters, generator=random, dtype=torch.float64)
    return w, torch.rand(count, mlp.widths[0], samples, generator=random, dtype=torch.float64)


def participation(mlp, flat, x, layer=1):
    h = Pass(mlp, mlp.unflatten(flat), x).hidden[layer]
    return Spectrum.of(h @ h.mT / h.shape[-1]).participation


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("widths", [(12, 9, 4), (12, 12, 10, 3)])
def test_the_exact_action_keeps_the_outputs_and_evens_out_the_hidden_units(widths, bias):
    mlp = MLP(widths, LeakyReLU(0.1), bias)
    w, x = uniform(mlp, 8)
    opened = Opening(EquivariantConfig())(mlp, w, x)
    assert opened.moved.all()
    before, after = (mlp.forward(mlp.unflatten(f), x) for f in (w, opened.weights))
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)
    assert (participation(mlp, opened.weights, x) > 2 * participation(mlp, w, x)).all()
    # What no preconditioner can do: the units leave the one linear piece they all were in.
    pre = Pass(mlp, mlp.unflatten(w), x).pre[0], Pass(mlp, mlp.unflatten(opened.weights), x).pre[0]
    assert (pre[0] > 0).all()
    assert 0.1 < (pre[1] < 0).double().mean() < 0.9


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("apart", [1e-4, 1e-9, 0.0])
def test_inputs_that_are_nearly_dependent_do_not_ask_for_huge_weights(bias, apart):
    mlp = MLP((12, 12, 4), LeakyReLU(0.1), bias)
    w, x = uniform(mlp, 8)
    x[..., 1] = x[..., 0] + apart * (x[..., 1] - x[..., 0])
    opened = Opening(EquivariantConfig())(mlp, w, x)
    assert opened.moved.all()
    assert opened.weights.norm() < 30 * w.norm()  # the exact action's: in proportion to 1 / apart
    before, after = (mlp.forward(mlp.unflatten(f), x) for f in (w, opened.weights))
    assert (after - before).norm() < 0.1 * before.norm()
    assert (participation(mlp, opened.weights, x) > 2 * participation(mlp, w, x)).all()


def test_nearly_dependent_inputs_of_one_network_leave_the_others_exact():
    mlp = MLP((12, 12, 4), LeakyReLU(0.1))
    w, x = uniform(mlp, 8)
    x[2, :, 1] = x[2, :, 0] + 1e-4 * (x[2, :, 1] - x[2, :, 0])
    opened = Opening(EquivariantConfig())(mlp, w, x)
    assert opened.moved.all()
    before, after = (mlp.forward(mlp.unflatten(f), x) for f in (w, opened.weights))
    others = [0, 1, 3]
    torch.testing.assert_close(after[others], before[others], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("activation", [ReLU(), Tanh()], ids=lambda f: f.name)
def test_the_approximate_action_keeps_the_outputs_where_samples_do_not_outnumber_units(activation):
    mlp, random = MLP((6, 30, 4), activation, True), torch.Generator().manual_seed(1)
    w = usual_weights(mlp, 4, random).double()
    x = torch.randn(4, 6, 10, generator=random, dtype=torch.float64)
    opened = Opening(EquivariantConfig())(mlp, w, x)
    assert opened.moved.all()
    before, after = (mlp.forward(mlp.unflatten(f), x) for f in (w, opened.weights))
    assert (after - before).norm() < 1e-2 * before.norm()
    assert (opened.weights - w).norm() > 0.1 * w.norm()


def test_a_teleport_that_drifts_too_far_is_refused():
    mlp = MLP((6, 5, 4), Tanh())
    w, x = uniform(mlp, 40)
    free, bound = (Opening(EquivariantConfig(drift=drift))(mlp, w, x) for drift in (1e9, 1e-6))
    assert free.moved.all()
    assert not bound.moved.any()
    assert torch.equal(bound.weights, w)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_network_that_is_not_finite_stays_and_leaves_the_others_alone(bad):
    mlp = MLP((12, 9, 4), LeakyReLU(0.1))
    w, x = uniform(mlp, 8)
    expected = Opening(EquivariantConfig())(mlp, w, x)
    w[1, 3] = bad
    found = Opening(EquivariantConfig())(mlp, w, x)
    assert not found.moved[1]
    torch.testing.assert_close(found.weights[[0, 2, 3]], expected.weights[[0, 2, 3]])


# --- as the first step of a torch optimizer


def model_and_data(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 9), nn.LeakyReLU(0.1), nn.Linear(9, 4)).double()
    for p in model.parameters():
        nn.init.uniform_(p)
    return model, torch.rand(8, 12).double(), torch.rand(8, 4).double()


def learned(**settings):
    return EquivariantOptimizer(EquivariantConfig(hidden=8, **settings)).double()


def step(model, optimizer, x, y):
    optimizer.zero_grad()
    nn.functional.mse_loss(model(x), y).backward()
    optimizer.step()


def test_the_first_step_keeps_the_loss_and_the_next_ones_lower_it():
    model, x, y = model_and_data()
    optimizer, outputs = metatele.LearnedOptimizer(model, learned()), model(x).detach()
    begin = [p.detach().clone() for p in model.parameters()]
    step(model, optimizer, x, y)
    torch.testing.assert_close(model(x), outputs, rtol=1e-6, atol=1e-6)
    moved = [not torch.equal(p, b) for p, b in zip(model.parameters(), begin, strict=True)]
    assert moved == [True, True, True, False]  # the symmetry does not touch the last bias
    assert optimizer.param_groups[0]["rolled_back"] == 0
    for _ in range(3):
        step(model, optimizer, x, y)
    assert nn.functional.mse_loss(model(x), y) < nn.functional.mse_loss(outputs, y)


def test_a_refused_teleport_is_counted():
    model, x, y = model_and_data()
    optimizer = metatele.LearnedOptimizer(model, learned(drift=0.0))
    begin = [p.detach().clone() for p in model.parameters()]
    step(model, optimizer, x, y)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), begin, strict=True))
    assert optimizer.param_groups[0]["rolled_back"] == 1


@pytest.mark.parametrize("how", ["lr", "frozen"])
def test_a_network_that_moves_only_in_part_is_not_teleported(how):
    model, x, y = model_and_data()
    if how == "frozen":
        model[0].bias.requires_grad_(False)
    optimizer = metatele.LearnedOptimizer(model, learned(), lr=0.5 if how == "lr" else 1.0)
    plain, twin = metatele.LearnedOptimizer, copy.deepcopy(model)
    other = plain(twin, learned(opening=False), lr=0.5 if how == "lr" else 1.0)
    step(model, optimizer, x, y)
    step(twin, other, x, y)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_run_stopped_after_the_teleport_goes_on_to_the_same_bits():
    model, x, y = model_and_data()
    optimizer = metatele.LearnedOptimizer(model, learned())
    step(model, optimizer, x, y)
    twin = copy.deepcopy(model)
    again = metatele.LearnedOptimizer(twin, learned())
    again.load_state_dict(optimizer.state_dict())
    for _ in range(3):
        step(model, optimizer, x, y)
        step(twin, again, x, y)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_settings_out_of_range_are_one_sentence():
    with pytest.raises(ConfigError, match="drift must be zero or positive"):
        EquivariantConfig(drift=-1.0)
    with pytest.raises(ConfigError, match="blind must be among slopes"):
        EquivariantConfig(blind=("everything",))
