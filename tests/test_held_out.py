"""The experiment `transfer`: its problems, its baselines, its tables."""

import json
import math
from pathlib import Path

import pytest
import torch

import metatele
from metatele.errors import ConfigError, RunFolderError
from metatele.experiments import transfer as experiment
from metatele.experiments.transfer.methods import recorded, summary
from metatele.experiments.transfer.report import SHOWN, details, table
from metatele.experiments.transfer.results import FLAT, OURS, PATIENT, WHITENING, from_json, to_json
from metatele.experiments.transfer.selection import kept
from metatele.experiments.transfer.study import ABLATIONS, Study
from metatele.perceptron.losses import CrossEntropy, SquaredError
from metatele.perceptron.mlp import MLP
from metatele.tasks.fitting import Fitting
from metatele.tasks.held_out import CLASSIFICATIONS, REGRESSIONS
from metatele.training.baselines import EVERYWHERE, Baseline, Muon, run_candidates
from metatele.training.report import markdown

ROOT = Path(__file__).resolve().parent.parent
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
    found = summary("SGD", {"lr": 0.1}, losses)
    assert found.steps == [0, 1]
    assert found.mean == [2.0, None]
    assert found.median == [2.0, 4.0]
    assert found.highest_over_first is None
    assert found.diverged == 1
    assert (found.at(0), found.at(1), found.reached(2.0), found.reached(1.0)) == (2.0, math.inf, 0, None)
    assert math.isnan(found.at(7))
    assert recorded(1000)[-3:] == [900, 950, 1000]
    assert set(SHOWN) <= set(recorded(1000))


# Few problems, steps and candidates, and a short meta-training.
SMALL = Study(
    problems=3,
    networks=2,
    tuning=2,
    alone=2,
    alone_steps=12,
    steps=12,
    target=10,
    baselines=FEW,
    whitening=({"rate": 0.1, "damping": 0.01},) * 2,
    training={
        "batch": 2,
        "groups": 2,
        "horizon": 4,
        "shorter": (),
        "unroll": 2,
        "widest": 9,
        "hidden": 8,
        "trajectories": 4,
        "validation_trajectories": 4,
        "validation_steps": 4,
        "validation_score_at": (4,),
    },
    ablations=dict(list(ABLATIONS.items())[:2]),
    ablation_trajectories=4,
    selection={"seed": 1000, "validation_trajectories": 4},
    selection_hidden=((20,),),
    selection_steps=40,
)
NAMES = ["SGD", "Momentum", "Adam", PATIENT, "AdamW", "Muon", "L-BFGS", WHITENING, FLAT, OURS, OURS]


def test_the_experiment_runs_goes_on_redraws_and_shows_every_method(tmp_path):
    flags = ["--seeds", "2", "--tasks", "paper", "digits", "--ablations"]
    flags += ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--publish", str(tmp_path / "best")]
    experiment.main(flags, SMALL)
    out, runs = tmp_path / "out", tmp_path / "runs"
    document = json.loads((out / "results.json").read_text())
    results = from_json(document)
    assert json.loads(json.dumps(to_json(results))).items() <= document.items()
    paper, digits = results.tasks
    assert [m.name for m in paper.methods] == NAMES
    assert [m.meta_seed for m in paper.methods[-2:]] == [0, 1]
    assert "L-BFGS" not in [m.name for m in digits.methods]
    assert len(digits.methods[0].train_loss) == CLASSIFICATIONS["digits"].epochs + 1
    assert all(paper.milliseconds[name] > 0 for name in NAMES)
    assert [a.name for a in results.ablations] == list(SMALL.ablations)
    assert all(len(a.ratios) == 2 and a.ratios[0] != a.ratios[1] for a in results.ablations)
    scores = results.selection_scores
    published, best = metatele.load(tmp_path / "best" / "transfer"), scores.index(min(scores))
    assert published.training["seed"] == best
    assert published.scores["selection_score"] == scores[best] != scores[1 - best]
    chosen = metatele.load(runs / f"seed-{best}").optimizer.state_dict()
    assert all(torch.equal(t, chosen[name]) for name, t in published.optimizer.state_dict().items())
    rows, more = (out / "table.md").read_text(), (out / "details.md").read_text()
    assert rows.count("\n") == 4
    assert "of 10 |" in rows or "not reached" in rows
    assert "no teleport at the beginning" in more
    for name in NAMES:
        assert name in more

    written = {p: p.stat().st_mtime_ns for p in runs.rglob("*.json")}
    (runs / "standard-paper.json").unlink()
    experiment.main(flags, SMALL)  # measures what is missing, and nothing else again
    again = {p: p.stat().st_mtime_ns for p in runs.rglob("*.json")}
    assert {p.name for p in again if again[p] != written[p]} == {"standard-paper.json"}
    assert json.loads((out / "results.json").read_text())["tasks"] == document["tasks"]

    before = {p.name: p.read_bytes() for p in out.iterdir()}
    experiment.main(["--redraw", "--out", str(out)])
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert (out / "time.png").read_bytes()[:4] == (out / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_what_is_kept_is_measured_once_under_the_same_circumstances(tmp_path):
    made = []

    def make():
        made.append(len(made))
        return {"value": made[-1]}

    for key, value in ((["a"], 0), (["a"], 0), (["b"], 1), (["b"], 1)):
        assert kept(tmp_path / "k.json", key, make) == {"value": value}
    (tmp_path / "k.json").write_text("cut sho")
    assert kept(tmp_path / "k.json", ["b"], make) == {"value": 2}


def test_the_published_tables_are_made_of_the_stored_results_to_the_byte():
    stored = ROOT / "results" / "transfer"
    results = from_json(json.loads((stored / "results.json").read_text()))
    assert markdown(table(results)) == (stored / "table.md").read_text()
    assert details(results) == (stored / "details.md").read_text()


def test_stored_results_of_another_version_are_one_sentence(tmp_path):
    document = json.loads((ROOT / "results" / "transfer" / "results.json").read_text())
    for change in ({"tasks": [{**document["tasks"][0], "kind": "ranking"}]}, {"tasks": [{"kind": "regression"}]}):
        (tmp_path / "results.json").write_text(json.dumps({**document, **change}))
        with pytest.raises(RunFolderError, match=r"results\.json does not hold results of this version"):
            experiment.main(["--redraw", "--out", str(tmp_path)])


def test_bad_requests_are_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match="tasks must be among paper, narrow"):
        experiment.main(["--tasks", "everything", "--out", str(tmp_path / "no")])
    with pytest.raises(RunFolderError, match=r"no readable results\.json"):
        experiment.main(["--redraw", "--out", str(tmp_path / "no")])
    assert not (tmp_path / "no").exists()


def test_losses_of_the_suite_are_those_the_paper_has():
    assert isinstance(REGRESSIONS["paper"].loss, SquaredError)
    assert REGRESSIONS["paper"].mlp.widths == (20, 20, 20)
