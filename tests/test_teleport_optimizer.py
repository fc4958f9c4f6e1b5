"""Teleportation around any optimizer: drop-in, bit for bit where it has nothing to do."""

import copy
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn.utils import prune

import metatele
from metatele.errors import ConfigError, MetateleError, NotExactError, ShapeMismatchError, UnsupportedModelError
from metatele.geometry import GradientNorm
from metatele.optim.state import metric_of
from metatele.optim.teleport import batch_landscape
from metatele.teleport import Ascent
from metatele.teleport.ascent import USUAL_CHANGE

# Every optimizer of torch.optim that takes dense gradients, with settings under which its state is at work.
OPTIMIZERS = {
    "SGD": {"lr": 0.01},
    "SGD momentum": {"lr": 0.01, "momentum": 0.9},
    "SGD nesterov": {"lr": 0.01, "momentum": 0.9, "nesterov": True},
    "ASGD": {"lr": 0.01},
    "Adadelta": {},
    "Adafactor": {"lr": 0.01},
    "Adagrad": {"lr": 0.01},
    "Adam": {"lr": 0.01},
    "Adam amsgrad": {"lr": 0.01, "amsgrad": True},
    "AdamW": {"lr": 0.01},
    "Adamax": {"lr": 0.01},
    "LBFGS": {"lr": 0.1, "max_iter": 3},
    "Muon": {"lr": 0.01},
    "NAdam": {"lr": 0.01},
    "RAdam": {"lr": 0.01},
    "RMSprop": {"lr": 0.01},
    "RMSprop centered": {"lr": 0.01, "centered": True, "momentum": 0.9},
    "Rprop": {"lr": 0.01},
}
OPTIMIZERS = {name: settings for name, settings in OPTIMIZERS.items() if hasattr(torch.optim, name.split()[0])}


def make(name="Adam", dtype=torch.float32, bias=True, seed=0):
    torch.manual_seed(seed)
    bias = bias and name != "Muon"  # it takes matrices only
    model = nn.Sequential(
        nn.Linear(8, 6, bias), nn.LeakyReLU(0.1), nn.Linear(6, 5, bias), nn.LeakyReLU(0.1), nn.Linear(5, 3, bias)
    ).to(dtype)
    base = getattr(torch.optim, name.split()[0])(model.parameters(), **OPTIMIZERS[name])
    x, y = torch.randn(5, 8, dtype=dtype), torch.randn(5, 3, dtype=dtype)
    return model, base, x, y


def train(model, optimizer, x, y, steps, losses=None):
    for _ in range(steps):

        def closure():
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            return loss

        loss = optimizer.step(closure)
        if losses is not None:
            losses.append(float(loss.detach()))


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_every_optimizer_of_torch_is_here():
    known = {name.split()[0] for name in OPTIMIZERS} | {"SparseAdam", "Optimizer"}
    found = {n for n in dir(torch.optim) if isinstance(getattr(torch.optim, n), type)}
    assert found - known <= {"Adafactor", "Muon"}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("due", ["never", "closure", "plain"])
def test_where_no_teleport_is_due_it_is_the_bare_optimizer_bit_for_bit(name, dtype, due):
    model, base, x, y = make(name, dtype)
    twin, wrapped_base, _, _ = make(name, dtype)
    wrapped = metatele.TeleportOptimizer(wrapped_base, twin, at=[] if due == "never" else [10**6])
    if due == "plain" and name != "LBFGS":
        for _ in range(6):
            for m, o in ((model, base), (twin, wrapped)):
                o.zero_grad()
                nn.functional.mse_loss(m(x), y).backward()
                o.step()
    else:
        train(model, base, x, y, 6)
        train(twin, wrapped, x, y, 6)
    assert torch.equal(flat(model), flat(twin))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        for key, value in base.state[p].items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, wrapped.state[q][key])


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("strategy", ["keep", "reset", "transport"])
def test_a_teleport_moves_the_weights_and_keeps_the_loss(name, dtype, strategy):
    model, base, x, y = make(name, dtype)
    bare_model, bare, _, _ = make(name, dtype)
    move = metatele.GradientNormAscent(rate="normalised", action="auto", radius=0.05, steps=2)
    optimizer = metatele.TeleportOptimizer(base, model, move, at=[2], state=strategy)
    train(model, optimizer, x, y, 3)
    train(bare_model, bare, x, y, 3)
    assert optimizer.param_groups[0]["teleports"] == 1
    assert optimizer.param_groups[0]["teleports_rolled_back"] == 0
    assert float((flat(model) - flat(bare_model)).abs().max()) > 1e-3
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(model(x), bare_model(x), rtol=tolerance, atol=tolerance)
    if strategy == "reset":  # as a new one: AdaGrad makes its state when it is made
        fresh = type(base)(model.parameters(), **OPTIMIZERS[name])
        assert {p for p, entry in base.state.items() if entry} == {p for p, entry in fresh.state.items() if entry}
        for p, entry in fresh.state.items():
            assert all(torch.equal(base.state[p][key], value) for key, value in entry.items())
    elif strategy == "keep":
        for p, q in zip(model.parameters(), bare_model.parameters(), strict=True):
            for key, value in bare.state[q].items():
                if isinstance(value, torch.Tensor):
                    assert torch.equal(value, optimizer.state[p][key])
    losses = []
    train(model, optimizer, x, y, 20, losses)
    assert all(math.isfinite(loss) for loss in losses)


