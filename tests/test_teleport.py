"""Teleport moves: right derivatives, kept losses, known maximisers, and the paper's procedure."""

import math

import pytest
import torch

from metatele.errors import ConfigError, NotExactError
from metatele.geometry import GradientNorm, Landscape, Objective, objective
from metatele.perceptron.activations import Identity, LeakyReLU, ReLU, Sigmoid, Softplus, Tanh
from metatele.perceptron.losses import CrossEntropy, FixedGradient, SquaredError
from metatele.perceptron.mlp import MLP
from metatele.symmetry import Approximate, Exact, Pair, Rescaling, exponential, sweep
from metatele.teleport import Ascent, GradientNormAscent, Random, Whitening, in_sequence, transport
from metatele.teleport import Rescaling as Rescale

LEAKY = LeakyReLU(0.1)


def problem(activation=LEAKY, widths=(8, 6, 5, 4), samples=4, biases=True, batch=(), loss=None, seed=0):
    """A landscape and weights, in float64."""
    random = torch.Generator().manual_seed(seed)
    mlp = MLP(widths, activation, biases)
    x = torch.randn(*batch, widths[0], samples, generator=random, dtype=torch.float64)
    y = torch.randn(*batch, widths[-1], samples, generator=random, dtype=torch.float64)
    w = 0.3 * torch.randn(*batch, mlp.num_parameters, generator=random, dtype=torch.float64)
    loss = loss or SquaredError()
    return Landscape(mlp, x, y.argmax(-2) if isinstance(loss, CrossEntropy) else y, loss), w


def flow(landscape, w, action, coordinates, t):
    """``exp(t τ)·w``."""
    pairs = zip(coordinates, landscape.mlp.hidden_widths, strict=True)
    elements = [exponential(t * action.algebra(part, k)) for part, k in pairs]
    moved = sweep(action, landscape.mlp, landscape.mlp.unflatten(w), landscape.inputs, elements)
    return landscape.mlp.flatten(moved)


# --- derivatives along the orbit


@pytest.mark.parametrize("activation", [LeakyReLU(0.1), Tanh(), Softplus(), Sigmoid(), Identity()], ids=str)
@pytest.mark.parametrize("action", [Exact(), Approximate(), Approximate(damping=1e-3), Rescaling()], ids=str)
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("samples", [4, 30])
def test_pullback_is_the_derivative_along_the_orbit(activation, action, biases, samples):
    if isinstance(action, Exact) and samples > 4:
        pytest.skip("no exact action on more samples than inputs")
    if isinstance(action, Rescaling) and not activation.positively_homogeneous:
        pytest.skip("no rescaling of this activation")
    landscape, w = problem(activation, samples=samples, biases=biases)
    random = torch.Generator().manual_seed(1)
    covector = torch.randn(w.shape, generator=random, dtype=torch.float64)
    mlp = landscape.mlp
    q = mlp.unflatten(covector)
    pulled = [
        action.pullback(site, Pair(q.matrices[m], q.matrices[m + 1], q.biases[m]))
        for m, site in enumerate(landscape.at(w).sites(action))
    ]
    direction = [torch.randn(p.shape, generator=random, dtype=torch.float64) for p in pulled]
    expected = sum((p * d).sum() for p, d in zip(pulled, direction, strict=True))
    small = torch.zeros((), dtype=torch.float64, requires_grad=True)
    along = (flow(landscape, w, action, direction, small) * covector).sum()
    (measured,) = torch.autograd.grad(along, small)
    # Relative to the sizes of the two vectors: their product may happen to be small.
    size = sum(float(p.norm() * d.norm()) for p, d in zip(pulled, direction, strict=True))
    assert abs(float(measured - expected)) < 1e-9 * size


@pytest.mark.parametrize("metric", [False, True])
@pytest.mark.parametrize("loss", [SquaredError(), CrossEntropy()], ids=lambda loss: loss.name)
def test_objective_s_gradient_is_that_of_finite_differences(metric, loss):
    landscape, w = problem(Tanh(), loss=loss)
    random = torch.Generator().manual_seed(2)
    A = torch.rand(w.shape, generator=random, dtype=torch.float64) + 0.1 if metric else None
    norm = GradientNorm(A)
    value, gradient = norm.value_and_gradient(landscape.at(w))
    assert float(value) == pytest.approx(float(norm.value(landscape.at(w))), rel=1e-12)
    for _ in range(5):
        v = torch.randn(w.shape, generator=random, dtype=torch.float64)
        h = 1e-5
        measured = (norm.value(landscape.at(w + h * v)) - norm.value(landscape.at(w - h * v))) / (2 * h)
        assert float(measured) == pytest.approx(float((gradient * v).sum()), rel=1e-6)


