"""Geometry of any module: curves along its exact symmetries, sharpness, and gradient norms."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import metatele
from metatele.errors import ConfigError, ShapeMismatchError
from metatele.geometry import (
    Curvature,
    GradientNorm,
    Landscape,
    ModulePoint,
    Sharpness,
    curvatures,
    derivatives,
    module_curvatures,
    module_derivatives,
    random_tangents,
)
from metatele.network.spaces import Place, Space
from metatele.perceptron.losses import CrossEntropy, SquaredError
from metatele.symmetry.exact import act, element_of


def continuous(model, x, groups=("GL", "O", "scale", "phase", "shift")):
    return [s for s in metatele.find_symmetries(model, x).spaces if s.group in groups]


class Block(nn.Module):
    """A small GPT's block with RMSNorm, whose gains a change of basis passes, rotary heads and SwiGLU."""

    def __init__(self, width=6, rotary=True):
        super().__init__()
        self.table, self.first, self.second = nn.Embedding(9, width), nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 24), nn.Linear(8, width)
        self.gate, self.up, self.down = nn.Linear(width, 5), nn.Linear(width, 5), nn.Linear(5, width, bias=False)
        self.head, self.rotary = nn.Linear(width, 9), rotary

    def turned(self, x):
        at = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * 2.0 ** -torch.arange(x.shape[-1] // 2, dtype=x.dtype)
        a, b = x.chunk(2, -1)
        return torch.cat([a * at.cos() - b * at.sin(), b * at.cos() + a * at.sin()], -1) if self.rotary else x

    def forward(self, tokens):
        x = self.table(tokens)
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(self.first(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(self.turned(q), self.turned(k), v).transpose(1, 2).flatten(2))
        h = self.second(x)
        return self.head(x + self.down(F.silu(self.gate(h)) * self.up(h)))


def convolutions():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 2, groups=2), nn.LeakyReLU(), nn.Flatten()
    )
    return model.append(nn.Linear(4, 3)), torch.randn(6, 2, 4, 4)


def attention():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x):
            return self.a(x, x, x, need_weights=False)[0]

    return Heads(), torch.randn(6, 3, 4)


def gpt():
    return Block(), torch.randint(9, (5, 4))


def plain_gpt():
    return Block(rotary=False), torch.randint(9, (5, 4))


def linears():
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(3, 2)), torch.randn(7, 3)


MODULES = {"CNN": convolutions, "MHA": attention, "GPT rotary": gpt, "GPT": plain_gpt, "linear": linears}


def made(name):
    torch.manual_seed(0)
    model, x = MODULES[name]()
    model = model.double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model, x.double() if x.is_floating_point() else x


def along(spaces, tensors, M, t):
    """``exp(tM)·w`` by the actions themselves."""
    now = dict(tensors)
    for space, m in zip(spaces, M, strict=True):
        now.update(act(space, element_of(space, t * m), now))
    return now


@pytest.mark.parametrize("name", MODULES)
def test_derivatives_are_those_of_the_action(name):
    model, x = made(name)
    spaces = continuous(model, x)
    groups = {s.group for s in spaces}
    assert groups >= {"CNN": {"scale"}, "MHA": {"GL", "shift"}, "GPT rotary": {"O", "phase"}, "GPT": {"O", "GL"}}.get(
        name, {"GL", "shift"}
    )
    if "GPT" in name:
        assert any(p.gain is not None for s in spaces for p in s.places)
    tensors = {n: p.detach() for n, p in model.named_parameters()}
    M = random_tangents(spaces, 2, 1, torch.zeros((), dtype=torch.float64))
    rows = module_derivatives(model, spaces, M)
    h = 1e-2
    for curve in range(2):
        at = {k: along(spaces, tensors, [m[curve] for m in M], k * h) for k in range(-4, 5)}
        for n in rows[0]:
            f = [at[k][n] for k in range(-4, 5)]
            differences = (  # of eighth, sixth and sixth order
                (f[0] - f[8]) / 280 - 4 * (f[1] - f[7]) / 105 + (f[2] - f[6]) / 5 - 4 * (f[3] - f[5]) / 5,
                (f[1] + f[7]) / 90 - 3 * (f[2] + f[6]) / 20 + 3 * (f[3] + f[5]) / 2 - 49 * f[4] / 18,
                -7 * (f[0] - f[8]) / 240 + 3 * (f[1] - f[7]) / 10 - 169 * (f[2] - f[6]) / 120 + 61 * (f[3] - f[5]) / 30,
            )
            for j, (wanted, tolerance) in enumerate(zip(differences, (1e-10, 1e-8, 1e-5), strict=True)):
                torch.testing.assert_close(
                    rows[j][n][curve].detach(), wanted / h ** (j + 1), rtol=tolerance, atol=tolerance
                )
        assert all(torch.equal(at[0][n], tensors[n]) for n in tensors if n not in rows[0])


