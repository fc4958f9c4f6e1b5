"""What others add in a file of their own: a move, an action, a rule of an operation, a kind of problem."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.nn import functional

import metatele
from metatele.cli.train import main as train
from metatele.config import KINDS, ModulesConfig, preset
from metatele.errors import ConfigError
from metatele.network.trace import MIXES, RULES, SHIFTS, rule
from metatele.symmetry import ACTIONS, Rescaling, register_action
from metatele.symmetry.exact import Element, gathered
from metatele.tasks.modules import Data, Modules, kinds, register_kind
from metatele.training.workers import Workers


@dataclass(frozen=True, kw_only=True)
class UnitNorms(metatele.ModuleMove):
    """What writes a unit gets a norm."""

    norm: float = 1.0

    def elements(self, spaces, tensors):
        for space in spaces:
            if space.group == "scale":
                rows = [gathered(place, tensors[place.name]) for place in space.places if not place.reads]
                scale = self.norm / torch.cat(rows, 1).norm(dim=1)
                yield space, Element(scale, 1 / scale)


def convolutional():
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10))


def perceptron():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))


@pytest.mark.parametrize("make", [convolutional, perceptron])
@pytest.mark.parametrize("norm", [1.0, 0.5])
def test_a_move_of_ones_own_keeps_outputs_of_any_module(make, norm):
    torch.manual_seed(0)
    model, x, y = make(), torch.randn(16, 1, 8, 8), torch.randint(10, (16,))
    before = model(x)
    report = metatele.teleport_(model, x, y, functional.cross_entropy, move=UnitNorms(norm=norm))
    assert report.moved
    torch.testing.assert_close(model(x), before)
    first = next(m for m in model if hasattr(m, "weight"))
    sizes = (first.weight.flatten(1).square().sum(1) + first.bias.square()).sqrt()
    torch.testing.assert_close(sizes, torch.full_like(sizes, norm))
    again = metatele.teleport_(model, x, y, functional.cross_entropy, move=UnitNorms(norm=norm))
    assert not again.moved or again.drift < 1e-6


def test_around_an_optimizer_too_and_transport_carries_its_memories():
    torch.manual_seed(0)
    model, x, y = convolutional(), torch.randn(16, 1, 8, 8), torch.randint(10, (16,))
    base = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    optimizer = metatele.TeleportOptimizer(base, model, UnitNorms(), at=[1], state="transport")
    for _ in range(2):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert optimizer.report.moved
    assert optimizer.report.drift < 1e-5


def test_a_move_that_changes_outputs_moves_nothing():
    class Wrong(metatele.ModuleMove):
        def elements(self, spaces, tensors):
            for space in spaces:
                if space.group == "scale":
                    two = torch.full((space.k,), 2.0, dtype=torch.float64)
                    yield space, Element(two, two)

    torch.manual_seed(0)
    model, x, y = convolutional(), torch.randn(16, 1, 8, 8), torch.randint(10, (16,))
    before = [p.detach().clone() for p in model.parameters()]
    report = metatele.teleport_(model, x, y, functional.cross_entropy, move=Wrong())
    assert report.rolled_back
    assert all(map(torch.equal, before, model.parameters()))


def test_what_a_move_of_ones_own_cannot_have_is_refused():
    with pytest.raises(ConfigError, match="groups must be some of"):
        UnitNorms(groups=("all",))
    model, x, y = convolutional(), torch.randn(4, 1, 8, 8), torch.randint(10, (4,))
    with pytest.raises(
        ConfigError, match="action is a setting of moves of perceptrons: UnitNorms of a module has none"
    ):
        metatele.teleport_(model, x, y, functional.cross_entropy, move=UnitNorms(action="rescaling"))
    with pytest.raises(ConfigError, match="UnitNorms moves a model, not flat weights"):
        UnitNorms().legs(None, [True])


def test_an_action_has_a_name_of_its_own(monkeypatch):
    class Same(Rescaling):
        name: ClassVar[str] = "same"

    monkeypatch.delitem(ACTIONS, "same", raising=False)
    register_action(Same())
    try:
        for name in ("same", "rescaling"):
            with pytest.raises(ConfigError, match=f"there is an action '{name}' already"):
                register_action({"same": Same, "rescaling": Rescaling}[name]())
        torch.manual_seed(0)
        x, y, found = torch.randn(9, 64), torch.randint(10, (9,)), []
        for name in ("same", "rescaling"):
            torch.manual_seed(1)
            model = perceptron()
            metatele.teleport_(model, x, y, functional.cross_entropy, action=name)
            found.append([p.detach() for p in model.parameters()])
        for one, other in zip(*found, strict=True):  # the known one takes a shorter way
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    finally:
        del ACTIONS["same"]


def test_a_rule_lets_units_behind_an_operation_be_scaled():
    @torch.library.custom_op("metatele_tests::cut", mutates_args=())
    def cut(x: torch.Tensor) -> torch.Tensor:
        return x.clamp_min(0)

    class Cut(nn.Module):
        def forward(self, x):
            return cut(x)

    model = nn.Sequential(nn.Linear(3, 4), Cut(), nn.Linear(4, 2))
    found = metatele.find_symmetries(model, torch.randn(5, 3))
    assert not found.spaces
    assert dict(found.unknown) == {"cut": 1}

    @rule("cut")
    def _cut(tracer, func, args, kwargs, out):
        units = tracer.units(args[0])
        tracer.forbid(units, MIXES | SHIFTS)
        tracer.mark(units, 2 * tracer.step)
        tracer.put(out, units)

    try:
        found = metatele.find_symmetries(model, torch.randn(5, 3))
        assert [space.group for space in found.spaces] == ["scale", "perm"]
        rule("cut")(lambda tracer, func, args, kwargs, out: tracer.put(out, tracer.units(args[0])))
        wrong = metatele.find_symmetries(model, torch.randn(5, 3))
        assert wrong.dropped
        assert {space.group for space in wrong.spaces} <= {"perm", "scale"}  # a rule that claims too much is caught
    finally:
        del RULES["cut"]


@dataclass(frozen=True)
class Line:
    """Straight lines."""

    shape = (1,)
    outputs = 1
    loss = "mse"
    tokens = 0
    positions = False
    slope: float

    def draw(self, count, generator, clean=False):
        x = torch.randn(count, 1, generator=generator)
        return Data(x, self.slope * x)


def _drawn(settings, index):
    """In a worker."""
    if "lines" not in kinds.KIND_OF:
        register_kind("lines", lambda draws: Line(draws.uniform(1, 2)))
    return Modules(settings).sample(0, "train", index).source.slope


def _worker(settings):
    return lambda index: _drawn(settings, index)


def test_a_kind_of_problem_is_one_call():
    with pytest.raises(ConfigError, match="kinds must be among regression"):
        Modules(ModulesConfig(kinds=("lines",)))
    with pytest.raises(ConfigError, match=r"networks must be one of regression, .*, got 'trees'"):
        register_kind("lines", lambda draws: Line(1.0), networks="trees")
    register_kind("lines", lambda draws: Line(draws.uniform(1, 2)), most=300)
    try:
        with pytest.raises(ConfigError, match="there is a kind 'lines' already"):
            register_kind("lines", lambda draws: Line(1.0))
        settings = ModulesConfig(kinds=("lines",))
        problem = Modules(settings).sample(0, "train", 1)
        assert problem.kind == "lines"
        assert problem.samples <= 300
        batch = next(problem.batches())
        assert problem.loss(problem.model()(batch.inputs), batch.targets).isfinite()
        with Workers(1, _worker, (settings,), 60.0) as workers:
            assert workers.answers([1]) == [problem.source.slope]
    finally:
        del kinds.KIND_OF["lines"]
    assert tuple(kinds.KIND_OF) == KINDS


def test_a_checkpoint_is_loaded_where_its_kinds_are_not_known_and_no_run_begins_with_them(tmp_path):
    config = preset("general", kinds=("lines",))
    optimizer = metatele.load("general").optimizer
    metatele.save(tmp_path / "one", optimizer, run=config)
    assert metatele.load(tmp_path / "one").training["task"]["kinds"] == ["lines"]
    with pytest.raises(ConfigError, match="kinds must be among regression"):
        train(["general", "--kinds", "lines", "--out", str(tmp_path / "run"), "--quiet"])
    assert not (tmp_path / "run").exists()
