"""Steps on memory of their own, which CUDA graphs need, are the usual ones; a failed capture changes nothing."""

import math

import pytest
import torch
from cases import small_run

from metatele.config import from_dict, to_dict
from metatele.data import ImageSet, load_images
from metatele.errors import ConfigError
from metatele.perceptron.activations import LeakyReLU
from metatele.perceptron.mlp import MLP
from metatele.teleport import GradientNormAscent
from metatele.training import population, static_steps
from metatele.training.flat import FlatTrainer
from metatele.training.population import Population
from metatele.training.replicas import Arm, Replicas
from metatele.training.run import train
from metatele.training.static import StaticWindow

SHAPE = MLP((64, 8, 6, 10), LeakyReLU(0.1), True)
MOVE = GradientNormAscent(rate="normalised", radius=0.05, steps=2, action="approximate", max_drift=math.inf)
ADAM, ADAGRAD = (torch.optim.Adam, {"lr": 1e-3}), (torch.optim.Adagrad, {"lr": 0.01, "initial_accumulator_value": 0.1})
NESTEROV = (torch.optim.SGD, {"lr": 1e-3, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3})
ARMS = [
    Arm("Adam", *ADAM),
    Arm("SGD", torch.optim.SGD, {"lr": 0.01}),
    Arm("Adam teleport", *ADAM, MOVE, (1,), 1, 50),
    Arm("Momentum", *NESTEROV),
    Arm("Momentum kept", *NESTEROV, MOVE, (1,), 1, 50, "keep"),
    Arm("AdaGrad", *ADAGRAD),
    Arm("AdaGrad reset", *ADAGRAD, resets=(1,)),
    Arm("RMSprop", torch.optim.RMSprop, {"lr": 1e-3, "alpha": 0.9}),
    Arm("AdamW", torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
]


@pytest.fixture(scope="module")
def images():
    digits = load_images()
    kept = digits.train_images.double(), digits.train_labels, digits.test_images.double(), digits.test_labels
    return ImageSet("digits", *kept, digits.sha256)


class Replay:
    """Stands for a CUDA graph where there is none: it runs what it was captured from."""

    def __init__(self, run, log):
        self.run, self.log = run, log

    def replay(self):
        self.log.append("replay")
        self.run()


def capturing(monkeypatch, module):
    """Let a module take a CPU for a device with graphs; the list of what became of them."""
    log = []

    def captured(run, changed=(), before=3):
        kept = [t.clone() for t in changed]
        for _ in range(before + 1):
            run()
        for tensor, was in zip(changed, kept, strict=True):
            tensor.copy_(was)
        log.append("capture")
        return Replay(run, log)

    monkeypatch.setattr(module, "replayable", lambda device: True)
    monkeypatch.setattr(module, "captured", captured)
    return log


def failing(monkeypatch, *modules):
    """Let modules take a CPU for a device with graphs of which none can be captured."""

    def graph():
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    for module in modules:
        monkeypatch.setattr(module, "replayable", lambda device: True)


def replicas(images, arms=ARMS, **more):
    return Replicas(images, SHAPE, arms, (3, 7), 230, 2, **more)


def same_histories(ours, theirs):
    for name in ("train_loss", "test_loss"):
        pairs = zip(getattr(ours, name), getattr(theirs, name), strict=True)
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


@pytest.mark.parametrize("captures", [False, True])
def test_replicas_in_windows_are_those_of_single_steps(images, monkeypatch, captures):
    """115 steps an epoch in windows of 50, 50 and 15; teleports, resets and kept states between them."""
    log = capturing(monkeypatch, static_steps) if captures else []
    ours, theirs = replicas(images, graph=True), replicas(images, graph=False)
    same_histories(ours.train(3), theirs.train(3))
    for a, b in zip(sum(ours.weights, ()), sum(theirs.weights, ()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    for a, b in zip(ours.optimizers, theirs.optimizers, strict=True):
        for p, q in zip(a.state_dict()["state"].values(), b.state_dict()["state"].values(), strict=True):
            assert p.keys() == {name for name, value in q.items() if value is not None}
            for name, value in p.items():
                torch.testing.assert_close(value, q[name], rtol=1e-9, atol=1e-12)
    # Two lengths of windows; again once Adam's counters are not one any more.
    assert log.count("capture") == (4 if captures else 0)
    assert log.count("replay") == (9 if captures else 0)


def test_replicas_go_on_elsewhere_whatever_they_were_stepped_by(images):
    whole, ours, later = replicas(images, graph=False), replicas(images, graph=True), replicas(images, graph=False)
    whole.train(3)
    ours.train(1)
    later.restore(ours.state())
    later.train(1)
    end = replicas(images, graph=True)
    end.restore(later.state())
    same_histories(end.train(1), whole.history)
    twins = [r.branched([Arm("fast", torch.optim.Adam, {"lr": 0.02})]) for r in (whole, end)]
    same_histories(twins[1].train(1), twins[0].train(1))
    assert len(end.history.train_loss) == 4


def test_a_capture_that_fails_is_told_once_and_leaves_the_usual_steps(images, monkeypatch):
    failing(monkeypatch, static_steps)
    ours, theirs = replicas(images, graph=True), replicas(images, graph=False)
    with pytest.warns(UserWarning, match="no CUDA graph could be captured") as told:
        ours.train(2)
    theirs.train(2)
    assert len([w for w in told if "CUDA graph" in str(w.message)]) == 1
    assert all(torch.equal(a, b) for a, b in zip(ours.weights.matrices, theirs.weights.matrices, strict=True))

    trainer, usual = FlatTrainer(small_run()), FlatTrainer(small_run())
    with pytest.warns(UserWarning, match="no CUDA graph could be captured"):
        window = StaticWindow(
            lambda at: trainer.differentiated(at, 2), list(trainer.optimizer.parameters()), trainer.trajectories, True
        )
    end, objective = window(trainer.trajectories)
    expected, theirs = usual.differentiated(usual.trajectories, 2)
    assert torch.equal(end.weights, expected.weights)
    assert torch.equal(objective, theirs)
    for p, q in zip(trainer.optimizer.parameters(), usual.optimizer.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_rules_that_change_with_time_are_stepped_as_ever(images):
    decaying = Arm("decaying", torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.1})
    others = [
        Arm("dampened", torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
        Arm("NAdam", torch.optim.NAdam, {"lr": 0.01}),
        Arm("apart", torch.optim.SGD, {"lr": 0.1}, apart=True),
    ]
    for arm in (decaying, *others):
        assert not static_steps.can_stay([arm])
        with pytest.raises(ConfigError, match="graph needs SGD"):
            replicas(images, [arm], graph=True)
    replicas(images, [decaying]).train(1)


@pytest.mark.parametrize("captures", [False, True])
def test_a_population_in_its_own_memory_is_that_of_ever(images, monkeypatch, captures):
    """To the bit; 21 batches in windows of 4 and one of 1."""
    log = capturing(monkeypatch, population) if captures else []
    ours, theirs = (Population(images, SHAPE, range(3), 0.1, 420, 20, window=4, graph=g) for g in (True, False))
    for p in (ours, theirs):
        p.train(2)
    assert torch.equal(ours.flat, theirs.flat)
    assert log.count("capture") == (2 if captures else 0)
    if captures:
        monkeypatch.undo()
        failing(monkeypatch, population)
        alone = Population(images, SHAPE, range(3), 0.1, 420, 20, window=4)
        with pytest.warns(UserWarning, match="no CUDA graph") as told:
            alone.train(2)
        assert len(told) == 1
        assert torch.equal(alone.flat, theirs.flat)


def test_graphs_change_time_alone(tmp_path):
    """Runs saved before graphs were the default go on; so do those that one asks otherwise for."""
    config = small_run()
    assert config.training.graph is None
    before = to_dict(config)
    before["training"]["graph"] = False
    assert from_dict(type(config), before) == config == small_run(graph=True)
    train(small_run(graph=False), tmp_path / "run", quiet=True)
    assert train(small_run(graph=True), tmp_path / "run", resume=True, quiet=True).finished


@pytest.mark.parametrize(
    "changes", [{}, {"average": 0.9}, {"validation_steps": 7}, {"validation_steps": 1, "unroll": 3}]
)
def test_validation_in_windows_gives_the_score_of_ever(changes):
    """Twice, with updates between them; averaged weights, and steps that are no whole windows."""
    changes = {"validation_score_at": (1,), **changes}
    runs = [FlatTrainer(small_run(graph=graph, precision="bf16", **changes)) for graph in (False, True)]
    for _ in range(2):
        for trainer in runs:
            trainer.step()
        assert runs[0].validate() == runs[1].validate()


def test_measured_windows_in_their_own_memory_are_measured_alike():
    runs = [FlatTrainer(small_run(graph=graph)) for graph in (False, True)]
    for update in range(4):
        a, b = (trainer.step(measure=update % 2 == 1) for trainer in runs)
        a.pop("ms_per_trajectory_step"), b.pop("ms_per_trajectory_step")
        assert a == b
        assert ("drift" in a) == (update % 2 == 1)