@pytest.mark.parametrize("name", ["CNN", "linear"])
def test_the_slope_is_how_curvature_changes_along_a_curve(name):
    model, x = made(name)  # whose spaces commute, so that a curve is one curve from each of its points
    spaces = continuous(model, x, ("GL", "scale"))
    tensors = {n: p.detach() for n, p in model.named_parameters()}
    M = random_tangents(spaces, 3, 1, torch.zeros((), dtype=torch.float64))
    found = module_curvatures(tensors, spaces, M, slope=True)
    assert (found.kappa > 1e-3).all()
    h = 1e-4
    for curve in range(3):
        own = [m[curve] for m in M]
        up, down = (
            module_curvatures(along(spaces, tensors, own, t), spaces, [m[None] for m in own]).kappa[0] for t in (h, -h)
        )
        torch.testing.assert_close((up - down) / (2 * h), found.slope[curve], rtol=1e-6, atol=1e-8)


def test_curvature_is_one_over_the_radius_of_a_circle():
    radius = 2.5  # a rotation of a plane takes weights around a circle
    tensors = {"w": torch.tensor([radius, 0.0], dtype=torch.float64)}
    space = Space("O", 2, (Place("w", torch.arange(2)[:, None], torch.zeros(1, dtype=torch.long), False),))
    M = torch.tensor([[[0.0, -1.0], [1.0, 0.0]]], dtype=torch.float64)
    kappa, slope = module_curvatures(tensors, [space], [M], slope=True)
    torch.testing.assert_close(kappa, torch.tensor([1 / radius], dtype=torch.float64))
    torch.testing.assert_close(slope, torch.zeros(1, dtype=torch.float64))


def perceptron(act, widths=(6, 5, 4, 2), n=8):
    layers = [nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(widths)]
    model = nn.Sequential(*[m for layer in layers for m in (layer, act())][:-1]).double()
    return model, torch.randn(n, widths[0], dtype=torch.float64)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["linear", "leaky"])
def test_it_is_the_perceptrons_where_both_exist(kind, seed):
    torch.manual_seed(seed)
    model, x = perceptron(nn.Identity) if kind == "linear" else perceptron(lambda: nn.LeakyReLU(0.1), n=6)
    scene = Landscape(model, x.T, torch.randn(2, len(x), dtype=torch.float64), SquaredError())
    spaces = continuous(model, x, ("GL",) if kind == "linear" else ("scale",))
    assert [s.k for s in spaces] == [5, 4]
    if kind == "linear":
        M = random_tangents(spaces, 4, seed, x)
        theirs = M
        for ours, drawn in zip(M, Curvature(curves=4, seed=seed).draw(scene.mlp, x), strict=True):
            torch.testing.assert_close(ours, drawn)
    else:  # a scale is a diagonal M, which the activation lets pass
        M = random_tangents(spaces, 4, seed, x)
        theirs = [m.diag_embed() for m in M]
    weights = scene.at(model).weights
    for row, other in zip(module_derivatives(model, spaces, M), derivatives(scene, weights, theirs), strict=True):
        for n, part in zip(row, other, strict=True):
            torch.testing.assert_close(row[n].detach(), part, rtol=1e-9, atol=1e-9)
    for ours, other in zip(
        module_curvatures(model, spaces, M, slope=True), curvatures(scene, weights, theirs, slope=True), strict=True
    ):
        torch.testing.assert_close(ours.detach(), other, rtol=1e-9, atol=1e-9)


