"""The experiment `transfer`: its problems, its baselines, its tables."""

import json
import math

import pytest
import torch

import metatele
from metatele.config import transfer
from metatele.errors import ConfigError, RunFolderError
from metatele.experiments import transfer as experiment
from metatele.perceptron.losses import CrossEntropy, SquaredError
from metatele.perceptron.mlp import MLP
from metatele.tasks.fitting import Fitting
from metatele.tasks.held_out import CLASSIFICATIONS, REGRESSIONS
from metatele.training import baselines
from metatele.training.baselines import EVERYWHERE, Baseline, Muon, run_candidates

FEW = tuple(
    Baseline(b.name, b.optimizer, b.grid[len(b.grid) // 2 :: len(b.grid)][:1] or b.grid[:1], b.batched)
    for b in EVERYWHERE
)


@pytest.mark.parametrize("name", REGRESSIONS)
def test_held_out_problems_are_reproducible_and_as_they_say(name):
    kind = REGRESSIONS[name]
    a, b, c = (kind.sample(1, stream, 3) for stream in ("evaluation", "evaluation", "tuning"))
    assert torch.equal(a.inputs, b.inputs)
    assert torch.equal(a.initial, b.initial)
    assert not torch.equal(a.inputs, c.inputs)
    assert a.inputs.shape == (3, kind.mlp.widths[0], kind.samples)
    assert a.targets.shape == (3, kind.mlp.widths[-1], kind.samples)
    assert kind.suffices == (not name.endswith("over"))
    loss, gradient = a.loss_and_gradient(a.initial)
    assert torch.isfinite(loss).all()
    assert torch.isfinite(gradient).all()


def fitting(batch_size=0, seed=0):
    from metatele.perceptron.activations import Tanh

    random = torch.Generator().manual_seed(seed)
    mlp = MLP((5, 6, 3), Tanh(), True)
    x, y = torch.randn(5, 12, generator=random).double(), torch.randint(3, (12,), generator=random)
    w = torch.randn(3, mlp.num_parameters, generator=random).double()
    return Fitting(mlp, x, y, w, CrossEntropy(), batch_size, 7)


def muon_loop(problems, i, lr, steps):
    """One trajectory with autograd and both optimizers by hand."""
    shapes = problems.mlp.shapes
    parts = [
        p.reshape(s).clone().requires_grad_()
        for p, s in zip(problems.initial[i].split([math.prod(s) for s in shapes]), shapes, strict=True)
    ]
    muon = torch.optim.Muon([parts[0], parts[2]], lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    adam, losses = torch.optim.Adam([parts[1], parts[3]], lr=lr), []
    for step in range(steps + 1):
        x, y = problems.batch(step)
        h = torch.tanh(parts[0] @ x + parts[1][:, None])
        loss = torch.nn.functional.cross_entropy((parts[2] @ h + parts[3][:, None]).T, y)
        losses.append(float(loss.detach()))
        for optimizer in (muon, adam):
            optimizer.zero_grad()
        loss.backward()
        muon.step()
        adam.step()
    return losses


@pytest.mark.parametrize("batch_size", [0, 4])
def test_muon_on_problems_of_any_kind_is_a_plain_loop(batch_size):
    problems = fitting(batch_size)
    baseline = Baseline("Muon", Muon, ({"lr": 0.05},), batched=False)
    visited = []
    losses = run_candidates(baseline, baseline.grid, problems, 5, lambda step, w: visited.append((step, w.shape)))
    for i in range(3):
        expected = torch.tensor(muon_loop(problems, i, 0.05, 5), dtype=torch.float64)
        torch.testing.assert_close(losses[:, 0, i], expected, rtol=2e-3, atol=1e-6)  # its products are in bfloat16
    assert visited == [(step, (1, 57)) for _ in range(3) for step in range(6)]


@pytest.mark.parametrize("batch_size", [0, 4])
def test_candidates_on_mini_batches_do_not_know_of_each_other(batch_size):
    problems, baseline = fitting(batch_size), Baseline("Adam", torch.optim.Adam, ({"lr": 0.01}, {"lr": 0.1}))
    together = run_candidates(baseline, baseline.grid, problems, 6)
    for c, candidate in enumerate(baseline.grid):
        for i in range(3):
            alone = run_candidates(baseline, [candidate], problems.part(slice(i, i + 1)), 6)
            torch.testing.assert_close(together[:, c, i], alone[:, 0, 0])


def test_what_is_stored_of_losses():
    losses = torch.tensor([[1.0, 2.0, 3.0], [4.0, 1.0, math.nan]])
    found = experiment.summary(losses)
    assert found["steps"] == [0, 1]
    assert found["mean"] == [2.0, None]
    assert found["median"] == [2.0, 4.0]
    assert found["highest_over_first"] is None
    assert found["diverged"] == 1
    assert experiment.recorded(1000)[-3:] == [900, 950, 1000]
    assert set(experiment._SHOWN) <= set(experiment.recorded(1000))


@pytest.fixture
def small(monkeypatch):
    """The experiment with few problems, steps and candidates, and a short meta-training."""
    settings = {"_FULL": 3, "_NETWORKS": 2, "_TUNING": 2, "_FEW": 2, "_STEPS": 12, "_LONG": 12, "_TARGET": 10}
    for name, value in settings.items():
        monkeypatch.setattr(experiment, name, value)
    monkeypatch.setattr(baselines, "EVERYWHERE", FEW)
    monkeypatch.setattr(experiment, "whitening_candidates", lambda: [{"rate": 0.1, "damping": 0.01}] * 2)
    monkeypatch.setattr(experiment, "ABLATIONS", dict(list(experiment.ABLATIONS.items())[:2]))

    def short(**changes):
        known = {"batch": 2, "groups": 2, "horizon": 4, "shorter": (), "unroll": 2, "widest": 9, "hidden": 8}
        more = {"validation_steps": 4, "validation_score_at": (4,)}
        return transfer(**{**known, **more, **changes, "trajectories": 4, "validation_trajectories": 4})

    monkeypatch.setattr("metatele.config.transfer", short)


def test_the_experiment_runs_redraws_and_shows_every_method(small, tmp_path, monkeypatch):
    flags = ["--seeds", "2", "--tasks", "paper", "digits", "--ablations"]
    flags += ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--publish", str(tmp_path / "best")]
    experiment.main(flags)
    out = tmp_path / "out"
    doc = json.loads((out / "results.json").read_text())
    paper, digits = doc["tasks"]
    names = [m["name"] for m in paper["methods"]]
    assert (
        names
        == [
            "SGD",
            "Momentum",
            "Adam",
            experiment.PATIENT,
            "AdamW",
            "Muon",
            "L-BFGS",
            experiment.WHITENING,
            experiment.FLAT,
        ]
        + [experiment.OURS] * 2
    )
    assert "L-BFGS" not in [m["name"] for m in digits["methods"]]
    assert len(digits["methods"][0]["train_loss"]) == CLASSIFICATIONS["digits"].epochs + 1
    assert all(paper["milliseconds"][name] > 0 for name in names)
    assert [a["name"] for a in doc["ablations"]] == list(experiment.ABLATIONS)
    assert all(len(a["ratios"]) == 2 and a["ratios"][0] != a["ratios"][1] for a in doc["ablations"])
    scores = doc["selection_scores"]
    published, best = metatele.load(tmp_path / "best" / "transfer"), scores.index(min(scores))
    assert published.training["seed"] == best
    assert published.scores["selection_score"] == scores[best] != scores[1 - best]
    chosen = metatele.load(tmp_path / "runs" / f"seed-{best}").optimizer.state_dict()
    assert all(torch.equal(t, chosen[name]) for name, t in published.optimizer.state_dict().items())
    table, details = (out / "table.md").read_text(), (out / "details.md").read_text()
    assert table.count("\n") == 4
    assert "no teleport at the beginning" in details
    for name in names:
        assert name in details
    runs, stored = tmp_path / "runs", paper
    assert experiment._kept(runs / "standard-paper.json", ["another key"], lambda: 5) == 5
    assert experiment._kept(runs / "standard-paper.json", ["another key"], None) == 5
    (runs / "standard-paper.json").unlink()
    for name in ("regression", "milliseconds", "ablation"):  # an interrupted run does not measure again
        monkeypatch.setattr(experiment, name, lambda *_: pytest.fail("measured again"))
    experiment.main(flags)
    assert json.loads((out / "results.json").read_text())["tasks"][0] == stored
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    experiment.main(["--redraw", "--out", str(out)])
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert (out / "time.png").read_bytes()[:4] == (out / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_bad_requests_are_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match="tasks must be among paper, narrow"):
        experiment.main(["--tasks", "everything", "--out", str(tmp_path / "no")])
    with pytest.raises(RunFolderError, match=r"no readable results\.json"):
        experiment.main(["--redraw", "--out", str(tmp_path / "no")])
    assert not (tmp_path / "no").exists()


def test_losses_of_the_suite_are_those_the_paper_has():
    assert isinstance(REGRESSIONS["paper"].loss, SquaredError)
    assert REGRESSIONS["paper"].mlp.widths == (20, 20, 20)
