"""Commutators, the checker of one teleport, Newton's direction and Theorem 3.1, as statements with numbers."""

import json
import math

import pytest
import torch

from metatele.errors import ConfigError, ShapeMismatchError
from metatele.experiments import theory
from metatele.experiments.__main__ import main
from metatele.experiments.theory import measurements
from metatele.geometry.fields import LocalLoss, derivative
from metatele.geometry.optimality import (
    commutator,
    gradient_and_hessian,
    level_set_fields,
    newton_angle,
    one_teleport_is_enough,
    sgd_bound,
    slope,
    teleport_along,
    third_order_residual,
)
from metatele.tasks.functions import function
from metatele.tasks.quadratics import Shifted, least_squares


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def antisymmetric(size, seed=0):
    M = draw(size, size, seed=seed)
    return M - M.mT


def random_loss(size, seed):
    """Smooth, neither convex nor symmetric."""
    A, B = draw(5, size, seed=seed), draw(5, seed=seed + 1)
    return lambda w: (B * torch.sin(A @ w)).sum() + torch.logsumexp(A @ w, 0) + 0.1 * w.square().sum()


def quadratic(size, seed=0):
    A = draw(size, size, seed=seed)
    H = A @ A.mT + 0.1 * torch.eye(size).double()
    return H, lambda w: w @ H @ w / 2


def rotations(H):
    """All infinitesimal rotations of H^{1/2}w, as matrices on w."""
    values, vectors = torch.linalg.eigh(H)
    root = vectors @ torch.diag(values.sqrt()) @ vectors.mT
    size, found = len(H), []
    for i in range(size):
        for j in range(i):
            M = torch.zeros_like(H)
            M[i, j], M[j, i] = 1, -1
            found.append(torch.linalg.solve(root, M @ root))
    return torch.stack(found)


def directional(f, w, a):
    """``a·∇f`` by autodiff."""
    w = w.clone().requires_grad_()
    return torch.autograd.grad(f(w), w)[0] @ a


def squared_norm(loss):
    def f(w):
        return torch.autograd.grad(loss(w), w, create_graph=True)[0].square().sum()

    return f


@pytest.mark.parametrize("seed", range(5))
def test_bracket_of_a_symmetry_is_minus_its_derivative_of_the_squared_norm(seed):
    loss, w = random_loss(4, seed), draw(3, 4, seed=seed + 10)
    for field in level_set_fields(loss, 4):
        expected = torch.stack([-directional(squared_norm(loss), p, field(p)) for p in w])
        torch.testing.assert_close(commutator(loss, w, field), expected, rtol=1e-10, atol=1e-12)
        assert float(slope(loss, w, field).max()) < 1e-12