def test_objectives_take_a_perceptron_either_way():
    torch.manual_seed(0)
    model, x = perceptron(nn.Identity)
    y = torch.randint(2, (8,))
    here = ModulePoint(model, lambda: F.cross_entropy(model(x), y), continuous(model, x))
    there = Landscape(model, x.T, y, CrossEntropy()).at(model)
    for goal in (Sharpness(directions=5), Sharpness(directions=3, orthant=True), Curvature(curves=3), GradientNorm()):
        ours, wanted = goal.value_and_gradient(here), goal.value_and_gradient(there)
        close = 1e-6 if isinstance(goal, GradientNorm) else 1e-9  # whose derivative is a difference of gradients
        for a, b in zip(ours, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=close, atol=close)
        torch.testing.assert_close(goal.value(here), ours[0])


@pytest.mark.parametrize("name", ["CNN", "GPT"])
@pytest.mark.parametrize("goal", [Sharpness(directions=2, displacements=(0.01, 0.1)), Curvature(curves=2)])
def test_gradients_are_those_of_the_values_and_nothing_moves(name, goal):
    model, x = made(name)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    y = torch.randn_like(model(x).detach())
    model.load_state_dict(before)
    point = ModulePoint(model, lambda: (model(x) - y).square().mean(), continuous(model, x))
    value, gradient = goal.value_and_gradient(point)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    direction = point.unflatten(torch.randn(point.size, dtype=torch.float64))
    h, values = 1e-5, []
    for t in (h, -h):
        with torch.no_grad(), point.restored(point.own) as was:
            for n, p in point.own.items():
                p.copy_(was[n] + t * direction[n])
            values.append(goal.value(point))
    torch.testing.assert_close(
        (values[0] - values[1]) / (2 * h), gradient @ point.flatten(direction), rtol=1e-5, atol=1e-8
    )
    assert value == goal.value(point)


def test_a_displaced_loss_that_overflows_makes_sharpness_infinite():
    model = nn.Linear(1, 1).double()
    x = torch.ones(1, 1, dtype=torch.float64)
    point = ModulePoint(model, lambda: model(x).square().sum() / (model.weight.detach() - model.weight.detach()).sum())
    assert Sharpness(directions=1).value(point) == math.inf


def test_bad_input_gets_a_sentence():
    model, x = made("linear")
    found = metatele.find_symmetries(model, x).spaces
    spaces = continuous(model, x, ("GL",))
    M = random_tangents(spaces, 1, 0, x)
    with pytest.raises(ConfigError, match="one M for each of 2 spaces"):
        module_curvatures(model, spaces, M[:1])
    with pytest.raises(ShapeMismatchError, match=r"the M of GL of . must be \[1"):
        module_curvatures(model, spaces, [M[0][:, :2], M[1]])
    with pytest.raises(ConfigError, match="order must be"):
        module_derivatives(model, spaces, M, 4)
    with pytest.raises(ConfigError, match="another model"):
        module_curvatures(nn.Linear(2, 2), spaces, M)
    with pytest.raises(ConfigError, match="at least one space"):
        module_curvatures(model, [], [])
    with pytest.raises(ConfigError, match="no continuous group"):
        random_tangents([Space("perm", 2, ())], 1, 0, x)
    with pytest.raises(ConfigError, match="antisymmetric"):
        module_curvatures(model, [Space("O", found[0].k, found[0].places)], M[:1])
    with pytest.raises(ConfigError, match="needs a loss"):
        Sharpness(directions=1).value(ModulePoint(model))
    with pytest.raises(ConfigError, match="needs spaces"):
        Curvature().value(ModulePoint(model))
    with pytest.raises(ConfigError, match="truncate"):
        Curvature(truncate=True).value(ModulePoint(model, None, spaces))
    with pytest.raises(ConfigError, match="asks for a gradient"):
        ModulePoint(nn.Linear(2, 2).requires_grad_(False))
    with pytest.raises(ConfigError, match="loss must be a function"):
        ModulePoint(model, 3.0)
    with pytest.raises(ShapeMismatchError, match="scalar tensor"):
        GradientNorm().value(ModulePoint(model, lambda: model(x)))
    with pytest.raises(ConfigError, match="point must be a Point"):
        Curvature().value(model)
