"""Second moments of wide sides as factors, their spectra, and running averages of them."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

import metatele
from metatele.learned.equivariant.moments import averaged, normed
from metatele.learned.equivariant.spectrum import Spectrum
from metatele.network import use
from metatele.network.stacks import all_mixed, all_narrowed
from metatele.network.use import Fingerprint, Moment
from metatele.perceptron.activations import ReLU
from metatele.perceptron.mlp import MLP

ROOT = Path(__file__).resolve().parent.parent


def columns(rows=50, count=12, batch=(2,), seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(*batch, rows, count, generator=random, dtype=torch.float64)


def factor(x, rank=20):
    return Moment.of(x, widest=10, rank=rank)


@pytest.mark.parametrize("count", [5, 40])
def test_a_factor_with_a_column_for_each_sample_is_the_moment(count):
    x = columns(count=count)
    torch.testing.assert_close(factor(x).dense, x @ x.mT)
    torch.testing.assert_close(factor(x).over(7).dense, x @ x.mT / 7)
    torch.testing.assert_close(factor(x).trace, Moment(x @ x.mT).trace)


def test_a_factor_of_fewer_columns_keeps_the_largest_directions_and_the_trace():
    x = columns(count=45) * torch.logspace(0, -3, 45, dtype=torch.float64)
    M, F = x @ x.mT, factor(x, rank=20)
    assert F.tensor.shape == (2, 50, 20)
    torch.testing.assert_close(F.trace, Moment(M).trace)
    kept = torch.linalg.eigvalsh(F.tensor @ F.tensor.mT)[:, -20:]
    torch.testing.assert_close(kept, torch.linalg.eigvalsh(M)[:, -20:])


def test_many_columns_are_sketched_without_bias():
    x = columns(rows=40, count=3000, batch=()) * torch.logspace(0, -2, 40, dtype=torch.float64)[:, None]
    M, F = x @ x.mT, Moment.of(x, widest=10, rank=16)
    torch.testing.assert_close(F.trace, Moment(M).trace)
    largest, found = (torch.linalg.eigvalsh(m)[-3:] for m in (M, F.dense))
    torch.testing.assert_close(found, largest, rtol=0.3, atol=0)
    assert torch.equal(F.tensor, Moment.of(x, widest=10, rank=16).tensor)


def test_averages_of_factors_are_factors_of_the_average():
    a, b = columns(count=9), columns(count=8, seed=1)
    exact = 0.7 * a @ a.mT + 0.3 * b @ b.mT
    kept = factor(a).mixed(factor(b), 0.3, rank=9)
    assert kept.tensor.shape[-1] == 9
    torch.testing.assert_close(kept.trace, Moment(exact).trace)
    torch.testing.assert_close(factor(a).mixed(factor(b), 0.3, rank=17).dense, exact)
    torch.testing.assert_close(normed(kept).trace, torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_batch_that_is_not_finite_does_not_count_in_an_average_of_factors(bad):
    a, b = columns(count=9), columns(count=7, seed=1)
    b[1, 3, 2] = bad
    mixed = averaged(factor(a), factor(b), 0.3)
    assert bool(torch.isfinite(mixed.dense).all())
    torch.testing.assert_close(mixed.dense[1], factor(a).dense[1])
    torch.testing.assert_close(mixed.dense[0], factor(a).mixed(factor(b), 0.3).dense[0])


@pytest.mark.parametrize("rest", [0.0, 0.3])
def test_the_spectrum_of_a_factor_is_that_of_its_matrix(rest):
    F = columns(count=6) * torch.tensor([3.0, 1.0, 0.3, 0.1, 1e-3, 0.0], dtype=torch.float64)
    moment = Moment(F, torch.full((2, 1, 1), rest, dtype=torch.float64))
    ours, dense = Spectrum.of(moment), Spectrum.of(moment.dense)
    x = columns(rows=50, count=4, seed=2)
    damping, power = torch.tensor([0.1, 1e-3]).double(), torch.tensor([1.0, 0.4]).double()
    torch.testing.assert_close(ours.scale, dense.scale)
    torch.testing.assert_close(ours.participation, dense.participation)
    torch.testing.assert_close(ours.from_left(x, damping, power), dense.from_left(x, damping, power))
    for a, b in zip(ours.from_right(x.mT, damping, power), dense.from_right(x.mT, damping, power), strict=True):
        torch.testing.assert_close(a, b)
    turn = ours.turn(damping, power, scaled=True)
    torch.testing.assert_close(turn.from_right(x.mT), dense.from_right(x.mT, damping, power)[0])


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_a_factor_without_a_spectrum_leaves_the_coordinates_as_they_are(value):
    x = columns(rows=8, count=3, batch=(1,))
    moment = Moment(torch.full((1, 8, 2), value, dtype=torch.float64), torch.zeros(1, 1, 1, dtype=torch.float64))
    one = torch.ones(1, dtype=torch.float64)
    torch.testing.assert_close(Spectrum.of(moment).from_left(x, 0.01 * one, one), x)


def test_fingerprints_of_parts_add_up_to_that_of_the_whole():
    x = columns(rows=7, count=30, batch=(3,)).float()
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    parts = Fingerprint.of(x[:1, :, order[:11]]).plus(Fingerprint.of(x[:1, :, order[11:]])).plus(Fingerprint.of(x[1:]))
    torch.testing.assert_close(parts.numbers(), Fingerprint.of(x).numbers(), rtol=1e-5, atol=1e-6)
    other = Fingerprint.of(x + 0.01).numbers()
    assert (other - parts.numbers()).abs().max() > 1e-4


def test_a_network_with_a_wide_input_learns_with_memory_linear_in_the_width():
    torch.manual_seed(0)
    width, samples = 3000, 40
    model = nn.Sequential(nn.Linear(width, 16), nn.ReLU(), nn.Linear(16, 2))
    x, y = (torch.rand(200, width) < 0.02).float(), torch.arange(200) % 2
    x[:, :20] += y[:, None]
    optimizer, losses = metatele.LearnedOptimizer(model, ROOT / "checkpoints" / "transfer"), []
    for step in range(40):
        k = slice(step * samples % 200, step * samples % 200 + samples)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[k]), y[k])
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < 0.1 * sum(losses[:5])
    stored = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    assert max(t.numel() for t in stored) < 65 * (width + 1)
    stated = optimizer.meta.state_bytes(MLP((width, 16, 2), ReLU(), True))
    assert sum(4 * t.numel() for t in stored) < stated + 4000


def test_moments_in_stacks_are_those_made_one_by_one():
    x = [columns(rows=30, count=count, batch=(groups,), seed=count) for groups, count in ((1, 90), (2, 90), (1, 7))]
    sketches = [Moment.sketched(one, widest=10, rank=4) for one in x]
    narrow = all_narrowed(sketches, 4)
    for one, columns_, found in zip(sketches, x, narrow, strict=True):
        torch.testing.assert_close(found.dense, one.narrowed(4).dense)
        torch.testing.assert_close(found.dense, Moment.of(columns_, widest=10, rank=4, exact=False).dense)
        torch.testing.assert_close(found.trace, columns_.square().sum((1, 2)))
    for one, other, found in zip(narrow, narrow[::-1], all_mixed(narrow, narrow, [0.2, 0.2, 0.7], 4), strict=True):
        assert found.tensor.shape[-1] <= 8
        torch.testing.assert_close(found.trace, one.trace)
        assert other.rows == found.rows


@pytest.mark.parametrize("decay", [0.9, 0.97, 1.0])
def test_directions_by_products_alone_keep_as_much_as_decomposed_ones(decay):
    x = columns(rows=60, count=200) * decay ** torch.arange(200)
    G = (x.mT @ x).float()
    V, exact = (f(G, 32).double() for f in (use.directions_by_turns, use.directions_of))
    torch.testing.assert_close(V.mT @ V, torch.eye(32, dtype=V.dtype).expand(2, -1, -1), rtol=0, atol=1e-5)
    kept, most = ((Q.mT @ (x.mT @ x) @ Q).diagonal(dim1=-2, dim2=-1).sum(-1) for Q in (V, exact))
    assert bool((kept > 0.99 * most).all())


def test_directions_of_what_has_few_are_no_numbers_gone_wrong():
    G = torch.zeros(2, 40, 40)
    G[0, 0, 0] = 1.0
    V = use.directions_by_turns(G, 32)
    assert bool(torch.isfinite(V).all())
    torch.testing.assert_close((V.mT @ G @ V).diagonal(dim1=-2, dim2=-1).sum(-1), torch.tensor([1.0, 0.0]))
