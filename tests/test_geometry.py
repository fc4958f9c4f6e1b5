"""Sharpness, curvature and the Hessian's spectrum against plain transcriptions, closed forms and finite differences."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from metatele import TeleportOptimizer, teleport_
from metatele.errors import (
    ConfigError,
    NotExactError,
    ShapeMismatchError,
    SingularInputError,
    UnsupportedModelError,
)
from metatele.geometry import (
    Curvature,
    EigenSolver,
    GradientNorm,
    Landscape,
    Sharpness,
    count_above,
    curvatures,
    derivatives,
    hessian,
    largest_eigenvalues,
    log_volume,
)
from metatele.perceptron.activations import Identity, LeakyReLU, ReLU, Sigmoid, SiLU, Softplus, Tanh
from metatele.perceptron.losses import CrossEntropy, Differentiable, FixedGradient, MeanSquaredError, SquaredError
from metatele.perceptron.mlp import MLP
from metatele.symmetry import Exact, exponential, sweep
from metatele.teleport import Ascent

LEAKY = LeakyReLU(0.1)
SMOOTH = [Tanh(), Softplus(), Sigmoid()]
INVERTIBLE = [*SMOOTH, LEAKY]
LOSSES = [SquaredError(), MeanSquaredError(), CrossEntropy(), FixedGradient()]


def problem(
    activation=LEAKY, widths=(8, 6, 5, 4), samples=4, biases=True, batch=(), data=None, loss=None, seed=0, scale=0.3
):
    """A landscape and weights, in float64; ``data`` are batch dimensions of the data that differ from the weights'."""
    random = torch.Generator().manual_seed(seed)
    mlp = MLP(widths, activation if len(widths) > 2 else (), biases)
    own = batch if data is None else data
    x = torch.randn(*own, widths[0], samples, generator=random, dtype=torch.float64)
    y = torch.randn(*own, widths[-1], samples, generator=random, dtype=torch.float64)
    w = scale * torch.randn(*batch, mlp.num_parameters, generator=random, dtype=torch.float64)
    loss = loss or SquaredError()
    return Landscape(mlp, x, y.argmax(-2) if isinstance(loss, CrossEntropy) else y, loss), w


def name_of(value):
    return value.name if hasattr(value, "name") else str(value)


# --- sharpness


def plain_sharpness(phi, landscape, w):
    """Eq. 4, one displaced loss after another."""
    return torch.stack([landscape.value(w + t * d) for d in phi.draw(w.shape[-1], w) for t in phi.displacements]).mean(
        0
    )


SHARPNESS = {
    "one": {},
    "shared": {"batch": (3,), "data": ()},
    "shared-one": {"batch": (3,), "data": (1,)},
    "own": {"batch": (3,)},
    "grid": {"batch": (2, 3)},
    "grid-shared": {"batch": (2, 3), "data": ()},
    "rows-shared": {"batch": (2, 3), "data": (3,)},
    "no-bias": {"biases": False, "batch": (2,)},
    "mixed-biases": {"biases": (True, False, True)},
    "linear": {"widths": (5, 4), "batch": (2,)},
    "tanh": {"activation": Tanh(), "samples": 30},
}


