"""The LSTM core and the moves: against torch's cells, in windows, at their edges."""

import copy
import math
import pickle

import pytest
import torch
from cases import TASK, small_method, small_optimizer, small_problems
from naive import NaiveLSTM

from metatele.config import MethodConfig, TaskConfig
from metatele.errors import ConfigError, NotExactError, ShapeMismatchError
from metatele.learned import LearnedTeleport, MetaOptimizer, StackedLSTM
from metatele.learned.flat.moves import Rate, capped
from metatele.learned.flat.preprocessing import asinh, log_sign, preprocessing, raw
from metatele.tasks import Regression


def lstm(dtype=torch.float64, precision="float32"):
    return StackedLSTM(7, 5, 3, 2, torch.Generator().manual_seed(0), precision).to(dtype)


def run(model, xs, state):
    outputs = []
    for x in xs:
        output, state = model(x, state)
        outputs.append(output)
    return torch.stack(outputs)


def test_stack_is_that_of_torch_cells():
    ours = lstm()
    naive, xs = NaiveLSTM(ours), torch.randn(4, 1, 7, dtype=torch.float64)
    torch.testing.assert_close(run(ours, xs, ours.initial_state(1)), run(naive, xs, naive.initial_state()))


def test_stack_passes_gradcheck():
    ours, xs = lstm(), torch.randn(3, 2, 7, dtype=torch.float64, requires_grad=True)
    state = ours.initial_state(2)
    parameters = list(ours.parameters())
    assert torch.autograd.gradcheck(lambda xs, *_: run(ours, xs, state), (xs, *parameters))


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_gradients_formed_once_for_a_window_are_those_formed_step_by_step(precision):
    dtype = torch.float64 if precision == "float32" else torch.float32
    ours = lstm(dtype, precision)
    xs = torch.randn(6, 4, 7, dtype=dtype)
    run(ours, xs, ours.initial_state(4)).square().sum().backward()
    expected = [p.grad.clone() for p in ours.parameters()]
    ours.zero_grad()
    for _ in range(2):  # gradients accumulate, as .grad always does
        with ours.window():
            run(ours, xs, ours.initial_state(4)).square().sum().backward()
    tolerance = 1e-12 if precision == "float32" else 0.02
    for p, e in zip(ours.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, 2 * e, rtol=tolerance, atol=tolerance * float(e.abs().max()))


def test_bf16_sees_new_weights_after_any_optimizer_step():
    ours = lstm(torch.float32, "bf16")
    adam = torch.optim.Adam(ours.parameters(), lr=0.1, fused=True)
    x = torch.ones(1, 7)
    outputs = []
    for _ in range(2):
        with ours.window():
            output, _ = ours(x, ours.initial_state(1))
            output.sum().backward()
        outputs.append(output.detach())
        adam.step()
    assert float((outputs[0] - outputs[1]).abs().max()) > 0.05


def test_bf16_rounds_products_and_nothing_else():
    full, low = lstm(torch.float32), lstm(torch.float32, "bf16")
    x = torch.randn(16, 7)
    exact, _state = full(x, full.initial_state(16))
    rounded, low_state = low(x, low.initial_state(16))
    assert rounded.dtype == low_state.cell[0].dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0.02)
    assert not torch.equal(rounded, exact)


def test_log_sign_is_continuous_and_has_gradients_at_zero():
    g = torch.tensor([[0.0, 1e-30, -1.0, 1e5]], dtype=torch.float64, requires_grad=True)
    channels = log_sign(g)
    assert channels.shape == (1, 8)
    assert bool(torch.isfinite(channels).all())
    channels.sum().backward()
    assert bool(torch.isfinite(g.grad).all())


def test_preprocessing_by_name():
    assert preprocessing("raw") == (raw, 1)
    assert preprocessing("asinh") == (asinh, 1)
    with pytest.raises(ConfigError, match="preprocessing"):
        preprocessing("tanh")


@pytest.mark.parametrize("norm", ["fixed", "bounded"])
def test_norm_of_T_is_fixed_or_bounded_and_zero_is_safe(norm):
    move = LearnedTeleport(small_method(norm=norm), Regression(TASK).mlp, torch.Generator().manual_seed(0))
    M = torch.cat([torch.zeros(1, 25), 1e-3 * torch.ones(1, 25), 1e3 * torch.ones(1, 25)]).requires_grad_()
    T = move.scaled(M)
    norms = T.detach().norm(dim=-1)
    assert float(norms[0]) == 0
    assert float(norms.max()) <= 0.1 * (1 + 1e-6)
    expected_middle = 0.1 if norm == "fixed" else 0.1 * 5e-3
    assert float(norms[1]) == pytest.approx(expected_middle, rel=1e-3)
    T.sum().backward()
    assert bool(torch.isfinite(M.grad).all())


@pytest.mark.parametrize("action", ["exact", "rescaling"])
def test_initial_T_has_the_asked_mean(action):
    without, with_mean = (
        LearnedTeleport(
            small_method(action=action, teleport_mean=m), Regression(TASK).mlp, torch.Generator().manual_seed(0)
        )
        for m in (0.0, -1e4)
    )
    added = (with_mean.lstm.head_bias - without.lstm.head_bias).detach()
    torch.testing.assert_close(added, torch.full_like(added, -1e4 / math.sqrt(len(added))), rtol=1e-5, atol=0)
    T = with_mean.scaled(with_mean.lstm.head_bias.detach()[None])
    torch.testing.assert_close(T, torch.full_like(T, -0.1 / math.sqrt(len(added))), rtol=1e-3, atol=0)


