"""The equivariant family: what its steps commute with, and its parts against plain formulas."""

import copy
import dataclasses
import math
import pickle
import warnings
from itertools import pairwise

import pytest
import torch
from torch import nn

import metatele
from metatele.config import SENSES, EquivariantConfig, MixtureConfig
from metatele.errors import ConfigError, MetateleError, ShapeMismatchError
from metatele.learned import ConstantOptimizer, EquivariantOptimizer, Observation
from metatele.learned.equivariant.controller import SEEN, Close, Sight, seen_of
from metatele.learned.equivariant.observation import Wants, joined, parted
from metatele.learned.equivariant.rollout import Rollout
from metatele.learned.equivariant.spectrum import Spectrum
from metatele.learned.equivariant.states import Level
from metatele.network.bias import with_ones
from metatele.perceptron.activations import LeakyReLU, ReLU, Sigmoid, SiLU, Tanh
from metatele.perceptron.losses import CrossEntropy, Loss, MeanSquaredError, SquaredError, kind, level
from metatele.perceptron.mlp import MLP, Weights
from metatele.tasks.fitting import Fitting, Mixture, usual_weights
from metatele.tasks.held_out import REGRESSIONS
from metatele.unroll import losses_of

pytestmark = pytest.mark.filterwarnings("ignore:batches of 4 samples")
MLPS = [
    MLP((5, 7, 3), LeakyReLU(0.1)),
    MLP((5, 8, 6, 3), Tanh(), True),
    MLP((4, 6, 6, 6, 5), [ReLU(), SiLU(), Sigmoid()], [True, False, True, True]),
]


def trained(seed=0, opening=False, **settings):
    """An optimizer whose outputs depend on everything it reads, in float64."""
    config = EquivariantConfig(hidden=8, opening=opening, **settings)
    optimizer = EquivariantOptimizer(config, seed).double().requires_grad_(False)
    random = torch.Generator().manual_seed(seed)
    for p in optimizer.parameters():
        p.add_(0.3 * torch.randn(p.shape, generator=random, dtype=torch.float64))
    return optimizer


def problems(mlp, loss=None, samples=11, batch=3, batch_size=0, seed=0):
    random = torch.Generator().manual_seed(seed)
    loss = loss or MeanSquaredError()
    X = torch.randn(batch, mlp.widths[0], samples, generator=random, dtype=torch.float64)
    Y = torch.randn(batch, mlp.widths[-1], samples, generator=random, dtype=torch.float64)
    w = usual_weights(mlp, batch, random).double()
    return Fitting(mlp, X, Y.argmax(-2) if isinstance(loss, CrossEntropy) else Y, w, loss, batch_size)


def named(value, name=""):
    """Every tensor of nested records."""
    if isinstance(value, torch.Tensor):
        yield name, value
    else:
        for number, part in enumerate(value):
            yield from named(part, f"{name}.{number}")


class InTurn(Fitting):
    """Batches in the order of the data, in every epoch."""

    def batch(self, step):
        k = slice(begin := step * self.batch_size % self.inputs.shape[-1], begin + self.batch_size)
        return self.inputs[..., k], self.targets[..., k]


def steps(optimizer, fitting, count=6):
    current = Rollout.begin(fitting)
    for _ in range(count):
        current = current.advanced(optimizer)
    return current


def permuted(mlp, flat, orders):
    weights = mlp.unflatten(flat)
    matrices, biases = list(weights.matrices), list(weights.biases)
    for layer, order in enumerate(orders):
        matrices[layer] = matrices[layer][..., order, :]
        if biases[layer] is not None:
            biases[layer] = biases[layer][..., order]
        matrices[layer + 1] = matrices[layer + 1][..., order]
    return mlp.flatten(type(weights)(tuple(matrices), tuple(biases)))


@pytest.mark.parametrize("mlp", MLPS, ids=str)
@pytest.mark.parametrize("batch_size", [0, 4])
@pytest.mark.parametrize("opening", [False, True])
def test_steps_commute_with_permutations_of_hidden_units(mlp, batch_size, opening):
    optimizer, fitting = trained(opening=opening, hold=3, warm=2), problems(mlp, batch_size=batch_size)
    random = torch.Generator().manual_seed(1)
    orders = [torch.randperm(k, generator=random) for k in mlp.hidden_widths]
    plain = steps(optimizer, fitting)
    moved = steps(optimizer, Fitting(**{**vars(fitting), "initial": permuted(mlp, fitting.initial, orders)}))
    assert (plain.weights - fitting.initial).abs().max() > 1e-3
    torch.testing.assert_close(moved.weights, permuted(mlp, plain.weights, orders), rtol=1e-7, atol=1e-9)


class Scaled(Loss):
    """A constant times another loss."""

    name = "scaled"

    def __init__(self, loss, factor):
        self.loss, self.factor = loss, factor

    def value(self, outputs, targets):
        return self.factor * self.loss.value(outputs, targets)

    def gradient(self, outputs, targets):
        return self.factor * self.loss.gradient(outputs, targets)

    def curvature(self, outputs, targets, direction):
        return self.factor * self.loss.curvature(outputs, targets, direction)


