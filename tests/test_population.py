"""Many networks in one program are the networks trained one by one; Table 1 says what it measured."""

import copy
import json
import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn

from metatele.data import load_images
from metatele.errors import ConfigError, RunFolderError
from metatele.experiments.__main__ import main
from metatele.experiments.table1 import partial, pearson
from metatele.perceptron.activations import LeakyReLU, Tanh
from metatele.perceptron.mlp import MLP
from metatele.random import generator
from metatele.training.population import Population


def make(activation=None, biases=False, seeds=range(3), samples=250, lr=0.05, **more):
    mlp = MLP((64, 12, 11, 10), activation or LeakyReLU(0.1), biases)
    return Population(load_images(), mlp, seeds, lr, train_samples=samples, **more)


def modules(population, number):
    """One network of a population as an ordinary module."""
    layers = []
    for W, b, f in zip(*population.weights, [*population.mlp.activations, None], strict=True):
        linear = nn.Linear(W.shape[2], W.shape[1], b is not None)
        with torch.no_grad():
            linear.weight.copy_(W[number])
            if b is not None:
                linear.bias.copy_(b[number])
        layers += [linear, nn.Tanh() if isinstance(f, Tanh) else nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers[:-1])


@pytest.mark.parametrize(("activation", "biases"), [(LeakyReLU(0.1), False), (Tanh(), True)])
@pytest.mark.parametrize("window", [1, 4, 10])
def test_networks_are_those_trained_one_by_one(activation, biases, window):
    population = make(activation, biases, window=window)
    alone = [modules(population, m) for m in range(3)]
    population.train(2)
    images = population.train_images, population.train_labels
    for m, network in enumerate(alone):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
        for epoch in range(2):
            order = torch.randperm(250, generator=generator(0, "train", epoch))[:240]
            for batch in order.split(20):
                optimizer.zero_grad()
                nn.functional.cross_entropy(network(images[0][batch]), images[1][batch]).backward()
                optimizer.step()
        for ours, theirs in zip(modules(population, m).parameters(), network.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)
        for split, (x, y) in (("train", images), ("test", (population.test_images, population.test_labels))):
            with torch.no_grad():
                outputs = network(x)
            loss, accuracy = (values[m] for values in population.measured(split))
            assert float(loss) == pytest.approx(float(nn.functional.cross_entropy(outputs, y)), rel=1e-5)
            assert float(accuracy) == pytest.approx(float((outputs.argmax(1) == y).float().mean()))


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path):
    whole, state = make(), tmp_path / "state.pt"
    whole.train(3)
    first = make()
    first.train(2, state=state)
    second = make()
    second.train(3, state=state)
    assert torch.equal(second.flat, whole.flat)
    with pytest.raises(RunFolderError, match="other networks, data or settings"):
        make(lr=0.1).train(4, state=state)
    with pytest.raises(RunFolderError, match="3 epochs behind it, more than the 2 asked"):
        make().train(2, state=state)
    kept = torch.load(state, weights_only=True)
    for name, value in (("flat", kept["flat"][0]), ("epochs", -1), ("epochs", 2.7), ("seconds", float("nan"))):
        torch.save({**kept, name: value}, state)
        with pytest.raises(RunFolderError, match="not a readable state"):
            make().train(4, state=state)
    torch.save(kept, state)
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(RunFolderError, match="not a readable state"):
        make().train(4, state=state)


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="64 features"):
        Population(load_images(), MLP((63, 5, 10), Tanh()), range(2), 0.1)
    with pytest.raises(ConfigError, match="hidden layer"):
        Population(load_images(), MLP((64, 10), Tanh()), range(2), 0.1)
    with pytest.raises(ConfigError, match="train_samples"):
        make(samples=10**6)
    with pytest.raises(ConfigError, match="window must be at least 1, got 0"):
        make(window=0)
    with pytest.raises(ConfigError, match="lr must be positive"):
        make(lr=0.0)


def test_correlations_are_those_of_scipy():
    random = np.random.default_rng(0)
    x, z = random.normal(size=(2, 40))
    y = 0.5 * x + z + random.normal(size=40)
    r, low, high = pearson(x.tolist(), y.tolist())
    known = scipy.stats.pearsonr(x, y)
    interval = known.confidence_interval(0.95)
    assert (r, low, high) == pytest.approx((known.statistic, interval.low, interval.high), rel=1e-6)
    residues = [v - np.polyval(np.polyfit(z, v, 1), z) for v in (x, y)]
    assert partial(x.tolist(), y.tolist(), z.tolist()) == pytest.approx(scipy.stats.pearsonr(*residues).statistic)
    assert all(math.isnan(v) for v in pearson([1.0] * 5, [1.0, 2.0, 3.0, 4.0, 5.0]))


def test_table_1_leaves_raw_results_a_table_and_a_figure(tmp_path, capsys):
    out = tmp_path / "table1"
    main(["table1", "--networks", "6", "--epochs", "2", "--out", str(out)])
    assert "| curvature ψ" in capsys.readouterr().out
    doc = json.loads((out / "results.json").read_text())
    assert len(doc["arms"]) == 6
    for arm in doc["arms"]:
        assert all(math.isfinite(arm[name]) for name in ("sharpness", "orthant", "rise", "curvature", "test_loss"))
        assert arm["rise"] == pytest.approx(arm["sharpness"] - arm["train_loss"], abs=0.02)
    assert not (out / "state.pt").exists()
    first = (out / "table.md").read_text()
    main(["table1", "--out", str(out), "--redraw"])
    assert (out / "table.md").read_text() == first
    assert (out / "correlation.png").read_bytes()[:4] == b"\x89PNG"
    broken = copy.deepcopy(doc)
    broken["arms"][0]["test_loss"] = broken["arms"][0]["sharpness"] = None
    (out / "results.json").write_text(json.dumps(broken))
    main(["table1", "--out", str(out), "--redraw"])
    assert "nan" not in (out / "table.md").read_text()
    assert "1 not finite and left out" in (out / "table.md").read_text()
    with pytest.raises(ConfigError, match="--networks in place of --seeds"):
        main(["table1", "--seeds", "3", "--out", str(out)])