def test_capped_gradient_is_at_most_cap_times_the_shortest_so_far():
    random = torch.Generator().manual_seed(0)
    smallest = torch.full((4, 2), math.inf, dtype=torch.float64)
    shortest = smallest.clone()
    for _ in range(20):
        sizes = torch.rand(4, 1, generator=random, dtype=torch.float64).mul(12).sub(6).exp()
        gradient = sizes * torch.randn(4, 7, generator=random, dtype=torch.float64)
        result, smallest = capped(gradient, smallest, [5, 2], cap=3.0)
        for part, (before, after) in enumerate(zip(gradient.split([5, 2], -1), result.split([5, 2], -1), strict=True)):
            norm = before.norm(dim=-1)
            shortest[:, part] = torch.minimum(shortest[:, part], norm)
            torch.testing.assert_close(after.norm(dim=-1), torch.minimum(norm, 3 * shortest[:, part]))
            torch.testing.assert_close(after / after.norm(dim=-1, keepdim=True), before / norm[:, None])
    assert torch.equal(smallest, shortest)


def test_a_gradient_of_zero_caps_nothing_and_one_that_is_not_finite_stays_so():
    zero, smallest = capped(torch.zeros(1, 3), torch.tensor([[2.0]]), [3], cap=2.0)
    assert torch.equal(zero, torch.zeros(1, 3))
    assert torch.equal(smallest, torch.tensor([[2.0]]))
    broken, smallest = capped(torch.tensor([[math.nan, 1.0]]), torch.tensor([[2.0]]), [2], cap=2.0)
    assert bool(broken.isnan().any())
    assert torch.equal(smallest, torch.tensor([[2.0]]))


def test_norm_of_T_can_be_learned_and_shrinks_with_age():
    optimizer = small_optimizer(norm="learned", radius=0.2, radius_decay=5.0)
    problems, states = small_problems(), small_optimizer().initial_states(3)
    _, gradient = problems.loss_and_gradient(problems.initial)
    states = states._replace(age=torch.tensor([0.0, 5.0, 45.0], dtype=torch.float64))
    done = optimizer.step(problems.initial, 0 * gradient, states, problems.inputs)
    norms = done.algebra.detach().norm(dim=-1)
    torch.testing.assert_close(norms[0] / norms[1:], torch.tensor([2.0, 10.0], dtype=torch.float64))
    assert 2e-4 < float(norms[0]) < 0.2
    assert torch.equal(done.states.age, states.age + 1)


@pytest.mark.parametrize("output", ["clamp", "log"])
def test_learned_rate_stays_between_its_ends(output):
    rate = Rate(output, 1e-4, 1e-2)(torch.tensor([-50.0, 0.001, 50.0]))
    torch.testing.assert_close(rate[[0, 2]], torch.tensor([1e-4, 1e-2]))
    assert 1e-4 < float(rate[1]) < 1e-2


def test_teleport_that_cannot_be_is_refused_when_built():
    with pytest.raises(NotExactError, match="relu"):
        MetaOptimizer(MethodConfig(), TaskConfig(activation="relu"))
    MetaOptimizer(MethodConfig(method="update", hidden=4), TaskConfig(activation="relu"))


@pytest.mark.parametrize(
    "settings", [{"action": "rescaling"}, {"action": "approximate"}, {"parametrisation": "cayley"}]
)
def test_teleport_keeps_the_loss_with_every_action(settings):
    optimizer, problems = small_optimizer(**settings), small_problems()
    states = optimizer.initial_states(3)
    _loss, gradient = problems.loss_and_gradient(problems.initial)
    done = optimizer.step(problems.initial, gradient, states, problems.inputs)
    before, after = (problems.loss_and_gradient(w)[0] for w in (done.local, done.weights))
    assert float(((after - before).abs() / before).max()) < 1e-7
    assert float((done.local - done.weights).detach().abs().max()) > 1e-3


def test_wrong_shapes_are_named():
    optimizer, problems = small_optimizer(), small_problems()
    states = optimizer.initial_states(3)
    with pytest.raises(ShapeMismatchError, match=r"\[batch, 35\]"):
        optimizer.step(problems.initial[:, :-1], problems.initial, states, problems.inputs)
    with pytest.raises(ShapeMismatchError, match=r"\[batch, 7\]"):
        lstm()(torch.zeros(2, 6, dtype=torch.float64), lstm().initial_state(2))


@pytest.mark.parametrize("method", ["update", "update-tele"])
def test_states_are_mapped_in_the_order_they_are_listed(method):
    states = small_optimizer(method).initial_states(2)
    listed, mapped = iter(states.tensors()), []
    states.map(lambda t: mapped.append(t is next(listed)) or t)
    assert all(mapped)
    assert len(mapped) == len(states.tensors())


def test_copies_and_pickles_compute_the_same():
    optimizer, problems = small_optimizer(), small_problems()
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        one, two = (
            o.step(problems.initial, problems.initial, o.initial_states(3), problems.inputs).weights
            for o in (optimizer, twin)
        )
        assert torch.equal(one, two)