@pytest.mark.parametrize("seed", range(3))
def test_bracket_of_any_field_is_the_commutator_of_two_derivations(seed):
    loss, w, M = random_loss(3, seed), draw(3, seed=seed + 10), draw(3, 3, seed=seed + 20)
    g = gradient_and_hessian(loss, w)[0]

    def along_field(w):  # AL
        return torch.autograd.grad(loss(w), w, create_graph=True)[0] @ (M @ w)

    expected = -directional(squared_norm(loss), w, M @ w) + directional(along_field, w, g)  # ARL - RAL
    torch.testing.assert_close(commutator(loss, w, M), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_third_order_condition_is_the_derivative_along_the_flow_at_optimal_points(seed):
    loss = random_loss(3, seed)
    w = teleport_along(loss, draw(3, seed=seed + 30), level_set_fields(loss, 3))
    g, H = gradient_and_hessian(loss, w)
    torch.testing.assert_close(H @ g, (g @ H @ g) / (g @ g) * g, rtol=1e-8, atol=1e-8)
    third = torch.stack(
        [torch.autograd.functional.hessian(lambda u, i=i: gradient_of(loss, u)[i], w) for i in range(3)]
    )
    with torch.enable_grad():
        here = LocalLoss(loss, w)
        for k in range(3):
            M = antisymmetric(3, seed=40 + k)

            def field(u, M=M):
                return M @ gradient_of(loss, u)

            flow = here.along_flow(here.bracket(field))  # R[A, R]L
            # Mʲ_α ∂ₖL ∂_αL ∂³ₖᵢⱼL ∂ᵢL of Eq. 40, in the paper's indices
            contracted = torch.einsum("ja,k,a,kij,i->", M, g, g, third, g)
            torch.testing.assert_close(flow.detach(), 2 * contracted, rtol=1e-6, atol=1e-7)
    assert float(third_order_residual(loss, w)) > 1e-3


def gradient_of(loss, w):
    return (
        torch.autograd.grad(loss(w), w, create_graph=True)[0] if w.requires_grad else gradient_and_hessian(loss, w)[0]
    )


def test_third_order_residual_is_zero_exactly_if_all_antisymmetric_contractions_are():
    w = draw(5, 3)
    assert float(third_order_residual(quadratic(3)[1], w).max()) == 0
    # Prop. C.3: the third derivatives of a function of one direction are multiples of ∇L ∇L ∇L.
    ridge = third_order_residual(lambda u: torch.exp(u @ draw(3, seed=7)), w)
    assert float(ridge.max()) < 1e-12
    assert float(third_order_residual(lambda u: u.pow(4).sum() + u.prod(), w).min()) > 1e-3


@pytest.mark.parametrize("size", [2, 4])
def test_one_teleport_is_enough_on_quadratics_and_on_monotone_functions_of_them(size):
    H, loss = quadratic(size, seed=3)
    w, fields = draw(3, size, seed=4), rotations(H)
    for f in (loss, lambda u: torch.log1p(loss(u)), lambda u: loss(u) ** 2):
        report = one_teleport_is_enough(f, w, fields)
        assert report.enough
        assert bool((report.commutator.abs().amax(-1) > 1e-4).all())  # it was needed
        assert float(report.commutator_after.abs().max()) < 1e-9
        assert float(report.derivatives.abs().max()) < 1e-8
        assert float(report.slope.max()) < 1e-11
        torch.testing.assert_close(
            torch.stack([f(p) for p in report.points]), torch.stack([f(p) for p in w]), rtol=1e-9, atol=0
        )
    top = torch.linalg.eigh(H).eigenvectors[:, -1]
    direction = report.points / report.points.norm(dim=-1, keepdim=True)
    torch.testing.assert_close((direction @ top).abs(), torch.ones(3).double(), rtol=1e-10, atol=0)


@pytest.mark.parametrize(("name", "enough"), [("ellipse", True), ("booth", True), ("rosenbrock", False)])
def test_checker_on_the_functions_of_the_plane(name, enough):
    f = function(name)
    w = torch.tensor(f.start).double()
    report = one_teleport_is_enough(f.value, w, [measurements.rotation(f)])
    assert report.enough is enough
    assert bool(report.optimal)
    assert bool(report.stays_optimal) is enough
    best = f.teleport(w, steps=200)
    torch.testing.assert_close(f.gradient_norm(report.points), f.gradient_norm(best), rtol=1e-7, atol=0)


def test_numbers_of_the_report_have_no_scale():
    f = function("rosenbrock")
    w, field = torch.tensor([1.3, 0.4]).double(), measurements.rotation(f)
    one = one_teleport_is_enough(f.value, w, [field])
    other = one_teleport_is_enough(lambda u: 1e6 * f.value(1e3 * u), w / 1e3, [lambda u: 7e-3 * field(1e3 * u)])
    for key in ("commutator", "derivatives", "third_order"):
        torch.testing.assert_close(getattr(one, key), getattr(other, key), rtol=1e-5, atol=1e-12)


def test_first_order_condition_is_met_where_the_flow_does_not_stay_optimal():
    def loss(w):
        return w[0] / (1 - 8 * w[0] ** 2 * w[1]).sqrt()

    # Its gradient lines are y = x⁴ + c.
    w = torch.tensor([[0.3, -1.0], [-0.5, -0.2]]).double()
    g = gradient_and_hessian(loss, w)[0]
    torch.testing.assert_close(g[:, 1] / g[:, 0], 4 * w[:, 0] ** 3)
    start = torch.tensor([[0.0, -1.0], [0.0, -0.1], [0.0, 3.0]]).double()  # all its optimal points have x = 0
    fields = level_set_fields(loss, 2)
    assert one_teleport_is_enough(loss, start, fields, orders=1).enough
    assert float(third_order_residual(loss, start).max()) < 1e-12
    report = one_teleport_is_enough(loss, start, fields)
    assert not report.enough
    assert bool(report.optimal.all())
    end = measurements.flow(loss, start[0])[-1:]
    torch.testing.assert_close(end[:, 1], end[:, 0] ** 4 - 1, rtol=1e-10, atol=0)
    assert abs(float(one_teleport_is_enough(loss, end, fields, move=False).commutator)) > 0.1


def test_points_are_judged_as_they_are_if_not_moved():
    H, loss = quadratic(2, seed=5)
    w = draw(2, seed=6)
    report = one_teleport_is_enough(loss, w, rotations(H), move=False)
    assert not report.enough
    assert not bool(report.optimal)
    assert torch.equal(report.points, w)
    assert one_teleport_is_enough(loss, torch.linalg.eigh(H).eigenvectors[:, 0], rotations(H), move=False).enough


def test_a_field_that_is_no_symmetry_is_named():
    ellipse, turn = function("ellipse").value, torch.tensor([[0.0, -1.0], [1.0, 0.0]]).double()
    own = measurements.rotation(function("ellipse"))
    with pytest.raises(ConfigError, match=r"fields\[1\] must keep the loss, but at point 0 its relative slope is"):
        one_teleport_is_enough(ellipse, draw(2), [own, turn])
    # On an axis the rotation of w is tangent to the level set, yet no symmetry.
    axis = torch.tensor([2.0, 0.0]).double()
    assert float(directional(ellipse, axis, turn @ axis)) == 0
    with pytest.raises(ConfigError, match="must keep the loss"):
        one_teleport_is_enough(ellipse, axis, [turn])


def test_an_orbit_without_a_largest_gradient_is_an_error():
    scale = torch.diag(torch.tensor([1.0, -1.0])).double()
    with pytest.raises(ConfigError, match="found no critical point; there may be no largest gradient"):
        one_teleport_is_enough(lambda w: w[0] * w[1], torch.tensor([0.5, 2.0]).double(), [scale])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"fields": []}, ConfigError, "fields must hold at least one field, got none"),
        ({"fields": torch.zeros(0, 2, 2).double()}, ConfigError, "at least one field"),
        ({"fields": torch.zeros(2, 2).double()}, ShapeMismatchError, r"fields must be matrices \[m, 2, 2\]"),
        ({"fields": [torch.zeros(3, 3).double()]}, ShapeMismatchError, r"fields\[0\] must be a matrix \[2, 2\], got"),
        ({"fields": [torch.full((2, 2), math.nan).double()]}, ConfigError, "must be a finite matrix"),
        ({"fields": [torch.zeros(2, 2)]}, ConfigError, "torch.float64, got torch.float32"),
        ({"fields": ["rotation"]}, ShapeMismatchError, "must be a matrix .* or a function, got str"),
        ({"fields": [lambda w: w[:1]]}, ShapeMismatchError, r"must return a vector \[2\] .* got \[1\]"),
        ({"fields": [lambda w: w / 0]}, ConfigError, "a field must be finite"),
        ({"fields": None}, ShapeMismatchError, "got NoneType"),
        ({"w": torch.ones(2)}, ConfigError, "w must be of torch.float64, got torch.float32"),
        ({"w": torch.ones(()).double()}, ShapeMismatchError, "w must be one or more points"),
        ({"w": torch.ones(0, 2).double()}, ShapeMismatchError, "w must be one or more points"),
        ({"w": torch.tensor([math.inf, 1.0]).double()}, ConfigError, "w must be finite"),
        (
            {"w": torch.zeros(2).double()},
            ConfigError,
            "critical point of the loss, but its gradient vanishes at point 0",
        ),
        ({"loss": lambda w: w}, ShapeMismatchError, r"loss must return a tensor without dimensions, got \[2\]"),
        ({"loss": lambda w: 1.0}, ShapeMismatchError, "got float"),
        ({"loss": lambda w: w.detach().sum()}, ConfigError, "loss must be a differentiable function"),
        ({"loss": lambda w: (w - 2).log().sum()}, ConfigError, "the loss and its gradient must be finite"),
        ({"orders": 0}, ConfigError, "orders must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_used_gets_a_sentence(change, error, message):
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]]).double()
    given = {"loss": lambda w: w.square().sum(), "w": torch.ones(2).double(), "fields": [turn], **change}
    with pytest.raises(error, match=message):
        one_teleport_is_enough(given.pop("loss"), given.pop("w"), given.pop("fields"), **given)


