"""Evolution: its gradient, its workers, its score, and runs that go on to the same bits."""

import json
import math
from dataclasses import replace

import evolving
import pytest
import torch

from metatele import checkpoint
from metatele.config import EvolutionTrainingConfig, ModulesConfig, preset, stored_config
from metatele.errors import CheckpointError, ConfigError
from metatele.tasks.modules import Modules
from metatele.training.evolution import Evolution, weights_of
from metatele.training.inner import Outcome, adam, better, fine, from_plain, plain, run, score
from metatele.training.processes import Processes
from metatele.training.run import train
from metatele.training.workers import Lost, Workers

CONFIG = EvolutionTrainingConfig()
SMALL = {
    "pairs": 3,
    "generations": 4,
    "validation_problems": 3,
    "validation_every": 2,
    "save_every": 2,
    "log_every": 1,
    "budget_ms": 30.0,
    "kinds": ("regression", "classification"),
    "held_out_samples": 64,
}


def small(**changes):
    evolving.register()
    return preset("evolved", **{**SMALL, **changes})


def test_the_estimate_is_unbiased_for_a_linear_score():
    """For s(θ) = cᵀθ the expected estimate is c, whatever σ is."""
    slope = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    config = EvolutionTrainingConfig(pairs=20_000, normalise="none", sigma=0.3, sigma_end=0.3)
    evolution = Evolution(torch.zeros(3, dtype=torch.float64), config, 0)
    noise, sigma = evolution.asked(0.0)
    norm = evolution.told(noise, 2 * sigma * (noise @ slope), sigma, 0.0)
    estimate = (noise @ slope) @ noise / len(noise)
    torch.testing.assert_close(estimate, slope, atol=0.06, rtol=0)
    assert norm == pytest.approx(float(estimate.norm()))
    assert not evolution.mean.any()  # at rate 0 nothing moves


def test_ranks_do_not_depend_on_units_and_lost_pairs_count_nothing():
    differences = torch.tensor([0.1, -3.0, 2.0, float("nan"), 0.0])
    ranks = weights_of(differences, "rank")
    assert torch.equal(ranks, weights_of(100 * differences, "rank"))
    assert ranks.tolist() == [0.5, -1.0, 0.75, 0.0, 0.0]
    z = weights_of(differences, "z")
    assert z[~differences.isnan()].square().mean() == pytest.approx(1.0)
    lost = torch.full((3,), float("nan"))
    evolution = Evolution(torch.ones(2), replace(CONFIG, pairs=3), 0)
    noise, sigma = evolution.asked(0.0)
    assert evolution.told(noise, lost, sigma, 1.0) == 0.0
    assert evolution.mean.tolist() == [1.0, 1.0]


def test_sigma_goes_from_its_first_to_its_last_value():
    evolution = Evolution(torch.ones(2), replace(CONFIG, sigma=0.4, sigma_end=0.1), 0)
    assert [evolution.asked(at)[1] for at in (0.0, 0.5, 1.0, 2.0)] == pytest.approx([0.4, 0.2, 0.1, 0.1])


ADAM = Outcome(1.0, 0.5, 0.6, 0.4)


def test_score_is_zero_for_adams_own_run_and_falls_with_each_loss():
    assert score(ADAM, ADAM, CONFIG) == 0
    for name in ("best", "end", "train"):
        less = score(ADAM._replace(**{name: 0.9 * getattr(ADAM, name)}), ADAM, CONFIG)
        more = score(ADAM._replace(**{name: 1.2 * getattr(ADAM, name)}), ADAM, CONFIG)
        assert less < 0 < more
    halved = ADAM._replace(best=0.25)
    assert score(halved, ADAM, replace(CONFIG, least_held=0.0)) == pytest.approx(-math.log(2))
    doubled = score(ADAM._replace(best=1.0), ADAM, replace(CONFIG, least_held=0.0))
    assert doubled == pytest.approx(math.log(2) + 2 * math.log(2 / 1.05))


def test_a_score_without_held_out_loss_is_that_of_training_loss_alone():
    blind = replace(CONFIG, held_best_weight=0.0, harm_weight=0.0, held_end_weight=0.0)
    assert score(ADAM._replace(best=9.0, end=9.0), ADAM, blind) == 0
    assert score(ADAM._replace(best=9.0, train=0.2), ADAM, blind) == pytest.approx(-0.3 * math.log(2))