# --- moves


MOVES = {
    "ascent": GradientNormAscent(action="auto"),
    "normalised": GradientNormAscent(rate="normalised", radius=1e-3),
    "fixed": GradientNormAscent(lr=1e-6),
    "descent": GradientNormAscent(descend=True),
    "cayley": GradientNormAscent(parametrisation="cayley", action="auto"),
    "rescaled": GradientNormAscent(action="rescaling"),
    "approximate": GradientNormAscent(action="approximate", rate="line-search"),
    "whitening": Whitening(),
    "balance": Rescale(),
    "balance-gradients": Rescale(goal="balance-gradients"),
    "raise-gradients": Rescale(goal="raise-gradients", radius=0.5),
    "random": Random(radius=0.1, action="auto", generator=torch.Generator().manual_seed(0)),
}


@pytest.mark.parametrize("name", MOVES)
@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
def test_moves_keep_the_loss_within_their_bound_and_report_it(name, batch):
    landscape, w = problem(batch=batch)
    before = w.clone()
    moved, report, _ = MOVES[name](landscape, w)
    assert torch.equal(w, before)
    assert not bool(report.rolled_back.any())
    drift = (landscape.value(moved) - landscape.value(w)).abs() / landscape.value(w)
    torch.testing.assert_close(report.drift, drift)
    assert float(drift.max()) <= (0.01 if name == "approximate" else 1e-8)
    assert float((moved - w).abs().amax(-1).min()) > 1e-6
    norm = objective("grad-norm")
    torch.testing.assert_close(report.objective_before, norm.value(landscape.at(w)))
    torch.testing.assert_close(report.objective_after, norm.value(landscape.at(moved)))
    if name in ("ascent", "normalised", "fixed", "cayley", "rescaled", "approximate", "raise-gradients"):
        assert bool((report.objective_after > report.objective_before).all())
    if name in ("descent", "balance-gradients"):
        assert bool((report.objective_after < report.objective_before).all())


def test_networks_of_a_batch_do_not_see_each_other():
    landscape, w = problem(batch=(3,))
    for name in ("ascent", "approximate", "whitening", "balance"):
        together = MOVES[name](landscape, w).weights
        for i in range(3):
            alone = Landscape(landscape.mlp, landscape.inputs[i], landscape.targets[i], landscape.loss)
            torch.testing.assert_close(MOVES[name](alone, w[i]).weights, together[i], rtol=1e-7, atol=1e-9)


def test_layers_that_may_not_move_stay():
    landscape, w = problem()
    for move in MOVES.values():
        moved = landscape.mlp.unflatten(move(landscape, w, [False, True]).weights)
        original = landscape.mlp.unflatten(w)
        assert torch.equal(moved.matrices[0], original.matrices[0])
        assert torch.equal(moved.biases[0], original.biases[0])
        assert not torch.equal(moved.matrices[2], original.matrices[2])
    with pytest.raises(ConfigError, match="hidden layer that may be moved"):
        move(landscape, w, [False, False])


def test_a_cap_stops_the_ascent_where_it_is_reached():
    landscape, w = problem(batch=(4,))
    start = GradientNorm().value(landscape.at(w))
    cap = float(start.sort().values[1:3].mean())
    report = GradientNormAscent(1e-4, steps=2000, cap=cap)(landscape, w).report
    above = start >= cap
    assert int(above.sum()) == 2
    assert torch.equal(report.objective_after[above], start[above])
    assert bool((report.objective_after[~above] >= cap).all())
    assert bool((report.objective_after[~above] < 1.2 * cap).all())


def test_steps_past_the_drift_bound_are_taken_back_and_counted():
    landscape, w = problem(samples=40, batch=(3,))
    wild = GradientNormAscent(rate="normalised", radius=0.1, steps=50, action="approximate", max_drift=0.02)
    report = wild(landscape, w).report
    assert float(report.drift.max()) <= 0.02
    assert bool(report.rolled_back.any())
    assert bool((report.objective_after > report.objective_before).all())  # the steps before count
    whitened = Whitening(action="approximate", max_drift=1e-6)(landscape, w)
    assert torch.equal(whitened.weights, w)
    assert bool(whitened.report.rolled_back.all())
    assert float(whitened.report.drift.max()) == 0


