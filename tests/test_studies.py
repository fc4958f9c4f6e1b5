"""The studies in benchmarks/: what is measured is what is said, and their runs are planned, kept and drawn again."""

import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import jobs  # noqa: E402
import modules  # noqa: E402
import peers  # noqa: E402
import quantise  # noqa: E402
import repair  # noqa: E402
import table1_cnn  # noqa: E402
from jobs import TUNED_ON, Runs, Study, climbed  # noqa: E402

import metatele  # noqa: E402
from metatele.optim.along import carry_along_  # noqa: E402

NOWHERE = Path("/nowhere")


@pytest.fixture(scope="module")
def arrays():
    """Noise in the shapes of the sets."""
    random = np.random.default_rng(0)
    found = {"text": random.integers(0, 65, 3000, dtype=np.uint8)}
    for name, shape in (("mnist", (28, 28)), ("fashion", (28, 28)), ("cifar", (3, 32, 32))):
        for split, count in (("train", 100), ("test", 20)):
            found[f"{name}_{split}_x"] = random.integers(0, 256, (count, *shape), dtype=np.uint8)
            found[f"{name}_{split}_y"] = random.integers(0, 10, count, dtype=np.uint8)
    return found


# --- plans and files


@dataclass(frozen=True)
class Rate:
    lr: float


@pytest.mark.parametrize(("best", "tried"), [(0.03, 3), (0.001, 6), (3.0, 7)])
def test_the_best_rate_has_worse_ones_on_both_sides(best, tried):
    runs = Runs(NOWHERE, Rate)
    for _ in range(10):
        missing, found = climbed(runs, Rate, (0.01, 0.03, 0.1), lambda row: row["loss"])
        if not missing:
            break
        runs.rows.update({job: {"lr": job.lr, "loss": abs(math.log(job.lr / best))} for job in missing})
    assert found == best
    assert len(runs.rows) == tried
    rates = sorted(job.lr for job in runs.rows)
    assert rates[0] < best < rates[-1]


def test_a_rate_that_never_works_ends_the_search():
    runs = Runs(NOWHERE, Rate)
    while missing := climbed(runs, Rate, (0.01, 0.03, 0.1), lambda row: math.inf)[0]:
        runs.rows.update({job: {"lr": job.lr} for job in missing})
    assert len(runs.rows) == jobs.MOST_RATES


def toy(done):
    def run(job, arrays):
        done.append(job.lr)
        return {**asdict(job), "loss": job.lr}

    return Study(
        Rate,
        run,
        lambda runs, seeds: [job for job in map(Rate, map(float, range(seeds))) if job not in runs.rows],
        seconds=lambda job: 1.0,
        part=lambda job: ("everywhere", "toy"),
        result=lambda runs: {"losses": [row["loss"] for row in runs.rows.values()]},
        table=lambda doc: f"| {sum(doc['losses'])} |",
        drawn=lambda doc: b"PNG",
    )


def test_a_study_goes_on_where_it_was_killed_keeps_to_its_time_and_is_drawn_again(tmp_path, monkeypatch, arrays):
    monkeypatch.setattr(jobs, "unpacked", lambda path: arrays)
    done = []
    to = ["--json", str(tmp_path / "toy.json")]
    data = ["--data", "unread"]
    jobs.main(toy(done), "A toy.", 3, [*to, *data, "--seeds", "2"])
    with (tmp_path / "toy.raw.jsonl").open("a") as file:
        file.write('{"lr": 2.0, "lo')
    jobs.main(toy(done), "A toy.", 3, [*to, *data, "--limit-s", "0.5"])
    assert done == [0.0, 1.0]
    jobs.main(toy(done), "A toy.", 3, [*to, *data])
    assert done == [0.0, 1.0, 2.0]
    first = (tmp_path / "toy.json").read_text()
    assert json.loads(first)["losses"] == [0.0, 1.0, 2.0]
    for name in ("toy.json", "toy.md", "toy.png"):
        (tmp_path / name).rename(tmp_path / f"{name}.old")
    (tmp_path / "toy.json.old").rename(tmp_path / "toy.json")
    jobs.main(toy(done), "A toy.", 3, [*to, "--redraw"])
    assert done == [0.0, 1.0, 2.0]
    assert (tmp_path / "toy.json").read_text() == first
    assert (tmp_path / "toy.md").read_text() == "| 3.0 |\n"
    assert (tmp_path / "toy.png").read_bytes() == b"PNG"


def filled(study, row_of, rounds=20, seeds=3):
    """All runs of a study, answered by a function of the job."""
    runs = Runs(NOWHERE, study.kind)
    for _ in range(rounds):
        missing = study.missing(runs, seeds)
        if not missing:
            return runs
        runs.rows.update({job: {**asdict(job), **row_of(job)} for job in missing})
    raise AssertionError("the plan does not end")


# --- repair