def test_no_problem_outweighs_the_others_and_what_is_next_to_nothing_does_not_count():
    lost = ADAM._replace(end=math.inf)
    worst = ADAM._replace(best=1e30, end=1e30, train=1e30)
    assert score(lost, ADAM, CONFIG) == CONFIG.lost_score
    assert score(worst, ADAM, CONFIG) < 3 + 2 * 3 + 2 * 0.3 * 3
    assert score(ADAM._replace(train=1e-9), ADAM, CONFIG) == pytest.approx(-0.3)
    tiny = Outcome(1.0, 1e-7, 1e-7, 1e-5)
    assert abs(score(tiny._replace(best=3e-7, end=3e-7, train=5e-4), tiny, CONFIG)) < 0.3
    assert score(ADAM, lost, CONFIG) == 0  # nothing to compare with


def test_fine_is_no_worse_off_than_with_adam():
    assert fine(ADAM, ADAM, CONFIG)
    assert fine(ADAM._replace(best=0.52, train=0.43), ADAM, CONFIG)
    assert not fine(ADAM._replace(best=0.6), ADAM, CONFIG)
    assert not fine(ADAM._replace(train=0.5, end=0.7), ADAM, CONFIG)
    assert not fine(ADAM._replace(end=math.inf), ADAM, CONFIG)


def test_a_run_is_the_same_again_whatever_was_drawn_before():
    problem = Modules(ModulesConfig(budget_ms=40.0)).sample(0, "tuning", 5)
    first = run(problem, adam(1e-3))
    torch.rand(7)
    state = torch.get_rng_state()
    second = run(problem, adam(1e-3))
    assert first[:4] == second[:4]
    assert torch.equal(torch.get_rng_state(), state)
    assert better([first, first._replace(best=0.0)]).best == 0
    assert from_plain(json.loads(json.dumps(plain(first._replace(end=math.inf))))) == first._replace(end=math.inf)


def test_a_run_that_is_not_finite_says_so():
    problem = Modules(ModulesConfig(kinds=("regression",), budget_ms=40.0)).sample(0, "tuning", 1)
    outcome = run(problem, lambda model, _: torch.optim.SGD(model.parameters(), 1e30))
    assert not outcome.finite
    assert math.isfinite(outcome.first)


def test_a_worker_that_dies_raises_or_hangs_loses_its_job_alone():
    with Workers(2, evolving.square, (1,), 2.0) as workers:
        assert workers.answers([1, 2, 3]) == [2, 5, 10]
        answers = workers.answers([4, -1, 5, -2, 100, 6])
        assert [answers[i] for i in (0, 2, 5)] == [17, 26, 37]
        reasons = [answers[i].reason for i in (1, 3, 4)]
        assert all(isinstance(answers[i], Lost) for i in (1, 3, 4))
        assert reasons[0] == "its process died"
        assert "ValueError: no square" in reasons[1]
        assert reasons[2] == "took longer than 2 s"
        assert workers.answers([7]) == [50]


def test_evolution_finds_a_better_rate():
    trainer = evolving.trainer(small(pairs=6, generations=8, meta_lr=0.4, sigma=0.5, sigma_end=0.5, average=0.0))
    before, _ = trainer.validate()
    while not trainer.finished:
        trainer.step()
    after, details = trainer.validate()
    assert after < before - 0.2
    behind = {"fine", "held_out_ratio", "twice_adams", "not_finite", "lost"}
    assert set(details) == behind | {f"beginning/{name}" for name in (*behind, "score")}
    assert details["beginning/score"] == before


def test_results_do_not_depend_on_the_number_of_workers_and_go_on_to_the_same_bits():
    alone, shared = evolving.trainer(small()), evolving.trainer(small(workers=2))
    for trainer in (alone, shared):
        trainer.step()
        trainer.step()
    assert torch.equal(alone.evolutions[0].mean, shared.evolutions[0].mean)
    shared.close()
    state = alone.state_dict()
    again = evolving.trainer(stored_config(state["config"]))
    again.load_state_dict(state)
    for trainer in (alone, again):
        trainer.step()
    assert torch.equal(alone.evolutions[0].mean, again.evolutions[0].mean)
    assert torch.equal(alone.optimizer.log_rate, again.optimizer.log_rate)
    assert alone.started == again.started == 9
    with pytest.raises(CheckpointError, match="does not fit its configuration"):
        again.load_state_dict({**state, "evolutions": [{**state["evolutions"][0], "mean": torch.zeros(2)}]})


