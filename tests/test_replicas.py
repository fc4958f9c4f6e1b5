"""Replicas trained in one program are the networks one would train alone."""

import json
import math

import pytest
import torch
from torch import nn

from metatele.data import ImageSet, load_images
from metatele.errors import ConfigError, RunFolderError
from metatele.experiments.__main__ import main
from metatele.experiments.images import interval
from metatele.experiments.optimizers_beyond import teleports, verdict
from metatele.geometry import Landscape
from metatele.perceptron.activations import LeakyReLU
from metatele.perceptron.losses import CrossEntropy
from metatele.perceptron.mlp import MLP
from metatele.random import generator
from metatele.teleport import GradientNormAscent, in_sequence
from metatele.training.replicas import Arm, Replicas

MLP_SMALL = MLP((64, 8, 6, 10), LeakyReLU(0.1), True)
OPTIMIZERS = {
    "Adam": (torch.optim.Adam, {"lr": 0.01}),
    "Momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "AdaGrad": (torch.optim.Adagrad, {"lr": 0.05}),
}
MOVE = GradientNormAscent(rate="normalised", radius=0.05, steps=3, action="approximate", max_drift=math.inf)


@pytest.fixture(scope="module")
def images():
    digits = load_images()
    return ImageSet(
        "digits",
        digits.train_images.double(),
        digits.train_labels,
        digits.test_images.double(),
        digits.test_labels,
        digits.sha256,
    )


def replicas(images, arms, seeds=(3, 7), samples=200):
    return Replicas(images, MLP_SMALL, arms, seeds, samples, 20)


def tensors(weights):
    """Matrices and biases in the order of a module's parameters."""
    return [t for pair in zip(*weights, strict=True) for t in pair]


def alone(images, arm, seed, epochs, samples=200):
    """One network with autograd, a real optimizer, and the move's own call at the epoch it is due."""
    shape = replicas(images, [arm], [seed], samples)
    model = nn.Sequential(nn.Linear(64, 8), nn.LeakyReLU(0.1), nn.Linear(8, 6), nn.LeakyReLU(0.1), nn.Linear(6, 10))
    model.double()
    with torch.no_grad():
        for p, t in zip(model.parameters(), tensors(shape.weights_of(0)), strict=True):
            p.copy_(t[0])
    x, y = images.train_images[:samples], images.train_labels[:samples]
    optimizer = arm.optimizer(model.parameters(), **arm.settings)
    order = generator(seed, "train")
    losses = []
    for epoch in range(epochs):
        if arm.teleport is not None and epoch in arm.epochs:
            chosen = torch.randperm(samples, generator=generator(seed, "tuning", epoch))
            batches = chosen[: arm.batches * arm.batch_size].split(arm.batch_size)
            flat = torch.cat([p.detach().flatten() for p in model.parameters()])
            scenes = [Landscape(MLP_SMALL, x[i].T, y[i], CrossEntropy()) for i in batches]
            flat, _ = in_sequence(arm.teleport, scenes, flat)
            nn.utils.vector_to_parameters(flat, model.parameters())
            if arm.state == "reset":
                optimizer = arm.optimizer(model.parameters(), **arm.settings)
        if epoch in arm.resets:
            optimizer = arm.optimizer(model.parameters(), **arm.settings)
        for batch in torch.randperm(samples, generator=order).split(20):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
        losses.append(float(nn.functional.cross_entropy(model(images.test_images), images.test_labels)))
    return losses


def test_every_replica_is_the_network_trained_alone(images):
    arms = []
    for name, (optimizer, settings) in OPTIMIZERS.items():
        arms.append(Arm(name, optimizer, settings))
        arms += [Arm(f"{name} {s}", optimizer, settings, MOVE, (1,), 2, 50, s) for s in ("reset", "keep")]
    arms.append(Arm("Adam reset only", *OPTIMIZERS["Adam"], resets=(1, 2)))
    history = replicas(images, arms).train(epochs=3)
    together = torch.stack(history.test_loss[1:])
    for a, arm in enumerate(arms):
        for s, seed in enumerate((3, 7)):
            expected = torch.tensor(alone(images, arm, seed, 3), dtype=torch.float64)
            torch.testing.assert_close(together[:, a, s].double(), expected, rtol=1e-7, atol=0)
    assert len(history.teleports) == 6
    assert all(t.is_contiguous() for t in tensors(replicas(images, arms).weights))
    for teleport in history.teleports:
        assert len(teleport["objective_ratio"]) == len(teleport["drift"]) == 2