def test_all_starts_compute_the_same_and_a_balance_leads_away_from_a_bad_one(arrays):
    x = torch.from_numpy(arrays["cifar_train_x"][:4]).float() / 255
    good, bad, balanced = (repair.started(repair.Job("cnn", "SGD", s, 0, 0.1), x) for s in repair.STARTS)
    with torch.no_grad():
        for other in (bad, balanced):
            torch.testing.assert_close(other(x), good(x), rtol=1e-4, atol=1e-5)
    sizes = [sum(float(p.detach().square().sum()) for p in m.parameters()) for m in (good, bad, balanced)]
    assert sizes[2] < sizes[0] < sizes[1]


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW", "Muon"])
def test_a_run_of_repair_is_the_same_again(optimizer, arrays):
    job = repair.Job("resnet", optimizer, "balanced", 0, 0.01)
    first, second = (repair.trained(job, arrays, steps=2) for _ in range(2))
    assert first["end"] == second["end"] != first["begin"]


def test_repairs_table_tells_what_is_mended():
    above = {"good": 0.0, "bad": 0.5, "balanced": 0.01}

    def row_of(job):
        rate = 0.03 if job.start == "bad" else 0.1
        noise = 0.02 * (job.seed % 3 - 1) if job.start == "balanced" else 0.0
        return {"end": 1 + above[job.start] + noise + abs(math.log(job.lr / rate))}

    doc = repair.result(filled(repair.STUDY, row_of))
    assert len(doc["rows"]) == len(repair.NETWORKS) * len(repair.OPTIMIZERS) * 3
    by = {r["start"]: r for r in doc["rows"] if (r["network"], r["optimizer"]) == ("gpt", "momentum")}
    assert by["good"]["lr"] == by["balanced"]["lr"] == 0.1
    assert by["bad"]["lr"] == 0.03
    assert not any(r["at_edge"] for r in doc["rows"])
    assert by["bad"]["above"]["mean"] == pytest.approx(0.5)
    assert by["balanced"]["above"]["mean"] == pytest.approx(0.01)
    assert repair.mended(by["balanced"])
    assert not repair.mended(by["bad"])
    assert "lowest or highest" not in repair.table(doc)
    assert "0 of 18 bad starts, 18 of 18 balanced ones" in repair.table(doc)
    assert repair.drawn(doc)[1:4] == b"PNG"


# --- modules


def spaces_and_inputs(name, arrays):
    torch.manual_seed(0)
    task = modules.TASKS[name]
    model, (x, y) = task.model(), task.split(arrays).subset
    return task, model, x[:4], y[:4], metatele.find_symmetries(model, x[:4])


@pytest.mark.parametrize("name", modules.NETWORKS)
def test_a_random_move_has_the_size_that_is_asked_for_and_keeps_outputs(name, arrays):
    _, model, x, _, found = spaces_and_inputs(name, arrays)
    with torch.no_grad():
        before = model(x)
    old = {n: t.clone() for n, t in modules.named(model).items()}
    spaces = [s for s in found.spaces if s.group != "perm"]
    modules.random_move_(model, spaces, 0.1, torch.Generator().manual_seed(0))
    assert modules.change(old, modules.named(model)) == pytest.approx(0.1, rel=0.01)
    with torch.no_grad():
        torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


def test_muons_memories_follow_a_balance_as_gradients_do(arrays):
    task, model, x, y, found = spaces_and_inputs("cnn", arrays)
    model = model.double()
    optimizer = peers.FlatMuon(model, 0.0, 0.0, 0.0)
    task.loss(model(x.double()), y).backward()
    optimizer.step()
    carry_along_(modules.memories(optimizer), model, metatele.balance_(model, x.double(), found=found))
    optimizer.zero_grad()
    task.loss(model(x.double()), y).backward()
    for p, flat in optimizer.pairs:
        memory = optimizer.muon.state[flat]["momentum_buffer"].view_as(p)
        factor = float((memory * p.grad).sum() / p.grad.square().sum())
        torch.testing.assert_close(memory, factor * p.grad, rtol=1e-3, atol=1e-6)
        assert factor > 0


@pytest.mark.parametrize("arm", modules.ARMS)
def test_arms_move_when_they_are_said_to(arm, arrays, monkeypatch):
    monkeypatch.setattr(modules, "EVERY", 2)
    row = modules.trained(modules.Job("cnn", "Adam", arm, 0, 1e-3), arrays, steps=3)
    assert len(row["changes"]) == (1 if arm.endswith("start") else 2)
    assert row["moves_s"] > 0
    if arm.startswith("ascent"):
        assert min(row["gains"]) > 1.1
    if arm == "random, start":
        ascent = modules.trained(modules.Job("cnn", "Adam", "ascent, start", 0, 1e-3), arrays, steps=3)
        assert row["changes"][0] == pytest.approx(ascent["changes"][0], rel=0.01)


