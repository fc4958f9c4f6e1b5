"""Curves, baselines and reports: against plain torch loops, and readable as promised."""

import csv
import json

import pytest
import torch
from cases import METHODS, TASK, small_optimizer, small_problems

import metatele
from metatele.errors import CheckpointError
from metatele.tasks import Regression
from metatele.training.baselines import BASELINES, Baseline, run_candidates, tune
from metatele.training.curves import Curves, learned_curves, worst_rise
from metatele.training.evaluation import evaluate
from metatele.training.report import document, markdown, rows, write
from metatele.unroll import start, unroll


def plain_loop(baseline, candidate, problems, i, steps):
    """One trajectory with autograd and an ordinary closure."""
    w = problems.initial[i].clone().requires_grad_()
    optimizer = baseline.optimizer([w], **candidate)

    def closure():
        optimizer.zero_grad()
        output = problems.mlp.forward(problems.mlp.unflatten(w), problems.inputs[i])
        loss = 0.5 * (problems.targets[i] - output).square().sum()
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(steps)]
    return [*losses, float(closure().detach())]


@pytest.mark.parametrize("baseline", BASELINES, ids=lambda b: b.name)
def test_batched_baselines_are_plain_torch_loops(baseline):
    problems, steps = small_problems(3), 6
    candidates = baseline.grid[:: max(1, len(baseline.grid) // 4)]
    losses = run_candidates(baseline, candidates, problems, steps)
    for c, candidate in enumerate(candidates):
        for i in range(3):
            expected = torch.tensor(plain_loop(baseline, candidate, problems, i, steps), dtype=torch.float64)
            torch.testing.assert_close(losses[:, c, i], expected, rtol=1e-6, atol=1e-9)


def test_tuning_takes_the_least_final_mean_and_never_a_diverged_one():
    grid = tuple({"lr": lr} for lr in (1e-6, 1e-2, 1e3))
    baseline = Baseline("SGD", torch.optim.SGD, grid)
    losses = run_candidates(baseline, grid, small_problems(3), 20)[-1].mean(-1)
    assert not torch.isfinite(losses[2])
    assert losses[1] < losses[0]
    assert tune(baseline, small_problems(3), 20) == {"lr": 1e-2}


@pytest.mark.parametrize("method", METHODS)
def test_learned_curves_are_the_unroll(method):
    optimizer, problems = small_optimizer(method), small_problems()
    losses, seconds = learned_curves(optimizer, problems, 5)
    begin = start(optimizer, problems)
    torch.testing.assert_close(losses[0], begin.loss)
    torch.testing.assert_close(losses[1:], unroll(optimizer, begin, 5)[1].detach())
    assert seconds > 0


def test_lost_trajectories_are_counted_and_never_hidden():
    losses = torch.tensor([[1.0, 2.0, 3.0], [1.0, float("nan"), float("inf")]])
    entry = Curves("x", losses, 0.0).to_json()
    assert entry["diverged"] == 2
    assert entry["loss"]["mean"] == [2.0, None]
    assert entry["loss"]["median"][1] is None
    json.dumps(entry, allow_nan=False)


def test_rise_is_the_ratio_to_the_running_minimum():
    assert worst_rise(torch.tensor([4.0, 2.0, 1.0])) == 1.0
    assert worst_rise(torch.tensor([4.0, 1.0, 2.0, 8.0, 0.5])) == 8.0


@pytest.fixture
def folders(tmp_path):
    for method in METHODS:
        metatele.save(tmp_path / method, small_optimizer(method, dtype=torch.float32))
    return [tmp_path / m for m in METHODS]


def test_evaluation_writes_what_is_promised(folders, tmp_path):
    curves, task = evaluate(folders, num_trajectories=5, num_steps=6, seed=1, device="cpu")
    text = write(document(curves, task, 1, "cpu"), tmp_path / "out")
    doc = json.loads((tmp_path / "out" / "curves.json").read_text())
    assert (doc["format"], doc["steps"], doc["trajectories"], doc["seed"]) == (1, 6, 5, 1)
    names = [m["name"] for m in doc["methods"]]
    assert names[:3] == ["LSTM(update,tele)", "LSTM(update)", "LSTM(lr,tele)"]
    assert names[3:] == ["GD", "SGD", "Momentum", "Adam", "L-BFGS"]
    first = [m["loss"]["mean"][0] for m in doc["methods"]]
    assert first == pytest.approx([first[0]] * 8)
    for m in doc["methods"]:
        assert set(m) == {"name", "checkpoint", "hyperparameters", "diverged", "seconds_per_step", "loss"}
        assert {len(v) for v in m["loss"].values()} == {7}
        assert set(m["loss"]) == {"mean", "std", "median", "p10", "p90"}
    assert doc["methods"][3]["hyperparameters"]["lr"] == 3e-4
    assert doc["methods"][0]["checkpoint"] == str(folders[0])
    png = (tmp_path / "out" / "loss.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    table = list(csv.reader((tmp_path / "out" / "table.csv").open()))
    assert [row[0] for row in table] == ["method", *names]
    assert (tmp_path / "out" / "table.md").read_text() == text == markdown(rows(doc))


def test_evaluation_repeats_itself_and_differs_between_seeds(folders):
    one, again, other = (evaluate(folders[:1], 3, 4, seed, "cpu")[0] for seed in (1, 1, 2))
    for a, b, c in zip(one, again, other, strict=True):
        assert torch.equal(a.losses, b.losses)
        assert not torch.equal(a.losses, c.losses)


def test_tuned_baselines_beat_the_untuned_one():
    task = Regression(TASK)
    from metatele.training.baselines import baseline_curves

    curves = {c.name: c for c in baseline_curves(task, task.sample(1, "evaluation", range(16)), 30, seed=1)}
    final = {name: float(c.losses[-1].mean()) for name, c in curves.items()}
    for name in ("SGD", "Momentum", "Adam", "L-BFGS"):
        assert final[name] < final["GD"]


def test_checkpoints_of_different_tasks_are_refused(folders, tmp_path):
    from metatele.config import TaskConfig

    metatele.save(tmp_path / "other", small_optimizer(task=TaskConfig(widths=(3, 3, 3), samples=3)))
    with pytest.raises(CheckpointError, match="one task"):
        evaluate([folders[0], tmp_path / "other"], 2, 2, 1, "cpu")