def test_settings_that_do_not_fit_are_one_clear_error(images):
    arm = Arm("SGD", torch.optim.SGD, {"lr": 0.1})
    with pytest.raises(ConfigError, match="64 features, the network takes 5"):
        Replicas(images, MLP((5, 4, 10), LeakyReLU()), [arm], [0])
    with pytest.raises(ConfigError, match="train_samples"):
        Replicas(images, MLP_SMALL, [arm], [0], train_samples=10**6)
    with pytest.raises(ConfigError, match="8 x 200"):
        Replicas(images, MLP_SMALL, [Arm("T", torch.optim.SGD, {"lr": 0.1}, MOVE)], [0], train_samples=500)
    with pytest.raises(ConfigError, match="state must be"):
        Arm("SGD", torch.optim.SGD, {}, state="carry")


def test_interval_is_student_s():
    mean, half = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3.0
    assert half == pytest.approx(2.776 * math.sqrt(2.5) / math.sqrt(5))
    assert interval([1.0, None]) == (math.inf, math.inf)
    assert interval([2.0])[0] == 2.0


@pytest.mark.parametrize("name", ["fig5", "fig13"])
def test_experiments_on_images_leave_raw_results_a_table_and_a_figure(tmp_path, capsys, name):
    out = tmp_path / name
    main([name, "--epochs", "3", "--seeds", "2", "--out", str(out)])
    printed = capsys.readouterr().out
    assert "| Adam teleport" in printed
    doc = json.loads((out / "results.json").read_text())
    assert len(doc["arms"]) == 9
    assert all(len(arm["test_loss"]) == 2 and len(arm["test_loss"][0]) == 4 for arm in doc["arms"])
    first = (out / "table.md").read_text(), (out / "loss.png").read_bytes()[:4]
    main([name, "--out", str(out), "--redraw"])
    assert ((out / "table.md").read_text(), (out / "loss.png").read_bytes()[:4]) == first == (first[0], b"\x89PNG")
    with pytest.raises(RunFolderError, match=r"results\.json"):
        main([name, "--out", str(tmp_path / "nothing"), "--redraw"])
    with pytest.raises(ConfigError, match="--epochs 2 ends before AdaGrad"):
        main([name, "--epochs", "2", "--out", str(tmp_path / "short")])


def test_tuned_comparison_pairs_every_arm_with_the_one_without_teleport(tmp_path):
    out = tmp_path / "beyond"
    main(["optimizers-beyond", "--epochs", "1", "--seeds", "2", "--optimizers", "SGD", "--out", str(out)])
    doc = json.loads((out / "results.json").read_text())
    assert [arm["name"].split(", ")[1] for arm in doc["arms"]] == list(teleports(1))
    rows = [line for line in (out / "table.md").read_text().splitlines() if "SGD" in line]
    assert len(rows) == len(doc["arms"])
    assert verdict([-1.0, -1.1, -0.9]) == "better"
    assert verdict([1.0, 1.1, 0.9]) == "worse"
    assert verdict([1.0, -1.1, 0.9]) == ""
    assert verdict([None, 0.0]) == "diverges"
    with pytest.raises(ConfigError, match="optimizers must be among"):
        main(["optimizers-beyond", "--optimizers", "Magic", "--out", str(out)])


def test_small_experiments_leave_raw_results_a_table_and_a_figure(tmp_path):
    main(["functions", "--steps", "20", "--out", str(tmp_path / "functions")])
    doc = json.loads((tmp_path / "functions" / "results.json").read_text())
    last = {(arm["function"], arm["name"]): arm["loss"][0][-1] for arm in doc["arms"]}
    for name in ("ellipse", "booth"):  # where the best teleport needs one more step only
        assert last[name, "GD teleport"] < 1e-6 * last[name, "GD"]
    main(["fig12", "--steps", "10", "--seeds", "1", "--out", str(tmp_path / "fig12")])
    doc = json.loads((tmp_path / "fig12" / "results.json").read_text())
    assert [len(arm["teleports"]) for arm in doc["arms"]] == [0, 1, 1, 1, 1, 0, 1, 1, 1]
    for folder in ("functions", "fig12"):
        assert (tmp_path / folder / "loss.png").read_bytes()[:4] == b"\x89PNG"