@pytest.mark.parametrize("loss", [SquaredError(), CrossEntropy()], ids=lambda loss: loss.name)
@pytest.mark.parametrize("factor", [1e-6, 1e4])
@pytest.mark.parametrize("opening", [False, True])
def test_steps_do_not_depend_on_the_units_of_the_loss(loss, factor, opening):
    optimizer, fitting = trained(opening=opening), problems(MLPS[1], loss)
    plain = steps(optimizer, fitting)
    scaled = steps(optimizer, Fitting(**{**vars(fitting), "loss": Scaled(loss, factor)}))
    torch.testing.assert_close(scaled.weights, plain.weights, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("inputs", [1.0, 30.0])
@pytest.mark.parametrize("hidden", [1.0, 0.1])
def test_steps_commute_with_rescaling_but_for_a_floor(inputs, hidden):
    mlp = MLP((5, 7, 6, 3), LeakyReLU(0.1))
    fitting = problems(mlp)

    def scaled(flat):
        """The same network on scaled inputs, with scaled first hidden units."""
        W = mlp.unflatten(flat).matrices
        return mlp.flatten(Weights((W[0] * hidden / inputs, W[1] / hidden, W[2]), (None,) * 3))

    other = dataclasses.replace(fitting, inputs=inputs * fitting.inputs, initial=scaled(fitting.initial))
    plain, moved = steps(trained(floor=0.0), fitting), steps(trained(floor=0.0), other)
    expected = scaled(plain.weights)
    assert (moved.weights - expected).norm() < 1e-7 * (expected - other.initial).norm()


@pytest.mark.parametrize("mlp", MLPS, ids=str)
def test_trajectories_of_a_batch_do_not_know_of_each_other(mlp):
    optimizer, fitting = trained(), problems(mlp)
    together = steps(optimizer, fitting).weights
    for b in range(len(fitting)):
        part = slice(b, b + 1)
        alone = Fitting(mlp, fitting.inputs[part], fitting.targets[part], fitting.initial[part], fitting.loss)
        torch.testing.assert_close(steps(optimizer, alone).weights, together[part], rtol=1e-7, atol=1e-9)


def test_the_order_of_samples_does_not_matter():
    optimizer, fitting = trained(), problems(MLPS[1])
    order = torch.randperm(11, generator=torch.Generator().manual_seed(2))
    turned = Fitting(**{**vars(fitting), "inputs": fitting.inputs[..., order], "targets": fitting.targets[..., order]})
    torch.testing.assert_close(
        steps(optimizer, turned).weights, steps(optimizer, fitting).weights, rtol=1e-7, atol=1e-9
    )


@pytest.mark.parametrize("mlp", MLPS, ids=str)
def test_derivative_of_the_first_step_is_that_of_finite_differences(mlp):
    optimizer, fitting, h = trained(), problems(mlp), 1e-6
    head = optimizer.lstm.head_weight.requires_grad_()
    Rollout.begin(fitting).advanced(optimizer).loss.sum().backward()
    random = torch.Generator().manual_seed(3)
    for _ in range(3):
        v = torch.randn(head.shape, generator=random, dtype=torch.float64)
        measured = []
        for sign in (h, -h):
            with torch.no_grad():
                head += sign * v
                measured.append(float(Rollout.begin(fitting).advanced(optimizer).loss.sum()))
                head -= sign * v
        torch.testing.assert_close(
            float((head.grad * v).sum()), (measured[0] - measured[1]) / (2 * h), rtol=1e-5, atol=1e-8
        )


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("damping", [1e-3, 0.1, 1e9])
def test_a_spectrum_applies_powers_of_its_matrix(power, damping):
    random = torch.Generator().manual_seed(5)
    A = torch.randn(2, 6, 9, generator=random, dtype=torch.float64)
    M = A @ A.mT / 9
    spectrum = Spectrum.of(M)
    normed = M / M.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    e, V = torch.linalg.eigh((normed + damping * torch.eye(6)) / (1 + damping))
    P = V @ (e**-power).diag_embed() @ V.mT
    x = torch.randn(2, 4, 6, generator=random, dtype=torch.float64)
    lam, p = torch.full((2,), damping).double(), torch.full((2,), power).double()
    y, size = spectrum.from_right(x, lam, p)
    y, size = y * spectrum.scale[:, None, None], size * spectrum.scale**2
    torch.testing.assert_close(y, x @ P)
    torch.testing.assert_close(spectrum.from_left(x.mT, lam, p), P @ x.mT)
    torch.testing.assert_close(size, (y @ M @ y.mT).diagonal(dim1=-2, dim2=-1).sum(-1))
    torch.testing.assert_close(
        spectrum.participation, normed.diagonal(dim1=-2, dim2=-1).sum(-1) ** 2 / (6 * normed.square().sum((-2, -1)))
    )
    if power == 0 or damping > 1e8:
        torch.testing.assert_close(y, x, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("keep", [0.0, 0.5])
def test_a_turn_is_its_spectrum_s_move(keep):
    random = torch.Generator().manual_seed(2)
    h = torch.randn(2, 40, 60, generator=random).double() * torch.logspace(0, -3, 40)[:, None].double()
    spectrum = Spectrum.of(h @ h.mT, keep, whole=16)
    assert spectrum.whole == (keep == 0)
    damping, power = torch.tensor([0.1, 1e-3]).double(), torch.tensor([1.0, 0.4]).double()
    x = torch.randn(2, 40, 7, generator=random).double()
    left = spectrum.turn(damping, power).from_left(x)
    torch.testing.assert_close(left, spectrum.from_left(x, damping, power))
    right = spectrum.turn(damping, power, scaled=True).from_right(x.mT)
    torch.testing.assert_close(right, spectrum.from_right(x.mT, damping, power)[0])


def test_small_eigenvalues_may_share_one_value():
    random = torch.Generator().manual_seed(6)
    Q = torch.linalg.qr(torch.randn(200, 200, generator=random, dtype=torch.float64))[0]
    e = torch.cat([torch.full((195,), 1e-3), torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])]).double()
    M = Q @ e.diag_embed() @ Q.mT
    whole, part = Spectrum.of(M), Spectrum.of(M, keep=0.1)
    assert part.vectors.shape == (200, 8)  # the five large ones, a margin, and up to a multiple of 8
    x = torch.randn(3, 200, generator=random, dtype=torch.float64)
    lam, p = torch.tensor(0.01).double(), torch.tensor(0.7).double()
    for a, b in zip(whole.from_right(x, lam, p), part.from_right(x, lam, p), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(whole.from_left(x.mT, lam, p), part.from_left(x.mT, lam, p))
    torch.testing.assert_close(whole.participation, part.participation)
    assert Spectrum.of(M, keep=1e-5).whole  # nothing is saved by fewer columns than half


def test_a_spectrum_follows_moments_that_change_a_little():
    random = torch.Generator().manual_seed(10)
    Q = torch.linalg.qr(torch.randn(200, 200, generator=random, dtype=torch.float64))[0]
    e = torch.logspace(2, -4, 200, dtype=torch.float64)
    M = Q @ e.diag_embed() @ Q.mT
    noise = torch.randn(200, 400, generator=random, dtype=torch.float64)
    moved = 0.95 * M + 0.05 * (Q * e.sqrt()) @ (noise @ noise.mT / 400) @ (Q * e.sqrt()).mT
    last = Spectrum.of(M, keep=1.0)
    assert last.vectors.shape[-1] < 80
    followed, exact = Spectrum.of(moved, 1.0, last), Spectrum.of(moved, 1.0)
    r = min(len(followed.values), len(exact.values))
    large = exact.values[-r:] >= 1
    torch.testing.assert_close(followed.values[-r:][large], exact.values[-r:][large], rtol=0.05, atol=0)
    x, lam, p = torch.randn(3, 200, generator=random).double(), torch.tensor(1.0).double(), torch.tensor(1.0).double()
    y, z = followed.from_right(x, lam, p)[0], exact.from_right(x, lam, p)[0]
    assert (y - z).norm() < 0.03 * z.norm()
    # Where more eigenvalues have become large than there are columns, they are all computed.
    flat = Spectrum.of(M + torch.eye(200).double() * e[0] / 4, 1.0, Spectrum.of(M, keep=20.0))
    assert flat.whole or bool((flat.values < 1).any())


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_moments_without_a_spectrum_leave_the_coordinates_as_they_are(value):
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(7))
    spectrum = Spectrum.of(torch.full((4, 4), value))
    torch.testing.assert_close(spectrum.from_right(x, torch.tensor(0.01), torch.tensor(1.0))[0], x)


