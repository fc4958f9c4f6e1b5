"""Teleports on ordinary networks: what the default does, what a report says, and what other data see of it."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import metatele
from metatele.errors import ConfigError, MetateleError
from metatele.teleport import Ascent, TeleportReport

ACTIVATIONS = {
    "ReLU": [nn.ReLU],
    "LeakyReLU": [nn.LeakyReLU],
    "Tanh": [nn.Tanh],
    "SiLU": [nn.SiLU],
    "Softplus": [nn.Softplus],
    "Sigmoid": [nn.Sigmoid],
    "mixed": [nn.ReLU, nn.Tanh],
}


def network(activation, widths, seed=0):
    torch.manual_seed(seed)
    layers, kinds = [], ACTIVATIONS[activation]
    for m in range(len(widths) - 1):
        layers += [nn.Linear(widths[m], widths[m + 1]), kinds[m % len(kinds)]()]
    return nn.Sequential(*layers[:-1])


def images(number, width=64, classes=10, seed=0):
    """Patches that look like small images: smooth, not negative, of so many classes."""
    random = torch.Generator().manual_seed(seed)
    prototypes = torch.rand(classes, width, generator=torch.Generator().manual_seed(99)) ** 2
    y = torch.randint(classes, (number,), generator=random)
    return (prototypes[y] + 0.3 * torch.randn(number, width, generator=random)).clamp(0, 1), y


def step(model, optimizer, x, y, loss=nn.functional.cross_entropy):
    optimizer.zero_grad()
    loss(model(x), y).backward()
    optimizer.step()


# --- the default


@pytest.mark.parametrize(
    ("activation", "widths", "batch"),
    [
        ("ReLU", (64, 32, 10), 200),
        ("ReLU", (64, 48, 32, 10), 100),
        ("ReLU", (64, 32, 32, 32, 32, 32, 10), 64),
        ("LeakyReLU", (64, 64, 32, 10), 200),
        ("LeakyReLU", (64, 128, 128, 128, 10), 32),
        ("Tanh", (64, 32, 10), 200),
        ("Tanh", (64, 32, 32, 32, 32, 32, 10), 64),
        ("SiLU", (64, 64, 32, 10), 128),
        ("Softplus", (64, 64, 10), 128),
        ("Sigmoid", (64, 48, 32, 10), 100),
        ("mixed", (64, 48, 32, 10), 100),
    ],
)
@pytest.mark.parametrize("at", [0, 60])
def test_the_default_raises_the_gradient_norm_of_ordinary_networks(activation, widths, batch, at):
    model = network(activation, widths)
    optimizer = metatele.TeleportOptimizer(torch.optim.Adam(model.parameters(), lr=1e-3), model, at=[at])
    fresh = images(500, seed=10**6)[0]
    for number in range(at + 1):
        x, y = images(batch, seed=number)
        if number == at:
            before, base = copy.deepcopy((model, optimizer.base))
        step(model, optimizer, x, y)
    step(before, base, x, y)
    report = optimizer.report
    assert report.moved
    assert not report.reason
    assert report.steps > 0
    assert report.objective_after > (1.05 if activation in ("ReLU", "LeakyReLU") else 1.005) * report.objective_before
    # What it costs: nothing, or little on other data too.
    with torch.no_grad():
        moved, stayed = model(fresh), before(fresh)
    change = float((moved - stayed).norm() / (stayed - stayed.mean(0)).norm())
    assert change < (1e-4 if activation in ("ReLU", "LeakyReLU") else 0.05)


def test_rescalings_that_are_repeated_keep_hidden_units_within_balance():
    model = network("ReLU", (64, 32, 16, 10))
    optimizer = metatele.TeleportOptimizer(torch.optim.SGD(model.parameters(), lr=1e-6), model, every=1)

    def imbalance():
        pairs = ((model[0], model[2]), (model[2], model[4]))
        ratios = [v.weight.norm(dim=1) / u.weight.norm(dim=0) for v, u in pairs]
        return float(torch.cat(ratios).log().abs().max().detach())

    x, y = images(50)
    for _ in range(40):
        step(model, optimizer, x, y)
    bounded = imbalance()  # a bound in one layer changes with what the next one does
    assert bounded < 2.5
    metatele.teleport_(model, x, y, nn.functional.cross_entropy, move=Ascent(action="rescaling", steps=400))
    assert imbalance() > 2 * bounded
    # What is left to gain is less than single precision tells apart.
    report = metatele.teleport_(
        model.double(), x.double(), y, nn.functional.cross_entropy, move=Ascent(action="rescaling", max_imbalance=1e-9)
    )
    assert report.moved or "out of balance" in report.reason


# --- the exact action on mini-batches


@pytest.mark.parametrize("move", [metatele.GradientNormAscent(action="auto"), metatele.Whitening(max_drift=1e9)])
def test_auto_is_not_the_exact_action_on_a_batch_that_is_new(move):
    """Held-out loss is not given up: on a batch of fewer samples than inputs, an exact action would."""
    results = []
    for chosen in (move, type(move)(**{**vars(move), "action": "approximate"})):
        model = network("LeakyReLU", (64, 128, 10))
        optimizer = metatele.TeleportOptimizer(torch.optim.Adam(model.parameters(), lr=1e-3), model, chosen, every=5)
        for number in range(20):
            step(model, optimizer, *images(32, seed=number))
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        assert optimizer.param_groups[0]["teleports"] > 0
    assert torch.equal(*results)


@pytest.mark.parametrize("shuffled", [False, True])
def test_auto_is_the_exact_action_on_a_batch_seen_in_the_step_before(shuffled):
    def run(action, saved=None):
        model = network("LeakyReLU", (8, 6, 3)).double()
        base = torch.optim.SGD(model.parameters(), lr=0.01)
        move = metatele.GradientNormAscent(action=action)
        optimizer = metatele.TeleportOptimizer(base, model, move, every=2)
        random = torch.Generator().manual_seed(0)
        x = torch.randn(5, 8, generator=random, dtype=torch.float64)
        y = torch.randn(5, 3, generator=random, dtype=torch.float64)
        for number in range(4):
            if saved is not None and number == 3:  # what was seen survives saving and loading
                state, weights = copy.deepcopy((optimizer.state_dict(), model.state_dict()))
                model = network("LeakyReLU", (8, 6, 3), seed=1).double()
                base = torch.optim.SGD(model.parameters(), lr=0.01)
                optimizer = metatele.TeleportOptimizer(base, model, move, every=2)
                model.load_state_dict(weights)
                optimizer.load_state_dict(state)
            order = torch.randperm(5, generator=random) if shuffled else torch.arange(5)
            step(model, optimizer, x[order], y[order], nn.functional.mse_loss)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(run("auto"), run("exact"))
    assert torch.equal(run("auto", saved=True), run("exact"))
    assert not torch.equal(run("auto"), run("approximate"))


def test_a_small_batch_does_not_make_weights_of_any_size():
    """The approximate action fits few samples with whatever weights do; the line search bounds them."""
    for seed in range(5):
        model = network("LeakyReLU", (8, 6, 5, 3), seed).double()
        random = torch.Generator().manual_seed(seed)
        size = max(float(p.detach().abs().max()) for p in model.parameters())
        for _ in range(3):
            x, y = (torch.randn(5, n, generator=random, dtype=torch.float64) for n in (8, 3))
            report = metatele.teleport_(model, x, y, nn.functional.mse_loss, action="approximate")
            assert report.moved or "more than max_change" in report.reason
        assert max(float(p.detach().abs().max()) for p in model.parameters()) < 100 * size
    with pytest.raises(ConfigError, match="max_change must be positive"):
        Ascent(max_change=0.0)


@pytest.mark.parametrize("name", ["ReLU", "LeakyReLU"])
def test_by_hand_the_default_is_that_of_the_optimizer_and_keeps_every_output(name):
    x, y = images(200)
    x, loss = x.double(), nn.functional.cross_entropy
    model, wrapped, asked = (network(name, (64, 32, 24, 10)).double() for _ in range(3))
    others = 3 * torch.randn(300, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = model(others).detach()
    report = metatele.teleport_(model, x, y, loss)
    assert report.moved
    assert report.objective_after > 1.04 * report.objective_before
    torch.testing.assert_close(model(others).detach(), before, rtol=1e-11, atol=1e-11)
    base = torch.optim.SGD(wrapped.parameters(), lr=1e-300)
    optimizer = metatele.TeleportOptimizer(base, wrapped, at=[0], batches=lambda: [(x, y)], loss_fn=loss)
    step(wrapped, optimizer, x, y)
    for p, q in zip(model.parameters(), wrapped.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
    metatele.teleport_(asked, x, y, loss, action="approximate")
    assert float((asked(others) - before).detach().abs().max()) > 1e-3, "what is asked for is done"


# --- what a report says


def still(reason, model, x, y, loss=nn.functional.cross_entropy, **settings):
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    report = metatele.teleport_(model, x, y, loss, **settings)
    assert torch.equal(before, torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert not report.moved
    assert report.steps == 0
    assert report.drift == 0
    assert reason in report.reason
    assert str(report).startswith("nothing moved: " + report.reason)
    return report


def test_a_move_that_did_nothing_says_why():
    model = network("Tanh", (64, 32, 10))
    x, y = images(100)
    still("had reached the cap", model, x, y, cap=1e-9)
    report = still("drifted past max_drift", model, x, y, move=metatele.Random(radius=3.0, max_drift=1e-6))
    assert report.rolled_back
    still("drifted past max_drift", model, x, y, rate="normalised", max_drift=1e-9)
    still("there is no direction", model, x, y, lambda out, _: 0 * out.sum())
    leaky = network("LeakyReLU", (64, 32, 10))
    metatele.teleport_(leaky, x, y, nn.functional.cross_entropy, move=metatele.Rescaling())
    still(
        "already are where the move leads", leaky, x, y, move=metatele.Rescaling(goal="balance-weights", radius=1e-300)
    )
    report = still("not finite", network("Tanh", (64, 32, 10)), x * math.nan, y)
    assert math.isnan(report.objective_before)
    assert report.loss_before is None


def test_a_report_of_the_optimizer_says_why_too():
    for prepare, data, reason in (
        (lambda m: m[2].requires_grad_(False), lambda x: x, "no hidden layer may move"),
        (lambda m: None, lambda x: x[:0], "the batch was empty"),
        (lambda m: None, lambda x: x * math.inf, "are not finite"),
    ):
        for move in (None, metatele.Whitening(mode="conjugate")):
            if move is not None and "hidden" in reason:
                continue  # a conjugation moves no layer: it changes coordinates
            model = network("ReLU", (64, 32, 10))
            prepare(model)
            optimizer = metatele.TeleportOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, move, at=[0])
            x, y = images(20)
            x = data(x)
            nn.functional.cross_entropy(model(x), y[: len(x)], reduction="sum").backward()
            optimizer.step()
            assert not optimizer.report.moved
            assert reason in optimizer.report.reason
            assert optimizer.param_groups[0]["teleports"] == 0


def test_reports_hold_plain_numbers():
    model = network("ReLU", (64, 32, 10))
    x, y = images(50)
    report = metatele.teleport_(model, x, y, nn.functional.cross_entropy, action="rescaling")
    optimizer = metatele.TeleportOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, at=[0])
    step(model, optimizer, x, y)
    for found, known in ((report, True), (optimizer.report, False)):
        assert isinstance(found, TeleportReport)
        for name in ("objective_before", "objective_after", "drift", "seconds"):
            assert type(getattr(found, name)) is float
            assert math.isfinite(getattr(found, name))
        for name in ("loss_before", "loss_after"):
            assert (type(getattr(found, name)) is float) if known else getattr(found, name) is None
        assert type(found.moved) is type(found.rolled_back) is bool
        assert type(found.steps) is int
        assert found.reason == ""
        assert str(found).startswith("squared grad-norm ")
        assert f"drift {found.drift:.1e}" in str(found)


# --- teleport_


def test_teleport_has_named_settings_and_refuses_what_does_not_go_together():
    model = network("ReLU", (64, 32, 10))
    x, y = images(50)
    loss = nn.functional.cross_entropy
    one = metatele.teleport_(copy.deepcopy(model), x, y, loss, steps=1, radius=0.01)
    assert one.steps == 1
    down = metatele.teleport_(copy.deepcopy(model), x, y, loss, descend=True, action="rescaling")
    assert down.objective_after < down.objective_before
    fixed = metatele.teleport_(copy.deepcopy(model), x, y, loss, lr=1e-3, parametrisation="cayley", max_drift=0.5)
    assert fixed.moved
    for settings, words in (
        ({"move": metatele.Rescaling(), "steps": 3}, "steps is a setting of the ascent"),
        ({"lr": 0.1, "rate": "line-search"}, "lr is that of rate fixed"),
        ({"objective": metatele.Rescaling()}, "give move=Rescaling"),
    ):
        with pytest.raises(ConfigError, match=words):
            metatele.teleport_(model, x, y, loss, **settings)
    with pytest.raises(TypeError, match="move must be a teleport move"):
        metatele.teleport_(model, x, y, loss, move="ascent")


def test_teleport_works_in_inference_mode():
    x, y = images(50)
    expected = network("ReLU", (64, 32, 10))
    metatele.teleport_(expected, x, y, nn.functional.cross_entropy)
    for made_inside in (False, True):
        model = network("ReLU", (64, 32, 10))
        with torch.inference_mode():
            inputs, targets = x.clone(), y.clone()
            if made_inside:
                model = network("ReLU", (64, 32, 10))
            report = metatele.teleport_(model, inputs, targets, nn.functional.cross_entropy)
        assert report.moved
        for p, q in zip(model.parameters(), expected.parameters(), strict=True):
            assert torch.equal(p, q)


class Around(nn.Module):
    """A module of one's own around a Sequential."""

    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def forward(self, x):
        return self.inside(x)