def test_several_batches_in_a_row():
    landscape, w = problem()
    other, _ = problem(seed=5)
    end, reports = in_sequence(MOVES["ascent"], [landscape, other], w)
    move = GradientNormAscent(action="approximate")  # neither batch is all the data
    middle = move(landscape, w).weights
    assert torch.equal(end, move(other, middle).weights)
    assert torch.equal(
        in_sequence(MOVES["ascent"], [landscape], w)[0], GradientNormAscent(action="exact")(landscape, w).weights
    )
    assert float(reports[1].loss_before) == pytest.approx(float(other.value(middle)))


def test_settings_that_cannot_be_are_one_clear_error():
    landscape, w = problem(ReLU())
    with pytest.raises(NotExactError, match="relu"):
        GradientNormAscent(action="exact")(landscape, w)
    with pytest.raises(NotExactError, match="positively homogeneous"):
        Rescale()(problem(Tanh())[0], w)
    for build, words in (
        (lambda: GradientNormAscent(-1.0), "lr must be positive"),
        (lambda: GradientNormAscent(steps=0), "steps"),
        (lambda: GradientNormAscent(rate="best"), "rate must be one of"),
        (lambda: GradientNormAscent(action="magic"), "action must be one of"),
        (lambda: GradientNormAscent(max_drift=0), "max_drift must be positive"),
        (lambda: GradientNormAscent(parametrisation="log"), "parametrisation must be one of"),
        (lambda: Whitening(damping=0), "damping"),
        (lambda: Whitening(mode="stay"), "mode"),
        (lambda: Whitening(mode="conjugate")(landscape, w), "TeleportOptimizer"),
        (lambda: Rescale(goal="win"), "goal must be one of"),
        (lambda: Random(radius=math.inf), "radius"),
        (lambda: objective("speed"), "objective must be one of"),
    ):
        with pytest.raises(ConfigError, match=words):
            build()


# --- known answers