def test_transported_momentum_moves_the_outputs_as_before():
    """In the first order a step along the carried momentum changes the outputs as it did before."""
    model, base, x, y = make("SGD momentum", torch.float64)
    optimizer = metatele.TeleportOptimizer(
        base,
        model,
        metatele.GradientNormAscent(rate="normalised", action="auto", radius=0.1, steps=3),
        at=[5],
        state="transport",
    )
    bare_model, bare, _, _ = make("SGD momentum", torch.float64)
    train(model, optimizer, x, y, 6)
    train(bare_model, bare, x, y, 6)
    changes = []
    for m, o in ((model, optimizer), (bare_model, bare)):
        before = m(x).detach()
        with torch.no_grad():
            for p in m.parameters():
                p.add_(o.state[p]["momentum_buffer"], alpha=-1e-6)
        changes.append((m(x).detach() - before) / 1e-6)
    torch.testing.assert_close(*changes, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["Adam", "Adam amsgrad", "RMSprop centered", "Adagrad", "Adamax"])
def test_a_rescaling_carries_second_moments_to_those_of_the_rescaled_gradients(name):
    """In the new coordinates w' = s w gradients are ∇/s: a past in those has these averages."""
    states = []
    for strategy in ("transport", "keep"):
        model, base, x, y = make(name, torch.float64)
        move = metatele.Rescaling(radius=0.5)
        optimizer = metatele.TeleportOptimizer(base, model, move, at=[4], state=strategy)
        train(model, optimizer, x, y, 4)
        before = [p.detach().clone() for p in model.parameters()]
        rate, base.param_groups[0]["lr"] = base.param_groups[0]["lr"], 1e-12  # a step that hardly moves
        train(model, optimizer, x, y, 1)
        base.param_groups[0]["lr"] = rate
        scales = [p.detach() / b for p, b in zip(model.parameters(), before, strict=True)]
        states.append([dict(base.state[p]) for p in model.parameters()])
    powers = {"exp_avg_sq": 2, "max_exp_avg_sq": 2, "square_avg": 2, "sum": 2, "grad_avg": 1, "exp_inf": 1}
    compared = 0
    for carried, kept, scale in zip(*states, scales, strict=True):
        for key, power in powers.items():
            if key in kept:
                torch.testing.assert_close(carried[key], kept[key] / scale**power, rtol=1e-5, atol=0)
                compared += 1
    assert compared >= 6