def test_level_is_the_log_of_the_loss():
    random = torch.Generator().manual_seed(8)
    for trial in range(20):
        y = 3 * torch.randn(4, 7, generator=random, dtype=torch.float64)
        labels = torch.randint(4, (7,), generator=random)
        binary = torch.randint(2, (4, 7), generator=random).double()
        target = torch.randn(4, 7, generator=random, dtype=torch.float64)
        factor = 10.0 ** (trial - 10)
        cases = [
            (CrossEntropy().gradient(y, labels), CrossEntropy().value(y, labels)),
            (y.sigmoid() - binary, 4 * torch.nn.functional.binary_cross_entropy_with_logits(y, binary)),
        ]
        for (gradient, loss), name in zip(cases, ("cross-entropy", "logistic"), strict=True):
            torch.testing.assert_close(level(y, factor * gradient), loss.log())
            assert kind(y, factor * gradient) == name
        assert kind(y, factor * (y - target)) == "squared"
        mixed = torch.stack([cases[0][0], cases[1][0]])
        assert kind(torch.stack([y, y]), mixed) is None
        torch.testing.assert_close(level(torch.stack([y, y]), mixed), torch.stack([cases[0][1], cases[1][1]]).log())
        mean = torch.nn.functional.mse_loss(y, target)  # 28 numbers
        torch.testing.assert_close(level(y, 2 / 28 * (y - target)), (4 / 4 * mean).log())


def test_a_sample_whose_label_is_certain_to_rounding_counts_as_no_loss():
    y, labels = torch.tensor([[0.0, 2.0], [300.0, 0.0], [1.0, 0.0]]), torch.tensor([1, 1])
    loss = CrossEntropy()
    gradient = loss.gradient(y, labels)
    assert (gradient[:, 0] == 0).all()
    torch.testing.assert_close(level(y, gradient, "cross-entropy"), loss.value(y, labels).log())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("batch_size", [0, 11])