def test_modules_table_counts_intervals_that_leave_out_zero():
    def row_of(job):
        noise = 0.001 * (job.seed % 3)
        move = 0.3 * job.arm.startswith("random") - 0.2 * job.arm.startswith("balance") + noise * (job.arm != "none")
        loss = 1 + move + abs(math.log(job.lr / 0.03))
        told = {"gains": [2.0], "changes": [0.1], "drifts": [0.0]} if job.arm != "none" else {}
        return {"train": loss, "held_out": loss, "steps_s": 10.0, "moves_s": 2.0 * (job.arm != "none"), **told}

    runs = filled(modules.STUDY, row_of)
    shown = [job for job in runs.rows if job.seed != TUNED_ON]
    assert len(shown) == 2 * 4 * 7 * 3
    doc = modules.result(runs)
    text = modules.table(doc)
    assert "balance 16 better, 0 worse, of 16; random 0 better, 16 worse, of 16" in text
    assert {round(r["time_ratio"], 6) for r in doc["rows"]} == {1.0, 1.2}
    assert modules.drawn(doc)[1:4] == b"PNG"


# --- rounding


@pytest.mark.parametrize("bits", [4, 8])
def test_rounded_weights_lie_on_their_grid_as_near_as_they_can(bits):
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(5, 6)).double()
    most = 2 ** (bits - 1) - 1
    for each in quantise.STEPS_FOR:
        twin = quantise.rounded(layer, bits, each)
        for name, p in layer.named_parameters():
            q = dict(twin.named_parameters())[name]
            if p.ndim < 2:
                assert torch.equal(p, q)
                continue
            rows = p.detach().flatten(1)
            size = rows.abs().amax(1, keepdim=True) if each == "channel" else rows.abs().amax().view(1, 1)
            levels = q.detach().flatten(1) / (size / most)
            torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-9)
            assert levels.abs().max() <= most + 1e-9
            assert ((q.detach().flatten(1) - rows).abs() <= size / most / 2 + 1e-12).all()


def test_both_points_of_a_network_are_balanced_to_the_same_rounding(arrays):
    row = quantise.trained(quantise.Job("CNN, fashion", 0), arrays, steps=3)
    for key in ("", *(f"; {b} bits, {e}" for b in quantise.BITS for e in quantise.STEPS_FOR)):
        one, other = (row["losses"][f"{start}, balanced{key}"] for start in ("trained", "random"))
        assert one == pytest.approx(other, abs=1e-3)
    doc = quantise.result(filled(quantise.STUDY, lambda job: {k: row[k] for k in ("losses", "accuracies")}, seeds=2))
    assert len(doc["rows"]) == len(quantise.KINDS) * 8
    assert "From random points" in quantise.table(doc)
    assert quantise.drawn(doc)[1:4] == b"PNG"


# --- small CNNs


def test_the_curvature_of_a_hyperbola():
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False))
    spaces = [s for s in metatele.find_symmetries(model, torch.randn(4, 1)).spaces if s.group == "scale"]
    at = {name: torch.ones(1, 1) for name in ("0.weight", "2.weight")}
    found = table1_cnn.curvature(spaces, at, [torch.tensor([2.0], dtype=torch.float64)])
    assert found == pytest.approx(0.5**0.5)  # of u v = 1 at (1, 1), however fast it is run through


def test_networks_in_one_program_are_those_trained_alone(arrays):
    split = table1_cnn.TASK.split(arrays)
    together = table1_cnn.models(table1_cnn.Job(0, 3), split, 5)
    alone = table1_cnn.models(table1_cnn.Job(2, 1), split, 5)[0]
    for a, b in zip(together[2].parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_sharpness_leaves_the_network_as_it_was_and_the_table_has_every_quantity(arrays):
    split = table1_cnn.TASK.split(arrays)
    (model,) = table1_cnn.models(table1_cnn.Job(0, 1), split, 1)
    before = [p.clone() for p in model.parameters()]
    values = table1_cnn.phi(model, split, 2)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert values["sharpness"] == pytest.approx(values["train_loss"], rel=0.05)
    assert values["even_rise"] != 0

    def networks(job):
        each = range(job.first, job.first + job.count)
        base = {"sharpness": 1.0, "even_rise": 0.1, "curvature": 0.5}
        return {"networks": [{"seed": n, **base, "train_loss": 0.1 * n, "test_loss": 0.1 * n + n % 2} for n in each]}

    doc = table1_cnn.result(filled(table1_cnn.STUDY, networks, seeds=7))
    assert doc["kept"] == 7
    assert doc["correlations"]["curvature"]["r"] is None  # it does not vary
    assert 0 < doc["correlations"]["train_loss"]["r"] < 1
    assert "7 networks" in table1_cnn.table(doc)
    assert table1_cnn.drawn(doc)[1:4] == b"PNG"
