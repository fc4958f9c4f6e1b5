"""What a move keeps in passes other than the example's: another mode, another length, other layers, other samples."""

import copy

import pytest
import torch
from symmetry_cases import Wrap
from torch import nn

import metatele

SEEDS = (0, 1, 2)
MOVES = {
    "randomize_": metatele.randomize_,
    "balance_": lambda model, x, seed: metatele.balance_(model, x),
    "Balance": lambda model, x, seed: metatele.teleport_(
        model, x, torch.zeros(len(x), 3).double(), nn.functional.mse_loss, move=metatele.Balance()
    ),
}


def far(a, b):
    return float((a - b).detach().abs().max())


class OwnNorm(nn.Module):
    """A norm by running statistics of its own, written as people write them."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))

    def forward(self, x):
        if self.training:
            self.mean.lerp_(x.detach().mean(0), 0.1)
            return x - x.mean(0)
        return x - self.mean


NORMS = {
    "BatchNorm1d": lambda: nn.BatchNorm1d(6),
    "without gains": lambda: nn.BatchNorm1d(6, affine=False),
    "without statistics": lambda: nn.BatchNorm1d(6, track_running_stats=False),
    "own": lambda: OwnNorm(6),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("norm", NORMS)
def test_running_statistics_follow_their_units(norm, move, training, seed):
    if move == "Balance" and norm in ("without gains", "own"):
        pytest.skip("it has no continuous symmetry, and is refused")
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 6), NORMS[norm](), nn.ReLU(), nn.Linear(6, 3)).double()
    x = torch.randn(40, 5).double() + 1
    for _ in range(20):
        model(x * torch.rand(5))
    statistics = {name: b.clone() for name, b in model.named_buffers()}
    before = {mode: copy.deepcopy(model).train(mode)(x) for mode in (True, False)}
    MOVES[move](model.train(training), x, seed=seed)
    for name, b in model.named_buffers():
        assert torch.equal(b.reshape(-1).sort().values, statistics[name].reshape(-1).sort().values)
    for mode, outputs in before.items():
        assert far(copy.deepcopy(model).train(mode)(x), outputs) < 1e-9, mode


def test_channels_of_a_norm_in_evaluation_are_permuted():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)).double()
    x = torch.randn(20, 2, 5, 5).double()
    for _ in range(5):
        model(x)
    found = metatele.find_symmetries(model.eval(), x)
    (perm,) = (space for space in found.spaces if space.group == "perm")
    assert not found.dropped
    assert {place.name for place in perm.statistics} == {"1.running_mean", "1.running_var"}


class Positions(nn.Module):
    """A table of positions of which a pass takes as many as there are words."""

    def __init__(self, take):
        super().__init__()
        self.e, self.p = nn.Embedding(11, 8), nn.Parameter(torch.randn(12, 8))
        self.a, self.o, self.take = nn.Linear(8, 10), nn.Linear(10, 3), take

    def forward(self, x):
        return self.o(self.a(self.e(x) + self.take(self.p, x.shape[1])).relu())


TAKEN = {
    "slice": lambda p, n: p[:n],
    "second slice": lambda p, n: p[None, :n],
    "narrow": lambda p, n: p.narrow(0, 0, n),
    "doubled": lambda p, n: (p * 2)[:n],
    "index_select": lambda p, n: p.index_select(0, torch.arange(n)),
    "index": lambda p, n: p[torch.arange(n)],
    "embedding": lambda p, n: nn.functional.embedding(torch.arange(n), p),
    "reversed": lambda p, n: p.flip(0)[:n],
}


@pytest.mark.parametrize("length", [5, 12])
@pytest.mark.parametrize("take", TAKEN)
def test_longer_sequences_than_the_example_keep_their_outputs(take, length):
    torch.manual_seed(0)
    model, words = Positions(TAKEN[take]).double(), torch.randint(11, (4, 12))
    before = model(words)
    report = metatele.randomize_(model, words[:, :length])
    assert report.rows
    assert far(model(words), before) < 1e-9


def test_what_a_short_example_leaves_out_is_said():
    found = metatele.find_symmetries(Positions(TAKEN["slice"]), torch.randint(11, (4, 5)))
    assert "only a part of it" in found.frozen["p"]
    whole = metatele.find_symmetries(Positions(TAKEN["slice"]), torch.randint(11, (4, 12)))
    assert whole.dimension > found.dimension


def test_layers_that_the_pass_leaves_out_are_warned_of():
    def forward(s, x):
        h = s.a(x).relu()
        return (s.o(h), s.aux(h)) if s.training else s.o(h)

    model = Wrap(forward, a=nn.Linear(5, 6), o=nn.Linear(6, 3), aux=nn.Linear(6, 2)).double()
    x, y = torch.randn(8, 5).double(), torch.randn(8, 3).double()
    for move in (metatele.randomize_, metatele.balance_):
        with pytest.warns(UserWarning, match=r"does not use aux.weight, aux.bias"):
            move(model.eval(), x)
    with pytest.warns(UserWarning, match=r"does not use aux.weight, aux.bias"):
        metatele.teleport_(model, x, y, nn.functional.mse_loss, move=metatele.Rescaling())
    before = model.train()(x)
    metatele.randomize_(model, x)
    assert all(far(a, b) < 1e-9 for a, b in zip(model(x), before, strict=True))


def graph(s, x):
    """A step of messages over edges that are drawn anew."""
    edges = torch.randint(len(x), (2, 30), generator=torch.Generator().manual_seed(len(x)))
    h = s.a(x).relu()
    sums = h.new_zeros(h.shape).index_add_(0, edges[1], h[edges[0]])
    return s.o((s.b(sums) + torch.zeros_like(h) + s.c(h)).relu())


@pytest.mark.parametrize("seed", SEEDS)
def test_graph_networks(seed):
    torch.manual_seed(seed)
    model = Wrap(graph, a=nn.Linear(5, 6), b=nn.Linear(6, 6), c=nn.Linear(6, 6), o=nn.Linear(6, 3)).double()
    x, other = torch.randn(9, 5).double(), torch.randn(14, 5).double()
    found = metatele.find_symmetries(model, x)
    assert not found.unknown
    assert {(space.group, space.k) for space in found.spaces} == {("scale", 6), ("perm", 6)}
    assert len(found.spaces) == 4
    before = model(other)
    metatele.randomize_(model, x, found=found, seed=seed)
    assert far(model(other), before) < 1e-9


class Mixture(nn.Module):
    """Experts in a list or stacked, of which a router takes all by their weights, or the best two."""

    def __init__(self, stacked, best):
        super().__init__()
        self.router, self.best = nn.Linear(5, 4), best
        if stacked:
            self.w = nn.Parameter(torch.randn(4, 5, 6) / 2)
            self.b = nn.Parameter(torch.randn(4, 6))
            self.v = nn.Parameter(torch.randn(4, 6, 3) / 2)
        else:
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 3)) for _ in range(4))

    def forward(self, x):
        weight = self.router(x).softmax(-1)
        if self.best:
            weight = weight * (weight >= weight.topk(self.best).values[..., -1:])
        if hasattr(self, "w"):
            each = (torch.einsum("bi,kio->bko", x, self.w) + self.b).tanh()
            return torch.einsum("bko,kop,bk->bp", each, self.v, weight)
        return sum(weight[:, k, None] * expert(x) for k, expert in enumerate(self.experts))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("best", [0, 2])
@pytest.mark.parametrize("stacked", [True, False])
def test_experts_are_permuted_with_their_router(stacked, best, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), Mixture(stacked, best)).double()
    x, other = torch.randn(20, 5).double(), torch.randn(50, 5).double()
    found = metatele.find_symmetries(model, x)
    assert not found.dropped
    (experts,) = (space for space in found.spaces if space.k == 4 and "2.router.weight" in space.parameters)
    assert {name for name, _ in model[2].named_parameters(prefix="2")} == set(experts.parameters)
    before, rows = model(other), model[2].router.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    model(x).square().sum().backward()
    optimizer.step()
    report = metatele.randomize_(model, x, found=found, seed=seed)
    assert not torch.equal(model[2].router.weight, rows)
    assert far(model(other), before) < 1e-9
    metatele.carry_along_(optimizer, model, report)
    optimizer.zero_grad()
    model(x).square().sum().backward()
    assert all(far(optimizer.state[p]["momentum_buffer"], p.grad) < 1e-9 for p in model.parameters())
    metatele.balance_(model, x)
    canonical = [p.detach().clone() for p in model.parameters()]
    metatele.randomize_(model, x, seed=seed + 1)
    metatele.balance_(model, x)
    assert far(model(other), before) < 1e-9
    assert all(far(p, q) < 1e-7 for p, q in zip(model.parameters(), canonical, strict=True))


def test_another_layer_of_as_many_rows_is_no_router():
    def forward(s, x):
        return s.head(sum(s.router(x).softmax(-1)[:, k, None] * expert(x) for k, expert in enumerate(s.experts)))

    experts = nn.ModuleList(nn.Linear(5, 3) for _ in range(4))
    model = Wrap(forward, experts=experts, router=nn.Linear(5, 4), head=nn.Linear(3, 4))
    found = metatele.find_symmetries(model, torch.randn(9, 5))
    (space,) = (space for space in found.spaces if space.blocks)
    assert not any(name.startswith("head") for name in space.parameters)


def test_layers_in_a_row_are_no_experts():
    def forward(s, x):
        for layer in s.layers:
            x = x + layer(x).tanh()
        return s.head(x)

    model = Wrap(forward, layers=nn.ModuleList(nn.Linear(5, 5) for _ in range(3)), head=nn.Linear(5, 3))
    found = metatele.find_symmetries(model, torch.randn(9, 5))
    assert not found.dropped
    assert not any(space.blocks for space in found.spaces)