def test_gradient_mode_of_the_caller_does_not_matter():
    H, loss = quadratic(2)
    w = draw(2)
    with torch.no_grad():
        inside = one_teleport_is_enough(loss, w, rotations(H)), newton_angle(loss, w), third_order_residual(loss, w)
    assert inside[0].enough
    assert not inside[0].commutator.requires_grad
    torch.testing.assert_close(inside[1], newton_angle(loss, w))


def test_newton_angle_is_the_arc_cosine_and_small_where_the_gradient_is_an_eigenvector():
    H, loss = quadratic(4, seed=8)
    w = draw(6, 4, seed=9)
    g = w @ H
    cosine = (g * w).sum(-1) / g.norm(dim=-1) / w.norm(dim=-1)
    torch.testing.assert_close(newton_angle(loss, w), cosine.acos(), rtol=1e-9, atol=0)
    assert float(newton_angle(loss, torch.linalg.eigh(H).eigenvectors.mT).max()) < 1e-13
    with pytest.raises(ConfigError, match="Hessian of the loss is singular"):
        newton_angle(lambda w: w[0] ** 2 + w[1], torch.ones(2).double())


def test_derivative_of_what_does_not_depend_on_the_weights_is_zero():
    w = draw(3).requires_grad_()
    assert torch.equal(derivative(torch.ones(()), w), torch.zeros(3).double())


