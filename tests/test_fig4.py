"""Figure 4: branching is training from the start, controls drift as they should, teleports go the asked way."""

import dataclasses
import io
import json
import math
from types import SimpleNamespace

import pytest
import torch

from metatele.data import load_images
from metatele.errors import ConfigError, DivergedError, SingularInputError
from metatele.experiments import fig4
from metatele.experiments.__main__ import main
from metatele.geometry import Curvature, Landscape, Sharpness
from metatele.perceptron.activations import LeakyReLU
from metatele.perceptron.losses import CrossEntropy
from metatele.perceptron.mlp import MLP, Weights
from metatele.symmetry import truncated_inverse
from metatele.teleport import Ascent, GradientNormAscent, MatchedRandom
from metatele.training.replicas import Arm, Replicas

SHAPE = MLP((64, 8, 6, 10), LeakyReLU(0.1))
OPTIMIZERS = {
    "SGD": (torch.optim.SGD, {"lr": 0.1}),
    "Momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "AdaGrad": (torch.optim.Adagrad, {"lr": 0.05}),
    "Adam": (torch.optim.Adam, {"lr": 0.01}),
}


@pytest.fixture(scope="module")
def images():
    digits = load_images()
    return dataclasses.replace(
        digits, train_images=digits.train_images.double(), test_images=digits.test_images.double()
    )


@pytest.fixture(scope="module")
def trained(images):
    """Landscapes of four batches and the weights of three networks after some training, in double precision."""
    made = replicas(images, [Arm("SGD", torch.optim.SGD, {"lr": 0.1})], (1, 2, 3), 600)
    made.train(20)
    scenes = [Landscape(SHAPE, x.T, y, CrossEntropy()) for x, y in _chunks(images)]
    return scenes, SHAPE.flatten(made.weights_of(0))


def _chunks(images):
    return zip(images.train_images[:600].split(150), images.train_labels[:600].split(150), strict=True)


def replicas(images, arms, seeds=(3, 7), samples=200):
    return Replicas(images, SHAPE, arms, seeds, samples, 20)


def teleporting(optimizer, settings):
    """The bare optimizer, a teleport, and its control; the state is kept."""
    move = Ascent(rate="normalised", radius=0.05, steps=2, max_drift=math.inf)
    control = MatchedRandom(generator=torch.Generator().manual_seed(0))
    when = {"epochs": (2,), "batches": 2, "batch_size": 50, "state": "keep"}
    return [
        Arm("none", optimizer, settings),
        Arm("ascent", optimizer, settings, move, **when),
        Arm("control", optimizer, settings, control, follows="ascent", **when),
    ]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_branching_is_training_from_the_start(images, name):
    whole = replicas(images, teleporting(*OPTIMIZERS[name])).train(4)
    stem = replicas(images, teleporting(*OPTIMIZERS[name])[:1])
    stem.train(2)
    branch = stem.branched(teleporting(*OPTIMIZERS[name]))
    history = branch.train(2)
    assert (stem.epoch, branch.epoch) == (2, 4)
    for key in ("train_loss", "test_loss", "test_accuracy"):
        torch.testing.assert_close(
            torch.stack(getattr(history, key)), torch.stack(getattr(whole, key)), rtol=1e-6, atol=0
        )
    assert [t["arm"] for t in history.teleports] == [t["arm"] for t in whole.teleports] == ["ascent", "control"]
    # What it branched from goes its own way, undisturbed.
    alone = stem.train(2)
    torch.testing.assert_close(torch.stack(alone.test_loss)[:, 0], torch.stack(whole.test_loss)[:, 0])


