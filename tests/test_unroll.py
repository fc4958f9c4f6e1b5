"""Meta-gradients are right, three ways; windows cut history; memory stays flat."""

import contextlib
import gc

import pytest
import torch
from cases import METHODS, TASK, small_optimizer, small_problems
from naive import NaiveLearner, torch_gate_order

from metatele.config import TaskConfig
from metatele.errors import ConfigError
from metatele.learned import StackedLSTM
from metatele.tasks import Regression
from metatele.unroll import start, unroll, window_loss

VARIANTS = [
    {"method": "update-tele"},
    {"method": "update-tele", "norm": "bounded", "gradient_rates": True, "rate_output": "log"},
    {"method": "update-tele", "norm": "learned", "radius_decay": 3.0},
    {"method": "update"},
    {"method": "update", "gradient_rates": True, "rate_output": "log"},
    {"method": "lr-tele", "rate_output": "log"},
    # A cap of 1: every gradient that is longer than one before is cut.
    {"method": "update", "gradient_rates": True, "rate_output": "log", "gradient_cap": 1.0},
    {"method": "lr-tele", "rate_output": "log", "gradient_cap": 1.0},
]


def ids(variant):
    return "-".join(map(str, variant.values()))


@pytest.mark.parametrize("variant", [*VARIANTS, {"method": "update-tele", "action": "approximate"}], ids=ids)
@pytest.mark.parametrize("objective", ["sum", "mean-log"])
def test_meta_gradient_passes_gradcheck_through_three_steps(variant, objective):
    samples = 5 if variant.get("action") == "approximate" else 2
    task = TaskConfig(widths=(2, 3, 2), samples=samples, bias=True)
    optimizer = small_optimizer(task=task, hidden=2, **variant)
    begin = start(optimizer, small_problems(2, task))

    # The gradient is a constant input: it is recorded once, and finite differences see it fixed.
    recorded = []

    def meta_loss(*_):
        current, losses = begin, []
        for k in range(3):
            if len(recorded) <= k:
                recorded.append(current.gradient.clone())
            gradient = recorded[k]
            done = optimizer.step(current.weights, gradient, current.states, current.problems.inputs, current.prepared)
            current, loss = _arrive(current, done)
            losses.append(loss)
        return window_loss(torch.stack(losses), objective)

    assert torch.autograd.gradcheck(meta_loss, tuple(optimizer.parameters()), rtol=1e-5, atol=1e-7, fast_mode=True)
    parameters = list(optimizer.parameters())
    expected = torch.autograd.grad(meta_loss(), parameters)
    ours = torch.autograd.grad(window_loss(unroll(optimizer, begin, 3)[1], objective), parameters)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


def _arrive(current, done):
    """Where a step leads, with the loss by autograd instead of the package's attached gradient."""
    from dataclasses import replace

    p = current.problems
    loss = 0.5 * (p.targets - p.mlp.forward(p.mlp.unflatten(done.weights), p.inputs)).square().sum((-2, -1))
    gradient = p.loss_and_gradient(done.weights)[1]
    return replace(current, weights=done.weights, gradient=gradient, states=done.states), loss


@pytest.mark.parametrize("variant", VARIANTS, ids=ids)
@pytest.mark.parametrize("objective", ["sum", "mean-log"])
def test_batched_unroll_is_the_naive_loop(variant, objective):
    optimizer, problems, steps = small_optimizer(**variant), small_problems(3), 7
    end, losses = unroll(optimizer, start(optimizer, problems), steps)
    naive = NaiveLearner(optimizer)
    runs = [naive.run(problems.initial[i], problems.inputs[i], problems.targets[i], steps) for i in range(3)]
    torch.testing.assert_close(end.weights, torch.stack([w for w, _ in runs]), rtol=1e-9, atol=1e-10)
    naive_losses = torch.stack([torch.stack(run) for _, run in runs], 1)
    torch.testing.assert_close(losses, naive_losses, rtol=1e-9, atol=1e-10)

    with optimizer.window():
        window_loss(unroll(optimizer, start(optimizer, problems), steps)[1], objective).backward()
    window_loss(naive_losses, objective).backward()
    pairs = [(optimizer.local.lstm, naive.local)]
    if optimizer.teleport is not None:
        pairs.append((optimizer.teleport.lstm, naive.teleport))
    for ours, theirs in pairs:
        for weight, bias, cell in zip(ours.weights, ours.biases, theirs.cells, strict=True):
            joined = torch.cat([cell.weight_ih.grad, cell.weight_hh.grad], 1)
            torch.testing.assert_close(torch_gate_order(weight.grad), joined, rtol=1e-7, atol=1e-8)
            torch.testing.assert_close(torch_gate_order(bias.grad), cell.bias_ih.grad, rtol=1e-7, atol=1e-8)
        torch.testing.assert_close(ours.head_weight.grad, theirs.head.weight.grad, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("method", METHODS)
def test_windows_in_a_row_are_one_long_run(method):
    optimizer, problems = small_optimizer(method), small_problems()
    whole = unroll(optimizer, start(optimizer, problems), 6)[1]
    current, parts = start(optimizer, problems), []
    for k in (1, 2, 3):
        current, losses = unroll(optimizer, current.detach(), k)
        parts.append(losses)
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=1e-14)


