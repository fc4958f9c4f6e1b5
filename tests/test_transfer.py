"""Meta-training of the equivariant family: resumable, published and evaluated like the flat one."""

import dataclasses
import json
import math
from itertools import pairwise

import pytest
import torch

import metatele
from metatele import checkpoint
from metatele.cli.evaluate import main as evaluate
from metatele.cli.train import main as train_main
from metatele.config import EquivariantRunConfig, from_dict, stored_config, to_dict, transfer
from metatele.errors import CheckpointError, ConfigError, RunFolderError
from metatele.learned import EquivariantOptimizer
from metatele.tasks.held_out import REGRESSIONS
from metatele.training.baselines import Baseline, run_candidates
from metatele.training.equivariant import EquivariantTrainer
from metatele.training.run import read_state, train, train_once
from metatele.unroll import losses_of

SMALL = {
    "trajectories": 12,
    "batch": 2,
    "groups": 3,
    "horizon": 8,
    "shorter": (4,),
    "unroll": 4,
    "widest": 12,
    "hidden": 8,
    "validation_trajectories": 8,
    "validation_steps": 10,
    "validation_score_at": (5, 10),
    "validation_every": 4,
    "save_every": 4,
    "log_every": 4,
}


def parameters(optimizer):
    return torch.cat([p.detach().flatten() for p in optimizer.parameters()])


def test_training_lowers_the_losses_it_reaches():
    trainer = EquivariantTrainer(transfer(**{**SMALL, "trajectories": 120, "groups": 6, "batch": 4}))
    before, _ = trainer.validate()
    while not trainer.finished:
        trainer.step()
    after, losses = trainer.validate()
    assert after < before
    assert set(losses) == {5, 10}
    assert all(0 < value < 1 for value in losses.values())


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path):
    config = transfer(**SMALL)
    assert config.training.updates == 12
    whole = train(config, tmp_path / "whole", quiet=True)
    part = EquivariantTrainer(config)
    for _ in range(7):  # past the end of some horizons, in the middle of others
        part.step()
    torch.save(part.state_dict(), tmp_path / "state.pt")
    again = EquivariantTrainer(config)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    while not again.finished:
        again.step()
    assert torch.equal(parameters(again.optimizer), parameters(whole.optimizer))
    assert torch.equal(parameters(again.averaged), parameters(whole.averaged))
    assert again.started == whole.started > 3
    state = read_state(tmp_path / "whole")
    assert stored_config(state["config"]) == config
    del state["trajectories"]["groups"][0]["weights"]
    with pytest.raises(CheckpointError, match="does not fit its configuration"):
        EquivariantTrainer(config).load_state_dict(state)


def test_steps_computed_anew_give_the_same_updates():
    plain, again = (EquivariantTrainer(transfer(**SMALL, remat=remat)) for remat in (False, True))
    for _ in range(4):
        assert plain.step()["meta_loss"] == again.step()["meta_loss"]
    assert all(
        torch.equal(a, b) for a, b in zip(plain.optimizer.parameters(), again.optimizer.parameters(), strict=True)
    )


def test_a_run_folder_is_resumed_and_refused_as_that_of_the_flat_family(tmp_path):
    config = transfer(**SMALL)
    train(config, tmp_path / "run", quiet=True)
    train(config, tmp_path / "run", resume=True, quiet=True)  # finished: nothing to do
    with pytest.raises(RunFolderError, match="other settings: seed is 1 here and 0 there"):
        train(transfer(seed=1, **SMALL), tmp_path / "run", resume=True)
    with pytest.raises(RunFolderError, match="other settings: its preset is transfer"):
        train(metatele.config.preset("quick"), tmp_path / "run", resume=True)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines if "meta_loss" in line] == [4, 8, 12]
    assert all(math.isfinite(line["meta_loss"]) for line in lines if "meta_loss" in line)