def test_a_lost_trajectory_leaves_the_others_alone(bad, batch_size):
    optimizer, fitting = trained(warm=1), problems(MLPS[1], samples=22 if batch_size else 11, batch_size=batch_size)
    head = optimizer.lstm.head_weight.requires_grad_()
    found = []
    for value in (fitting.inputs[1, 0, 0].clone(), bad):
        fitting.inputs[1, 0, 0] = value
        head.grad = None
        current = steps(optimizer, fitting)
        current.loss[[0, 2]].sum().backward()
        found.append((current.weights.detach(), head.grad))
    (expected, derivative), (weights, other) = found
    torch.testing.assert_close(weights[[0, 2]], expected[[0, 2]], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(other, derivative, rtol=1e-7, atol=1e-9)
    assert torch.isfinite(weights).all()


def test_a_step_after_which_the_loss_has_grown_is_shortened():
    mlp = MLPS[0]
    optimizer, fitting = trained(), problems(mlp, SquaredError())
    begin = Rollout.begin(fitting)
    first = begin.advanced(optimizer)
    change = first.weights - begin.weights
    # A landscape of another kind: the loss is now a hundred times what it was.
    seen = Observation.of(first.done)
    seen = seen._replace(error=seen.error * torch.tensor([1.0, 10.0, 1.0])[:, None, None])
    done = optimizer.step(seen, first.states)
    assert done.shortened.tolist() == [False, True, False]
    moved = mlp.flatten(parted(done.changes, mlp.biases))
    torch.testing.assert_close(moved[1], -0.9 * change[1])


@pytest.mark.parametrize(("batch_size", "most"), [(0, 2.0), (4, 16.0 * 32 / 4)])
def test_how_much_a_loss_may_grow(batch_size, most):
    optimizer, fitting = trained(), problems(MLPS[0], SquaredError(), batch_size=batch_size)
    first = Rollout.begin(fitting).advanced(optimizer)
    seen = Observation.of(first.done)
    now = level(seen.outputs, seen.error, first.states.kind)
    # As if the loss had been lower by these factors.
    grown = torch.tensor([0.9 * most, 1.1 * most, 0.5]).double().log()
    before = first.states.but(level=Level(*(now - grown,) * 3))
    assert optimizer.step(seen, before).shortened.tolist() == [False, True, False]


def test_a_loss_that_creeps_up_is_noticed():
    optimizer, fitting = trained(growth=1e9), problems(MLPS[1])
    current = steps(optimizer, fitting, 3)
    lower = torch.tensor([0.0, 0.0, 3.0]).double()  # the lowest loss was e³ times smaller; the last step rose little
    creeping = current.states.but(level=Level(*(t - by for t, by in zip(current.states.level, lower, strict=True))))
    done = optimizer.step(Observation.of(current.done), creeping)
    assert done.shortened.all()
    for layer, change in enumerate(done.changes):
        a, b = (t[:, layer, None, None] for t in creeping.last)
        old = a * creeping.motion.velocity[layer] + b * creeping.motion.direction[layer]
        torch.testing.assert_close(change, -0.9 * old)
    # The rise is accepted then.
    assert (done.states.level.lowest > creeping.level.lowest + 0.5).all()
    assert (done.states.level.kept - done.states.level.lowest < math.log(10)).all()


def test_one_easy_batch_does_not_stop_all_later_steps():
    optimizer, fitting = trained(), problems(MLPS[1], samples=24, batch_size=4)
    current = steps(optimizer, fitting, 3)
    states = current.states.but(level=Level(*(t - 20 for t in current.states.level)))
    current = dataclasses.replace(current, states=states)
    after = current.advanced(optimizer)
    assert (after.states.level.kept > states.level.kept + 5).all()
    seen = Observation.of(after.done)
    assert not optimizer.step(seen, after.states).shortened.any()


@pytest.mark.parametrize("loss", [SquaredError(), CrossEntropy()], ids=lambda loss: loss.name)
def test_shared_data_are_those_of_each(loss):
    mlp, random = MLPS[1], torch.Generator().manual_seed(9)
    x, w = torch.randn(5, 12, generator=random).double(), usual_weights(mlp, 4, random).double()
    y = torch.randint(3, (12,), generator=random) if loss.name == "cross-entropy" else torch.randn(3, 12).double()
    shared = Fitting(mlp, x, y, w, loss, 5)
    own = Fitting(mlp, x.expand(4, -1, -1), y.expand(4, *y.shape), w, loss, 5)
    torch.testing.assert_close(losses_of(trained(), shared, 5), losses_of(trained(), own, 5))


def test_problems_of_the_mixture_are_reproducible_finite_and_apart():
    for index in range(60):
        a, b, c = (Mixture(MixtureConfig()).sample(0, stream, index, 2) for stream in ("train", "train", "validation"))
        assert a.mlp == b.mlp
        assert torch.equal(a.initial, b.initial)
        assert torch.equal(a.inputs, b.inputs)
        assert a.initial.shape != c.initial.shape or not torch.equal(a.initial, c.initial)
        loss, done = a.visit(a.initial, 0)
        assert torch.isfinite(loss).all()
        assert all(torch.isfinite(g).all() for g in joined(done.gradient()))


def test_an_epoch_of_batches_has_each_sample_once():
    fitting = problems(MLPS[0], samples=12, batch_size=4)
    seen = torch.cat([fitting.batch(step)[0] for step in range(3)], -1)
    torch.testing.assert_close(seen[0].sort(-1).values, fitting.inputs[0].sort(-1).values)
    assert not torch.equal(fitting.batch(0)[0], fitting.batch(3)[0])


def test_constant_settings_are_whitening_with_gradient_descent():
    mlp = MLPS[1]
    fitting, rate, damping = problems(mlp), 0.3, 0.1
    optimizer = ConstantOptimizer(rate, damping).double()
    begin = Rollout.begin(fitting)
    after = begin.advanced(optimizer)
    moved = joined(mlp.unflatten(after.weights - begin.weights))
    seen = Observation.of(begin.done)
    for gradient, use, h, step in zip(seen.gradients, seen.uses({0, 1, 2}), begin.done.hidden, moved, strict=True):
        h, S = with_ones(h), use.inputs.tensor
        torch.testing.assert_close(S, h @ h.mT / 11)
        s = S.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        D = gradient @ torch.linalg.inv(S + damping * s * torch.eye(S.shape[-1]))
        change = (D @ h).square().mean((-2, -1)) / (use.square + 0.01)
        torch.testing.assert_close(step, -rate * D / change.sqrt()[:, None, None], rtol=1e-6, atol=1e-10)


def test_what_the_controller_does_not_see_does_not_matter():
    optimizer, fitting = trained(blind=("slopes", "loss", "clock")), problems(MLPS[0])
    current = steps(optimizer, fitting, 3)
    seen, states = Observation.of(current.done), current.states
    close = Close.of(seen.gradients, states)
    sight = Sight.of(states, close, seen.uses({0, 1}), seen.sizes(), states.predicted, same=True)
    numbers = seen_of(sight, optimizer.tables, optimizer.config)
    assert numbers.shape == (3, 2, len(SEEN))
    hidden = [i for i, number in enumerate(SEEN) if number.sense in optimizer.config.blind]
    assert hidden == [0, 1, 3, 4, 10]
    assert (numbers[..., hidden] == 0).all()
    assert (numbers[..., [5, 6, 7, 8]] != 0).all()


def test_the_kinds_of_numbers_in_the_settings_are_those_of_the_controller_s_table():
    assert tuple(dict.fromkeys(number.sense for number in SEEN)) == SENSES


def test_bad_settings_are_one_sentence():
    for name, value, words in (
        ("growth", 1.0, "growth must be above 1"),
        ("averaging", 1.0, "averaging must be in"),
        ("reach", 0.0, "reach must be positive"),
        ("keep", -1.0, "keep must be zero or positive"),
        ("hold", 0, "hold must be positive"),
    ):
        with pytest.raises(ConfigError, match=words):
            EquivariantConfig(**{name: value})


@pytest.mark.parametrize("count", [3, 18, 19, 20])
def test_states_survive_as_plain_tensors(count):
    optimizer, fitting = trained(hold=3), problems(MLPS[1], batch_size=4)
    current = steps(optimizer, fitting, count)
    kept = type(current.states).from_tensors(current.states.tensors())
    again = Rollout(fitting, current.weights, current.loss, current.done, kept, current.age).advanced(optimizer)
    assert torch.equal(again.weights, current.advanced(optimizer).weights)


def test_on_mini_batches_the_controller_pauses():
    optimizer, fitting = trained(hold=4), problems(MLPS[1], samples=24, batch_size=12)
    current = steps(optimizer, fitting, 16)
    assert current.states.looks
    looked, mlp = [], fitting.mlp
    for _ in range(12):
        before, current = current, current.advanced(optimizer)
        old, new = before.states, current.states
        looked.append(old.looks)
        if not old.looks:
            before_look, after_look = dict(named(old.control)), dict(named(new.control))
            assert before_look.keys() == after_look.keys()
            assert all(torch.equal(t, after_look[name]) for name, t in before_look.items())
            # V <- βV - ηD and the change is aV + bD, with D of this batch and the turns in use.
            change = joined(mlp.unflatten(current.weights - before.weights))
            for layer, gradient in enumerate(Observation.of(before.done).gradients):
                lam_h, lam_d, p_h, p_d = (t[:, layer] for t in old.control.bend)
                beta, rate, a, b = (t[:, layer, None, None] for t in old.control.pace)
                half = old.moments[layer].error_spectrum.from_left(gradient, lam_d, p_d)
                D, _ = old.moments[layer].input_spectrum.from_right(half, lam_h, p_h)
                size = D.square().sum((-2, -1))
                D = D * (old.control.limit[:, layer] / size).sqrt().clamp(max=1)[:, None, None]
                V = beta * old.motion.velocity[layer] - rate * D
                torch.testing.assert_close(change[layer], a * V + b * D, rtol=1e-7, atol=1e-10)
    assert looked == [True, False, False, False] * 3


def test_a_pause_ends_where_the_loss_has_grown():
    optimizer, fitting = trained(hold=8), problems(MLPS[1], samples=24, batch_size=4)
    current = steps(optimizer, fitting, 18)
    after = current.advanced(optimizer)
    seen = Observation.of(after.done)
    worse = seen._replace(outputs=seen.outputs, error=seen.error * 1e3)
    done = optimizer.step(worse, after.states)
    assert done.shortened.all()
    moved = after.weights - current.weights
    change = fitting.mlp.flatten(parted(done.changes, fitting.mlp.biases))
    torch.testing.assert_close(change, -0.9 * moved, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(done.states.control.pace.rate, 0.1 * after.states.control.pace.rate)
    torch.testing.assert_close(done.states.control.log_rate, after.states.control.log_rate + math.log(0.1))


class Counted(Fitting):
    """Counts the passes made."""

    def visit(self, flat, step):
        self.__dict__["visits"] = self.__dict__.get("visits", 0) + 1
        return super().visit(flat, step)


def test_passes_are_made_once():
    fitting = Counted(**vars(problems(MLPS[0])))
    losses_of(trained(), fitting, 5)
    assert fitting.visits == 6


# --- as a torch optimizer


def network(widths, activation=nn.Tanh, bias=True, flatten=False, seed=0):
    torch.manual_seed(seed)
    layers = [nn.Flatten()] if flatten else []
    for d, o in pairwise(widths):
        layers += [nn.Linear(d, o, bias), activation()]
    return nn.Sequential(*layers[:-1])


def single(seed=0, opening=True):
    return trained(seed, opening).float()


def test_an_unroll_keeps_factors_as_wide_as_its_settings_say_as_the_optimizer_of_a_model_does():
    problem = REGRESSIONS["narrow"].sample(0, "evaluation", 1)
    mlp, (x,), (y,), w = problem.mlp, problem.inputs.double(), problem.targets.double(), problem.initial.double()
    model, factors = network(mlp.widths, lambda: nn.LeakyReLU(0.1), bias=False).double(), {"dense": 6, "rank": 2}
    nn.utils.vector_to_parameters(w[0].clone(), model.parameters())
    fitting = Fitting(mlp, x[None], y[None], w, problem.loss)
    unrolled = steps(trained(**factors), fitting, 30)
    assert [m.inputs.tensor.shape[-1] for m in unrolled.states.moments] == [2, 2]
    run(model, metatele.LearnedOptimizer(model, trained(**factors)), x.T, y.T, 30)
    torch.testing.assert_close(flat(model), unrolled.weights[0], rtol=1e-6, atol=1e-8)
    whole = steps(trained(), fitting, 30)
    assert (whole.weights - unrolled.weights).norm() > 1e-2 * whole.weights.norm()


class Watched(EquivariantOptimizer):
    """Remembers the states at which its controller looked."""

    def control(self, sight):
        self.__dict__.setdefault("seen", []).append(sight.states)
        return super().control(sight)


def watched(**settings):
    """:func:`trained` in single precision, as :class:`Watched`."""
    plain = trained(**settings).float()
    optimizer = Watched(plain.config)
    optimizer.load_state_dict(plain.state_dict())
    return optimizer.requires_grad_(False)


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def run(model, optimizer, x, y, count, batch_size=0):
    for step in range(count):
        part = slice(None)
        if batch_size:
            begin = step * batch_size % len(x)
            part = slice(begin, begin + batch_size)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x[part]), y[part]).backward()
        optimizer.step()


