"""Attention heads: which are found, what a balance keeps, and that trajectories do not depend on the basis."""

import copy
import math

import pytest
import torch
from general_cases import change, flat, optimizer_of
from general_cases import in_another_basis as changed
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import metatele
from metatele.errors import SingularInputError
from metatele.network.heads import heads_of
from metatele.symmetry.group import GroupElement
from metatele.symmetry.heads import balancing, imbalance, turn_

WIDTH, HEADS, K = 12, 3, 4


class Fused(nn.Module):
    """Attention in the middle of a residual network; what is done to queries and keys is a subclass's."""

    def __init__(self, bias=True, packed=True):
        super().__init__()
        self.norm, self.packed = nn.LayerNorm(WIDTH), packed
        if packed:
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=bias)
        else:
            self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=bias) for _ in range(3))
        self.out, self.head = nn.Linear(WIDTH, WIDTH, bias=bias), nn.Linear(WIDTH, 5)

    def split(self, x):
        each = self.qkv(x).chunk(3, -1) if self.packed else (self.q(x), self.k(x), self.v(x))
        return [t.unflatten(-1, (HEADS, K)).transpose(1, 2) for t in each]

    def attend(self, q, k, v):
        return functional.scaled_dot_product_attention(q, k, v)

    def forward(self, x):
        y = self.attend(*self.split(self.norm(x)))
        return self.head(torch.tanh(x + self.out(y.transpose(1, 2).flatten(2))))


class ByHand(Fused):
    def attend(self, q, k, v):
        return torch.softmax(q @ k.mT / math.sqrt(K), -1) @ v


class ByEinsum(Fused):
    def attend(self, q, k, v):
        weights = torch.einsum("bhid,bhjd->bhij", K**-0.5 * q, k).softmax(-1)
        return torch.einsum("bhij,bhjd->bhid", weights, v)


class Masked(Fused):
    def attend(self, q, k, v):
        mask = torch.ones(q.shape[-2], k.shape[-2]).tril().bool()
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Torch(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.attention, self.head = (
            nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **settings),
            nn.Linear(WIDTH, 5),
        )

    def forward(self, x):
        other = x[..., : self.attention.kdim].tanh()
        return self.head(torch.tanh(x + self.attention(x, other, other, need_weights=self.attention.training)[0]))


def encoder():
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, dropout=0.0, batch_first=True, norm_first=True)
    return nn.Sequential(layer, nn.Linear(WIDTH, 5))


class Raw(nn.Module):
    """Products with raw parameters."""

    def __init__(self):
        super().__init__()
        for name in "qkvo":
            setattr(self, name, nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x):
        q, k, v = ((x @ W).view(*x.shape[:2], HEADS, K).transpose(1, 2) for W in (self.q, self.k, self.v))
        y = (q @ k.mT).softmax(-1) @ v
        return self.head(torch.tanh(x + y.transpose(1, 2).reshape(x.shape) @ self.o))


class Checkpointed(Fused):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


WHOLE = {
    "fused": Fused,
    "fused, no bias": lambda: Fused(bias=False),
    "separate": lambda: Fused(packed=False),
    "by hand": ByHand,
    "by hand, separate": lambda: ByHand(packed=False, bias=False),
    "einsum": ByEinsum,
    "masked": Masked,
    "multihead": Torch,
    "multihead, no bias": lambda: Torch(bias=False),
    "multihead, separate": lambda: Torch(kdim=8, vdim=8),
    "encoder layer": encoder,
    "checkpointed": Checkpointed,
    "raw": Raw,
}


class Rotated(Fused):
    def attend(self, q, k, v):
        angle = torch.arange(q.shape[-2])[:, None] * torch.tensor([1.0, 0.1])
        cos, sin = angle.cos().repeat(1, 2).to(q), angle.sin().repeat(1, 2).to(q)
        q, k = (t * cos + torch.cat([-t[..., 2:], t[..., :2]], -1) * sin for t in (q, k))
        return super().attend(q, k, v)


class Normed(Fused):
    def attend(self, q, k, v):
        return super().attend(functional.layer_norm(q, (K,)), functional.layer_norm(k, (K,)), v)


class Dropped(Fused):
    def attend(self, q, k, v):
        return super().attend(functional.dropout(q, 0.1), k, v)


