"""Families of meta-optimizers: settings of one are refused by another, and a further one is three entries."""

import json
import math
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import nn

import metatele
from metatele import checkpoint
from metatele.cli.evaluate import main as evaluate
from metatele.cli.train import main as train_main
from metatele.config import (
    FamilyConfig,
    GroupTrainingConfig,
    MixtureConfig,
    RunConfig,
    families,
    family_named,
    preset,
    register_family,
    stored_config,
    to_dict,
    transfer,
)
from metatele.config.base import setting
from metatele.errors import ConfigError
from metatele.learned import LearnedFamily, family_of, learned_family, register_learned
from metatele.perceptron.mlp import attach_gradient
from metatele.tasks import Fitting, Mixture, Regression
from metatele.training.curves import learned_curves
from metatele.training.families import register_trainer, trainer_of
from metatele.training.groups import GroupTrainer
from metatele.training.run import train
from metatele.unroll import losses_of, start, unroll

FLAT_ALONE = {"staggered": True, "teleport_lr": 1e-3, "precision": "bf16", "graph": True, "radius": 0.1, "samples": 3}
EQUIVARIANT_ALONE = {"groups": 7, "reach": 0.5, "widest": 9}


@pytest.mark.parametrize("name", FLAT_ALONE)
def test_settings_of_the_flat_family_are_refused_by_the_equivariant_one(name):
    with pytest.raises(ConfigError) as caught:
        transfer(**{name: FLAT_ALONE[name]})
    expected = f"{name} is a setting of the flat family, and the preset transfer is of the equivariant one"
    assert str(caught.value) == expected
    assert preset("quick", **{name: FLAT_ALONE[name]}).family.name == "flat"


