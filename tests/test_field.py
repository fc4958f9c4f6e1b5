"""The benchmark of ordinary situations: what it trains, how it judges, what it keeps."""

import copy
import itertools
import json
import math
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import field
import field_data
from field_situations import SITUATIONS, Situation, perceptron, poisson

from metatele.command_line import run_program
from metatele.errors import DataError


def made(name, seed=0):
    try:
        return SITUATIONS[name].make(seed)
    except DataError:
        pytest.skip("the image sets are not here")


def shortened(name, steps):
    """The same situation with fewer steps."""

    def make(seed):
        run = SITUATIONS[name].make(seed)
        run.steps = steps
        return run

    return Situation(name, make)


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.1)


def still(model):
    return torch.optim.SGD(model.parameters(), 0.0)


# --- situations


def test_there_are_many():
    assert len(SITUATIONS) >= 48


@pytest.mark.parametrize("name", SITUATIONS)
def test_a_seed_decides_weights_and_batches(name):
    first, again, other = made(name), made(name), made(name, 1)
    weights = [torch.cat([p.detach().flatten() for p in run.model.parameters()]) for run in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    for (x, y), (u, v) in itertools.islice(zip(first.batches(), again.batches(), strict=True), 3):
        assert torch.equal(x, u)
        assert torch.equal(y, v)
    assert len(first.data.held_out[0]) >= 20
    loss = first.loss(first.model(x), y)
    assert loss.ndim == 0
    assert loss > 0
    loss.backward()


def test_an_epoch_has_every_row_once_and_a_full_batch_repeats():
    run = made("digits, batch 4")
    rows = len(run.data.train[0]) // 4
    one = torch.cat([x for x, _ in itertools.islice(run.batches(), rows)])
    assert len(one.unique(dim=0)) == 4 * rows  # no two images are the same
    (x, _), (u, _) = itertools.islice(made("digits, one batch").batches(), 2)
    assert x is u


def test_data_that_change_change_at_once_and_only_later_losses_count():
    name = "digits 0 to 4, then 5 to 9"
    run = made(name)
    batches = run.batches()
    assert all(next(batches)[1].max() < 5 for _ in range(13))  # in the midst of an epoch of 11
    run.at[150](run)
    assert all(next(batches)[1].min() >= 5 for _ in range(13))
    result = field.run_situation(SITUATIONS[name], 0, sgd)
    later = [loss for step, loss in result["curve"] if step > 150]
    assert result["held_out_best"] == min(later) > min(loss for _, loss in result["curve"])


def test_a_frozen_layer_does_not_move_before_its_time():
    weights = {}

    def watching(model):
        first = next(model.children())
        weights["start"] = first.weight.detach().clone()
        first.weight.register_hook(lambda _: weights.setdefault("freed", first.weight.detach().clone()))
        weights["end"] = first.weight
        return sgd(model)

    def make(seed):
        run = SITUATIONS["first layer freed at 42"].make(seed)
        next(run.model.children()).requires_grad_(True)  # to take the hook
        run.at[0] = lambda run: next(run.model.children()).requires_grad_(False)
        run.steps = 50
        return run

    field.run_situation(Situation("", make), 0, watching)
    assert torch.equal(weights["start"], weights["freed"])
    assert not torch.equal(weights["start"], weights["end"])


def test_nothing_follows_the_last_layer():
    for settings in ({}, {"norm": nn.LayerNorm}, {"dropout": 0.1}, {"norm": nn.LayerNorm, "dropout": 0.1}):
        assert isinstance(perceptron((3, 4, 2), **settings)[-1], nn.Linear)


def test_the_poisson_loss_is_minus_the_log_probability():
    rate, counts = torch.tensor([[0.5], [3.0]]), torch.tensor([[2.0], [1.0]])
    expected = -torch.distributions.Poisson(rate).log_prob(counts).mean()
    assert torch.isclose(poisson(rate.log(), counts), expected)


# --- runs


def test_a_run_is_the_loop_that_everyone_writes():
    run = made("digits, batch 8, SiLU")
    optimizer, batches = torch.optim.Adam(run.model.parameters(), 1e-2), run.batches()
    for _ in range(20):
        x, y = next(batches)
        optimizer.zero_grad()
        run.loss(run.model(x), y).backward()
        optimizer.step()
    x, y = run.data.held_out
    with torch.no_grad():
        expected = float(run.loss(run.model(x), y))
    result = field.run_situation(shortened("digits, batch 8, SiLU", 20), 0, field.method("adam:1e-2"))
    assert result["held_out_end"] == expected
    assert [step for step, _ in result["curve"]][:6] == [0, 1, 2, 3, 4, 5]
    assert result["curve"][-1] == [20, expected]


def test_passes_that_are_accumulated_are_one_batch():
    parts = shortened("4 passes of 8 a step", 5)

    def whole(seed):
        run = parts.make(seed)
        run.batch, run.accumulate = 32, 1
        return run

    a, b = (field.run_situation(s, 0, sgd) for s in (parts, Situation("", whole)))
    assert math.isclose(a["held_out_end"], b["held_out_end"], rel_tol=1e-5)


def test_a_look_leaves_the_network_as_it_was():
    run = made("BatchNorm")
    before = copy.deepcopy(run.model.state_dict())
    field.loss_of(run, run.data.held_out)
    assert run.model.training
    assert all(torch.equal(v, before[k]) for k, v in run.model.state_dict().items())
    result = field.run_situation(shortened("digits, logistic regression", 12), 0, still)
    assert result["held_out_best"] == result["held_out_end"] == result["start"]


def test_a_schedule_and_groups_act_on_the_optimizers_own_rate():
    seen = {}

    def keeping(model, params=None):
        seen["optimizer"] = torch.optim.SGD(params or model.parameters(), 0.1)
        return seen["optimizer"]

    field.run_situation(SITUATIONS["cosine on top"], 0, keeping)
    assert seen["optimizer"].param_groups[0]["lr"] < 1e-6
    field.run_situation(shortened("two groups", 2), 0, keeping)
    assert [group["lr"] for group in seen["optimizer"].param_groups] == [0.1, pytest.approx(0.03)]


def test_weight_decay_takes_the_same_off_at_every_rate():
    for name, lr in (("adam", 1e-3), ("adam", 1e-2), ("sgd", 0.1)):
        model = nn.Linear(3, 2)
        before = model.weight.detach().clone()
        optimizer = field.method(f"{name}:{lr}")(model, weight_decay=1e-4)
        model.weight.grad = torch.zeros_like(model.weight)
        optimizer.step()
        assert torch.allclose(model.weight, before * (1 - 1e-4), rtol=0, atol=1e-7)


def test_a_factory_gets_the_settings_that_it_takes():
    settings = {"weight_decay": 1e-4, "params": []}
    assert field.taken(sgd, settings) == {}
    assert field.taken(field.adam, settings) == settings
    assert field.taken(field.learned, settings) == settings
    field.run_situation(shortened("weight decay", 2), 0, sgd)


def test_a_loss_that_is_not_finite_is_said_to_be():
    result = field.run_situation(
        shortened("diabetes, batch 32", 20), 0, lambda model: torch.optim.SGD(model.parameters(), 1e30)
    )
    assert not result["finite"]
    assert result["held_out_end"] == math.inf


# --- judgement


def losses(train, best, end, **more):
    return {"train": train, "held_out_best": best, "held_out_end": end, "ms_per_step": 1.0, "finite": True, **more}


@pytest.mark.parametrize(
    ("ours", "fine"),
    [
        (losses(1.0, 1.0, 1.0), True),
        (losses(1.1, 1.05, 9.0), True),
        (losses(0.1, 1.06, 0.1), False),  # no early stopping would have helped
        (losses(1.2, 1.0, 1.0), True),  # worse in training, not held out
        (losses(1.2, 1.0, 1.1), False),
        (losses(math.inf, 1.0, math.inf), False),
    ],
)
def test_fine_is_as_the_page_says(ours, fine):
    assert field.is_fine(ours, losses(1.0, 1.0, 1.0), start=2.0) is fine


def test_a_training_loss_counts_as_solved_relative_to_the_first():
    ours, other = losses(9e-4, 1.0, 1.2), losses(1e-8, 1.0, 1.0)
    assert field.is_fine(ours, other, start=2.0)
    assert not field.is_fine(ours, other, start=1e-3)


def test_a_row_is_beside_the_better_rate_and_a_refusal_is_not_fine():
    ours = [losses(1.0, 1.0, 1.0, start=2.0), losses(1.0, 4.0, 4.0, start=2.0)]
    arms = {1e-3: [losses(1.0, 9.0, 9.0)] * 2, 1e-2: [losses(1.0, 2.0, 2.0)] * 2}
    row = field.row("x", ours, arms)
    assert row["adam"]["lr"] == 1e-2
    assert row["held_out_best_ratio"] == pytest.approx(1.0)  # the geometric mean of 1/2 and 2
    assert (row["fine"], row["fine_seeds"], row["wild"]) == (True, 1, False)
    refused = field.row("x", [{"error": "TypeError: no"}, ours[0]], arms)
    assert (refused["fine"], refused["ours"], refused["error"]) == (False, None, "TypeError: no")
    wild = field.row("x", [losses(3.0, 9.0, 9.0, start=2.0)] * 2, arms)
    unending = field.row("x", [losses(0.1, 0.1, math.inf, start=2.0, finite=False)] * 2, arms)
    assert wild["wild"]
    assert unending["wild"]
    assert not unending["fine"]
    total = field.summary([row, refused, wild, unending])
    assert [total[k] for k in ("situations", "fine", "wild", "not_finite", "refused")] == [4, 1, 2, 1, 1]
    lost = [losses(math.inf, math.inf, math.inf)] * 2
    assert field.row("x", [{**run, "start": 2.0} for run in lost], {1e-3: lost})["train_ratio"] == math.inf
    json.dumps(field.finite([row, refused, wild, unending]), allow_nan=False)


# --- the command


def run(*arguments):
    field.main([str(a) for a in arguments])


def test_the_command_measures_keeps_adam_and_prints_again(tmp_path, capsys):
    only = ("--only", "xor among 20 columns, one batch", "--seeds", 2, "--method", "adam:0.01")
    files = ("--baseline", tmp_path / "adam.json", "--json", tmp_path / "field.json")
    run(*only, *files)
    printed = capsys.readouterr().out
    kept = (tmp_path / "adam.json").read_bytes()
    (row,) = json.loads((tmp_path / "field.json").read_text())["rows"]
    assert len(json.loads(kept)["runs"]) == 4  # two seeds, two rates
    if row["adam"]["lr"] == 0.01:
        assert row["held_out_best_ratio"] == 1.0
    assert row["fine"]
    run("--redraw", tmp_path / "field.json")
    assert capsys.readouterr().out == printed
    run(*only, *files)
    assert "Adam" not in capsys.readouterr().err  # nothing had to be run again
    assert (tmp_path / "adam.json").read_bytes() == kept
    stale = json.loads(kept)
    for result in stale["runs"].values():
        result["steps"] += 1
    (tmp_path / "adam.json").write_text(json.dumps(stale))
    run(*only, *files)
    assert "Adam" in capsys.readouterr().err


def test_a_situation_without_its_data_is_skipped_and_an_error_of_the_optimizer_is_a_row(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("METATELE_DATA", str(tmp_path))
    monkeypatch.setattr(field, "learned", lambda *_, **__: 1 / 0)
    field_data.subset.cache_clear()
    run("--only", "MNIST, batch 128", "iris, one batch, Tanh", "--seeds", 1, "--json", tmp_path / "f.json")
    result = json.loads((tmp_path / "f.json").read_text())
    assert list(result["skipped"]) == ["MNIST, batch 128"]
    assert result["rows"][0]["error"].startswith("ZeroDivisionError")
    assert "skipped" in capsys.readouterr().out


def test_what_an_optimizer_warns_of_is_kept(monkeypatch):
    def warning(model, **_):
        warnings.warn("I stand still", stacklevel=1)
        return still(model)

    monkeypatch.setattr(field, "learned", warning)
    _, result = field.job(("digits, logistic regression", 0, "ours"))
    assert result["warnings"] == ["I stand still"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--only", "nothing"), "no situation 'nothing'"),
        (("--method", "adam:fast"), "takes a rate"),
        (("--method", "nobody"), "--method must be"),
        (("--seeds", "0"), "at least 1"),
        (("--redraw", "nowhere.json"), "is not a file of this benchmark"),
        (("--baseline", __file__), "is not a file of this benchmark"),
    ],
)
def test_bad_input_gets_one_line(arguments, said, capsys):
    with pytest.raises(SystemExit) as left:
        run_program(field.main, "field.py", arguments)
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