@pytest.mark.parametrize(("gap", "steps"), [(-1.0, 10), (math.nan, 10), (1.0, 1)])
def test_bound_refuses_what_the_theorem_does_not_cover(gap, steps):
    with pytest.raises(ConfigError, match="must be"):
        sgd_bound(1.0, gap, 0.0, steps)


def test_sampled_gradients_are_unbiased_and_smooth():
    x, y = draw(30, 3, seed=11), draw(30, seed=12)
    H = x.mT @ x / 30
    for problem in (least_squares(x, y), Shifted((H + H.mT) / 2, draw(3, seed=13), 0.7)):
        w = draw(3, seed=14)
        samples = problem.sampled_gradient(w.expand(100_000, -1), torch.Generator().manual_seed(0))
        exact = problem.hessian @ (w - problem.optimum)
        error = 5 * samples.std(0) / 100_000**0.5
        assert bool(((samples.mean(0) - exact).abs() < error).all())
        # Lemma A.1: E‖∇L(w, ξ)‖² ≤ 2β(L(w) - L*) + 2βσ²
        right = 2 * problem.smoothness * (float(problem.excess(w)) + problem.noise)
        assert float(samples.square().sum(-1).mean()) <= right


def test_teleport_of_a_quadratic_is_the_ascent_along_its_rotations():
    problem = least_squares(draw(20, 3, seed=15), draw(20, seed=16))
    w = draw(4, 3, seed=17)
    best = problem.teleport(w)
    torch.testing.assert_close(problem.excess(best), problem.excess(w))
    largest = problem.top()[0]
    torch.testing.assert_close(problem.gradient_norm(best), 2 * largest * problem.excess(w))
    fields = level_set_fields(problem.excess, 3)
    found = teleport_along(problem.excess, w, fields)
    torch.testing.assert_close(problem.gradient_norm(found), problem.gradient_norm(best), rtol=1e-9, atol=0)