def test_state_survives_a_file_and_training_goes_on_to_the_same_bits(images):
    arms = teleporting(*OPTIMIZERS["Adam"])
    first = replicas(images, arms)
    first.train(3)
    file = io.BytesIO()
    torch.save(first.state(), file)
    second = replicas(images, teleporting(*OPTIMIZERS["Adam"]))
    second.restore(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    one, other = first.train(1), second.train(1)
    assert torch.equal(torch.stack(one.test_loss), torch.stack(other.test_loss))
    assert one.teleports == other.teleports


def test_branches_and_followers_that_cannot_be_are_one_clear_error(images):
    stem = replicas(images, [Arm("SGD", torch.optim.SGD, {"lr": 0.1})])
    with pytest.raises(ConfigError, match="Adam cannot go on from SGD"):
        stem.branched([Arm("Adam", torch.optim.Adam, {})])
    none, ascent, control = teleporting(*OPTIMIZERS["SGD"])
    with pytest.raises(ConfigError, match="control follows ascent, which no arm before it"):
        stem.branched([none, control, ascent])
    with pytest.raises(ConfigError, match="same batches"):
        stem.branched([none, ascent, dataclasses.replace(control, batches=1)])
    with pytest.raises(ConfigError, match="move that can match one"):
        dataclasses.replace(control, teleport=GradientNormAscent(0.1))
    with pytest.raises(ConfigError, match="change must be finite"):
        MatchedRandom(change=math.nan)


@pytest.mark.parametrize("change", [0.02, 1e-4, -1e-4, -0.02, 0.0])
def test_control_has_the_drift_it_is_told_on_every_batch(trained, change):
    scenes, w = trained
    move = MatchedRandom(change=change, generator=torch.Generator().manual_seed(1), parametrisation="first-order")
    for scene in scenes:
        w, report, _ = move(scene, w)
        torch.testing.assert_close(report.drift, torch.full_like(report.drift, abs(change)), rtol=0.05, atol=1e-12)
        if change >= 0:
            assert (report.loss_after >= report.loss_before).all()


@pytest.mark.parametrize("descend", [False, True])
@pytest.mark.parametrize(
    ("objective", "rate"), [(Sharpness((0.05, 0.2), 4), 1e-3), (Curvature(1, truncate=True), 1e-5)]
)
def test_fixed_steps_go_the_asked_way(trained, objective, rate, descend):
    scenes, w = trained
    move = Ascent(
        objective=objective,
        rate="fixed",
        lr=rate,
        steps=2,
        descend=descend,
        parametrisation="first-order",
        max_drift=math.inf,
    )
    for scene in scenes:
        report = move(scene, w).report
        moved = report.objective_after - report.objective_before
        assert ((moved < 0) if descend else (moved > 0)).all()


def test_curvature_on_deficient_data_is_that_in_the_coordinates_of_their_span(images):
    x, y = images.train_images[:300].T, images.train_labels[:300]
    w = torch.randn(2, SHAPE.num_parameters, generator=torch.Generator().manual_seed(0)).double()
    with pytest.raises(SingularInputError):
        Curvature(2).value(Landscape(SHAPE, x, y, CrossEntropy()).at(w))
    # More samples than pixels; the same with equal ones; few with equal ones; few independent ones.
    for data in (x, x[:, :40].repeat(1, 2), x[:, [*range(12), 11]], x[:, :12]):
        U, S, _ = torch.linalg.svd(data, full_matrices=False)
        basis = U[:, S[0] * 1e-6 < S]
        small = MLP((basis.shape[1], *SHAPE.widths[1:]), LeakyReLU(0.1))
        matrices = SHAPE.unflatten(w).matrices
        inside = small.flatten(Weights((matrices[0] @ basis, *matrices[1:]), (None,) * 3))
        labels = torch.zeros(data.shape[1], dtype=torch.long)
        value, gradient = Curvature(2, truncate=True).value_and_gradient(
            Landscape(SHAPE, data, labels, CrossEntropy()).at(w)
        )
        there = Landscape(small, basis.T @ data, labels, CrossEntropy()).at(inside)
        expected, slope = Curvature(2, truncate=True).value_and_gradient(there)
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
        first = small.unflatten(slope).matrices[0] @ basis.T
        torch.testing.assert_close(SHAPE.unflatten(gradient).matrices[0], first, rtol=1e-5, atol=1e-9)
        if torch.linalg.matrix_rank(there.landscape.inputs) == min(there.landscape.inputs.shape):
            torch.testing.assert_close(Curvature(2).value(there), value, rtol=1e-6, atol=0)


def test_truncated_inverse_is_that_of_full_rank_too_and_refuses_what_is_not_finite():
    for shape in ((2, 6, 4), (2, 4, 6)):
        H = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
        torch.testing.assert_close(truncated_inverse(H, 1e-9), torch.linalg.pinv(H))
    with pytest.raises(SingularInputError, match="not all finite"):
        truncated_inverse(torch.full((2, 2), math.nan), 1e-6)


@pytest.mark.parametrize("name", ["fig4", "fig11"])
def test_experiment_leaves_results_a_table_and_a_figure(tmp_path, capsys, name):
    flags = [name, "--epochs", "2", "--seeds", "2", "--settings", "text", "--directions", "1", "--out", str(tmp_path)]
    main(flags)
    doc = json.loads((tmp_path / "results.json").read_text())
    assert len(doc["arms"]) == 9
    assert doc["at"] == 1
    assert doc["arms"][0]["optimizer"] == ("SGD" if name == "fig4" else "Adagrad")
    by_name = {arm["name"]: arm for arm in doc["arms"]}
    before = [run[:2] for run in by_name["none"]["test_loss"]]
    for arm in doc["arms"]:
        assert [run[:2] for run in arm["test_loss"]] == before
        assert [len(run) for run in arm["train_loss"]] == [3, 3]
    for teleport in fig4.SETTINGS["text"]:
        (done,) = by_name[teleport]["teleports"]
        assert len(done["loss"]) == len(done["objective"]) == 5
        assert fig4.mismatch(by_name[teleport], by_name[fig4.CONTROL + teleport]) < 0.05
    assert not (tmp_path / fig4.STATE).exists()
    table = (tmp_path / "table.md").read_text()
    assert "Running time" in table
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"
    if name == "fig11":
        return
    main([*flags, "--redraw"])
    assert (tmp_path / "table.md").read_text() == table
    assert "random like curvature up" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="--at must be below --epochs 2, got 2"):
        main([*flags, "--at", "2"])


