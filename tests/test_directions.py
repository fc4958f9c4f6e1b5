"""Directions of many matrices: made in one go where they are small, by leading directions where they are wide."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

import metatele
from metatele.config import GeneralConfig
from metatele.learned.general import direction
from metatele.learned.general.direction import (
    Root,
    directed_,
    drawn_,
    evened,
    evened_in_half,
    leading_factor,
    msign,
    norms,
    odds_of,
    squared_out,
)
from metatele.learned.general.kept import Kept, grouped
from metatele.learned.general.layout import Layout

WIDE = 200


def kept_of(layout, exact=True):
    found = []
    for bucket in layout.buckets:
        m, _, i = bucket.shape
        A = torch.eye(i) + torch.randn(m, i, i).square() / i
        kept = Kept(root=Root.of_dense(A @ A.mT, torch.ones(m)), spectral=torch.rand(m, 1, 1))
        kept.exact = exact
        found.append(kept)
    return found


def test_small_buckets_are_stepped_in_one_go_as_each_on_its_own():
    torch.manual_seed(0)
    layout = Layout([(1, 8, 9), (1, 5, 9), (2, 8, 9), (1, 12, 4), (1, 60, 61)], ["dense"] * 5, [])
    kept, flat = kept_of(layout), torch.randn(layout.size)
    homes = [bucket.of(flat) for bucket in layout.buckets]
    lengths = torch.rand(layout.matrices, 1, 1)
    expected = []
    for bucket, one, X in zip(layout.buckets, kept, homes, strict=True):
        D = one.direction(X.clone(), 1, 5)
        expected.append(-lengths[bucket.rows] * D / norms(D)[:, None, None])
    together, alone = grouped(GeneralConfig(), layout.buckets, kept, homes)
    assert not alone
    assert len(together) < len(kept)
    for one in together:
        one.step(lengths)
    for found, X in zip(homes, expected, strict=True):
        torch.testing.assert_close(found, X, rtol=1e-3, atol=1e-5)


def test_what_is_dear_is_made_alone():
    torch.manual_seed(0)
    layout = Layout([(1, 8, 9), (1, 5, 9), (1, 100, 101), (1, 101, 100)], ["dense"] * 4, [])
    kept = kept_of(layout)
    kept[0].every = 2
    together, alone = grouped(
        GeneralConfig(), layout.buckets, kept, [b.of(torch.zeros(layout.size)) for b in layout.buckets]
    )
    assert alone == [0]
    assert len(together) == 3


@pytest.mark.parametrize("shape", [(200, 260), (200, 200)])
def test_a_leading_factor_is_a_polar_factor_along_the_largest_directions(shape):
    torch.manual_seed(0)
    U, _, V = torch.linalg.svd(torch.randn(1, *shape), full_matrices=False)
    size = torch.cat([torch.linspace(30, 5, 40), torch.full((160,), 0.5)])
    X = U * size @ V
    F, c = leading_factor(X @ X.mT, U[..., :32] + 0.02 * torch.randn(1, shape[0], 32))
    made = c * X - F @ (F.mT @ X)
    cosine = (made * msign(X, 8)).sum() / made.norm() / msign(X, 8).norm()
    assert float(cosine) > 0.97
    assert float(torch.linalg.svdvals(made).max()) < 1.3


@pytest.mark.parametrize("shape", [(WIDE, WIDE + 1), (WIDE + 40, WIDE)])
def test_led_directions_are_those_of_root_and_factor_one_after_the_other(shape):
    torch.manual_seed(0)
    o, i = shape
    F = torch.randn(1, i, 32)
    kept = Kept(Root.of_factor(F, torch.ones(1), torch.ones(1)), exact=False, spectral=torch.full((1, 1, 1), 0.7))
    kept.leading = True
    X = torch.randn(1, 1, o).mT * torch.randn(1, 1, i) + torch.randn(1, o, i)
    found = kept.direction(X, 1, 5)
    P, c = kept.factor[..., :-1], kept.factor[:, :1, -1:]
    assert kept.factor.shape == (1, min(shape), 65)
    assert float(c) > 0
    turned = kept.root.right(X)
    made = c * turned - (P @ (P.mT @ turned) if o <= i else turned @ P @ P.mT)
    torch.testing.assert_close(found, kept.root.back(made), rtol=1e-3, atol=1e-4)


def trained(model, steps, optimizer=None, begin=0):
    optimizer = optimizer or metatele.LearnedOptimizer(model, "general")
    for step in range(begin, begin + steps):
        random = torch.Generator().manual_seed(step)
        x = torch.randn(32, 30, generator=random) @ torch.randn(30, WIDE, generator=torch.Generator().manual_seed(7))
        optimizer.zero_grad()
        functional.cross_entropy(model(x), x[:, :5].argmax(1)).backward()
        optimizer.step()
    return optimizer


def wide():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDE, WIDE), nn.Tanh(), nn.Linear(WIDE, WIDE), nn.Tanh(), nn.Linear(WIDE, 5))


def test_wide_layers_are_led_and_resume_to_the_same_bits():
    model = wide()
    optimizer = trained(model, 13)
    assert any(kept.leading and kept.factor is not None for kept in optimizer.stepper.course.kept)
    again = copy.deepcopy(model)
    other = metatele.LearnedOptimizer(again, "general")
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    trained(model, 20, optimizer, 13)
    trained(again, 20, other, 13)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


def test_led_steps_commute_with_permutations_of_units():
    one, other = wide(), wide()
    order = torch.randperm(WIDE, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for p in (other[0].weight, other[0].bias):
            p.copy_(p[order])
        other[2].weight.copy_(other[2].weight[:, order])
    for model in (one, other):
        trained(model, 12)
    moved = float((one[0].weight - wide()[0].weight).detach().norm())
    assert float((one[0].weight[order] - other[0].weight).detach().norm()) < 0.02 * moved


@pytest.mark.parametrize("shape", [(2, 30, 41), (1, 41, 30), (1, 32, 32)])
def test_the_iteration_in_bfloat16_brings_singular_values_to_one_as_that_in_float32(shape):
    torch.manual_seed(0)
    X = torch.randn(shape)
    X = X / norms(X)[:, None, None]
    half, whole = evened_in_half(X, 5), evened(X, 5)
    assert half.dtype == X.dtype
    assert float((half - whole).norm() / whole.norm()) < 0.1
    large = torch.linalg.svdvals(X) > 0.05
    values = torch.linalg.svdvals(half)[large]
    assert 0.6 < float(values.min()) <= float(values.max()) < 1.3


def unit(X):
    return X / norms(X)[:, None, None].clamp_min(1e-30)


@pytest.mark.parametrize("shape", [(2, 30, 41), (1, 41, 30), (1, 32, 32), (3, 1, 7)])
def test_the_iteration_without_copies_is_that_with_them(shape):
    """To rounding in float32; in bfloat16 both are as far from that in double precision."""
    torch.manual_seed(0)
    X, scale = unit(torch.randn(shape)), direction.QUINTIC[2] ** 0.25
    whole = evened(X, 5)
    torch.testing.assert_close(squared_out(X * scale, 5) / scale, whole, rtol=1e-5, atol=1e-5)
    exact = evened(X.double(), 5)
    torch.testing.assert_close(squared_out(X.double() * scale, 5) / scale, exact, rtol=1e-12, atol=1e-12)
    errors = [
        float((half.double() - exact).norm() / exact.norm())
        for half in (squared_out((X * scale).bfloat16(), 5) / scale, evened(X.bfloat16(), 5))
    ]
    assert errors[0] < 3 * errors[1] + 0.02 < 0.2


def formula(X, root, r, iterations=5):
    """The direction as the module's head writes it."""
    turned = X if root is None else root.right(X)
    Y = msign(turned, iterations)
    made = r * unit(Y) + (1 - r) * unit(turned)
    return unit(made if root is None else root.back(made))


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("kind", ["none", "dense", "factor", "diagonal"])
def test_directions_made_in_their_own_memory_are_those_of_the_formula(kind, half, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(direction, "in_half", lambda X: half)
    m, o, i = 3, 20, 27
    damping, F = torch.rand(m) + 0.1, torch.randn(m, i, 8)
    root = {
        "none": None,
        "dense": Root.of_dense(F @ F.mT + torch.eye(i), damping),
        "factor": Root.of_factor(F, torch.ones(m), damping),
        "diagonal": Root.of_diagonal(torch.rand(m, i), damping),
    }[kind]
    r = torch.tensor([0.02, 0.9, 0.999])[:, None, None]
    for size in (1e-9, 1.0, 1e6):
        X = size * torch.randn(m, o, i)
        expected = formula(X, root, r)
        home = X.clone()
        found = directed_(home, None if root is None else root.over_rest, odds_of(r), 5)
        assert found.data_ptr() == home.data_ptr()
        tolerance = {"rtol": 0.0, "atol": 0.02 if half else 1e-5}
        torch.testing.assert_close(unit(found), expected, **tolerance)


@pytest.mark.parametrize("half", [False, True])
def test_shares_of_all_or_nothing_and_matrices_of_zeros_stay_finite(half, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(direction, "in_half", lambda X: half)
    X = torch.randn(3, 8, 11)
    X[2] = 0
    for share in (0.0, 1.0):
        r = torch.full((3, 1, 1), share)
        found = drawn_(X.clone(), odds_of(r))
        torch.testing.assert_close(unit(found), formula(X, None, r), rtol=0, atol=0.02 if half else 1e-5)
        assert not found[2].any()
