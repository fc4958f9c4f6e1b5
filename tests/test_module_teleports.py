"""Teleports of any module: along exact symmetries, drop-in around any optimizer."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import metatele
from metatele.errors import ConfigError, ShapeMismatchError, UnsupportedModelError
from metatele.geometry import Curvature, GradientNorm, ModulePoint, Objective, Sharpness, objective
from metatele.symmetry.exact import act, element_of, pullback
from metatele.symmetry.find import find_symmetries
from metatele.teleport import Ascent, Reason
from metatele.teleport.modules import ascend_


class Residual(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.inner = nn.Sequential(nn.Conv2d(width, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, width, 1))
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        return self.head((x + self.inner(x)).mean((2, 3)))


class Reader(nn.Module):
    """Attention and SwiGLU on a residual stream with RMSNorm; tied embedding."""

    def __init__(self, width=8):
        super().__init__()
        self.table, self.first, self.second = nn.Embedding(11, width), nn.RMSNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.gate, self.up = nn.Linear(width, 12, bias=False), nn.Linear(width, 12, bias=False)
        self.down, self.head = nn.Linear(12, width, bias=False), nn.Linear(width, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens):
        x = 0.1 * self.table(tokens)
        h = self.first(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        h = self.second(x)
        return self.head(x + self.down(F.silu(self.gate(h)) * self.up(h)))


def images(seed=0):
    torch.manual_seed(seed)
    return Residual(), torch.randn(24, 3, 6, 6), torch.randint(4, (24,)), F.cross_entropy


def tokens(seed=0):
    torch.manual_seed(seed)
    model, x = Reader(), torch.randint(11, (6, 7))
    return model, x, x.roll(1, 1), lambda out, y: F.cross_entropy(out.flatten(0, 1), y.flatten())


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("make", [images, tokens])
@pytest.mark.parametrize("seed", range(3))
def test_an_ascent_raises_the_gradient_norm_and_keeps_the_function(make, seed):
    model, x, y, loss = make(seed)
    statistics = [b.clone() for b in model.buffers()]
    before = copy.deepcopy(model).double().eval().requires_grad_(False)
    report = metatele.teleport_(model, x, y, loss)
    assert report.moved
    assert report.objective_after > 1.05 * report.objective_before
    assert report.drift < 1e-5
    own = next(torch.autograd.grad(loss(m(x), y), list(m.parameters())) for m in (copy.deepcopy(model),))
    assert sum(float(g.square().sum()) for g in own) == pytest.approx(report.objective_after, rel=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(statistics, model.buffers(), strict=True))
    others = x.roll(3, 0).double() * 2 if x.is_floating_point() else (x * 3 + 1) % 11  # on other inputs as well
    after = copy.deepcopy(model).double().eval().requires_grad_(False)
    assert float((after(others) - before(others)).abs().max()) < 1e-4 * float(before(others).abs().max())


def test_descent_lowers_it_and_a_cap_stops():
    model, x, y, loss = images()
    assert metatele.teleport_(copy.deepcopy(model), x, y, loss, descend=True).objective_after < 0.99 * (
        metatele.teleport_(copy.deepcopy(model), x, y, loss, steps=1).objective_before
    )
    report = metatele.teleport_(model, x, y, loss, cap=1e-9)
    assert not report.moved
    assert "cap" in report.reason


@pytest.mark.parametrize("make", [images, tokens])
def test_the_pullback_is_the_derivative_of_the_action(make):
    model, x, _, _ = make()
    model = model.double().eval()
    spaces = find_symmetries(model, x if not x.is_floating_point() else x.double()).spaces
    tensors = {n: p.detach() for n, p in model.named_parameters()}
    torch.manual_seed(1)
    along = {n: torch.randn_like(t) for n, t in tensors.items()}
    assert {s.group for s in spaces} >= ({"scale", "perm"} if make is images else {"GL", "O", "scale", "perm", "shift"})
    for space in spaces:
        if space.group == "perm":
            with pytest.raises(ConfigError, match="no continuous group"):
                pullback(space, tensors, along)
            continue
        ours = pullback(space, tensors, along)
        zero = torch.zeros_like(ours).requires_grad_()
        moved = act(space, element_of(space, zero), tensors)
        (wanted,) = torch.autograd.grad(sum((moved[n] * along[n]).sum() for n in moved), zero)
        if space.group == "O":  # tangents are antisymmetric, and keep the vector of ones where a mean is taken away
            wanted = (wanted - wanted.mT) / 2
            centre = torch.eye(space.k, dtype=torch.float64) - space.centred / space.k
            wanted = centre @ wanted @ centre
        torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop"])
@pytest.mark.parametrize("state", ["keep", "reset"])
def test_around_an_optimizer_it_teleports_when_due_and_is_that_optimizer_else(name, state):
    model, x, y, loss = images()
    twin = copy.deepcopy(model)
    optimizer = metatele.TeleportOptimizer(
        getattr(torch.optim, name)(model.parameters(), lr=1e-3), model, at=[2], state=state
    )
    plain = getattr(torch.optim, name)(twin.parameters(), lr=1e-3)
    for step in range(5):
        for own, net in ((optimizer, model), (plain, twin)):
            own.zero_grad()
            loss(net(x), y).backward()
            own.step()
        assert torch.equal(flat(model), flat(twin)) == (step < 2)
    assert optimizer.param_groups[0]["teleports"] == 1
    assert optimizer.report.moved
    assert optimizer.report.drift < 1e-5
    assert optimizer.report.loss_before is None
    assert optimizer.report.objective_after > optimizer.report.objective_before


def test_passes_of_the_loop_tell_what_the_loss_tells():
    model, x, y, loss = images()
    twin = copy.deepcopy(model)
    optimizer = metatele.TeleportOptimizer(torch.optim.SGD(model.parameters(), lr=1e-12), model, at=[0])
    for half in (slice(0, 12), slice(12, 24)):  # two passes whose gradients add up
        (loss(model(x[half]), y[half]) / 2).backward()
    optimizer.step()

    def both():
        return sum(loss(twin(x[half]), y[half]) / 2 for half in (slice(0, 12), slice(12, 24)))

    report = ascend_(twin, find_symmetries(twin, x[:4]).spaces, both)
    assert optimizer.report.objective_before == pytest.approx(report.objective_before, rel=1e-4)
    assert optimizer.report.objective_after == pytest.approx(report.objective_after, rel=0.02)


def test_gradients_may_be_zeroed_between_a_pass_and_its_backward_pass():
    """As in a closure of Lightning; a pass that no gradient came back through has no part."""
    moved = []
    for late in (False, True):
        model, x, y, loss_fn = images()
        optimizer = metatele.TeleportOptimizer(torch.optim.SGD(model.parameters(), 0.01), model, at=[0])

        def closure(late=late, optimizer=optimizer, model=model, x=x, y=y, loss_fn=loss_fn):
            if not late:
                optimizer.zero_grad()
            else:
                model(x[:3])
            loss = loss_fn(model(x), y)
            if late:
                optimizer.zero_grad()
            loss.backward()
            return loss

        model.eval()  # of BatchNorm, that the pass which has no part leaves no trace
        optimizer.step(closure)
        assert optimizer.report.moved
        moved.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *moved))


def test_frozen_parameters_and_those_in_no_group_stay():
    model, x, y, loss = images()
    model.head.requires_grad_(False)  # it reads the residual stream, which can't be scaled then
    kept, inner = (flat(m) for m in (nn.ModuleList([model.stem, model.norm, model.head]), model.inner))
    assert metatele.teleport_(model, x, y, loss).moved
    assert torch.equal(kept, flat(nn.ModuleList([model.stem, model.norm, model.head])))
    assert not torch.equal(inner, flat(model.inner))
    model.head.requires_grad_(True)
    optimizer = metatele.TeleportOptimizer(torch.optim.SGD(model.head.parameters(), lr=1e-3), model, at=[0])
    before = flat(model.inner)
    loss(model(x), y).backward()
    optimizer.step()
    assert torch.equal(before, flat(model.inner))


def test_copies_pickles_and_states_go_on():
    model, x, y, loss = images()
    optimizer = metatele.TeleportOptimizer(torch.optim.Adam(model.parameters()), model, every=2)

    def train(own, net, steps):
        for _ in range(steps):
            own.zero_grad()
            loss(net(x), y).backward()
            own.step()
        return flat(net)

    train(optimizer, model, 3)
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert torch.equal(train(other, other.model, 3), train(*(lambda o: (o, o.model, 3))(copy.deepcopy(optimizer))))
    fresh = copy.deepcopy(model)
    loaded = metatele.TeleportOptimizer(torch.optim.Adam(fresh.parameters()), fresh, every=2)
    loaded.load_state_dict(optimizer.state_dict())
    assert torch.equal(train(loaded, fresh, 3), train(optimizer, model, 3))


def test_bad_input_is_one_clear_error_and_moves_nothing():
    model, x, y, loss = images()
    before = flat(model)
    for settings, words in (
        ({"objective": "flatness"}, "objective must be one of"),
        ({"action": "rescaling"}, "action is a setting of teleports of perceptrons"),
        ({"move": metatele.Whitening()}, "Balance, Rescaling, Random or a ModuleMove, got Whitening"),
    ):
        with pytest.raises(ConfigError, match=words):
            metatele.teleport_(model, x, y, loss, **settings)
    with pytest.raises(ShapeMismatchError, match="scalar"):
        metatele.teleport_(model, x, y, lambda out, y: out)
    with pytest.raises(TypeError, match="loss_fn"):
        metatele.teleport_(model, x, y, "cross_entropy")
    with pytest.raises(ShapeMismatchError, match="at least one sample"):
        metatele.teleport_(model, x[:0], y[:0], loss)
    base = torch.optim.Adam(model.parameters())
    for settings, words in (
        ({"state": "forget"}, "keep, reset, transport"),
        ({"metric": "adaptive"}, "metric is euclidean"),
        ({"teleport": metatele.Whitening()}, "Balance, Rescaling, Random or a ModuleMove, got Whitening"),
    ):
        with pytest.raises(ConfigError, match=words):
            metatele.TeleportOptimizer(base, model, at=[0], **settings)
    with pytest.raises(UnsupportedModelError, match="no continuous symmetry"):
        metatele.teleport_(nn.Sequential(nn.Conv2d(3, 4, 6), nn.Flatten()), x, y, loss)
    assert torch.equal(before, flat(model))


@pytest.mark.parametrize("passes", range(1, 6))
def test_a_loss_that_raises_leaves_the_weights_of_a_whole_step(passes):
    model, x, y, loss = images()
    spaces, seen, at = find_symmetries(model, x[:4]).spaces, [], []

    def fails():
        if len(seen) == passes:
            raise RuntimeError("out of memory")
        seen.append(1)
        at.append(flat(model))
        return loss(model(x), y)

    with pytest.raises(RuntimeError, match="out of memory"):
        ascend_(model, spaces, fails)
    # Passes alternate between where a step led and a point beside it, where the slope is taken.
    assert torch.equal(flat(model), at[passes - 1 - (passes - 1) % 2])


@pytest.mark.parametrize("make", [images, tokens])
@pytest.mark.parametrize("descend", [False, True])
@pytest.mark.parametrize(
    "goal",
    [Sharpness(directions=3, displacements=(0.1, 0.5)), Curvature(curves=2), "curvature", GradientNorm()],
    ids=lambda goal: goal if isinstance(goal, str) else goal.name,
)
def test_every_objective_goes_up_or_down_and_keeps_the_function(make, goal, descend):
    model, x, y, loss = make()
    own = objective(goal) if isinstance(goal, str) else goal
    statistics = [b.clone() for b in model.buffers()]
    twin = copy.deepcopy(model)
    report = metatele.teleport_(model, x, y, loss, objective=goal, descend=descend, steps=4)
    assert (report.objective, report.moved) == (own.name, True)
    assert report.drift < 1e-5
    assert (report.objective_after < report.objective_before) == descend
    assert all(torch.equal(a, b) for a, b in zip(statistics, model.buffers(), strict=True))
    for net, told in ((twin, report.objective_before), (model, report.objective_after)):
        spaces = find_symmetries(net, x[:4]).spaces
        point = ModulePoint(net, lambda net=net: loss(net(x), y), spaces)
        assert float(own.value(point)) == pytest.approx(told, rel=1e-4)
    others = x.roll(3, 0) * 2 if x.is_floating_point() else (x * 3 + 1) % 11  # on other inputs as well
    torch.testing.assert_close(model.eval()(others), twin.eval()(others), rtol=1e-3, atol=1e-4)


def test_the_default_is_the_gradient_norm_to_the_bit():
    model, x, y, loss = images()
    twin = copy.deepcopy(model)
    metatele.teleport_(model, x, y, loss)
    metatele.teleport_(twin, x, y, loss, objective=GradientNorm())
    assert torch.equal(flat(model), flat(twin))


def test_around_an_optimizer_curvature_needs_no_batches_and_sharpness_does():
    model, x, y, loss = images()
    base = torch.optim.SGD(model.parameters(), lr=1e-6)
    with pytest.raises(ConfigError, match="an ascent of sharpness needs the loss"):
        metatele.TeleportOptimizer(base, model, Ascent(objective=Sharpness()), at=[0])
    optimizer = metatele.TeleportOptimizer(base, model, Ascent(objective=Curvature(curves=2), steps=3), at=[0])
    optimizer = pickle.loads(pickle.dumps(optimizer))
    optimizer.zero_grad()
    loss(optimizer.model(x), y).backward()
    optimizer.step()
    assert (optimizer.report.objective, optimizer.report.moved) == ("curvature", True)
    assert optimizer.report.objective_after > 1.01 * optimizer.report.objective_before
    goal = Sharpness(directions=2, displacements=(0.1, 0.5))
    base = torch.optim.SGD(model.parameters(), lr=1e-6)
    optimizer = metatele.TeleportOptimizer(
        base, model, Ascent(objective=goal, steps=2), at=[0], batches=lambda: [(x, y)], loss_fn=loss
    )
    loss(model(x), y).backward()
    optimizer.step()
    assert (optimizer.report.objective, optimizer.report.moved) == ("sharpness", True)


def test_objectives_that_a_module_has_not_are_refused():
    model, x, y, loss = images()

    class Own(Objective):
        name = "own"

        def value(self, point):
            raise NotImplementedError

        def value_and_gradient(self, point):
            raise NotImplementedError

    for goal, words in (
        (Own(), "grad-norm, sharpness or curvature"),
        (GradientNorm(metric=torch.ones(3)), "no metric"),
        (Curvature(truncate=True), "truncate"),
    ):
        with pytest.raises(ConfigError, match=words):
            metatele.teleport_(model, x, y, loss, objective=goal)


class Cell(nn.Module):
    """A recurrent cell, which has no continuous symmetry."""

    def __init__(self):
        super().__init__()
        self.cell, self.out = nn.GRUCell(5, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = x.new_zeros(len(x), 6)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
        return self.out(h)


class Branching(nn.Module):
    """Works on short inputs alone in double precision."""

    def __init__(self):
        super().__init__()
        self.body, self.single = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 5)), nn.Linear(5, 5)
        self.table = torch.ones(5, 5)  # neither parameter nor buffer: a copy in double precision leaves it as it is

    def forward(self, x):
        if x.shape[1] > 3:
            x = F.linear(x, self.table)
        return self.body(self.single(x)).mean(1)


def trained(model, optimizer, length, steps=1):
    torch.manual_seed(0)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, length, 5)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("given", [False, True])
def test_training_goes_on_where_nothing_can_move(given):
    torch.manual_seed(0)
    model = Cell()
    bare = copy.deepcopy(model)
    batches = {"batches": lambda: [(torch.ones(4, 3, 5), torch.ones(4, 3))], "loss_fn": F.mse_loss} if given else {}
    optimizer = metatele.TeleportOptimizer(torch.optim.Adam(model.parameters()), model, every=2, **batches)
    with pytest.warns(UserWarning, match="no continuous symmetry was found in Cell; find_symmetries") as said:
        trained(model, optimizer, 4, steps=6)
    assert len(said) == 1
    assert "\n" not in str(said[0].message)
    assert not optimizer.report.moved
    assert optimizer.report.reason == Reason.NO_SYMMETRY.sentence
    assert optimizer.param_groups[0]["teleports"] == 0
    assert optimizer.param_groups[0]["teleport_steps"] == 6
    trained(bare, torch.optim.Adam(bare.parameters()), 4, steps=6)
    assert torch.equal(flat(model), flat(bare)), "it is the wrapped optimizer, bit for bit"
    with pytest.raises(UnsupportedModelError, match="no continuous symmetry was found in Cell; ") as error:
        metatele.teleport_(model, torch.ones(4, 3, 5), torch.ones(4, 3), F.mse_loss)
    assert "\n" not in str(error.value)


def test_a_pass_from_which_nothing_is_found_does_not_end_training_and_the_next_one_teleports():
    torch.manual_seed(0)
    model = Branching()
    optimizer = metatele.TeleportOptimizer(torch.optim.Adam(model.parameters()), model, every=1)
    with pytest.warns(UserWarning, match="training goes on: the model's pass on the example failed") as said:
        trained(model, optimizer, 4, steps=2)
    assert len(said) == 1
    assert optimizer.report.reason == Reason.SEARCH.sentence
    trained(model, optimizer, 3)
    assert optimizer.report.moved


@pytest.mark.parametrize("made_inside", [False, True])
def test_inference_mode_finds_and_moves_as_outside(made_inside):
    torch.manual_seed(0)
    model, x, y = Residual().eval(), torch.randn(6, 3, 5, 5), torch.randint(4, (6,))
    outside, expected = copy.deepcopy(model), find_symmetries(model, x)
    metatele.teleport_(outside, x, y, F.cross_entropy)
    with torch.inference_mode():
        inputs, targets = (x.clone(), y.clone()) if made_inside else (x, y)
        found = find_symmetries(model, inputs)
        assert not found.unknown
        assert [(s.group, s.parameters) for s in found.spaces] == [(s.group, s.parameters) for s in expected.spaces]
        report = metatele.teleport_(model, inputs, targets, F.cross_entropy)
        assert report.moved
        assert torch.is_inference_mode_enabled()
        assert metatele.balance_(Residual(), inputs).rows  # its weights are of inference mode too
    for p, q in zip(model.parameters(), outside.parameters(), strict=True):
        assert torch.equal(p, q)