def test_history_is_cut_between_windows():
    optimizer = small_optimizer()
    middle, _ = unroll(optimizer, start(optimizer, small_problems()), 2)
    cut = middle.detach()
    tensors = [cut.weights, cut.loss, cut.gradient, *cut.states.tensors()]
    assert not any(t.requires_grad for t in tensors)


def test_a_restart_touches_only_its_trajectories():
    optimizer, problems = small_optimizer(), small_problems(4)
    end = unroll(optimizer, start(optimizer, problems), 3)[0].detach()
    fresh = start(optimizer, Regression(TASK).sample(0, "train", [9]).to("cpu", torch.float64))
    mixed = end.restarted([2], fresh)
    for new, old, begun in (
        (mixed.weights, end.weights, fresh.weights),
        (mixed.prepared, end.prepared, fresh.prepared),
        (mixed.problems.targets, end.problems.targets, fresh.problems.targets),
        (mixed.states.local.cell[1], end.states.local.cell[1], fresh.states.local.cell[1]),
        (mixed.states.teleport.hidden[0], end.states.teleport.hidden[0], fresh.states.teleport.hidden[0]),
    ):
        assert torch.equal(new[2], begun[0])
        assert torch.equal(new[[0, 1, 3]], old[[0, 1, 3]])


def test_a_lost_trajectory_stops_and_leaves_the_others_as_they_were():
    optimizer, problems = small_optimizer(), small_problems(3)
    begin = start(optimizer, problems)
    wild = begin.weights.clone()
    wild[1] *= 1e3
    mixed = begin.__class__(**{**begin.__dict__, "weights": wild})
    end, losses = unroll(optimizer, mixed, 4, lost_loss=1e4)
    _, alone = unroll(optimizer, begin, 4)
    assert losses[:, 1].tolist() == [1e4] * 4
    torch.testing.assert_close(losses[:, [0, 2]], alone[:, [0, 2]], rtol=1e-12, atol=0)
    assert torch.equal(end.weights[1].detach(), wild[1])
    ours = torch.autograd.grad(losses.sum(), list(optimizer.parameters()))
    expected = torch.autograd.grad(alone[:, [0, 2]].sum(), list(optimizer.parameters()))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def live_tensors():
    gc.collect()
    return sum(1 for o in gc.get_objects() if issubclass(type(o), torch.Tensor))


@pytest.mark.parametrize("method", METHODS)
def test_memory_does_not_grow_with_windows(method):
    optimizer = small_optimizer(method)
    adam = torch.optim.Adam(optimizer.parameters())
    current, counts = start(optimizer, small_problems()), []
    for _ in range(12):
        adam.zero_grad()
        with optimizer.window():
            end, losses = unroll(optimizer, current.detach(), 3)
            window_loss(losses, "sum").backward()
        current = end.detach()
        del end, losses
        adam.step()
        counts.append(live_tensors())
    assert counts[2:] == [counts[2]] * 10


def test_memory_without_gradients_does_not_grow_with_steps():
    optimizer = small_optimizer()
    with torch.no_grad():
        current, counts = start(optimizer, small_problems()), []
        for _ in range(8):
            current, _ = unroll(optimizer, current, 1)
            counts.append(live_tensors())
    assert counts[1:] == [counts[1]] * 7


def test_zero_loss_has_a_finite_log_objective():
    losses = torch.tensor([[0.0, 1.0]], requires_grad=True)
    window_loss(losses, "mean-log").backward()
    assert bool(torch.isfinite(losses.grad).all())
    with pytest.raises(ConfigError, match="objective"):
        window_loss(losses, "last")


@pytest.mark.parametrize("variant", VARIANTS, ids=ids)
def test_steps_computed_anew_have_the_same_derivatives_to_the_bit(variant):
    optimizer = small_optimizer(**variant)
    begin, parameters = start(optimizer, small_problems(3)), list(optimizer.parameters())
    gradients = []
    for remat in (False, True):
        losses = unroll(optimizer, begin, 5, lost_loss=1e6, remat=remat)[1]
        gradients.append(torch.autograd.grad(window_loss(losses, "mean-log"), parameters))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_windows_of_other_sizes_follow_each_other():
    """The memory that windows share is let go where it does not fit."""
    lstm = StackedLSTM(3, 4, 2, 2, torch.Generator().manual_seed(0))
    for batch, precision in ((5, "float32"), (2, "float32"), (7, "bf16"), (7, "float32")):
        lstm.precision = precision
        found = []
        for window in (lstm.window, contextlib.nullcontext):
            lstm.zero_grad()
            with window():
                state, total = lstm.initial_state(batch), torch.zeros(())
                for step in range(12):
                    output, state = lstm((step + 1) * torch.ones(batch, 3), state)
                    total = total + output.square().sum()
                total.backward()
            found.append([p.grad.clone() for p in lstm.parameters()])
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-2 if precision == "bf16" else 1e-4, atol=1e-2)


def test_a_backward_pass_after_its_window_is_refused():
    lstm = StackedLSTM(3, 4, 2, 1, torch.Generator().manual_seed(0))
    with lstm.window():
        output, _ = lstm(torch.ones(5, 3), lstm.initial_state(5))
    with pytest.raises(RuntimeError, match="inside the window"):
        output.sum().backward()