@pytest.mark.parametrize("wrap", [Around, nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_wrapped_models_are_looked_through(wrap):
    x, y = images(50)
    moved = []
    for around in (lambda m: m, wrap):
        model = around(network("ReLU", (64, 32, 10)))
        metatele.teleport_(model, x, y, nn.functional.cross_entropy)
        optimizer = metatele.TeleportOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, at=[0])
        step(model, optimizer, x, y)
        assert optimizer.report.moved
        moved.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*moved)


# --- optimizers and models that change


class Counting(torch.optim.Optimizer):
    """Makes its state when it is made, as AdaGrad does in torch before 2.13, and needs it."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["sum"] = torch.full_like(p, 0.5)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["sum"].addcmul_(p.grad, p.grad)
                p.addcdiv_(p.grad, self.state[p]["sum"].sqrt(), value=-group["lr"])


@pytest.mark.parametrize("make", [Counting, torch.optim.Adagrad])
def test_reset_gives_the_state_that_a_new_optimizer_has(make):
    model = network("ReLU", (64, 32, 10))
    base = make([{"params": model[0].parameters(), "lr": 0.03}, {"params": model[2].parameters()}], lr=0.01)
    optimizer = metatele.TeleportOptimizer(base, model, at=[3], state="reset")
    for number in range(4):
        step(model, optimizer, *images(50, seed=number))
    assert optimizer.param_groups[0]["teleports"] == 1
    assert [group["lr"] for group in base.param_groups] == [0.03, 0.01]
    for p in model.parameters():
        assert float(base.state[p]["sum"].std()) == 0
    weights = [p.detach().clone() for p in model.parameters()]
    twin = network("ReLU", (64, 32, 10))
    twin.load_state_dict(model.state_dict())
    other = make([{"params": twin[0].parameters(), "lr": 0.03}, {"params": twin[2].parameters()}], lr=0.01)
    for number in range(4, 7):
        step(model, optimizer, *images(50, seed=number))
        step(twin, other, *images(50, seed=number))
    assert not torch.equal(weights[0], model[0].weight)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize(
    "change",
    [lambda layer: prune.l1_unstructured(layer, "weight", 0.5), lambda layer: parametrizations.orthogonal(layer)],
    ids=["pruned", "parametrised"],
)
def test_a_layer_pruned_after_the_optimizer_was_made_is_named_as_the_cause(change):
    model = network("Tanh", (64, 32, 10))
    optimizer = metatele.TeleportOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, at=[0])
    change(model[0])
    with pytest.raises(MetateleError, match="computed from others since the optimizer was made"):
        step(model, optimizer, *images(50))
