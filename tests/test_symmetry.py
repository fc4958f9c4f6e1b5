"""Group elements and actions: axioms, invariance, order of approximation, gradients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metatele.errors import ConfigError, NotExactError, ShapeMismatchError, SingularInputError
from metatele.perceptron.activations import Identity, LeakyReLU, ReLU, Sigmoid, SiLU, Softplus, Tanh
from metatele.perceptron.mlp import MLP
from metatele.symmetry import (
    PARAMETRISATIONS,
    Approximate,
    Exact,
    Pair,
    Rescaling,
    Site,
    action,
    cayley,
    compose,
    damped_right_solve,
    drift,
    exponential,
    first_order,
    from_matrix,
    identity,
    pseudo_inverse,
    random_algebra,
    sweep,
)

D = torch.float64
EXACT_INVERSE = ("exp", "cayley", "direct")


def algebra(*shape, norm=0.3, seed=0):
    return random_algebra(shape, norm, torch.Generator().manual_seed(seed), D)


def pair_and_inputs(batch=(), d=6, k=4, o=3, n=5, bias=True, seed=0):
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*batch, *shape, generator=rng, dtype=D)

    return Pair(draw(k, d), draw(o, k), draw(k) if bias else None), draw(d, n)


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# --- group elements


@pytest.mark.parametrize("name", EXACT_INVERSE)
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_inverse_is_the_inverse(name, batch):
    g = PARAMETRISATIONS[name](algebra(*batch, 5, 5))
    close(g.matrix @ g.inverse, torch.eye(5, dtype=D).expand(*batch, 5, 5), 1e-12)


def test_first_order_inverse_misses_by_the_square_of_T():
    T = algebra(5, 5, norm=0.1)
    g = first_order(T)
    close(g.matrix @ g.inverse, torch.eye(5, dtype=D) - T @ T, 1e-14)


def test_cayley_agrees_with_exp_to_third_order():
    def error(scale):
        T = scale * algebra(4, 4, norm=1.0)
        return float((cayley(T).matrix - exponential(T).matrix).norm())

    assert 7 < error(0.02) / error(0.01) < 9


@pytest.mark.parametrize("dtype", [torch.float32, D])
@pytest.mark.parametrize("norm", [0.01, 0.1, 0.5])
def test_short_exponential_is_the_exponential_to_rounding(norm, dtype):
    T = algebra(7, 20, 20, norm=norm)
    short, full = exponential(T.to(dtype), max_norm=norm), exponential(T)
    for a, b in zip(short, full, strict=True):
        assert float((a.double() - b).norm(dim=(-2, -1)).max()) < 20 * torch.finfo(dtype).eps


def test_composition_is_associative_and_has_an_identity():
    a, b, c = (exponential(algebra(4, 4, seed=s)) for s in range(3))
    for left, right in ((compose(compose(a, b), c), compose(a, compose(b, c))), (compose(a, identity(4, dtype=D)), a)):
        close(left.matrix, right.matrix, 1e-13)
        close(left.inverse, right.inverse, 1e-13)


@pytest.mark.parametrize("name", list(PARAMETRISATIONS))
def test_zero_is_the_identity(name):
    g = PARAMETRISATIONS[name](torch.zeros(3, 3, dtype=D))
    assert torch.equal(g.matrix, torch.eye(3, dtype=D))
    assert torch.equal(g.inverse, torch.eye(3, dtype=D))


@pytest.mark.parametrize("name", list(PARAMETRISATIONS))
def test_parametrisations_pass_gradcheck(name):
    T = algebra(2, 3, 3).requires_grad_()
    assert torch.autograd.gradcheck(PARAMETRISATIONS[name], T)
    assert torch.autograd.gradcheck(lambda T: exponential(T, max_norm=0.5), T)


def test_bad_elements_are_refused():
    with pytest.raises(ShapeMismatchError, match="square"):
        first_order(torch.zeros(2, 3))
    with pytest.raises(ConfigError, match="max_norm"):
        exponential(torch.zeros(2, 2), max_norm=3.0)


# --- least squares


@pytest.mark.parametrize(("d", "n"), [(6, 4), (4, 6), (5, 5)])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_pseudo_inverse_is_that_of_an_svd(d, n, batch):
    H = torch.randn(*batch, d, n, dtype=D)
    close(pseudo_inverse(H), torch.linalg.pinv(H))
    close(pseudo_inverse(H.requires_grad_()).detach(), torch.linalg.pinv(H.detach()))


def test_damped_solve_minimises_its_objective():
    B, A = torch.randn(2, 3, 7, dtype=D), torch.randn(2, 4, 7, dtype=D)
    X = damped_right_solve(B, A, 0.1).requires_grad_()
    ridge = 0.1 * A.square().sum((-2, -1), keepdim=True)
    objective = (X @ A - B).square().sum() + (ridge * X.square()).sum()
    assert float(torch.autograd.grad(objective, X)[0].abs().max()) < 1e-12


def test_damped_solve_takes_any_rank_and_has_finite_gradients():
    A = torch.zeros(4, 7, dtype=D, requires_grad=True)
    X = damped_right_solve(torch.ones(3, 7, dtype=D), A, 1e-12)
    X.sum().backward()
    assert bool(torch.isfinite(X).all())
    assert bool(torch.isfinite(A.grad).all())


def test_solvers_pass_gradcheck():
    H, B, A = (torch.randn(*s, dtype=D, requires_grad=True) for s in ((2, 5, 3), (2, 2, 6), (2, 4, 6)))
    assert torch.autograd.gradcheck(pseudo_inverse, H)
    assert torch.autograd.gradcheck(lambda B, A: damped_right_solve(B, A, 0.01), (B, A))


def test_singular_inputs_raise_where_exact_and_are_damped_where_approximate():
    pair, H = pair_and_inputs()
    H[:, 1] = H[:, 0]
    g = exponential(algebra(4, 4))
    with pytest.raises(SingularInputError, match="full rank"):
        Exact().act(pair, H, g, LeakyReLU(0.1))
    acted = Approximate().act(pair, H, g, LeakyReLU(0.1))
    assert all(bool(torch.isfinite(t).all()) for t in acted.pair)
    assert float(acted.drift) < 1.0


# --- actions


EXACT_CASES = [
    (Exact(), LeakyReLU(0.1)),
    (Exact(), Identity()),
    (Rescaling(), LeakyReLU(0.1)),
    (Rescaling(), ReLU()),
    (Rescaling(), Identity()),
]


def element(act, T, name="exp"):
    k = T.shape[-1]
    coordinates = T.diagonal(dim1=-2, dim2=-1) if isinstance(act, Rescaling) else T.flatten(-2)
    assert coordinates.shape[-1] == act.algebra_size(k)
    return PARAMETRISATIONS[name](act.algebra(coordinates, k))


@pytest.mark.parametrize(("act", "f"), EXACT_CASES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_exact_actions_satisfy_the_group_axioms(act, f, bias, batch):
    pair, H = pair_and_inputs(batch, bias=bias)
    g, h = (element(act, algebra(*batch, 4, 4, seed=s)) for s in (1, 2))

    def move(pair, g):
        return act.act(pair, H, g, f).pair

    one = move(pair, identity(4, dtype=D))
    together, one_after_other = move(pair, compose(g, h)), move(move(pair, h), g)
    back = move(move(pair, g), from_matrix(g.inverse))
    for name in ("V", "U", "bias"):
        if getattr(pair, name) is not None:
            close(getattr(one, name), getattr(pair, name))
            close(getattr(together, name), getattr(one_after_other, name))
            close(getattr(back, name), getattr(pair, name))


@given(
    depth=st.integers(1, 3),
    widths=st.lists(st.integers(1, 7), min_size=5, max_size=5),
    batch=st.sampled_from([(), (3,), (2, 2)]),
    bias=st.booleans(),
    case=st.sampled_from(EXACT_CASES),
    parametrisation=st.sampled_from(EXACT_INVERSE),
    seed=st.integers(0, 10**6),
)
def test_loss_is_kept_by_exact_actions(depth, widths, batch, bias, case, parametrisation, seed):
    act, f = case
    sizes = tuple(widths[: depth + 2])
    mlp = MLP(sizes, f, bias)
    n = min(sizes[:-1]) if isinstance(act, Exact) else 9
    rng = torch.Generator().manual_seed(seed)
    w = mlp.unflatten(torch.randn(*batch, mlp.num_parameters, generator=rng, dtype=D))
    X, Y = (torch.randn(*batch, size, n, generator=rng, dtype=D) for size in (sizes[0], sizes[-1]))
    T = [random_algebra((*batch, k, k), 0.2, rng, D) for k in mlp.hidden_widths]
    moved = sweep(act, mlp, w, X, [element(act, t, parametrisation) for t in T])
    before, after = (mlp.squared_error(weights, X, Y)[0] for weights in (w, moved))
    assert float(((after - before).abs() / before).max()) < 1e-10


BOUNDED = [Tanh(), Sigmoid(), Softplus()]


@pytest.mark.parametrize("f", BOUNDED, ids=lambda f: f.describe())
def test_exact_action_keeps_the_output_while_it_stays_in_range(f):
    pair, H = pair_and_inputs((3,))
    pair = Pair(0.3 * pair.V, pair.U, 0.3 * pair.bias)
    acted = Exact().act(pair, H, exponential(algebra(3, 4, 4, norm=0.02)), f)
    assert float(acted.drift.max()) < 1e-12
    with pytest.raises(NotExactError, match="range"):
        Exact().act(pair, H, from_matrix(-20 * torch.eye(4, dtype=D)), f)


@pytest.mark.parametrize("f", [LeakyReLU(0.1), Tanh(), SiLU(), ReLU()], ids=lambda f: f.describe())
def test_approximate_action_keeps_the_output_of_few_samples_and_reports_its_drift_for_many(f):
    g = exponential(algebra(8, 8, norm=0.2))
    pair, H = pair_and_inputs(d=6, k=8, n=4)
    few = Approximate().act(pair, H, g, f)
    assert float(few.drift) < 1e-8
    pair, H = pair_and_inputs(d=6, k=8, n=50)
    many = Approximate().act(pair, H, g, f)
    true_drift = (many.pair.output(H, f) - pair.output(H, f)).norm() / pair.output(H, f).norm()
    assert 1e-6 < float(many.drift) < 0.5
    close(many.drift, true_drift, 1e-14)


def test_approximate_action_is_the_paper_s_formula_where_the_hidden_units_have_full_rank():
    pair, H = pair_and_inputs(k=4, n=9, bias=False)
    g, f = exponential(algebra(4, 4)), Tanh()
    ours = Approximate().act(pair, H, g, f).pair
    close(ours.V, g.matrix @ pair.V)
    close(ours.U, pair.U @ f(pair.V @ H) @ torch.linalg.pinv(f(g.matrix @ pair.V @ H)), 1e-8)


def test_exact_action_is_the_paper_s_formula_on_square_inputs():
    pair, H = pair_and_inputs(d=5, n=5, bias=False)
    g, f = exponential(algebra(4, 4)), LeakyReLU(0.1)
    ours = Exact().act(pair, H, g, f).pair
    close(ours.V, f.inverse(g.matrix @ f(pair.V @ H)) @ torch.linalg.pinv(H), 1e-9)
    close(ours.U, pair.U @ g.inverse)


def test_first_order_element_changes_the_loss_to_second_order():
    pair, H = pair_and_inputs((4,), d=6, n=6)
    T = algebra(4, 4, 4, norm=1.0)

    def error(scale):
        return Exact().act(pair, H, first_order(scale * T), LeakyReLU(0.1)).drift

    steps = [0.02, 0.01, 0.005]
    errors = torch.stack([error(s) for s in steps])
    slopes = torch.log2(errors[:-1] / errors[1:])
    assert bool(((slopes - 2).abs() < 0.05).all())


@pytest.mark.parametrize("act", [Exact(), Approximate(), Rescaling()], ids=lambda a: a.name)
@pytest.mark.parametrize("bias", [False, True])
def test_actions_pass_gradcheck_and_mutate_nothing(act, bias):
    pair, H = pair_and_inputs((2,), d=4, k=3, o=2, n=4, bias=bias)
    T = algebra(2, 3, 3)
    tensors = [t for t in (*pair, H) if t is not None]
    copies = [t.clone() for t in tensors]

    def run(T, V, U, *rest):
        moved = act.move(Site(Pair(V, U, rest[0] if bias else None), rest[-1], LeakyReLU(0.1)), element(act, T))
        return tuple(t for t in moved.pair if t is not None)

    assert torch.autograd.gradcheck(run, [t.clone().requires_grad_() for t in (T, *tensors)])
    act.act(pair, H, element(act, T), LeakyReLU(0.1))
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_sweep_reports_drift_and_keeps_dtype(dtype):
    mlp = MLP((6, 5, 5, 2), LeakyReLU(0.1), True)
    w = mlp.unflatten(torch.randn(3, mlp.num_parameters, dtype=dtype))
    X = torch.randn(3, 6, 4, dtype=dtype)
    g = [exponential(algebra(3, 5, 5, norm=0.1).to(dtype))] * 2
    moved = sweep(Exact(), mlp, w, X, g)
    assert moved.matrices[0].dtype == dtype
    assert float(drift(mlp, w, moved, X).max()) < (1e-4 if dtype == torch.float32 else 1e-11)
    assert float((moved.matrices[0] - w.matrices[0]).norm()) > 0.01


def test_a_positive_scale_may_differ_for_every_unit_and_network():
    pair, _ = pair_and_inputs((2,))
    scale = torch.rand(2, 4, dtype=D) + 0.1
    site = Site(pair, torch.empty(0), ReLU())
    moved = Rescaling().move(site, from_matrix(torch.diag_embed(scale)))
    close(moved.pair.V, scale[..., None] * pair.V)
    with pytest.raises(NotExactError, match="positive diagonal"):
        Rescaling().move(site, from_matrix(-torch.eye(4, dtype=D)))


def test_actions_that_do_not_exist_are_refused_with_the_reason():
    pair, H = pair_and_inputs()
    g = exponential(algebra(4, 4))
    with pytest.raises(NotExactError, match="maps every negative number to 0"):
        Exact().act(pair, H, g, ReLU())
    with pytest.raises(NotExactError, match="positively homogeneous"):
        Rescaling().act(pair, H, g, Tanh())
    with pytest.raises(NotExactError, match="at most as many samples"):
        Exact().act(pair, torch.randn(6, 9, dtype=D), g, LeakyReLU(0.1))
    with pytest.raises(ConfigError, match="damping"):
        Approximate(damping=0.0)
    with pytest.raises(ConfigError, match="action must be one of"):
        action("rotation")
    mlp = MLP((3, 4, 2), Tanh())
    with pytest.raises(ShapeMismatchError, match="one group element for each of 1"):
        sweep(Exact(), mlp, mlp.unflatten(torch.zeros(mlp.num_parameters)), torch.zeros(3, 2), [])