class Biased(Fused):
    """A vector is added to what the heads put out, in their basis."""

    def __init__(self):
        super().__init__()
        self.more = nn.Parameter(torch.ones(K))

    def attend(self, q, k, v):
        return super().attend(q, k, v) + self.more


class Shared(Fused):
    """Queries are used in a second way."""

    def attend(self, q, k, v):
        return super().attend(q, k, v + 0 * q)


class Twice(Fused):
    def forward(self, x):
        return super().forward(x) + super().forward(x.flip(0))


PARTLY = {  # what may be moved there
    "rotated": (Rotated, {"vo"}),
    "normed": (Normed, {"vo"}),
    "dropped": (Dropped, {"vo"}),
    "biased": (Biased, {"qk"}),
    "shared": (Shared, set()),
    "twice": (Twice, set()),
}


def inputs(samples=6, seed=3, dtype=torch.float64):
    return torch.randn(samples, 7, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype)


def made(make, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return make().to(dtype)


def found(model, x):
    return heads_of([model(x)], list(model.parameters()))


# --- the closed form


def test_a_balance_makes_both_second_moments_the_same_diagonal_of_the_roots_of_their_products_eigenvalues():
    random = torch.Generator().manual_seed(0)
    for _ in range(10):
        X, Y = (torch.randn(5, 9, generator=random, dtype=torch.float64) for _ in range(2))
        A, B = X @ X.T, Y @ Y.T
        M, inverse = balancing(A, B)
        D = M @ A @ M.T
        assert torch.allclose(M @ inverse, torch.eye(5).double(), atol=1e-10)
        assert torch.allclose(D, inverse.T @ B @ inverse, atol=1e-10)
        assert torch.allclose(D, D.diagonal().diag(), atol=1e-10)
        roots = torch.linalg.eigvals(A @ B).real.sqrt().sort(descending=True).values
        assert torch.allclose(D.diagonal(), roots, rtol=1e-9)


def test_a_balance_is_where_the_weights_are_shortest():
    random = torch.Generator().manual_seed(0)
    X, Y = (torch.randn(4, 9, generator=random, dtype=torch.float64) for _ in range(2))
    M, inverse = balancing(X @ X.T, Y @ Y.T)
    X, Y = M @ X, inverse.T @ Y
    least = X.square().sum() + Y.square().sum()
    for condition in (1.01, 1.5, 10.0) * 5:
        N, back = change(4, condition, random)
        assert (N @ X).square().sum() + (back.T @ Y).square().sum() > least


@pytest.mark.parametrize("A", [torch.zeros(3, 3), torch.ones(3, 3), torch.full((3, 3), torch.nan)])
def test_moments_without_an_inverse_are_refused(A):
    for pair in ((A, torch.eye(3)), (torch.eye(3), A)):
        with pytest.raises(SingularInputError):
            balancing(*pair)


# --- what is found


@pytest.mark.parametrize("name", WHOLE)
def test_every_head_is_found_and_a_change_of_basis_changes_no_output(name):
    model, x = made(WHOLE[name]), inputs()
    assert [head.kind for head in found(model, x)].count("qk") == HEADS
    assert [head.kind for head in found(model, x)].count("vo") == HEADS
    other = changed(model, x)
    assert flat(other).abs().max() > 2 * flat(model).abs().max()
    assert torch.allclose(other(x), model(x), rtol=0, atol=1e-10)
    assert torch.allclose(other(inputs(seed=9)), model(inputs(seed=9)), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", PARTLY)
def test_what_lies_between_weights_and_product_leaves_a_head_alone(name):
    make, kinds = PARTLY[name]
    assert {head.kind for head in found(made(make), inputs())} == kinds


def test_frozen_and_half_precision_ones_are_left():
    x = inputs()
    model = made(Fused)
    model.out.weight.requires_grad_(False)
    report = metatele.balance_heads_(model, x)
    assert {row.kind for row in report.rows} == {"qk"}
    half = made(Fused, dtype=torch.bfloat16)
    before = flat(half)
    assert not metatele.balance_heads_(half, inputs(dtype=torch.bfloat16)).moved
    assert torch.equal(flat(half), before)


def test_weights_that_two_layers_share_are_left():
    model = nn.Sequential(made(encoder)[0], made(encoder))
    model[1][0].self_attn = model[0].self_attn
    assert not found(model.double(), inputs())


class Grouped(Fused):
    """Two heads of queries for each of keys and values."""

    def __init__(self):
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(WIDTH, 16), nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def split(self, x):
        k, v = (t.unflatten(-1, (2, K)).transpose(1, 2) for t in self.kv(x).chunk(2, -1))
        k, v = (t[:, :, None].expand(-1, -1, 2, -1, -1).reshape(len(x), 4, -1, K) for t in (k, v))
        return self.q(x).unflatten(-1, (4, K)).transpose(1, 2), k, v


class GroupedByFlag(Grouped):
    """The same without copies of keys and values, as transformers has it."""

    def split(self, x):
        k, v = (t.unflatten(-1, (2, K)).transpose(1, 2) for t in self.kv(x).chunk(2, -1))
        return self.q(x).unflatten(-1, (4, K)).transpose(1, 2), k, v

    def attend(self, q, k, v):
        return functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)


@pytest.mark.parametrize("make", [Grouped, GroupedByFlag])
def test_grouped_queries_change_together(make):
    model, x = made(make), inputs()
    heads = found(model, x)
    sides = sorted((head.kind, len(head.left), len(head.right)) for head in heads)
    assert sides == 2 * [("qk", 2, 1)] + 2 * [("vo", 1, 2)]
    other = changed(model, x)
    assert torch.allclose(other(x), model(x), rtol=0, atol=1e-10)
    first, second = copy.deepcopy(model), other
    assert metatele.balance_heads_(first, x).moved == metatele.balance_heads_(second, x).moved == 4
    assert torch.allclose(first(x), model(x), rtol=0, atol=1e-10)
    assert torch.allclose(flat(first), flat(second), rtol=0, atol=1e-8)


# --- the function


@pytest.mark.parametrize("name", WHOLE)
def test_a_balance_keeps_the_outputs_and_all_bases_lead_to_the_same_weights(name):
    model, x = made(WHOLE[name]), inputs()
    other = changed(model, x)
    before = model(x)
    report, its = metatele.balance_heads_(model, x), metatele.balance_heads_(other, x)
    assert report.moved == its.moved == 2 * HEADS
    assert max(row.imbalance for row in report.rows) < 1.6 < 5 < min(row.imbalance for row in its.rows)
    assert torch.allclose(model(x), before, rtol=0, atol=1e-10)
    assert torch.allclose(other(x), before, rtol=0, atol=1e-10)
    assert torch.allclose(flat(model), flat(other), rtol=0, atol=1e-8)
    assert max(row.imbalance for row in metatele.balance_heads_(other, x).rows) < 1 + 1e-8


def test_a_start_that_is_nearly_balanced_can_be_left():
    model, x = made(Fused), inputs()
    before = flat(model)
    report = metatele.balance_heads_(model, x, above=1.6)
    assert len(report.rows) == 2 * HEADS
    assert not report.moved
    assert torch.equal(flat(model), before)


def test_outputs_that_depend_on_the_basis_outside_of_the_graph_are_noticed():
    class Leaky(Fused):
        def forward(self, x):
            return super().forward(x) + self.qkv.weight.square().sum()

    class Hidden(Fused):
        def attend(self, q, k, v):
            self.queries = q
            return super().attend(q, k, v)

    assert not found(made(Leaky), inputs())
    model = changed(made(Hidden, dtype=torch.float32), inputs(dtype=torch.float32))
    optimizer = optimizer_of(model)
    loss = model(inputs(dtype=torch.float32)).square().mean() + model.queries.square().mean()
    loss.backward()
    optimizer.step()
    assert "3 pairs" in optimizer.describe().note  # those around values


# --- the optimizer


def trained(model, steps, settings=None, dtype=torch.float32, **keywords):
    optimizer = optimizer_of(model, settings=settings, **keywords)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        x = inputs(8, 100 + step, dtype)
        loss = functional.cross_entropy(model(x).flatten(0, 1), (x[..., :5].argmax(-1)).flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses), optimizer


@pytest.mark.parametrize("name", ["fused", "separate", "by hand", "multihead", "encoder layer", "raw"])
def test_two_bases_of_one_network_take_the_same_way(name):
    model = made(WHOLE[name], dtype=torch.float32)
    other = changed(model, inputs(dtype=torch.float32))
    plain = copy.deepcopy(other)
    losses, _ = trained(model, 25, {"heads": 1.0})
    its, optimizer = trained(other, 25, {"heads": 1.0})
    without, _ = trained(plain, 25, {"heads": 0.0})
    assert (losses - its).abs().max() < 2e-3
    assert (losses - without).abs().max() > 10 * (losses - its).abs().max()
    assert "6 pairs" in optimizer.describe().note


def test_the_first_step_is_that_of_a_network_that_was_balanced_before():
    x = inputs(dtype=torch.float32)
    model = changed(made(Fused, dtype=torch.float32), x)
    ahead = copy.deepcopy(model)
    metatele.balance_heads_(ahead, x)
    trained(model, 1)
    trained(ahead, 1, {"heads": 0.0})
    assert torch.allclose(flat(model), flat(ahead), rtol=0, atol=2e-5)


def test_an_ordinary_start_is_not_touched():
    for name in ("fused", "multihead", "encoder layer"):
        one, two = (made(WHOLE[name], dtype=torch.float32) for _ in range(2))
        trained(one, 3)
        _, optimizer = trained(two, 3, {"heads": 0.0})
        assert torch.equal(flat(one), flat(two))
        assert not optimizer.describe().note


def test_accumulated_passes_and_scaled_losses_are_balanced_too():
    x = inputs(dtype=torch.float32)
    models = [changed(made(Fused, dtype=torch.float32), x) for _ in range(2)]
    for model, scale in zip(models, (1.0, 1000.0), strict=True):
        optimizer = optimizer_of(model)
        with torch.no_grad():
            model(x)  # an evaluation
        model(x)  # and a pass that nothing came of
        for part in x.split(3):
            (scale * model(part).square().mean() / 2).backward()
        for p in model.parameters():
            p.grad /= scale
        optimizer.step()
        assert "6 pairs" in optimizer.describe().note
    assert torch.allclose(flat(models[0]), flat(models[1]), atol=1e-4)


def test_passes_in_half_precision_are_balanced_too():
    x = inputs(dtype=torch.float32)
    model = changed(made(Fused, dtype=torch.float32), x, condition=10.0)
    optimizer = optimizer_of(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    assert "6 pairs" in optimizer.describe().note


def test_gradients_that_are_not_finite_put_it_off():
    x = inputs(dtype=torch.float32)
    model = changed(made(Fused, dtype=torch.float32), x)
    optimizer = optimizer_of(model)
    for factor in (float("nan"), 1.0):
        assert not optimizer.stepper.heads
        optimizer.zero_grad()
        (factor * model(x).square().mean()).backward()
        optimizer.step()
    assert optimizer.stepper.heads == 6


def test_a_resumed_run_is_not_balanced_again_and_ends_in_the_same_bits():
    x = inputs(dtype=torch.float32)
    model = changed(made(Fused, dtype=torch.float32), x)
    straight = copy.deepcopy(model)
    trained(straight, 6)
    _, optimizer = trained(model, 3)
    again = copy.deepcopy(model)
    resumed = optimizer_of(again)
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.describe().note == optimizer.describe().note
    for step in range(3, 6):
        resumed.zero_grad()
        x = inputs(8, 100 + step, torch.float32)
        functional.cross_entropy(again(x).flatten(0, 1), (x[..., :5].argmax(-1)).flatten()).backward()
        resumed.step()
    assert torch.equal(flat(again), flat(straight))


def test_what_does_not_move_is_not_balanced():
    x = inputs(dtype=torch.float32)
    model = changed(made(Fused, dtype=torch.float32), x)
    before = model.qkv.weight.detach().clone()
    rest = [p for name, p in model.named_parameters() if not name.startswith("qkv")]
    _, optimizer = trained(model, 2, params=rest)
    assert not optimizer.describe().note
    assert torch.equal(model.qkv.weight, before)


def test_imbalance_does_not_depend_on_scale_and_counts_a_basis():
    model, x = made(Fused), inputs()
    weights = {id(p): p.detach() for p in model.parameters()}
    for head in found(model, x):
        was = imbalance(head, weights)
        eye = torch.eye(K, dtype=torch.float64)
        turn_(head, GroupElement(3 * eye, eye / 3), weights)
        assert math.isclose(imbalance(head, weights), was, rel_tol=1e-9)
