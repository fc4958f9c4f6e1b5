"""Matching of units: a disturbed copy comes back, its function stays, and losses between networks are what they are."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

import metatele
from metatele.errors import ConfigError, NotExactError, ShapeMismatchError
from metatele.symmetry.exact import Element, act
from metatele.symmetry.find import find_symmetries
from metatele.symmetry.match import assigned, balance_
from metatele.teleport import refreshed_

SEEDS = range(8)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first, self.inner = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.second, self.outer = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x):
        return functional.relu(x + self.outer(self.second(functional.relu(self.inner(self.first(x))))))


class ResNet(nn.Module):
    def __init__(self, width=16, affine=True):
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width, affine=affine)
        self.a, self.b = Block(width), Block(width)
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        return self.head(self.b(self.a(functional.relu(self.norm(self.stem(x))))).mean((2, 3)))


class Layer(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.n, self.m = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.n(x)).chunk(3, -1))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.m(x))))


class GPT(nn.Module):
    def __init__(self, width=24, heads=4, depth=2):
        super().__init__()
        self.embed, self.place = nn.Embedding(17, width), nn.Embedding(9, width)
        self.layers, self.norm = nn.Sequential(*(Layer(width, heads) for _ in range(depth))), nn.LayerNorm(width)
        self.head = nn.Linear(width, 17, bias=False)

    def forward(self, x):
        return self.head(self.norm(self.layers(self.embed(x) + self.place.weight[: x.shape[1]])))


class Recurrent(nn.Module):
    """Weights from a set of units to itself, in which one order is on both sides."""

    def __init__(self, width=12):
        super().__init__()
        self.enter, self.stay, self.leave = nn.Linear(5, width), nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, x):
        h = functional.relu(self.enter(x[:, 0]))
        for t in range(1, x.shape[1]):
            h = functional.relu(self.enter(x[:, t]) + self.stay(h))
        return self.leave(h)


def mlp(width=16):
    return nn.Sequential(nn.Linear(7, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3))


@torch.no_grad()
def drawn(make, seed, x):
    """A network whose biases, gains and statistics are no constants."""
    torch.manual_seed(seed)
    net = make()
    for p in net.parameters():
        if p.ndim == 1:
            p += 0.3 * torch.randn_like(p)
    if any(isinstance(m, nn.BatchNorm2d) for m in net.modules()):
        net.train()
        net(3 * x + 1)
    return net.eval()


# What the library has to find, done by hand: ``rows`` writes the units, ``columns`` reads them.


def rows_(module, order, scale=1.0):
    for p in module.parameters():
        p.copy_((p.movedim(0, -1) * scale).movedim(-1, 0)[order])
    for name, b in module.named_buffers():
        if name != "num_batches_tracked":
            b.copy_(b[order])


def columns_(module, order, scale=1.0):
    w = module.weight
    w.copy_((w.movedim(1, -1) / scale).movedim(-1, 1)[:, order])


def scales(n):
    return torch.exp(torch.randn(n))


@torch.no_grad()
def disturb_mlp_(net):
    for write, read in ((net[0], net[2]), (net[2], net[4])):
        order, s = torch.randperm(len(write.bias)), scales(len(write.bias))
        rows_(write, order, s)
        columns_(read, order, s)


@torch.no_grad()
def disturb_recurrent_(net):
    order, s = torch.randperm(len(net.enter.bias)), scales(len(net.enter.bias))
    rows_(net.enter, order, s)
    rows_(net.stay, order, s)
    columns_(net.stay, order, s)
    columns_(net.leave, order, s)


@torch.no_grad()
def disturb_resnet_(net):
    width = len(net.stem.weight)
    order = torch.randperm(width)
    s = scales(width) if net.norm.affine else 1.0
    rows_(net.stem, order)
    rows_(net.norm, order, s)
    columns_(net.head, order, s)
    for block in (net.a, net.b):
        columns_(block.first, order, s)
        rows_(block.second, order)
        rows_(block.outer, order, s)
        inner, t = torch.randperm(width), scales(width)
        rows_(block.first, inner)
        rows_(block.inner, inner, t)
        columns_(block.second, inner, t)


@torch.no_grad()
def disturb_gpt_(net):
    width = net.embed.weight.shape[1]
    order = torch.randperm(width)
    for table in (net.embed, net.place):
        table.weight.copy_(table.weight[:, order])
    rows_(net.norm, order, s := scales(width))
    columns_(net.head, order, s)
    for layer in net.layers:
        for norm, read in ((layer.n, layer.qkv), (layer.m, layer.up)):
            rows_(norm, order, s := scales(width))
            columns_(read, order, s)
        rows_(layer.out, order)
        rows_(layer.down, order)
        heads = torch.arange(width).view(layer.heads, -1)[torch.randperm(layer.heads)].flatten()
        rows_(layer.qkv, torch.cat([heads, width + heads, 2 * width + heads]))
        columns_(layer.out, heads)
        inner = torch.randperm(2 * width)
        rows_(layer.up, inner)
        columns_(layer.down, inner)


CASES = {
    "mlp": (mlp, disturb_mlp_, (6, 7)),
    "recurrent": (Recurrent, disturb_recurrent_, (4, 3, 5)),
    "resnet": (ResNet, disturb_resnet_, (4, 1, 6, 6)),
    "resnet, norm without gains": (lambda: ResNet(affine=False), disturb_resnet_, (4, 1, 6, 6)),
    "gpt": (GPT, disturb_gpt_, None),
}


def inputs_of(shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g) if shape else torch.randint(17, (3, 9), generator=g)


def far(a, b):
    return float(((a - b).abs().max() / b.abs().max()).detach())


def state_of(net):
    return {name: t.clone() for name, t in net.state_dict().items()}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", CASES)
def test_a_disturbed_copy_comes_back(case, seed):
    make, disturb_, shape = CASES[case]
    x = inputs_of(shape)
    reference = drawn(make, seed, x)
    kept, model = state_of(reference), copy.deepcopy(reference)
    disturb_(model)
    assert far(model(x), reference(x)) < 1e-5  # by hand the function stays too
    assert max(far(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True)) > 0.1
    report = metatele.match_(model, reference, x, seed=seed)
    assert report.drift < 1e-5
    assert report.similarity[0] < 0.9
    assert report.similarity[1] == pytest.approx(1, abs=1e-9)
    for name, t in model.state_dict().items():
        assert far(t.double(), kept[name].double()) < 2e-6, name
    assert all(torch.equal(t, kept[name]) for name, t in reference.state_dict().items())


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", CASES)
def test_networks_that_differ_come_nearer_and_keep_their_function(case, seed):
    make, _, shape = CASES[case]
    x = inputs_of(shape)
    model, reference = (drawn(make, 100 * n + seed, x).double() for n in (1, 2))
    x = x.double() if shape else x
    before = model(x)
    report = metatele.match_(model, reference, x)
    assert far(model(x), before) < 1e-12
    assert report.moved > 0
    assert report.similarity[1] > report.similarity[0]
    again = metatele.match_(model, reference, x)  # what is alike already does not become less so
    assert again.similarity[0] == pytest.approx(report.similarity[1], abs=1e-12)
    assert again.similarity[1] > report.similarity[1] - 1e-9


def test_the_reference_itself_stays_as_it_is():
    net = drawn(mlp, 0, None)
    kept = state_of(net)
    report = metatele.match_(net, copy.deepcopy(net), inputs_of((6, 7)))
    assert report.moved == 0
    assert all(far(t, kept[name]) < 1e-6 for name, t in net.state_dict().items())


def test_what_gradient_flow_keeps_becomes_the_references():
    model, reference = drawn(mlp, 1, None).double(), drawn(mlp, 2, None).double()
    metatele.match_(model, reference, inputs_of((6, 7)).double())

    def kept(net, n):
        return net[n].weight.square().sum(1) + net[n].bias.square() - net[n + 2].weight.square().sum(0)

    assert all(far(kept(model, n), kept(reference, n)) < 1e-7 for n in (0, 2))


def test_balanced_scales_are_those_of_the_least_sum_of_squares():
    net, x = drawn(mlp, 1, None).double(), inputs_of((6, 7)).double()
    spaces = [space for space in find_symmetries(net, x).spaces if space.group == "scale"]
    tensors = {name: p.detach() for name, p in net.named_parameters()}
    balance_(spaces, tensors)
    logs = [torch.zeros(space.k, dtype=torch.float64, requires_grad=True) for space in spaces]
    moved = dict(tensors)
    for space, log in zip(spaces, logs, strict=True):
        moved.update(act(space, Element(log.exp(), (-log).exp()), moved))
    squares = sum(t.square().sum() for t in moved.values())
    assert all(float(g.abs().max()) < 1e-6 * float(squares.detach()) for g in torch.autograd.grad(squares, logs))


def test_order_alone_moves_bits_only():
    model, reference = drawn(mlp, 1, None).bfloat16(), drawn(mlp, 2, None).bfloat16()
    kept = state_of(model)
    report = metatele.match_(model, reference, inputs_of((6, 7)).bfloat16())
    assert {row.kind for row in report.rows} == {"perm"}  # scales would be rounded
    assert report.left == {"scale": 2}
    assert report.moved > 0
    assert torch.equal(model[0].bias.sort().values, kept["0.bias"].sort().values)
    assert torch.equal(model[4].weight.flatten().sort().values, kept["4.weight"].flatten().sort().values)


def test_more_starts_are_never_worse():
    model, reference, x = drawn(lambda: mlp(32), 1, None), drawn(lambda: mlp(32), 2, None), inputs_of((6, 7))
    one, many = (
        metatele.match_(copy.deepcopy(model), reference, x, starts=n, scales=False).similarity[1] for n in (1, 6)
    )
    assert many >= one


def test_found_symmetries_are_used():
    model, reference, x = drawn(mlp, 1, None), drawn(mlp, 2, None), inputs_of((6, 7))
    other = copy.deepcopy(model)
    given = metatele.match_(model, reference, x, find_symmetries(model, x))
    own = metatele.match_(other, reference, x)
    assert given.moved == own.moved
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    image = inputs_of((4, 1, 6, 6))
    foreign = find_symmetries(drawn(ResNet, 0, image).train(), image)
    with pytest.raises(ConfigError, match=r"^found is of another model: there is no parameter norm"):
        metatele.match_(model, reference, x, foreign)


def test_the_assignment_is_the_best_of_all():
    from itertools import permutations

    for seed in range(5):
        cost = torch.randn(5, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        best = max(float(cost[range(5), order].sum()) for order in map(list, permutations(range(5))))
        assert float(cost[range(5), assigned(cost)[0]].sum()) == pytest.approx(best)


class Ordered(nn.Module):
    """A buffer knows the order of the units, and nothing in training mode tells."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.register_buffer("mask", torch.tensor([1.0, 0.0, 2.0, 3.0]))

    def forward(self, x):
        h = functional.relu(self.first(x))
        return self.last(h if self.training else h * self.mask)