def test_ascent_ends_where_the_gradient_norm_is_stationary():
    """With a parametrised circle as level set: one hidden unit pair under rescaling has ``a/s² + b s²``."""
    mlp = MLP((3, 1, 2), Identity())
    random = torch.Generator().manual_seed(0)
    x, y = torch.randn(3, 5, generator=random).double(), torch.randn(2, 5, generator=random).double()
    landscape = Landscape(mlp, x, y, SquaredError())
    w = torch.randn(5, generator=random).double()
    closed = Rescale(goal="balance-gradients")(landscape, w)
    found = GradientNormAscent(action="rescaling", descend=True, steps=200)(landscape, w)
    torch.testing.assert_close(found.report.objective_after, closed.report.objective_after, rtol=1e-10, atol=0)
    torch.testing.assert_close(found.weights, closed.weights, rtol=1e-4, atol=1e-6)
    gradient = mlp.unflatten(landscape.at(closed.weights).gradient).matrices
    torch.testing.assert_close(gradient[0].norm(), gradient[1].norm(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("goal", ["balance-weights", "balance-gradients"])
def test_balanced_layers_agree_unit_by_unit_at_any_depth(goal):
    landscape, w = problem(widths=(8, 6, 5, 7, 4), samples=9)
    moved = Rescale(goal=goal)(landscape, w).weights
    vector = moved if goal == "balance-weights" else landscape.at(moved).gradient
    parts = landscape.mlp.unflatten(vector)
    for m in range(3):
        incoming = parts.matrices[m].square().sum(-1) + parts.biases[m].square()
        torch.testing.assert_close(incoming, parts.matrices[m + 1].square().sum(-2), rtol=1e-4, atol=0)


def test_raised_gradients_are_the_best_corner_for_one_layer():
    landscape, w = problem(widths=(5, 3, 4), biases=False)
    report = Rescale(goal="raise-gradients", radius=0.7)(landscape, w).report
    best = 0.0
    for corner in torch.cartesian_prod(*[torch.tensor([-0.7, 0.7]).double()] * 3):
        moved = flow(landscape, w, Rescaling(), [corner], 1.0)
        best = max(best, float(GradientNorm().value(landscape.at(moved))))
    assert float(report.objective_after) == pytest.approx(best, rel=1e-10)


def test_whitening_solves_the_paper_s_task_in_a_few_steps_on_the_outgoing_weights():
    """Measured once: 9.6, 0.51, 2e-3 after 1, 2 and 3 steps, and below 1e-11 after 5."""
    random = torch.Generator().manual_seed(0)
    mlp = MLP((20, 20, 20), LeakyReLU(0.1))
    x, y = torch.rand(2, 20, 20, generator=random, dtype=torch.float64)
    w = torch.rand(800, generator=random, dtype=torch.float64)
    landscape = Landscape(mlp, x, y, SquaredError())
    losses = []
    for _ in range(5):
        w = Whitening()(landscape, w).weights
        gradient = landscape.at(w).gradient.clone()
        gradient[:400] = 0
        w = w - gradient
        losses.append(float(landscape.value(w)))
    assert losses[0] < 30
    assert losses[2] < 0.1
    assert losses[4] < 1e-6


# --- the paper's procedure, as one would first write it


def naive_ascent(landscape, w, lr, steps):
    """Zhao et al. 2024, Section 5.1: from T = 0 at each step, autodiff through ``I + T`` with a pseudo-inverse."""
    mlp = landscape.mlp
    for _ in range(steps):
        Ts = [torch.zeros(k, k, dtype=w.dtype, requires_grad=True) for k in mlp.hidden_widths]
        matrices = [m.detach() for m in mlp.unflatten(w).matrices]
        h = landscape.inputs
        for m, T in enumerate(Ts):
            eye = torch.eye(len(T), dtype=w.dtype)
            new_V = (eye + T) @ matrices[m]
            before = mlp.activations[m](matrices[m] @ h)
            after = mlp.activations[m](new_V @ h)
            U = matrices[m + 1]
            matrices[m], matrices[m + 1] = new_V, U + U @ (before - after) @ torch.linalg.pinv(after)
            h = after
        flat = torch.cat([m.flatten() for m in matrices])
        loss = landscape.value(flat)
        (gradient,) = torch.autograd.grad(loss, flat, create_graph=True)
        directions = torch.autograd.grad(gradient.square().sum(), Ts)
        matrices = [m.detach() for m in mlp.unflatten(w).matrices]
        h = landscape.inputs
        for m, direction in enumerate(directions):
            new_V = matrices[m] + lr * direction @ matrices[m]
            before, after = (mlp.activations[m](V @ h) for V in (matrices[m], new_V))
            U = matrices[m + 1]
            matrices[m], matrices[m + 1] = new_V, U + U @ (before - after) @ torch.linalg.pinv(after)
            h = after
        w = torch.cat([m.flatten() for m in matrices])
    return w


@pytest.mark.parametrize("samples", [4, 30])
@pytest.mark.parametrize("loss", [SquaredError(), CrossEntropy()], ids=lambda loss: loss.name)
def test_ascent_is_the_paper_s_procedure(samples, loss):
    landscape, w = problem(Tanh(), samples=samples, biases=False, loss=loss)
    first = Ascent(action="approximate").direction(
        Approximate(), landscape.at(w), GradientNorm().value_and_derivative(landscape.at(w))[1], [True, True]
    )
    lr = 0.03 / float(torch.cat(first).norm())
    move = GradientNormAscent(lr, steps=4, action="approximate", parametrisation="first-order", max_drift=math.inf)
    expected = naive_ascent(landscape, w, lr, 4)
    torch.testing.assert_close(move(landscape, w).weights, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("action", [Exact(), Approximate(), Rescaling()], ids=lambda a: a.name)
@pytest.mark.parametrize("batch", [(), (3,)])
def test_a_teleport_hands_on_the_passes_of_the_point_it_leads_to(action, batch):
    landscape, w = problem(batch=batch, widths=(8, 6, 5, 5, 4))
    point = landscape.at(w)
    for step in range(3):
        random = torch.Generator().manual_seed(step)
        elements = [
            exponential(torch.diag_embed(0.1 * torch.randn(*batch, k, generator=random, dtype=torch.float64)))
            for k in landscape.mlp.hidden_widths
        ]
        elements[1] = None
        point = point.teleported(action, elements)
    fresh = landscape.at(point.flat)
    for carried, anew in ((point.forward.pre, fresh.forward.pre), (point.forward.hidden, fresh.forward.hidden)):
        for a, b in zip(carried, anew, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(point.gradient, fresh.gradient, rtol=1e-10, atol=1e-12)
    for a, b in zip(point.sites(action), fresh.sites(action), strict=True):
        assert all(
            torch.equal(x, y) for x, y in zip(a.pair, (b.pair.V, b.pair.U, b.pair.bias), strict=True) if x is not None
        )


@pytest.mark.parametrize("samples", [5, 7])
def test_auto_takes_the_exact_action_by_rank(samples):
    landscape, w = problem(samples=samples)
    twice = torch.cat([landscape.inputs, landscape.inputs[:, :1]], -1)
    doubled = Landscape(
        landscape.mlp, twice, torch.cat([landscape.targets, landscape.targets[:, :1]], -1), SquaredError()
    )
    move = GradientNormAscent(action="auto")
    assert move.chosen_action(landscape).name == ("exact" if samples <= 8 else "approximate")
    assert move.chosen_action(doubled).name == "approximate"
    report = GradientNormAscent(steps=5, action="auto")(doubled, w).report
    assert float(report.objective_after) > 1.05 * float(report.objective_before)
    assert float(report.drift) < 0.01


def test_steps_that_pass_the_bound_are_not_taken_back_together():
    """The sum of a step's rounding and of the whole move's must not differ: every step is judged as the whole is."""
    for seed in range(20):
        random = torch.Generator().manual_seed(seed)
        mlp = MLP((64, 32, 10), LeakyReLU(0.01), True)
        x, y = torch.randn(64, 200, generator=random), torch.randint(10, (200,), generator=random)
        w = (torch.rand(mlp.num_parameters, generator=random) - 0.5) / 4
        for stored in (None, torch.bfloat16):
            scene = Landscape(mlp, x, y, CrossEntropy(), stored)
            result = GradientNormAscent()(scene, scene.at(w).flat)
            assert not bool(result.report.rolled_back)
            assert float(result.report.drift) <= 0.01
            if stored is None:
                assert float(result.report.objective_after) > 1.5 * float(result.report.objective_before)
            else:
                assert torch.equal(result.weights, result.weights.bfloat16().float())


def test_whitening_leaves_networks_alone_that_are_not_finite():
    landscape, w = problem(batch=(3,))
    broken = w.clone()
    broken[1] *= 1e200
    result = Whitening()(landscape, broken)
    assert torch.equal(result.weights[1], broken[1])
    assert result.report.rolled_back.tolist() == [False, True, False]
    torch.testing.assert_close(result.weights[::2], Whitening()(landscape, w).weights[::2])


# --- what a teleport keeps


def test_the_output_gradient_stands_for_the_loss_on_an_orbit():
    landscape, w = problem(loss=CrossEntropy())
    outputs = landscape.outputs(w)
    known = Landscape(
        landscape.mlp, landscape.inputs, landscape.loss.gradient(outputs, landscape.targets), FixedGradient()
    )
    full, partial = (GradientNormAscent()(scene, w) for scene in (landscape, known))
    torch.testing.assert_close(partial.weights, full.weights, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(partial.report.objective_after, full.report.objective_after)


@pytest.mark.parametrize("name", ["ascent", "approximate", "whitening", "balance", "random"])
def test_transport_is_the_differential_of_the_teleport(name):
    landscape, w = problem(Softplus() if name == "approximate" else LeakyReLU(0.1))
    path = MOVES[name](landscape, w).path
    v = torch.randn(w.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def replayed(point):
        for leg in path:
            point = leg.apply(landscape.mlp, point)
        return point

    carried = transport(landscape.mlp, path, w, v)
    h = 1e-7
    measured = (replayed(w + h * v) - replayed(w - h * v)) / (2 * h)
    assert float((carried - measured).norm() / measured.norm()) < 1e-5
    if name != "approximate":  # a motion along which the outputs change keeps changing them alike
        outputs = [landscape.outputs(p + h * d) - landscape.outputs(p) for p, d in ((w, v), (replayed(w), carried))]
        assert float((outputs[1] - outputs[0]).norm() / outputs[0].norm()) < 1e-3


def test_any_objective_can_be_raised():
    class Distance(Objective):
        """How far the weights are from the origin."""

        name = "distance"

        def value(self, point):
            return point.flat.square().sum(-1)

        def value_and_gradient(self, point):
            return self.value(point), 2 * point.flat

    landscape, w = problem()
    report = Ascent(objective=Distance(), steps=100, descend=True, action="rescaling", radius=0.5)(landscape, w).report
    balanced = Rescale()(landscape, w).weights  # the least norm on the orbit of rescalings
    assert float(report.objective_after) == pytest.approx(float(balanced.square().sum()), rel=1e-5)