def test_evolutions_side_by_side_are_those_of_their_seeds_and_their_mean_is_published(tmp_path):
    """Seeds 2 and 3 in one run are the runs of seed 2 and of seed 3, and Adam runs once for both."""
    config = replace(small(meta_seeds=2, pool=4, meta_lr=0.1), seed=2)
    trainer = train(config, tmp_path / "run", quiet=True)
    alone = [evolving.trainer(replace(small(pool=4, meta_lr=0.1), seed=seed)) for seed in (2, 3)]
    for one in alone:
        while not one.finished:
            one.step()
    for evolution, one in zip(trainer.evolutions, alone, strict=True):
        assert torch.equal(evolution.averaged, one.averaged)
    assert not torch.equal(*(one.averaged for one in alone))
    torch.testing.assert_close(trainer.averaged, sum(one.averaged for one in alone) / 2)
    assert torch.equal(trainer.optimizer.log_rate.double(), trainer.averaged[:1].float().double())
    assert len([name for name in trainer.references if name.startswith("train")]) == 4
    scores = checkpoint.load(tmp_path / "run").scores
    behind = scores["validation_loss_at"]
    assert {"seed_2/score", "seed_3/score", "beginning/score", "seed_3/fine"} <= set(behind)
    first = evolving.trainer(small(pool=4))
    assert behind["beginning/score"] == first.validate()[0]
    kept = [checkpoint.load(tmp_path / "run" / "seeds" / str(seed)).optimizer for seed in (2, 3)]
    mean = sum(one.log_rate for one in kept) / 2
    torch.testing.assert_close(mean, checkpoint.load(tmp_path / "run").optimizer.log_rate)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["meta_loss"] == pytest.approx((lines[0]["meta_loss/2"] + lines[0]["meta_loss/3"]) / 2)


def test_several_evolutions_go_on_to_the_same_bits():
    trainer = evolving.trainer(small(meta_seeds=2))
    trainer.step()
    trainer.validate()
    state = trainer.state_dict()
    again = evolving.trainer(stored_config(state["config"]))
    again.load_state_dict(state)
    for one in (trainer, again):
        one.step()
    assert torch.equal(trainer.averaged, again.averaged)
    assert trainer.validate() == again.validate()
    with pytest.raises(CheckpointError, match="does not fit its configuration"):
        evolving.trainer(small()).load_state_dict(state)


def test_a_pool_comes_round_by_round_and_adam_runs_once_on_each(tmp_path):
    file = tmp_path / "adam.json"
    trainer = evolving.trainer(small(pool=3, references=str(file)))
    trainer.step()
    references = dict(trainer.references)
    assert sorted(references) == [f"train/0/{i}" for i in range(3)]
    trainer.step()
    assert trainer.references == references
    trainer.validate()
    other = evolving.trainer(replace(small(pool=3, references=str(file)), seed=7))
    assert other.references == trainer.references
    elsewhere = evolving.trainer(small(pool=3, references=str(file), budget_ms=31.0))
    assert not elsewhere.references  # other problems
    file.write_text("no JSON")
    with pytest.raises(ConfigError, match="cannot be read"):
        evolving.trainer(small(references=str(file)))


def test_a_run_folder_ends_by_time_and_holds_a_checkpoint(tmp_path):
    config = small(minutes=0.02, generations=10_000)
    trainer = train(config, tmp_path / "run", quiet=True)
    assert 0 < trainer.update < 10_000
    loaded = checkpoint.load(tmp_path / "run")
    assert loaded.method == config.method
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("fine" in line.get("validation_loss_at", {}) for line in lines)
    assert "meta_loss" in lines[0]
    assert train(config, tmp_path / "run", quiet=True, resume=True).update == trainer.update


def test_several_processes_are_refused():
    with pytest.raises(ConfigError, match="trains in one process with workers, got 2"):
        evolving.trainer(small(), processes=Processes(0, 2))