def data(widths, samples=12, seed=3):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(samples, widths[0], generator=random), torch.randn(samples, widths[-1], generator=random)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("widths", [(4, 3), (4, 9, 3), (6, 5, 7, 2)])
@pytest.mark.parametrize("opening", [False, True])
def test_steps_of_a_model_are_those_of_the_functional_unroll(widths, bias, opening):
    model, (x, y) = network(widths, bias=bias).double(), [t.double() for t in data(widths)]
    mlp = MLP(widths, Tanh() if len(widths) > 2 else (), bias)
    fitting = Fitting(mlp, x.T[None], y.T[None], flat(model)[None], MeanSquaredError())
    expected = steps(trained(opening=opening), fitting, 5).weights[0]
    run(model, metatele.LearnedOptimizer(model, trained(opening=opening)), x, y, 5)
    torch.testing.assert_close(flat(model), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("loss", ["mse", "cross-entropy"])
def test_pauses_of_a_model_are_those_of_the_functional_unroll(loss):
    widths, settings = (6, 5, 7, 3), {"opening": True, "hold": 3, "warm": 2}
    model, (x, y) = network(widths).double(), [t.double() for t in data(widths)]
    mlp, function, kind_of = MLP(widths, Tanh(), True), nn.functional.mse_loss, MeanSquaredError()
    if loss == "cross-entropy":
        y, function, kind_of = y.argmax(1), nn.functional.cross_entropy, CrossEntropy()
    targets = y.T if y.dim() == 2 else y
    fitting = InTurn(mlp, x.T, targets, flat(model)[None], kind_of, batch_size=4)
    expected = steps(trained(**settings), fitting, 10).weights[0]
    optimizer = metatele.LearnedOptimizer(model, trained(**settings))
    for step in range(10):
        k = slice(step * 4 % 12, step * 4 % 12 + 4)
        optimizer.zero_grad()
        function(model(x[k]), y[k]).backward()
        optimizer.step()
    torch.testing.assert_close(flat(model), expected, rtol=1e-6, atol=1e-9)


def test_models_that_begin_with_flatten_are_the_same():
    plain, framed = network((6, 5, 2)), network((6, 5, 2), flatten=True)
    x, y = data((6, 5, 2))
    run(plain, metatele.LearnedOptimizer(plain, single()), x, y, 4)
    run(framed, metatele.LearnedOptimizer(framed, single()), x.view(12, 2, 3), y, 4)
    assert torch.equal(flat(plain), flat(framed))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_of_model_and_optimizer_go_on_together(duplicate):
    model, (x, y) = network((4, 9, 3)), data((4, 9, 3))
    optimizer = metatele.LearnedOptimizer(model, single())
    run(model, optimizer, x, y, 3, batch_size=4)
    twin, twin_optimizer = duplicate((model, optimizer))
    run(model, optimizer, x, y, 3, batch_size=4)
    run(twin, twin_optimizer, x, y, 3, batch_size=4)
    assert torch.equal(flat(model), flat(twin))


def test_saved_state_goes_on_to_the_same_bits(tmp_path):
    model, (x, y) = network((4, 9, 3)), data((4, 9, 3))
    optimizer = metatele.LearnedOptimizer(model, single())
    run(model, optimizer, x, y, 3, batch_size=4)
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    other = network((4, 9, 3), seed=1)
    other.load_state_dict(weights)
    again = metatele.LearnedOptimizer(other, single())
    again.load_state_dict(state)
    run(model, optimizer, x, y, 3, batch_size=4)
    run(other, again, x, y, 3, batch_size=4)
    assert torch.equal(flat(model), flat(other))
    wider = network((4, 10, 3))
    with pytest.raises(ShapeMismatchError, match="does not belong to this model"):
        metatele.LearnedOptimizer(wider, single()).load_state_dict(state)


def batches(x, y, step):
    begin = step * 4 % len(x)
    return x[begin : begin + 4], y[begin : begin + 4]


def test_a_state_loaded_between_a_pass_and_its_step_looks_one_step_later():
    widths = (4, 9, 3)
    (x, y), model = data(widths), network(widths)
    meta = watched(opening=False, hold=4, warm=2)
    optimizer = metatele.LearnedOptimizer(model, meta)
    for step in range(6):
        run(model, optimizer, *batches(x, y, step), 1)
    saved = copy.deepcopy(optimizer.state_dict())
    run(model, optimizer, *batches(x, y, 6), 1)
    assert [states.age for states in meta.seen] == [0, 1, 2, 6]
    optimizer.zero_grad()
    nn.functional.mse_loss(model(x[:4]), y[:4]).backward()
    optimizer.load_state_dict(saved)
    optimizer.step()
    assert len(meta.seen) == 4
    run(model, optimizer, *batches(x, y, 7), 1)
    assert [states.age for states in meta.seen[4:]] == [7]
    assert torch.isfinite(flat(model)).all()


@pytest.mark.parametrize("saved_at", range(2, 9))
def test_a_state_goes_on_to_the_same_bits_in_an_optimizer_that_went_elsewhere(saved_at):
    widths = (4, 9, 7, 3)
    (x, y), model = data(widths), network(widths)
    optimizer = metatele.LearnedOptimizer(model, trained(hold=4, warm=2).float())
    for step in range(saved_at):
        run(model, optimizer, *batches(x, y, step), 1)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    for step in range(saved_at, saved_at + 5):
        run(model, optimizer, *batches(x, y, step), 1)
    expected = flat(model)
    for elsewhere in range(2):
        run(model, optimizer, *batches(x, y, elsewhere), 1)
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(copy.deepcopy(saved[1]))
        for step in range(saved_at, saved_at + 5):
            run(model, optimizer, *batches(x, y, step), 1)
        assert torch.equal(flat(model), expected)


def test_a_layer_that_no_gradient_reached_at_first_is_trained_later():
    (x, y), model = data((4, 9, 3)), network((4, 9, 3))
    nn.init.zeros_(model[2].weight)
    begin = model[0].weight.detach().clone()
    optimizer = metatele.LearnedOptimizer(model, single(opening=False))
    run(model, optimizer, x, y, 1)
    assert torch.equal(model[0].weight, begin)
    run(model, optimizer, x, y, 4)
    assert (model[0].weight - begin).norm() > 1e-3 * begin.norm()


def test_a_layer_that_was_frozen_at_first_is_trained_later():
    (x, y), model = data((4, 9, 3)), network((4, 9, 3))
    for p in model[0].parameters():
        p.requires_grad_(False)
    meta = watched(opening=False)
    optimizer = metatele.LearnedOptimizer(model, meta)
    run(model, optimizer, x, y, 2)
    begin = model[0].weight.detach().clone()
    for p in model[0].parameters():
        p.requires_grad_(True)
    run(model, optimizer, x, y, 3)
    assert (model[0].weight - begin).norm() > 1e-3 * begin.norm()
    assert float(meta.seen[-1].moments[0].errors.trace) > 0.5


@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_batch_that_is_not_finite_leaves_no_trace_in_the_averages(at):
    (x, y), model = data((4, 9, 3)), network((4, 9, 3))
    meta = watched(opening=False)
    optimizer = metatele.LearnedOptimizer(model, meta)
    for step in range(6):
        inputs, targets = batches(x, y, step)
        run(model, optimizer, inputs * (math.nan if step == at else 1), targets, 1)
    moments = [M.tensor for layer in meta.seen[-1].moments for M in (layer.inputs, layer.errors)]
    assert all(torch.isfinite(M).all() for M in moments)
    assert torch.isfinite(flat(model)).all()


def test_the_data_in_another_order_are_the_same_batch():
    (x, y), model = data((4, 9, 3), samples=300), network((4, 9, 3))
    x = (x - x.mean(0)) / x.std(0)  # sums cancel
    meta = watched(opening=False)
    optimizer = metatele.LearnedOptimizer(model, meta)
    for step in range(20):
        order = torch.randperm(300, generator=torch.Generator().manual_seed(step))
        run(model, optimizer, x[order], y[order], 1)
    for step in range(18):  # only when many batches have differed does it pause
        half = torch.randperm(300, generator=torch.Generator().manual_seed(step))[:150]
        run(model, optimizer, x[half], y[half], 1)
    assert [states.age for states in meta.seen] == list(range(36))


def test_an_input_buffer_may_be_filled_again_before_the_step():
    found = []
    for filled in (False, True):
        (x, y), model = data((4, 9, 3)), network((4, 9, 3))
        optimizer = metatele.LearnedOptimizer(model, trained(hold=3, warm=2).float())
        buffer = torch.empty(4, 4)
        for step in range(12):
            inputs, targets = batches(x, y, step)
            optimizer.zero_grad()
            nn.functional.mse_loss(model(buffer.copy_(inputs)), targets).backward()
            if filled:
                buffer.fill_(7.0)
            optimizer.step()
        found.append(flat(model))
    assert torch.equal(*found)


def test_accumulated_batches_are_one_batch():
    model, (x, y) = network((4, 9, 3)), data((4, 9, 3))
    twin = copy.deepcopy(model)
    optimizer, parts = metatele.LearnedOptimizer(model, single()), metatele.LearnedOptimizer(twin, single())
    for _ in range(4):
        run(model, optimizer, x, y, 1)
        parts.zero_grad()
        for piece in (slice(0, 6), slice(6, 12)):
            (nn.functional.mse_loss(twin(x[piece]), y[piece]) / 2).backward()
        parts.step()
    torch.testing.assert_close(flat(model), flat(twin), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("samples", "share"), [(4, 1 / 8), (16, 1 / 2), (32, 1.0)])
def test_steps_on_fewer_samples_than_any_in_meta_training_are_smaller_in_proportion(samples, share):
    (x, y), copies = data((4, 9, 3), samples=2 * samples), 32
    moved = []
    for repeated in (1, copies):  # of each sample: the same gradients and moments, of many samples
        model = network((4, 9, 3))
        optimizer = metatele.LearnedOptimizer(model, ConstantOptimizer(0.01, 0.1))
        batches = [[t[i::2].repeat(repeated, 1) for t in (x, y)] for i in range(2)]
        run(model, optimizer, *batches[0], 1)
        begin = flat(model)
        run(model, optimizer, *batches[1], 1)
        moved.append(flat(model) - begin)
    assert moved[1].norm() > 1e-3
    torch.testing.assert_close(moved[0], share * moved[1], rtol=1e-3, atol=1e-6)


def test_small_batches_are_warned_of_once_and_whole_data_never():
    (x, y), model = data((4, 9, 3), samples=16), network((4, 9, 3))
    optimizer = metatele.LearnedOptimizer(model, single())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model, optimizer, x[:8], y[:8], 3)
    with pytest.warns(UserWarning, match="batches of 8 samples are too noisy") as seen:
        run(model, optimizer, x, y, 6, batch_size=8)
    assert len(seen) == 1
    assert seen[0].filename == __file__