@pytest.mark.parametrize("name", ["Adam", "AdamW", "NAdam", "RAdam", "Adamax"])
@pytest.mark.parametrize("action", ["approximate", "rescaling"])
def test_a_carried_first_moment_steps_no_further_than_the_one_before(name, action):
    """Dead units have second moments near zero: what the differential mixes into them must not become a step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 5))
    with torch.no_grad():
        model[0].bias[:8] -= 3  # dead or nearly so
    x, y = torch.randn(64, 20), torch.randint(5, (64,))
    base = getattr(torch.optim, name)(model.parameters(), lr=1e-3)
    move = metatele.GradientNormAscent(rate="normalised", radius=0.1, steps=3, action=action, max_drift=0.5)
    optimizer = metatele.TeleportOptimizer(base, model, move, at=[15], state="transport")

    def largest():
        sizes = []
        for p in model.parameters():
            entry = base.state[p]
            size = entry["exp_avg_sq"].sqrt() if "exp_avg_sq" in entry else entry["exp_inf"]
            sizes.append(float((entry["exp_avg"].abs() / size.clamp_min(1e-30)).max()))
        return sizes

    for step in range(16):
        if step == 15:
            bare_model, bare = copy.deepcopy((model, base))
            bare.zero_grad()
            nn.functional.cross_entropy(bare_model(x), y).backward()
            bare.step()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert optimizer.report.moved
    after = largest()
    model, base = bare_model, bare
    assert all(now <= then * (1 + 1e-4) for now, then in zip(after, largest(), strict=True))


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("Adagrad", lambda s, _: 1 / (s["sum"].sqrt() + 1e-10)),
        ("RMSprop", lambda s, _: 1 / (s["square_avg"].sqrt() + 1e-8)),
        ("RMSprop centered", lambda s, _: 1 / ((s["square_avg"] - s["grad_avg"] ** 2).sqrt() + 1e-8)),
        ("Adam amsgrad", lambda s, t: 1 / ((s["max_exp_avg_sq"] / (1 - 0.999**t)).sqrt() + 1e-8)),
        ("Adam", lambda s, t: 1 / ((s["exp_avg_sq"] / (1 - 0.999**t)).sqrt() + 1e-8)),
    ],
)
def test_metric_is_read_from_the_optimizer_s_real_state(name, formula):
    model, base, x, y = make(name, torch.float64)
    train(model, base, x, y, 3)
    parameters = list(model.parameters())
    expected = torch.cat([formula(base.state[p], 3).flatten() for p in parameters])
    torch.testing.assert_close(metric_of(base, parameters), expected)
    optimizer = metatele.TeleportOptimizer(base, model, metatele.GradientNormAscent(), at=[0], metric="adaptive")
    train(model, optimizer, x, y, 1)
    assert float(optimizer.report.objective_after) > float(optimizer.report.objective_before)
    model, base, x, y = make("SGD momentum")
    with pytest.raises(ConfigError, match="not for SGD"):
        metatele.TeleportOptimizer(base, model, at=[0], metric="adaptive")


# --- a drop-in torch.optim.Optimizer


def test_schedulers_and_scaler_work():
    for schedule in (
        lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.1),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    ):
        model, base, x, y = make()
        optimizer = metatele.TeleportOptimizer(base, model, every=2)
        scheduler = schedule(optimizer)
        for _ in range(4):
            train(model, optimizer, x, y, 1)
            scheduler.step()
        assert base.param_groups[0]["lr"] != 0.01
        assert optimizer.param_groups[0]["teleports"] == 2
    model, base, x, y = make()
    optimizer = metatele.TeleportOptimizer(base, model, at=[0])
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(nn.functional.mse_loss(model(x), y)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert optimizer.param_groups[0]["teleports"] == 1


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_and_pickles_go_on_together(duplicate):
    model, base, x, y = make()
    optimizer = metatele.TeleportOptimizer(base, model, every=2)
    train(model, optimizer, x, y, 3)
    twin_model, twin = duplicate((model, optimizer))
    train(model, optimizer, x, y, 3)
    train(twin_model, twin, x, y, 3)
    assert torch.equal(flat(model), flat(twin_model))
    assert twin.param_groups[0]["teleports"] == optimizer.param_groups[0]["teleports"] == 3
    assert twin.base.param_groups[0]["params"][0] is next(twin_model.parameters())


def test_saved_state_goes_on_to_the_same_bits_and_bare_state_is_taken():
    model, base, x, y = make()
    optimizer = metatele.TeleportOptimizer(base, model, every=2)
    train(model, optimizer, x, y, 3)
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    unchanged = copy.deepcopy(saved)
    train(model, optimizer, x, y, 3)
    for _ in range(2):  # twice from one dictionary
        other_model, other_base, _, _ = make(seed=1)
        other = metatele.TeleportOptimizer(other_base, other_model, every=2)
        other_model.load_state_dict(weights)
        other.load_state_dict(saved)
        train(other_model, other, x, y, 3)
        assert torch.equal(flat(model), flat(other_model))
    assert str(saved) == str(unchanged)
    bare_model, bare, _, _ = make()
    train(bare_model, bare, x, y, 1)
    other.load_state_dict(bare.state_dict())
    train(other_model, other, x, y, 1)


def test_no_gradient_or_no_rate_means_no_teleport():
    model, base, x, y = make()
    optimizer = metatele.TeleportOptimizer(base, model, every=1)
    optimizer.step()
    assert optimizer.param_groups[0]["teleport_steps"] == 0
    for lr in (0.0, torch.tensor(0.0)):
        optimizer.param_groups[0]["lr"] = lr
        before = flat(model)
        train(model, optimizer, x, y, 1)
        assert torch.equal(flat(model), before)
        assert optimizer.param_groups[0]["teleports"] == 0


def test_groups_can_be_added_and_layers_out_of_them_stay():
    model, _, x, y = make()
    base = torch.optim.SGD(model[0].parameters(), lr=0.01)
    optimizer = metatele.TeleportOptimizer(base, model, every=1)
    others = [p.detach().clone() for p in (*model[2].parameters(), *model[4].parameters())]
    train(model, optimizer, x, y, 2)
    assert all(torch.equal(p, q) for p, q in zip((*model[2].parameters(), *model[4].parameters()), others, strict=True))
    assert optimizer.param_groups[0]["teleports"] == 0  # no pair of layers is free
    optimizer.add_param_group({"params": [*model[2].parameters(), *model[4].parameters()], "lr": 0.01})
    train(model, optimizer, x, y, 1)
    assert optimizer.param_groups[0]["teleports"] == 1


def test_frozen_layers_are_left_alone():
    model, base, x, y = make()
    model[4].requires_grad_(False)
    frozen = flat(model[4])
    optimizer = metatele.TeleportOptimizer(base, model, at=[0])
    train(model, optimizer, x, y, 1)
    assert torch.equal(flat(model[4]), frozen)
    assert optimizer.param_groups[0]["teleports"] == 1
    before = model(x).detach()
    last = flat(model[4])
    metatele.teleport_(model, x, y, nn.functional.mse_loss, action="exact")
    assert torch.equal(flat(model[4]), last)
    torch.testing.assert_close(model(x).detach(), before, rtol=1e-4, atol=1e-5)


def test_sparse_free_and_foreign_parameters():
    model, base, x, _ = make()
    stranger = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="does not belong to the model"):
        metatele.TeleportOptimizer(torch.optim.SGD([stranger], lr=0.1), model, at=[0])
    model(x).sum().backward()  # before anybody listens
    optimizer = metatele.TeleportOptimizer(base, model, at=[0])
    with pytest.raises(MetateleError, match="a teleport needs the layer inputs, and no"):
        optimizer.step()


# --- models and batches


def test_images_are_flattened_and_ends_belong_to_the_loss():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(12, 7), nn.Tanh()), nn.Linear(7, 4), nn.LogSoftmax(-1))
    x, y = torch.randn(9, 3, 4), torch.randint(4, (9,))
    before = model(x).detach()
    report = metatele.teleport_(model, x, y, nn.functional.nll_loss, action="auto", whole_data=True)
    assert float(report.loss_before) == pytest.approx(float(nn.functional.nll_loss(before, y)), rel=1e-6)
    assert float(report.objective_after) > float(report.objective_before)
    torch.testing.assert_close(model(x).detach(), before, rtol=1e-3, atol=1e-4)
    optimizer = metatele.TeleportOptimizer(torch.optim.Adam(model.parameters()), model, at=[0])
    nn.functional.nll_loss(model(x), y).backward()
    optimizer.step()
    assert float(optimizer.report.objective_after) > float(optimizer.report.objective_before)


def test_batches_of_one_s_own_are_teleported_on_in_a_row():
    model, base, x, y = make(dtype=torch.float64)
    data = [(torch.randn(5, 8).double(), torch.randn(5, 3).double()) for _ in range(3)]
    move = Ascent(max_change=USUAL_CHANGE)
    optimizer = metatele.TeleportOptimizer(
        base, model, move, at=[0], batches=lambda: data, loss_fn=nn.functional.mse_loss
    )
    train(model, optimizer, x, y, 1)
    bare_model, bare, _, _ = make(dtype=torch.float64)
    train(bare_model, bare, x, y, 1)
    for inputs, targets in data:
        metatele.teleport_(bare_model, inputs, targets, nn.functional.mse_loss, action="approximate")
    torch.testing.assert_close(flat(model), flat(bare_model))
    assert optimizer.param_groups[0]["teleports"] == 3


def test_accumulated_passes_are_teleported_on_together():
    model, base, x, y = make(dtype=torch.float64)
    optimizer = metatele.TeleportOptimizer(base, model, at=[0])
    (nn.functional.mse_loss(model(x[:2]), y[:2], reduction="sum") / y.numel()).backward()
    with torch.no_grad():
        model(torch.randn(7, 8).double())  # an evaluation in between
    (nn.functional.mse_loss(model(x[2:]), y[2:], reduction="sum") / y.numel()).backward()
    optimizer.step()
    other, other_base, _, _ = make(dtype=torch.float64)
    train(other, metatele.TeleportOptimizer(other_base, other, at=[0]), x, y, 1)
    torch.testing.assert_close(flat(model), flat(other), rtol=1e-6, atol=1e-8)


def test_teleport_is_what_the_mathematics_says():
    model, _, x, y = make(dtype=torch.float64)
    landscape = batch_landscape(model, x, y, nn.functional.mse_loss)
    move = Ascent(objective=GradientNorm(), steps=4, max_change=USUAL_CHANGE)
    expected = move(landscape, flat(model)).weights
    report = metatele.teleport_(model, x, y, nn.functional.mse_loss, steps=4, action="approximate")
    torch.testing.assert_close(flat(model), expected)
    loss = nn.functional.mse_loss(model(x), y)
    gradient = torch.autograd.grad(loss, list(model.parameters()))
    assert float(report.objective_after) == pytest.approx(sum(float(g.square().sum()) for g in gradient), rel=1e-9)
    assert float(report.loss_after) == pytest.approx(float(loss.detach()), rel=1e-12)


# --- conjugation


def test_conjugated_gradient_descent_is_preconditioned_by_the_inputs_second_moments():
    model, _, x, y = make(dtype=torch.float64)
    start = [p.detach().clone() for p in model.parameters()]
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    whitening = metatele.Whitening(mode="conjugate", damping=1e-2, inputs=True, averaging=0.0)
    optimizer = metatele.TeleportOptimizer(base, model, whitening)
    loss = nn.functional.mse_loss(model(x), y)
    gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    loss.backward()
    optimizer.step()
    h, inside, names = x, 0.0, iter(zip(start, gradients, model.parameters(), strict=True))
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for p, s in zip(reference.parameters(), start, strict=True):
            p.copy_(s)
        for layer in (0, 2, 4):
            (W, dW, new_W), (_b, db, _new_b) = next(names), next(names)
            ones = torch.cat([h, torch.ones(5, 1).double()], 1)
            S = ones.T @ ones / 5
            damped = S + 1e-2 * torch.linalg.eigvalsh(S)[-1] * torch.eye(len(S)).double()
            joined = torch.cat([dW, db[:, None]], 1) @ torch.linalg.inv(damped)
            torch.testing.assert_close(new_W.detach(), W - 0.1 * joined[:, :-1], rtol=1e-5, atol=1e-6)
            h = reference[layer](h)
            h = nn.functional.leaky_relu(h, 0.1)
            change = torch.cat([dW, db[:, None]], 1)
            inside += float((joined * change).sum())
    assert float(optimizer.report.objective_before) == pytest.approx(sum(float(g.square().sum()) for g in gradients))
    assert float(optimizer.report.objective_after) == pytest.approx(inside, rel=1e-4)
    assert float(optimizer.report.drift) == 0


def test_conjugation_solves_what_plain_descent_cannot():
    random = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, 20, 20, generator=random, dtype=torch.float64)
    results = []
    for conjugate in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 20, False), nn.LeakyReLU(0.1), nn.Linear(20, 20, False))
        model.double()[0].requires_grad_(False)
        base = torch.optim.SGD(model[2].parameters(), lr=1 / 20 if conjugate else 0.01)
        optimizer = base
        if conjugate:
            move = metatele.Whitening(mode="conjugate", averaging=0.0, damping=1e-8)
            optimizer = metatele.TeleportOptimizer(base, model, move)
        for _ in range(50):
            optimizer.zero_grad()
            loss = 0.5 * (model(x) - y).square().sum()
            loss.backward()
            optimizer.step()
        results.append(float(loss.detach()))
    assert results[1] < 0.01 * results[0]


# --- what cannot be done


def test_settings_and_models_that_cannot_be_are_one_clear_error():
    model, base, _, _ = make()
    build = metatele.TeleportOptimizer
    for settings, words in (
        ({}, "either at or every"),
        ({"at": [0], "every": 2}, "either at or every"),
        ({"every": 0}, "every must be a whole number"),
        ({"at": [0], "state": "forget"}, "state must be one of"),
        ({"at": [0], "metric": "fisher"}, "metric must be"),
        ({"at": [0], "metric": "adaptive", "teleport": metatele.Random()}, "needs an ascent"),
        ({"at": [0], "loss_fn": nn.functional.mse_loss}, "belong together"),
    ):
        with pytest.raises(ConfigError, match=words):
            build(base, model, **settings)
    with pytest.raises(TypeError, match="base must be"):
        build(model, base, at=[0])
    with pytest.raises(TypeError, match="teleport must be"):
        build(base, model, "ascent", at=[0])
    with pytest.raises(ConfigError, match="LBFGS"):
        build(torch.optim.LBFGS(model.parameters()), model, metatele.Whitening(mode="conjugate"))
    with pytest.raises(ShapeMismatchError, match="8 features"):
        metatele.teleport_(model, torch.randn(5, 7), torch.randn(5, 3), nn.functional.mse_loss)
    with pytest.raises(ShapeMismatchError, match="scalar"):
        metatele.teleport_(
            model, torch.randn(5, 8), torch.randn(5, 3), lambda a, b: nn.functional.mse_loss(a, b, reduction="none")
        )
    with pytest.raises(ConfigError, match="objective must be one of"):
        metatele.teleport_(model, torch.randn(5, 8), torch.randn(5, 3), nn.functional.mse_loss, "speed")


def test_hooks_do_not_outlive_the_optimizer():
    model, base, x, _ = make()
    for _ in range(3):
        optimizer = metatele.TeleportOptimizer(base, model, at=[0])
        model(x).sum().backward()
        assert len(model[0]._forward_hooks) == len(model[4]._forward_hooks) == 1
    del optimizer
    assert list(itertools.chain(model[0]._forward_hooks, model[4]._forward_hooks)) == []


# --- what a review found


def test_a_scaled_gradient_is_seen_as_the_optimizer_sees_it():
    reports = []
    for scale in (1.0, 65536.0):
        model, base, x, y = make("SGD", torch.float64)
        move = metatele.GradientNormAscent(1e-3, max_drift=0.5)
        optimizer = metatele.TeleportOptimizer(base, model, move, at=[0])
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(nn.functional.mse_loss(model(x), y)).backward()
        scaler.step(optimizer)
        reports.append(optimizer.report)
    torch.testing.assert_close(reports[0].objective_after, reports[1].objective_after, rtol=1e-9, atol=0)
    assert reports[0].loss_before is None


def test_several_backward_passes_through_one_forward_pass_count_once():
    model, base, x, y = make(dtype=torch.float64)
    optimizer = metatele.TeleportOptimizer(base, model, at=[0])
    outputs = model(x)
    (0.25 * nn.functional.mse_loss(outputs, y)).backward(retain_graph=True)
    (0.75 * nn.functional.mse_loss(outputs, y)).backward()
    optimizer.step()
    other, other_base, _, _ = make(dtype=torch.float64)
    train(other, metatele.TeleportOptimizer(other_base, other, at=[0]), x, y, 1)
    torch.testing.assert_close(flat(model), flat(other), rtol=1e-7, atol=1e-9)


def test_sequences_and_single_samples_are_rows_of_one_batch():
    model, _, x, y = make(dtype=torch.float64)
    twin, _, _, _ = make(dtype=torch.float64)
    metatele.teleport_(model, x, y, nn.functional.mse_loss)
    report = metatele.teleport_(twin, x[:, None], y[:, None], nn.functional.mse_loss)
    torch.testing.assert_close(flat(model), flat(twin))
    expected = nn.functional.mse_loss(make(dtype=torch.float64)[0](x), y).detach()
    assert float(report.loss_before) == pytest.approx(float(expected))
    model, base, x, y = make()
    optimizer = metatele.TeleportOptimizer(base, model, at=[0])
    nn.functional.mse_loss(model(x[0]), y[0]).backward()
    optimizer.step()
    assert optimizer.param_groups[0]["teleports"] == 1


def test_half_precision_models_are_teleported_in_single():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.LeakyReLU(0.1), nn.Linear(6, 3)).bfloat16()
    x, y = torch.randn(5, 8).bfloat16(), torch.randn(5, 3).bfloat16()
    before, single = flat(model), copy.deepcopy(model).float()
    report = metatele.teleport_(model, x, y, lambda a, b: nn.functional.mse_loss(a.float(), b.float()))
    assert float(report.objective_after) > 1.5 * float(report.objective_before)
    assert not torch.equal(flat(model), before)
    # The drift is that of the weights as they are stored.
    old, new = (float(nn.functional.mse_loss(m(x.float()), y.float())) for m in (single, model.float()))
    assert float(report.drift) == pytest.approx(abs(new - old) / old, rel=1e-3)
    assert 1e-5 < float(report.drift) <= 0.01


def test_what_cannot_be_teleported_on_is_skipped_and_the_loop_goes_on():
    for move in (None, metatele.Whitening(), metatele.Whitening(mode="conjugate")):
        model, base, x, y = make("SGD")
        optimizer = metatele.TeleportOptimizer(base, model, move, every=1)
        nn.functional.mse_loss(model(x[:0]), y[:0], reduction="sum").backward()
        optimizer.step()
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x * float("nan")), y).backward()
        optimizer.step()
        assert optimizer.param_groups[0]["teleport_steps"] == 2
        assert optimizer.param_groups[0]["teleports"] == 0


def test_input_buffers_may_be_used_again_and_cleared_passes_are_forgotten():
    reports = []
    for reused in (False, True):
        model, base, x, y = make(dtype=torch.float64)
        optimizer = metatele.TeleportOptimizer(base, model, at=[0])
        if reused:
            nn.functional.mse_loss(model(x + 1), y).backward()
            model.zero_grad(set_to_none=False)  # skipped
        buffer = torch.empty(2, 8, dtype=torch.float64)
        for part in (slice(0, 2), slice(2, 4)):
            buffer.copy_(x[part])
            nn.functional.mse_loss(model(buffer if reused else x[part]), y[part]).backward()
        optimizer.step()
        reports.append(optimizer.report)
    assert reports[0].objective_after == reports[1].objective_after
    assert reports[0].moved


def test_conjugation_goes_on_after_saving_and_loading():
    def step(model, optimizer, k):
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(k))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    move = metatele.Whitening(mode="conjugate", inputs=True, refresh=2)
    model, base, _, _ = make()
    optimizer = metatele.TeleportOptimizer(base, model, move)
    for k in range(5):
        step(model, optimizer, k)
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    twin_model, twin_base, _, _ = make(seed=1)
    twin = metatele.TeleportOptimizer(twin_base, twin_model, move)
    twin_model.load_state_dict(weights)
    twin.load_state_dict(saved)
    for k in range(5, 10):
        step(model, optimizer, k)
        step(twin_model, twin, k)
    assert torch.equal(flat(model), flat(twin_model))


def test_tied_activations_and_computed_weights_are_seen():
    tanh = nn.Tanh()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), tanh, nn.Linear(6, 3), tanh)
    x, y = torch.randn(5, 8), torch.randn(5, 3)
    expected = float(nn.functional.mse_loss(model(x), y).detach())
    assert float(metatele.teleport_(model, x, y, nn.functional.mse_loss).loss_before) == pytest.approx(expected)
    pruned = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    prune.l1_unstructured(pruned[0], "weight", amount=0.5)
    with pytest.raises(UnsupportedModelError, match="no continuous symmetry"):
        metatele.teleport_(pruned, torch.randn(3, 4), torch.randn(3, 4), nn.functional.mse_loss)


def test_more_wrong_arguments_are_one_clear_error():
    model, base, x, y = make()
    conjugate = metatele.Whitening(mode="conjugate")
    for settings, words in (
        ({"at": 0}, "collection of steps"),
        ({"at": [-1]}, "whole numbers, zero or more"),
        ({"every": 2.5}, "whole number"),
        ({"every": "2"}, "whole number"),
        ({"teleport": conjugate, "batches": list, "loss_fn": nn.functional.mse_loss}, "takes no batches"),
    ):
        with pytest.raises(ConfigError, match=words):
            metatele.TeleportOptimizer(base, model, **settings)
    with pytest.raises(TypeError, match="unexpected keyword argument 'speed'"):
        metatele.teleport_(model, x, y, nn.functional.mse_loss, speed=3)
    tanh = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    with pytest.raises(NotExactError, match="positively homogeneous"):
        metatele.TeleportOptimizer(torch.optim.SGD(tanh.parameters(), lr=0.1), tanh, metatele.Rescaling(), at=[0])


# --- passes that are not the step's


def report_of(before_step, steps=1):
    """Report of a teleport in a step before which something else was done with the model."""
    model, base, x, y = make("SGD", torch.float64)
    optimizer = metatele.TeleportOptimizer(base, model, every=1)
    random = torch.Generator().manual_seed(5)
    others = torch.randn(7, 8, generator=random, dtype=torch.float64)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        before_step(model, others)
        optimizer.step()
    return optimizer.report


def per_sample(model, others):
    parameters = dict(model.named_parameters())

    def loss(weights, sample):
        return torch.func.functional_call(model, weights, (sample[None],)).square().sum()

    torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, others)


@pytest.mark.parametrize(
    "between",
    [
        lambda model, others: torch.autograd.grad(model(others).square().sum(), list(model.parameters())),
        lambda model, others: torch.autograd.grad(model(o := others.requires_grad_()).sum(), o),
        lambda model, others: model(others),
        per_sample,
    ],
    ids=["autograd.grad", "input gradients", "abandoned", "torch.func"],
)
def test_only_accumulated_passes_are_teleported_on(between):
    alone, report = report_of(lambda *_: None, 2), report_of(between, 2)
    for name in ("objective_before", "objective_after", "drift"):
        assert getattr(alone, name) == getattr(report, name)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_passes_count_once(reentrant):
    reports = []
    for run in (False, True):
        model, base, x, y = make("SGD", torch.float64)
        optimizer = metatele.TeleportOptimizer(base, model, every=1)
        for _ in range(2):
            optimizer.zero_grad()
            inputs = x.clone().requires_grad_(run)
            outputs = (
                torch.utils.checkpoint.checkpoint(model, inputs, use_reentrant=reentrant) if run else model(inputs)
            )
            nn.functional.mse_loss(outputs, y).backward()
            optimizer.step()
        reports.append(optimizer.report)
    torch.testing.assert_close(reports[0].objective_before, reports[1].objective_before)
    torch.testing.assert_close(reports[0].objective_after, reports[1].objective_after)


def test_an_overflowing_batch_does_not_spoil_the_averages():
    model, base, x, y = make("SGD")
    optimizer = metatele.TeleportOptimizer(base, model, metatele.Whitening(mode="conjugate"))
    train(model, optimizer, x, y, 3)
    optimizer.zero_grad()
    model(1e25 * x).sum().mul(0).backward()
    optimizer.step()
    assert optimizer.param_groups[0]["teleports"] == 3
    train(model, optimizer, x, y, 3)
    assert optimizer.param_groups[0]["teleports"] == 6
    assert bool(torch.isfinite(flat(model)).all())


def test_a_small_last_batch_does_not_change_what_a_teleport_is():
    """By default every batch is fitted in the least-squares sense, so other samples are not given up."""
    torch.manual_seed(0)
    x, test = torch.randn(60, 8), torch.randn(500, 8)
    model = nn.Sequential(nn.Linear(8, 64), nn.LeakyReLU(0.1), nn.Linear(64, 3))
    start = copy.deepcopy(model.state_dict())
    changes = []
    for action in ("approximate", "auto"):
        model.load_state_dict(start)
        before = model(test).detach()
        settings = {} if action == "approximate" else {"action": action, "whole_data": True}
        metatele.teleport_(model, x[:5], torch.zeros(5, 3), nn.functional.mse_loss, **settings)
        changes.append(float((model(test) - before).norm().detach() / before.norm()))
    assert changes[0] < 0.5 * changes[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"at": [0.5]}, "whole numbers"),
        ({"every": 2.5}, "whole number"),
        ({"at": [0], "batches": [1], "loss_fn": nn.functional.mse_loss}, "must be a function"),
    ],
)
def test_what_would_fail_at_the_teleport_fails_at_once(arguments, words):
    model, base, _, _ = make()
    with pytest.raises(ConfigError, match=words):
        metatele.TeleportOptimizer(base, model, **arguments)


def test_refusals_at_construction():
    model, base, x, y = make()
    with pytest.raises(ConfigError, match="teleports already"):
        metatele.TeleportOptimizer(metatele.TeleportOptimizer(base, model, at=[0]), model, at=[1])
    with pytest.raises(ConfigError, match="steps must be a whole number"):
        metatele.GradientNormAscent(steps=2.5)
    with pytest.raises(ConfigError, match="lr is that of rate fixed"):
        metatele.GradientNormAscent(lr=0.1, rate="line-search")
    with pytest.raises(ConfigError, match="parametrisation"):
        metatele.Random(parametrisation="x")
    single = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(UnsupportedModelError, match="hidden layer"):
        metatele.TeleportOptimizer(torch.optim.SGD(single.parameters()), single, at=[0])
    with pytest.raises(ShapeMismatchError, match="at least one sample"):
        metatele.teleport_(model, x[:0], y[:0], nn.functional.mse_loss)
    optimizer = metatele.TeleportOptimizer(base, model, at=[np.int64(0)])
    with pytest.raises(ValueError, match="does not belong"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert len(optimizer.param_groups) == 1
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    nn.functional.mse_loss(model(x), y).backward()
    with pytest.raises(MetateleError, match="was replaced"):
        optimizer.step()
