"""The plan, the bookkeeping and the summary of benchmarks/breadth.py; its tasks at their smallest."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import breadth  # noqa: E402
import breadth_runs  # noqa: E402
import breadth_summary  # noqa: E402
import breadth_tasks  # noqa: E402
import peers  # noqa: E402
from breadth import Raw, missing, tuned, work  # noqa: E402
from breadth_runs import Job, trained  # noqa: E402
from jobs import Here  # noqa: E402


@pytest.fixture(scope="module")
def arrays():
    """Noise in the shapes of the sets."""
    random = np.random.default_rng(0)
    found = {
        "digits_x": random.integers(0, 17, (200, 64), dtype=np.uint8),
        "digits_y": random.integers(0, 10, 200, dtype=np.uint8),
        "friedman_x": random.random((1200, 10), dtype=np.float32),
        "friedman_y": random.random(1200, dtype=np.float32),
        "text": random.integers(0, 65, 3000, dtype=np.uint8),
    }
    for name, shape in (("mnist", (28, 28)), ("fashion", (28, 28)), ("cifar", (3, 32, 32))):
        for split, count in (("train", 100), ("test", 20)):
            found[f"{name}_{split}_x"] = random.integers(0, 256, (count, *shape), dtype=np.uint8)
            found[f"{name}_{split}_y"] = random.integers(0, 10, count, dtype=np.uint8)
    return found


def row(job, held_out, **more):
    base = {"task": job.task, "method": job.method, "seed": job.seed, "settings": job.settings, "steps": 20}
    ids = {"lr": job.lr, "weight_decay": job.weight_decay, "rest_lr": job.rest_lr}
    curves = {"at": [0, 10, 20], "train": [3.0, 2.0, 1.0], "held_out": held_out, "train_end": 1.0}
    return {**base, **ids, **curves, "ms_per_step": 2.0, "failed": "", **more}


# --- runs


@pytest.mark.parametrize("name", [n for n in breadth_tasks.TASKS if n != "gpt-4x128"])
def test_a_run_of_every_task_has_the_documented_row_and_is_the_same_again(name, arrays):
    job = Job(name, "adamw", 1000, 1e-3)
    first, second = (trained(job, arrays, steps=2) for _ in range(2))
    assert first["at"] == [0, 1, 2]
    assert len(first["train"]) == len(first["held_out"]) == 3
    assert not first["failed"]
    for key in ("train", "held_out", "train_end"):
        assert first[key] == second[key]
    assert json.loads(json.dumps(first, allow_nan=False)) == first


def test_two_seeds_differ_in_weights_and_batches_and_not_in_what_judges_them(arrays):
    a, b = (trained(Job("digits", "adamw", seed, 1e-3), arrays, steps=2) for seed in (0, 1))
    assert a["held_out"][0] != b["held_out"][0]
    assert a["at"] == b["at"]


@pytest.mark.parametrize("method", [m for m in peers.METHODS if m not in peers.OURS])
@pytest.mark.parametrize("task", ["digits", "autoencoder", "attention"])
def test_every_peer_lowers_the_loss_of_samples_it_sees(method, task, arrays):
    if method not in ("adamw", "muon"):
        pytest.importorskip("pytorch_optimizer")
    rate = 0.02 if method == "muon" else 0.005
    steps = 60 if method == "prodigy" else 30
    done = trained(Job(task, method, 0, rate, 0.0, 0.005 if method == "muon" else 0.0), arrays, steps=steps)
    assert not done["failed"]
    assert done["train_end"] < done["train"][0]


def test_a_run_that_diverges_keeps_its_points_and_says_where(arrays):
    done = trained(Job("friedman1", "muon", 1000, 1e30, 0.0, 1e30), arrays, steps=10)
    assert done["failed"].startswith("step ")
    assert len(done["held_out"]) == len(done["at"]) == len(done["train"])
    assert done["held_out"][-1] is None
    assert done["train_end"] is None
    assert breadth.end(done) == math.inf


def test_flattened_kernels_are_the_kernels():
    model = breadth_tasks.resnet()
    optimizer = peers.FlatMuon(model, 0.02, 0.0, 1e-3)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    for name, p in model.named_parameters():
        assert not torch.equal(p, before[name]), name
    hidden, rest = peers.divided(model)
    assert all(p.ndim == 4 for p in hidden)
    assert {id(p) for p in (*hidden, *rest)} == {id(p) for p in model.parameters()}
    change = (hidden[1] - before["body.4.conv1.weight"]).detach().flatten(1)
    values = torch.linalg.svdvals(change) / 0.02
    assert values.min() > 0.4  # an orthogonal step, as far as five iterations in bfloat16 make one
    assert values.max() < 1.4


def test_schedules_reach_both_inner_optimizers():
    optimizer = peers.FlatMuon(breadth_tasks.TASKS["digits"].model(), 0.02, 0.0, 1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5**t)
    optimizer.step()
    scheduler.step()
    assert [g["lr"] for g in (*optimizer.muon.param_groups, *optimizer.adamw.param_groups)] == [0.01, 5e-4]


def test_adamw_is_timed_beside_every_shown_run_and_changes_nothing_in_it(arrays):
    shown = trained(Job("digits", "muon", 0, 0.02, 0.0, 1e-3), arrays, steps=20, beside=True)
    assert shown["adamw_ms_per_step"] > 0
    alone = trained(Job("digits", "muon", 0, 0.02, 0.0, 1e-3), arrays, steps=20)
    assert "adamw_ms_per_step" not in alone
    assert alone["held_out"] == shown["held_out"]


def test_work_at_every_tenth_step_is_part_of_the_time():
    assert breadth_runs.block_ms([1.0] * 10 + [0.1, *[0.01] * 9] * 3) == pytest.approx(19.0)


def test_statistics_of_batchnorm_belong_to_the_weights_that_are_judged():
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3))
    x = torch.randn(500, 3) * 4 + 1
    breadth_runs.norm_statistics_(model, x)
    torch.testing.assert_close(model[0].running_mean, x.mean(0))
    assert model[0].momentum == 0.1


@pytest.mark.parametrize("method", peers.OURS)
def test_a_learned_optimizer_trains_or_says_in_one_sentence_why_not(method, arrays):
    try:
        done = trained(Job("digits", method, 0), arrays, steps=20)
    except peers.UnavailableError as error:
        pytest.skip(error.reason)
    assert done["train_end"] < done["train"][0]


# --- the plan


def planned(scores, task="digits", method="adamw", rounds=30):
    """Answer every run that the plan asks for by a score; what it chose and what it asked for."""
    raw, asked = Raw(Path("/nowhere")), []
    for _ in range(rounds):
        jobs, chosen = tuned(task, method, raw)
        if chosen is not None:
            return chosen, asked
        for job in jobs:
            asked.append(job)
            raw.rows[job] = row(job, [3.0, 2.0, scores(job)])
    raise AssertionError("the plan does not end")


@pytest.mark.parametrize(("best", "rates"), [(5e-3, 5), (1e-3, 6), (2e-4, 8), (0.1, 8)])
def test_the_best_rate_lies_inside_the_grid_and_weight_decay_is_tried_at_it(best, rates):
    chosen, asked = planned(lambda job: abs(math.log(job.lr / best)) + (0.1 if job.weight_decay else 0.2))
    assert chosen.lr == best
    assert chosen.weight_decay == 0.1
    tried = sorted({job.lr for job in asked})
    assert len(tried) == rates
    assert tried[0] < best < tried[-1]
    assert [job.lr for job in asked if job.weight_decay] == [best]
    assert {job.seed for job in asked}.isdisjoint(breadth.SHOWN)


def test_a_rate_that_never_works_ends_the_search():
    chosen, asked = planned(lambda job: None)
    assert chosen is not None
    assert len({job.lr for job in asked}) <= breadth.MOST_RATES


def test_muons_rest_has_the_rate_that_was_best_for_adamw():
    def score(job):
        return abs(math.log(job.lr / (2e-3 if job.method == "adamw" else 0.02)))

    chosen, asked = planned(score, method="muon")
    assert chosen.rest_lr == 2e-3
    assert {job.method for job in asked} == {"adamw", "muon"}


def test_what_has_nothing_to_tune_runs_at_once_and_peers_wait_for_their_settings():
    raw = Raw(Path("/nowhere"))
    now = missing(["digits"], ["adamw", "prodigy"], [0, 1], False, raw)
    assert [(job.method, job.seed) for job in now] == [("prodigy", 0), ("prodigy", 1)]
    more = missing(["digits"], ["adamw", "prodigy"], [0, 1], True, raw)
    assert {job.seed for job in more if job.method == "adamw"} == set(breadth.TUNED_ON)


def test_a_call_that_was_killed_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "b.raw.jsonl"
    done = []

    def run(job):
        done.append(job)
        return row(job, [3.0, 2.0, 1.0])

    jobs = [Job("digits", "prodigy", seed) for seed in range(4)]

    def go(limit):
        raw = Raw(path)
        return list(work(Here(), 1, raw, lambda: [j for j in jobs[:limit] if j not in raw.rows], math.inf, run))

    assert len(go(2)) == 2
    with path.open("a") as file:
        file.write('{"task": "digits", "meth')  # killed while it wrote
    assert len(go(4)) == 2
    assert done == jobs
    assert set(Raw(path).rows) == set(jobs)
    assert go(4) == []


def test_nothing_begins_that_would_end_after_the_limit(tmp_path):
    raw = Raw(tmp_path / "b.raw.jsonl")
    assert list(work(Here(), 1, raw, lambda: [Job("digits", "prodigy", 0)], 0.5)) == []


def test_a_method_that_is_not_there_is_left_out_with_one_line(tmp_path):
    def run(job):
        raise peers.UnavailableError("not built yet", True)

    jobs = [Job(task, "ours", seed) for task in ("digits", "cnn") for seed in range(3)]
    lines = list(work(Here(), 1, Raw(tmp_path / "r"), lambda: jobs, math.inf, run))
    assert lines == ["left out: ours on every task: not built yet"]


def test_packed_data_are_the_data(tmp_path, arrays):
    breadth_tasks.packed(tmp_path / "d.npz", arrays)
    found = breadth_tasks.unpacked(tmp_path / "d.npz")
    assert found.keys() == arrays.keys()
    for name, values in arrays.items():
        assert found[name].dtype == values.dtype
        np.testing.assert_array_equal(found[name], values)


# --- the summary


def test_the_share_of_steps_is_read_off_the_curve_and_time_is_measured_beside():
    rows = [row(Job("digits", "adamw", s), [3.0, 2.0, 1.0]) for s in range(3)]
    rows += [
        row(Job("digits", "ours", s), [3.0, 1.0, 0.5], ms_per_step=3.0, adamw_ms_per_step=2.0, train_end=0.4)
        for s in range(3)
    ]
    rows += [row(Job("digits", "muon", s, 0.02), [3.0, 2.5, 2.0], adamw_ms_per_step=2.0) for s in range(3)]
    found = breadth_summary.summary(rows)
    ours, muon = (found["tasks"]["digits"][m] for m in ("ours", "muon"))
    assert ours["steps_share"] == 0.5
    assert ours["time_share"] == 0.75
    assert muon["steps_share"] is None
    assert found["methods"]["muon"]["steps"]["never"] == 1
    assert found["methods"]["ours"]["train_ahead_of"] == {"muon": 1, "soap": 0}
    assert found["methods"]["ours"]["held_out_over_best_peer"]["digits"] == 0.5
    assert "never" in breadth_summary.table(found)
    assert breadth_summary.drawn(found)[1:4] == b"PNG"


def test_extra_rows_are_no_part_of_the_means():
    rows = [row(Job(t, m, 0), [3.0, 2.0, 1.0]) for t in ("digits", "gpt-4x128") for m in ("adamw", "ours")]
    found = breadth_summary.summary(rows)
    assert set(found["tasks"]) == {"digits", "gpt-4x128"}
    assert found["methods"]["ours"]["steps"]["tasks"] == 1
