"""Every path on the CPU and, where there is one, on a GPU: the same numbers as on the CPU."""

import copy
from pathlib import Path

import pytest
import torch
from cases import METHODS, small_run
from naive import NaiveLearner
from torch import nn

import metatele
from metatele.config import TRANSFER, transfer
from metatele.data import load_images
from metatele.geometry import Curvature, Landscape, Sharpness
from metatele.learned import MetaOptimizer
from metatele.perceptron.activations import LeakyReLU
from metatele.perceptron.losses import CrossEntropy
from metatele.perceptron.mlp import MLP
from metatele.tasks import Regression
from metatele.training.baselines import baseline_curves
from metatele.training.curves import learned_curves
from metatele.training.equivariant import EquivariantTrainer
from metatele.training.flat import FlatTrainer
from metatele.training.population import Population
from metatele.training.replicas import Arm, Replicas
from metatele.training.run import train

ROOT = Path(__file__).resolve().parent.parent
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]
SHAPE = MLP((64, 12, 10), LeakyReLU(0.1))

pytestmark = pytest.mark.parametrize("device", DEVICES)


def close(ours, theirs, rtol=1e-3, atol=1e-5):
    torch.testing.assert_close(ours.detach().cpu(), theirs.detach().cpu(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "changes", [{}, {"precision": "bf16"}, {"precision": "tf32"}, {"remat": True}, {"graph": True}]
)
def test_flat_meta_training(device, method, changes):
    ours, theirs = (
        FlatTrainer(small_run(method=method, **changes), device),
        FlatTrainer(small_run(method=method), "cpu"),
    )
    loose = "precision" in changes and (device == "cuda" or changes["precision"] == "bf16")
    for _ in range(4):
        a, b = ours.step(), theirs.step()
        assert a["meta_loss"] == pytest.approx(b["meta_loss"], rel=3e-2 if loose else 1e-3, abs=1e-3)
    assert ours.trajectories.weights.device.type == device


def test_windows_in_their_own_memory_are_those_of_ever(device):
    """Restarts, windows of two lengths and measured ones among them; to the bit on a CPU."""
    runs = []
    for graph in (False, True):
        trainer = FlatTrainer(small_run(horizon=7, unroll=3, trajectories=40, graph=graph), device)
        for update in range(12):
            trainer.step(measure=update % 4 == 3)
        runs.append(trainer)
    for a, b in zip(runs[0].optimizer.parameters(), runs[1].optimizer.parameters(), strict=True):
        close(a, b, *((0, 0) if device == "cpu" else (1e-4, 1e-6)))
    close(runs[0].trajectories.weights, runs[1].trajectories.weights, *((0, 0) if device == "cpu" else (1e-3, 1e-4)))


def test_a_run_resumes_on_another_device(device, tmp_path):
    whole = train(small_run(), tmp_path / "whole", quiet=True)

    trainer = FlatTrainer(small_run(), "cpu")
    for _ in range(3):
        trainer.step()
    resumed = FlatTrainer(small_run(), device)
    resumed.load_state_dict(trainer.state_dict())
    while not resumed.finished:
        resumed.step()
    for a, b in zip(resumed.optimizer.parameters(), whole.optimizer.parameters(), strict=True):
        close(a, b, 1e-2, 1e-3)


def test_the_naive_loop_stays_on_its_device(device):
    """On ``meta`` too, where any tensor of another device would be refused."""
    config = small_run(method="update-tele", parametrisation="first-order", gradient_cap=0.0)
    for where in (device, "meta"):
        learner = NaiveLearner(MetaOptimizer(config.method, config.task).to(where))
        problem = Regression(config.task).sample(0, "train", [0]).to(where)
        weights, losses = learner.run(problem.initial[0], problem.inputs[0], problem.targets[0], 2)
        torch.stack(losses).sum().backward()
        assert {t.device.type for t in (weights, *(p.grad for p in learner.parameters()))} == {where}


def test_equivariant_meta_training(device):
    config = transfer(trajectories=16, batch=2, groups=2, horizon=8, shorter=(4,), unroll=4, widest=12, hidden=8)
    ours, theirs = EquivariantTrainer(config, device), EquivariantTrainer(config, "cpu")
    for _ in range(3):
        a, b = ours.step(), theirs.step()
        assert a["meta_loss"] == pytest.approx(b["meta_loss"], rel=1e-2, abs=1e-2)


def test_evaluation(device):
    config = small_run()
    task = Regression(config.task)
    problems = task.sample(1, "evaluation", range(6))
    optimizer = FlatTrainer(config).optimizer
    losses, _ = learned_curves(copy.deepcopy(optimizer).to(device), problems.to(device), 5)
    close(losses, learned_curves(optimizer, problems, 5)[0])
    found = baseline_curves(task, problems.to(device), 4, seed=0, tuning_trajectories=4)
    for a, b in zip(found, baseline_curves(task, problems, 4, seed=0, tuning_trajectories=4), strict=True):
        close(a.losses[0], b.losses[0])
        assert torch.isfinite(a.losses[0]).all()


def test_standard_optimizers_and_table_1(device):
    images = load_images()
    arms = [Arm("SGD", torch.optim.SGD, {"lr": 0.1}), Arm("Adam", torch.optim.Adam, {"lr": 1e-3})]
    ours, theirs = (Replicas(images, SHAPE, arms, range(2), 200, 20, d).train(1) for d in (device, "cpu"))
    close(ours.train_loss[-1], theirs.train_loss[-1])
    flat = []
    for d in (device, "cpu"):
        population = Population(images, SHAPE, range(2), 0.1, 200, 20, d)
        population.train(1)
        inputs, labels = images.train_images[:50].T.to(d), images.train_labels[:50].to(d)
        scene = Landscape(SHAPE, inputs, labels, CrossEntropy()).at(SHAPE.flatten(population.weights))
        flat.append([Sharpness(directions=20).value(scene), Curvature(truncate=True).value(scene)])
    for a, b in zip(*flat, strict=True):
        close(a, b, 1e-2, 1e-3)


def model_of(device, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)).to(device)


@pytest.mark.parametrize("make", ["learned", "teleport"])
def test_a_users_training_loop(device, make):
    x, y = torch.randn(64, 8), torch.randint(3, (64,))
    losses = []
    for d in (device, "cpu"):
        model, seen = model_of(d), []
        if make == "learned":
            optimizer = metatele.LearnedOptimizer(model, ROOT / "checkpoints" / TRANSFER)
        else:
            optimizer = metatele.TeleportOptimizer(torch.optim.Adam(model.parameters(), 1e-2), model, every=3)
        for step in range(8):
            batch = slice(32 * (step % 2), 32 * (step % 2) + 32)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x[batch].to(d)), y[batch].to(d))
            loss.backward()
            optimizer.step()
            seen.append(loss.detach().cpu())
        losses.append(torch.stack(seen))
    close(losses[0], losses[1], 1e-2, 1e-3)
    assert losses[0][-1] < losses[0][0]