def test_sgd_with_teleports_has_the_mean_that_its_recursion_says_and_stays_below_the_bound():
    problem = Shifted(torch.diag(torch.tensor([0.1, 0.4, 1.0]).double()), torch.zeros(3).double(), 0.5)
    start, T = torch.tensor([2.0, 1.0, 0.5]).double(), 30
    runs = measurements.descend(problem, start, T, 4000, teleport=True)
    gap = float(problem.excess(start))
    expected = 2 * torch.tensor(problem.expected_excess(gap, 1 / (T - 1) ** 0.5, T), dtype=torch.float64)
    error = runs["orbit"].std(1) / 4000**0.5
    assert bool(((runs["orbit"].mean(1) - expected).abs() <= 5 * error + 1e-12).all())
    torch.testing.assert_close(runs["here"], runs["orbit"])  # each gradient is the longest of its orbit
    assert float(expected.min()) <= sgd_bound(1.0, gap, problem.noise, T)


def test_quadratics_that_are_none_are_refused():
    with pytest.raises(ConfigError, match="symmetric and positive definite"):
        Shifted(-torch.eye(2).double(), torch.zeros(2).double(), 1.0)
    with pytest.raises(ShapeMismatchError, match=r"got \[2, 2\] and \[3\]"):
        Shifted(torch.eye(2).double(), torch.zeros(3).double(), 1.0)
    with pytest.raises(ConfigError, match="linearly independent columns"):
        least_squares(torch.ones(5, 2).double(), torch.ones(5).double())
    with pytest.raises(ShapeMismatchError, match=r"got \[5, 2\] and \[4\]"):
        least_squares(torch.ones(5, 2).double(), torch.ones(4).double())


def test_linear_term_of_proposition_3_2_needs_twice_what_is_printed():
    # ½‖w‖²: μ = L = 1, G = 0, λ₀ = 1, every point is optimal; half a step leaves half the distance.
    w = torch.tensor([3.0, 4.0]).double()
    left = float((w - 0.5 * w).norm())
    assert left == 2.5
    assert left > (1 - 0.5) * 1 / 2 * 5
    assert left <= (1 - 0.5) * 1 * 5


def test_experiment_leaves_results_a_table_and_a_figure(tmp_path):
    extent = theory.Extent(ellipsoids=((2, 1.5), (3, 10.0)), levels=(1e-3, 1e-4), starts=1, flow_points=8)
    (tmp_path / "results.json").write_text(json.dumps(theory.run(40, 30, extent)))
    main(["theory", "--redraw", "--out", str(tmp_path)])
    doc = json.loads((tmp_path / "results.json").read_text())
    parts = {part: [arm for arm in doc["arms"] if arm["part"] == part] for part in ("theorem", "newton", "flow")}
    assert all(arm["teleport"]["mean"] < arm["bound"] for arm in parts["theorem"])
    assert all(arm["angle_after"] < 1e-9 < arm["angle_before"] for arm in parts["newton"])
    assert all(step["distance"] <= step["bound"] + 1e-12 for arm in parts["newton"] for step in arm["steps"])
    along = {arm["name"]: max(arm["along"]) for arm in parts["flow"]}
    assert max(along["ellipse"], along["booth"], along["log(1 + ellipse)"]) < 1e-10
    assert min(along["rosenbrock"], along["cosh (strictly convex)"], along["x/√(1 - 8x²y)"]) > 1e-2
    assert (tmp_path / "theory.png").read_bytes()[:4] == b"\x89PNG"
    assert "Running time" in (tmp_path / "table.md").read_text()
    with pytest.raises(ConfigError, match="--seeds must be at least 20"):
        main(["theory", "--seeds", "5", "--out", str(tmp_path)])


@pytest.mark.parametrize("size", [2, 3])
def test_one_teleport_is_enough_for_the_root_of_a_quadratic(size):
    """Its gradient keeps its length along the optimal line: nothing there gives the derivatives a scale."""
    random = torch.Generator().manual_seed(11)
    for _ in range(10):
        A = torch.randn(size, size, generator=random, dtype=torch.float64)
        A = A @ A.T + torch.eye(size)
        w = torch.randn(size, generator=random, dtype=torch.float64)

        def loss(w, A=A):
            return (w @ A @ w).sqrt()

        assert one_teleport_is_enough(loss, w, level_set_fields(loss, size)).enough