def test_frozen_parameters_and_those_with_lr_zero_stay():
    model, (x, y) = network((4, 9, 7, 3)), data((4, 9, 7, 3))
    model[2].weight.requires_grad_(False)
    begin = [p.detach().clone() for p in model.parameters()]
    groups = [{"params": model[:2].parameters()}, {"params": model[2:].parameters(), "lr": 0.0}]
    optimizer = metatele.LearnedOptimizer(model, single(), params=groups)
    run(model, optimizer, x, y, 3)
    moved = [not torch.equal(p, b) for p, b in zip(model.parameters(), begin, strict=True)]
    assert moved == [True, True, False, False, False, False]
    assert torch.isfinite(flat(model)).all()


@pytest.mark.parametrize("widths", [(4, 9, 3), (200, 150, 10)])
def test_state_takes_no_more_memory_than_stated(widths):
    model, (x, y) = network(widths), data(widths, samples=40)
    optimizer = metatele.LearnedOptimizer(model, single())
    run(model, optimizer, x, y, 4, batch_size=20)
    found = sum(t.numel() * 4 for t in optimizer.state[model[0].weight].values())
    stated = single().state_bytes(MLP(widths, Tanh(), True))
    assert 0.4 * stated < found < stated + 4000  # the rest does not grow with the widths' squares