def test_an_interrupted_run_goes_on_after_the_common_epochs(tmp_path, images, capsys):
    key, file = {"a": 1}, tmp_path / fig4.STATE
    args = SimpleNamespace(experiment="fig4", lr=0.1, settings="ref", dataset="digits", directions=2, curves=1)
    arms = fig4.arms(args, 1437, 1)[:1]

    def make():
        return replicas(images, arms)

    first = fig4.halfway(make, 1, file, key)
    kept = torch.load(file, weights_only=True)
    second = fig4.halfway(make, 1, file, key)
    assert "going on from" in capsys.readouterr().out
    assert torch.equal(first.weights.matrices[0], second.weights.matrices[0])
    torch.save({**kept, "state": {k: v for k, v in kept["state"].items() if k != "history"}}, tmp_path / "half.pt")
    for damaged in (b"damaged", (tmp_path / "half.pt").read_bytes()):
        file.write_bytes(damaged)
        again = fig4.halfway(make, 1, file, key)
        assert "training anew" in capsys.readouterr().out
        assert torch.equal(first.weights.matrices[0], again.weights.matrices[0])
        assert again.history.train_loss[-1].equal(first.history.train_loss[-1])
    other = fig4.halfway(make, 2, file, {"a": 2})  # other settings
    assert other.epoch == 2


def test_a_change_that_no_norm_makes_is_come_as_near_to_as_can_be(trained):
    scenes, w = trained
    move = MatchedRandom(change=1e3, generator=torch.Generator().manual_seed(1), parametrisation="first-order")
    report = move(scenes[0], w).report
    assert (report.drift > 0.01).all()
    assert (report.drift < 1e2).all()
    assert not report.rolled_back.any()


def test_training_that_diverges_is_said_so(tmp_path, capsys):
    with pytest.raises(DivergedError, match="diverged before the teleport at epoch 1: lower --lr"):
        main(["fig4", "--out", str(tmp_path), "--lr", "1e4", "--seeds", "2", "--epochs", "2"])
    assert not (tmp_path / fig4.STATE).exists()
