"""Moves of any module that need no data, memories carried along every move, half precision."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from test_module_teleports import flat, images, tokens
from torch import nn

import metatele
from metatele.errors import ConfigError, NotExactError
from metatele.optim import module_moves
from metatele.optim.any_module import Passes, teleport_module_
from metatele.symmetry.exact import act_, random_element
from metatele.symmetry.find import find_symmetries
from metatele.teleport.exact_moves import exact_, scales_of
from metatele.teleport.modules import ascend_

MOVES = {
    "ascent": metatele.GradientNormAscent(steps=3),
    "balance": metatele.Balance(),
    "rescaling": metatele.Rescaling(),
    "random": metatele.Random(radius=0.3, generator=torch.Generator().manual_seed(0)),
}


def double(make):
    model, x, y, loss = make()
    return model.double(), x.double() if x.is_floating_point() else x, y, loss


def gradients(model, x, y, loss):
    twin = copy.deepcopy(model)  # whose running statistics may move
    return torch.autograd.grad(loss(twin(x), y), list(twin.parameters()))


# --- what they do


@pytest.mark.parametrize("make", [images, tokens])
@pytest.mark.parametrize("name", ["balance", "rescaling", "random"])
def test_a_move_changes_the_weights_and_nothing_else(make, name):
    model, x, y, loss = double(make)
    before = copy.deepcopy(model).eval()
    own = sum(float(g.square().sum()) for g in gradients(model, x, y, loss))
    report = metatele.teleport_(model, x, y, loss, move=MOVES[name])
    assert report.moved
    assert not report.reason
    assert report.drift < 1e-12
    assert (flat(model) - flat(before)).norm() > 1e-2 * flat(before).norm()
    after = sum(float(g.square().sum()) for g in gradients(model, x, y, loss))
    assert (report.objective_before, report.objective_after) == (pytest.approx(own), pytest.approx(after))
    others = x.roll(3, 0) * 2 if x.is_floating_point() else (x * 3 + 1) % 11
    torch.testing.assert_close(copy.deepcopy(model).eval()(others), before(others), rtol=1e-9, atol=1e-9)
    if name != "random":  # where they lead is one point
        there = flat(model)
        again = metatele.teleport_(model, x, y, loss, move=MOVES[name])
        assert "already are" in again.reason or (flat(model) - there).norm() < 1e-9 * there.norm()


@pytest.mark.parametrize("make", [images, tokens])
def test_rescaling_gives_both_sides_of_every_unit_one_size_and_is_the_shortest(make):
    model, x, y, loss = double(make)
    spaces = find_symmetries(model, x).spaces
    before = flat(model).norm()
    metatele.teleport_(model, x, y, loss, move=metatele.Rescaling())
    tensors = {n: p.detach() for n, p in model.named_parameters()}
    scales = scales_of(spaces)
    assert {s.group for s in spaces} > {s.group for s in scales} == {"scale"}
    for space in scales:
        sides = [torch.zeros(space.k, dtype=torch.float64), torch.zeros(space.k, dtype=torch.float64)]
        for place in space.places:
            sides[place.reads] += tensors[place.name].reshape(-1)[place.indices()].square().sum(1)
        torch.testing.assert_close(sides[0], sides[1], rtol=1e-6, atol=1e-12)
    assert flat(model).norm() < before
    assert not metatele.teleport_(model, x, y, loss, move=metatele.Rescaling()).moved


def test_rescaling_goes_no_farther_than_its_radius():
    model, x, y, loss = double(images)
    with torch.no_grad():
        model.inner[0].weight.mul_(100.0)
        model.inner[0].bias.mul_(100.0)
    before = model.inner[0].weight.detach().clone()
    metatele.teleport_(model, x, y, loss, move=metatele.Rescaling(radius=0.5))
    factors = (model.inner[0].weight.detach().flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1)).log()
    # What the unit's inputs do in turn adds at most as much.
    torch.testing.assert_close(factors, torch.full_like(factors, -0.5), rtol=0, atol=0.5)


def test_balance_is_that_of_the_function_and_a_random_move_of_one_radius_in_each_space():
    model, x, y, loss = double(tokens)
    twin = copy.deepcopy(model)
    metatele.teleport_(model, x, y, loss, move=metatele.Balance())
    metatele.balance_(twin, x[:4])
    torch.testing.assert_close(flat(model), flat(twin), rtol=1e-9, atol=1e-9)
    spaces, path = find_symmetries(model, x).spaces, []
    exact_(model, spaces, MOVES["random"], lambda: loss(model(x), y), (x,), {}, known=True, path=path)
    assert [space for space, _ in path] == [space for space in spaces if space.dimension]
    for space, element in path:
        if space.group == "scale":
            assert float(element.value.log().norm()) == pytest.approx(0.3)
        if space.group in ("GL", "O"):
            assert 0.2 < float((element.value - torch.eye(space.k)).norm()) < 0.45


def test_rescaling_of_any_module_is_that_of_perceptrons():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.LeakyReLU(0.1), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    x, y = torch.randn(7, 5).double(), torch.randn(7, 3).double()
    twin = copy.deepcopy(model)
    theirs = metatele.teleport_(model, x, y, F.mse_loss, move=metatele.Rescaling())
    ours = teleport_module_(twin, x, y, F.mse_loss, metatele.Rescaling())
    torch.testing.assert_close(flat(model), flat(twin), rtol=1e-8, atol=1e-8)
    for name in ("loss_before", "loss_after", "objective_before", "objective_after"):
        assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=1e-8)


def test_a_move_by_groups_that_the_module_lacks_says_so():
    model, x, y, loss = images()
    before = flat(model)
    report = metatele.teleport_(model, x, y, loss, move=metatele.Balance(groups=("phase",)))
    assert not report.moved
    assert "no units" in report.reason
    assert torch.equal(before, flat(model))


def test_what_stands_for_the_loss_has_its_gradient_and_cannot_cancel():
    model, x, y, loss = double(images)
    passes = Passes(model)
    passes.wanted = True
    loss(model(x), y).backward()
    passes.wanted = False
    value = passes.surrogate()
    for p, g in zip(model.parameters(), torch.autograd.grad(value, list(model.parameters())), strict=True):
        torch.testing.assert_close(p.grad, g)
    ((_, _, (errors,)),) = passes.seen
    assert float(value.detach()) == pytest.approx(float((errors * model(x)).detach().abs().sum()))
    twin = copy.deepcopy(model)  # its copy of the hook holds no batch
    loss(twin(x), y).backward()
    (hook,) = twin._forward_hooks.values()
    assert hook.__self__ is not passes
    assert hook.__self__.seen == []


def test_one_generator_is_one_move():
    results = []
    for _ in range(2):
        model, x, y, loss = images()
        metatele.teleport_(model, x, y, loss, move=metatele.Random(generator=torch.Generator().manual_seed(3)))
        results.append(flat(model))
    assert torch.equal(*results)


def test_past_max_drift_everything_is_taken_back():
    model, x, y, loss = images()
    before = flat(model)
    optimizer = metatele.TeleportOptimizer(
        torch.optim.SGD(model.parameters(), lr=1e-30), model, metatele.Random(max_drift=1e-30), at=[0]
    )
    loss(model(x), y).backward()
    optimizer.step()
    torch.testing.assert_close(before, flat(model), rtol=0, atol=1e-25)
    assert not optimizer.report.moved
    assert "max_drift" in optimizer.report.reason
    assert (optimizer.param_groups[0]["teleports"], optimizer.param_groups[0]["teleports_rolled_back"]) == (0, 1)


def test_perceptrons_of_scalable_units_are_balanced_others_refused():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.LeakyReLU(0.1), nn.Linear(6, 3)).double()
    x, y = torch.randn(7, 5).double(), torch.randn(7, 3).double()
    twin = copy.deepcopy(model)
    optimizer = metatele.TeleportOptimizer(
        torch.optim.SGD(model.parameters(), lr=1e-30), model, metatele.Balance(), at=[0]
    )
    F.mse_loss(model(x), y).backward()
    optimizer.step()
    metatele.balance_(twin, x)
    torch.testing.assert_close(flat(model), flat(twin))
    for move in (metatele.Balance(), metatele.Balance(groups=["scale"])):
        model[1] = nn.Tanh()
        with pytest.raises(NotExactError, match="tanh"):
            metatele.teleport_(model, x, y, F.mse_loss, move=move)
        with pytest.raises(NotExactError, match="tanh"):
            metatele.TeleportOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, move, at=[0])


def test_bad_settings_are_refused_in_a_sentence_and_move_nothing():
    model, x, y, loss = images()
    before = flat(model)
    for make, words in (
        (lambda: metatele.Balance(groups=("scale", "U")), "groups must be some of"),
        (lambda: metatele.Balance(groups="scale"), "groups must be some of"),
        (lambda: metatele.Balance(groups=()), "groups must be some of"),
        (lambda: metatele.Balance(action="exact"), "action is a setting of moves of perceptrons"),
    ):
        with pytest.raises(ConfigError, match=words):
            make()
    for move, words in (
        (metatele.Random(parametrisation="cayley"), "parametrisation is a setting of moves of perceptrons"),
        (metatele.Random(action="auto"), "action is a setting of moves of perceptrons"),
        (metatele.Rescaling(goal="raise-gradients"), "goal balance-weights, got raise-gradients"),
    ):
        with pytest.raises(ConfigError, match=words):
            metatele.teleport_(model, x, y, loss, move=move)
        with pytest.raises(ConfigError, match=words):
            metatele.TeleportOptimizer(torch.optim.Adam(model.parameters()), model, move, at=[0])
    with pytest.raises(ConfigError, match="steps is a setting of the ascent"):
        metatele.teleport_(model, x, y, loss, move=metatele.Balance(), steps=3)
    assert torch.equal(before, flat(model))


# --- an optimizer's memories


@pytest.mark.parametrize("name", MOVES)
@pytest.mark.parametrize("base", ["SGD", "Adam", "RMSprop"])
def test_first_moments_are_those_of_gradients_seen_at_the_new_point(name, base):
    make = tokens if base == "SGD" else images
    model, x, y, loss = double(make)
    settings = {"SGD": {"momentum": 0.9}, "Adam": {}, "RMSprop": {"momentum": 0.9, "centered": True}}[base]
    inner = getattr(torch.optim, base)(model.parameters(), lr=1e-30, **settings)
    optimizer = metatele.TeleportOptimizer(inner, model, MOVES[name], at=[0], state="transport")
    loss(model(x), y).backward()
    old = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    assert optimizer.report.moved
    assert optimizer.param_groups[0]["teleports"] == 1
    new = gradients(model, x, y, loss)
    assert max(float((a - b).norm() / a.norm().clamp_min(1e-9)) for a, b in zip(old, new, strict=True)) > 1e-3
    kind, part = {"SGD": ("momentum_buffer", 1.0), "Adam": ("exp_avg", 0.1), "RMSprop": ("grad_avg", 0.01)}[base]
    for p, g in zip(model.parameters(), new, strict=True):
        torch.testing.assert_close(inner.state[p][kind], part * g, rtol=1e-7, atol=1e-10)
        if base == "Adam" and name in ("rescaling", "ascent"):  # scales alone: second moments are exact too
            torch.testing.assert_close(inner.state[p]["exp_avg_sq"], 0.001 * g.square(), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("name", ["ascent", "balance"])
def test_several_batches_are_one_path(name):
    model, x, y, loss = double(images)
    inner = torch.optim.SGD(model.parameters(), lr=1e-30, momentum=0.9)
    halves = [(x[:12], y[:12]), (x[12:], y[12:])]
    optimizer = metatele.TeleportOptimizer(
        inner, model, MOVES[name], at=[0], state="transport", batches=lambda: halves, loss_fn=loss
    )
    loss(model(x), y).backward()
    optimizer.step()
    assert optimizer.param_groups[0]["teleports"] == (2 if name == "ascent" else 1)
    assert optimizer.report.loss_before is not None
    for p, g in zip(model.parameters(), gradients(model, x, y, loss), strict=True):
        torch.testing.assert_close(inner.state[p]["momentum_buffer"], g, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("state", ["keep", "reset", "transport"])
def test_states_and_pairs_of_lbfgs(state):
    model, x, y, loss = images()
    inner = torch.optim.LBFGS(model.parameters(), lr=1e-3, max_iter=2)
    optimizer = metatele.TeleportOptimizer(inner, model, metatele.Rescaling(), every=1, state=state)

    def closure():
        optimizer.zero_grad()
        value = loss(model(x), y)
        value.backward()
        return value

    optimizer.step(closure)
    assert optimizer.report.moved
    assert bool(inner.state) == (state == "keep")


def test_rows_of_the_ascents_path_lead_where_it_led():
    model, x, y, loss = double(tokens)
    start, path = copy.deepcopy(model), []
    report = ascend_(model, find_symmetries(model, x).spaces, lambda: loss(model(x), y), steps=4, path=path)
    assert report.steps >= 1
    tensors = {n: p.detach() for n, p in start.named_parameters()}
    for space, element in path:
        act_(space, element, tensors)
    torch.testing.assert_close(flat(start), flat(model), rtol=1e-12, atol=1e-12)


# --- what was found


def test_symmetries_are_found_once_and_anew_when_the_module_changes(monkeypatch):
    model, x, y, loss = images()
    calls = []
    find = module_moves.movable
    monkeypatch.setattr(module_moves, "movable", lambda *a: calls.append(1) or find(*a))
    optimizer = metatele.TeleportOptimizer(
        torch.optim.SGD(model.parameters(), lr=1e-4), model, metatele.Random(radius=0.01), every=1
    )

    def step():
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
        assert optimizer.report.drift < 1e-4
        return len(calls)

    assert [step(), step(), step()] == [1, 1, 1]
    model.inner[1] = nn.Tanh()  # no scales any more
    assert [step(), step()] == [2, 2]
    model.inner[1] = nn.ReLU()
    assert step() == 3
    inside = model.inner[0]
    inside.weight = nn.Parameter(inside.weight.detach().clone())  # in no group: what holds it stays
    before = flat(model.inner)
    assert [step(), step()] == [4, 4]
    assert torch.equal(before[: inside.weight.numel()], inside.weight.detach().flatten())
    model.head.weight.requires_grad_(False)
    assert [step(), step()] == [5, 5]


# --- half precision


def half(make):
    model, x, y, loss = make()
    return model.bfloat16(), x.bfloat16() if x.is_floating_point() else x, y, lambda out, y: loss(out.float(), y)


@pytest.mark.parametrize("make", [images, tokens])
def test_in_half_precision_an_action_is_rounded_once(make):
    model, x, _, _ = half(make)
    for n, space in enumerate(find_symmetries(model, x).spaces):
        narrow = {name: p.detach().clone() for name, p in model.named_parameters()}
        wide = {name: t.double() for name, t in narrow.items()}
        element = random_element(space, 10.0, n, wide)
        act_(space, element, narrow)
        act_(space, element, wide)
        for name, t in narrow.items():
            assert torch.equal(t, wide[name].bfloat16()), (space.group, name)


@pytest.mark.parametrize("make", [images, tokens])
@pytest.mark.parametrize("move", [metatele.randomize_, metatele.balance_])
def test_in_half_precision_a_module_is_moved_as_in_double_and_rounded_once(make, move):
    model, x, _, _ = half(make)
    wide = {n: p.detach().double() for n, p in model.named_parameters()}
    report = move(model, x)
    print(move.__name__, make.__name__, report.drift)
    for space, element in report.path:
        act_(space, element, wide)
    assert all(torch.equal(p.detach(), wide[n].bfloat16()) for n, p in model.named_parameters())
    assert 0 < report.drift < 0.1


@pytest.mark.parametrize("make", [images, tokens])
def test_in_half_precision_an_ascent_is_rounded_once(make):
    model, x, y, loss = half(make)
    wide = {n: p.detach().double() for n, p in model.named_parameters()}
    path = []
    report = ascend_(
        model, find_symmetries(model, x).spaces, lambda: loss(model(x), y), steps=6, max_drift=0.05, path=path
    )
    print(report)
    assert report.moved
    assert math.isfinite(report.objective_after)
    assert 0 < report.drift <= 0.05
    for space, element in path:
        act_(space, element, wide)
    assert all(torch.equal(p.detach(), wide[n].bfloat16()) for n, p in model.named_parameters())


@pytest.mark.parametrize("make", [images, tokens])
@pytest.mark.parametrize("name", MOVES)
def test_in_half_precision_every_move_works_around_an_optimizer(make, name):
    move = metatele.GradientNormAscent() if name == "ascent" else MOVES[name]  # a few of its steps are too short there
    for seed in range(3):
        model, x, y, loss = half(lambda seed=seed: make(seed))
        base = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        optimizer = metatele.TeleportOptimizer(base, model, move, every=1, state="transport")
        for _ in range(2):
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
            assert not optimizer.report.rolled_back or name == "ascent", optimizer.report
            assert optimizer.report.drift < 0.0313
        assert optimizer.param_groups[0]["teleports"] >= 1
        assert all(p.dtype == torch.bfloat16 and p.isfinite().all() for p in model.parameters())