@pytest.mark.parametrize("name", EQUIVARIANT_ALONE)
def test_settings_of_the_equivariant_family_are_refused_by_the_flat_one(name):
    with pytest.raises(ConfigError) as caught:
        preset("quick", **{name: EQUIVARIANT_ALONE[name]})
    expected = f"{name} is a setting of the equivariant family, and the preset quick is of the flat one"
    assert str(caught.value) == expected
    assert transfer(**{name: EQUIVARIANT_ALONE[name]}).family.name == "equivariant"


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (["transfer", "--staggered", "true"], "staggered"),
        (["transfer", "--graph", "true"], "graph"),
        (["quick", "--groups", "7"], "groups"),
    ],
)
def test_the_program_refuses_foreign_settings_and_leaves_no_folder(tmp_path, given, name):
    with pytest.raises(ConfigError, match=f"{name} is a setting of the (flat|equivariant) family"):
        train_main([*given, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_what_earlier_versions_stored_of_the_other_family_is_dropped_at_its_default_alone():
    for config, foreign in (
        (preset("best", "lr-tele", seed=2), {"groups": 1}),
        (transfer(seed=4), {"staggered": False}),
    ):
        stored = json.loads(json.dumps(to_dict(config)))
        assert stored_config(stored) == config
        stored["training"] |= foreign
        assert stored_config(stored) == config
    stored["training"]["staggered"] = True
    with pytest.raises(ConfigError, match="staggered is a setting of the flat family, not of the equivariant one"):
        stored_config(stored)
    stored["training"]["staggered"] = False
    stored["training"]["nonsense"] = 1
    with pytest.raises(ConfigError, match="no field 'nonsense'"):
        stored_config(stored)


@pytest.mark.parametrize("name", ["update-tele", "update", "lr-tele", "transfer", "general"])
def test_the_story_of_every_published_checkpoint_is_read(name):
    training = metatele.load(f"checkpoints/{name}").training
    names = ("preset", "seed", "task", "method", "training")
    config = stored_config({key: training[key] for key in names})
    assert config.family.name == {"transfer": "equivariant", "general": "general"}.get(name, "flat")
    assert config.training.updates >= training["update"]


def test_names_and_presets_are_taken_once():
    flat = family_named("flat")
    with pytest.raises(ConfigError, match="there is a family 'flat' already"):
        register_family(flat)
    with pytest.raises(ConfigError, match="the preset 'best' is of the family 'flat' already"):
        register_family(replace(flat, name="round"))
    with pytest.raises(ConfigError, match="family must be one of flat, equivariant, general"):
        learned_family("round")
    with pytest.raises(TypeError, match="a Checkpoint or a meta-optimizer, got Linear"):
        family_of(nn.Linear(2, 2))


@pytest.mark.parametrize("name", ["update-tele", "transfer", "general"])
def test_all_families_unroll_by_one_protocol(name):
    """Losses with and without history agree, a detached point has none, and a saved one goes on to the same bits."""
    optimizer = metatele.load(f"checkpoints/{name}").optimizer.requires_grad_(True)
    problems = Regression(preset("quick").task).sample(3, "evaluation", range(4))
    begin = start(optimizer, problems)
    end, losses = unroll(optimizer, begin, 3)
    torch.testing.assert_close(losses.detach(), losses_of(optimizer, problems, 3)[1:])
    assert end.weights.requires_grad
    assert losses.requires_grad
    cut = end.detach()
    assert not cut.weights.requires_grad
    assert not cut.loss.requires_grad
    assert cut.gradient.shape == cut.weights.shape == problems.initial.shape
    assert int(torch.as_tensor(cut.age).max()) == 3
    again = start(optimizer, problems).restored(cut.saved())
    assert torch.equal(unroll(optimizer, again, 2)[1], unroll(optimizer, cut, 2)[1])


def test_batched_perceptrons_on_one_batch_are_stepped_by_the_general_family_as_by_the_equivariant_one():
    problems = Regression(preset("quick").task).sample(3, "evaluation", range(4))
    general, equivariant = (metatele.load(f"checkpoints/{name}").optimizer for name in ("general", "transfer"))
    assert torch.equal(losses_of(general, problems, 4), losses_of(equivariant, problems, 4))


# --- a further family: gradient descent with one learned rate


@dataclass(frozen=True)
class RateConfig:
    """One learned rate."""

    first: float = setting(0.01, "the rate before training")

    @property
    def title(self):
        return "GD(lr)"


@dataclass(frozen=True)
class RateRunConfig(RunConfig):
    """A run of this family."""

    preset: str = "rate"
    seed: int = 0
    task: MixtureConfig = field(default_factory=MixtureConfig)
    method: RateConfig = field(default_factory=RateConfig)
    training: GroupTrainingConfig = field(default_factory=GroupTrainingConfig)


class LearnedRate(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.log_rate = nn.Parameter(torch.tensor(math.log(config.first)))


@dataclass(frozen=True)
class Descent:
    """Normalised gradient descent, unrolled."""

    problems: Fitting
    weights: torch.Tensor
    loss: torch.Tensor
    gradient: torch.Tensor
    age: int = 0

    @staticmethod
    def begin(optimizer, problems):
        problems = problems.fitting()
        return Descent(problems, problems.initial, *problems.loss_and_gradient(problems.initial))

    def advanced(self, optimizer, *, observe=None, remat=False):
        weights = self.weights - optimizer.log_rate.exp() * nn.functional.normalize(self.gradient, dim=-1)
        loss, gradient = self.problems.loss_and_gradient(weights, self.age + 1)
        return Descent(self.problems, weights, attach_gradient(weights, loss, gradient), gradient, self.age + 1)

    def detach(self):
        return replace(self, weights=self.weights.detach(), loss=self.loss.detach())

    def saved(self):
        return {"age": self.age, "weights": self.weights}

    def restored(self, saved):
        found = self.problems.loss_and_gradient(saved["weights"], saved["age"])
        return Descent(self.problems, saved["weights"], *found, saved["age"])

    def is_common(self, name):
        return False


def register_rate():
    """What a new family has to say; once in a process, as an import would."""
    if "rate" in [family.name for family in families()]:
        return
    title, changed = "gradient descent with one learned rate", {"objective": "mean-log"}
    register_family(FamilyConfig("rate", title, RateRunConfig, ("rate",), lambda *_: changed))
    register_learned(LearnedFamily("rate", LearnedRate, lambda method, task, seed: LearnedRate(method), Descent.begin))
    register_trainer(
        "rate",
        lambda config, device, processes: GroupTrainer(
            config, LearnedRate(config.method), Mixture(config.task), device, processes
        ),
    )


SMALL = {
    "trajectories": 24,
    "batch": 2,
    "groups": 3,
    "horizon": 8,
    "unroll": 4,
    "widest": 12,
    "local_lr": 0.05,
    "validation_trajectories": 8,
    "validation_steps": 10,
    "validation_score_at": (5, 10),
    "validation_every": 4,
    "save_every": 5,
    "log_every": 4,
}


def test_a_further_family_trains_resumes_saves_loads_and_is_evaluated(tmp_path, capsys):
    register_rate()
    config = preset("rate", **SMALL)
    trainer = trainer_of(config)
    before, _ = trainer.validate()
    whole = train(config, tmp_path / "whole", quiet=True)
    assert whole.update == config.training.updates == 24
    assert whole.validate()[0] < before
    part = trainer_of(config)
    for _ in range(7):
        part.step()
    again = trainer_of(stored_config(part.state_dict()["config"]))
    again.load_state_dict(part.state_dict())
    while not again.finished:
        again.step()
    assert torch.equal(again.optimizer.log_rate, whole.optimizer.log_rate)

    loaded = metatele.load(tmp_path / "whole")
    assert isinstance(loaded.optimizer, LearnedRate)
    assert loaded.method == config.method
    assert checkpoint.read_config(tmp_path / "whole")["family"] == "rate"
    problems = Regression(preset("quick").task).sample(0, "evaluation", range(3))
    assert learned_curves(loaded.optimizer, problems, 4)[0].shape == (5, 3)
    evaluate([str(tmp_path / "whole"), "--trajectories", "2", "--steps", "5", "--out", str(tmp_path / "e")])
    assert json.loads((tmp_path / "e" / "curves.json").read_text())["methods"][0]["name"] == "GD(lr)"

    train_main(
        ["rate", "--first", "0.02", "--trajectories", "4", "--batch", "2", "--quiet", "--out", str(tmp_path / "cli")]
    )
    assert metatele.load(tmp_path / "cli").method.first == 0.02
    with pytest.raises(ConfigError, match="first is a setting of the rate family, and the preset quick is of"):
        preset("quick", first=0.1)
    capsys.readouterr()