@pytest.mark.parametrize("case", SHARPNESS)
@pytest.mark.parametrize("loss", LOSSES, ids=name_of)
@pytest.mark.parametrize("orthant", [False, True])
def test_sharpness_is_the_mean_over_displaced_losses_and_its_gradient(case, loss, orthant):
    landscape, w = problem(loss=loss, **SHARPNESS[case])
    phi = Sharpness(displacements=(0.1, 0.7, 2.0), directions=7, orthant=orthant, seed=3)
    w.requires_grad_()
    expected = plain_sharpness(phi, landscape, w)
    (slope,) = torch.autograd.grad(expected.sum(), w)
    expected, point = expected.detach(), landscape.at(w)
    assert expected.shape == w.shape[:-1]
    for chunk in (8 << 20, 5000, 1):
        phi = dataclasses.replace(phi, chunk_bytes=chunk)
        value, gradient = phi.value_and_gradient(point)
        torch.testing.assert_close(phi.value(point), expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(gradient, slope, rtol=1e-9, atol=1e-11)
        assert not value.requires_grad


def test_sharpness_of_a_loss_given_as_a_function_is_that_of_the_built_in_one():
    landscape, w = problem(loss=MeanSquaredError())
    given = Landscape(landscape.mlp, landscape.inputs, landscape.targets.mT, Differentiable(nn.functional.mse_loss))
    phi = Sharpness(directions=5)
    for a, b in zip(phi.value_and_gradient(given.at(w)), phi.value_and_gradient(landscape.at(w)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    with pytest.raises(ConfigError, match="one network at a time"):
        phi.value(given.at(torch.stack([w, w])))


def test_directions_are_unit_vectors_and_their_absolute_values():
    like = torch.zeros(50, dtype=torch.float64)
    sphere, orthant = (torch.stack(list(Sharpness(orthant=o).draw(50, like))) for o in (False, True))
    assert sphere.shape == (200, 50)
    torch.testing.assert_close(sphere.norm(dim=-1), torch.ones(200).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(sphere.abs(), orthant)
    assert float(sphere.mean(0).norm()) < 0.2  # 1/√200 = 0.07 for directions without a preference
    assert float(orthant.mean(0).norm()) > 0.75  # √(2/π) = 0.80


def test_sharpness_of_a_quadratic_loss_is_the_trace_of_its_hessian():
    landscape, w = problem(widths=(5, 4), samples=20, biases=False)
    t, count, size = 3.0, 4000, w.shape[-1]
    phi = Sharpness(displacements=(t,), directions=count)
    trace = 4 * landscape.inputs.square().sum()  # of XXᵀ ⊗ I₄
    expected = landscape.value(w) + t**2 * trace / (2 * size)
    draws = torch.stack([landscape.value(w + t * d) for d in phi.draw(size, w)])
    error = draws.std() / math.sqrt(count)
    assert float(error) < 0.02 * float(expected - landscape.value(w))
    assert abs(float(phi.value(landscape.at(w)) - expected)) < 3 * float(error)


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("size", [1e200, math.nan, math.inf])
def test_a_displaced_loss_that_is_not_finite_makes_sharpness_infinite(batch, size):
    landscape, w = problem(batch=batch)
    (w[1] if batch else w)[-1] = size
    phi = Sharpness(directions=3)
    value, gradient = phi.value_and_gradient(landscape.at(w))
    for found in (value, phi.value(landscape.at(w))):
        assert torch.isinf(found).tolist() == ([False, True, False] if batch else True)
        assert bool((found > 0).all())
    if batch:  # and leaves the others alone
        scene = Landscape(landscape.mlp, landscape.inputs[::2], landscape.targets[::2], landscape.loss)
        others = phi.value_and_gradient(scene.at(w[::2]))
        torch.testing.assert_close((value[::2], gradient[::2]), others, rtol=1e-12, atol=1e-14)


def test_sharpness_refuses_settings_it_cannot_use():
    for bad in ((), (math.nan,), (1.0, math.inf)):
        with pytest.raises(ConfigError, match="displacements must be a list of finite numbers"):
            Sharpness(displacements=bad)
    with pytest.raises(ConfigError, match="directions must be at least 1, got 0"):
        Sharpness(directions=0)


# --- curvature

SHAPES = {  # widths and samples
    "one hidden layer, fewer samples": ((6, 5, 3), 4),
    "one hidden layer, more samples": ((4, 5, 3), 9),
    "several hidden layers, fewer samples": ((8, 6, 5, 4), 4),
    "several hidden layers, more samples": ((5, 4, 3, 4), 12),
    "fewer samples, then more": ((8, 3, 5, 2), 5),
    "more samples, then fewer": ((3, 9, 5, 4, 2), 5),
}


def plain_pseudo_inverse(H):
    """Of full rank, by its definition (``torch.linalg.solve`` gives wrong nested forward derivatives)."""
    if H.shape[-2] >= H.shape[-1]:
        return torch.linalg.inv(H.mT @ H) @ H.mT
    return H.mT @ torch.linalg.inv(H @ H.mT)


def plain_curve(landscape, w, Ms):
    """``t ↦ exp(tM)·w``, the exact action written out layer by layer."""
    mlp = landscape.mlp

    def curve(t):
        matrices, biases = mlp.unflatten(w)
        H, parts, V = landscape.inputs, [], matrices[0]
        for m, M in enumerate(Ms):
            f = mlp.activations[m]
            if biases[m] is not None:
                V = torch.cat([V, biases[m].unsqueeze(-1)], -1)
                H = torch.cat([H, torch.ones_like(H[:1])])
            Z = V @ H
            V = V + (f.unchecked_inverse(torch.linalg.matrix_exp(t * M) @ f(Z)) - Z) @ plain_pseudo_inverse(H)
            H = f(V @ H)
            parts += [V.flatten()] if biases[m] is None else [V[:, :-1].flatten(), V[:, -1]]
            V = matrices[m + 1] @ torch.linalg.matrix_exp(-t * M)
        return torch.cat([*parts, V.flatten(), *([] if biases[-1] is None else [biases[-1]])])

    return curve


def jets(curve, order=3, at=0.0):
    """Derivatives of a curve by nested forward differentiation."""
    one, found = torch.ones((), dtype=torch.float64), []
    for _ in range(order):
        curve = (lambda f: lambda t: torch.func.jvp(f, (t,), (one,))[1])(curve)
        found.append(curve(torch.tensor(at, dtype=torch.float64)))
    return found


def flattened(mlp, parts):
    """The layers' parts of one derivative as vectors ``[..., curves, P]``."""
    rows = []
    for part, biased in zip(parts, mlp.biases, strict=True):
        rows += [part[..., :-1].flatten(-2), part[..., -1]] if biased else [part.flatten(-2)]
    return torch.cat(rows, -1)


def formula(first, second, third):
    """``κ`` and ``κ'`` as the paper writes them (Eq. 47 and 51, with the third power of ‖γ'‖)."""
    a, ab, ac = (float(first @ v) for v in (first, second, third))
    b, bc = float(second @ second), float(second @ third)
    N, speed = math.sqrt(a * b - ab**2), math.sqrt(a)
    return N / speed**3, (a * bc - ab * ac) / N / speed**3 - 3 * N * ab / speed**5


@pytest.mark.parametrize("shape", SHAPES)
def test_nested_autodiff_of_the_plain_curve_is_its_finite_differences(shape):
    widths, samples = SHAPES[shape]
    landscape, w = problem(Softplus(), widths, samples, scale=0.4)
    curve = plain_curve(landscape, w, [m[0] for m in Curvature(seed=1).draw(landscape.mlp, w)])
    h = 1e-3
    ahead, behind = jets(curve, at=h), jets(curve, at=-h)
    known = [curve(h) - curve(-h), *(a - b for a, b in zip(ahead, behind, strict=True))]
    for found, difference in zip(jets(curve), known, strict=False):
        assert float((found - difference / (2 * h)).norm()) < 1e-2 * float(found.norm())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", INVERTIBLE, ids=str)
@pytest.mark.parametrize("biases", [False, True])
def test_derivatives_and_curvature_are_those_of_the_curve_by_autodiff(shape, activation, biases):
    widths, samples = SHAPES[shape]
    landscape, w = problem(activation, widths, samples, biases, scale=0.8)
    mlp = landscape.mlp
    M = Curvature(curves=2, seed=1).draw(mlp, w)
    found = [flattened(mlp, parts) for parts in derivatives(landscape, mlp.unflatten(w), M)]
    measured = curvatures(landscape, mlp.unflatten(w), M, slope=True)
    for curve in range(2):
        expected = jets(plain_curve(landscape, w, [m[curve] for m in M]))
        torch.testing.assert_close(plain_curve(landscape, w, [m[curve] for m in M])(0.0), w, rtol=1e-9, atol=1e-10)
        for mine, theirs in zip(found, expected, strict=True):
            assert float((mine[curve] - theirs).norm()) < 1e-8 * float(theirs.norm())
        kappa, slope = formula(*expected)
        assert float(measured.kappa[curve]) == pytest.approx(kappa, rel=1e-7)
        assert float(measured.slope[curve]) == pytest.approx(slope, rel=1e-6, abs=1e-6 * kappa)
    torch.testing.assert_close(curvatures(landscape, mlp.unflatten(w), M).kappa, measured.kappa)
    for order in (1, 2):
        for mine, known in zip(derivatives(landscape, mlp.unflatten(w), M, order), found, strict=False):
            torch.testing.assert_close(flattened(mlp, mine), known)


@pytest.mark.parametrize("activation", INVERTIBLE, ids=str)
@pytest.mark.parametrize("biases", [False, True])
def test_derivatives_are_those_of_the_package_s_exact_action(activation, biases):
    landscape, w = problem(activation, biases=biases)
    mlp = landscape.mlp
    M = Curvature().draw(mlp, w)

    def curve(t):
        elements = [exponential(t * m[0]) for m in M]
        return mlp.flatten(sweep(Exact(strict=False), mlp, mlp.unflatten(w), landscape.inputs, elements))

    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    covector = torch.randn(w.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    along = (curve(t) * covector).sum()
    for parts in derivatives(landscape, mlp.unflatten(w), M):
        mine = flattened(mlp, parts)[0]
        (along,) = torch.autograd.grad(along, t, create_graph=True)
        assert abs(float(along.detach() - mine @ covector)) < 1e-8 * float(mine.norm() * covector.norm())


def one_layer_formula(landscape, w, M, coefficients):
    """``γ', γ'', γ'''`` of one hidden layer without biases as in Eq. 58 and 60, with given coefficients."""
    a, b, c = coefficients
    V, U = landscape.mlp.unflatten(w).matrices
    f, H = landscape.mlp.activations[0], landscape.inputs
    A, (f1, f2, f3) = f(V @ H), f.derivatives(V @ H)
    inverse2, inverse3 = -f2 / f1**3, (3 * f2**2 - f1 * f3) / f1**5  # of f⁻¹ at A
    MA, M2A, M3A = M @ A, M @ M @ A, M @ M @ M @ A
    rows = [MA / f1, M2A / f1 + a * MA**2 * inverse2, M3A / f1 + b * MA * M2A * inverse2 + c * MA**3 * inverse3]
    ends = [-U @ M, U @ M @ M, -U @ M @ M @ M]
    pinv = plain_pseudo_inverse(H)
    return [torch.cat([(row @ pinv).flatten(), end.flatten()]) for row, end in zip(rows, ends, strict=True)]


@pytest.mark.parametrize("activation", INVERTIBLE, ids=str)
def test_the_coefficients_that_the_paper_prints_lack_those_of_taylor(activation):
    landscape, w = problem(activation, (6, 5, 3), biases=False, scale=0.5)
    M = Curvature().draw(landscape.mlp, w)
    exact = curvatures(landscape, landscape.mlp.unflatten(w), M, slope=True)
    known = float(exact.kappa), float(exact.slope)
    right = formula(*one_layer_formula(landscape, w, M[0][0], (1, 3, 1)))
    printed = formula(*one_layer_formula(landscape, w, M[0][0], (2, 6, 6)))
    assert right == pytest.approx(known, rel=1e-8)
    if activation == LEAKY:
        assert printed == pytest.approx(known, rel=1e-8)
    else:
        assert abs(printed[0] - known[0]) > 0.02 * abs(known[0])
        assert abs(printed[1] - known[1]) > 0.1 * abs(known[1])


@pytest.mark.parametrize("activation", INVERTIBLE, ids=str)
@pytest.mark.parametrize("biases", [False, True])
def test_curvature_is_that_of_the_circle_through_three_points(activation, biases):
    landscape, w = problem(activation, biases=biases)
    mlp, h = landscape.mlp, 1e-3
    M = Curvature().draw(mlp, w)
    found = curvatures(landscape, mlp.unflatten(w), M, slope=True)
    curve = plain_curve(landscape, w, [m[0] for m in M])
    a, b = curve(h) - w, curve(-h) - w
    area = math.sqrt(float((a @ a) * (b @ b) - (a @ b) ** 2)) / 2
    circle = 4 * area / float(a.norm() * b.norm() * (a - b).norm())
    assert float(found.kappa) == pytest.approx(circle, rel=1e-4)
    ahead, behind = (formula(*jets(curve, at=t))[0] for t in (h, -h))
    assert float(found.slope) == pytest.approx((ahead - behind) / (2 * h), rel=1e-3)


@pytest.mark.parametrize("activation", INVERTIBLE, ids=str)
@pytest.mark.parametrize("biases", [False, True])
def test_curvature_further_along_is_that_of_the_points_there(activation, biases):
    """``exp((t + s)M)·w = exp(sM)·(exp(tM)·w)`` for one hidden layer (of several, on the data alone)."""
    landscape, w = problem(activation, (8, 6, 4), biases=biases)
    mlp, h = landscape.mlp, 1e-4
    M = Curvature().draw(mlp, w)
    curve = plain_curve(landscape, w, [m[0] for m in M])
    ahead, behind = (curvatures(landscape, mlp.unflatten(curve(t)), M).kappa for t in (h, -h))
    slope = curvatures(landscape, mlp.unflatten(w), M, slope=True).slope
    assert float(slope) == pytest.approx(float(ahead - behind) / (2 * h), rel=1e-5)


@pytest.mark.parametrize("biases", [False, True])
def test_coordinates_keep_inner_products(biases):
    landscape, w = problem(Tanh(), widths=(30, 6, 5, 4), batch=(2,), biases=biases)
    mlp = landscape.mlp
    M = Curvature(curves=3).draw(mlp, w)
    full, short = (derivatives(landscape, mlp.unflatten(w), M, coordinates=c) for c in (False, True))
    assert full[0][0].shape == (2, 3, 6, 30 + biases)
    assert short[0][0].shape == (2, 3, 6, 4)
    for i in range(3):
        for j in range(i + 1):
            a, b = (sum((u * v).sum((-2, -1)) for u, v in zip(rows[i], rows[j], strict=True)) for rows in (full, short))
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("activation", [LEAKY, Tanh()], ids=str)
def test_curves_that_do_not_move_have_no_curvature(activation):
    landscape, w = problem(activation, (6, 5, 3), biases=False, batch=(3,), data=())
    w[1] = 0
    M = Curvature(curves=2).draw(landscape.mlp, w)
    found = curvatures(landscape, landscape.mlp.unflatten(w), M, slope=True)
    assert found.kappa[1].tolist() == found.slope[1].tolist() == [0, 0]
    assert bool((found.kappa[::2] > 0).all())
    value, gradient = Curvature(curves=2).value_and_gradient(landscape.at(w))
    assert float(value[1]) == 0
    assert bool(torch.isfinite(gradient).all())
    alone = Curvature(curves=2).value_and_gradient(landscape.at(w[::2]))[1]
    torch.testing.assert_close(gradient[::2], alone, rtol=1e-12, atol=1e-14)


def test_a_straight_curve_turns_at_the_rate_of_its_third_derivative():
    """``(v exp(t), u exp(-t))`` at u = 0 is a ray: κ = κ' = 0."""
    scene = Landscape(MLP((1, 1, 1), Identity()), torch.ones(1, 1), torch.ones(1, 1), SquaredError())
    w = scene.mlp.unflatten(torch.tensor([2.0, 0.0]))
    found = curvatures(scene, w, [torch.ones(1, 1, 1)], slope=True)
    assert found.kappa.tolist() == found.slope.tolist() == [0]


@pytest.mark.parametrize("activation", [ReLU(), SiLU()], ids=str)
def test_activations_without_inverse_are_refused(activation):
    landscape, w = problem(activation)
    with pytest.raises(NotExactError, match=f"need an invertible activation, got {activation.describe()}"):
        Curvature().value(landscape.at(w))


def test_curves_that_do_not_exist_are_refused():
    landscape, w = problem(widths=(5, 4))
    with pytest.raises(NotExactError, match="need a hidden layer"):
        Curvature().value(landscape.at(w))
    landscape, w = problem()
    weights, M = landscape.mlp.unflatten(w), Curvature().draw(landscape.mlp, w)
    with pytest.raises(ConfigError, match="order must be 1, 2 or 3, got 4"):
        derivatives(landscape, weights, M, order=4)
    with pytest.raises(ConfigError, match="one M for each of 2 hidden layers, got 1"):
        derivatives(landscape, weights, M[:1])
    with pytest.raises(ConfigError, match="curves must be at least 1, got 0"):
        Curvature(curves=0)


@pytest.mark.parametrize("activation", [LEAKY, Tanh()], ids=str)
def test_samples_that_depend_on_each_other_are_refused(activation):
    landscape, w = problem(activation)
    twice = torch.cat([landscape.inputs, landscape.inputs[:, :1]], -1)
    targets = torch.cat([landscape.targets, landscape.targets[:, :1]], -1)
    doubled = Landscape(landscape.mlp, twice, targets, SquaredError())
    M = Curvature().draw(landscape.mlp, w)
    for refused in (
        lambda: derivatives(doubled, landscape.mlp.unflatten(w), M),
        lambda: Curvature().value(doubled.at(w)),
        lambda: Curvature().value_and_gradient(doubled.at(w)),
    ):
        with pytest.raises(SingularInputError):
            refused()


@pytest.mark.parametrize("activation", INVERTIBLE, ids=str)
@pytest.mark.parametrize("data", [(), (5,)], ids=["one batch", "a batch each"])
def test_networks_without_curves_leave_the_others_alone(activation, data):
    landscape, w = problem(activation, samples=15, batch=(5,), data=data)
    psi = Curvature(curves=3)
    alone = [psi.value(landscape.at(w))[i] for i in (0, 2, 4)]
    slope = [psi.value_and_gradient(landscape.at(w))[1][i] for i in (0, 2, 4)]
    broken = w.clone()
    broken[1, 7] = math.nan
    equal = landscape.mlp.unflatten(broken)
    equal.matrices[0][3] = 0  # its hidden units are the same for all samples
    equal.biases[0][3] = 0
    point = landscape.at(landscape.mlp.flatten(equal))
    value, gradient = psi.value_and_gradient(point)
    for found in (psi.value(point), value):
        torch.testing.assert_close(found[[0, 2, 4]], torch.stack(alone))
        assert torch.isnan(found[[1, 3]]).all()
    torch.testing.assert_close(gradient[[0, 2, 4]], torch.stack(slope))
    assert torch.isnan(gradient[[1, 3]]).all()
    flat, report, _ = Ascent(objective=psi, rate="fixed", lr=1e-3, steps=2, max_drift=math.inf)(landscape, point.flat)
    torch.testing.assert_close(flat[[1, 3]], point.flat[[1, 3]], equal_nan=True, rtol=0, atol=0)
    assert report.rolled_back.tolist() == [False, True, False, True, False]
    if not data:
        lone = landscape.at(landscape.mlp.flatten(equal)[3])
        with pytest.raises(SingularInputError):
            psi.value(lone)


@pytest.mark.parametrize("activation", INVERTIBLE, ids=str)
@pytest.mark.parametrize("samples", [4, 15])
def test_gradient_of_curvature_is_that_of_finite_differences(activation, samples):
    landscape, w = problem(activation, samples=samples, batch=(2,))
    psi, random, h = Curvature(curves=3), torch.Generator().manual_seed(2), 1e-5
    value, gradient = psi.value_and_gradient(landscape.at(w))
    M = psi.draw(landscape.mlp, w)
    torch.testing.assert_close(value, curvatures(landscape, landscape.mlp.unflatten(w), M).kappa.mean(-1))
    torch.testing.assert_close(value, psi.value(landscape.at(w)))
    for _ in range(3):
        v = torch.randn(w.shape, generator=random, dtype=torch.float64)
        measured = (psi.value(landscape.at(w + h * v)) - psi.value(landscape.at(w - h * v))) / (2 * h)
        scale = float(gradient.norm()) * math.sqrt(2)
        torch.testing.assert_close((gradient * v).sum(-1), measured, rtol=1e-5, atol=1e-6 * scale)


def test_chunks_do_not_change_curvature():
    landscape, w = problem(Tanh(), batch=(2,))
    psi = Curvature(curves=7)
    expected = psi.value(landscape.at(w)), *psi.value_and_gradient(landscape.at(w))
    for chunk in (1, 12 * 2 * 4 * 6 * 8 * 3):  # one curve at a time, and three
        psi = dataclasses.replace(psi, chunk_bytes=chunk)
        found = psi.value(landscape.at(w)), *psi.value_and_gradient(landscape.at(w))
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("samples", [4, 15])
def test_curvature_in_single_precision_is_that_in_double(samples):
    landscape, w = problem(samples=samples, batch=(4,), data=())
    single = Landscape(landscape.mlp, landscape.inputs.float(), landscape.targets.float(), landscape.loss)
    psi = Curvature(curves=3)
    value, gradient = psi.value_and_gradient(single.at(w.float()))
    known = psi.value_and_gradient(landscape.at(w))
    assert value.dtype == gradient.dtype == torch.float32
    torch.testing.assert_close(value.double(), known[0], rtol=1e-4, atol=0)
    assert float(((gradient - known[1]).norm(dim=-1) / known[1].norm(dim=-1)).max()) < 1e-3


def test_drawn_group_elements_are_those_of_the_reference():
    landscape, w = problem()
    first, second = (Curvature(curves=4, seed=5).draw(landscape.mlp, w) for _ in range(2))
    assert [M.shape for M in first] == [(4, 6, 6), (4, 5, 5)]
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
        assert bool((a >= 0).all())
        torch.testing.assert_close(a.norm(dim=(-2, -1)), torch.ones(4).double(), rtol=1e-6, atol=0)


# --- as objectives of a teleport

OBJECTIVES = {"sharpness": Sharpness(displacements=(0.5, 1.0), directions=10), "curvature": Curvature(curves=4)}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("descend", [False, True])
@pytest.mark.parametrize("action", ["approximate", "auto"])
@pytest.mark.parametrize("samples", [4, 20])
def test_an_ascent_moves_the_objective_as_asked_and_keeps_networks_apart(name, descend, action, samples):
    landscape, w = problem(batch=(3,), data=(), samples=samples)
    move = Ascent(objective=OBJECTIVES[name], descend=descend, action=action, steps=4)
    moved, report, _ = move(landscape, w)
    change = report.objective_after - report.objective_before
    assert bool(((-change if descend else change) > 1e-3 * report.objective_before).all())
    assert float(report.drift.max()) <= 0.01
    drift = (landscape.value(moved) - landscape.value(w)).abs() / landscape.value(w)
    torch.testing.assert_close(report.drift, drift)
    torch.testing.assert_close(report.objective_after, OBJECTIVES[name].value(landscape.at(moved)))
    for network in range(3):
        alone = move(landscape, w[network])
        torch.testing.assert_close(alone.weights, moved[network], rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("descend", [False, True])
def test_a_model_is_teleported_by_name_of_the_objective(name, descend):
    model = nn.Sequential(nn.Linear(8, 6), nn.LeakyReLU(0.1), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(7, 8), torch.randint(3, (7,))
    before = model(x).detach()
    loss = float(nn.functional.cross_entropy(before, y))
    report = teleport_(model, x, y, nn.functional.cross_entropy, objective=name, descend=descend, steps=2)
    change = float(report.objective_after - report.objective_before)
    assert (change < 0) if descend else (change > 0)
    assert float(report.loss_before) == pytest.approx(loss, rel=1e-5)
    assert nn.functional.cross_entropy(model(x), y).item() == pytest.approx(loss, rel=0.011)
    assert not torch.equal(model(torch.randn(1, 8)), before[:1])


def test_an_optimizer_that_raises_sharpness_needs_the_loss():
    def make(objective, **settings):
        model = nn.Sequential(nn.Linear(8, 6), nn.LeakyReLU(0.1), nn.Linear(6, 3))
        move = Ascent(objective=objective, steps=2)
        return model, TeleportOptimizer(torch.optim.SGD(model.parameters(), 0.01), model, move, at=[0], **settings)

    with pytest.raises(ConfigError, match="an ascent of sharpness needs the loss: give batches and loss_fn"):
        make(OBJECTIVES["sharpness"])
    x, y = torch.randn(5, 8), torch.randn(5, 3)
    both = {"batches": lambda: [(x, y)], "loss_fn": nn.functional.mse_loss}
    for name, settings in (("sharpness", both), ("curvature", both), ("curvature", {})):
        model, optimizer = make(OBJECTIVES[name], **settings)
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        assert optimizer.param_groups[0]["teleports"] == 1
        assert bool(optimizer.report.objective_after > optimizer.report.objective_before)


# --- spectrum


@pytest.mark.parametrize("activation", [*INVERTIBLE, Identity()], ids=str)
@pytest.mark.parametrize("loss", LOSSES, ids=name_of)
@pytest.mark.parametrize("biases", [False, True])
def test_dense_hessian_is_that_of_autodiff(activation, loss, biases):
    landscape, w = problem(activation, widths=(5, 4, 3, 3), biases=biases, loss=loss)
    expected = torch.autograd.functional.hessian(landscape.value, w)
    torch.testing.assert_close(hessian(landscape, w), expected, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(hessian(landscape, w, chunk_bytes=20_000), expected, rtol=1e-10, atol=1e-11)
    values = largest_eigenvalues(landscape, w, w.shape[-1])
    known = torch.linalg.eigvalsh(expected).flip(0)
    torch.testing.assert_close(values, known, rtol=1e-10, atol=1e-12 * float(known.abs().max()))


@pytest.mark.parametrize("data", [(), (1,), (3,), (2, 3)])
@pytest.mark.parametrize("loss", [SquaredError(), CrossEntropy()], ids=name_of)
def test_networks_of_a_batch_are_looked_at_one_by_one(data, loss):
    landscape, w = problem(Tanh(), (4, 3, 3), batch=(2, 3), data=data, loss=loss)
    H = hessian(landscape, w)
    eigenvalues = torch.linalg.eigvalsh(H).flip(-1)
    torch.testing.assert_close(largest_eigenvalues(landscape, w, 5), eigenvalues[..., :5])
    assert torch.equal(count_above(landscape, w, 0.1), (eigenvalues > 0.1).sum(-1))
    torch.testing.assert_close(log_volume(landscape, w, 3), eigenvalues[..., :3].log().sum(-1))
    for index in ((0, 0), (1, 2)):
        both = landscape.inputs, landscape.targets
        own = [t.expand(2, 3, *t.shape[len(data) :])[index] for t in both]
        alone = Landscape(landscape.mlp, *own, loss)
        torch.testing.assert_close(H[index], torch.autograd.functional.hessian(alone.value, w[index]))


LANCZOS = EigenSolver(dense_size=0, dense_share=1)


@pytest.mark.parametrize("loss", [SquaredError(), CrossEntropy()], ids=name_of)
@pytest.mark.parametrize("samples", [4, 30])  # with 4 the first layer is looked at in the span of the samples
@pytest.mark.parametrize("batch", [(), (2,)])
def test_lanczos_finds_the_eigenvalues_of_the_dense_hessian(loss, samples, batch):
    landscape, w = problem(Tanh(), (12, 6, 5, 4), samples, batch=batch, loss=loss)
    known = torch.linalg.eigvalsh(hessian(landscape, w)).flip(-1)
    for tolerance in (1e-3, 1e-10):
        found = largest_eigenvalues(landscape, w, 10, tolerance=tolerance, solver=LANCZOS)
        torch.testing.assert_close(found, known[..., :10], rtol=max(tolerance, 1e-9), atol=0)
    assert torch.equal(
        largest_eigenvalues(landscape, w, 10, solver=LANCZOS), largest_eigenvalues(landscape, w, 10, solver=LANCZOS)
    )
    torch.testing.assert_close(
        largest_eigenvalues(landscape, w, 10, seed=1, solver=LANCZOS), known[..., :10], rtol=1e-6, atol=0
    )
    middle = float(known[..., 25:27].mean())
    assert torch.equal(count_above(landscape, w, middle, solver=LANCZOS), (known > middle).sum(-1))
    torch.testing.assert_close(
        log_volume(landscape, w, 10, solver=LANCZOS), known[..., :10].log().sum(-1), rtol=1e-6, atol=1e-6
    )
    single = Landscape(
        landscape.mlp,
        landscape.inputs.float(),
        landscape.targets.float() if loss.name == "squared-error" else landscape.targets,
        loss,
    )
    found = largest_eigenvalues(single, w.float(), 10, solver=LANCZOS)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), known[..., :10], rtol=1e-5, atol=0)


def test_lanczos_with_a_loss_given_as_a_function():
    landscape, w = problem(Tanh(), loss=MeanSquaredError())
    given = Landscape(landscape.mlp, landscape.inputs, landscape.targets.mT, Differentiable(nn.functional.mse_loss))
    torch.testing.assert_close(hessian(given, w), hessian(landscape, w), rtol=1e-11, atol=1e-13)
    known = largest_eigenvalues(landscape, w, 6)
    torch.testing.assert_close(largest_eigenvalues(given, w, 6, solver=LANCZOS), known, rtol=1e-6, atol=0)
    with pytest.raises(ConfigError, match="one network at a time"):
        hessian(given, torch.stack([w, w]))


@pytest.mark.parametrize("solver", [EigenSolver(), LANCZOS], ids=["dense", "lanczos"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_spectrum_of_a_linear_network_is_that_of_its_inputs(solver, dtype):
    """``½‖y - wX‖²`` has the Hessian ``XXᵀ``, here with the eigenvalues 25, 16, 9, 4, 1 and zeros."""
    random = torch.Generator().manual_seed(4)
    Q = torch.linalg.qr(torch.randn(40, 40, generator=random, dtype=torch.float64))[0]
    sizes = torch.tensor([5.0, 4, 3, 2, 1, *[0] * 35], dtype=torch.float64)
    mlp = MLP((40, 1), ())
    known = [25.0, 16.0, 9.0, 4.0, 1.0]
    for X in ((Q * sizes) @ Q, (Q * sizes)[:, :7]):  # 40 samples of rank 5, and 7
        scene = Landscape(mlp, X.to(dtype), torch.zeros(1, X.shape[-1], dtype=dtype), SquaredError())
        w = torch.randn(2, 40, generator=random).to(dtype)
        for row in largest_eigenvalues(scene, w, 6, solver=solver).tolist():
            assert row == pytest.approx([*known, 0.0], rel=1e-5)
            assert row[5] == 0
        for epsilon, count in ((0.0, 5), (0.5, 5), (1.5, 4), (10.0, 2), (26.0, 0), (-1.0, 40)):
            assert count_above(scene, w, epsilon, solver=solver).tolist() == [count, count]
        assert log_volume(scene, w, 5, solver=solver).tolist() == pytest.approx([math.log(14400)] * 2, rel=1e-5)
        assert log_volume(scene, w, 6, solver=solver).tolist() == [-math.inf] * 2


def test_a_negative_eigenvalue_has_no_volume():
    """``½(uv)²`` at (2, 1) has the Hessian ((1, 4), (4, 4)), of determinant -12."""
    scene = Landscape(MLP((1, 1, 1), Identity()), torch.ones(1, 1), torch.zeros(1, 1), SquaredError())
    w = torch.tensor([2.0, 1.0], dtype=torch.float64)
    scene = Landscape(scene.mlp, scene.inputs.double(), scene.targets.double(), scene.loss)
    assert hessian(scene, w).tolist() == [[1, 4], [4, 4]]
    upper, lower = (2.5 + s * math.sqrt(2.5**2 + 12) for s in (1, -1))
    assert largest_eigenvalues(scene, w, 2).tolist() == pytest.approx([upper, lower])
    assert int(count_above(scene, w, 0.0)) == 1
    assert int(count_above(scene, w, lower - 0.1)) == 2
    assert float(log_volume(scene, w, 1)) == pytest.approx(math.log(upper))
    assert float(log_volume(scene, w, 2)) == -math.inf


@pytest.mark.parametrize("solver", [EigenSolver(), LANCZOS], ids=["dense", "lanczos"])
def test_a_linear_loss_has_no_sharpness(solver):
    landscape, w = problem(widths=(5, 4), loss=FixedGradient())
    assert largest_eigenvalues(landscape, w, 3, solver=solver).tolist() == [0, 0, 0]
    assert int(count_above(landscape, w, 0.0, solver=solver)) == 0
    assert float(log_volume(landscape, w, 1, solver=solver)) == -math.inf


def test_questions_that_cannot_be_answered_are_refused():
    landscape, w = problem(batch=(2,))
    size = w.shape[-1]
    for bad in (0, size + 1, 1.5, -3):
        with pytest.raises(ConfigError, match=f"count must be a whole number from 1 to the number of weights, {size}"):
            largest_eigenvalues(landscape, w, bad)
        with pytest.raises(ConfigError, match="k must be a whole number from 1"):
            log_volume(landscape, w, bad)
    for bad in (math.nan, math.inf):
        with pytest.raises(ConfigError, match="epsilon must be a finite number"):
            count_above(landscape, w, bad)
    for bad in (-1e-3, 1.0, math.nan):
        with pytest.raises(ConfigError, match="tolerance must be at least 0 and below 1"):
            largest_eigenvalues(landscape, w, 1, tolerance=bad)
    with pytest.raises(ShapeMismatchError):
        hessian(landscape, w[:, 1:])
    broken = w.clone()
    broken[1, 3] = math.nan
    huge = torch.where(torch.arange(2).unsqueeze(-1) == 1, 1e200 * w, w)
    endless = Landscape(landscape.mlp, landscape.inputs / 0, landscape.targets, landscape.loss)
    for ask in (hessian, lambda *a: largest_eigenvalues(*a, 2), lambda *a: count_above(*a, 1.0)):
        with pytest.raises(ConfigError, match=r"weights of network \[1\] are not finite"):
            ask(landscape, broken)
        with pytest.raises(ConfigError, match=r"losses of network \[1\] are not finite"):
            ask(landscape, huge)
        with pytest.raises(ConfigError, match=r"inputs of network \[0\] are not finite"):
            ask(endless, w)


def test_lanczos_that_does_not_converge_says_so():
    once = dataclasses.replace(LANCZOS, restarts=1)
    landscape, w = problem(Tanh(), (12, 6, 5, 4), 30)
    with pytest.raises(ConfigError, match=r"tolerance 1e-12 was not reached: [0-9] of 10 eigenvalues were found"):
        largest_eigenvalues(landscape, w, 10, tolerance=1e-12, solver=once)


@pytest.mark.parametrize("activation", [LEAKY, Tanh()], ids=str)
def test_curvature_neither_hides_nor_makes_what_is_not_a_number(activation):
    for widths in ((8, 6, 4), (8, 6, 5, 4)):
        landscape, w = problem(activation, widths=widths, batch=(3,), data=())
        good = Curvature(curves=3).value(landscape.at(w))
        for bad in (math.nan, math.inf):
            for place in (0, -1):  # the first layer's weight, and the last layer's bias or weight
                broken = w.clone()
                broken[1, place if place == 0 else -6] = bad
                value = Curvature(curves=3).value(landscape.at(broken))
                assert torch.isnan(value).tolist() == [False, True, False]
                torch.testing.assert_close(value[[0, 2]], good[[0, 2]])


def test_curvature_of_large_and_small_networks_is_neither_infinite_nor_zero():
    landscape, w = problem(LEAKY, widths=(8, 6, 4), biases=False)
    landscape = Landscape(landscape.mlp, landscape.inputs.float(), landscape.targets.float(), landscape.loss)
    expected = Curvature(curves=3).value(landscape.at(w.float()))
    for factor in (1e-20, 1e-12, 1e12, 1e18):  # γ is homogeneous in the weights
        value = Curvature(curves=3).value(landscape.at(w.float() * factor))
        torch.testing.assert_close(value * factor, expected, rtol=1e-3, atol=0)


def test_landscapes_refuse_what_does_not_fit():
    mlp = MLP((5, 4, 3), LEAKY)
    x, y = torch.randn(5, 7), torch.randn(3, 7)
    for given, words in (
        ((x.mT, y, SquaredError()), r"inputs must be \[..., 5, n\]"),
        ((x[:, :0], y[:, :0], SquaredError()), r"inputs must be \[..., 5, n\]"),
        ((x, y[0], SquaredError()), r"targets must be \[..., 3, 7\]"),
        ((x, y[:1], MeanSquaredError()), r"targets must be \[..., 3, 7\]"),
        ((x, y.mT, FixedGradient()), r"targets must be \[..., 3, 7\]"),
        ((x, torch.zeros(1, dtype=torch.int64), CrossEntropy()), r"class indices \[..., 7\]"),
    ):
        with pytest.raises(ShapeMismatchError, match=words):
            Landscape(mlp, *given)
    for given, words in (
        ((x, y.double(), SquaredError()), "targets must be torch.float32"),
        ((x.long(), y, SquaredError()), "inputs must be floating-point numbers"),
        ((x, torch.full((7,), 3), CrossEntropy()), "class indices must lie from 0 to 2, got 3 to 3"),
        ((x, torch.zeros(7), CrossEntropy()), "class indices of dtype torch.int64"),
        ((x, y, nn.functional.mse_loss), "loss must be one of metatele.perceptron.losses"),
        ((x, y.tolist(), SquaredError()), "targets must be a tensor, got list"),
    ):
        with pytest.raises(ConfigError, match=words):
            Landscape(mlp, *given)
    scene = Landscape(mlp, x, y, SquaredError())
    with pytest.raises(ConfigError, match=r"weights must be torch\.float32"):
        scene.at(torch.zeros(32, dtype=torch.float64))
    with pytest.raises(ShapeMismatchError, match=r"weights must be \[..., 32\]"):
        scene.at(torch.zeros(0, 32))


# --- modules in place of shapes and weights


def test_a_module_gives_a_landscape_its_shape_and_a_point_its_weights():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Sequential(nn.Linear(4, 3, bias=False))).double()
    x, y = torch.randn(7, 5).double(), torch.randn(7, 3).double()
    landscape = Landscape(model, x.T, y.T, MeanSquaredError())
    assert landscape.mlp == MLP((5, 4, 3), Tanh(), (True, False))
    loss = nn.functional.mse_loss(model(x), y)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    point = landscape.at(model)
    torch.testing.assert_close(point.value, loss.detach())
    torch.testing.assert_close(point.gradient, gradient)
    torch.testing.assert_close(largest_eigenvalues(landscape, model, 2), largest_eigenvalues(landscape, point.flat, 2))
    assert torch.equal(hessian(landscape, model), hessian(landscape, point.flat))
    assert bool(GradientNorm().value(point).isclose(gradient.square().sum()))


def test_what_is_no_landscape_no_weights_and_no_point_is_named():
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    x, y = torch.randn(7, 5), torch.randn(7, 3)
    with pytest.raises(ShapeMismatchError, match=r"one column per sample, got \[7, 5\], which is one row per sample"):
        Landscape(model, x, y, MeanSquaredError())
    with pytest.raises(ConfigError, match=r"mlp must be an MLP or an nn\.Sequential, got str"):
        Landscape("model", x.T, y.T, MeanSquaredError())
    with pytest.raises(UnsupportedModelError, match=r"layer '1' \(Dropout\) is not supported"):
        Landscape(nn.Sequential(nn.Linear(5, 3), nn.Dropout()), x.T, y.T, MeanSquaredError())
    with pytest.raises(ConfigError, match=r"\(a function goes into Differentiable\), got MSELoss"):
        Landscape(model, x.T, y.T, nn.MSELoss())
    landscape = Landscape(model, x.T, y.T, MeanSquaredError())
    with pytest.raises(ShapeMismatchError, match="the module must be a 5-4-3 tanh with bias, got a 5-3 linear"):
        landscape.at(nn.Sequential(nn.Linear(5, 3)))
    for ask in (hessian, lambda *a: largest_eigenvalues(*a, 1), lambda *a: count_above(*a, 0.0)):
        with pytest.raises(ConfigError, match=r"landscape must be a Landscape, such as .*, got Sequential"):
            ask(model, x)
    M = [torch.ones(1, 4, 4)]
    with pytest.raises(ConfigError, match=r"landscape must be a Landscape, such as .*, got Sequential"):
        curvatures(model, landscape.at(model).weights, M)
    with pytest.raises(ConfigError, match=r"weights must be Weights, such as .*, got Sequential"):
        curvatures(landscape, model, M)
    for objective in (GradientNorm(), Sharpness(), Curvature()):
        for ask in (objective.value, objective.value_and_gradient):
            with pytest.raises(ConfigError, match=r"point must be a Point, such as .*, got Sequential"):
                ask(model)
