"""Levenberg-Marquardt against a plain transcription, and the full-batch table."""

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import full_batch  # noqa: E402
import levenberg  # noqa: E402
from levenberg import LevenbergMarquardt  # noqa: E402

from metatele.tasks.held_out import REGRESSIONS  # noqa: E402


def problem(seed=0, samples=12, outputs=2):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, outputs)).double()
    x = torch.randn(samples, 3, dtype=torch.float64)
    return model, x, torch.randn(samples, outputs, dtype=torch.float64)


@pytest.mark.parametrize("samples", [4, 40])  # fewer residuals than parameters, and more
def test_steps_are_those_of_the_plain_algorithm(samples):
    model, x, y = problem(samples=samples)
    solver = LevenbergMarquardt(model, x, y)
    names, shapes = zip(*[(n, p.shape) for n, p in model.named_parameters()], strict=True)
    w = torch.cat([p.detach().flatten() for p in model.parameters()]).clone()

    def residuals(flat):
        parts = flat.split([s.numel() for s in shapes])
        given = {n: part.view(s) for n, part, s in zip(names, parts, shapes, strict=True)}
        return (torch.func.functional_call(model, given, (x,)) - y).flatten()

    damping, growth, kept = None, 2.0, 0
    for _ in range(12):
        J, r = torch.autograd.functional.jacobian(residuals, w), residuals(w).detach()
        A, g = J.T @ J, J.T @ r
        damping = 1e-3 * float(A.diagonal().max()) if damping is None else damping
        d = torch.linalg.solve(A + damping * torch.eye(len(w), dtype=w.dtype), -g)
        fall = r.square().sum() - residuals(w + d).detach().square().sum()
        ratio = float(fall / -((2 * g + A @ d) @ d))
        if ratio > 0:
            w, growth, kept = w + d, 2.0, kept + 1
            damping *= max(1 / 3, 1 - (2 * ratio - 1) ** 3)
        else:
            damping, growth = damping * growth, 2 * growth
        assert solver.step() == pytest.approx(float(residuals(w).detach().square().sum()), rel=1e-6, abs=1e-20)
    assert kept > 5


def test_the_end_is_stationary_and_no_step_lifts_the_loss():
    """From near a teacher, whose outputs have noise: far away the minima are at infinity."""
    model, x, noise = problem(samples=40)
    y = model(x).detach() + 0.05 * noise
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    solver = LevenbergMarquardt(model, x, y)
    losses = [solver.step() for _ in range(100)]
    assert all(b <= a for a, b in itertools.pairwise(losses))
    loss = (model(x) - y).square().sum()
    assert loss.item() == pytest.approx(losses[-1])
    loss.backward()
    assert max(float(p.grad.abs().max()) for p in model.parameters()) < 1e-5


def test_a_network_too_large_is_refused():
    model, x, y = problem(samples=200_000)
    with pytest.raises(ValueError, match="more than"):
        LevenbergMarquardt(model, x, y)
    assert levenberg.LARGEST >= 256 * 5000


@pytest.mark.parametrize("kind", REGRESSIONS)
def test_a_user_s_network_has_the_problem_s_loss(kind):
    fitting = REGRESSIONS[kind].sample(1, "evaluation", 2).part(slice(1, 2))
    x, y = fitting.inputs[0].T, fitting.targets[0].T
    ours = full_batch.loss_of(fitting, full_batch.network(fitting)(x), y)
    theirs, _ = fitting.loss_and_gradient(fitting.initial)
    torch.testing.assert_close(ours.detach(), theirs[0])


def test_the_table_is_written_and_drawn_again(tmp_path, capsys):
    file = tmp_path / "full.json"
    full_batch.main(["--kinds", "narrow", "wide", "--problems", "2", "--steps", "10", "--json", str(file)])
    first = capsys.readouterr().out
    result = json.loads(file.read_text())
    assert {(row["kind"], row["method"]) for row in result["rows"]} == {
        (kind, method) for kind in ("narrow", "wide") for method in full_batch.METHODS
    } - {("wide", full_batch.MARQUARDT)}
    assert all(len(row["losses"]) == 2 and row["at"] == [0, 10] for row in result["rows"])
    starts = {tuple(losses[0] for losses in row["losses"]) for row in result["rows"] if row["kind"] == "wide"}
    assert len(starts) == 1
    full_batch.main(["--redraw", str(file)])
    assert capsys.readouterr().out == first
    result["rows"][0]["losses"][0][1] = None
    assert full_batch.mean(result["rows"][0], 10) == float("inf")