@pytest.mark.parametrize(
    ("model", "reference", "settings", "error", "says"),
    [
        (mlp, lambda: mlp(8), {}, ShapeMismatchError, r"0\.weight is \[16, 7\] in the model and \[8, 7\] in the ref"),
        (mlp, lambda: mlp()[:3], {}, ShapeMismatchError, r"the reference has no 4\.weight"),
        (lambda: mlp()[:3], mlp, {}, ShapeMismatchError, r"the model has no 4\.weight"),
        (mlp, mlp, {"sweeps": 0}, ConfigError, "sweeps must be at least 1, got 0"),
        (mlp, mlp, {"starts": 0}, ConfigError, "starts must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_matched_is_refused(model, reference, settings, error, says):
    net = drawn(model, 0, None)
    kept = state_of(net)
    with pytest.raises(error, match=says) as caught:
        metatele.match_(net, drawn(reference, 1, None), inputs_of((6, 7)), **settings)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(t, kept[name]) for name, t in net.state_dict().items())


def test_weights_that_are_not_finite_are_refused():
    model, reference = drawn(mlp, 0, None), drawn(mlp, 1, None)
    with torch.no_grad():
        reference[2].weight[0, 0] = float("nan")
    with pytest.raises(ConfigError, match=r"^2\.weight of the reference is not finite$"):
        metatele.match_(model, reference, inputs_of((6, 7)))


def test_a_change_of_outputs_leaves_the_model_as_it_was():
    torch.manual_seed(0)
    model, reference, x = Ordered().train(), Ordered().train(), torch.randn(5, 3)
    kept = state_of(model)
    with pytest.raises(NotExactError, match="so the model was left as it was"):
        metatele.match_(model, reference, x)
    assert model.training
    assert all(torch.equal(t, kept[name]) for name, t in model.state_dict().items())


def test_the_barrier_of_a_parabola_is_known():
    a, b = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    for net, value in ((a, -1.0), (b, 3.0)):
        nn.init.constant_(net.weight, value)
    line = metatele.loss_barrier(a, b, lambda net: -net(torch.ones(1, 1)).square().sum())
    assert len(line.losses) == 11
    assert line.losses[0] == -1
    assert line.losses[-1] == -9
    assert line.midpoint == pytest.approx(4, abs=1e-6)  # -1 at the middle, -5 between the ends
    assert line.barrier == pytest.approx(4, abs=1e-6)
    assert (a.weight.item(), b.weight.item()) == (-1, 3)


def test_statistics_are_gathered_anew_at_every_point():
    x = inputs_of((16, 1, 6, 6))
    a, b = (drawn(ResNet, n, x) for n in range(2))
    kept = state_of(a)

    def loss(net):
        return functional.mse_loss(net(x), torch.zeros(16, 5))

    with pytest.raises(ConfigError, match="norm keeps running statistics"):
        metatele.loss_barrier(a, b, loss)
    line = metatele.loss_barrier(a, b, loss, 3, refresh=[x])
    middle = copy.deepcopy(a)
    with torch.no_grad():
        for p, q in zip(middle.parameters(), b.parameters(), strict=True):
            p.lerp_(q, 0.5)
        for m in middle.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.reset_running_stats()
                m.momentum = None
        middle.train()(x)
    assert line.losses[1] == pytest.approx(float(loss(middle.eval()).detach()), rel=1e-5)
    assert all(torch.equal(t, kept[name]) for name, t in a.state_dict().items())
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.zeros(16)), batch_size=16)
    for same in (loader, iter([x]), [(x,)], [{"x": x}], lambda net: refreshed_(net, [x])):
        assert metatele.loss_barrier(a, b, loss, 3, refresh=same).losses == pytest.approx(line.losses, rel=1e-6)
    wrong = metatele.loss_barrier(a, b, loss, 3, refresh=())
    assert wrong.losses[0] == pytest.approx(float(loss(a).detach()))  # statistics as they are


def test_a_matched_copy_has_no_barrier():
    x = inputs_of((16, 1, 6, 6))
    reference = drawn(ResNet, 0, x)
    model = copy.deepcopy(reference)
    disturb_resnet_(model)

    def loss(net):
        return (net(x) - reference(x)).square().mean() / reference(x).square().mean()

    before = metatele.loss_barrier(model, reference, loss, 5, refresh=()).barrier
    metatele.match_(model, reference, x)
    after = metatele.loss_barrier(model, reference, loss, 5, refresh=()).barrier
    assert before > 1e-2
    assert after < 1e-9


def test_networks_of_two_kinds_have_no_line_between_them():
    with pytest.raises(ShapeMismatchError, match="must be of one architecture"):
        metatele.loss_barrier(mlp(), mlp(8), lambda net: 0.0)
    with pytest.raises(ConfigError, match="points must be at least 2"):
        metatele.loss_barrier(mlp(), mlp(), lambda net: 0.0, 1)