def test_the_state_of_a_wide_layer_is_linear_in_its_width():
    narrow, wide = (single().state_bytes(MLP((k, 2), ())) for k in (10000, 20000))
    assert wide < 2.01 * narrow < 2**25
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metatele.LearnedOptimizer(nn.Sequential(nn.Linear(20000, 2)), single())


def test_a_step_needs_a_pass():
    model = network((4, 9, 3))
    optimizer = metatele.LearnedOptimizer(model, single())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(MetateleError, match="a step needs the layer inputs"):
        optimizer.step()


def test_scaled_and_clipped_gradients_are_understood():
    model, (x, y) = network((4, 9, 3)), data((4, 9, 3))
    twin = copy.deepcopy(model)
    run(model, metatele.LearnedOptimizer(model, single()), x, y, 4)
    optimizer = metatele.LearnedOptimizer(twin, single())
    for _ in range(4):
        optimizer.zero_grad()
        (2.0**12 * nn.functional.mse_loss(twin(x), y)).backward()
        for p in twin.parameters():
            p.grad /= 2.0**12
        optimizer.step()
    torch.testing.assert_close(flat(model), flat(twin), rtol=1e-4, atol=1e-6)


def test_a_spectrum_that_single_precision_does_not_give_comes_from_double():
    """LAPACK as torch 2.13 has it gives up on most of these, in single precision alone."""
    for seed in range(26, 322, 5):
        random = torch.Generator().manual_seed(seed)
        A = torch.randn(40 + 24 * (seed % 2), 3 + seed % 5, generator=random)
        A[len(A) // 3 :] *= 1e-20
        found, expected = Spectrum.of(A @ A.T), Spectrum.of((A @ A.T).double())
        torch.testing.assert_close(found.values, expected.values.float(), rtol=1e-4, atol=1e-4)
        x, one = torch.randn(2, len(A), generator=random), torch.ones(())
        moved, exact = (s.turn(one, one).from_right(y) for s, y in ((found, x), (expected, x.double())))
        torch.testing.assert_close(moved, exact.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch_size", [0, 12])
@pytest.mark.parametrize("pauses", [True, False])
def test_a_step_reads_what_it_said_it_wants_and_nothing_else(batch_size, pauses):
    optimizer, fitting = trained(hold=4), problems(MLPS[1], samples=24, batch_size=batch_size)
    whole = current = Rollout.begin(fitting)
    asked = []
    for _ in range(40):
        states = current.states
        wants = Wants.everything(3) if states is None else states.wants(optimizer.config, pauses)
        seen, read = Observation.of(current.done), []

        def uses(wanted, seen=seen, read=read):
            read.append(frozenset(wanted))
            return seen.uses(wanted)

        def fingerprint(seen=seen, read=read):
            read.append("fingerprint")
            return seen.fingerprint()

        changes, states, _ = optimizer.step(seen._replace(uses=uses, fingerprint=fingerprint), states, pauses)
        assert ("fingerprint" in read) == wants.fingerprint
        assert [r for r in read if r != "fingerprint"] == ([wants.layers] if wants.squares else [])
        asked.append(len(wants.layers))
        weights = current.weights + fitting.mlp.flatten(parted(changes, fitting.mlp.biases))
        loss, done = fitting.visit(weights, current.age + 1)
        current = Rollout(fitting, weights, loss, done, states, current.age + 1)
        whole = whole.advanced(optimizer, pauses=pauses)
    assert torch.equal(current.weights, whole.weights)
    assert asked[:2] == [3, 3]
    assert sum(asked) < 3 * 40