def test_checkpoints_hold_the_family_and_load_for_any_shape(tmp_path):
    config = transfer(**SMALL)
    optimizer = EquivariantOptimizer(config.method, seed=3)
    checkpoint.save(tmp_path / "c", optimizer, run=config)
    loaded = metatele.load(tmp_path / "c")
    assert loaded.method == config.method
    assert loaded.task == config.task
    assert torch.equal(parameters(loaded.optimizer), parameters(optimizer))
    for widths in ((3, 2), (7, 30, 5), (4, 6, 5, 3)):
        layers = [layer for d, o in pairwise(widths) for layer in (torch.nn.Linear(d, o), torch.nn.Tanh())]
        model = torch.nn.Sequential(*layers[:-1])
        step = metatele.LearnedOptimizer(model, tmp_path / "c")
        before = [p.detach().clone() for p in model.parameters()]
        for _ in range(2):  # the first may be a teleport that is refused
            step.zero_grad()
            model(torch.randn(19, widths[0])).square().mean().backward()
            step.step()
        assert all(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    document = json.loads((tmp_path / "c" / "config.json").read_text())
    assert document["family"] == "equivariant"
    assert document["name"] == "Equivariant(update,tele)"


def test_the_published_checkpoint_solves_the_papers_task():
    problems = REGRESSIONS["paper"].sample(5, "evaluation", 16)
    losses = losses_of(metatele.load("checkpoints/transfer").optimizer, problems, 100)
    assert losses[30].mean() < 1e-5
    assert losses[100].mean() < 1e-6
    assert (losses <= 1.001 * losses[0]).all()


@pytest.mark.parametrize("name", ["narrow", "deep", "activation", "deep-over", "deeper-over"])
def test_the_published_checkpoint_is_far_below_tuned_adam_on_problems_it_never_met(name):
    kind = REGRESSIONS[name]
    adam = Baseline("Adam", torch.optim.Adam, tuple({"lr": lr} for lr in (3e-3, 1e-2, 3e-2, 1e-1)))
    best = run_candidates(adam, adam.grid, kind.sample(6, "evaluation", 8), 100)[-1].mean(-1).min()
    ours = losses_of(metatele.load("checkpoints/transfer").optimizer, kind.sample(6, "evaluation", 8), 100)[-1].mean()
    assert ours < best / (100 if kind.suffices else 10)


@pytest.mark.parametrize("order", ["shuffled", "in turn"])
@pytest.mark.parametrize("activation", [torch.nn.SiLU, torch.nn.Tanh, torch.nn.ReLU])
def test_deep_networks_on_mini_batches_do_not_blow_up(activation, order):
    from metatele.data import load_images

    images = load_images("digits")
    x, y = images.train_images, images.train_labels
    draws = torch.Generator().manual_seed(0)
    for seed in range(2):
        torch.manual_seed(seed)
        widths = (64, 32, 32, 32, 32, 10)
        layers = [layer for d, o in pairwise(widths) for layer in (torch.nn.Linear(d, o), activation())]
        model = torch.nn.Sequential(*layers[:-1])
        optimizer, losses = metatele.LearnedOptimizer(model, "checkpoints/transfer"), []
        for _ in range(8):
            samples = torch.randperm(len(x), generator=draws) if order == "shuffled" else torch.arange(len(x))
            for batch in samples.split(144):  # ten batches: every look is at the same one, if they come in turn
                optimizer.zero_grad()
                loss = torch.nn.functional.cross_entropy(model(x[batch]), y[batch])
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
        assert max(losses) < 30
        assert losses[-1] < 0.5


def test_the_published_checkpoint_learns_digits_faster_than_adam():
    from metatele.data import load_images

    images = load_images("digits")
    x, y = images.train_images, images.train_labels
    losses = []
    for make in (
        lambda m: metatele.LearnedOptimizer(m, "checkpoints/transfer"),
        lambda m: torch.optim.Adam(m.parameters(), 1e-2),
    ):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
        optimizer = make(model)
        for _ in range(2):
            for batch in torch.randperm(len(x)).split(100):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
                optimizer.step()
        losses.append(float(torch.nn.functional.cross_entropy(model(x), y).detach()))
    assert losses[0] < 0.6 * losses[1]


def test_a_lost_trajectory_does_not_cost_the_others_their_window():
    trainer = EquivariantTrainer(transfer(**SMALL))
    group = trainer.groups[0]
    weights = group.at.weights.clone()
    weights[0, 3] = math.nan
    group.at = dataclasses.replace(group.at, weights=weights)
    metrics = trainer.step()
    assert metrics["skipped"] == 0
    assert metrics["lost_trajectories"] == 1
    assert math.isfinite(metrics["meta_gradient_norm"])
    assert metrics["meta_gradient_norm"] > 0


def test_meta_training_is_done_once(tmp_path):
    train_once(transfer(**SMALL), tmp_path / "run")
    seconds = (tmp_path / "run" / "seconds.json").read_text()
    assert float(seconds) > 0
    state = (tmp_path / "run" / "training_state.pt").stat().st_mtime_ns
    train_once(transfer(**SMALL), tmp_path / "run")
    assert (tmp_path / "run" / "training_state.pt").stat().st_mtime_ns == state
    with pytest.raises(RunFolderError, match="other settings; choose another --runs"):
        train_once(transfer(seed=1, **SMALL), tmp_path / "run")


def test_the_programs_know_the_family(tmp_path, capsys):
    flags = ["--trajectories", "4", "--batch", "2", "--groups", "2", "--horizon", "4", "--shorter", "none"]
    flags += ["--unroll", "2", "--widest", "9", "--validation-trajectories", "4", "--validation-steps", "10"]
    flags += ["--validation-score-at", "10", "--quiet"]
    train_main(["transfer", "--family", "equivariant", *flags, "--blind", "loss,clock", "--out", str(tmp_path / "run")])
    assert metatele.load(tmp_path / "run").method.blind == ("loss", "clock")
    evaluate([str(tmp_path / "run"), "--trajectories", "2", "--steps", "5", "--out", str(tmp_path / "e")])
    curves = json.loads((tmp_path / "e" / "curves.json").read_text())
    assert curves["methods"][0]["name"] == "Equivariant(update,tele)"
    assert len(curves["methods"][0]["loss"]["mean"]) == 6
    for given, words in (
        (["quick", "--family", "equivariant"], "the preset quick is for the family flat"),
        (["transfer", "--family", "flat"], "the preset transfer is for the family equivariant"),
        (["transfer", "--method", "update"], "method is a setting of the flat family, and the preset transfer"),
        (
            ["quick", "--widest", "9"],
            "widest is a setting of the equivariant family, and the preset quick is",
        ),
        (["transfer", "--precision", "bf16"], "precision is a setting of the flat family"),
        (["transfer", "--blind", "loss,all"], "blind must be among slopes, cosine"),
    ):
        with pytest.raises(ConfigError, match=words):
            train_main([*given, "--out", str(tmp_path / "no")])
    assert not (tmp_path / "no").exists()


def test_configurations_survive_json():
    config = transfer(seed=4, widest=32, hidden=16)
    assert from_dict(EquivariantRunConfig, json.loads(json.dumps(to_dict(config)))) == config
